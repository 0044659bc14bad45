"""Read question / answer rows: named data sets, reasoning-gym families, JSONL and Parquet (paths or fsspec URLs), hub data sets.

Every source becomes one Arrow table with the columns of SCHEMA. A row that does not fit is set aside with its file, line, field and
reason; whether that fails the step is decided by `data.max_reject_fraction` in `prepare`.

The columns of a row are listed in `dfpo_core.domains`. A numeric answer is cast to text; behind `####` (GSM8K's layout) only the
final number counts; a whole number that is no label is an index into the options (MMLU's layout).
"""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import io
import json
import os
import re
import string
from collections import Counter
from decimal import Decimal
from pathlib import PurePosixPath
from typing import Any

import pyarrow as pa

from dfpo_core import domains
from dfpo_core.config import ROW_REWARDS, SourceConfig
from dfpo_core.data import chains
from dfpo_core.environments import dialogue
from dfpo_core.errors import UserError
from dfpo_core.rewards import canonical_number, normalise_text

SCHEMA = pa.schema(
    [
        *((name, pa.string()) for name in ("row_id", "question", "answer", "domain", "reward", "source", "licence")),
        ("choices", pa.list_(pa.string())),
        ("choice_labels", pa.list_(pa.string())),
        ("metadata", pa.string()),  # a JSON object that a reward may need, or null
    ]
)
GYM_SEED_SPACING = 10**7  # item i of a family uses seed + i: seeds closer than a source's size would share items
_HUB_OPTIONS = {"split": "train", "config": None, "revision": None}
_NAMED_OPTIONS = ("split", "path", "subjects", "by_subject", "revision")
_GYM_LICENCE, _CHAINS_LICENCE = "Apache-2.0 (reasoning-gym)", "Apache-2.0 (generated)"
_Record = tuple[int, Any]  # line or row number from 1, and a dict (or a Rejected that says why there is none)


class Rejected(Exception):
    """Why one row cannot be used; caught for every row and collected, never shown as such."""

    def __init__(self, field: str, reason: str):
        self.field, self.reason = field, reason
        super().__init__(f"{field}: {reason}")


@dataclasses.dataclass(frozen=True)
class SourceRows:
    """What one source gave."""

    field: str  # where the configuration names it, e.g. data.train.0
    origin: str  # file, URL, hub id or gym:family
    table: pa.Table  # SCHEMA
    lines: list[int]  # of each row of the table: its line or row number in the source, from 1
    rejects: list[dict[str, Any]]  # source, file, line, field, reason
    left_out: dict[str, int]  # rows that the source holds but that were not asked for, by reason
    sha256: str  # of the file's bytes; of the rows for generators and hub data sets

    @property
    def rows_read(self) -> int:
        return self.table.num_rows + len(self.rejects)


@dataclasses.dataclass(frozen=True)
class _Read:
    """What a reader found, before validation."""

    records: list[_Record]
    sha256: str
    origin: str
    licence: str = ""  # that the source states about itself


def domain_of(source: SourceConfig) -> str:
    """The name used in metrics: the configured one, else the file's stem, the family or the last part of the hub id."""
    path = PurePosixPath(source.name)
    name = source.domain or (path.stem if source.kind in ("jsonl", "parquet") else path.name)
    return re.sub(r"[^\w.-]+", "-", name)


