"""Rewards: how right a response is, against the truth (`answer`) or against what training sees (`label`).

Every reward is built as `Reward(config, limits)` and used as
    score(rows, responses, against) -> list[float]    one a response; `against` names the column that holds the wanted answer
It never raises on a response, whatever that holds, and is closed to the rest of the batch: a response has the same reward alone.

`score` gives each row the reward that its own `reward` column names, which is how every split is evaluated. Training may take another
(`train.reward`): a user's function, a reward model, or a weighted sum.
"""

from __future__ import annotations

from typing import Any

from pydantic import ValidationError

from dfpo_core.config import RewardsConfig, Section
from dfpo_core.errors import UserError
from dfpo_core.registry import Registry
from dfpo_core.rewards.answers import canonical_number, extract_choice, extract_number, normalise_text

__all__ = ["canonical_number", "create", "extract_choice", "extract_number", "normalise_text", "parse", "registry", "score"]

NAMES = "choice", "custom", "dialogue", "exact", "math", "number", "reasoning_gym", "reward_model", "row", "weighted"

registry = Registry("train.reward.name", "dfpo_core.rewards", {name: name for name in NAMES})


def score(rows: list[dict[str, Any]], responses: list[str], against: str = "answer", limits: RewardsConfig | None = None) -> list[float]:
    """Each row's own reward: 1.0 or 0.0 a response; of a dialogue the share of its goal that was reached.

    Args:
        rows: data rows with `reward` (one of config.ROW_REWARDS), the column named by `against`, and what the reward reads besides:
            `choices` and `choice_labels`, `question`, `metadata`; as many as responses.
        against: `answer` (the truth) or `label` (what training sees).
        limits: of the processes that check answers; the defaults when None.

    Raises:
        UserError: a row whose `reward` is unknown, or that lacks what its reward needs.
    """
    return create({}, limits or RewardsConfig()).score(rows, responses, against)


def create(options: dict[str, Any], limits: RewardsConfig, field: str = "train.reward") -> Any:
    """The reward that `options` ({"name": ..., its options}) describe; {} is each row's own. Raises UserError naming the option."""
    name, config = parse(options, field)
    return registry.get(name)(config, limits)


def parse(options: dict[str, Any], field: str = "train.reward") -> tuple[str, Section]:
    """Name and validated options, without loading anything. Raises UserError naming the option."""
    name = options.get("name", "row")
    if not isinstance(name, str):
        raise UserError(f"{field}.name", f"{name!r} is not a name", f"choose one of: {', '.join(sorted(registry.names))}")
    config_class = registry.get(name).config_class
    try:
        return name, config_class.model_validate({key: value for key, value in options.items() if key != "name"})
    except ValidationError as error:
        problem = error.errors(include_url=False)[0]
        where = ".".join([field, *map(str, problem["loc"])])
        if problem["type"] == "extra_forbidden":
            known = ", ".join(config_class.model_fields) or "none"
            raise UserError(where, f"unknown option of {name}", f"known options: {known}") from None
        if problem["type"] == "missing":
            raise UserError(where, f"{name} needs it", "add it") from None
        raise UserError(where, problem["msg"].removeprefix("Value error, "), "correct the value") from None
