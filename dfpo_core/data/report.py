"""The data report: one HTML page on what went in, what left and why, how long things are, and how noisy the labels are or look.

prepare_data writes the facts (report.json) and the page; noise_data writes the page again, with the noise it made.
"""

from __future__ import annotations

import json
from html import escape
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from dfpo_core.data import hygiene
from dfpo_core.html import page, section, table, text_cell

FACTS, PAGE = "report.json", "data_report.html"
SHOWN = 20  # rejects, overlaps and conflicting copies
EXAMPLES = 12  # rows before and after noise
JUDGED_ROWS = 200_000  # labels are judged on the first so many training rows
_BINS = 32
_SPLIT_NAMES = {"train": "Train", "id_test": "In domain", "ood_test": "Out of domain"}
_MEASURES = {"prompt_tokens": "Prompt, tokens", "question_characters": "Question, characters", "answer_characters": "Answer, characters"}
_ESTIMATES = {"votes": "Votes of a model", "duplicates": "Repeated questions", "near_duplicates": "Nearly repeated questions"}
_NOISY = ("row_id", "question", "clean_question", "answer", "label", "domain", "is_noisy", "noise_kind")


def lengths(tables: dict[str, pa.Table]) -> dict[str, dict[str, Any]]:
    """By split and measure: mean, median, p95, max, and the counts of a histogram that has the same bins (0 to `top`) for every split.

    Args:
        tables: columns question, answer and prompt_tokens; empty tables are passed over.
    """
    values = {
        name: {
            "prompt_tokens": rows["prompt_tokens"].to_numpy(),
            "question_characters": pc.utf8_length(rows["question"]).to_numpy(),
            "answer_characters": pc.utf8_length(rows["answer"]).to_numpy(),
        }
        for name, rows in tables.items()
        if rows.num_rows
    }
    tops = {measure: max(int(found[measure].max()) for found in values.values()) + 1 for measure in _MEASURES}
    return {name: {measure: _summary(found[measure], tops[measure]) for measure in _MEASURES} for name, found in values.items()}


def _summary(values: np.ndarray, top: int) -> dict[str, Any]:
    median, p95 = np.quantile(values, [0.5, 0.95])
    counts, _ = np.histogram(values, bins=min(_BINS, top), range=(0, top))
    statistics = {"mean": float(values.mean()), "median": float(median), "p95": float(p95), "max": float(values.max())}
    return {**statistics, "top": top, "counts": counts.tolist()}


def write(folder: str | Path, noise: dict[str, float] | None = None) -> dict[str, float]:
    """Write `folder`/data_report.html from the facts and the rows in `folder`; returns metrics, `data/label_noise_estimate/...`.

    Args:
        folder: what prepare_data or noise_data wrote: report.json, and train.parquet with a `label` column after noise_data.
        noise: the metrics of noise_data (`noise/rate_requested`, `noise/rate_measured`, ...).
    """
    folder = Path(folder)
    facts = json.loads((folder / FACTS).read_text(encoding="utf-8"))
    train = pq.ParquetFile(folder / "train.parquet")
    after = None
    if "label" in train.schema_arrow.names:
        estimates = hygiene.noise_estimates(_head(train), "label", facts["seed"])
        after = noise_facts(train) | {"metrics": noise or {}, "estimates": estimates}
    (folder / PAGE).write_text(render(facts, after), encoding="utf-8")
    return estimate_metrics(after["estimates"] if after else facts["estimates"])


def estimate_metrics(estimates: list[dict[str, Any]]) -> dict[str, float]:
    """`data/label_noise_estimate/<sign>`, with `_low` and `_high`."""
    bounds = (("", "estimate"), ("_low", "low"), ("_high", "high"))
    return {f"data/label_noise_estimate/{entry['name']}{suffix}": entry[key] for entry in estimates for suffix, key in bounds}


def _head(train: pq.ParquetFile) -> pa.Table:
    wanted = [name for name in ("question", "choices", "choice_labels", "label", "vote_share") if name in train.schema_arrow.names]
    batches, rows = [], 0
    for batch in train.iter_batches(columns=wanted):
        batches.append(batch.slice(0, JUDGED_ROWS - rows))
        rows += batches[-1].num_rows
        if rows == JUDGED_ROWS:
            break
    return pa.Table.from_batches(batches)


