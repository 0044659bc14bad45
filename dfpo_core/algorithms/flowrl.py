"""FlowRL: match the distribution proportional to reference x exp(beta x reward) instead of maximising the reward."""

from dfpo_core.algorithms import registry


@registry.register("flowrl")
class FlowRL:
    """Trajectory balance: loss w (log Z(x) + log pi(y|x) / |y| - beta r - log pi_ref(y|x) / |y|)^2 a sequence.

    r is the group-normalised reward, log Z learned from the policy's state after the prompt, w the clipped importance weight. The
    residual holds the reference policy already, so train.kl_coefficient must stay 0; `train.policy_loss.beta` takes its part.
    """

    critic, critic_options = None, {}
    advantage, advantage_options = "group", {}
    policy_loss, policy_loss_options = "flowrl", {}
    citation = "Zhu et al. 2025, FlowRL: Matching Reward Distributions for LLM Reasoning, arXiv 2509.15207"
