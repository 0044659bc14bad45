"""DFPO: a flow critic's return distribution, distributional GAE, PPO clip."""

from dfpo_core.algorithms import registry


@registry.register("dfpo")
class DFPO:
    """Credit: GAE of the flow's exact mean (d = 0), with the return distribution shaping the critic's losses and risk weights."""

    critic, critic_options = "flow", {"confidence": True}
    advantage, advantage_options = "gae", {}
    policy_loss, policy_loss_options = "ppo_clip", {}
    citation = "DFPO: Scaling Value Modeling via Distributional Flow towards Robust and Generalizable LLM Post-Training, arXiv 2602.05890"