def noise_facts(train: pq.ParquetFile) -> dict[str, Any]:
    """Rows and wrong labels by domain, rows by kind of noise, and examples, some of every kind in every domain. Reads in batches."""
    columns = [name for name in _NOISY if name in train.schema_arrow.names]
    domains: dict[str, list[int]] = {}
    kinds: dict[str, int] = {}
    examples: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for batch in train.iter_batches(columns=columns):
        rows = _with_kind_of_change(pa.Table.from_batches([batch]))
        grouped = rows.group_by(["domain", "noise_kind"]).aggregate([("is_noisy", "sum"), ("is_noisy", "count")])
        for group in grouped.to_pylist():
            counts = domains.setdefault(group["domain"], [0, 0])
            counts[0] += group["is_noisy_count"]
            counts[1] += group["is_noisy_sum"] or 0
            kinds[group["noise_kind"]] = kinds.get(group["noise_kind"], 0) + group["is_noisy_count"]
            place = (group["noise_kind"], group["domain"])
            missing = EXAMPLES - len(examples.setdefault(place, []))
            if group["noise_kind"] != "none" and missing > 0:
                fits = pc.and_(pc.equal(rows["noise_kind"], place[0]), pc.equal(rows["domain"], place[1]))
                examples[place] += rows.filter(fits).slice(0, missing).to_pylist()
    shown = [row for turn in zip_longest(*(examples[place] for place in sorted(examples))) for row in turn if row]
    return {"domains": domains, "kinds": kinds, "examples": shown[:EXAMPLES]}


def _with_kind_of_change(rows: pa.Table) -> pa.Table:
    """noise_kind is `question` where the label is as it was and only the question changed."""
    if "clean_question" not in rows.column_names:
        return rows
    changed = pc.and_(pc.equal(rows["noise_kind"], "none"), pc.not_equal(rows["question"], rows["clean_question"]))
    kinds = pc.if_else(changed, "question", rows["noise_kind"])
    return rows.set_column(rows.schema.get_field_index("noise_kind"), "noise_kind", kinds)


# The page


def render(facts: dict[str, Any], noise: dict[str, Any] | None) -> str:
    """The page as HTML text. `noise` (`noise_facts`, with `metrics` and `estimates` of the labels that training sees) is None before
    noise_data."""
    rows = " · ".join(f"{int(facts['metrics'][f'data/{name}/rows']):,} {label.lower()}" for name, label in _SPLIT_NAMES.items())
    parts = [f'<h1>Data of {escape(facts["name"])}</h1><p class="soft">{escape(rows)} · seed {facts["seed"]}</p>\n', _warnings(facts)]
    parts.append(
        section(
            "Where rows went",
            _gates(facts),
            "Every row that was read is in one column. Line numbers and reasons are in rejects.jsonl and removed.jsonl.",
        )
    )
    parts.append(section("Splits by domain", _domains(facts)))
    parts.append(
        section("Lengths", _lengths(facts["lengths"]), f"Prompt tokens are those of {facts['model']}, template and examples included.")
    )
    if noise:
        parts.append(section("Noise that was made", _noise(noise), "On training labels only; the test splits are as they came."))
        if noise["examples"]:
            parts.append(section("Before and after noise", _noise_examples(noise["examples"])))
    parts.append(section("How noisy the labels look without the truth", _estimates(facts["estimates"], noise)))
    if facts["overlap_examples"]:
        parts.append(section("Overlap between train and test", _overlaps(facts)))
    if facts["duplicate_examples"]:
        parts.append(section("Copies with another answer", _entries(facts["duplicate_examples"]), "The copy that was met first is kept."))
    if facts["rejects"]:
        parts.append(section("Rejected rows", _rejects(facts["rejects"]), f"The first {SHOWN} at most; all are in rejects.jsonl."))
    parts.append(section("Sources", _sources(facts["sources"])))
    return page(f"Data of {facts['name']}", parts)


def _warnings(facts: dict[str, Any]) -> str:
    if not facts["warnings"]:
        return ""
    lines = "".join(f"<li>{escape(warning)}</li>" for warning in facts["warnings"])
    return f'<section class="banner bad"><h2 class="bad">To look at</h2><ul style="color: var(--ink)">{lines}</ul></section>\n'