def read_source(source: SourceConfig, seed: int, field: str, folder: str = "") -> SourceRows:
    """Read and validate one source.

    Args:
        seed: the configuration's seed; reasoning-gym items depend on it.
        field: the configuration key of the source, for messages; under data.train a named data set gives its training split.
        folder: where local copies of named data sets are (data.folder).

    Raises:
        UserError: the source as a whole cannot be read. Single bad rows are returned in `rejects`.
    """
    named = domains.data_set(source.name, f"{field}.name") if source.kind == "dataset" else None
    read = _read_named(named, source, field, folder) if named else _READERS[source.kind](source, seed, field)
    rows, lines, rejects, seen, left_out = [], [], [], set(), Counter()
    for line, values in read.records:
        try:
            if named:
                values = _as_documented(values, named, source)
            row, generated = _row(values, source, read)
            if not generated and row["row_id"] in seen:
                raise Rejected(source.id_column, f"the id {str(values[source.id_column])!r} occurs twice")
        except domains.LeftOut as reason:
            left_out[str(reason)] += 1
            continue
        except Rejected as problem:
            rejects.append({"source": field, "file": read.origin, "line": line, "field": problem.field, "reason": problem.reason})
            continue
        seen.add(row["row_id"])
        rows.append(row)
        lines.append(line)
    if not rows and not rejects:
        why = f" that were asked for ({', '.join(left_out)})" if left_out else ""
        raise UserError(f"{field}.name", f"{read.origin} holds no rows{why}", "give a source with at least one row")
    return SourceRows(field, read.origin, pa.Table.from_pylist(rows, schema=SCHEMA), lines, rejects, dict(left_out), read.sha256)


def check_source(source: SourceConfig, field: str) -> None:
    """Fail on an unknown name, option or split of a generator or a data set, without reading rows. Hub ids are not looked up."""
    if source.kind == "dataset":
        _split_of(domains.data_set(source.name, f"{field}.name"), source, field)
    elif source.kind == "reasoning_gym":
        _gym_dataset(source, 0, field)
    elif source.kind == "chains":
        chains.check(source.name, source.options, field)
    elif source.kind == "hub":
        _hub_options(source, field)


def question_key(question: str, choices: list[str] | None) -> str:
    """What makes two questions the same: text in NFKC without case and surplus space, and the set of options."""
    return "\n".join([normalise_text(question), *sorted(normalise_text(choice) for choice in choices or ())])


# Readers


def _read_jsonl(source: SourceConfig, seed: int, field: str) -> _Read:
    digest = hashlib.sha256()
    records: list[_Record] = []
    with _open(source.name, field) as lines:
        for number, line in enumerate(lines, start=1):
            digest.update(line)
            if line.strip():
                records.append((number, _parse_line(line)))
    return _Read(records, digest.hexdigest(), source.name)


def _parse_line(line: bytes) -> Any:
    try:
        values = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError:
        return Rejected("line", "is not UTF-8 text")
    except (ValueError, RecursionError):
        return Rejected("line", "is not JSON")
    return values if isinstance(values, dict) else Rejected("line", "is not a JSON object")


def _read_parquet(source: SourceConfig, seed: int, field: str) -> _Read:
    table, sha256 = _parquet(source.name, field)
    _demand_columns(table.column_names, source, field)
    return _Read(list(enumerate(table.to_pylist(), start=1)), sha256, source.name)


def _parquet(name: str, field: str) -> tuple[pa.Table, str]:
    import pyarrow.parquet as pq

    with _open(name, field) as file:
        data = file.read()
    try:
        return pq.read_table(io.BytesIO(data)), hashlib.sha256(data).hexdigest()
    except (pa.ArrowException, OSError) as error:
        reason = str(error).splitlines()[0][:120]
        raise UserError(f"{field}.name", f"{name} is not readable Parquet ({reason})", "write the file again") from None


def _read_hub(source: SourceConfig, seed: int, field: str) -> _Read:
    options = _hub_options(source, field)
    rows = _load(source.name, options["config"], options["split"], options["revision"], field)
    _demand_columns(rows.column_names, source, field)
    return _digested(list(rows), _at(source.name, options["revision"]), rows.info.license or "")


