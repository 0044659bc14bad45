"""DFPO: a flow critic's return distribution, distributional GAE of denoised rewards, PPO clip."""

from dfpo_core.algorithms import registry


@registry.register("dfpo")
class DFPO:
    """Credit: GAE of the flow's exact mean (d = 0), with the return distribution shaping the critic's losses and risk weights.

    The critic reads the policy's confidence, and rewards are denoised by what it knows: with both it ended above every rival averaged over
    kinds of noise (tests/benchmarks/results/robustness: study_constant_rate and, above PPO by no more than chance, study), with neither
    level with PPO. denoise 0.8 and 0.95 were level (tuning_denoise).
    """

    critic, critic_options = "flow", {"confidence": True}
    advantage, advantage_options = "gae", {"denoise": 0.95}
    policy_loss, policy_loss_options = "ppo_clip", {}
    citation = "DFPO: Scaling Value Modeling via Distributional Flow towards Robust and Generalizable LLM Post-Training, arXiv 2602.05890"
