"""number: the final answer must hold one plain number, however often.

A second, different number, an arithmetic operator, a word or command that changes the value (`not`, `thousand`, `\\pi`) or a word that
mixes digits with anything else (`17+25`, `4²`, `1e3`) makes it worthless: evaluating it is the model's job, not ours. A fraction counts
only when it is all of the final answer, and no whole number (84/2). Equal values are equal: 3.50 is 3.5, 1,234 is 1234, 1/2 is 0.5.
"""

from __future__ import annotations

from typing import Any

from dfpo_core.config import RewardsConfig, Section
from dfpo_core.rewards import registry
from dfpo_core.rewards.answers import canonical_number, extract_number


class NumberConfig(Section):
    """It has no options."""


@registry.register("number")
class NumberReward:
    """1 where the response states the wanted plain number."""

    config_class = NumberConfig

    def __init__(self, config: NumberConfig, limits: RewardsConfig):
        pass

    def score(self, rows: list[dict[str, Any]], responses: list[str], against: str) -> list[float]:
        return [float(_is_number(response, row[against])) for row, response in zip(rows, responses, strict=True)]


def _is_number(response: str, wanted: str) -> bool:
    given = extract_number(response)
    return given is not None and given == canonical_number(wanted)