def _load(name: str, config: str | None, split: str, revision: str | None, field: str):
    """The rows of a hub data set, of a local copy of one, or of a folder that `datasets` saved. Raises UserError."""
    try:
        import datasets
    except ImportError:
        raise UserError(f"{field}.kind", "the datasets package is not installed", "pip install 'dfpo[train]'") from None
    folder = os.path.expanduser(name)
    try:
        if _is_saved(folder):
            saved = datasets.load_from_disk(folder)
            return saved[split] if isinstance(saved, datasets.DatasetDict) else saved
        return datasets.load_dataset(folder if os.path.isdir(folder) else name, config, split=split, revision=revision)
    except (OSError, ValueError, RuntimeError, KeyError, datasets.exceptions.DatasetsError) as error:
        reason = str(error).splitlines()[0][:160] if str(error) else type(error).__name__
        fix = "check the id, options.split and options.config, and the connection to the hub"
        raise UserError(f"{field}.name", f"cannot load the hub data set {name!r} ({reason})", fix) from None


def _is_saved(folder: str) -> bool:
    """Whether `datasets` wrote the folder with save_to_disk."""
    return any(os.path.isfile(os.path.join(folder, name)) for name in ("state.json", "dataset_dict.json"))


def _read_gym(source: SourceConfig, seed: int, field: str) -> _Read:
    dataset = _gym_dataset(source, seed, field)
    try:
        items = [dataset[index] for index in range(source.size)]
    except (AssertionError, TypeError, ValueError) as error:
        problem = f"the family {source.name} fails to generate ({error})"
        raise UserError(f"{field}.name", problem, "choose another family or options") from None
    kept = {"source_options": source.options}  # a family's scorer may read them
    columns = source.question_column, source.answer_column, source.metadata_column
    rows = [dict(zip(columns, (item["question"], item["answer"], item["metadata"] | kept), strict=True)) for item in items]
    return _digested(rows, f"gym:{source.name}", _GYM_LICENCE)


def _read_chains(source: SourceConfig, seed: int, field: str) -> _Read:
    options = chains.check(source.name, source.options, field)
    rows = chains.rows(source.name, source.size, _gym_seed(source, seed, field), **options)
    return _digested(rows, f"chains:{source.name}", _CHAINS_LICENCE)


_READERS = {"jsonl": _read_jsonl, "parquet": _read_parquet, "hub": _read_hub, "reasoning_gym": _read_gym, "chains": _read_chains}


def _at(name: str, revision: str | None) -> str:
    return f"{name}@{revision}" if revision else name


def _digested(rows: list[dict[str, Any]], origin: str, licence: str = "") -> _Read:
    digest = hashlib.sha256()
    for row in rows:
        digest.update(json.dumps(row, sort_keys=True, default=str).encode())
    return _Read(list(enumerate(rows, start=1)), digest.hexdigest(), origin, licence)


# Named data sets


def _read_named(entry: domains.DataSet, source: SourceConfig, field: str, folder: str) -> _Read:
    """A named data set from `options.path`, else from `folder` where it is there, else from the hub."""
    given = source.options.get("path")
    read = _read_table(entry, _split_of(entry, source, field), source, field, folder, given)
    for column, table in entry.join.items():
        beside = given.rpartition("/")[0] or "." if given else folder
        rows = [values for _, values in _read_table(entry, table, source, field, beside).records if isinstance(values, dict)]
        by_id = {values.get("id"): values for values in rows}
        read = dataclasses.replace(read, records=[(line, _joined(values, column, by_id)) for line, values in read.records])
    return read


def _joined(values: Any, column: str, by_id: dict[Any, dict[str, Any]]) -> Any:
    """The row with the row that `column` names in its place; a Rejected where there is none."""
    name = values.get(column) if isinstance(values, dict) else None
    if not isinstance(name, str):
        return values
    return values | {column: by_id[name]} if name in by_id else Rejected(column, f"{_short(name)} is not in the table of that name")


def _read_table(entry: domains.DataSet, split: domains.Split, source: SourceConfig, field: str, folder: str, given: str = "") -> _Read:
    place = given or _local_copy(entry, split, folder, field) or entry.hub
    origin = source.model_copy(update={"name": place})
    if place.endswith(".jsonl"):
        return _read_jsonl(origin, 0, field)
    if place.endswith(".parquet"):
        table, sha256 = _parquet(place, field)
        return _Read(list(enumerate(table.to_pylist(), start=1)), sha256, place)
    revision = source.options.get("revision") if place == entry.hub else None
    parts = [_load(place, config, split.hub, revision, field) for config in _configs(entry, place)]
    return _digested([row for part in parts for row in part], _at(place, revision), parts[0].info.license or "")


