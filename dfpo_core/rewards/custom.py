"""custom: a user's own function by import path, `package.module:function`, plain or async.

    def function(row, response) -> float            # or: async def
        return float(response.strip() == row["label"])

`row` holds the data row's columns; its `label` is what this score is measured against (in training the noisy label), and the true answer
is not in it. Async calls run concurrently, `concurrency` at a time. An exception in the function ends the step: it is not a score of 0.
"""

from __future__ import annotations

import asyncio
import importlib
import importlib.util
import inspect
import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from pydantic import Field, field_validator

from dfpo_core.config import RewardsConfig, Section
from dfpo_core.errors import UserError
from dfpo_core.rewards import registry

_TRUTH = ("answer", "clean_answer", "is_noisy", "noise_kind")


class CustomConfig(Section):
    """Options of a user's own reward."""

    path: str = Field(pattern=r"^[A-Za-z_][\w.]*:[A-Za-z_][\w.]*$", description="package.module:function; the package must be importable")
    concurrency: int = Field(64, ge=1, description="calls of an async function at a time")

    @field_validator("path")
    @classmethod
    def _is_a_function(cls, path: str) -> str:
        # Checked here only where the package is: a cluster's image may hold what the machine that submits does not.
        if importlib.util.find_spec(path.partition(".")[0].partition(":")[0]):
            load(path)
        return path


def load(path: str) -> Callable:
    """The function at an import path. Raises ValueError that says what is missing."""
    module_name, _, name = path.partition(":")
    try:
        found = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        raise ValueError(f"{path}: {error}; install the package or add its folder to PYTHONPATH") from None
    for part in name.split("."):
        found = getattr(found, part, None)
    if not callable(found):
        raise ValueError(f"{path}: {module_name} has no function {name}")
    return found


@registry.register("custom")
class CustomReward:
    """Any finite number a response, as the function returns it."""

    config_class = CustomConfig

    def __init__(self, config: CustomConfig, limits: RewardsConfig):
        self.config = config
        try:
            self.function = load(config.path)
        except ValueError as error:
            raise UserError("train.reward.path", str(error), "correct the path") from None

    def score(self, rows: list[dict[str, Any]], responses: list[str], against: str) -> list[float]:
        """Raises UserError on a value that is no finite number, and whatever the function raises."""
        seen = [{key: value for key, value in row.items() if key not in _TRUTH} | {"label": row[against]} for row in rows]
        calls = list(zip(seen, responses, strict=True))
        if inspect.iscoroutinefunction(self.function) or inspect.iscoroutinefunction(getattr(self.function, "__call__", None)):  # noqa: B004
            # In a thread of its own: the caller may be inside an event loop already, as in a notebook.
            with ThreadPoolExecutor(1) as thread:
                values = thread.submit(asyncio.run, self._gather(calls)).result()
        else:
            values = [self.function(row, response) for row, response in calls]
        return [self._checked(value, row) for value, row in zip(values, rows, strict=True)]

    async def _gather(self, calls: list[tuple[dict[str, Any], str]]) -> list[Any]:
        free = asyncio.Semaphore(self.config.concurrency)

        async def one(row: dict[str, Any], response: str) -> Any:
            async with free:
                return await self.function(row, response)

        return await asyncio.gather(*(one(row, response) for row, response in calls))

    def _checked(self, value: Any, row: dict[str, Any]) -> float:
        try:
            number = float(value)
        except (TypeError, ValueError):
            number = math.nan
        if not math.isfinite(number):
            problem = f"{self.config.path} returned {value!r} for row {row.get('row_id')!r}"
            raise UserError("train.reward.path", problem, "return a finite number")
        return number