def _gates(facts: dict[str, Any]) -> str:
    names = ("read", "rejected", "not_sampled", "too_long", "duplicate", "overlap", "kept")
    rows = [[_source_cell(source), *(f"{source[name]:,}" for name in names)] for source in facts["sources"]]
    totals = [f"<strong>{sum(source[name] for source in facts['sources']):,}</strong>" for name in names]
    head = ["Source", "Read", "Rejected", "Not sampled", "Too long", "Duplicate", "Overlap", "Kept"]
    return table(head, [*rows, ["<strong>All</strong>", *totals]])


def _source_cell(source: dict[str, Any]) -> str:
    """Where it is configured, what it read, and how many rows were not asked for (e.g. other subjects; they do not count as read)."""
    lines = [source["origin"], *(f"{count:,} rows left out: {reason}" for reason, count in source["left_out"].items())]
    return f"<code>{escape(source['field'])}</code>" + text_cell("\n".join(lines), 300, "soft")


def _domains(facts: dict[str, Any]) -> str:
    counts: dict[str, dict[str, int]] = {}
    for key, value in facts["metrics"].items():
        parts = key.split("/")
        if len(parts) == 4 and parts[3] == "rows":
            counts.setdefault(parts[2], {})[parts[1]] = int(value)
    most = max((value for entry in counts.values() for value in entry.values()), default=1)
    rows = [[escape(name), *(_bar(entry.get(split, 0), most) for split in _SPLIT_NAMES)] for name, entry in sorted(counts.items())]
    return table(["Domain", *_SPLIT_NAMES.values()], rows, numbers_from=99)


def _bar(count: int, most: int) -> str:
    if not count:
        return '<span class="soft">–</span>'
    width = max(2, round(120 * count / most))
    style = f"display:inline-block;height:.7em;width:{width}px;background:#2f6db5;border-radius:2px;margin-right:.5em"
    return f'<span style="{style}"></span>{count:,}'


def _lengths(found: dict[str, dict[str, Any]]) -> str:
    rows = []
    for measure, label in _MEASURES.items():
        for name, summaries in found.items():
            one = summaries[measure]
            numbers = [f"{one['mean']:.1f}", *(f"{one[statistic]:.0f}" for statistic in ("median", "p95", "max"))]
            rows.append([escape(label), escape(_SPLIT_NAMES[name]), _histogram(one), *numbers])
    return table(["Measure", "Split", "0 … longest", "Mean", "Median", "95 %", "Longest"], rows, numbers_from=3)


def _histogram(summary: dict[str, Any]) -> str:
    most, bars = max(summary["counts"]), []
    width = 192 / len(summary["counts"])
    for index, count in enumerate(summary["counts"]):
        height = 26 * count / most if count == 0 else max(1.0, 26 * count / most)
        bars.append(f'<rect x="{index * width:.1f}" y="{27 - height:.1f}" width="{max(1.0, width - 1):.1f}" height="{height:.1f}"/>')
    label = f"histogram from 0 to {summary['top'] - 1}"
    line = '<line x1="0" y1="27.5" x2="192" y2="27.5" stroke="#c5cdd6"/>'
    return f'<svg role="img" aria-label="{label}" width="192" height="28" fill="#2f6db5">{"".join(bars)}{line}</svg>'


def _noise(noise: dict[str, Any]) -> str:
    metrics = noise["metrics"]
    total, wrong = (sum(counts[i] for counts in noise["domains"].values()) for i in (0, 1))
    asked = metrics.get("noise/rate_requested")
    lead = f"<p><strong>{wrong / total:.1%}</strong> of {total:,} training labels are wrong by design"
    lead += f"; {asked:.1%} was asked for.</p>" if asked is not None else ".</p>"
    rows = [[escape(name), f"{count:,}", f"{bad:,}", f"{bad / count:.1%}"] for name, (count, bad) in sorted(noise["domains"].items())]
    by_domain = table(["Domain", "Rows", "Wrong labels", "Share"], rows)
    kinds = ", ".join(f"{escape(kind)} {count:,}" for kind, count in sorted(noise["kinds"].items()))
    others = {name: value for name, value in metrics.items() if not name.endswith(("rate_measured", "rate_requested"))}
    listed = (
        table(["Metric", "Value"], [[f"<code>{escape(name)}</code>", f"{value:g}"] for name, value in others.items()]) if others else ""
    )
    return f'{lead}{by_domain}<p class="soft" style="margin-top: .75rem">Rows by kind: {kinds}</p>{listed}'