def _configs(entry: domains.DataSet, place: str) -> tuple[str | None, ...]:
    """The configurations to read at `place`: a local copy may lack the card that lists them, and is then one table."""
    folder = os.path.expanduser(place)
    if entry.configs and os.path.isdir(folder):
        import datasets

        listed = [] if _is_saved(folder) else datasets.get_dataset_config_names(folder)
        return entry.configs if set(entry.configs) <= set(listed) else (None,)
    return entry.configs or (None,)


def _split_of(entry: domains.DataSet, source: SourceConfig, field: str) -> domains.Split:
    """The split that is asked for: `options.split`, else train under data.train and test elsewhere. Raises UserError."""
    _refuse_unknown(source.options, list(_NAMED_OPTIONS), field, f"the data set {source.name}")
    wanted = source.options.get("split") or ("train" if field.split(".")[1:2] == ["train"] else "test")
    if wanted not in entry.splits:
        problem = f"the data set {source.name} has no split {wanted!r}"
        raise UserError(f"{field}.options.split", problem, f"choose one of: {', '.join(entry.splits)}")
    return entry.splits[wanted]


def _local_copy(entry: domains.DataSet, split: domains.Split, folder: str, field: str) -> str | None:
    """The file or folder in `folder` that holds the split: STEM.jsonl, STEM.parquet, STEM/, or a copy of the hub's repository under
    its id or the last part of it. None where there is none."""
    if not folder:
        return None
    import fsspec

    try:
        files, root = fsspec.core.url_to_fs(folder)
        if not files.isdir(root):
            raise UserError("data.folder", f"there is no folder {folder}", "give an existing folder, or leave it empty")
        names = f"{split.file}.jsonl", f"{split.file}.parquet", split.file, entry.hub, entry.hub.rpartition("/")[2]
        found = next((name for name in names if files.exists(f"{root}/{name}")), None)
    except (ImportError, OSError, ValueError) as error:
        raise UserError("data.folder", f"cannot look into {folder} ({error})", "give a readable folder or URL") from None
    return found and f"{os.path.expanduser(folder).rstrip('/')}/{found}"


def _as_documented(values: Any, entry: domains.DataSet, source: SourceConfig) -> Any:
    """A row of a named data set in the documented columns. Raises Rejected, and LeftOut for a subject that is not asked for."""
    if isinstance(values, Rejected):
        return values
    if entry.columns and all(name in values for name in entry.columns.values()):
        hidden = {source.metadata_column: None}  # the hub's column of that name, where there is one, is not ours
        values = {**values, **hidden, **{ours: values[theirs] for ours, theirs in entry.columns.items()}}
        try:
            values = entry.convert(values) if entry.convert else values
        except ValueError as problem:
            raise Rejected("answer", str(problem)) from None
    subjects = source.options.get("subjects") or entry.subjects
    if subjects and values.get("subject") not in (None, ""):
        if domains.subject_key(values["subject"]) not in {domains.subject_key(name) for name in subjects}:
            raise domains.LeftOut("of another subject")
    elif source.options.get("subjects"):
        raise Rejected("subject", "is missing, and options.subjects selects by it")
    return values


def _open(name: str, field: str):
    """A binary file object for a path or an fsspec URL. Raises UserError."""
    import fsspec

    try:
        return fsspec.open(name, "rb", expand=False).open() if "://" in name else open(os.path.expanduser(name), "rb")
    except FileNotFoundError:
        raise UserError(f"{field}.name", f"there is no file {name}", "give an existing path or URL") from None
    except ImportError as error:
        raise UserError(f"{field}.name", f"{name} needs another package ({error})", "install it") from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise UserError(f"{field}.name", f"cannot open {name} ({reason})", "give a readable file or URL") from None


