"""How right a response is: 1.0 or 0.0 against the truth (`answer`) or against what training sees (`label`).

A response earns nothing by hedging. It has one final answer, found by the same rule for every kind of question:

* Marks are `\\boxed{...}`, `#### ...`, `answer is ...`, `answer: ...` and, for numbers, `= ...` up to the end of the text.
  The last mark decides; what stands in front of it is working-out.
* Without a mark the whole response is the answer.

number: the final answer must hold one plain number, however often. A second, different number, an arithmetic operator or a word
    that mixes digits with anything else (`17+25`, `4²`, `1e3`) makes it worthless: evaluating it is the model's job, not ours.
    A fraction counts only when it is all of the final answer. Equal values are equal: 3.50 is 3.5, 1,234 is 1234, 1/2 is 0.5.
choice: the final answer starts with a label (`C`, `(C)`, `C. days`), or is the text of one option, or names exactly one label.
exact: the response is the answer, compared in Unicode form NFKC without case, surplus spaces and a closing full stop.
"""

from __future__ import annotations

import re
import unicodedata
from fractions import Fraction
from typing import Any

from dfpo_core.errors import UserError

_NUMBER = re.compile(r"([-+]?)(\d{1,3}(?:,\d{3})+|\d*)(?:\.(\d+))?")
_FRACTION = re.compile(r"[-+]?\d{1,100}/\d{1,100}")
_MARK = re.compile(r"answer(?:\s+is\b|\s*[:=])\s*[:=]?|####|\\boxed\{", re.IGNORECASE)
_SENTENCE_END = re.compile(r"[.!?](?=\s)|\n")
_EMPHASIS = re.compile(r"\*\*([^*\n]+)\*\*")
_ENCLOSING = "\"'`“”‘’()[]{}<>$€£%.,:;!?*_\\%"
_OPERATORS = set("+-*/^=<>×÷·±~%")
_LONGEST_NUMBER = 5000  # characters of one word; also keeps a 100 kB digit string cheap


def score(rows: list[dict[str, Any]], responses: list[str], against: str = "answer") -> list[float]:
    """One 0/1 reward a response.

    Args:
        rows: data rows with `reward` (number, choice or exact), the column named by `against`, and for choices `choices`
            and `choice_labels`; as many as responses.
        against: `answer` (the truth) or `label` (what training sees).

    Raises:
        UserError: a row whose `reward` is none of the three kinds.
    """
    return [_score_one(row, response, row[against]) for row, response in zip(rows, responses, strict=True)]


def _score_one(row: dict[str, Any], response: str, wanted: str) -> float:
    kind = row["reward"]
    if kind == "number":
        given = extract_number(response)
        return float(given is not None and given == canonical_number(wanted))
    if kind == "choice":
        given = extract_choice(response, row["choice_labels"], row["choices"])
        return float(given is not None and given == wanted)
    if kind == "exact":
        return float(normalise_text(response) == normalise_text(wanted))
    raise UserError("reward", f"row {row.get('row_id')!r} has the unknown kind {kind!r}", "use number, choice or exact")


def canonical_number(text: str) -> str | None:
    """The one spelling of a plain number (`-1234.5`, `1/3` in lowest terms), or None if `text` is no plain number.

    Works on digits, not values, so integers of any length cost linear time and decimals lose nothing.
    """
    text = text.strip()
    if len(text) > _LONGEST_NUMBER:
        return None
    text = _ascii_digits(text)
    if _FRACTION.fullmatch(text):
        return _canonical_fraction(text)
    match = _NUMBER.fullmatch(text)
    if not match or not (match[2] or match[3]):
        return None
    whole = match[2].replace(",", "").lstrip("0") or "0"
    decimals = (match[3] or "").rstrip("0")
    digits = f"{whole}.{decimals}" if decimals else whole
    return f"-{digits}" if match[1] == "-" and digits != "0" else digits


