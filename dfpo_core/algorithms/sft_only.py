"""SFT only: no reinforcement learning. What the other algorithms have to beat, under the same steps and the same metrics."""

from dfpo_core.algorithms import registry


@registry.register("sft_only")
class SFTOnly:
    """No policy loss: every step rolls out and scores the warm start and logs that, and updates nothing; the policy written is the SFT one.

    The advantage is only logged, in the table of samples.
    """

    critic, critic_options = None, {}
    advantage, advantage_options = "reinforce_pp", {}
    policy_loss, policy_loss_options = None, {}
    citation = "Ouyang et al. 2022, Training language models to follow instructions with human feedback (its SFT model), arXiv 2203.02155"
