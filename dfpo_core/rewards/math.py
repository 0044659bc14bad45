r"""math: the final answer, in LaTeX or plain text, has the wanted value, by math-verify (https://github.com/huggingface/Math-Verify).

The final answer is found as everywhere (`answers`), but fenced code holds none unless it is the whole response, and a response without
a mark may give it as its only formula. Then:

* Where a plain value is wanted (42, 3/4, $18.90, 90^\circ, x = 5) a plain value must be given, with or without its unit. It is
  compared exactly, digit by digit: 17+25 is not 42, 0.333333 is not 1/3, and 84/2 is not 42 either.
* A power of ten is a plain value in normalised scientific notation, from 10^3 and 10^{-3} on (3.2\times 10^5, 3.2e5). Where an interval is
  wanted that can be nothing else ([1, 3), (2, \infty)) an inequality may be given, where \ln is wanted \log.
* Text (\text{Evelyn}) is compared as text, numbers in another base (52_8) digit by digit.
* Everything else must have the same value for math-verify, and be worked out as far as the wanted answer is: no sum, product or power of
  plain numbers, no integral, binomial and so on that the wanted answer does not have, and no formula copied from the question.

Whatever can be decided without a computer algebra system is; the rest goes to a pool of processes that are killed at a time limit.
"""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass
from typing import Any

from dfpo_core.config import RewardsConfig, Section
from dfpo_core.rewards import latex, pool, registry
from dfpo_core.rewards.answers import after_last_mark, normalise_text, without_emphasis

_LONGEST = 1000  # characters of a final answer that is looked at, unless the wanted one is longer
_LONGEST_UNMARKED = 5000  # characters of a response without a mark
_CODE = re.compile(r"```.*?(?:```|\Z)", re.DOTALL)
_FORMULA = re.compile(r"\$\$(.+?)\$\$|\$([^$]+)\$|\\\[(.+?)\\\]|\\\((.+?)\\\)", re.DOTALL)
_TEXT = re.compile(r"\\(?:text|mbox|textbf|textit|textrm|mathrm)\s*\{([^{}]*)\}")
_BASE = re.compile(r"([0-9A-Z]+)_\{?\d+\}?")
_AND = re.compile(r"\s*,?\s*(?:\\text\s*\{\s*,?\s*and\s*\}|\band\b)\s*")
_COMMAND = re.compile(r"\\[A-Za-z]+")
_DIVISION = re.compile(r"\\frac\s*\{\s*(\d{1,100})\s*\}\s*\{\s*(\d{1,100})\s*\}|(?<![\d.])(\d{1,100})\s*/\s*(\d{1,100})(?![\d.])")
_CALCULATIONS = {f"\\{name}" for name in ("int", "iint", "oint", "sum", "prod", "lim", "gcd", "lcm", "binom", "det", "max", "min")}
_CALCULATIONS |= {f"\\{name}" for name in ("floor", "lfloor", "lceil", "operatorname", "mod", "pmod", "bmod", "choose")}


class MathConfig(Section):
    """It has no options."""


@registry.register("math")
class MathReward:
    """1 where the response's final answer has the wanted value. Rows may carry the `question`, so that copying from it earns nothing."""

    config_class = MathConfig

    def __init__(self, config: MathConfig, limits: RewardsConfig):
        self.limits = limits

    def score(self, rows: list[dict[str, Any]], responses: list[str], against: str) -> list[float]:
        scores = [decide(row[against], response, row.get("question", "")) for row, response in zip(rows, responses, strict=True)]
        open_ones = [index for index, value in enumerate(scores) if isinstance(value, tuple)]
        # Samples of one question often agree: check each pair once.
        pairs = list(dict.fromkeys(scores[index] for index in open_ones))
        checked = pool.check_all("dfpo_core.rewards.symbolic:equal", [list(pair) for pair in pairs], self.limits)
        values = dict(zip(pairs, checked, strict=True))
        return [values[value] if isinstance(value, tuple) else value for value in scores]


def decide(wanted: str, response: str, question: str = "") -> float | tuple[str, str]:
    """0.0 or 1.0 where that is certain, else the pair (wanted, given) of formulas that math-verify has to compare."""
    target = _target(wanted)
    given = final_formula(response)
    if len(given) > max(_LONGEST, 2 * len(wanted)):
        return 0.0
    given = _in_words_of(latex.decimal(latex.tidy(given).removeprefix("\\approx").strip()), target.formula)
    if not given:
        return 0.0
    if latex.spelling(given) == latex.spelling(target.formula):
        return 1.0
    if target.plain is not None:
        return float(_is_plain_value(given, target.plain, question))
    if target.text is not None:
        return float(_as_text(given) == target.text)
    if target.base is not None:
        return float(latex.spelling(given) == target.base)
    given = _statement(given, target.formula)
    if latex.spelling(given) == latex.spelling(target.formula):
        return 1.0
    copied = latex.spelling(given) in latex.spelling(latex.tidy(question))
    if not given or copied or not _is_worked_out(given, target.formula) or latex.different(target.formula, given):
        return 0.0
    if latex.is_set(given) != latex.is_set(target.formula) and latex.is_tuple(given) != latex.is_tuple(target.formula):
        return 0.0  # math-verify takes the set {2, 5} for the point (2, 5)
    return target.formula, given