def _canonical_fraction(text: str) -> str | None:
    numerator, denominator = (int(part) for part in text.split("/"))
    if denominator == 0:
        return None
    value = Fraction(numerator, denominator)
    places = _decimal_places(value.denominator)
    if places is None:
        return str(value)
    scaled = str(abs(value.numerator) * 10**places // value.denominator).rjust(places + 1, "0")
    sign = "-" if value < 0 else ""
    return f"{sign}{scaled[:-places]}.{scaled[-places:]}" if places else f"{sign}{scaled}"


def _decimal_places(denominator: int) -> int | None:
    """Decimals that write a reduced fraction exactly; None when no finite number does."""
    counts = []
    for prime in (2, 5):
        count = 0
        while denominator % prime == 0:
            denominator //= prime
            count += 1
        counts.append(count)
    return max(counts) if denominator == 1 else None


def normalise_text(text: str) -> str:
    """NFKC, lower case, single spaces, no closing full stop."""
    return " ".join(unicodedata.normalize("NFKC", text).lower().split()).removesuffix(".").rstrip()


def extract_number(response: str) -> str | None:
    """The canonical final number of a response, or None. Never raises; linear in the length."""
    text = _without_markup(_ascii_digits(response))
    mark_end, answer = _after_last_mark(text)
    equals = text.rfind("=")
    return _only_number(text[equals + 1 :] if equals >= mark_end else answer)


def extract_choice(response: str, labels: list[str], choices: list[str]) -> str | None:
    """The label that a response settles on, or None. Never raises; linear in the length."""
    answer = _after_last_mark(_without_markup(response))[1].strip()
    by_name = {label.lower(): label for label in labels}
    start = re.match(r"\(?\s*(\w{1,8})\s*(?:[).:]|$)", answer)
    if start and start[1].lower() in by_name:
        return by_name[start[1].lower()]
    whole = normalise_text(answer)
    same_text = [label for label, choice in zip(labels, choices, strict=True) if normalise_text(choice) == whole]
    if len(same_text) == 1:
        return same_text[0]
    named = {word.strip(_ENCLOSING) for word in answer.split()} & set(labels)
    return named.pop() if len(named) == 1 else None


def _without_markup(text: str) -> str:
    """Drop what only sets type: **bold**, \\text{...} and LaTeX's {,} between thousands."""
    return _EMPHASIS.sub(r" \1 ", text.replace("\\text{", "{").replace("{,}", ","))


def _after_last_mark(text: str) -> tuple[int, str]:
    """Where the last mark ends, and the braces' content or the sentence behind it. Without a mark: 0 and all of the text."""
    marks = list(_MARK.finditer(text))
    if not marks:
        return 0, text
    last = marks[-1]
    rest = text[last.end() :]
    if last[0].startswith("\\"):
        return last.end(), _inside_braces(rest)
    rest = rest.lstrip()
    end = _SENTENCE_END.search(rest)
    return last.end(), rest[: end.start()] if end else rest


def _inside_braces(text: str) -> str:
    """Up to the brace that closes one opened just before `text`; all of it when none does."""
    depth = 1
    for match in re.finditer(r"[{}]", text):
        depth += 1 if match[0] == "{" else -1
        if depth == 0:
            return text[: match.start()]
    return text


def _only_number(text: str) -> str | None:
    """The canonical value of the one plain number in `text`; None when it has none, two, or anything that is not plain."""
    whole = text.strip().strip(_ENCLOSING)
    if _FRACTION.fullmatch(whole):
        return canonical_number(whole)
    value = None
    for word in dict.fromkeys(text.split()):
        bare = word.strip(_ENCLOSING)
        if any(character.isnumeric() for character in bare):
            number = None if "/" in bare else canonical_number(_decimal_point(word, bare))
            if number is None or value not in (None, number):
                return None
            value = number
        elif set(word) <= _OPERATORS:
            return None
    return value


def _decimal_point(word: str, bare: str) -> str:
    """Give back the point that stripping took from `.5`."""
    start = word.find(bare)
    return f".{bare}" if start > 0 and word[start - 1] == "." and bare.isdigit() else bare


def _ascii_digits(text: str) -> str:
    """Decimal digits of every script, and the typographic minus, in ASCII. Superscripts stay: 4² is not 42."""
    if text.isascii():
        return text
    foreign = {c for c in set(text) if not c.isascii() and (c.isdecimal() or c == "\u2212")}
    return text.translate({ord(c): "-" if c == "\u2212" else str(unicodedata.decimal(c)) for c in foreign})
