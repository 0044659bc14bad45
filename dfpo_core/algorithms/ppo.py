"""PPO: a scalar critic, GAE, PPO clip."""

from dfpo_core.algorithms import registry


@registry.register("ppo")
class PPO:
    """Credit: GAE of a scalar value head."""

    critic, critic_options = "scalar", {}
    advantage, advantage_options = "gae", {}
    policy_loss, policy_loss_options = "ppo_clip", {}
    citation = "Schulman et al. 2017, Proximal Policy Optimization Algorithms, arXiv 1707.06347"
