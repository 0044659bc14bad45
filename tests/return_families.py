"""State-conditional return distributions with known quantiles, for tests and benchmarks of distributional critics.

A state is a random vector h (STATE_SIZE,); the parameters of its return are smooth functions of a few fixed projections
of h, so a critic trained on fresh random states is judged on states that it has not seen.
"""

from __future__ import annotations

import numpy as np
import torch
from scipy import stats

STATE_SIZE = 16
_PROJECTIONS = np.random.default_rng(7).normal(size=(STATE_SIZE, 8)) / np.sqrt(STATE_SIZE)


def random_states(count: int, generator: np.random.Generator) -> np.ndarray:
    """Normal vectors of root mean square 1, as behind a language model's final norm: (count, STATE_SIZE)."""
    states = generator.normal(size=(count, STATE_SIZE))
    return states / np.sqrt(np.square(states).mean(1, keepdims=True))


def _features(states: np.ndarray) -> np.ndarray:
    return states @ _PROJECTIONS  # (N, 8), standard normal


def _unit(x: np.ndarray) -> np.ndarray:
    return stats.norm.cdf(x)


class Bernoulli:
    """0 or 1 with probability p(h) in (0.05, 0.95)."""

    def quantiles(self, states, levels):
        p = 0.05 + 0.9 * _unit(_features(states)[:, :1])
        return (levels > 1 - p).astype(float)


class Mixture:
    """Two to four narrow normals (std 0.05): the number, places and weights of the modes all depend on h."""

    def modes(self, states):
        """Centres and weights of the modes, (N, 4) each."""
        f = _features(states)
        centres = np.array([0.15, 0.4, 0.6, 0.85]) + 0.1 * _unit(f[:, :4])
        count = 2 + np.digitize(f[:, 7], [-0.4, 0.4])  # 2, 3 or 4
        weights = np.exp(f[:, 3:7]) * np.stack([count >= 2, count >= 3, count >= 4, count >= 2], 1)
        return centres, weights / weights.sum(1, keepdims=True)

    def quantiles(self, states, levels):
        centres, weights = self.modes(states)
        grid = np.linspace(-0.2, 1.3, 1501)
        cdf = sum(weights[:, i, None] * stats.norm.cdf((grid - centres[:, i, None]) / 0.05) for i in range(4))
        return np.stack([np.interp(levels[0], row, grid) for row in cdf])

    def draw(self, states, generator):
        centres, weights = self.modes(states)
        chosen = (generator.uniform(size=(len(states), 1)) > weights.cumsum(1)[:, :3]).sum(1)
        return centres[np.arange(len(states)), chosen] + 0.05 * generator.normal(size=len(states))


class Skewed:
    """A shifted exponential: location and scale depend on h."""

    def quantiles(self, states, levels):
        f = _features(states)
        return 0.3 * _unit(f[:, :1]) + (0.05 + 0.15 * _unit(f[:, 1:2])) * stats.expon.ppf(levels)


class HeavyTailed:
    """A Student t with three degrees of freedom: location and scale depend on h."""

    def quantiles(self, states, levels):
        f = _features(states)
        return 0.2 + 0.6 * _unit(f[:, :1]) + (0.03 + 0.07 * _unit(f[:, 1:2])) * stats.t.ppf(levels, 3)


class PointMass:
    """A single value that depends on h."""

    def quantiles(self, states, levels):
        return _unit(_features(states)[:, :1]) + 0 * levels


FAMILIES = {"bernoulli": Bernoulli(), "mixture": Mixture(), "skewed": Skewed(), "heavy_tailed": HeavyTailed(), "point_mass": PointMass()}


def draw(family, states: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """One return of each state: (N,). Levels are cut at 0.0005 and 0.9995: the returns of a language model are bounded."""
    if hasattr(family, "draw"):
        return family.draw(states, generator)
    return family.quantiles(states, generator.uniform(0.0005, 0.9995, size=(len(states), 1)))[:, 0]


def true_quantiles(family, states: np.ndarray, count: int) -> torch.Tensor:
    """Quantiles at the `count` stratum medians: (N, count)."""
    return torch.tensor(family.quantiles(states, (np.arange(count)[None] + 0.5) / count), dtype=torch.float32)


def errors(samples: torch.Tensor, truth: torch.Tensor) -> dict[str, float]:
    """Mean over states of W1, |mean error| and |CVaR 10 % error| in shares of the true range, and the ratio of mean deviations.

    samples (N, K) and truth (N, K) are both sorted at the same levels. The range is that of all true returns (0.1 to 99.9 %).
    """
    span = float(torch.quantile(truth.flatten()[:: max(1, truth.numel() // 1_000_000)], 0.999) - truth.flatten().quantile(0.001))
    tail = max(1, samples.shape[1] // 10)
    return {
        "w1": float((samples - truth).abs().mean() / span),
        "std_ratio": float(samples.std(1).mean() / truth.std(1).mean().clamp(min=1e-3 * span)),
        "mean_error": float((samples.mean(1) - truth.mean(1)).abs().mean() / span),
        "cvar_low_error": float((samples[:, :tail].mean(1) - truth[:, :tail].mean(1)).abs().mean() / span),
        "cvar_high_error": float((samples[:, -tail:].mean(1) - truth[:, -tail:].mean(1)).abs().mean() / span),
    }
