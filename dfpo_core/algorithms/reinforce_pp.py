"""REINFORCE++: no critic; batch-whitened rewards to go, PPO clip."""

from dfpo_core.algorithms import registry


@registry.register("reinforce_pp")
class ReinforcePP:
    """Credit: the reward to go, whitened over all tokens of the batch."""

    critic, critic_options = None, {}
    advantage, advantage_options = "reinforce_pp", {}
    policy_loss, policy_loss_options = "ppo_clip", {}
    citation = "Hu et al. 2025, REINFORCE++, arXiv 2501.03262"