def final_formula(response: str) -> str:
    """The final answer of a response as it is written, "" where there is none. Linear in the length."""
    stripped = response.strip()
    if stripped.startswith("```") and stripped.endswith("```") and stripped.count("```") == 2:
        language, _, code = stripped[3:-3].partition("\n")
        text = code if not language.strip() else ""
    else:
        text = _CODE.sub(" ", response)
    mark, answer = after_last_mark(without_emphasis(text))
    if mark or len(answer) > _LONGEST_UNMARKED:
        return answer
    formulas = _FORMULA.findall(answer)
    return "".join(formulas[0]) if len(formulas) == 1 else answer


@dataclass(frozen=True)
class _Target:
    """A wanted answer: tidied and without units, and what it is besides; at most one of the three is set."""

    formula: str
    plain: latex.Plain | None = None
    text: str | None = None
    base: str | None = None


@functools.lru_cache(maxsize=4096)
def _target(wanted: str) -> _Target:
    tidied = latex.decimal(latex.tidy(wanted).removeprefix("\\approx").strip())
    formula = latex.without_units(tidied)
    is_equation = "=" in formula and not latex.is_name(formula.partition("=")[0])
    plain = None if is_equation else latex.plain(tidied)
    if plain is not None:
        return _Target(formula, plain=plain)
    if _TEXT.fullmatch(tidied.strip("()")):
        return _Target(tidied, text=_as_text(tidied))
    base = _BASE.fullmatch(formula)
    return _Target(formula, base=base[1]) if base else _Target(formula)


def _in_words_of(given: str, wanted: str) -> str:
    r"""The given formula in the notation of the wanted one where that is plain: an inequality as an interval, \log for \ln."""
    if latex.is_interval(wanted):
        given = latex.interval(given)
    if "\\ln" in wanted and "\\ln" not in given and "\\log" not in wanted:
        given = re.sub(r"\\log(?![A-Za-z_]|\s*_)", r"\\ln", given)
    return given


def _as_text(formula: str) -> str:
    return normalise_text(_TEXT.sub(r"\1", formula).strip(" ()")).replace(", ", ",")


def _is_plain_value(given: str, wanted: latex.Plain, question: str) -> bool:
    """A fraction is no whole number, however it divides; one that is not in lowest terms may not stand in the question."""
    value = latex.plain(given)
    if value is None or value.value != wanted.value or (value.is_fraction and wanted.is_whole):
        return False
    return value.is_reduced or latex.spelling(given) not in latex.spelling(latex.tidy(question))


def _statement(given: str, wanted: str) -> str:
    """The formula that a tidied answer states: behind `x =`, without the words and the unit around it; "" when it states several."""
    if "," in wanted:
        given = _AND.sub(", ", given)
    given = latex.without_units(given)
    if "=" in given and "=" not in wanted:
        left, _, given = given.rpartition("=")
        left = re.sub(r"\([^()]*\)", "", left)  # (r, \theta) = is one statement
        if re.search(r"[,;]|\\text|\b(?:or|and)\b", left):
            return ""
    letters = set(_COMMAND.sub("", wanted))
    words = re.search(r"((?:\s+[A-Za-z]{2,}){0,3})$", given)
    return given.strip() if set(words[1].replace(" ", "")) <= letters else given[: words.start()].strip()


def _is_worked_out(given: str, wanted: str) -> bool:
    """Whether an answer holds no calculation, no words and no letter in another case that the wanted answer does not hold."""
    new_commands = set(_COMMAND.findall(given)) - set(_COMMAND.findall(wanted))
    if new_commands & _CALCULATIONS or any(_TEXT.match(command + "{}") for command in new_commands) or ("!" in given and "!" not in wanted):
        return False
    bare, bare_wanted = _COMMAND.sub(" ", given), _COMMAND.sub(" ", wanted)
    letters, wanted_letters = ({c for c in text if c.isalpha()} for text in (bare, bare_wanted))
    if any(letter.swapcase() in wanted_letters for letter in letters - wanted_letters):
        return False
    if any(not set(word) <= wanted_letters for word in re.findall(r"[A-Za-z]{2,}", bare)):
        return False
    return not (_whole_divisions(given) - _whole_divisions(wanted))


def _whole_divisions(formula: str) -> set[tuple[str, str]]:
    """Fractions of plain numbers that are whole numbers, such as 84/2."""
    pairs = ((m[1] or m[3], m[2] or m[4]) for m in _DIVISION.finditer(formula))
    return {(top, bottom) for top, bottom in pairs if int(bottom) and int(top) % int(bottom) == 0}
