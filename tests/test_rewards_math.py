"""The math reward: a corpus of answers made to fool, hang or crash it, MATH's own answers, and what decides them.

tests/data/adversarial_answers.jsonl holds, a line each, a reward, the wanted answer, a response, the score that it must get and why,
derived by hand. Most score 0; the ones that score 1 are odd but right, so that a reward cannot pass by refusing everything.
"""

import json
import os
import random
import time
from collections import Counter
from pathlib import Path

import pytest

from dfpo_core.config import RewardsConfig
from dfpo_core.rewards import latex, pool, score
from dfpo_core.rewards.math import decide, final_formula

CORPUS = [json.loads(line) for line in (Path(__file__).parent / "data" / "adversarial_answers.jsonl").read_text().splitlines()]
PIECES = [
    " ", "a", "9", "(", "{", "}", "\\", "$", "=", "+1", "x+", "^2", "\\frac{1}{2}", "\\boxed{", "\\boxed{1}", "answer is ",
    "The answer is 1. ", "#### ", "```", "``` ", "\n", "```\n\n", "\\[", "$1$", "\\text{a}", "9^{", "\\sqrt{", "<answer>", "**", "* ",
    "\\left(", "1,", "1/", "\u0661", "\u00b2", "\\begin{pmatrix}", "&\\\\", "\\{", "\\}", "</answer>", ", \\!", "\\mbox {",
]  # fmt: skip
OPTIONS = {"choices": ["a cat", "a dog", "a cow", "a hen"], "choice_labels": ["A", "B", "C", "D"]}


PATIENT = RewardsConfig(time_limit_seconds=10)  # a right answer must not score 0 because the machine is busy


def math(wanted, *responses, question=""):
    return score([{"reward": "math", "answer": wanted, "question": question}] * len(responses), list(responses), limits=PATIENT)


def boxed(text):
    return f"So the answer is $\\boxed{{{text}}}$."


def test_no_adversarial_answer_raises_or_gets_another_score_than_its_own():
    assert len(CORPUS) >= 700 and {case["reward"] for case in CORPUS} == {"math", "number", "choice", "exact"}
    for wanted, limits in ((0, RewardsConfig()), (1, PATIENT)):
        cases = [case for case in CORPUS if case["score"] == wanted]
        rows = [{"reward": case["reward"], "answer": case["wanted"], **OPTIONS} for case in cases]
        scores = score(rows, [case["response"] for case in cases], limits=limits)
        assert [case | {"got": got} for case, got in zip(cases, scores, strict=True) if got != wanted] == []


