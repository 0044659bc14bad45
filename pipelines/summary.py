"""What a person reads at the end of a run and across runs, from the parent runs in MLflow. Needs no torch."""

from __future__ import annotations

from typing import Any

from dfpo_core import promote, tracking
from dfpo_core.config import PipelineConfig

SPLITS = (("id_test", "in domain"), ("ood_test", "out of domain"))
ROWS = (
    ("base", "accuracy_base"),
    ("SFT", "accuracy_sft"),
    ("{algorithm}", "accuracy"),
    ("champion before", "accuracy_champion"),
    ("{algorithm} - SFT", "gain_over_sft"),
    ("{algorithm} - base", "gain_over_base"),
)


def parent_of(config: PipelineConfig, pipeline_run_id: str) -> Any | None:
    """The parent run of a pipeline run, or None where preflight made none. Raises UserError when the store cannot be reached."""
    experiment = tracking.ensure_store(config)
    client = tracking.connect(tracking.tracking_uri(config))
    run_id = tracking.find_parent(client, experiment, pipeline_run_id) if pipeline_run_id else None
    return client.get_run(run_id) if run_id else None


def failure_of(parent: Any | None) -> tuple[str, int]:
    """The reason that a failed step left on the parent run, and the exit code: 2 for a user's mistake, 1 for a failure."""
    tags = parent.data.tags if parent else {}
    if "dfpo.error" in tags:
        return tags["dfpo.error"], 2
    return tags.get("dfpo.failure", ""), 1


def render_run(parent: Any) -> str:
    """Accuracy of each model in and out of domain with its interval, and the paired differences."""
    algorithm = parent.data.tags["dfpo.algorithm"].upper()
    lines = [f"{'accuracy':<18}" + "".join(f"{title:<32}" for _, title in SPLITS)]
    for title, name in ROWS:
        cells = [_interval(parent.data.metrics, f"eval/{split}/all/{name}", "+" if "gain" in name else "") for split, _ in SPLITS]
        if any(cell != "-" for cell in cells):
            lines.append(f"{title.format(algorithm=algorithm):<18}" + "".join(f"{cell:<32}" for cell in cells))
    return "\n".join(line.rstrip() for line in lines)


def render_decision(config: PipelineConfig, parent: Any) -> str:
    """The registered version, its aliases, and why the gate decided as it did."""
    row = promote.compare(tracking.tracking_uri(config), run_ids=[parent.info.run_id])[0]
    tags = parent.data.tags
    model = config.promote.registered_model
    return f"registered: {model} version {row['version']}, alias {row['aliases'] or 'none'}\ngate: {tags['dfpo.decision']}"


def render_comparison(rows: list[dict[str, Any]]) -> str:
    """One line a pipeline run (rows of `promote.compare`): what was run, accuracies in per cent with intervals, version and aliases."""
    columns = [("run_id", "run"), ("name", "name"), ("status", "status"), ("algorithm", "algorithm"), ("noise", "noise"), ("seed", "seed")]
    accuracies = [(f"{model}_{split}", f"{model} {split.upper()}") for split in ("id", "ood") for model in ("base", "sft", "trained")]
    table = [[title for _, title in (*columns, *accuracies)] + ["version", "alias"]]
    for row in rows:
        cells = [str(row[key] or "-") for key, _ in columns] + [_interval(row, key) for key, _ in accuracies]
        table.append([*cells, row["version"] or "-", row["aliases"] or "-"])
    widths = [max(len(line[column]) for line in table) for column in range(len(table[0]))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in table)


def _interval(values: dict[str, Any], key: str, sign: str = "") -> str:
    bounds = [values.get(f"{key}{bound}") for bound in ("", "_low", "_high")]
    if None in bounds:
        return "-"
    mean, low, high = (100 * bound for bound in bounds)
    return f"{mean:{sign}.1f} % [{low:{sign}.1f}, {high:{sign}.1f}]"
