"""Bootstrap intervals of a mean and of a paired difference: percentile method (Efron and Tibshirani 1993, chapter 13).

Questions are the sampling unit. A paired difference resamples questions and keeps both models' answers to a question
together, so what makes a question hard for both cancels. The percentiles of 0/1 data are discrete: with n questions the
interval moves in steps of 1/n, and it is a point where every value is the same.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import sqrt

import numpy as np

_DRAWS_AT_ONCE = 1 << 24  # resampled values held in memory


@dataclass(frozen=True)
class Interval:
    """A mean with the bounds of its interval, and the number of questions behind it."""

    mean: float
    low: float
    high: float
    count: int


def bootstrap_mean(values: np.ndarray, *, confidence: float = 0.95, samples: int = 2000, seed: int = 0) -> Interval:
    """The mean of `values` (n,) and its percentile-bootstrap interval.

    The same seed and n give the same resamples, so a result can be repeated. Raises ValueError on empty or non-finite input.
    """
    values = np.asarray(values, dtype=np.float64)
    if values.ndim != 1 or len(values) == 0 or not np.isfinite(values).all():
        raise ValueError(f"a bootstrap needs a non-empty vector of finite numbers, got shape {values.shape}")
    tail = (1 - confidence) / 2
    low, high = np.quantile(_resampled_means(values, samples, np.random.default_rng(seed)), [tail, 1 - tail])
    return Interval(float(values.mean()), float(low), float(high), len(values))


def wilson(share: float, count: int) -> tuple[float, float]:
    """The 95 % interval of a share of `count` questions (Wilson 1927): honest for few of them and for shares of 0 and 1, where a
    bootstrap gives a point."""
    z = 1.959964
    middle = (share + z * z / (2 * count)) / (1 + z * z / count)
    reach = z / (1 + z * z / count) * sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    return max(0.0, middle - reach), min(1.0, middle + reach)


def paired_difference(first: np.ndarray, second: np.ndarray, *, confidence: float = 0.95, samples: int = 2000, seed: int = 0) -> Interval:
    """The mean of `first - second` over the same questions, both (n,), with its interval. Raises ValueError on unequal lengths."""
    first, second = np.asarray(first, dtype=np.float64), np.asarray(second, dtype=np.float64)
    if first.shape != second.shape:
        raise ValueError(f"a paired difference needs the same questions, got {first.shape} and {second.shape}")
    return bootstrap_mean(first - second, confidence=confidence, samples=samples, seed=seed)


def student_interval(values: np.ndarray, *, confidence: float = 0.95) -> Interval:
    """The mean of `values` (n,) with Student's t interval, for the handful of seeds of which a bootstrap would be too sure.

    Raises ValueError for fewer than two values.
    """
    from scipy.stats import t

    values = np.asarray(values, dtype=np.float64)
    if values.ndim != 1 or len(values) < 2 or not np.isfinite(values).all():
        raise ValueError(f"an interval needs at least two finite numbers, got shape {values.shape}")
    mean, reach = float(values.mean()), float(t.ppf((1 + confidence) / 2, len(values) - 1) * values.std(ddof=1) / np.sqrt(len(values)))
    return Interval(mean, mean - reach, mean + reach, len(values))


def _resampled_means(values: np.ndarray, samples: int, generator: np.random.Generator) -> np.ndarray:
    """(samples,) means of resamples with replacement.

    Data with few distinct values, which 0/1 answers are, need only how often each value was drawn: one multinomial a resample.
    """
    distinct, counts = np.unique(values, return_counts=True)
    if len(distinct) <= 16:
        drawn = generator.multinomial(len(values), counts / len(values), size=samples)
        return drawn @ distinct / len(values)
    rows = max(1, _DRAWS_AT_ONCE // len(values))
    blocks = [min(rows, samples - start) for start in range(0, samples, rows)]
    return np.concatenate([values[generator.integers(0, len(values), (block, len(values)))].mean(1) for block in blocks])
