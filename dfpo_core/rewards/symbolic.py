"""Whether two formulas have the same value, by math-verify. Runs in the workers of `pool`: it may take any time, or die."""

from __future__ import annotations

import functools
import logging
import math
from typing import Any

from math_verify import parse, verify
from math_verify.parser import LatexExtractionConfig
from sympy import Add, Basic, Expr, Float, Integer, Mul, Number, Pow, Rational, preorder_traversal
from sympy.core.function import Application
from sympy.core.relational import Relational

_EXTRACTION = (LatexExtractionConfig(boxed_match_priority=-1),)
_WARM_UP = (
    "\\frac{\\sqrt{3}}{2}",
    "(x+1)^2",
    "\\left(1, \\frac{\\pi}{2}\\right]",
    "y = 2x + 3",
    "\\begin{pmatrix} 1 \\\\ 2 \\end{pmatrix}",
)


def warm_up() -> None:
    """Build what math-verify builds on first use, so that the first answer is as fast as the rest."""
    logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns that its own time limit is off; the pool has one
    for formula in _WARM_UP:
        equal(formula, f"{formula}+0")


def prepare(wanted: str, given: str) -> None:
    """Nothing: parsing either formula may take any time, so both count against the limit."""


def equal(wanted: str, given: str) -> bool:
    """Whether math-verify takes `given` for `wanted`, and `given` is worked out as far as `wanted` is.

    Decimals are exact: math-verify rounds them to six places, which makes 0.0000001 equal to 2^{-30}.
    """
    raw_target, raw_answer = _parsed(wanted), _parsed(given)
    if not raw_target or not raw_answer:
        return False
    target, answer = [[_exact(part) for part in parts] for parts in (raw_target, raw_answer)]
    if isinstance(target[0], Basic) and isinstance(answer[0], Basic):
        if _unfinished(raw_answer[0]) - _unfinished(raw_target[0]) or _certainly_differ(target[0], answer[0]):
            return False
        if isinstance(target[0], Relational) and target[0].free_symbols != answer[0].free_symbols and isinstance(answer[0], Relational):
            return False
    # The wanted answer goes first: math-verify is not symmetric.
    return verify(target, answer, timeout_seconds=None)


@functools.lru_cache(maxsize=1024)
def _parsed(formula: str) -> list[Any]:
    """[expression, text], or less where math-verify cannot parse it."""
    return parse(f"${formula}$", _EXTRACTION, parsing_timeout=None)


def _exact(part: Any) -> Any:
    floats = part.atoms(Float) if isinstance(part, Basic) else ()
    return part.xreplace({number: Rational(str(number)) for number in floats}) if floats else part


def _unfinished(expression: Basic) -> set[str]:
    """Kinds of arithmetic on plain numbers that are left to be done."""
    kinds = set()
    for node in preorder_traversal(expression):
        if isinstance(node, Add) and sum(_is_number(part) for part in node.args) > 1:
            kinds.add("sum")
        elif isinstance(node, Mul) and sum(isinstance(part, Integer | Float) and part not in (1, -1) for part in node.args) > 1:
            kinds.add("product")
        elif isinstance(node, Pow) and all(isinstance(part, Integer) for part in node.args) and node.exp > 1:
            kinds.add("power")
        elif isinstance(node, Pow) and isinstance(node.base, Integer) and node.exp == Rational(1, 2) and _is_square(int(node.base)):
            kinds.add("root")
        elif isinstance(node, Application) and not node.free_symbols:
            kinds.add(type(node).__name__)
    return kinds


def _is_number(part: Basic) -> bool:
    if isinstance(part, Mul):
        return all(_is_number(factor) or (isinstance(factor, Pow) and _is_number(factor.base) and factor.exp == -1) for factor in part.args)
    return isinstance(part, Number)


def _is_square(number: int) -> bool:
    return number >= 0 and math.isqrt(number) ** 2 == number


def _certainly_differ(first: Basic, second: Basic) -> bool:
    """Different values at one point with positive coordinates. math-verify calls two numbers equal when their difference is tiny."""
    if not (isinstance(first, Expr) and isinstance(second, Expr)):
        return False
    symbols = sorted(first.free_symbols | second.free_symbols, key=str)
    point = {symbol: Rational(1009 + 37 * index, 757) for index, symbol in enumerate(symbols)}
    one, other = (formula.subs(point).evalf(20) for formula in (first, second))
    if not (one.is_number and one.is_finite and other.is_number and other.is_finite):
        return False
    return bool(abs(one - other) > 1e-9 * max(abs(one), abs(other)))
