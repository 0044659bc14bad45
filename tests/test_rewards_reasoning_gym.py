"""The reasoning_gym reward: families' own scorers, several right answers, wrong labels, and answers that are programs."""

import json

import pytest

from dfpo_core.config import RewardsConfig, SourceConfig
from dfpo_core.errors import UserError
from dfpo_core.rewards import pool, score

PATIENT = RewardsConfig(time_limit_seconds=10)  # a right answer must not score 0 because the machine is busy

pytest.importorskip("reasoning_gym")

# Of every kind: one answer, many answers, scorers that raise, evaluate, load files, compare tuples, or like nonsense.
FAMILIES = (
    "chain_sum", "countdown", "puzzle24", "n_queens", "spiral_matrix", "binary_matrix", "string_insertion", "prime_factorization",
    "rearc", "game_of_life_halting", "polynomial_multiplication", "simple_integration",
    "game_of_life", "group_anagrams",
)  # fmt: skip


@pytest.fixture(scope="module")
def rows():
    from dfpo_core.data.sources import read_source

    tables = [
        read_source(SourceConfig(kind="reasoning_gym", name=name, size=3, reward="reasoning_gym"), 1, "data.train.0") for name in FAMILIES
    ]
    return [row for source in tables for row in source.table.to_pylist()]


def row(family, question, answer, metadata, **columns):
    metadata = {"source_dataset": family, "source_options": {}, **metadata}
    return {"row_id": "g/1", "question": question, "answer": answer, "reward": "reasoning_gym", "metadata": json.dumps(metadata), **columns}


@pytest.mark.parametrize(
    "form", ["{}", "  {}\n", "I think so.\n<answer>{}</answer>", "<answer>nothing</answer> No: <answer>\n{}\n</answer> Done."]
)
def test_every_familys_own_answer_is_right(rows, form):
    assert score(rows, [form.format(row["answer"]) for row in rows], limits=PATIENT) == [1.0] * len(rows)


@pytest.mark.parametrize(
    "answer",
    ["", "nonsense", "[[1, 2]]", "None", "{}", "9**9**9**9", "0", "()", "__import__('os').system('touch FILE')", "open('FILE', 'w')",
     "[c for c in ().__class__.__base__.__subclasses__()]", "exit(0)", "\u0664\u0662", "1" * 30_000, "(" * 5000],
)  # fmt: skip
def test_garbage_and_programs_are_wrong_and_do_nothing(rows, answer, tmp_path):
    file = tmp_path / "written"
    answer = answer.replace("FILE", str(file))
    usual = [row for row in rows if row["answer"] != answer]
    limits = PATIENT
    if "**" in answer:  # families that compute it run into the limit: one row of each, for the sake of time
        usual = list({json.loads(row["metadata"])["source_dataset"]: row for row in usual}.values())
        limits = RewardsConfig(time_limit_seconds=2)
    assert score(usual, [answer] * len(usual), limits=limits) == [0.0] * len(usual)
    assert not file.exists()


def test_another_right_answer_is_right_and_a_partly_right_one_is_not():
    """4, 6 and 10 make 20 in two ways; 19 is close, which the family's scorer gives a part of the credit for."""
    countdown = row("countdown", "Make 20 of 4, 6, 10.", "4 + 6 + 10", {"numbers": [4, 6, 10], "target": 20, "expression": "4 + 6 + 10"})
    answers = ["10 + 6 + 4", "\\boxed{6 + 10 + 4}", "4 + 6 + 9", "10 + 10", "20"]
    assert score([countdown] * 5, answers, limits=PATIENT) == [1.0, 1.0, 0.0, 0.0, 0.0]


def test_a_scorer_that_likes_nonsense_decides_nothing():
    """game_of_life_halting gives 1 to anything but the word True where the answer is False."""
    halting = row("game_of_life_halting", "Does it halt?", "False", {})
    assert score([halting] * 3, ["purple", "False", "True"], limits=PATIENT) == [0.0, 1.0, 0.0]


def test_in_training_a_wrong_label_is_what_counts():
    sums = row("chain_sum", "1+1", "2", {}, label="3")
    assert score([sums] * 2, ["3", "2"], "label", limits=PATIENT) == [1.0, 0.0]
    assert score([sums] * 2, ["3", "2"], "answer", limits=PATIENT) == [0.0, 1.0]


def test_a_scorer_that_raises_is_counted():
    pool.take_failures()
    primes = row("prime_factorization", "Factor 6.", "2 × 3", {"number": 6, "factors": [2, 3]})
    assert score([primes] * 2, ["3 × 2", "purple"], limits=PATIENT) == [1.0, 0.0]
    assert pool.take_failures() == {"raised": 1}


@pytest.mark.parametrize("metadata", [None, "", "[]", "{}", "not json"])
def test_a_row_without_metadata_is_named(metadata):
    with pytest.raises(UserError, match="reward: row 'g/1' has no metadata that names its family; use it with a reasoning_gym source"):
        score([row("chain_sum", "1+1", "2", {}) | {"metadata": metadata}], ["x"])
