"""Q#: learn how much reward every next token leads to under the reference policy, and act by the reference times exp(Q / eta)."""

from dfpo_core.algorithms import registry


@registry.register("q_sharp")
class QSharp:
    """Credit: none is assigned. A response follows the guided policy up to a random token and the reference from there on, and the tokens
    behind the switch teach the critic the distribution of the reward-to-go under the reference. The policy's weights never change: what
    is trained, evaluated and written is the reference with its guide. The advantage is only logged, in the table of samples.
    """

    critic, critic_options = "q_function", {}
    advantage, advantage_options = "reinforce_pp", {}
    policy_loss, policy_loss_options = None, {}
    citation = "Zhou et al. 2025, Q#: Provably Optimal Distributional RL for LLM Post-Training, arXiv 2502.20548"
