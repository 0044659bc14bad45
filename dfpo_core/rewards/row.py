"""Each row's own reward: the one that its `reward` column names."""

from __future__ import annotations

from typing import Any

from dfpo_core.config import ROW_REWARDS, RewardsConfig, Section
from dfpo_core.errors import UserError
from dfpo_core.rewards import registry


class RowConfig(Section):
    """The row's own reward has no options."""


@registry.register("row")
class RowReward:
    """Rows of several kinds may be mixed; each kind scores its rows in one call."""

    config_class = RowConfig

    def __init__(self, config: RowConfig, limits: RewardsConfig):
        self.limits = limits

    def score(self, rows: list[dict[str, Any]], responses: list[str], against: str) -> list[float]:
        """0/1. Raises UserError on a row whose `reward` is not one of ROW_REWARDS."""
        by_kind: dict[str, list[int]] = {}
        for index, (row, _) in enumerate(zip(rows, responses, strict=True)):
            by_kind.setdefault(row["reward"], []).append(index)
        scores = [0.0] * len(rows)
        for kind, indices in by_kind.items():
            if kind not in ROW_REWARDS:
                row_id = rows[indices[0]].get("row_id")
                known = f"{', '.join(ROW_REWARDS[:-1])} or {ROW_REWARDS[-1]}"
                raise UserError("reward", f"row {row_id!r} has the unknown kind {kind!r}", f"use {known}")
            entry = registry.get(kind)
            reward = entry(entry.config_class(), self.limits)
            values = reward.score([rows[i] for i in indices], [responses[i] for i in indices], against)
            for index, value in zip(indices, values, strict=True):
                scores[index] = value
        return scores
