"""The scorers of reasoning-gym's families. Runs in the workers of `pool`: a scorer may take any time, or die.

Four families call `eval` on the answer and some `sympy.parse_expr`, which evaluates Python too. In this process both only read.
"""

from __future__ import annotations

import ast
import functools
import json
import re
import sys
from typing import Any

import reasoning_gym
import sympy

_NONSENSE = "purple elephants 7 o'clock"  # a right answer to nothing
_EVALUATING = ("binary_matrix", "n_queens", "spiral_matrix", "string_insertion")
_TUPLES = ("arc_agi", "rearc")  # families whose scorers compare with tuples, which JSON turned into lists
_FORMULA = re.compile(r"(?:[\w\s+\-*/^(),=]|\.(?=\d)|(?<=\d)\.)*")
_parse_expr = sympy.parse_expr


def warm_up() -> None:
    """Take from the scorers what could run the answer as a program."""
    from reasoning_gym.factory import DATASETS

    for family in _EVALUATING:
        sys.modules[DATASETS[family][0].__module__].eval = ast.literal_eval
    for module in [module for name, module in sys.modules.items() if name.startswith("reasoning_gym.")]:
        if getattr(module, "parse_expr", None) is _parse_expr:
            module.parse_expr = _read_formula
    sympy.parse_expr = _read_formula


def prepare(family: str, question: str, answer: str, metadata: str, given: str) -> None:
    """Build the family's scorer: some load a second's worth of data files."""
    _dataset(family, _options(metadata))


def _read_formula(text: str, *arguments: Any, **options: Any) -> Any:
    """sympy.parse_expr for names, numbers, brackets and operators; calls only sympy's own functions. Raises ValueError."""
    called = re.findall(r"([^\W\d]\w*)\s*\(", text)
    if (
        "__" in text
        or not _FORMULA.fullmatch(text)
        or not all(name == "sqrt" or isinstance(getattr(sympy, name, None), type) for name in called)
    ):
        raise ValueError("is no formula")
    return _parse_expr(text, *arguments, **options)


def accepts(family: str, question: str, answer: str, metadata: str, given: str) -> bool:
    """Whether the family's scorer gives `given` at least 0.99, and nonsense less."""
    details = json.loads(metadata)
    if family in _TUPLES:
        details = _tuples(details)
    entry = {"question": question, "answer": answer, "metadata": details}
    score = _dataset(family, _options(metadata)).score_answer
    return score(given, entry) >= 0.99 and not _likes_nonsense(score, entry)


def _options(metadata: str) -> str:
    return json.dumps(json.loads(metadata).get("source_options", {}), sort_keys=True)


def _likes_nonsense(score: Any, entry: dict[str, Any]) -> bool:
    try:
        return score(_NONSENSE, entry) >= 0.99
    except Exception:  # a scorer that raises on garbage does not like it
        return False


@functools.lru_cache(maxsize=64)
def _dataset(family: str, options: str) -> Any:
    return reasoning_gym.create_dataset(family, seed=0, size=1, **json.loads(options))


def _tuples(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _tuples(part) for key, part in value.items()}
    return tuple(_tuples(part) for part in value) if isinstance(value, list) else value
