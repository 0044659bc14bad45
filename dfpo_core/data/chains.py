"""Chains of small arithmetic steps, digits least significant first: a task that a model of 0.3 M parameters learns in minutes on a CPU.

A question such as `21+54+6=` (12 + 45 + 6) is answered by the running results, spelled out, and the last of them: `75=36`. Least
significant first, every digit follows from digits already written, so a small Transformer can learn it, sharply, from some point on
(Lee et al. 2023, arXiv 2307.03381). Families: `sums`, `differences` (never below zero), `products` (by one digit, from the second term
on) and `maxima`. Rows have `question`, `answer` (the last result alone, most significant digit last as in the response) and `response`
(what a supervised warm start should see).
"""

from __future__ import annotations

import random

from dfpo_core.errors import UserError

FAMILIES = {"sums": "+", "differences": "-", "products": "*", "maxima": "^"}
OPTIONS = {"terms": 3, "digits": 2}


def check(name: str, options: dict, field: str) -> dict[str, int]:
    """Options with their defaults. Raises UserError for an unknown family, an unknown option or a value out of range."""
    if name not in FAMILIES:
        raise UserError(f"{field}.name", f"unknown chain family {name!r}", f"choose one of: {', '.join(FAMILIES)}")
    for key in options:
        if key not in OPTIONS:
            raise UserError(f"{field}.options.{key}", "unknown option of a chain", f"choose one of: {', '.join(OPTIONS)}")
    chosen = {**OPTIONS, **options}
    for key, (low, high) in {"terms": (2, 9), "digits": (1, 9)}.items():
        if not isinstance(chosen[key], int) or not low <= chosen[key] <= high:
            raise UserError(f"{field}.options.{key}", f"must be a whole number from {low} to {high}, got {chosen[key]!r}", "correct it")
    return chosen


def rows(name: str, size: int, seed: int, terms: int, digits: int) -> list[dict[str, str]]:
    """`size` rows of a family; row i depends on (seed, i) alone, so a longer list begins with the shorter one."""
    return [_row(name, random.Random(f"{seed}/{name}/{i}"), terms, digits) for i in range(size)]


def _row(name: str, generator: random.Random, terms: int, digits: int) -> dict[str, str]:
    numbers = [generator.randrange(10**digits) for _ in range(terms)]
    if name == "products":
        numbers[1:] = [generator.randrange(2, 10) for _ in numbers[1:]]
    if name == "differences":  # the first term is the sum of the others and of what is left over
        numbers[0] = sum(numbers)
    results = [numbers[0]]
    for number in numbers[1:]:
        last = results[-1]
        results.append({"sums": last + number, "differences": last - number, "products": last * number, "maxima": max(last, number)}[name])
    written = [_least_first(result) for result in results[1:]]
    question = FAMILIES[name].join(_least_first(number) for number in numbers) + "="
    return {"question": question, "answer": written[-1], "response": "=".join(written)}


def _least_first(number: int) -> str:
    return str(number)[::-1]