def _demand_columns(names: list[str], source: SourceConfig, field: str) -> None:
    for key in ("question_column", "answer_column"):
        column = getattr(source, key)
        written = key == "answer_column" and source.reward == "dialogue"  # from the goal
        if column not in names and not written:
            raise UserError(f"{field}.{key}", f"{source.name} has no column {column!r}", f"choose one of: {', '.join(names)}")


def _hub_options(source: SourceConfig, field: str) -> dict[str, Any]:
    _refuse_unknown(source.options, list(_HUB_OPTIONS), field, "a hub data set")
    return {**_HUB_OPTIONS, **source.options}


def _refuse_unknown(options: dict[str, Any], known: list[str], field: str, owner: str) -> None:
    for name in options:
        if name not in known:
            raise UserError(f"{field}.options.{name}", f"unknown option of {owner}", f"choose one of: {', '.join(known)}")


def _gym_dataset(source: SourceConfig, seed: int, field: str):
    """The reasoning-gym data set, seeded by configuration seed, key, family and options. Raises UserError."""
    try:
        import reasoning_gym
        from reasoning_gym.factory import DATASETS
    except ImportError:
        raise UserError(f"{field}.kind", "the reasoning-gym package is not installed", "pip install 'dfpo[demo]'") from None
    if source.name not in DATASETS:
        close = difflib.get_close_matches(source.name, DATASETS, n=3) or sorted(DATASETS)[:5]
        raise UserError(f"{field}.name", f"unknown reasoning-gym family {source.name!r}", f"choose e.g. {', '.join(close)}")
    if source.size > GYM_SEED_SPACING:
        raise UserError(f"{field}.size", f"at most {GYM_SEED_SPACING} items of a family have seeds of their own", "split the source")
    known = [f.name for f in dataclasses.fields(DATASETS[source.name][1]) if f.name not in ("seed", "size")]
    _refuse_unknown(source.options, known, field, f"the family {source.name}")
    try:
        return reasoning_gym.create_dataset(source.name, seed=_gym_seed(source, seed, field), size=source.size, **source.options)
    except (AssertionError, TypeError, ValueError) as error:
        raise UserError(f"{field}.options", f"{source.name} refuses them ({error})", "correct the values") from None


def _gym_seed(source: SourceConfig, seed: int, field: str) -> int:
    """A multiple of the spacing, different (40-bit hash) for every split, family, options and configuration seed.

    The position in the list is left out: adding a source leaves the items of the others alone.
    """
    split = field.split(".")[1] if "." in field else field
    key = json.dumps([seed, split, source.name, source.options], sort_keys=True)
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:5], "big") * GYM_SEED_SPACING


# Row validation


def _row(values: Any, source: SourceConfig, read: _Read) -> tuple[dict[str, Any], bool]:
    """One row of SCHEMA, and whether its id was made from the content. Raises Rejected."""
    if isinstance(values, Rejected):
        raise values
    reward = _reward(values, source)
    question = _text(values, source.question_column)
    metadata = _metadata(values, source.metadata_column)
    if reward == "dialogue":
        values = values | {source.answer_column: _goal(metadata, source.metadata_column)}
    choices, labels = _options(values) if reward == "choice" else (None, None)
    answer = _answer(values, source.answer_column, reward, labels)
    given_id = values.get(source.id_column)
    told_apart = [answer] if reward == "dialogue" else choices
    identity = hashlib.sha256(question_key(question, told_apart).encode()).hexdigest()[:16] if given_id in (None, "") else str(given_id)
    domain = domain_of(source)
    if source.options.get("by_subject") and source.kind == "dataset":
        domain += f".{domains.subject_key(_text(values, 'subject'))}"
    row = {
        "row_id": f"{domain}/{identity}",
        "question": question,
        "answer": answer,
        "domain": domain,
        "reward": reward,
        "source": _optional_text(values, "source") or read.origin,
        "licence": _optional_text(values, "licence") or source.licence or read.licence,
        "choices": choices,
        "choice_labels": labels,
        "metadata": metadata,
    }
    return row, given_id in (None, "")


