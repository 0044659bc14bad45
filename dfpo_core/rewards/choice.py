"""choice: the final answer starts with a label (`C`, `(C)`, `C. days`), or is the text of one option, or names exactly one label."""

from __future__ import annotations

from typing import Any

from dfpo_core.config import RewardsConfig, Section
from dfpo_core.rewards import registry
from dfpo_core.rewards.answers import extract_choice


class ChoiceConfig(Section):
    """It has no options."""


@registry.register("choice")
class ChoiceReward:
    """1 where the response settles on the wanted label. Rows need `choices` and `choice_labels`."""

    config_class = ChoiceConfig

    def __init__(self, config: ChoiceConfig, limits: RewardsConfig):
        pass

    def score(self, rows: list[dict[str, Any]], responses: list[str], against: str) -> list[float]:
        pairs = zip(rows, responses, strict=True)
        return [float(extract_choice(response, row["choice_labels"], row["choices"]) == row[against]) for row, response in pairs]
