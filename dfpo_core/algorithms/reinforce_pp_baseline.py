"""REINFORCE++-baseline: REINFORCE++ on rewards from which the mean of the prompt's responses is subtracted."""

from dfpo_core.algorithms import registry


@registry.register("reinforce_pp_baseline")
class ReinforcePPBaseline:
    """Credit: A_t = whiten over the whole batch (reward to go - mean reward of the group); no division by the group's deviation."""

    critic, critic_options = None, {}
    advantage, advantage_options = "reinforce_pp", {"group_baseline": True}
    policy_loss, policy_loss_options = "ppo_clip", {}
    citation = "Hu et al. 2025, REINFORCE++, arXiv 2501.03262"