@pytest.mark.parametrize("kind", ["math", "number", "exact", "choice"])
def test_100_kb_of_anything_is_wrong_and_costs_less_than_a_second_each(kind):
    row = {"reward": kind, "answer": "x+y" if kind == "math" else "41", **OPTIONS}
    texts = [piece * (100_000 // len(piece)) for piece in PIECES]
    for text in [
        *texts,
        *(f"\\boxed{{{text}}}" for text in texts),
        *(f"The answer is {text}" for text in texts),
        *(f"```\n{text}" for text in texts),
    ]:
        started = time.process_time()
        assert score([row], [text]) == [0.0]
        assert time.process_time() - started < 1.0  # of this process: a worker is killed at 0.8 s


def test_a_long_way_to_a_clear_answer_counts():
    assert math("42", "Let me think. " * 7000 + boxed(42), "\\boxed{41} " * 9000 + "\\boxed{42}") == [1.0, 1.0]


@pytest.mark.parametrize(
    ("question", "wanted", "copied", "worked_out"),
    [
        ("Simplify $(x+1)^2 - x^2$.", "2x+1", "(x+1)^2 - x^2", "1+2x"),
        ("Factor $x^2 - 5x$.", "x(x-5)", "x^2-5x", "(x-5)x"),
        ("Compute $\\sqrt{12}$.", "2\\sqrt{3}", "\\sqrt{12}", "2 \\cdot \\sqrt 3"),
        ("Simplify $\\frac{2}{6}$.", "\\frac{1}{3}", "\\frac{2}{6}", "1/3"),
        ("What is 84/2?", "42", "84/2", "42"),
    ],
)
def test_a_formula_copied_from_the_question_earns_nothing(question, wanted, copied, worked_out):
    assert math(wanted, boxed(copied), boxed(worked_out), question=question) == [0.0, 1.0]


def test_plain_values_never_reach_math_verify():
    """Everything about a wanted plain value is decided here, at once; a formula with the same value elsewhere is."""
    for response in ("17+25", "\\sqrt{1764}", "9^{9^{9^9}}", "42", "\\frac{84}{2}", "x^2"):
        assert decide("42", boxed(response)) in (0.0, 1.0)
    assert decide("\\frac{\\sqrt{3}}{3}", boxed("\\frac{1}{\\sqrt{3}}")) == ("\\frac{\\sqrt{3}}{3}", "\\frac{1}{\\sqrt{3}}")


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1{,}234.50", "1234.5"), ("-\\frac{3}{4}", "-0.75"), ("\\frac 59", "5/9"), ("\\frac{270}7\\text{ degrees}", "270/7"),
        ("1\\frac{4}{5}", "1.8"),
        ("\\$32,\\!348", "32348"), ("11,\\! 111,\\! 111,\\! 100", "11111111100"), ("864 \\mbox{ inches}^2", "864"), ("90^\\circ", "90"),
        ("178\\%", "178"), ("x=5", "5"), ("30^\\circ.", "30"), (".5", "0.5"), ("-\\frac{-1}{-2}", "-0.5"), ("17 + 25 = 42", "42"),
        ("17+25", None), ("4 2", None), ("1, 2", None), ("60^\\circ, 120^\\circ", None), ("2\\pi", None), ("1/0", None),
        ("x - 1 = 0", None),
        ("a = 1, b = 2", None), ("12\\text{ cm}^2 + 1", None), ("5\\text{ or }6", None), ("3 thousand", None), ("", None), ("-", None),
    ],
)  # fmt: skip
def test_plain_values_are_read_from_latex(text, value):
    plain = latex.plain(latex.tidy(text))
    assert (plain and plain.value) == value


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("\\sqrt{3}", "\\sqrt{5}"),
        ("2x+1", "2x-1"),
        ("(1,2)", "(1,3)"),
        ("y = 2x", "3x"),
        ("(0,1) \\cup (2,3)", "7"),
        ("x^2", "x^3"),
        ("x", "X"),
    ],
)
def test_formulas_with_other_values_are_told_apart_without_math_verify(first, second):
    assert latex.different(first, second)


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("\\frac{\\sqrt{3}}{3}", "\\frac{1}{\\sqrt{3}}"), ("(x+1)^2", "x^2+2x+1"), ("\\frac12 a b", "\\frac{ab}{2}"), ("2^{10}", "1024"),
        ("\\sqrt[3]{8}x", "2x"), ("x^{-1}", "\\frac{1}{x}"), ("1,2", "2,1"), ("-x^2", "-(x^2)"), ("\\sin x", "y"), ("9^{9^{9}}", "1"),
        ("(-8)^{\\frac13}", "-2"), ("\\frac{1}{0}", "3"), ("i^2", "-1"), ("1\\frac12 x", "1.5x"), ("y = 2x", "y - 2x = 0"),
    ],
)  # fmt: skip
def test_equal_formulas_are_never_told_apart_and_neither_is_what_the_small_grammar_cannot_read(first, second):
    assert not latex.different(first, second) and not latex.different(second, first)


@pytest.mark.parametrize(
    ("response", "formula"),
    [
        ("so $x = 5$.", "x = 5"), ("It is $$\\frac12$$", "\\frac12"),
        ("The answer is\n\\[\n\\frac12\n\\]\nas wanted.", "\\[\n\\frac12\n\\]"),
        ("\\boxed{\\left\\{ 1, 2 \\right\\}}", "\\left\\{ 1, 2 \\right\\}"), ("\\boxed{a}\\boxed{b} \\text{c}", "b"),
        ("\\boxed{a", ""), ("", ""),
    ],
)  # fmt: skip
def test_the_final_formula_is_found(response, formula):
    assert final_formula(response) == formula


@pytest.mark.parametrize(
    ("wanted", "given"),
    [
        ("\\left( 3, \\frac{\\pi}{2} \\right)", "(r, \\theta) = (3, \\pi/2)"),
        ("6,8,10", "6, 8, and 10"),
        ("6,8,10", "6, 10 \\text{ and } 8"),
        ("2\\sqrt{3}", "x = 2√3 \\text{ cm}"),
        ("6+9i", "z = 9i + 6"),
        ("\\frac{\\pi}{6}", "π/6"),
        ("3 \\times 10^8", "300000000"),
        ("2^{10}", "1024"),
        ("\\begin{pmatrix} 1/5 \\\\ 2 \\end{pmatrix}", "\\begin{bmatrix} \\frac15 \\\\ 2 \\end{bmatrix}"),
        ("1 \\pm \\sqrt{19}", "1-\\sqrt{19}, 1+\\sqrt{19}"),
        ("3 \\sec \\frac{1}{2} \\theta", "3\\sec(\\theta/2)"),
        ("15x - 80", "5(3x-16)"),
        ("(-\\infty, 2) \\cup (3, \\infty)", "(-∞,2) ∪ (3,∞)"),
    ],
)
def test_right_answers_in_other_spellings_count(wanted, given):
    assert math(wanted, boxed(given)) == [1.0]


def test_the_label_that_training_sees_is_scored_on_request():
    row = {"reward": "math", "answer": "\\sqrt{2}", "label": "\\sqrt{3}"}
    assert score([row] * 2, ["\\boxed{\\sqrt 2}", "\\boxed{\\sqrt 3}"], "label", PATIENT) == [0.0, 1.0]


