"""The numbers behind the figures, and that each figure shows what it was given."""

from __future__ import annotations

import numpy as np
import pytest

from dfpo_core import figures


def test_a_calibrated_bernoulli_critic_lies_on_the_diagonal():
    """Predicted samples 0 and 1 in the true proportion."""
    generator = np.random.default_rng(0)
    p = generator.integers(1, 10, 20_000) / 10
    returns = (np.arange(10)[None] >= 10 * (1 - p[:, None])).astype(float)
    realised = (generator.random(20_000) < p).astype(float)
    levels, coverage = figures.quantile_coverage(returns, realised)
    assert np.abs(coverage - levels).max() < 0.02  # five standard errors of 20 000 draws


def test_a_critic_that_promises_too_much_lies_above_the_diagonal():
    returns = np.tile(np.linspace(0.5, 1.0, 16), (1000, 1))
    realised = np.random.default_rng(0).random(1000)
    levels, coverage = figures.quantile_coverage(returns, realised)
    # A share 1/2 of the returns lies below every predicted sample.
    assert coverage[0] == pytest.approx(0.5, abs=0.05)


def test_reliability_bins_are_equally_full_and_average_what_fell_in():
    values = np.array([0.1, 0.2, 0.8, 0.9])
    realised = np.array([0.0, 1.0, 1.0, 1.0])
    predicted, mean, error, counts = figures.reliability(values, realised, bins=2)
    assert predicted.tolist() == pytest.approx([0.15, 0.85])
    assert mean.tolist() == [0.5, 1.0]
    assert error.tolist() == pytest.approx([0.5 / 2**0.5, 0.0])
    assert counts.tolist() == [2, 2]


def test_the_fan_shows_every_token_and_the_sign_of_each_advantage():
    returns = np.sort(np.random.default_rng(0).normal(size=(4, 32)), 1)
    figure = figures.value_fan(["4", "2", " ", "$"], returns, returns.mean(1), np.array([1.0, -1.0, 0.5, 0.0]), returns.std(1), "6*7=")
    fan, gain, spread = figure.axes
    assert [label.get_text() for label in spread.get_xticklabels()] == ["4", "2", "␣", r"\$"]
    assert [bar.get_height() for bar in gain.patches] == [1.0, -1.0, 0.5, 0.0]
    figure.canvas.draw()


def test_learning_curves_say_where_there_is_no_critic():
    figure = figures.learning_curves([{"reward/noisy": 0.1, "reward/clean": 0.2, "policy/kl_to_sft": 0.0}])
    texts = {text.get_text() for axis in figure.axes for text in axis.texts}
    assert texts == {"no critic"}
    reward = figure.axes[0]
    assert [line.get_ydata().tolist() for line in reward.lines] == [[0.1], [0.2]]
