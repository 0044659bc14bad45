"""An ensemble whose worst member is backed up (robust Bellman update): pessimistic where the members disagree.

    y_t = r_t + gamma min over m of V_m(s_{t+1}),  as a lambda-return;  every member m learns the same y_t

The members differ by their random hidden layer only. "Worst" is, at each token, the member with the lowest mean return; its return
samples are the critic's, so values, advantages and targets all stand on the worst case.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from dfpo_core.config import Section
from dfpo_core.critics import registry
from dfpo_core.critics.bootstrap import lambda_returns, sampled_lambda_returns, stratified_horizons
from dfpo_core.critics.quantile import quantile_huber
from dfpo_core.types import CriticBatch, LossOutput, masked_mean


class EnsembleConfig(Section):
    """Options of the ensemble. The baseline's number and kind of members are not published: these are our choice."""

    members: int = Field(4, ge=2, description="critics in the ensemble")
    member: Literal["scalar", "quantile"] = Field("scalar", description="what a member predicts: its mean, or quantiles compared by mean")
    quantiles: int = Field(32, ge=2, description="quantiles of a quantile member")
    huber: float = Field(0.02, ge=0, description="threshold of the quantile error, in units of the return; 0: never squared")
    width: int = Field(64, ge=1, description="hidden width of a member")
    discount: float = Field(1.0, gt=0, le=1, description="gamma")
    lam: float = Field(0.95, ge=0, le=1, description="lambda of the targets; the less, the more the worst case enters")


class Heads(nn.Module):
    """N independent one-hidden-layer heads on the same RMS-normalised state; random hidden layers, zero-initialised output."""

    def __init__(self, hidden_size: int, heads: int, width: int, outputs: int):
        super().__init__()
        self.project = nn.Linear(hidden_size, heads * width)
        self.weight = nn.Parameter(torch.zeros(heads, width, outputs))
        self.bias = nn.Parameter(torch.zeros(heads, outputs))

    def forward(self, hidden: Tensor) -> Tensor:
        """(B, T, H) -> (B, T, N, outputs), fp32."""
        with torch.autocast(hidden.device.type, enabled=False):
            features = F.silu(self.project(F.rms_norm(hidden.float(), hidden.shape[-1:])))
            return torch.einsum("btnw,nwo->btno", features.unflatten(-1, (len(self.weight), -1)), self.weight) + self.bias


@registry.register("ensemble")
class EnsembleCritic(nn.Module):
    """Return samples, value and targets are those of the worst member at each token; uncertainty is the members' disagreement."""

    config_class = EnsembleConfig

    def __init__(self, hidden_size: int, config: EnsembleConfig):
        super().__init__()
        self.config = config
        self.heads = Heads(hidden_size, config.members, config.width, config.quantiles if config.member == "quantile" else 1)

    @torch.no_grad()
    def sample_returns(self, hidden: Tensor) -> Tensor:
        """The worst member's prediction, sorted: (B, T, 1) for scalar members, (B, T, quantiles) for quantile members."""
        return worst_member(self.heads(hidden)).sort(-1).values

    @torch.no_grad()
    def value(self, hidden: Tensor) -> Tensor:
        """Mean return of the worst member: (B, T)."""
        return self.heads(hidden).mean(-1).amin(-1)

    @torch.no_grad()
    def uncertainty(self, hidden: Tensor) -> Tensor:
        """Standard deviation of the mean over members: (B, T)."""
        return self.heads(hidden).mean(-1).std(-1, correction=0)

    def loss(self, batch: CriticBatch) -> LossOutput:
        """Mean over members of the error to the robust target; squared error or quantile Huber loss, / token_count."""
        config, predictions = self.config, self.heads(batch.hidden)
        if config.member == "scalar":
            targets = lambda_returns(batch.token_rewards, batch.old_returns, batch.mask, config.discount, config.lam)
            error = (predictions - targets[..., None, :]).square().squeeze(-1)
        else:
            horizons = stratified_horizons(config.quantiles, config.lam, batch.generator)
            targets = sampled_lambda_returns(batch.token_rewards, batch.old_returns, batch.mask, config.discount, horizons)
            error = quantile_huber(predictions, targets[..., None, :], config.huber)
        loss = masked_mean(error.mean(-1), batch.mask, batch.token_count)
        means = predictions.detach().mean(-1)
        pessimism = masked_mean(means.mean(-1) - means.amin(-1), batch.mask, batch.token_count)
        return LossOutput(loss, {"critic/loss": loss.item(), "critic/pessimism": pessimism.item()})

    def after_step(self) -> None:
        """Nothing to do: targets come from the rollout-time predictions."""


def worst_member(predictions: Tensor) -> Tensor:
    """The predictions of the member with the lowest mean: (.., N, K) -> (.., K)."""
    worst = predictions.mean(-1).argmin(-1)[..., None, None]
    return predictions.gather(-2, worst.expand(*worst.shape[:-1], predictions.shape[-1])).squeeze(-2)
