"""reasoning_gym: a family's own scorer decides, from the metadata that its rows carry; 1 where it gives at least 0.99.

Many families have several right answers, which their scorers know. The response's final answer is what stands in its last \\boxed{...}
or in <answer>...</answer>, or behind `answer is` or `answer:`; else it is the whole response. A wrong label (in training) is known to no
scorer: where the wanted answer is not the row's true one, the final answer must be that text.

Scorers give partial credit, raise on garbage, and some evaluate the answer as Python. They run in the pool of processes that are killed
at a time limit, with `eval` replaced by a reader of literals and `parse_expr` refusing what is no formula. A scorer that also likes
nonsense (one family's does, on some rows) decides nothing: then the final answer must be the wanted text.
"""

from __future__ import annotations

import json
from typing import Any

from dfpo_core.config import RewardsConfig, Section
from dfpo_core.errors import UserError
from dfpo_core.rewards import pool, registry
from dfpo_core.rewards.answers import after_last_mark, normalise_text

_LONGEST = 20_000  # characters of a final answer


class ReasoningGymConfig(Section):
    """It has no options."""


@registry.register("reasoning_gym")
class ReasoningGymReward:
    """0/1. Rows need `question`, `answer` and `metadata` as a reasoning_gym source writes it."""

    config_class = ReasoningGymConfig

    def __init__(self, config: ReasoningGymConfig, limits: RewardsConfig):
        self.limits = limits

    def score(self, rows: list[dict[str, Any]], responses: list[str], against: str) -> list[float]:
        """Raises UserError on a row without metadata."""
        finals = [final_text(response) for response in responses]
        scores = [float(_same(final, row[against])) for row, final in zip(rows, finals, strict=True)]
        # An answer as it was generated is right without asking; everything else about the truth is the scorer's to decide.
        asked = [
            index
            for index, (row, final) in enumerate(zip(rows, finals, strict=True))
            if _same(row[against], row["answer"]) and final != row["answer"] and 0 < len(final) <= _LONGEST
        ]
        arguments = [[_family(rows[i]), rows[i]["question"], rows[i]["answer"], rows[i]["metadata"], finals[i]] for i in asked]
        values = pool.check_all("dfpo_core.rewards.reasoning_gym_scorers:accepts", arguments, self.limits)
        for index, value in zip(asked, values, strict=True):
            scores[index] = value
        return scores


def final_text(response: str) -> str:
    """The final answer as text: several lines where a tag or a box holds several."""
    tagged = response.rpartition("</answer>")[0].rpartition("<answer>")
    if tagged[1]:
        return tagged[2].strip()
    return after_last_mark(response)[1].strip()


def _same(given: str, wanted: str) -> bool:
    return normalise_text(given) == normalise_text(wanted)


def _family(row: dict[str, Any]) -> str:
    try:
        return json.loads(row["metadata"])["source_dataset"]
    except (KeyError, TypeError, ValueError):
        problem = f"row {row.get('row_id')!r} has no metadata that names its family"
        raise UserError("reward", problem, "use it with a reasoning_gym source, or choose another reward") from None
