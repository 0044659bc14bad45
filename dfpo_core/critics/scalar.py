"""The PPO value head: one linear map to the mean return, regressed on lambda-returns of the rollout-time values."""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor, nn

from dfpo_core.config import Section
from dfpo_core.critics import confidence, registry
from dfpo_core.critics.bootstrap import lambda_returns
from dfpo_core.types import CriticBatch, LossOutput, masked_mean


class ScalarConfig(Section):
    """Options of the scalar critic."""

    discount: float = Field(1.0, gt=0, le=1, description="gamma")
    lam: float = Field(0.95, ge=0, le=1, description="lambda of the value targets")
    confidence: bool = Field(False, description="read the policy's log-probabilities and entropy beside the hidden states")
    value_clip: float = Field(0.2, ge=0, description="largest move from the rollout-time value that is rewarded; 0 does not clip")


@registry.register("scalar")
class ScalarCritic(nn.Module):
    """V(s_t) = w . rms_norm(h_t) + b, zero-initialised; one return sample (K = 1), no uncertainty."""

    config_class = ScalarConfig

    def __init__(self, hidden_size: int, config: ScalarConfig):
        super().__init__()
        self.config = config
        self.extra = confidence.FEATURES * config.confidence
        self.out = nn.Linear(hidden_size + self.extra, 1)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def _value(self, hidden: Tensor) -> Tensor:
        with torch.autocast(hidden.device.type, enabled=False):
            return self.out(confidence.normalised(hidden, self.extra)).squeeze(-1)

    @torch.no_grad()
    def value(self, hidden: Tensor) -> Tensor:
        """Mean return: (B, T)."""
        return self._value(hidden)

    @torch.no_grad()
    def sample_returns(self, hidden: Tensor) -> Tensor:
        """The mean as the only sample: (B, T, 1)."""
        return self._value(hidden)[..., None]

    @torch.no_grad()
    def uncertainty(self, hidden: Tensor) -> Tensor:
        """Zero: a scalar critic knows no spread. (B, T)."""
        return torch.zeros(hidden.shape[:-1], device=hidden.device)

    def loss(self, batch: CriticBatch) -> LossOutput:
        """Squared error to the lambda-return, the larger of clipped and unclipped (Schulman et al. 2017), / token_count."""
        targets = lambda_returns(batch.token_rewards, batch.old_returns, batch.mask, self.config.discount, self.config.lam)[..., 0]
        value, old = self._value(batch.hidden), batch.old_returns[..., 0]
        error, clipped = clipped_value_error(value, old, targets, self.config.value_clip)
        loss = masked_mean(error, batch.mask, batch.token_count)
        share = masked_mean(clipped, batch.mask, batch.token_count)
        return LossOutput(loss, {"critic/loss": loss.item(), "critic/clip_fraction": share.item()})

    def after_step(self) -> None:
        """Nothing to do: targets come from the rollout-time values."""


def clipped_value_error(value: Tensor, old: Tensor, target: Tensor, clip: float) -> tuple[Tensor, Tensor]:
    """max((V - y)^2, (clip(V, old +- clip) - y)^2), and 1.0 where the clipped one is larger; clip 0 is the plain square. (B, T) each."""
    error = (value - target).square()
    if clip == 0:
        return error, torch.zeros_like(error)
    clipped = (old + (value - old).clamp(-clip, clip) - target).square()
    return torch.maximum(error, clipped), (clipped > error).float()
