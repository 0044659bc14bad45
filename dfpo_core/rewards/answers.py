"""The final answer of a response, found by the same rule for every kind of question, and plain numbers in one spelling.

A response earns nothing by hedging: it has one final answer.

* Marks are `\\boxed{...}`, `#### ...`, `answer is ...`, `answer: ...` and, for numbers, `= ...` up to the end of the text.
  The last mark decides; what stands in front of it is working-out.
* Of nested boxes the outermost is the answer, with all that it holds. A box that is never closed holds no answer.
* Without a mark the whole response is the answer.
"""

from __future__ import annotations

import re
import unicodedata
from fractions import Fraction

_NUMBER = re.compile(r"([-+]?)(\d{1,3}(?:,\d{3})+|\d*)(?:\.(\d+))?")
_FRACTION = re.compile(r"[-+]?\d{1,100}/\d{1,100}")
_MARK = re.compile(r"answer(?:\s+is\b|\s*[:=])\s*[:=]?|####|\\boxed\{", re.IGNORECASE)
_SENTENCE_END = re.compile(r"[.!?](?=\s)|\n")
_BRACES = re.compile(r"\\boxed\{|\\.|[{}]", re.DOTALL)  # an escaped brace is a character like any other
_EMPHASIS = re.compile(r"\*\*([^*\n]+)\*\*")
_ENCLOSING = "\"'`“”‘’()[]{}<>$€£%.,:;!?*_\\%"
_OPERATORS = set("+-*/^=<>×÷·±~%")
# Words that make `42` beside them something else.
OTHER_VALUE = {"not", "never", "minus", "plus", "negative", "half", "squared", "cubed", "factorial", "pi"}
OTHER_VALUE |= {"dozen", "hundred", "thousand", "million", "billion", "trillion"}
_CALCULATION = re.compile(r"\\(?!left\b|right\b|mathrm\b|mbox\b|textbf\b|quad\b)[A-Za-z]")  # \pi, \sqrt, \cdot, ...
_LONGEST_NUMBER = 5000  # characters of one word; also keeps a 100 kB digit string cheap


def canonical_number(text: str) -> str | None:
    """The one spelling of a plain number (`-1234.5`, `1/3` in lowest terms), or None if `text` is no plain number.

    Works on digits, not values, so integers of any length cost linear time and decimals lose nothing.
    """
    text = text.strip()
    if len(text) > _LONGEST_NUMBER:
        return None
    text = ascii_digits(text)
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
    text = without_markup(ascii_digits(response))
    mark_end, answer = after_last_mark(text)
    equals = text.rfind("=")
    return _only_number(text[equals + 1 :] if equals >= mark_end else answer)


def extract_choice(response: str, labels: list[str], choices: list[str]) -> str | None:
    """The label that a response settles on, or None. Never raises; linear in the length."""
    answer = after_last_mark(without_markup(response))[1].strip()
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


def without_emphasis(text: str) -> str:
    """**bold** without its asterisks."""
    return _EMPHASIS.sub(r" \1 ", text)


def without_markup(text: str) -> str:
    """Drop what only sets type: **bold**, \\text{...} and LaTeX's {,} between thousands."""
    return without_emphasis(text.replace("\\text{", "{").replace("{,}", ","))


def after_last_mark(text: str) -> tuple[int, str]:
    """Where the last mark ends, and the box's content or the sentence behind it. Without a mark: 0 and all of the text.

    A mark inside an unclosed box has nothing behind it: the length of the text, and "".
    """
    marks = list(_MARK.finditer(text))
    if not marks:
        return 0, text
    last = marks[-1]
    box = _outermost_box(text, last.start())
    if box is not None:
        start, end = box
        return (len(text), "") if end is None else (last.end(), text[start:end].replace("\\boxed{", "{"))
    rest = text[last.end() :].lstrip()
    return last.end(), _sentence(rest)


def _outermost_box(text: str, position: int) -> tuple[int, int | None] | None:
    """Start and end of the content of the outermost box around `position`; the end is None when nothing closes it. None: no box."""
    start, depth = None, 0
    for token in _BRACES.finditer(text, 0 if "\\boxed{" in text else len(text)):
        opens, closes = token[0].endswith("{") and token[0] != "\\{", token[0] == "}"
        if start is None:
            if token.start() > position:
                return None
            if token[0] == "\\boxed{":
                start, depth = token.end(), 1
            continue
        depth += opens - closes
        if depth == 0:
            if token.start() > position:
                return start, token.start()
            start = None
    return None if start is None else (start, None)


def _sentence(text: str) -> str:
    """The first sentence or line; a displayed formula at its start is kept whole, with what stands behind it on its last line."""
    closing = {"$$": "$$", "\\[": "\\]"}.get(text[:2])
    formula_end = text.find(closing, 2) if closing else -1
    end = _SENTENCE_END.search(text, max(formula_end, 0))
    return text[: end.start()] if end else text


def _only_number(text: str) -> str | None:
    """The canonical value of the one plain number in `text`; None when it has none, two, or anything that is not plain.

    A fraction must be all of the text, and 84/2 is a division left undone, not a spelling of 42.
    """
    whole = text.strip().strip(_ENCLOSING)
    if _FRACTION.fullmatch(whole):
        value = canonical_number(whole)
        return None if value is None or value.removeprefix("-").isdigit() else value
    if _CALCULATION.search(text):
        return None
    value = None
    for word in dict.fromkeys(text.split()):
        bare = word.strip(_ENCLOSING)
        if any(character.isnumeric() for character in bare):
            number = None if "/" in bare else canonical_number(_decimal_point(word, bare))
            if number is None or value not in (None, number):
                return None
            value = number
        elif set(word) <= _OPERATORS or bare.lower() in OTHER_VALUE:
            return None
    return value


def _decimal_point(word: str, bare: str) -> str:
    """Give back the point that stripping took from `.5`."""
    start = word.find(bare)
    return f".{bare}" if start > 0 and word[start - 1] == "." and bare.isdigit() else bare


def ascii_digits(text: str) -> str:
    """Decimal digits of every script, and the typographic minus, in ASCII. Superscripts stay: 4² is not 42."""
    if text.isascii():
        return text
    foreign = {c for c in set(text) if not c.isascii() and (c.isdecimal() or c == "\u2212")}
    return text.translate({ord(c): "-" if c == "\u2212" else str(unicodedata.decimal(c)) for c in foreign})
