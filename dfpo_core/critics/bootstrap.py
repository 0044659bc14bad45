"""Targets of every critic: lambda-returns, for one value or for a whole set of return samples.

A return sample mixes over *which* future it bootstraps from, so there are two ways to read the lambda-return of samples:
`average` takes the weighted mean of bootstrap and continuation (exact for the mean, but averaging two
samples of a random variable shrinks its spread when 0 < lambda < 1), `sampled` draws the bootstrap time of each sample from the
geometric distribution that lambda stands for (exact for the whole distribution). Both agree at lambda 0 and 1.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def lambda_returns(token_rewards: Tensor, bootstrap: Tensor, mask: Tensor, discount: float, lam: float) -> Tensor:
    """y_t = r_t + discount (1 - done_t) [(1 - lam) Z(s_{t+1}) + lam y_{t+1}], sample by sample.

    token_rewards (B, T), bootstrap (B, T, K) samples of Z(s_t), mask (B, T) -> (B, T, K), zero where masked. Masked tokens are
    skipped wherever they stand; done is the last valid token of a row.
    """
    targets = torch.zeros_like(bootstrap)
    following_sample = following_target = torch.zeros_like(bootstrap[:, 0])
    for t in range(mask.shape[1] - 1, -1, -1):
        valid = mask[:, t, None] > 0
        target = token_rewards[:, t, None] + discount * ((1 - lam) * following_sample + lam * following_target)
        targets[:, t] = torch.where(valid, target, targets[:, t])
        following_sample = torch.where(valid, bootstrap[:, t], following_sample)
        following_target = torch.where(valid, target, following_target)
    return targets


def sampled_horizons(uniforms: Tensor, lam: float) -> Tensor:
    """Bootstrap time of each sample: P(n) = (1 - lam) lam^(n-1), n >= 1, by inversion of `uniforms` (K,) in (0, 1) -> (K,) int64."""
    if lam <= 0:
        return torch.ones_like(uniforms, dtype=torch.int64)
    if lam >= 1:
        return torch.full_like(uniforms, 2**31, dtype=torch.int64)
    return 1 + (uniforms.clamp(1e-12).log() / math.log(lam)).floor().clamp(max=2.0**31).to(torch.int64)


def stratified_horizons(count: int, lam: float, generator: torch.Generator | None) -> Tensor:
    """Random bootstrap times of `count` samples, one in each stratum of the geometric distribution, in random order: (K,) int64."""
    place = generator.device if generator else torch.device("cpu")
    jitter, order = torch.rand(2, count, generator=generator, device=place)
    return sampled_horizons((order.argsort() + jitter) / count, lam)


def sampled_lambda_returns(token_rewards: Tensor, bootstrap: Tensor, mask: Tensor, discount: float, horizons: Tensor) -> Tensor:
    """n-step returns with the n of each sample: y_t = r_t + .. + discount^(n-1) r_{t+n-1} + discount^n Z(s_{t+n}).

    Same shapes as `lambda_returns`; horizons (K,). With geometric horizons the distribution of y is the lambda-mixture of the
    n-step Bellman targets, so the true return distribution is its fixed point for every lambda ("sample replacement" of
    Nam et al. 2021, arXiv 2105.11366).
    """
    order = torch.argsort((mask <= 0).to(torch.int8), dim=1, stable=True)  # valid tokens first, in order
    lengths = (mask > 0).sum(1)
    length = mask.shape[1]
    rewards = token_rewards.gather(1, order)
    rewards = torch.where(torch.arange(length, device=mask.device) < lengths[:, None], rewards, torch.zeros_like(rewards))
    to_go = torch.zeros(len(rewards), length + 1, dtype=rewards.dtype, device=rewards.device)
    for t in range(length - 1, -1, -1):
        to_go[:, t] = rewards[:, t] + discount * to_go[:, t + 1]
    samples = bootstrap.gather(1, order[..., None].expand_as(bootstrap))
    landing = torch.arange(length, device=mask.device)[:, None] + horizons.to(mask.device)  # (T, K)
    ended = landing[None] >= lengths[:, None, None]
    landing = torch.where(ended, 0, landing.clamp(max=length - 1)[None])
    factor = discount ** horizons.clamp(max=length).to(bootstrap)  # beyond the end the correction is dropped anyway
    correction = factor * (samples.gather(1, landing) - to_go[:, :length, None].expand_as(samples).gather(1, landing))
    packed = to_go[:, :length, None] + torch.where(ended, torch.zeros_like(correction), correction)
    targets = torch.zeros_like(packed).scatter(1, order[..., None].expand_as(packed), packed)
    return torch.where(mask[..., None] > 0, targets, torch.zeros_like(targets))
