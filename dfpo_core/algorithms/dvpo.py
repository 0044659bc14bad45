"""DVPO: several heads of quantiles of the return, with the tails shaped asymmetrically, distributional GAE, PPO clip."""

from dfpo_core.algorithms import registry


@registry.register("dvpo")
class DVPO:
    """Credit: GAE of the mean of N heads x M quantiles; the critic's loss contracts the lower tail and expands the upper one."""

    critic, critic_options = "multi_quantile", {}
    advantage, advantage_options = "gae", {}
    policy_loss, policy_loss_options = "ppo_clip", {}
    citation = "Zhu et al. 2025, DVPO: Distributional Value Modeling-based Policy Optimization for LLM Post-Training, arXiv 2512.03847"
