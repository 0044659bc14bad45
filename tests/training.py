"""A small training set-up that several test files share: the tiny profile's configuration, noised rows on disk, no tracking."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet

from dfpo_core import sft
from dfpo_core.config import PipelineConfig, parse_config
from dfpo_core.models import load_policy, save_policy

SOURCE = {"kind": "reasoning_gym", "name": "chain_sum", "size": 10}


class Untracked:
    """Stands where a step's MLflow run would: keeps what was logged."""

    run_id = "untracked"

    def __init__(self):
        self.metrics: dict[int, dict[str, float]] = {}
        self.tables: dict[str, list[dict]] = {}
        self.params: dict[str, Any] = {}
        self.figures: dict[str, Any] = {}

    def log_metrics(self, metrics, step=None):
        self.metrics.setdefault(step, {}).update(metrics)

    def log_params(self, params):
        self.params |= params

    def log_table(self, name, rows):
        self.tables[name] = rows

    def log_figure(self, name, figure):
        self.figures[name] = figure


def tiny_config(home: Path, train: dict[str, Any] | None = None, **changes: Any) -> PipelineConfig:
    """A configuration of scratch:tiny whose home is `home`."""
    small = {"steps": 4, "prompts_per_step": 4, "samples_per_prompt": 4, "max_new_tokens": 4, "micro_batch_prompts": 2, "save_every": 2}
    sft = {"steps": 3, "batch_size": 8, "micro_batch_size": 4, "learning_rate": 1e-3}
    values = {"model": "scratch:tiny", "home": str(home), "data": {"train": [SOURCE]}, "sft": sft, "train": small | (train or {})}
    return parse_config(values | changes)


def rows_of_sums(count: int = 16) -> list[dict[str, Any]]:
    """Rows as noise_data writes them: sums of two digits, every fourth label wrong by one."""
    rows = []
    for i in range(count):
        a, b = i % 5, i // 5
        wrong = i % 4 == 0
        rows.append(
            {
                "row_id": f"row-{i}",
                "question": f"{a}+{b}=",
                "answer": str(a + b),
                "label": str(a + b + wrong),
                "clean_answer": str(a + b),
                "is_noisy": wrong,
                "noise_kind": "plausible",
                "domain": "sums",
                "reward": "number",
                "source": "test",
                "licence": "none",
                "choices": None,
                "choice_labels": None,
            }
        )
    return rows


def warm_checkpoint(home: Path, steps: int = 30) -> str:
    """A checkpoint that has seen the sums for a moment, so that some rewards are 1 and many are 0."""
    config = tiny_config(home, sft={"steps": steps, "batch_size": 16, "micro_batch_size": 16, "learning_rate": 3e-3})
    model, tokenizer = load_policy("scratch:tiny", home)
    sft.train(model, tokenizer, rows_of_sums(), config, Untracked())
    save_policy(model, tokenizer, home / "sft")
    return str(home / "sft")


def write_rows(folder: Path, rows: list[dict[str, Any]]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), folder / "train.parquet")
    return folder
