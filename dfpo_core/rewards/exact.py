"""exact: the response is the answer, compared in Unicode form NFKC without case, surplus spaces and a closing full stop."""

from __future__ import annotations

from typing import Any

from dfpo_core.config import RewardsConfig, Section
from dfpo_core.rewards import registry
from dfpo_core.rewards.answers import normalise_text


class ExactConfig(Section):
    """It has no options."""


@registry.register("exact")
class ExactReward:
    """1 where the response, as a whole, is the wanted text."""

    config_class = ExactConfig

    def __init__(self, config: ExactConfig, limits: RewardsConfig):
        pass

    def score(self, rows: list[dict[str, Any]], responses: list[str], against: str) -> list[float]:
        return [float(normalise_text(response) == normalise_text(row[against])) for row, response in zip(rows, responses, strict=True)]