def _noise_examples(examples: list[dict[str, Any]]) -> str:
    rows = []
    for row in examples:
        before = row.get("clean_question")
        question = text_cell(row["question"], 400) if before in (None, row["question"]) else _change(before, row["question"])
        label = _change(row["answer"], row["label"]) if row["answer"] != row["label"] else text_cell(row["answer"], 200, "short")
        rows.append([escape(row["noise_kind"]), question, label])
    return table(["Kind", "Question", "Label: before, after"], rows, numbers_from=99)


def _change(before: str, after: str | None) -> str:
    shown = text_cell(after, 300, "short bad") if after is not None else '<div class="text short bad">no label</div>'
    return text_cell(before, 300, "short good") + shown


def _estimates(came: list[dict[str, Any]], noise: dict[str, Any] | None) -> str:
    """The signs in the labels as they came, copies included, and in those that training sees, where it is without copies."""
    parts, truth = [], ""
    if noise:
        total, wrong = (sum(counts[i] for counts in noise["domains"].values()) for i in (0, 1))
        truth = f" Against the given answers, which stand for the truth here, it is {wrong / total:.1%}."
    found = [("as they came", "", came), ("that training sees", truth, noise["estimates"] if noise else None)]
    for which, known, estimates in found:
        if estimates:
            parts.append(f"<p>Labels {which}: the share of wrong ones that each sign points to.{known}</p>{_signs(estimates)}")
        elif estimates is not None:
            parts.append(f"<p>Labels {which}: nothing to go by, no question occurs twice and no model voted.{known}</p>")
    return "".join(parts)


def _signs(estimates: list[dict[str, Any]]) -> str:
    rows = []
    for entry in estimates:
        interval = f"{entry['low']:.1%} – {entry['high']:.1%}"
        reading = f'<div class="text">{escape(entry["why"])}</div>'
        rows.append([escape(_ESTIMATES[entry["name"]]), f"{entry['rows']:,}", f"{entry['estimate']:.1%}", interval, reading])
    return table(["Sign", "Rows", "Wrong labels", "95 % interval", "Reading"], rows, numbers_from=99)


def _overlaps(facts: dict[str, Any]) -> str:
    overlap = facts["overlap"]
    done = "left the training split" if overlap["removed"] else "stay in the training split"
    lead = f"<p>{overlap['count']:,} training questions share {overlap['words']} words in a row with a test question; they {done}.</p>"
    rows = [
        [text_cell(entry["train"], 300), text_cell(entry["test"], 300), text_cell(entry["words"], 200, "short")]
        for entry in facts["overlap_examples"]
    ]
    return lead + table(["Training question", "Test question", "Shared words"], rows, numbers_from=99)


def _entries(entries: list[dict[str, Any]]) -> str:
    rows = [
        [
            f"<code>{escape(entry['row_id'])}</code>",
            text_cell(f"{entry['file']} line {entry['line']}", 200),
            text_cell(entry["reason"], 300),
        ]
        for entry in entries
    ]
    return table(["Row", "Where", "Why"], rows, numbers_from=99)


def _rejects(rejects: list[dict[str, Any]]) -> str:
    rows = [
        [text_cell(reject["file"], 200), str(reject["line"]), escape(reject["field"]), text_cell(reject["reason"], 200)]
        for reject in rejects
    ]
    return table(["File", "Line", "Field", "Why"], rows, numbers_from=99)


def _sources(sources: list[dict[str, Any]]) -> str:
    rows = []
    for source in sources:
        licences = escape(", ".join(source["licences"]))
        if source["unlicensed_rows"]:
            licences += f' <span class="bad">none for {source["unlicensed_rows"]:,} rows</span>'
        rows.append(
            [
                f"<code>{escape(source['field'])}</code>",
                text_cell(source["origin"], 200),
                licences,
                f"<code>{source['sha256'][:16]}…</code>",
            ]
        )
    return table(["Source", "Read from", "Licence", "sha256"], rows, numbers_from=99)
