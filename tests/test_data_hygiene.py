"""Overlap between train and test by word sequences, near copies, and what copies say about the labels."""

import math
import random
import re

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from question_files import write

from dfpo_core.config import DataConfig
from dfpo_core.data import hygiene, prepare
from dfpo_core.errors import UserError

TEST = "A farmer has twelve red hens and each of the hens lays two eggs every single day of the week."


def brute_force(train, test, words, common):
    """By sets of tuples, as the definition says."""

    def grams(text):
        tokens = re.findall(r"[a-z0-9]+", text.lower())
        return {tuple(tokens[i : i + words]) for i in range(len(tokens) - words + 1)}

    def frequent(texts):
        counts = {}
        for text in texts:
            for gram in grams(text):
                counts[gram] = counts.get(gram, 0) + 1
        return {gram for gram, count in counts.items() if count > common}

    boilerplate = frequent(train) | frequent(test)
    shared = set().union(*map(grams, test)) - boilerplate if test else set()
    return [index for index, text in enumerate(train) if grams(text) & shared]


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.text("abc ", min_size=0, max_size=30), max_size=12),
    st.lists(st.text("abc ", min_size=0, max_size=30), max_size=6),
    st.integers(1, 4),
    st.integers(1, 3),
)
def test_overlaps_are_those_of_the_definition(train, test, words, common):
    found = hygiene.overlaps(train, test, words, common)
    assert [overlap.train_row for overlap in found] == brute_force(train, test, words, common)
    for overlap in found:
        for text in (train[overlap.train_row], test[overlap.test_row]):
            assert f" {overlap.words} " in f" {' '.join(text.split())} "


def test_twelve_words_are_no_overlap_and_thirteen_are_whatever_the_case_and_punctuation():
    words = TEST.rstrip(".").split()
    thirteen = "Tell me: " + ", ".join(words[3:16]).upper() + "!"
    twelve = "Tell me: " + " ".join(words[3:15])
    found = hygiene.overlaps([twelve, thirteen, "ünrelated"], ["something else", TEST], 13, 10)
    assert [(o.train_row, o.test_row, o.words) for o in found] == [(1, 1, " ".join(words[3:16]).lower())]


def test_a_sentence_that_many_questions_begin_with_is_boilerplate():
    lead = "Read the following problem with care and then give the final answer as one plain number: "
    train = [f"{lead}{n} and {n + 1}" for n in range(11)]
    assert hygiene.overlaps(train, [f"{lead}something"], 13, 10) == []
    assert len(hygiene.overlaps(train[:10], [f"{lead}something"], 13, 10)) == 10
    assert hygiene.overlaps(train[:10], [f"{lead}{word}" for word in "abcdefghijk"], 13, 10) == []


def prepared(tmp_path, train, test, **options):
    data = DataConfig(train=[write(tmp_path / "train.jsonl", train)], id_test=[write(tmp_path / "test.jsonl", test)], **options)
    return prepare.split(prepare.take(prepare.read_sources(data, 1), data, 1), data, 1)


def test_an_overlapping_training_row_leaves_with_its_place_and_the_words(tmp_path):
    train = ["Short one?", f"Listen. {TEST} How many eggs?", "Another one?"]
    result = prepared(tmp_path, train, [TEST])
    assert result.tables["train"]["question"].to_pylist() == [train[0], train[2]]
    (entry,) = result.removed
    assert (entry["split"], entry["source"], entry["line"], entry["gate"]) == ("train", "data.train.0", 2, "overlap")
    assert entry["file"].endswith("train.jsonl") and "a farmer has twelve red hens" in entry["reason"]


def test_overlaps_can_be_reported_only_or_not_looked_for(tmp_path):
    train = ["Short one?", f"Listen. {TEST} How many eggs?"]
    left_in = prepared(tmp_path, train, [TEST], overlap="report")
    assert left_in.tables["train"].num_rows == 2 and len(left_in.overlaps) == 1 and left_in.removed == []
    assert prepared(tmp_path, train, [TEST], overlap_words=0).overlaps == []


def test_nothing_left_to_train_on_is_named(tmp_path):
    with pytest.raises(UserError, match="data.train: every training question shares 13 words in a row with a test question"):
        prepared(tmp_path, [f"Listen. {TEST}"], [TEST])


