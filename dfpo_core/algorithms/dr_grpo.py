"""Dr. GRPO: GRPO without its two biases, the division by the group's deviation and the one by the response's length."""

from dfpo_core.algorithms import registry


@registry.register("dr_grpo")
class DrGRPO:
    """Credit: A_i = R_i - mean of the group, on every token; loss: sum over tokens / (sequences x train.max_new_tokens), a constant.

    Dividing by the deviation weighs questions that are nearly always or nearly never solved too much; dividing by the length
    makes long wrong responses cheap.
    """

    critic, critic_options = None, {}
    advantage, advantage_options = "group", {"divide_by_std": False}
    policy_loss, policy_loss_options = "ppo_clip", {"average": "budget"}
    citation = "Liu et al. 2025, Understanding R1-Zero-Like Training: A Critical Perspective, arXiv 2503.20783"
