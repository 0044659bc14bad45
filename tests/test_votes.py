"""Labels by vote: tallies by hand, ties, a real model asked once, adversarial labels, refusals."""

import json

import pyarrow as pa
import pytest

from dfpo_core import comparison, votes
from dfpo_core.config import NoiseConfig, parse_config
from dfpo_core.errors import UserError
from dfpo_core.noise import add_label_noise, measure, noisy_table
from dfpo_core.preflight import check

OPTIONS = {"choices": ["days", "weeks", "years"], "choice_labels": ["A", "B", "C"]}


def row(answer, reward, row_id="d/1", **more):
    return {"row_id": row_id, "question": "?", "answer": answer, "reward": reward, "domain": "d", **dict.fromkeys(OPTIONS), **more}


def table(rows):
    lists = pa.list_(pa.string())
    kinds = {name: lists if name in OPTIONS else pa.string() for name in rows[0]}
    return pa.table({name: pa.array([r[name] for r in rows], kind) for name, kind in kinds.items()})


def labelled(rows, responses, **options):
    return add_label_noise(table(rows), NoiseConfig(**options), 1, responses)


@pytest.mark.parametrize(
    ("given", "responses", "expected"),
    [
        (row("42", "number"), ["It is 42.", "42.0", "#### 41", "17+25", "none"], [("42", 2), ("41", 1)]),
        (row("B", "choice", **OPTIONS), ["(B)", "weeks", "The answer is C", "D"], [("B", 2), ("C", 1)]),
        (row("Rome", "exact"), ["rome.", "Rome", "Rome", " ", "Paris"], [("Rome", 3), ("Paris", 1)]),
        (
            row("1/2", "math"),
            [r"\boxed{\frac{1}{2}}", r"$\frac12$", "0.5", r"\boxed{x^2}", r"\boxed{ x^{2} }"],
            [(r"\frac{1}{2}", 3), ("x^2", 2)],
        ),
    ],
)
def test_responses_vote_for_what_the_reward_takes_for_the_same(given, responses, expected):
    found = votes.tally(given, responses)
    assert [count for _, count in found] == [count for _, count in expected]
    if given["reward"] != "math":  # of a formula's spellings any is right
        assert found == expected


def test_a_tie_goes_by_the_row_and_not_by_the_order_of_the_responses():
    winners = set()
    for index in range(40):
        given = row("1", "number", row_id=f"d/{index}")
        first = votes.tally(given, ["3", "5"])[0][0]
        assert votes.tally(given, ["5", "3"])[0][0] == first
        winners.add(first)
    assert winners == {"3", "5"}


def test_the_majority_is_the_label_and_what_it_gets_wrong_is_recorded():
    rows = [row("4", "number", "d/1"), row("4", "number", "d/2"), row("4", "number", "d/3")]
    result = labelled(rows, [["4", "4", "5", "x"], ["7", "7", "7", "4"], ["?", "", "-", "no"]], kind="majority_vote")
    assert result["label"].to_pylist() == ["4", "7", None]
    assert result["vote_share"].to_pylist() == [0.5, 0.75, 0.0]
    assert result["is_noisy"].to_pylist() == [False, True, False]
    assert result["noise_kind"].to_pylist() == ["none", "majority_vote", "missing"]
    found = measure(result, NoiseConfig(kind="majority_vote"))
    assert "noise/rate_requested" not in found
    assert found["noise/rate_measured"] == pytest.approx(1 / 3) and found["noise/vote_share"] == pytest.approx(1.25 / 3)


def test_a_formula_in_another_spelling_is_no_wrong_label():
    rows = [row(r"x^2+1", "math", "d/1"), row(r"x^2+1", "math", "d/2")]
    result = labelled(rows, [[r"\boxed{1+x^{2}}"] * 2, [r"\boxed{x^3}"] * 2], kind="majority_vote")
    assert result["is_noisy"].to_pylist() == [False, True]


