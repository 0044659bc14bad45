"""Label noise: what holds for every table, and a few labels by hand."""

import math
import string
from collections import Counter

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from dfpo_core.config import NoiseConfig, RewardNoiseConfig, parse_config
from dfpo_core.errors import UserError
from dfpo_core.noise import add_label_noise, corrupt, measure, noisy_file, reward_noise
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


COUNT = 20_000
TEXTS = [f"response {index}" for index in range(COUNT)]


def judged(rewards, noise, texts=None, questions=None, seed=3, step=0):
    texts = TEXTS[: len(rewards)] if texts is None else texts
    return reward_noise(rewards, questions or ["q"] * len(rewards), texts, RewardNoiseConfig(**noise), seed, step)


def binomial(share, rate, count=COUNT):
    return abs(share - rate) < 4 * math.sqrt(rate * (1 - rate) / count)


def test_reward_flips_are_a_fixed_function_of_question_text_and_seed():
    flipped = judged([1.0] * COUNT, {"flip_rate": 0.28})
    assert binomial(sum(reward == 0.0 for reward in flipped) / COUNT, 0.28)
    assert judged([1.0] * COUNT, {"flip_rate": 0.28}, TEXTS[::-1]) == flipped[::-1]
    assert judged([0.0] * COUNT, {"flip_rate": 0.28}) == [1.0 - reward for reward in flipped]
    assert judged([1.0] * COUNT, {"flip_rate": 0.28}, seed=4) != flipped
    assert judged([1.0] * COUNT, {"flip_rate": 0.28}, questions=["p"] * COUNT) != flipped
    assert judged([], {"flip_rate": 0.5}) == []
    assert judged([0.0, 1.0], {}) == [0.0, 1.0] and judged([0.0, 1.0], {"flip_rate": 1.0}) == [1.0, 0.0]


def test_false_positives_and_false_negatives_have_rates_of_their_own():
    noise = {"false_positive_rate": 0.1, "false_negative_rate": 0.4}
    assert binomial(sum(judged([0.0] * COUNT, noise)) / COUNT, 0.1)
    assert binomial(1 - sum(judged([1.0] * COUNT, noise)) / COUNT, 0.4)


def test_a_simulated_reward_model_has_its_accuracy_and_overrates_the_same_text_everywhere():
    noise = {"model_accuracy": 0.718}
    wrong = [value == 1.0 for value in judged([0.0] * COUNT, noise)]
    assert binomial(sum(wrong) / COUNT, 1 - 0.718)
    assert [value == 0.0 for value in judged([1.0] * COUNT, noise)] == wrong
    liked = TEXTS[wrong.index(True)]
    assert judged([0.0] * 50, noise, [liked] * 50, [f"question {i}" for i in range(50)]) == [1.0] * 50
    assert judged([0.0], noise, [f"  {liked.upper()} "]) == [1.0]  # the judge does not see case and spaces


def test_gaussian_noise_is_normal_and_fixed():
    noise = {"gaussian_std": 0.5}
    values = np.array(judged([1.0] * COUNT, noise))
    assert stats.kstest((values - 1) / 0.5, "norm").pvalue > 1e-3
    assert judged([1.0] * COUNT, noise) == values.tolist()


def test_drift_raises_the_noise_linearly_from_nothing():
    noise = {"flip_rate": 0.4, "drift_steps": 100}
    assert judged([1.0] * COUNT, noise, step=0) == [1.0] * COUNT
    half, full = ([i for i, v in enumerate(judged([1.0] * COUNT, noise, step=step)) if v == 0] for step in (50, 100))
    assert binomial(len(half) / COUNT, 0.2) and binomial(len(full) / COUNT, 0.4) and set(half) < set(full)
    assert judged([1.0] * COUNT, noise, step=5000) == judged([1.0] * COUNT, noise, step=100)


@pytest.mark.parametrize(
    ("noise", "words"),
    [
        ({"flip_rate": 0.1, "model_accuracy": 0.9}, "exclude each other"),
        ({"false_positive_rate": 0.1, "flip_rate": 0.1}, "exclude each other"),
        ({"gaussian_std": -1}, "greater than or equal to 0"),
    ],
)
def test_reward_noise_that_contradicts_itself_is_refused(noise, words):
    with pytest.raises(ValueError, match=words):
        RewardNoiseConfig(**noise)