def _text(values: dict[str, Any], column: str) -> str:
    if values.get(column) is None:
        raise Rejected(column, f"is missing (the row has: {', '.join(values)})" if column not in values else "is null")
    return _checked_text(values[column], column)


def _checked_text(value: Any, column: str) -> str:
    if not isinstance(value, str):
        raise Rejected(column, f"is {type(value).__name__}, not text")
    if not value.strip():
        raise Rejected(column, "is empty")
    if not value.isascii() and any("\ud800" <= character <= "\udfff" for character in value):
        raise Rejected(column, "is not valid Unicode (half a surrogate pair)")
    return value


def _optional_text(values: dict[str, Any], column: str) -> str:
    return "" if values.get(column) in (None, "") else _checked_text(values[column], column)


def _reward(values: dict[str, Any], source: SourceConfig) -> str:
    """The row's own kind of reward where it names one, else the source's. A number in that column is somebody else's score."""
    given = values.get("reward")
    if not isinstance(given, str) or not given:
        return source.reward
    if given not in ROW_REWARDS:
        raise Rejected("reward", f"{_short(given)} is none of {', '.join(ROW_REWARDS)}")
    return given


def _answer(values: dict[str, Any], column: str, reward: str, labels: list[str] | None) -> str:
    value = values.get(column)
    is_number = isinstance(value, int | float | Decimal) and not isinstance(value, bool)
    if is_number and labels and str(value) not in labels and isinstance(value, int) and 0 <= value < len(labels):
        return labels[value]
    answer = _number_text(value) if is_number else _text(values, column).strip()
    if reward == "number":
        plain = canonical_number(answer.rpartition("####")[2])
        if plain is None:
            raise Rejected(column, f"{_short(answer)} is not a plain number")
        return plain
    if labels is not None and answer not in labels:
        raise Rejected(column, f"{_short(answer)} is not among the labels {', '.join(labels)}")
    return answer


def _metadata(values: dict[str, Any], column: str) -> str | None:
    """The row's metadata as the text of a JSON object. Takes such a text, or the object itself."""
    value = values.get(column)
    if value in (None, ""):
        return None
    try:
        parsed = json.loads(value) if isinstance(value, str) else value
        text = json.dumps(parsed, ensure_ascii=True)
    except (TypeError, ValueError, RecursionError):
        raise Rejected(column, "is not JSON") from None
    if not isinstance(parsed, dict):
        raise Rejected(column, "is not a JSON object")
    return text


def _goal(metadata: str | None, column: str) -> str:
    """What a dialogue's user wants, in a line."""
    try:
        return dialogue.described(dialogue.checked(json.loads(metadata or "null")))
    except (TypeError, ValueError) as problem:
        raise Rejected(column, str(problem)) from None


def _number_text(value: int | float | Decimal) -> str:
    """A number in plain digits: 1e-07 becomes 0.0000001; NaN and infinity stay words and are refused as numbers."""
    return str(value) if isinstance(value, int) else format(Decimal(repr(value)) if isinstance(value, float) else value, "f")


def _options(values: dict[str, Any]) -> tuple[list[str], list[str]]:
    choices, labels = values.get("choices"), values.get("labels", values.get("choice_labels"))
    if isinstance(choices, dict):
        choices, labels = choices.get("text"), choices.get("label")
    if not isinstance(choices, list) or len(choices) < 2:
        raise Rejected("choices", "a choice needs a list of at least two options")
    choices = [_checked_text(choice, "choices") for choice in choices]
    if not labels:
        labels = list(string.ascii_uppercase[: len(choices)])
    if not isinstance(labels, list) or len(labels) != len(choices) or len(set(labels)) != len(labels):
        raise Rejected("labels", f"must be {len(choices)} different labels, one an option")
    return choices, [_checked_text(label, "labels") for label in labels]


def _short(text: str) -> str:
    return repr(text if len(text) <= 40 else text[:37] + "...")
