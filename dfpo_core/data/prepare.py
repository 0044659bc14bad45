"""prepare_data: sources become train, id_test and ood_test Parquet files without a question in common.

Rows go through these gates, and every row that stops at one is counted in the report and named in a file:

    read         rows that are not valid are rejected (rejects.jsonl); more of them than `max_reject_fraction` fail the step
    sample       `size` rows of a source, picked by question hash
    fit          prompts longer than `prompt.max_prompt_tokens` fail the step, or their rows are dropped (removed.jsonl)
    duplicates   a question is kept once: in an explicit id_test first, then in ood_test, then in train (removed.jsonl)
    split off    without id_test sources, the `id_test_size` training questions with the smallest hash of (seed, question) become
                 id_test: a function of the questions, not of their order in a file
    overlap      training rows that share `overlap_words` words in a row with a test question leave (removed.jsonl)
"""

from __future__ import annotations

import hashlib
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from dfpo_core.config import DataConfig, PipelineConfig, PromptConfig, SourceConfig, parse_config
from dfpo_core.data import hygiene, prompts, report
from dfpo_core.data.sources import SCHEMA, SourceRows, read_source
from dfpo_core.errors import UserError
from dfpo_core.storage import atomic_directory

SPLITS = ("train", "id_test", "ood_test")
# Columns that rows have on their way here, and not in the files.
_PLACE = pa.schema([("field", pa.string()), ("file", pa.string()), ("line", pa.int64())])
ON_THE_WAY = pa.schema([*SCHEMA, *_PLACE, ("prompt_tokens", pa.int32())])


