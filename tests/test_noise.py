"""Label noise: what holds for every table, and a few labels by hand."""

import math
from collections import Counter

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dfpo_core.config import NoiseConfig
from dfpo_core.noise import add_label_noise, flip, measure
from dfpo_core.rewards import canonical_number, normalise_text

KINDS = ("symmetric", "permuted", "plausible")
LABELS = ["A", "B", "C", "D"]


def make(answers, reward, domains=None, labels=None):
    count = len(answers)
    return pa.table(
        {
            "row_id": pa.array([f"d/{index}" for index in range(count)], pa.string()),
            "answer": pa.array(answers, pa.string()),
            "domain": pa.array(domains or ["d"] * count, pa.string()),
            "reward": pa.array([reward] * count, pa.string()),
            "choice_labels": pa.array(labels or [LABELS if reward == "choice" else None] * count, pa.list_(pa.string())),
        }
    )


def mixed(count, seed=0):
    random = np.random.default_rng(seed)
    return pa.concat_tables(
        [
            make([str(x) for x in random.integers(-30, 300, count)], "number", ["sums"] * count),
            make([LABELS[x] for x in random.integers(0, 4, count)], "choice", ["quiz"] * count),
            make([f"Word {x}" for x in random.integers(0, 40, count)], "exact", ["words"] * count),
        ]
    ).set_column(0, "row_id", [[f"row/{index}" for index in range(3 * count)]])


def noisy(table, kind, rate, seed=1):
    return add_label_noise(table, NoiseConfig(kind=kind, rate=rate), seed)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rate", [0.0, 0.1, 0.3, 0.9, 1.0])
def test_the_measured_rate_is_within_four_binomial_deviations(kind, rate):
    table = mixed(4000)
    measured = measure(noisy(table, kind, rate), NoiseConfig(kind=kind, rate=rate))
    deviation = math.sqrt(rate * (1 - rate) / 12000)
    assert measured["noise/rate_requested"] == rate
    assert abs(measured["noise/rate_measured"] - rate) <= 4 * deviation
    domains = [measured[f"noise/{domain}/rate_measured"] for domain in ("sums", "quiz", "words")]
    assert sum(domains) / 3 == pytest.approx(measured["noise/rate_measured"])


numbers = st.one_of(st.integers(), st.integers(-12, 12), st.decimals(allow_nan=False, allow_infinity=False, places=3), st.fractions()).map(
    lambda value: canonical_number(f"{value:f}" if hasattr(value, "as_tuple") else str(value))
)
answers = st.one_of(
    st.tuples(st.just("number"), st.lists(numbers, max_size=30)),
    st.tuples(st.just("choice"), st.lists(st.sampled_from(LABELS), max_size=30)),
    st.tuples(st.just("exact"), st.lists(st.sampled_from(["a", "A", "a.", "b", " b", "ﬁ", "fi", "ß", "İ", "word"]), max_size=30)),
)


@settings(max_examples=150, deadline=None)
@given(answers, st.sampled_from(KINDS), st.sampled_from([0.3, 1.0]), st.integers(0, 2**31 - 1), st.randoms(use_true_random=False))
def test_a_noisy_label_differs_from_the_truth_and_row_order_does_not_matter(drawn, kind, rate, seed, random):
    reward, values = drawn
    table = make(values, reward)
    result = noisy(table, kind, rate, seed)
    same = {"number": lambda text: text, "choice": str, "exact": normalise_text}[reward]
    for row in result.to_pylist():
        assert row["clean_answer"] == row["answer"]
        assert row["is_noisy"] == (same(row["label"]) != same(row["answer"])) == (row["label"] != row["answer"])
        assert row["noise_kind"] == (kind if row["is_noisy"] else "none")
        assert reward != "number" or canonical_number(row["label"]) == row["label"]
    order = list(range(len(values)))
    random.shuffle(order)
    shuffled = noisy(table.take(pa.array(order, pa.int64())), kind, rate, seed)
    assert shuffled.to_pylist() == result.take(pa.array(order, pa.int64())).to_pylist()


@pytest.mark.parametrize("kind", KINDS)
def test_the_noisy_rows_do_not_depend_on_other_rows_and_grow_with_the_rate(kind):
    table = mixed(1000)
    low, high = (noisy(table, kind, rate)["is_noisy"].to_numpy() for rate in (0.1, 0.4))
    assert np.all(high[low])
    alone = noisy(table.slice(0, 1500), kind, 0.4)["is_noisy"].to_numpy()
    assert np.array_equal(alone, high[:1500])


@pytest.mark.parametrize("kind", KINDS)
def test_seeds_draw_independent_rows(kind):
    table = mixed(4000)
    first, second = (noisy(table, kind, 0.5, seed)["is_noisy"].to_numpy() for seed in (1, 2))
    assert abs(np.mean(first & second) - 0.25) < 4 * math.sqrt(0.25 * 0.75 / 12000)


def test_plausible_numbers_and_options_depend_on_their_own_row_only():
    table = mixed(300)
    whole = noisy(table, "plausible", 1.0)["label"].to_pylist()
    for index in (0, 7, 299, 300, 555):
        assert noisy(table.slice(index, 1), "plausible", 1.0)["label"].to_pylist() == whole[index : index + 1]


