"""The clipped surrogate of PPO (arXiv 1707.06347), token mean over the global batch; asymmetric and dual clip, entropy, KL.

The token mean divides by the number of tokens that were sampled. Dr. GRPO (arXiv 2503.20783) divides by a constant instead, so that a
token's weight does not depend on how long the responses happen to be: `average: budget`.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from dfpo_core.config import Section
from dfpo_core.policy_losses import registry
from dfpo_core.types import LossOutput, PolicyLossInputs, masked_mean


class PPOClipConfig(Section):
    """Options of the clipped surrogate. KL weight and estimator are set from train.kl_* when train.kl_in is "loss"."""

    clip_low: float = Field(0.2, gt=0, lt=1, description="ratio is clipped below at 1 - clip_low")
    clip_high: float = Field(0.2, gt=0, description="ratio is clipped above at 1 + clip_high")
    dual_clip: float = Field(0.0, ge=0, description="bound on the loss of a negative advantage, times |A| (arXiv 1912.09729); 0: off")
    average: Literal["tokens", "budget"] = Field(
        "tokens", description="divide the sum over tokens by their number, or by the constant sequences x train.max_new_tokens"
    )
    entropy_weight: float = Field(0.0, ge=0, description="weight of the entropy bonus")
    kl_weight: float = Field(0.0, ge=0, description="weight of the KL to the reference policy in the loss; set by train.kl_coefficient")
    kl_estimator: Literal["k1", "k2", "k3"] = Field("k3", description="per-token KL estimator; set by train.kl_estimator")

    @model_validator(mode="after")
    def _dual_clip_above_one(self):
        if 0 < self.dual_clip <= 1 + self.clip_high:
            raise ValueError("dual_clip must be 0 (off) or above 1 + clip_high")
        return self


@registry.register("ppo_clip")
class PPOClip:
    """-mean over tokens of min(rho A, clip(rho) A), - entropy_weight H + kl_weight KL. Metrics add up over micro-batches too.

    All metrics but policy/loss are token means, whatever `average` says.
    """

    config_class = PPOClipConfig

    def __init__(self, config: PPOClipConfig):
        self.config = config

    def __call__(self, inputs: PolicyLossInputs) -> LossOutput:
        config = self.config
        log_ratio = torch.where(inputs.mask > 0, inputs.log_probs - inputs.old_log_probs, torch.zeros_like(inputs.log_probs))
        surrogate, clipped = clipped_surrogate(log_ratio.exp(), inputs.advantages, config.clip_low, config.clip_high, config.dual_clip)
        parts = {
            "policy/surrogate": surrogate,
            "policy/entropy": inputs.entropy,
            "policy/clip_fraction": clipped,
            "policy/kl": kl_estimate(inputs.log_probs, inputs.reference_log_probs, "k3"),
            "policy/kl_old": kl_estimate(inputs.log_probs, inputs.old_log_probs, "k3"),
        }
        means = {name: masked_mean(part, inputs.mask, inputs.token_count) for name, part in parts.items()}
        loss = means["policy/surrogate"] - config.entropy_weight * means["policy/entropy"]
        if config.kl_weight:
            kl = kl_estimate(inputs.log_probs, inputs.reference_log_probs, config.kl_estimator)
            loss = loss + config.kl_weight * masked_mean(kl, inputs.mask, inputs.token_count)
        if config.average == "budget":
            loss = loss * (inputs.token_count / (inputs.sequence_count * inputs.max_new_tokens))
        return LossOutput(loss, {"policy/loss": loss.item(), **{name: mean.item() for name, mean in means.items()}})


def clipped_surrogate(ratio: Tensor, advantages: Tensor, low: float, high: float, dual: float = 0.0) -> tuple[Tensor, Tensor]:
    """Per-token loss and 1.0 where a clip is active: ratio (B, T), advantages (B, T) -> two (B, T).

    Loss max(-rho A, -clip(rho, 1 - low, 1 + high) A); with `dual`, at most dual |A| where A < 0.
    """
    plain, bounded = -ratio * advantages, -ratio.clamp(1 - low, 1 + high) * advantages
    loss, active = torch.maximum(plain, bounded), bounded > plain
    if dual:
        ceiling = -dual * advantages
        capped = (advantages < 0) & (loss > ceiling)
        loss, active = torch.where(capped, ceiling, loss), active | capped
    return loss, active.float()


def kl_estimate(log_probs: Tensor, reference_log_probs: Tensor, estimator: str) -> Tensor:
    """Per-token estimate of KL(policy || reference) from tokens of the policy, x = log policy - log reference: (B, T).

    k1: x (unbiased, signed), k2: x^2 / 2, k3: exp(-x) - 1 + x (unbiased, positive); Schulman 2020, "Approximating KL divergence". As a
    loss, k1 has zero mean gradient and k3 that of the reversed KL; k2 has the gradient of the KL itself.
    """
    difference = log_probs - reference_log_probs
    if estimator == "k1":
        return difference
    if estimator == "k2":
        return difference.square() / 2
    return torch.expm1(-difference) + difference