def test_class_conditional_labels_follow_their_transitions():
    table = make([LABELS[i % 3] for i in range(30_000)], "choice")
    transitions = {"A": {"B": 0.5, "D": 0.25}, "C": {"A": 1.0}}
    result = add_label_noise(table, NoiseConfig(kind="class_conditional", transitions=transitions), 1)
    seen = Counter(zip(result["answer"].to_pylist(), result["label"].to_pylist(), strict=True))
    for pair, rate in {("A", "B"): 0.5, ("A", "D"): 0.25, ("A", "A"): 0.25}.items():
        assert binomial(seen[pair] / 10_000, rate, 10_000)
    assert seen["C", "A"] == 10_000 and seen["B", "B"] == 10_000
    assert result["is_noisy"].to_pylist() == [a != b for a, b in zip(*(result[c].to_pylist() for c in ("answer", "label")), strict=True)]


@pytest.mark.parametrize(
    "noise",
    [
        {"kind": "class_conditional"},
        {"transitions": {"A": {"B": 0.1}}},
        {"kind": "class_conditional", "transitions": {"A": {"A": 0.1}}},
        {"kind": "class_conditional", "transitions": {"A": {"B": 0.7, "C": 0.7}}},
        {"kind": "class_conditional", "transitions": {"A": {"B": -0.1}}},
    ],
)
def test_transitions_that_are_no_probabilities_are_refused(noise):
    with pytest.raises(ValueError, match="transitions"):
        NoiseConfig(**noise)


def test_missing_labels_are_null_recorded_and_independent_of_wrong_ones():
    table = mixed(4000)
    result = add_label_noise(table, NoiseConfig(kind="symmetric", rate=0.3, missing_rate=0.4), 1)
    gone = np.array([label is None for label in result["label"].to_pylist()])
    assert binomial(gone.mean(), 0.4, 12_000)
    kinds = np.array(result["noise_kind"].to_pylist())
    assert (kinds[gone] == "missing").all() and not np.array(result["is_noisy"].to_pylist())[gone].any()
    assert binomial(np.array(result["is_noisy"].to_pylist())[~gone].mean(), 0.3, int((~gone).sum()))
    without = noisy(table, "symmetric", 0.3)["label"].to_pylist()
    assert [a for a, g in zip(result["label"].to_pylist(), gone, strict=True) if not g] == [
        a for a, g in zip(without, gone, strict=True) if not g
    ]
    measured = measure(result, NoiseConfig(kind="symmetric", rate=0.3, missing_rate=0.4))
    assert measured["noise/missing_requested"] == 0.4 and measured["noise/missing_measured"] == pytest.approx(gone.mean())


WORDS = ["What", "is", "the", "largest", "number", "below", "17", "plus", "x2", "when", "nothing", "else", "helps?"]


def test_typos_swap_two_inner_letters_of_words_and_leave_numbers_alone():
    question = " ".join(WORDS)
    changed = corrupt(question, "row", NoiseConfig(typo_rate=1.0), 1).split()
    for before, after in zip(WORDS, changed, strict=True):
        assert sorted(before) == sorted(after) and before[0] == after[0] and before[-1] == after[-1]
        if len(before) < 4 or not before.isalpha():
            assert before == after
    assert changed != WORDS


def test_dropped_words_are_left_out_at_their_rate_and_numbers_stay():
    rows = [corrupt(" ".join(WORDS), f"row {i}", NoiseConfig(word_drop_rate=0.25), 1).split() for i in range(2000)]
    letters = [word for word in WORDS if word.isalpha()]
    kept = sum(word in letters for row in rows for word in row)
    assert binomial(1 - kept / (2000 * len(letters)), 0.25, 2000 * len(letters))
    assert all({"17", "x2", "helps?"} <= set(row) for row in rows)


def test_questions_are_corrupted_in_the_table_and_the_clean_ones_kept():
    table = make(["1", "2"], "number").append_column("question", [["largest number below 17", "17 + 2"]])
    result = add_label_noise(table, NoiseConfig(typo_rate=1.0), 1)
    assert result["clean_question"].to_pylist() == ["largest number below 17", "17 + 2"]
    assert result["question"].to_pylist()[1] == "17 + 2" != result["question"].to_pylist()[0]
    assert measure(result, NoiseConfig(typo_rate=1.0))["noise/questions_changed"] == 0.5


