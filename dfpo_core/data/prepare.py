"""prepare_data: sources become train, id_test and ood_test Parquet files without a question in common.

Two rows are the same question when their normalised texts and options agree (`sources.question_key`). Each question is kept once:
in an explicit id_test first, then in ood_test, then in train. When id_test has no sources of its own it takes the `id_test_size`
training questions with the smallest hash of (seed, question): a function of the questions, not of their order in a file.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from dfpo_core.config import DataConfig, SourceConfig, parse_config
from dfpo_core.data.sources import SCHEMA, SourceRows, question_key, read_source
from dfpo_core.errors import UserError
from dfpo_core.storage import atomic_directory

SPLITS = ("train", "id_test", "ood_test")


def run(config: str, parent_run_id: str, output: str) -> dict[str, float]:
    """The step: read, validate, split and write `output` (a directory); returns the logged metrics.

    `output` gets train.parquet, id_test.parquet, ood_test.parquet, rejects.jsonl and report.json, all or nothing.
    ood_test.parquet has no rows when no ood_test source is configured.
    """
    from dfpo_core.tracking import step_run

    settings = parse_config(json.loads(config))
    with step_run(settings, "prepare_data", parent_run_id) as step:
        read = read_sources(settings.data, settings.seed)
        rejects = [reject for sources in read.values() for source in sources for reject in source.rejects]
        if rejects:
            step.log_table("rejects.json", rejects)
        check_rejects(read, settings.data.max_reject_fraction)
        tables, removed = split(read, settings.data, settings.seed)
        report = _report(read, tables, removed)
        with atomic_directory(output) as folder:
            for name in SPLITS:
                pq.write_table(tables[name], folder / f"{name}.parquet")
            (folder / "rejects.jsonl").write_text("".join(json.dumps(reject) + "\n" for reject in rejects), encoding="utf-8")
            (folder / "report.json").write_text(json.dumps(report, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        step.log_metrics(report["metrics"])
        step.log_table("sources.json", report["sources"])
        step.log_artifact(str(Path(output) / "report.json"), "data")
        _log_datasets(step, Path(output), report)
    return report["metrics"]


def _log_datasets(step: Any, folder: Path, report: dict[str, Any]) -> None:
    for name in SPLITS:
        sources = [source for source in report["sources"] if source["split"] == name]
        tags = {
            "sha256": hashlib.sha256((folder / f"{name}.parquet").read_bytes()).hexdigest(),
            "sources": ", ".join(source["origin"] for source in sources) or "split off from train",
            "licence": ", ".join(sorted({licence for source in sources for licence in source["licences"]})),
        }
        step.log_dataset(str(folder / f"{name}.parquet"), name, "training" if name == "train" else "testing", tags)


def read_sources(data: DataConfig, seed: int) -> dict[str, list[SourceRows]]:
    """Every configured source by split. Raises UserError when one cannot be read at all."""
    configured: dict[str, list[SourceConfig]] = {name: getattr(data, name) for name in SPLITS}
    return {
        name: [read_source(source, seed, f"data.{name}.{index}", data.folder) for index, source in enumerate(sources)]
        for name, sources in configured.items()
    }


def check_rejects(read: dict[str, list[SourceRows]], allowed: float) -> None:
    """Raises one UserError when any source has a larger share of bad rows than `allowed`; it names the first bad row."""
    failed = [s for sources in read.values() for s in sources if s.rejects and len(s.rejects) > allowed * s.rows_read]
    if not failed:
        return
    source = failed[0]
    first = source.rejects[0]
    where = f"{first['file']} line {first['line']}, field {first['field']}: {first['reason']}"
    more = f"; {len(failed) - 1} more sources have bad rows" if failed[1:] else ""
    fix = f"correct the rows or {source.field} (columns, reward), or raise data.max_reject_fraction"
    raise UserError(source.field, f"{len(source.rejects)} of {source.rows_read} rows are unusable, the first is {where}{more}", fix)


def split(read: dict[str, list[SourceRows]], data: DataConfig, seed: int) -> tuple[dict[str, pa.Table], dict[str, int]]:
    """The three tables, sampled to `size`, without common questions; and how many rows each lost as duplicates.

    Raises:
        UserError: an empty split, an id that names two different rows, or an id_test_size that leaves nothing to train on.
    """
    tables, removed, taken = {}, {}, set()
    for name in ("id_test", "ood_test", "train"):
        sources = [_sample(rows.table, source.size, seed) for rows, source in zip(read[name], getattr(data, name), strict=True)]
        table = pa.concat_tables(sources) if sources else SCHEMA.empty_table()
        keep = _first_of_each(_keys(table), taken)
        tables[name], removed[name] = table.filter(pa.array(keep, pa.bool_())), table.num_rows - sum(keep)
        if sources and not sum(keep):
            raise UserError(f"data.{name}", "the split is empty once duplicates are removed", "give it a source with other questions")
    if not data.id_test:
        tables["train"], tables["id_test"] = _split_off(tables["train"], data.id_test_size, seed)
    _check_ids(tables)
    return tables, removed


def _keys(table: pa.Table) -> list[str]:
    return [question_key(q, c) for q, c in zip(table["question"].to_pylist(), table["choices"].to_pylist(), strict=True)]


def _first_of_each(keys: list[str], taken: set[str]) -> list[bool]:
    """Whether each key is new; adds the new ones to `taken`."""
    keep = []
    for key in keys:
        keep.append(key not in taken)
        taken.add(key)
    return keep


def _order(table: pa.Table, seed: int, purpose: str) -> np.ndarray:
    """Row numbers sorted by a hash of (purpose, seed, question)."""
    digests = [hashlib.sha256(f"{purpose} {seed} {key}".encode()).digest() for key in _keys(table)]
    return np.array(sorted(range(len(digests)), key=digests.__getitem__), dtype=np.int64)


def _sample(table: pa.Table, size: int, seed: int) -> pa.Table:
    """`size` rows picked by question hash, in their old order; all for 0. File order carries no weight: files come sorted."""
    if size == 0 or size >= table.num_rows:
        return table
    return table.take(pa.array(np.sort(_order(table, seed, "sample")[:size])))


def _split_off(table: pa.Table, size: int, seed: int) -> tuple[pa.Table, pa.Table]:
    if size >= table.num_rows:
        problem = f"{size} rows are to be split off from {table.num_rows} training rows, which leaves none to train on"
        raise UserError("data.id_test_size", problem, "make it smaller, or add training rows")
    order = _order(table, seed, "id_test")
    return table.take(pa.array(np.sort(order[size:]))), table.take(pa.array(np.sort(order[:size])))


def _check_ids(tables: dict[str, pa.Table]) -> None:
    ids = pa.concat_tables([table.select(["row_id", "source"]) for table in tables.values()])
    counts = pc.value_counts(ids["row_id"])
    twice = [entry["values"].as_py() for entry in counts if entry["counts"].as_py() > 1] if len(counts) < ids.num_rows else []
    if twice:
        origins = " and ".join(sorted(set(ids.filter(pc.equal(ids["row_id"], twice[0]))["source"].to_pylist())))
        problem = f"{len(twice)} ids name two different questions, the first is {twice[0]!r} in {origins}"
        raise UserError("data", problem, "give the sources different domains, or set id_column")


def _report(read: dict[str, list[SourceRows]], tables: dict[str, pa.Table], removed: dict[str, int]) -> dict[str, Any]:
    metrics: dict[str, float] = {}
    for name, table in tables.items():
        metrics[f"data/{name}/rows"] = table.num_rows
        metrics[f"data/{name}/duplicates_removed"] = removed[name]
        for entry in pc.value_counts(table["domain"]).to_pylist():
            metrics[f"data/{name}/{entry['values']}/rows"] = entry["counts"]
        if table.num_rows:
            for column in ("question", "answer"):
                lengths = pc.utf8_length(table[column])
                metrics[f"data/{name}/{column}_characters_mean"] = pc.mean(lengths).as_py()
                metrics[f"data/{name}/{column}_characters_max"] = pc.max(lengths).as_py()
    sources = [_source_entry(name, source) for name, group in read.items() for source in group]
    metrics["data/rows_rejected"] = sum(source["rows_rejected"] for source in sources)
    return {"metrics": {key: float(value) for key, value in metrics.items()}, "sources": sources}


def _source_entry(split_name: str, source: SourceRows) -> dict[str, Any]:
    return {
        "split": split_name,
        "field": source.field,
        "origin": source.origin,
        "sha256": source.sha256,
        "licences": sorted({licence for licence in pc.unique(source.table["licence"]).to_pylist() if licence}),
        "rows_read": source.rows_read,
        "rows_rejected": len(source.rejects),
    }
