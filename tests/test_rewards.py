"""The final answer of a response, by kind. Every expected value is written down by hand."""

import time
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dfpo_core.errors import UserError
from dfpo_core.rewards import canonical_number, extract_choice, extract_number, normalise_text, score


def number(truth, response, against="answer"):
    return score([{"reward": "number", "answer": truth, "label": "-1"}], [response], against)[0]


def choice(truth, response, choices=("a cat", "a dog", "a cow", "a hen"), labels=("A", "B", "C", "D")):
    row = {"reward": "choice", "answer": truth, "choices": list(choices), "choice_labels": list(labels)}
    return score([row], [response])[0]


@pytest.mark.parametrize(
    "response",
    [
        "42", " 42.", "42.0", "+42", "042", "$42", "42%", "(42)", "**42**", "The answer is 42", "The answer is 42 apples.",
        "\\boxed{42}", "The answer is $\\boxed{42}$.", "Answer: 42", "Answer:\n\n42", "#### 42", "17 + 25 = 42", "x = 42.",
        "42, I repeat, 42", "It was 17 and is 25. The answer is 42. I used 2 steps.", "\\boxed{17} no, \\boxed{42}",
        "\u0664\u0662", "\uff14\uff12", "\\boxed{42 \\text{ dollars}}",
    ],
)  # fmt: skip
def test_a_plainly_stated_number_counts(response):
    assert number("42", response) == 1.0


@pytest.mark.parametrize(
    "response",
    [
        "", "...", "forty-two", "17+25", "17 + 25", "The answer is 17+25", "\\boxed{17+25}", "42 + 0", "42*1", "6 x7", "4²", "42e0",
        "41 42 43", "41 or 42", "The answer is 41 or 42", "The answer is 42. The answer is 41.", "\\boxed{42} \\boxed{41}",
        "42 = 17 + 25", "84/2 of it", "sqrt(42)", "x42", "42nd", "2026-01-42", "4 2", "- 42", "-42", "0.42", "½ 42", "1,42",
        " ".join(str(guess) for guess in range(100)),
    ],
)  # fmt: skip
def test_expressions_lists_and_other_values_count_nothing(response):
    assert number("42", response) == 0.0


def test_doubling_a_term_is_an_expression_even_when_both_terms_are_the_truth():
    assert number("7", "7 * 7") == number("7", "7*7") == number("7", "(7)(7)") == 0.0


def test_spellings_of_one_value_are_equal():
    assert number("3.5", "3.50") == number("3.5", "7/2") == number("1234", "1,234") == number("0.5", ".5") == 1.0
    assert number("-4", "-4") == number("-4", "\u22124") == number("1/3", "2/6") == number("0", "-0") == 1.0
    assert number("1234", "\\boxed{1{,}234}") == 1.0


def test_a_fraction_counts_only_as_the_whole_answer():
    assert number("0.5", "1/2") == number("0.5", "The answer is 1/2.") == number("0.5", "\\boxed{1/2}") == 1.0
    assert number("0.5", "I took 1/2 of it") == number("0.5", "1/2 or 0.5") == 0.0


def test_the_label_that_training_sees_is_scored_on_request():
    assert number("42", "-1", against="label") == 1.0
    assert number("42", "42", against="label") == 0.0


def test_integers_of_any_length_compare_exactly():
    huge = "9" * 4999
    assert number(huge, f"The answer is {huge}") == 1.0
    assert number(huge, "9" * 4998 + "8") == 0.0


@given(st.fractions())
def test_every_decimal_fraction_has_one_canonical_spelling_with_its_own_value(value):
    text = canonical_number(f"{value.numerator}/{value.denominator}")
    assert Fraction(text) == value
    assert canonical_number(text) == text
    denominator = value.denominator
    for prime in (2, 5):
        while denominator % prime == 0:
            denominator //= prime
    assert ("/" in text) == (denominator != 1)


@given(st.integers(), st.integers(0, 6))
def test_padding_and_thousands_commas_change_no_value(value, zeros):
    assert canonical_number(f"{value:,}.{'0' * zeros}" if zeros else f"{value:,}") == str(value)


def test_no_number_is_made_of_other_things():
    assert [canonical_number(text) for text in ("", "-", ".", "1.", "1,2", "1e5", "0x10", "1/0", "nan", "4 2", "9" * 5001)] == [None] * 11


@given(st.text())
def test_no_response_raises(response):
    extract_number(response)
    extract_choice(response, ["A", "B"], ["x", "y"])
    assert score([{"reward": "exact", "answer": "a"}], [response])[0] in (0.0, 1.0)


@pytest.mark.parametrize(
    "piece", ["9", "1 ", "1 2 ", " ", "=", "*a", "** a", "1,", "1/", "\\boxed{", "{", "answer is ", "answer    ", "٤", "a", ".", "\n"]
)
def test_a_response_of_100_kb_costs_less_than_a_second(piece):
    response = piece * (100_000 // len(piece))
    started = time.process_time()
    extract_number(response)
    extract_choice(response, ["A", "B", "C", "D"], ["a", "b", "c", "d"])
    assert time.process_time() - started < 1.0


@pytest.mark.parametrize(
    "response",
    ["C", " c ", "(C)", "C.", "C) a cow", "C. A cow gives milk", "**C**", "The answer is C.", "Answer: C", "answer: (c)", "\\boxed{C}",
     "\\boxed{\\text{C}}", "I think it is C because of milk", "a cow", "A Cow.", "Not B. The answer is C"],
)  # fmt: skip
def test_a_label_or_the_text_of_its_option_counts(response):
    assert choice("C", response) == 1.0


@pytest.mark.parametrize(
    "response", ["", "B", "B or C", "A B C D", "A. B. C. D.", "cow", "cab", "E", "\\boxed{B} C", "The answer is C or D"]
)
def test_several_labels_or_a_wrong_one_count_nothing(response):
    assert choice("C", response) == 0.0


def test_numeric_labels_and_options_do_not_mix():
    assert choice("2", "2", choices=("5", "6", "7"), labels=("1", "2", "3")) == 1.0
    assert choice("B", "6", choices=("5", "6", "7"), labels=("A", "B", "C")) == 1.0


def test_exact_answers_ignore_case_spaces_and_a_closing_full_stop():
    row = {"reward": "exact", "answer": "Reyornac x"}
    assert score([row] * 4, ["reyornac  x", " Reyornac x.\n", "reyornac", "reyornac x y"]) == [1.0, 1.0, 0.0, 0.0]
    assert normalise_text("\uff21  b.") == "a b"


def test_an_unknown_kind_is_named():
    with pytest.raises(
        UserError, match="reward: row 'r1' has the unknown kind 'regex'; use number, choice, exact, math, reasoning_gym or dialogue"
    ):
        score([{"reward": "regex", "row_id": "r1", "answer": "1"}], ["1"])
