"""weighted: a weighted sum of several rewards, each with its own options."""

from __future__ import annotations

from typing import Any

from pydantic import Field, field_validator

from dfpo_core.config import RewardsConfig, Section
from dfpo_core.errors import UserError
from dfpo_core.rewards import create, parse, registry


class WeightedConfig(Section):
    """Options of the weighted sum."""

    parts: list[dict[str, Any]] = Field(min_length=1, description="rewards, each a mapping of name, weight and the reward's own options")

    @field_validator("parts")
    @classmethod
    def _parts_are_rewards(cls, parts: list[dict[str, Any]]) -> list[dict[str, Any]]:
        for index, part in enumerate(parts):
            weight = part.get("weight")
            if isinstance(weight, bool) or not isinstance(weight, int | float):
                raise ValueError(f"parts.{index}.weight must be a number, got {weight!r}")
            try:
                parse(_options(part), f"parts.{index}")
            except UserError as error:
                raise ValueError(f"{error.field}: {error.problem}") from None
        return parts


@registry.register("weighted")
class WeightedReward:
    """sum_i weight_i * reward_i; the weights are taken as they are, so that a negative one is a penalty."""

    config_class = WeightedConfig

    def __init__(self, config: WeightedConfig, limits: RewardsConfig):
        fields = (f"train.reward.parts.{index}" for index in range(len(config.parts)))
        self.parts = [(part["weight"], create(_options(part), limits, field)) for part, field in zip(config.parts, fields, strict=True)]

    def score(self, rows: list[dict[str, Any]], responses: list[str], against: str) -> list[float]:
        totals = [0.0] * len(rows)
        for weight, reward in self.parts:
            values = reward.score(rows, responses, against)
            totals = [total + weight * value for total, value in zip(totals, values, strict=True)]
        return totals


def _options(part: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in part.items() if key != "weight"}
