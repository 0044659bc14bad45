"""dialogue: how much of the user's goal a conversation reached, 1 where all of it.

The response is the policy's turns, which are played again against the row's user and service (dfpo_core/environments/dialogue.py):

    reward = (task_weight * calls + ask_weight * told + goal_weight * goal) / (task_weight + ask_weight + goal_weight)

`calls` is the share of the goal's calls made with the wanted values, 0 after a wrong booking, `told` the share of the requested slots that
the user was told, `goal` 1 where both are 1. Where the user requests nothing, ask_weight counts as 0. No label is read: there is none.
"""

from __future__ import annotations

from typing import Any

from pydantic import Field

from dfpo_core import environments
from dfpo_core.config import RewardsConfig, Section
from dfpo_core.environments.dialogue import Dialogue
from dfpo_core.errors import UserError
from dfpo_core.rewards import registry


class DialogueConfig(Section):
    """Options of the dialogue reward."""

    task_weight: float = Field(0.4, ge=0, description="of the share of calls made")
    ask_weight: float = Field(0.2, ge=0, description="of the share of requested slots told")
    goal_weight: float = Field(0.4, gt=0, description="of the whole goal; with the others at 0 the reward is 0 or 1")


@registry.register("dialogue")
class DialogueReward:
    """In [0, 1]; 1 exactly where the goal was reached, whatever the weights."""

    config_class = DialogueConfig

    def __init__(self, config: DialogueConfig, limits: RewardsConfig):
        self.config = config

    def score(self, rows: list[dict[str, Any]], responses: list[str], against: str) -> list[float]:
        """Raises UserError on a row that is no dialogue."""
        return [self.score_one(row, response) for row, response in zip(rows, responses, strict=True)]

    def score_one(self, row: dict[str, Any], response: str) -> float:
        if row.get("reward") != "dialogue":
            raise UserError("train.reward.name", f"row {row.get('row_id')!r} is no dialogue", "use the reward row, which is each row's own")
        dialogue, _ = environments.play(row, response)
        assert isinstance(dialogue, Dialogue)
        calls, told = dialogue.progress()
        if calls == told == 1.0:
            return 1.0
        config = self.config
        ask_weight = config.ask_weight if dialogue.goal["requested"] else 0.0
        return (config.task_weight * calls + ask_weight * told) / (config.task_weight + ask_weight + config.goal_weight)