def test_every_response_is_scored_alone():
    """In a batch with others, in any order and beside bombs, a response has the reward that it has by itself."""
    responses = [
        boxed(text) for text in ("\\frac{1}{\\sqrt{3}}", "9^{9^{9^9}}", "\\sqrt{3}/3", "x", "2", "(x+1)^{99999}", "\\frac{\\sqrt 3}{3}")
    ]
    expected = [1.0, 0.0, 1.0, 0.0, 0.0, 0.0, 1.0]
    order = [5, 3, 1, 0, 6, 2, 4]
    assert math("\\frac{\\sqrt{3}}{3}", *(responses[i] for i in order)) == [expected[i] for i in order]
    assert [math("\\frac{\\sqrt{3}}{3}", response)[0] for response in responses] == expected


REAL = pytest.mark.skipif("DFPO_DATA_DIR" not in os.environ, reason="DFPO_DATA_DIR names no folder with the real data files")


def real_rows(limit=None):
    folder = Path(os.environ["DFPO_DATA_DIR"])
    lines = [line for name in ("math500.jsonl", "math_train.jsonl") for line in (folder / name).read_text("utf-8").split("\n") if line]
    return [json.loads(line) | {"reward": "math"} for line in lines[:limit]]


@REAL
def test_every_answer_of_math_is_right_for_its_own_question():
    rows = real_rows()
    scores = score(rows, [boxed(row["answer"]) for row in rows], limits=PATIENT)
    wrong = [row["answer"] for row, got in zip(rows, scores, strict=True) if got != 1.0]
    assert len(rows) == 7970 and wrong == []


@REAL
def test_math_verify_agrees_that_the_answers_of_math_are_equal_to_themselves():
    """Without the shortcut for equal spellings."""
    formulas = sorted({latex.without_units(latex.tidy(row["answer"])) for row in real_rows(900)})
    formulas = [formula for formula in formulas if formula and latex.plain(formula) is None and "\\text" not in formula]
    values = pool.check_all("dfpo_core.rewards.symbolic:equal", [[formula, formula] for formula in formulas], PATIENT)
    assert len(formulas) > 120
    assert [formula for formula, value in zip(formulas, values, strict=True) if not value] == []


@REAL
def test_another_questions_answer_is_wrong_unless_it_is_the_same_value():
    rows = real_rows(3000)
    others = random.Random(0).sample(rows, len(rows))
    scores = score(rows, [boxed(other["answer"]) for other in others])
    same = [(row["answer"], other["answer"]) for row, other, got in zip(rows, others, scores, strict=True) if got]
    spelled = [pair for pair in same if latex.spelling(latex.tidy(pair[0])) != latex.spelling(latex.tidy(pair[1]))]
    # Answers repeat: two random ones agree with the chance sum_a p_a^2, here about 0.9 %.
    chance = sum((count / len(rows)) ** 2 for count in Counter(row["answer"] for row in rows).values())
    assert chance < 0.02 and len(same) / len(rows) < chance + 0.01
    assert all(latex.plain(latex.tidy(one)).value == latex.plain(latex.tidy(other)).value for one, other in spelled)


@pytest.mark.parametrize(
    ("wanted", "given", "expected"),
    [
        (r"[1,3)", r"1 \le x < 3", 1),
        (r"[1,3)", r"3 > x \geq 1", 1),
        (r"[1,3)", r"1 < x < 3", 0),
        (r"[1,3)", r"1 \le x", 0),
        (r"(-\infty,2]", r"x \le 2", 1),
        (r"(-\infty,2]", r"x \lt 2", 0),
        (r"(2,\infty)", r"x > 2", 1),
        (r"(2,\infty)", r"2 < y", 1),
        (r"(2,\infty)", r"x > 3", 0),
        (r"(1,3)", r"1 < x < 3", 0),  # it may be a point
        (r"\ln 2", r"\log 2", 1),
        (r"2\ln 3", r"2\log(3)", 1),
        (r"\ln 2", r"\log_{10} 2", 0),
        (r"\ln 2", r"\log 3", 0),
        (r"\log_2 3", r"\log 3", 0),
        ("3000000", r"3 \times 10^6", 1),
        ("3000000", r"3\cdot 10^{6}", 1),
        ("-3200", "-3.2e3", 1),
        ("0.000032", r"3.2\times10^{-5}", 1),
        (r"6.02 \times 10^{23}", "6.02e23", 1),
        ("3000000", r"3 \times 10^5", 0),
        ("3000000", r"30 \times 10^5", 0),  # not normalised: a calculation
        ("42", r"4.2 \times 10^1", 0),
        ("1000", "10^3", 0),
        ("0", r"0 \times 10^5", 0),
        ("(2,5)", r"\{2,5\}", 0),  # a set has no order
        (r"\{2,5\}", "(2,5)", 0),
        (r"\{2,5\}", r"\{5,2\}", 1),
        (r"\{2,5\}", "5,2", 1),
    ],
)
def test_right_notations_that_are_not_the_wanted_one(wanted, given, expected):
    assert score([{"reward": "math", "answer": wanted, "question": "q"}], [f"\\boxed{{{given}}}"]) == [expected]
