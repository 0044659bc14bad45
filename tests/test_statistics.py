"""Bootstrap intervals against SciPy, the binomial distribution and cases done by hand."""

import numpy as np
import pytest
from scipy import stats

from dfpo_core.statistics import bootstrap_mean, paired_difference, wilson


@pytest.mark.parametrize("values", [np.random.default_rng(1).random(80), np.random.default_rng(2).integers(0, 2, 80)], ids=["real", "0/1"])
def test_interval_of_a_mean_matches_scipy(values):
    ours = bootstrap_mean(values, samples=20_000, seed=3)
    theirs = stats.bootstrap((values,), np.mean, method="percentile", n_resamples=20_000, rng=4).confidence_interval
    assert (ours.low, ours.high) == pytest.approx((theirs.low, theirs.high), abs=0.013)  # one question is 1/80


def test_interval_of_0_1_data_is_the_binomial_one():
    values = np.array([1] * 30 + [0] * 70)
    interval = bootstrap_mean(values, confidence=0.9, samples=50_000)
    expected = stats.binom.ppf([0.05, 0.95], 100, 0.3) / 100
    assert interval.mean == 0.3 and interval.count == 100
    assert [interval.low, interval.high] == pytest.approx(expected, abs=0.0101)


def test_paired_difference_matches_scipys_paired_bootstrap():
    rng = np.random.default_rng(5)
    first, second = rng.integers(0, 2, 120), rng.integers(0, 2, 120)
    ours = paired_difference(first, second, samples=20_000)
    theirs = stats.bootstrap(
        (first, second), lambda a, b, axis: np.mean(a - b, axis=axis), paired=True, method="percentile", n_resamples=20_000, rng=6
    ).confidence_interval
    assert ours.mean == pytest.approx(first.mean() - second.mean())
    assert (ours.low, ours.high) == pytest.approx((theirs.low, theirs.high), abs=0.009)


def test_pairing_cancels_what_two_models_share():
    hard = np.random.default_rng(7).integers(0, 2, 400)
    better = hard.copy()
    better[np.flatnonzero(hard == 0)[:20]] = 1
    paired = paired_difference(better, hard)
    # 20 of 400 questions differ: mean 0.05, standard error sqrt(0.05 * 0.95 / 400) = 0.0109
    assert paired.mean == pytest.approx(0.05)
    assert paired.high - paired.low == pytest.approx(2 * 1.96 * 0.0109, rel=0.1)
    assert paired.low > 0


def test_equal_answers_have_a_difference_of_exactly_zero():
    answers = np.array([0, 1, 1, 0, 1])
    difference = paired_difference(answers, answers)
    assert (difference.mean, difference.low, difference.high) == (0, 0, 0)


def test_a_large_sample_with_many_distinct_values_follows_the_normal_law():
    values = np.random.default_rng(8).normal(size=20_000)
    interval = bootstrap_mean(values, samples=1_000)
    assert interval.high - interval.low == pytest.approx(2 * 1.96 * values.std() / np.sqrt(20_000), rel=0.1)


def test_ninety_five_per_cent_intervals_cover_the_truth_that_often():
    rng = np.random.default_rng(9)
    covered = 0
    for trial in range(400):
        interval = bootstrap_mean(rng.random(60) < 0.6, samples=400, seed=trial)
        covered += interval.low <= 0.6 <= interval.high
    assert 0.90 <= covered / 400 <= 0.98


def test_a_seed_repeats_the_interval_and_another_moves_it():
    values = np.random.default_rng(10).random(50)
    assert bootstrap_mean(values, seed=1) == bootstrap_mean(values, seed=1)
    assert bootstrap_mean(values, seed=1).low != bootstrap_mean(values, seed=2).low


@pytest.mark.parametrize("values", [[], [0.5, float("nan")], [[1, 0]]])
def test_input_without_a_mean_is_refused(values):
    with pytest.raises(ValueError, match="non-empty vector of finite numbers"):
        bootstrap_mean(values)


def test_a_pair_of_unequal_length_is_refused():
    with pytest.raises(ValueError, match="same questions"):
        paired_difference([1, 0], [1, 0, 1])


@pytest.mark.parametrize(("hits", "count"), [(0, 1), (0, 48), (3, 48), (48, 48), (500, 1319)])
def test_wilsons_interval_is_scipys(hits, count):
    expected = stats.binomtest(hits, count).proportion_ci(method="wilson")
    assert wilson(hits / count, count) == pytest.approx((expected.low, expected.high), abs=1e-6)