def questions(table):
    count = table.num_rows
    table = table.append_column("question", pa.array([f"what about number {i}" for i in range(count)]))
    table = table.append_column("source", pa.array(["made"] * count))
    return table.append_column("choices", pa.array([LABELS if of else None for of in table["choice_labels"].to_pylist()]))


@pytest.mark.parametrize("batch_rows", [1, 7, 1000])
@pytest.mark.parametrize(
    "options",
    [
        {"kind": "symmetric", "rate": 0.5},
        {"kind": "permuted", "rate": 0.5},
        {"kind": "plausible", "rate": 0.5, "missing_rate": 0.2},
        {"kind": "class_conditional", "transitions": {"A": {"B": 0.5}}},
        {"kind": "none", "typo_rate": 0.5},
    ],
    ids=lambda options: options["kind"],
)
def test_a_file_in_parts_gets_the_labels_of_the_whole_table(tmp_path, options, batch_rows):
    table = questions(mixed(40))
    config = parse_config({"seed": 3, "model": "scratch:tiny", "noise": options, "data": {"train": [{"kind": "jsonl", "name": "x.jsonl"}]}})
    pq.write_table(table, tmp_path / "clean.parquet")
    metrics, removed = noisy_file(tmp_path / "clean.parquet", tmp_path / "noisy.parquet", config, batch_rows)
    assert not removed
    whole = add_label_noise(table, config.noise, 3)
    assert pq.read_table(tmp_path / "noisy.parquet").to_pylist() == whole.to_pylist()
    assert {k: v for k, v in metrics.items() if k != "noise/too_long"} == pytest.approx(measure(whole, config.noise))


def test_a_file_without_rows_keeps_its_columns(tmp_path):
    config = parse_config({"seed": 3, "model": "scratch:tiny", "data": {"train": [{"kind": "jsonl", "name": "x.jsonl"}]}})
    pq.write_table(mixed(3).slice(0, 0), tmp_path / "clean.parquet")
    assert noisy_file(tmp_path / "clean.parquet", tmp_path / "noisy.parquet", config)[0]["noise/rate_measured"] == 0
    assert "label" in pq.read_schema(tmp_path / "noisy.parquet").names


@pytest.mark.parametrize("too_long", ["refuse", "drop"])
def test_a_prompt_that_typos_make_too_long_is_refused_or_dropped_and_counted(tmp_path, monkeypatch, too_long):
    """A tokenizer that knows the word `about` and spells out any other: only a typo in `about` makes a prompt longer."""
    characters = [*string.ascii_lowercase, *string.digits, " ", "\n", "ab", "abo", "abou", "about"]
    merges = [("a", "b"), ("ab", "o"), ("abo", "u"), ("abou", "t")]
    words = Tokenizer(models.BPE(vocab={name: index for index, name in enumerate(characters)}, merges=merges))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<end>")
    monkeypatch.setattr("dfpo_core.noise.load_tokenizer", lambda reference, home: tokenizer)
    values = {"seed": 3, "model": "scratch:tiny", "data": {"train": [{"kind": "jsonl", "name": "x.jsonl"}]}}
    limits = {"max_prompt_tokens": 17, "too_long": too_long}  # what, about as one, number, two digits, three spaces, a new line
    config = parse_config({**values, "noise": {"kind": "none", "typo_rate": 0.5}, "prompt": limits})
    table = questions(make([str(i) for i in range(100)], "number"))
    pq.write_table(table, tmp_path / "clean.parquet")
    if too_long == "refuse":
        with pytest.raises(UserError, match="prompts are longer than 17 tokens"):
            noisy_file(tmp_path / "clean.parquet", tmp_path / "noisy.parquet", config)
        return
    metrics, removed = noisy_file(tmp_path / "clean.parquet", tmp_path / "noisy.parquet", config)
    whole = add_label_noise(table, config.noise, 3).to_pylist()
    expected = [row["row_id"] for row in whole if "about" not in row["question"]]
    assert [entry["row_id"] for entry in removed] == expected and 20 < len(expected) < 80
    assert metrics["noise/too_long"] == len(expected)
    assert [row["row_id"] for row in pq.read_table(tmp_path / "noisy.parquet").to_pylist()] == [
        row["row_id"] for row in whole if row["row_id"] not in expected
    ]
