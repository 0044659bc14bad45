"""DVPO's critic (arXiv 2512.03847): N heads of M quantiles each; the heads' mean is the return distribution Q of a token.

    loss = quantile regression + consistency of the heads + calibration of both tails + penalty on a mean below the target's
         + shape (contract the lower tail, expand the upper tail) + curvature of the tails

The paper names the terms and what each is for (and 200 quantiles and a risk weight of 0.1 as its best); their exact forms and the
other coefficients are our reading and our choice: one pure function and one weight each, weight 0 switches a term off.
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
from dfpo_core.critics.ensemble import Heads
from dfpo_core.critics.flow_losses import tail_means, tail_weights
from dfpo_core.types import CriticBatch, LossOutput, masked_mean


class MultiQuantileConfig(Section):
    """Options of the DVPO critic. Weights are relative to quantile regression; "our choice" where the paper gives no number."""

    heads: int = Field(3, ge=2, description="N: quantile heads (our choice)")
    quantiles: int = Field(200, ge=8, description="M: quantile levels (k - 1/2) / M of each head; 200 as published")
    width: int = Field(64, ge=1, description="hidden width of a head (our choice)")
    huber: float = Field(0.02, ge=0, description="threshold below which the quantile error is squared, in units of the return (our choice)")
    discount: float = Field(1.0, gt=0, le=1, description="gamma")
    lam: float = Field(0.95, ge=0, le=1, description="lambda of the targets")
    lambda_mixing: Literal["average", "sampled"] = Field(
        "average", description="targets Z_k + A_k of distributional GAE, level by level, as published; or mixed over bootstrap times"
    )
    tail: float = Field(0.1, gt=0, le=0.5, description="share of the distribution that each tail is (our choice)")
    consistency_weight: float = Field(0.1, ge=0, description="squared distance between heads (our choice)")
    risk_weight: float = Field(0.1, ge=0, description="calibration of both tail means; 0.1 as published")
    mean_shift_weight: float = Field(0.1, ge=0, description="penalty on a mean below the target's (our choice)")
    shape_weight: float = Field(0.1, ge=0, description="contract the lower tail, expand the upper tail (our choice)")
    curvature_weight: float = Field(0.1, ge=0, description="concave lower tail, convex upper tail (our choice)")


@registry.register("multi_quantile")
class MultiQuantileCritic(nn.Module):
    """Return samples are the sorted quantiles of the mean over heads; the value is their mean. Zero-initialised outputs."""

    config_class = MultiQuantileConfig

    def __init__(self, hidden_size: int, config: MultiQuantileConfig):
        super().__init__()
        self.config = config
        self.heads = Heads(hidden_size, config.heads, config.width, config.quantiles)

    @torch.no_grad()
    def sample_returns(self, hidden: Tensor) -> Tensor:
        """Quantiles of the mean over heads, sorted (independent outputs can cross): (B, T, M)."""
        return self.heads(hidden).mean(-2).sort(-1).values

    @torch.no_grad()
    def value(self, hidden: Tensor) -> Tensor:
        """Mean of the quantiles over levels and heads: (B, T)."""
        return self.heads(hidden).mean((-1, -2))

    @torch.no_grad()
    def uncertainty(self, hidden: Tensor) -> Tensor:
        """Standard deviation of the quantiles: (B, T)."""
        return self.heads(hidden).mean(-2).std(-1, correction=0)

    def loss(self, batch: CriticBatch) -> LossOutput:
        """Weighted sum of the enabled terms over valid tokens / token_count; the targets come from the rollout-time quantiles."""
        config, predictions = self.config, self.heads(batch.hidden)
        with torch.no_grad():
            targets = self._targets(batch).sort(-1).values
        quantiles = predictions.mean(-2).sort(-1).values
        terms = {
            "quantile": (1.0, lambda: heads_huber(predictions, targets, config.huber)),
            "consistency": (config.consistency_weight, lambda: head_consistency(predictions)),
            "risk": (config.risk_weight, lambda: tail_calibration(quantiles, targets, config.tail)),
            "mean_shift": (config.mean_shift_weight, lambda: mean_shift(quantiles, targets)),
            "shape": (config.shape_weight, lambda: tail_shape(quantiles, targets, config.tail)),
            "curvature": (config.curvature_weight, lambda: tail_curvature(quantiles, config.tail)),
        }
        losses = {name: masked_mean(term(), batch.mask, batch.token_count) for name, (weight, term) in terms.items() if weight}
        loss = sum(terms[name][0] * value for name, value in losses.items())
        metrics = {f"critic/{name}_loss": value.item() for name, value in losses.items()}
        return LossOutput(loss, {"critic/loss": loss.item(), **metrics})

    def _targets(self, batch: CriticBatch) -> Tensor:
        config = self.config
        if config.lambda_mixing == "average":
            return lambda_returns(batch.token_rewards, batch.old_returns, batch.mask, config.discount, config.lam)
        horizons = stratified_horizons(config.quantiles, config.lam, batch.generator)
        return sampled_lambda_returns(batch.token_rewards, batch.old_returns, batch.mask, config.discount, horizons)

    def after_step(self) -> None:
        """Nothing to do: targets come from the rollout-time quantiles."""


def heads_huber(predictions: Tensor, targets: Tensor, threshold: float) -> Tensor:
    """Quantile Huber loss of each head against all targets, mean over heads: (.., N, M), sorted targets (.., J) -> (..).

    The same number as `quantile_huber`, in M log J instead of M J operations: J = M = 200 here. The Huber function is quadratic near
    q and linear further out, so its sum over an interval of targets follows from their number, their sum and their sum of squares.
    """
    quantiles, count = predictions.double().flatten(-2), predictions.shape[-1]
    level = ((torch.arange(count, device=targets.device) + 0.5) / count).repeat(predictions.shape[-2])
    ordered = targets.double()
    moments = F.pad(torch.stack([torch.ones_like(ordered), ordered, ordered.square()], -2).cumsum(-1), (1, 0))  # of those before

    def moments_below(edge: Tensor) -> Tensor:
        position = torch.searchsorted(ordered, edge.contiguous())[..., None, :]
        return moments.gather(-1, position.expand(*position.shape[:-2], 3, -1))

    fixed = quantiles.detach()
    low, middle, high = (moments_below(fixed + shift) for shift in (-threshold, 0.0, threshold))
    below = -_linear(low, quantiles, -threshold) + _square(middle - low, quantiles, threshold)
    above = _linear(moments[..., -1:] - high, quantiles, threshold) + _square(high - middle, quantiles, threshold)
    return ((level * above + (1 - level) * below).mean(-1) / targets.shape[-1]).to(predictions)


def _linear(moments: Tensor, quantiles: Tensor, threshold: float) -> Tensor:
    """Sum of y - q - threshold / 2 over the targets of these moments (.., 3, K): (.., K)."""
    return moments[..., 1, :] - moments[..., 0, :] * (quantiles + threshold / 2)


def _square(moments: Tensor, quantiles: Tensor, threshold: float) -> Tensor:
    """Sum of (y - q)^2 / (2 threshold) over the targets of these moments (.., 3, K): (.., K); 0 where threshold is 0."""
    total = moments[..., 2, :] - 2 * quantiles * moments[..., 1, :] + quantiles.square() * moments[..., 0, :]
    return total / (2 * max(threshold, 1e-12))


def head_consistency(predictions: Tensor) -> Tensor:
    """Mean over pairs of heads and over levels of the squared difference: (.., N, M) -> (..).

    For N numbers the mean squared difference over pairs is 2 N / (N - 1) times their variance.
    """
    return 2 * predictions.var(-2, correction=1).mean(-1)


def tail_calibration(quantiles: Tensor, targets: Tensor, tail: float) -> Tensor:
    """(lower tail mean - the target's)^2 + (upper tail mean - the target's)^2 of sorted samples (.., M), (.., M) -> (..)."""
    pairs = zip(tail_means(quantiles, tail), tail_means(targets, tail), strict=True)
    return sum((own - other).square() for own, other in pairs)


def mean_shift(quantiles: Tensor, targets: Tensor) -> Tensor:
    """relu(mean of the targets - mean of the quantiles): what the tail terms may not buy by pessimism. (.., M), (.., M) -> (..)."""
    return (targets.mean(-1) - quantiles.mean(-1)).clamp(min=0)


def tail_shape(quantiles: Tensor, targets: Tensor, tail: float) -> Tensor:
    """relu(lower-tail variance - the target's) + relu(the target's upper-tail variance - own): (.., M), (.., M) -> (..)."""
    (low, high), (target_low, target_high) = tail_variances(quantiles, tail), tail_variances(targets, tail)
    return (low - target_low).clamp(min=0) + (target_high - high).clamp(min=0)


def tail_variances(samples: Tensor, tail: float) -> tuple[Tensor, Tensor]:
    """Variance within the lowest and the highest `tail` share of sorted samples (.., M) -> two (..)."""
    low, high = tail_means(samples, tail)
    weights = tail_weights(samples.shape[-1], tail, samples.device)
    return ((samples - low[..., None]).square() * weights).sum(-1), ((samples - high[..., None]).square() * weights.flip(0)).sum(-1)


def tail_curvature(quantiles: Tensor, tail: float) -> Tensor:
    """relu(mean second difference of the lower tail) + relu(-that of the upper tail), in units of M^-2: (.., M) -> (..).

    A quantile function with thinning tails bends down on the left and up on the right; this penalises the opposite. The second
    difference of M quantiles is M^-2 times a second derivative, so the loss of M = 200 is a small number.
    """
    second = quantiles[..., 2:] - 2 * quantiles[..., 1:-1] + quantiles[..., :-2]
    low, high = tail_means(second, tail)
    return low.clamp(min=0) + (-high).clamp(min=0)