def test_symmetric_noise_is_uniform_over_the_other_answers_of_the_domain():
    frequent_and_rare = ["1"] * 9000 + ["2"] * 2000 + ["3"] * 900 + ["4"] * 100
    table = make(frequent_and_rare + ["99"] * 50, "number", ["d"] * 12000 + ["other"] * 50)
    result = noisy(table, "symmetric", 1.0)
    counts = Counter(row["label"] for row in result.to_pylist() if row["answer"] == "1")
    assert set(counts) == {"2", "3", "4"}
    assert all(abs(count - 3000) < 4 * math.sqrt(9000 * 2 / 9) for count in counts.values())
    assert not any(result["is_noisy"].to_pylist()[12000:])


def test_plausible_text_follows_the_frequency_of_the_other_answers():
    table = make(["a"] * 9000 + ["b"] * 2000 + ["c"] * 1000, "exact")
    counts = Counter(row["label"] for row in noisy(table, "plausible", 1.0).to_pylist() if row["answer"] == "a")
    assert abs(counts["b"] - 6000) < 4 * math.sqrt(9000 * 2 / 9)
    assert counts["b"] + counts["c"] == 9000


def test_permuted_noise_keeps_the_label_frequencies():
    table = mixed(2000)
    result = noisy(table, "permuted", 0.7)
    assert Counter(result["label"].to_pylist()) == Counter(table["answer"].to_pylist())


def test_permuted_noise_leaves_the_surplus_of_a_majority_clean():
    result = noisy(make(["1"] * 70 + ["2"] * 30, "number"), "permuted", 1.0)
    assert sum(result["is_noisy"].to_pylist()) == 60
    assert Counter(result["label"].to_pylist()) == {"1": 70, "2": 30}


@pytest.mark.parametrize("kind", KINDS)
def test_a_choice_gets_one_of_its_own_labels(kind):
    labels = [["A", "B", "C"], ["1", "2", "3", "4"]] * 200
    result = noisy(make(["C", "4"] * 200, "choice", labels=labels), kind, 1.0)
    assert all(row["label"] in row["choice_labels"] for row in result.to_pylist())
    wrong = Counter(row["label"] for row in result.to_pylist() if row["is_noisy"])
    assert kind == "permuted" or (set(wrong) == {"A", "B", "1", "2", "3"} and all(40 <= count <= 130 for count in wrong.values()))


def near(value):
    """Every slip that the module promises for an integer, by brute force on its digits."""
    digits = str(abs(value))
    texts = [digits[:i] + d + digits[i + 1 :] for i in range(len(digits)) for d in "0123456789"]
    texts += [digits[:i] + digits[i + 1] + digits[i] + digits[i + 2 :] for i in range(len(digits) - 1)]
    sign = -1 if value < 0 else 1
    same_length = {sign * int(text) for text in texts if len(str(int(text))) == len(digits)}
    return ({value + 1, value - 1, value + 10, value - 10, sign * (abs(value) + 1)} | same_length) - {value}


def test_plausible_integers_are_near_misses_and_not_negative_for_a_count():
    values = [0, 3, 9, 10, 99, 100, 121, -5, -10, 40_302, 10**16, 99_999_999_999_999_999] * 300
    result = noisy(make([str(value) for value in values], "number"), "plausible", 1.0)
    seen: dict[int, set[int]] = {}
    for value, label in zip(values, result["label"].to_pylist(), strict=True):
        seen.setdefault(value, set()).add(int(label))
    for value, labels in seen.items():
        assert labels <= near(value)
        assert value < 0 or min(labels) >= 0
    assert {41_302, 40_303, 40_301, 40_312, 40_292, 43_002, 40_032, 40_320} <= seen[40_302]
    assert len(seen[40_302]) > 30


def test_long_integers_decimals_and_fractions_have_one_digit_changed():
    truths = ["3.75", "-0.5", "2/3", str(10**30)] * 50
    for row in noisy(make(truths, "number"), "plausible", 1.0).to_pylist():
        assert row["is_noisy"]
        assert canonical_number(row["label"]) == row["label"] != row["answer"]


def test_an_empty_table_and_kind_none_pass_through():
    assert noisy(make([], "number"), "symmetric", 0.5).num_rows == 0
    result = noisy(make(["1", "2"], "number"), "none", 0.0)
    assert result["label"].to_pylist() == ["1", "2"] and result["noise_kind"].to_pylist() == ["none", "none"]


def test_reward_flips_are_a_fixed_function_of_text_and_seed():
    texts = [f"response {index}" for index in range(20_000)]
    flipped = flip([1.0] * 20_000, texts, 0.28, seed=3)
    assert abs(sum(reward == 0.0 for reward in flipped) / 20_000 - 0.28) < 4 * math.sqrt(0.28 * 0.72 / 20_000)
    assert flip([1.0] * 20_000, texts[::-1], 0.28, seed=3) == flipped[::-1]
    assert flip([0.0] * 20_000, texts, 0.28, seed=3) == [1.0 - reward for reward in flipped]
    assert flip([1.0] * 20_000, texts, 0.28, seed=4) != flipped
    assert flip([], [], 0.5, seed=1) == []
    assert flip([0.0, 1.0], ["a", "b"], 0.0, 1) == [0.0, 1.0] and flip([0.0, 1.0], ["a", "b"], 1.0, 1) == [1.0, 0.0]
