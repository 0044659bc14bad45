"""FlowRL's trajectory balance (arXiv 2509.15207): the policy flows towards pi*(y|x) = pi_ref(y|x) exp(beta r) / Z(x).

    loss = w (log Z(x) + log pi(y|x) / |y| - beta r(x, y) - log pi_ref(y|x) / |y|)^2,   w = clip(pi(y|x) / pi_old(y|x)), no gradient

Log-probabilities are divided by the length |y|, or the residual and its gradient would grow with it. r is the group-normalised
reward, the `group` advantage. log Z is learned: it is the only part of a policy loss with weights, so this loss is an `nn.Module`.
"""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor, nn

from dfpo_core.config import Section
from dfpo_core.policy_losses import registry
from dfpo_core.policy_losses.ppo_clip import kl_estimate
from dfpo_core.types import LossOutput, PolicyLossInputs, masked_mean


class FlowRLConfig(Section):
    """Options of FlowRL."""

    beta: float = Field(15.0, gt=0, description="scale of the reward in the target distribution; 15 as published")
    clip_low: float = Field(0.2, gt=0, lt=1, description="importance weight is at least 1 - clip_low; 0.2 as in the authors' recipe")
    clip_high: float = Field(0.28, gt=0, description="importance weight is at most 1 + clip_high; 0.28 as in the authors' recipe")
    log_z_learning_rate: float = Field(
        1e-3, gt=0, description="peak rate of log Z, which starts from nothing (our choice; published: the policy's)"
    )


@registry.register("flowrl")
class FlowRL(nn.Module):
    """Squared balance residual, mean over sequences. log Z: three layers as wide as the policy on its state after the prompt.

    Our choices where the published code differs: the state of the prompt's last token instead of the mean over the prompt (it has
    seen the whole prompt, and the rollout pass has it already), no dropout (micro-batches must add up), and a log Z of 0 at the
    start, the balance of an untrained policy: group-normalised rewards have mean 0.
    """

    config_class = FlowRLConfig

    def __init__(self, config: FlowRLConfig, hidden_size: int):
        super().__init__()
        self.config, self.learning_rate = config, config.log_z_learning_rate
        layers = [part for _ in range(2) for part in (nn.Linear(hidden_size, hidden_size), nn.GELU(), nn.LayerNorm(hidden_size))]
        out = nn.Linear(hidden_size, 1)
        nn.init.zeros_(out.weight)
        nn.init.zeros_(out.bias)
        self.network = nn.Sequential(*layers, out)

    def log_z(self, prompt_hidden: Tensor) -> Tensor:
        """Log partition function of each sequence's prompt: (B, H) -> (B,), fp32."""
        with torch.autocast(prompt_hidden.device.type, enabled=False):
            return self.network(prompt_hidden.float()).squeeze(-1)

    def forward(self, inputs: PolicyLossInputs) -> LossOutput:
        config = self.config
        log_z = self.log_z(inputs.prompt_hidden)
        reward = sequence_means(inputs.advantages, inputs.mask)
        residual = balance_residual(log_z, inputs.log_probs, inputs.reference_log_probs, reward, inputs.mask, config.beta)
        weight, clipped = importance_weight(inputs.log_probs, inputs.old_log_probs, inputs.mask, config.clip_low, config.clip_high)
        loss = (weight * residual.square()).sum() / inputs.sequence_count
        per_sequence = {"policy/log_z": log_z, "policy/residual": residual.abs(), "policy/clip_fraction": clipped}
        per_token = {
            "policy/entropy": inputs.entropy,
            "policy/kl": kl_estimate(inputs.log_probs, inputs.reference_log_probs, "k3"),
            "policy/kl_old": kl_estimate(inputs.log_probs, inputs.old_log_probs, "k3"),
        }
        metrics = {name: value.sum().item() / inputs.sequence_count for name, value in per_sequence.items()}
        metrics |= {name: masked_mean(value, inputs.mask, inputs.token_count).item() for name, value in per_token.items()}
        return LossOutput(loss, {"policy/loss": loss.item(), **metrics})


def sequence_means(values: Tensor, mask: Tensor) -> Tensor:
    """Mean over each row's valid tokens: (B, T) -> (B,)."""
    return torch.where(mask > 0, values, torch.zeros_like(values)).sum(-1) / mask.sum(-1).clamp(min=1)


def balance_residual(log_z: Tensor, log_probs: Tensor, reference_log_probs: Tensor, reward: Tensor, mask: Tensor, beta: float) -> Tensor:
    """log Z + log pi / |y| - beta r - log pi_ref / |y|: log_z, reward (B,), log-probabilities, mask (B, T) -> (B,)."""
    return log_z + sequence_means(log_probs - reference_log_probs, mask) - beta * reward


def importance_weight(log_probs: Tensor, old_log_probs: Tensor, mask: Tensor, low: float, high: float) -> tuple[Tensor, Tensor]:
    """clip(pi(y|x) / pi_old(y|x), 1 - low, 1 + high) of whole sequences without gradient, and 1.0 where clipped: two (B,)."""
    difference = (log_probs - old_log_probs).detach()
    ratio = torch.where(mask > 0, difference, torch.zeros_like(difference)).sum(-1).exp()
    weight = ratio.clamp(1 - low, 1 + high)
    return weight, (weight != ratio).float()
