"""M fixed quantiles of the return by quantile Huber regression (Dabney et al. 2018, arXiv 1710.10044), on distributional lambda-returns."""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from dfpo_core.config import Section
from dfpo_core.critics import registry
from dfpo_core.critics.bootstrap import sampled_lambda_returns, stratified_horizons
from dfpo_core.types import CriticBatch, LossOutput, masked_mean


class QuantileConfig(Section):
    """Options of the quantile critic."""

    quantiles: int = Field(32, ge=2, description="M: quantile levels (k - 1/2) / M")
    width: int = Field(96, ge=0, description="hidden width of the head; 0 makes it linear")
    huber: float = Field(0.02, ge=0, description="threshold below which the quantile error is squared, in units of the return; 0: never")
    discount: float = Field(1.0, gt=0, le=1, description="gamma")
    lam: float = Field(0.95, ge=0, le=1, description="lambda of the distributional targets")


@registry.register("quantile")
class QuantileCritic(nn.Module):
    """Return samples are the M predicted quantiles; the value is their mean. Zero-initialised output."""

    config_class = QuantileConfig

    def __init__(self, hidden_size: int, config: QuantileConfig):
        super().__init__()
        self.config = config
        self.project = nn.Linear(hidden_size, config.width) if config.width else None
        self.out = nn.Linear(config.width or hidden_size, config.quantiles)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def _quantiles(self, hidden: Tensor) -> Tensor:
        with torch.autocast(hidden.device.type, enabled=False):
            features = F.rms_norm(hidden.float(), hidden.shape[-1:])
            return self.out(F.silu(self.project(features)) if self.project else features)

    @torch.no_grad()
    def sample_returns(self, hidden: Tensor) -> Tensor:
        """The quantiles, sorted (independent outputs can cross): (B, T, M)."""
        return self._quantiles(hidden).sort(-1).values

    @torch.no_grad()
    def value(self, hidden: Tensor) -> Tensor:
        """Mean of the quantiles: (B, T)."""
        return self._quantiles(hidden).mean(-1)

    @torch.no_grad()
    def uncertainty(self, hidden: Tensor) -> Tensor:
        """Standard deviation of the quantiles: (B, T)."""
        return self._quantiles(hidden).std(-1, correction=0)

    def loss(self, batch: CriticBatch) -> LossOutput:
        """Quantile Huber loss against M target samples a token, from the rollout-time quantiles; / token_count."""
        config = self.config
        horizons = stratified_horizons(config.quantiles, config.lam, batch.generator)
        targets = sampled_lambda_returns(batch.token_rewards, batch.old_returns, batch.mask, config.discount, horizons)
        error = quantile_huber(self._quantiles(batch.hidden), targets, config.huber)
        loss = masked_mean(error, batch.mask, batch.token_count)
        return LossOutput(loss, {"critic/loss": loss.item()})

    def after_step(self) -> None:
        """Nothing to do: targets come from the rollout-time quantiles."""


def quantile_huber(quantiles: Tensor, targets: Tensor, threshold: float) -> Tensor:
    """mean over i, j of |level_i - 1[y_j < q_i]| huber(y_j - q_i): quantiles (.., M) and targets (.., N) -> (..).

    Huber is |u| - threshold/2 outside the threshold, u^2 / (2 threshold) inside, so threshold 0 is the plain quantile loss.
    """
    count = quantiles.shape[-1]
    level = (torch.arange(count, device=quantiles.device) + 0.5) / count
    error = targets[..., None, :] - quantiles[..., :, None]
    size = error.abs()
    huber = torch.where(size < threshold, error.square() / (2 * max(threshold, 1e-12)), size - threshold / 2)
    return ((level[:, None] - (error < 0).float()).abs() * huber).mean((-1, -2))