def test_the_adversarial_label_is_the_wrong_answer_given_most_often_or_a_plausible_one():
    rows = [row("4", "number", "d/1"), row("10", "number", "d/2"), row("B", "choice", "d/3", **OPTIONS)]
    responses = [["4", "9", "4", "9", "7"], ["10", "10", "x", "10", "10"], ["C", "B", "B", "C", "A"]]
    result = labelled(rows, responses, kind="adversarial", rate=1.0)
    assert result["label"].to_pylist()[0] == "9" and result["label"].to_pylist()[2] == "C"
    assert result["label"].to_pylist()[1] != "10" and result["is_noisy"].to_pylist() == [True] * 3
    assert result["noise_kind"].to_pylist() == ["adversarial", "plausible", "adversarial"]
    assert measure(result, NoiseConfig(kind="adversarial", rate=1.0))["noise/adversarial_fallback"] == pytest.approx(1 / 3)


def test_adversarial_rows_are_those_of_the_other_kinds():
    rows = [row(str(i), "number", f"d/{i}") for i in range(300)]
    responses = [[str(int(r["answer"]) + 1)] for r in rows]
    other = add_label_noise(table(rows), NoiseConfig(kind="plausible", rate=0.3), 1)
    assert labelled(rows, responses, kind="adversarial", rate=0.3)["is_noisy"].to_pylist() == other["is_noisy"].to_pylist()


def configuration(home, **noise):
    sums = {"kind": "chains", "name": "sums", "size": 40, "options": {"terms": 2, "digits": 1}}
    values = {"home": str(home), "model": "scratch:tiny", "data": {"train": [sums]}, "noise": noise, "train": {"max_new_tokens": 4}}
    return parse_config({"name": "votes", "seed": 1, **values})


def test_a_model_is_asked_once_and_answers_the_same_again(tmp_path):
    config = configuration(tmp_path, kind="majority_vote", voter={"samples": 3, "max_new_tokens": 2, "batch_size": 8})
    rows = [row(str(i), "number", f"d/{i}", question=f"{i}+1=") for i in range(20)]
    first = votes.sample(rows, config)
    assert [len(responses) for responses in first] == [3] * 20
    (kept,) = (tmp_path / "votes").iterdir()
    assert json.loads(kept.read_text()) == first
    kept.unlink()
    assert votes.sample(rows, config) == first
    kept.write_text(json.dumps([["7"] * 3] * 20))  # and this is read, not asked again
    assert noisy_table(table(rows), config)["label"].to_pylist() == ["7"] * 20
    other = configuration(tmp_path, kind="majority_vote", voter={"samples": 3, "max_new_tokens": 2, "batch_size": 8, "temperature": 0.5})
    assert votes.sample(rows, other) != first


def test_a_study_can_take_the_votes_of_its_warm_start(tmp_path):
    sums = {"kind": "chains", "name": "maxima", "size": 60, "options": {"terms": 2, "digits": 1}}
    train = {"steps": 1, "prompts_per_step": 4, "samples_per_prompt": 2, "max_new_tokens": 4, "save_every": 9}
    study = comparison.parse(
        {
            "seeds": [1],
            "base": {"home": str(tmp_path), "model": "scratch:tiny", "data": {"train": [sums], "id_test_size": 10}, "train": train},
            "warm_start": {"sft": {"steps": 60, "batch_size": 16, "micro_batch_size": 16, "learning_rate": 1e-3}},
            "settings": {"votes": {"noise": {"kind": "majority_vote", "voter": {"samples": 4, "max_new_tokens": 4}}}},
            "algorithms": {"grpo": {}},
            "reference": "grpo",
        }
    )
    record = comparison.run_cell(study, comparison.cells(study)[0], comparison.warm_start(study))
    assert 0 < record["noise_rate"] < 1
    assert len(list((tmp_path / "votes").iterdir())) == 1


def test_votes_have_no_rate_and_their_model_is_checked_before_anything_runs(tmp_path):
    with pytest.raises(UserError, match="majority_vote has no rate"):
        configuration(tmp_path, kind="majority_vote", rate=0.2)
    problems = check(configuration(tmp_path, kind="majority_vote", voter={"model": "scratch:huge"}))
    assert [problem.field for problem in problems] == ["noise.voter.model"]


def test_a_dialogue_has_no_label_to_vote_on():
    with pytest.raises(UserError, match="a dialogue has none"):
        labelled([row("a", "dialogue")], [["x"]], kind="majority_vote")
