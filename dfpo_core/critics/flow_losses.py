"""The losses of the value flow (DFPO, arXiv 2602.05890), each a pure function of tensors.

Per-token results are returned unreduced; `FlowCritic.loss` sums them and divides by the global token count. Leading dimensions are
free: (B, T, S) below may as well be (N, S), the valid tokens packed.
Symbols: noise eps, flow_time tau, step_size d, velocity v(z, tau, d | h). A `velocity` argument is a function of
(position (.., S), flow_time (S,), step_size (S,)) bound to the hidden states of the right tokens.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Velocity = Callable[[Tensor, Tensor, Tensor], Tensor]


def anchor(velocity: Velocity, noise: Tensor, flow_time: Tensor, target: Tensor) -> Tensor:
    """Loss 1: conditional flow matching, mean over S of (v(z, tau, 0) - (y - eps))^2 at z = (1 - tau) eps + tau y.

    noise (S,), flow_time (S,), target y (B, T, S) -> (B, T).
    """
    position = (1 - flow_time) * noise + flow_time * target
    return (velocity(position, flow_time, torch.zeros_like(flow_time)) - (target - noise)).square().mean(-1)


def bellman_path(
    following: Velocity, noise: Tensor, flow_time: Tensor, token_rewards: Tensor, discount: float, steps: int
) -> tuple[Tensor, Tensor]:
    """Where the Bellman image of the flow of s_{t+1} stands at flow_time, and its velocity: two (B, T, S) tensors.

    z' is the flow of s_{t+1} from eps to tau in `steps` Euler steps. Its image must start at eps (the noise of s_t is N(0,1) too)
    and end at r + discount z'(1), so
        z = tau r + discount z' + (1 - discount)(1 - tau) eps,      dz/dtau = r + discount v(z', tau) - (1 - discount) eps.
    With r = 0 and discount = 1 (every token but the last, without a KL reward) this is z = z' and discount v, the usual way to write
    it; written so for any r and discount, z = r + discount z' starts at N(r, discount^2) and has a wrong fixed point
    (tested).
    """
    position, step = noise, flow_time / steps
    for i in range(steps):
        position = position + step * following(position, i * step, step)
    velocity = following(position, flow_time, torch.zeros_like(flow_time))
    reward = token_rewards[..., None]
    image = flow_time * reward + discount * position + (1 - discount) * (1 - flow_time) * noise
    return image, reward + discount * velocity - (1 - discount) * noise


def distributional_flow_matching(
    velocity: Velocity, position: Tensor, flow_time: Tensor, target_velocity: Tensor, weight: Tensor
) -> Tensor:
    """Loss 2: w_t times the mean over S of (v(z, tau, 0 | h_t) - target_velocity)^2, on a `bellman_path`; weight (B, T) -> (B, T)."""
    error = velocity(position, flow_time, torch.zeros_like(flow_time)) - target_velocity
    return weight * error.square().mean(-1)


def confidence_weight(dispersion: Tensor, temperature: float) -> Tensor:
    """w = sigmoid(-temperature / sigma) + 1/2 (Value Flows, arXiv 2510.07650): uncertain tokens weigh more, within [0.5, 1]."""
    return torch.sigmoid(-temperature / dispersion.clamp(min=1e-6)) + 0.5


def robust_weight(dispersion: Tensor, scale: float) -> Tensor:
    """w = 1 / (1 + (sigma / scale)^2): uncertain tokens weigh less, within [0, 1]."""
    return 1 / (1 + (dispersion / scale).square())


def geometric_consistency(
    velocity: Velocity, target: Velocity, position: Tensor, flow_time: Tensor, step_size: Tensor, smallest: float
) -> Tensor:
    """Loss 3: one step of d equals two target steps of d/2 from the same (z, tau); mean squared error over S, (B, T).

    The half steps of the smallest d use the instantaneous field (d = 0), which losses 1 and 2 teach.
    """
    half = step_size / 2
    label = torch.where(step_size <= smallest, torch.zeros_like(half), half)
    with torch.no_grad():
        first = target(position, flow_time, label)
        second = target(position + half * first, flow_time + half, label)
    return (velocity(position, flow_time, step_size) - (first + second) / 2).square().mean(-1)


def jump_quantiles(samples: Tensor, noise: Tensor, target: Tensor) -> Tensor:
    """Quantile loss of the one-step samples: Z(eps_i) is the Phi(eps_i)-quantile of y. samples, target (B, T, S) -> (B, T).

    The monotone map from N(0,1) to the return *is* its quantile function, and this loss reads it straight off the returns, where
    loss 3 alone passes it down a chain of step sizes and blurs it at every link (tests/benchmarks/flow_faithful.py). All pairs i, j
    count: the noise is stratified, so leaving y(eps_i) out would leave a gap at the very level that Z(eps_i) stands for.
    """
    # level relu(y - z) + (1 - level) relu(z - y) = level (y - z) + relu(z - y): only the last part needs the pairs.
    excess = (samples[..., :, None] - target[..., None, :]).clamp(min=0).mean((-1, -2))
    return excess + (torch.special.ndtr(noise) * (target.mean(-1, keepdim=True) - samples)).mean(-1)


def straightness(velocity: Velocity, noise: Tensor, flow_time: Tensor, target: Tensor) -> Tensor:
    """The paper's wording of loss 3: |v(z_tau, tau) - v(eps, 0)|^2 at z_tau = (1 - tau) eps + tau y; mean over S, (B, T).

    It ties the d = 1 jump to the field along the path, and with the field's optimum v(eps, 0) = E[y] - eps it pulls the spread of
    the one-step samples towards zero: an option, not the default.
    """
    position = (1 - flow_time) * noise + flow_time * target
    still = torch.zeros_like(flow_time)
    return (velocity(position, flow_time, still) - velocity(noise, still, torch.ones_like(flow_time))).square().mean(-1)


def tail_means(samples: Tensor, alpha: float) -> tuple[Tensor, Tensor]:
    """Lower and upper CVaR_alpha of equally likely sorted samples (.., K) -> two (..) tensors.

    The mean of the lowest (highest) alpha share; a sample that straddles the boundary counts with the part inside.
    """
    weights = tail_weights(samples.shape[-1], alpha, samples.device)
    return (samples * weights).sum(-1), (samples * weights.flip(0)).sum(-1)


def tail_weights(count: int, alpha: float, device: torch.device | None = None) -> Tensor:
    """Weights (K,) of sorted samples whose weighted sum is the lower CVaR_alpha: the share of each 1/K slice below alpha, over alpha."""
    edges = torch.arange(count, device=device, dtype=torch.float32) / count
    return (alpha - edges).clamp(0, 1 / count) / alpha


def tail_targets(target: Tensor, own_samples: Tensor, alpha: float) -> tuple[Tensor, Tensor]:
    """Unbiased regression targets for both CVaRs from single returns: two (B, T) tensors.

    Rockafellar and Uryasev (2000): CVaR_lo(Y) = E[q - relu(q - Y) / alpha] at the alpha-quantile q of Y, stationary in q, so an
    error in q (read off the target critic's sorted own_samples (B, T, K)) matters at second order only. The tails of the few
    y(eps_k) of one visit are no substitute: at lambda 1 they are all the same number and both tails collapse to the mean.
    """
    count = own_samples.shape[-1]
    slot = min(int(alpha * count), count - 1)
    low, high = own_samples[..., slot, None], own_samples[..., count - 1 - slot, None]
    lower = (low - (low - target).clamp(min=0) / alpha).mean(-1)
    upper = (high + (target - high).clamp(min=0) / alpha).mean(-1)
    return lower, upper


def conditional_value_risk(samples: Tensor, targets: tuple[Tensor, Tensor], alpha: float, weights: tuple[float, float]) -> Tensor:
    """Loss 4: rho_lo (CVaR_lo - target_lo)^2 + rho_hi (CVaR_hi - target_hi)^2 of sorted samples (B, T, K) -> (B, T)."""
    lower, upper = tail_means(samples, alpha)
    return weights[0] * (lower - targets[0]).square() + weights[1] * (upper - targets[1]).square()


def lower_contraction(samples: Tensor, alpha: float, limit: Tensor) -> Tensor:
    """Loss 5a: relu((mean - CVaR_lo) - limit)^2 of sorted samples (B, T, K) -> (B, T).

    The gradient runs through the mean as well: it then sums to zero over the samples, so the tail moves and the mean stays.
    """
    return ((samples.mean(-1) - tail_means(samples, alpha)[0]) - limit).clamp(min=0).square()


def upper_expansion(samples: Tensor, alpha: float, limit: Tensor) -> Tensor:
    """Loss 5b: relu(limit - (CVaR_hi - mean))^2 of sorted samples (B, T, K) -> (B, T); keeps the mean as `lower_contraction` does."""
    return (limit - (tail_means(samples, alpha)[1] - samples.mean(-1))).clamp(min=0).square()


def curvature(samples: Tensor) -> Tensor:
    """Loss 5c: mean squared second difference of the sorted samples (B, T, K) -> (B, T)."""
    return (samples[..., 2:] - 2 * samples[..., 1:-1] + samples[..., :-2]).square().mean(-1)