def run(config: str, parent_run_id: str, output: str) -> dict[str, float]:
    """The step: read, validate, split and write `output` (a directory); returns the logged metrics.

    `output` gets train.parquet, id_test.parquet, ood_test.parquet, rejects.jsonl, removed.jsonl, report.json and data_report.html,
    all or nothing. ood_test.parquet has no rows when no ood_test source is configured.
    """
    from dfpo_core.models import load_tokenizer
    from dfpo_core.tracking import step_run

    settings = parse_config(json.loads(config))
    with step_run(settings, "prepare_data", parent_run_id) as step:
        read = read_sources(settings.data, settings.seed)
        rejects = [reject for sources in read.values() for source in sources for reject in source.rejects]
        if rejects:
            step.log_table("rejects.json", rejects)
        check_rejects(read, settings.data.max_reject_fraction)
        taken = take(read, settings.data, settings.seed)
        fitting, too_long = fit(taken, load_tokenizer(settings.model, settings.home_path), settings.prompt)
        prepared = split(fitting, settings.data, settings.seed)
        removed = too_long + prepared.removed
        facts = describe(settings, read, taken, fitting, prepared, removed)
        with atomic_directory(output) as folder:
            for name in SPLITS:
                pq.write_table(prepared.tables[name].select(SCHEMA.names), folder / f"{name}.parquet")
            _write_lines(folder / "rejects.jsonl", rejects)
            _write_lines(folder / "removed.jsonl", removed)
            (folder / report.FACTS).write_text(json.dumps(facts, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
            report.write(folder)
        for warning in facts["warnings"]:
            print(f"warning: {warning}", file=sys.stderr)
        step.log_metrics(facts["metrics"])
        step.log_table("sources.json", facts["sources"])
        for name in ("rejects.jsonl", "removed.jsonl", report.FACTS):
            step.log_artifact(Path(output, name), "data")
        step.log_artifact(Path(output, report.PAGE))
        if facts["unlicensed"]:
            step.set_tags({"dfpo.data.unlicensed": ", ".join(facts["unlicensed"])})
        _log_datasets(step, Path(output), facts)
    return facts["metrics"]


def _write_lines(path: Path, entries: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(entry, ensure_ascii=False) + "\n" for entry in entries), encoding="utf-8")


def _log_datasets(step: Any, folder: Path, facts: dict[str, Any]) -> None:
    """The three files and every source, each with its sha256 and licence."""
    for name in SPLITS:
        sources = [source for source in facts["sources"] if source["split"] == name]
        tags = {
            "sha256": hashlib.sha256((folder / f"{name}.parquet").read_bytes()).hexdigest(),
            "sources": ", ".join(source["origin"] for source in sources) or "split off from train",
            "licence": ", ".join(sorted({licence for source in sources for licence in source["licences"]})) or "none",
        }
        step.log_dataset(str(folder / f"{name}.parquet"), name, "training" if name == "train" else "testing", tags)
    for source in facts["sources"]:
        tags = {"sha256": source["sha256"], "licence": ", ".join(source["licences"]) or "none", "field": source["field"]}
        context = "training source" if source["split"] == "train" else "testing source"
        step.log_source(source["origin"], source["sha256"], source["read"], context, tags)


# Gates


def read_sources(data: DataConfig, seed: int) -> dict[str, list[SourceRows]]:
    """Every configured source by split. Raises UserError when one cannot be read at all."""
    configured: dict[str, list[SourceConfig]] = {name: getattr(data, name) for name in SPLITS}
    return {
        name: [read_source(source, seed, f"data.{name}.{index}", data.folder) for index, source in enumerate(sources)]
        for name, sources in configured.items()
    }


def prepared_tables(data: DataConfig, seed: int) -> dict[str, pa.Table]:
    """The three splits in memory, without a report: what `run` writes, but for prompts too long for a model. Raises UserError."""
    read = read_sources(data, seed)
    check_rejects(read, data.max_reject_fraction)
    return {name: table.select(SCHEMA.names) for name, table in split(take(read, data, seed), data, seed).tables.items()}


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


def take(read: dict[str, list[SourceRows]], data: DataConfig, seed: int) -> dict[str, pa.Table]:
    """One table a split, with the columns of ON_THE_WAY: `size` rows of each source; prompt_tokens are null so far."""
    tables = {}
    for name, sources in read.items():
        parts = [_with_place(source) for source in sources]
        parts = [_sample(part, source.size, seed) for part, source in zip(parts, getattr(data, name), strict=True)]
        tables[name] = pa.concat_tables(parts) if parts else ON_THE_WAY.empty_table()
    return tables


def _with_place(source: SourceRows) -> pa.Table:
    rows = source.table.num_rows
    place = [pa.repeat(source.field, rows), pa.repeat(source.origin, rows), pa.array(source.lines, pa.int64())]
    return pa.table([*source.table.columns, *place, pa.nulls(rows, pa.int32())], schema=ON_THE_WAY)


def fit(tables: dict[str, pa.Table], tokenizer: Any, prompt: PromptConfig) -> tuple[dict[str, pa.Table], list[dict[str, Any]]]:
    """The tables with prompt_tokens filled in and without the rows whose prompt is too long; and an entry on each of those.

    Raises:
        UserError: a prompt is too long and `prompt.too_long` is refuse.
    """
    fitting, entries, too_long = {}, [], []
    for name, table in tables.items():
        lengths = np.array([len(ids) for ids in prompts.tokenize(tokenizer, table.to_pylist(), prompt)], dtype=np.int32)
        table = table.set_column(table.schema.get_field_index("prompt_tokens"), "prompt_tokens", pa.array(lengths, pa.int32()))
        keep = lengths <= prompt.max_prompt_tokens
        for row in table.filter(pa.array(~keep, pa.bool_())).select(["row_id", *_PLACE.names, "prompt_tokens"]).to_pylist():
            too_long.append((row["row_id"], row["prompt_tokens"]))
            reason = f"its prompt has {row['prompt_tokens']} tokens, prompt.max_prompt_tokens is {prompt.max_prompt_tokens}"
            entries.append(_removed(row, name, "too_long", reason))
        fitting[name] = table.filter(pa.array(keep, pa.bool_()))
    if too_long and prompt.too_long == "refuse":
        raise prompts.too_long_error(too_long, sum(table.num_rows for table in tables.values()), prompt)
    return fitting, entries


def _removed(row: dict[str, Any], split_name: str, gate: str, reason: str) -> dict[str, Any]:
    place = {"source": row["field"], "file": row["file"], "line": row["line"], "row_id": row["row_id"]}
    return {"split": split_name, **place, "gate": gate, "reason": reason}


@dataclass(frozen=True)
class Prepared:
    """The three tables (columns of ON_THE_WAY) without a question in common, and an entry on every row that left."""

    tables: dict[str, pa.Table]
    removed: list[dict[str, Any]]  # split, source, file, line, row_id, gate (duplicate or overlap), reason
    overlaps: list[dict[str, Any]]  # train_row_id, test_row_id, words; also of rows that were left in


def split(tables: dict[str, pa.Table], data: DataConfig, seed: int) -> Prepared:
    """Duplicates and overlaps removed, id_test split off.

    Raises:
        UserError: an empty split, an id that names two different rows, or an id_test_size that leaves nothing to train on.
    """
    kept, removed = _without_duplicates(tables, data)
    if not data.id_test:
        kept["train"], kept["id_test"] = _split_off(kept["train"], data.id_test_size, seed)
    _check_ids(kept)
    overlaps = _overlaps(kept, data)
    if data.overlap == "remove" and overlaps:
        leaving = {entry["train_row_id"]: entry for entry in overlaps}
        leaves = pc.is_in(kept["train"]["row_id"], pa.array(leaving))
        for row in kept["train"].filter(leaves).select(["row_id", *_PLACE.names]).to_pylist():
            entry = leaving[row["row_id"]]
            reason = f"shares {data.overlap_words} words in a row with the test question {entry['test_row_id']}: {entry['words']}"
            removed.append(_removed(row, "train", "overlap", reason))
        kept["train"] = kept["train"].filter(pc.invert(leaves))
        if not kept["train"].num_rows:
            problem = f"every training question shares {data.overlap_words} words in a row with a test question"
            raise UserError("data.train", problem, "give it a source with other questions, or set data.overlap to report")
    return Prepared({name: kept[name] for name in SPLITS}, removed, overlaps)


def _without_duplicates(tables: dict[str, pa.Table], data: DataConfig) -> tuple[dict[str, pa.Table], list[dict[str, Any]]]:
    """Each question once, and an entry on every copy that left."""
    kept, removed = {}, []
    first: dict[str, tuple[str, str]] = {}  # question: row id and answer of the row that is kept
    for name in ("id_test", "ood_test", "train"):
        table, keep = tables[name], []
        rows = table.select(["row_id", "answer", *_PLACE.names]).to_pylist()
        for row, key in zip(rows, hygiene.keys(table), strict=True):
            keep.append(key not in first)
            row_id, answer = first.setdefault(key, (row["row_id"], row["answer"]))
            if not keep[-1]:
                conflict = row["answer"] != answer
                other = f", there with the answer {answer!r}, here {row['answer']!r}" if conflict else ""
                removed.append(_removed(row, name, "duplicate", f"the same question as {row_id}{other}") | {"conflict": conflict})
        kept[name] = table.filter(pa.array(keep, pa.bool_()))
        if getattr(data, name) and not kept[name].num_rows:
            raise UserError(f"data.{name}", "no row is left without prompts that are too long and duplicates", "give it other questions")
    return kept, removed


def _overlaps(tables: dict[str, pa.Table], data: DataConfig) -> list[dict[str, Any]]:
    if not data.overlap_words:
        return []
    test = pa.concat_tables([tables["id_test"], tables["ood_test"]])
    found = hygiene.overlaps(tables["train"]["question"].to_pylist(), test["question"].to_pylist(), data.overlap_words, data.overlap_common)
    train_ids, test_ids = tables["train"]["row_id"], test["row_id"]
    return [{"train_row_id": train_ids[o.train_row].as_py(), "test_row_id": test_ids[o.test_row].as_py(), "words": o.words} for o in found]


def _order(table: pa.Table, seed: int, purpose: str) -> np.ndarray:
    """Row numbers sorted by a hash of (purpose, seed, question)."""
    digests = [hashlib.sha256(f"{purpose} {seed} {key}".encode()).digest() for key in hygiene.keys(table)]
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


# What happened


def describe(
    settings: PipelineConfig,
    read: dict[str, list[SourceRows]],
    taken: dict[str, pa.Table],
    fitting: dict[str, pa.Table],
    prepared: Prepared,
    removed: list[dict[str, Any]],
) -> dict[str, Any]:
    """The content of report.json: metrics, sources with what every gate let through, lengths, overlaps, estimates, warnings."""
    sources = [_source_entry(name, source, taken[name], removed) for name, group in read.items() for source in group]
    unlicensed = [source["field"] for source in sources if source["unlicensed_rows"]]
    before = pa.concat_tables([table for table in fitting.values() if table.num_rows])
    estimates = hygiene.noise_estimates(before, "answer", settings.seed)
    lengths = report.lengths(prepared.tables)
    rejects = [reject for group in read.values() for source in group for reject in source.rejects]
    metrics = _metrics(prepared, sources, removed, lengths)
    metrics["data/sources_without_licence"] = len(unlicensed)
    metrics |= report.estimate_metrics(estimates)
    return {
        "name": settings.name,
        "seed": settings.seed,
        "model": settings.model,
        "metrics": {key: float(value) for key, value in metrics.items()},
        "sources": sources,
        "unlicensed": unlicensed,
        "lengths": lengths,
        "overlap": {"words": settings.data.overlap_words, "removed": settings.data.overlap == "remove", "count": len(prepared.overlaps)},
        "overlap_examples": _with_questions(prepared.overlaps[: report.SHOWN], fitting),
        "duplicate_examples": [entry for entry in removed if entry.get("conflict")][: report.SHOWN],
        "rejects": rejects[: report.SHOWN],
        "estimates": estimates,
        "warnings": _warnings(sources, removed, len(prepared.overlaps), settings),
    }


def _source_entry(split_name: str, source: SourceRows, taken: pa.Table, removed: list[dict[str, Any]]) -> dict[str, Any]:
    gates = {"too_long": 0, "duplicate": 0, "overlap": 0}
    for entry in removed:
        if entry["source"] == source.field:
            gates[entry["gate"]] += 1
    sampled = pc.sum(pc.equal(taken["field"], source.field)).as_py() or 0
    licences = source.table["licence"]
    return {
        "split": split_name,
        "field": source.field,
        "origin": source.origin,
        "sha256": source.sha256,
        "licences": sorted({licence for licence in pc.unique(licences).to_pylist() if licence}),
        "unlicensed_rows": pc.sum(pc.equal(licences, "")).as_py() or 0,
        "left_out": source.left_out,
        "read": source.rows_read,
        "rejected": len(source.rejects),
        "not_sampled": source.table.num_rows - sampled,
        **gates,
        "kept": sampled - sum(gates.values()),
    }


def _metrics(
    prepared: Prepared, sources: list[dict[str, Any]], removed: list[dict[str, Any]], lengths: dict[str, dict[str, Any]]
) -> dict[str, float]:
    metrics: dict[str, float] = {}
    for name, table in prepared.tables.items():
        metrics[f"data/{name}/rows"] = table.num_rows
        for gate, words in (("duplicate", "duplicates_removed"), ("overlap", "overlaps_removed"), ("too_long", "too_long_removed")):
            metrics[f"data/{name}/{words}"] = sum(entry["split"] == name and entry["gate"] == gate for entry in removed)
        for entry in pc.value_counts(table["domain"]).to_pylist():
            metrics[f"data/{name}/{entry['values']}/rows"] = entry["counts"]
        for measure, summary in lengths.get(name, {}).items():
            metrics |= {f"data/{name}/{measure}_{statistic}": summary[statistic] for statistic in ("mean", "p95", "max")}
    metrics["data/train/overlaps_found"] = len(prepared.overlaps)
    metrics["data/rows_rejected"] = sum(source["rejected"] for source in sources)
    return metrics


def _with_questions(overlaps: list[dict[str, Any]], tables: dict[str, pa.Table]) -> list[dict[str, Any]]:
    wanted = {entry[name] for entry in overlaps for name in ("train_row_id", "test_row_id")}
    found: dict[str, str] = {}
    for table in tables.values():
        rows = table.filter(pc.is_in(table["row_id"], pa.array(sorted(wanted), pa.string())))
        found |= dict(zip(rows["row_id"].to_pylist(), rows["question"].to_pylist(), strict=True))
    return [entry | {"train": found[entry["train_row_id"]], "test": found[entry["test_row_id"]]} for entry in overlaps]


def _warnings(sources: list[dict[str, Any]], removed: list[dict[str, Any]], overlaps: int, settings: PipelineConfig) -> list[str]:
    found = [
        f"{source['field']}: {source['origin']} has no licence for {source['unlicensed_rows']} rows"
        for source in sources
        if source["unlicensed_rows"]
    ]
    found += [
        f"{source['field']}: {source['rejected']} of {source['read']} rows are unusable, see rejects.jsonl"
        for source in sources
        if source["rejected"]
    ]
    too_long = sum(entry["gate"] == "too_long" for entry in removed)
    if too_long:
        found.append(
            f"{too_long} rows dropped: their prompts are longer than {settings.prompt.max_prompt_tokens} tokens, see removed.jsonl"
        )
    if overlaps:
        done = "removed" if settings.data.overlap == "remove" else "left in"
        found.append(f"{overlaps} training questions share {settings.data.overlap_words} words in a row with a test question; {done}")
    conflicting = sum(entry.get("conflict", False) for entry in removed)
    if conflicting:
        found.append(f"{conflicting} duplicate questions carry another answer than the copy that was kept, see removed.jsonl")
    return found
