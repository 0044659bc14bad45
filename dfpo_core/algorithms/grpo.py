"""GRPO: no critic; a response is compared with the other responses to its prompt."""

from dfpo_core.algorithms import registry


@registry.register("grpo")
class GRPO:
    """Credit: the group-normalised reward, the same on every token; token-mean loss (as in DAPO, arXiv 2503.14476)."""

    critic, critic_options = None, {}
    advantage, advantage_options = "group", {}
    policy_loss, policy_loss_options = "ppo_clip", {}
    citation = "Shao et al. 2024, DeepSeekMath, arXiv 2402.03300"