@pytest.mark.parametrize(
    ("first", "second", "same"),
    [
        ("What is the sum of 2 and 3?", "what is sum of 2 and 3", True),
        ("Compute $y = x + a$.", "Compute $y=x+a$", True),
        ("1,000 or 1000?", "1000 or 1000?", False),
        ("2 - 3", "2 + 3", False),
        ("2 * (3 + 4)", "2 * 3 + 4", False),
        ("3.5 apples", "35 apples", False),
        ("5!", "5", False),
        ("Is A taller than B?", "Is B taller than A?", False),
    ],
)
def test_near_copies_differ_in_wording_marks_only(first, second, same):
    assert (hygiene.near_key(first, None) == hygiene.near_key(second, None)) is same


def test_options_in_another_order_are_the_same_question_and_their_texts_are_compared():
    rows = [
        {"question": "q", "choices": ["x", "y"], "choice_labels": ["A", "B"], "answer": "A"},
        {"question": "Q ", "choices": ["y", "x"], "choice_labels": ["A", "B"], "answer": "B"},
    ]
    (group,) = hygiene.by_question(pa.Table.from_pylist(rows), "answer", near=False).values()
    assert group == [("x", 2), ("x", 2)]


def test_a_row_without_a_label_says_nothing():
    rows = [{"question": "q", "choices": None, "choice_labels": None, "label": label} for label in ("1", None, "1")]
    assert hygiene.by_question(pa.Table.from_pylist(rows), "label", near=True) == {"q": [("1", 0), ("1", 0)]}


def test_disagreement_by_hand():
    groups = {"a": [("1", 0), ("1", 0)], "b": [("1", 0), ("2", 0)], "c": [("5", 0)], "d": [("1", 0), ("1", 0), ("2", 0)]}
    found = hygiene.disagreement(groups)
    differ = (0 + 1 + 2 / 3) / 3
    assert found["questions"] == 3 and found["rows"] == 7 and found["disagreement"] == pytest.approx(differ)
    assert found["estimate"] == pytest.approx(1 - math.sqrt(1 - differ))
    assert hygiene.disagreement({"c": [("5", 0)]}) is None


def test_the_interval_is_wilsons():
    found = hygiene.disagreement({str(n): [("1", 0), ("1" if n else "2", 0)] for n in range(10)})
    low, high = 0.0178763, 0.4041500  # 1 of 10: SciPy's binomtest(1, 10).proportion_ci(method="wilson")
    assert found["low"] == pytest.approx(1 - math.sqrt(1 - low), abs=1e-5)
    assert found["high"] == pytest.approx(1 - math.sqrt(1 - high), abs=1e-5)


@pytest.mark.parametrize(("rate", "options"), [(0.2, 0), (0.3, 4), (0.5, 10), (0.0, 4)])
def test_the_rate_of_independent_errors_is_recovered(rate, options):
    draw = random.Random(1)

    def label():
        if draw.random() >= rate:
            return "0"
        return str(draw.randrange(1, options)) if options else str(draw.random())

    runs = [hygiene.disagreement({str(n): [(label(), options), (label(), options)] for n in range(400)}) for _ in range(40)]
    assert np.mean([run["estimate"] for run in runs]) == pytest.approx(rate, abs=0.015)
    assert sum(run["low"] <= rate + 1e-9 and rate <= run["high"] for run in runs) >= 34  # 38 expected; 33 or fewer: 1 time in 700


def test_labels_that_never_agree_are_no_better_than_a_guess():
    found = hygiene.disagreement({str(n): [("a", 4), ("b", 4)] for n in range(50)})
    assert found["estimate"] == pytest.approx(3 / 4)


def test_votes_are_read_where_there_are_any():
    columns = {"question": ["a", "b", "c"], "choices": [None] * 3, "choice_labels": [None] * 3, "label": ["1", "2", "3"]}
    shares = pa.array([1.0, 0.5, None], pa.float64())
    (found,) = hygiene.noise_estimates(pa.table({**columns, "vote_share": shares}), "label", 1)
    assert (found["name"], found["rows"], found["estimate"]) == ("votes", 2, 0.25)
    assert hygiene.noise_estimates(pa.table(columns), "label", 1) == []


def test_a_long_text_costs_its_length():
    words = [f"w{n}" for n in np.random.default_rng(1).integers(0, 50_000, 200_000)]
    found = hygiene.overlaps([" ".join(words)], [" ".join(words[1000:1013]), "x " * 12], 13, 10)
    assert [(o.train_row, o.test_row) for o in found] == [(0, 0)]
