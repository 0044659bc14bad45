"""Noise on training labels and questions, and on rewards, as pure functions of (row id or text, seed).

Whether a row gets a wrong label depends on its row id and the seed alone, so the noisy rows at rate 0.1 are among those at 0.3, in
any order and beside any other rows. What the wrong label is:

symmetric   a uniformly random other answer of the same domain; for a choice another option of the row.
permuted    the labels of the chosen rows change places within a domain (for choices: within rows with the same labels), so that the
            labels keep their frequencies. Rows sorted by answer class are rotated by the size of the largest class: whole classes
            map to other classes, which is systematic noise, not a coin.
plausible   a near miss. Numbers: +-1, +-10, one digit changed, two digits swapped. Choices: another option. Text: the answer of
            another row of the domain.

class_conditional   for labels of choices and other closed answers: truth -> wrong label with the given probabilities.
majority_vote       every label is what most of a model's responses say, right or wrong (`votes`); the truth is not needed.
adversarial         the wrong answer that a model gives most often; where it gives none, a plausible one.

Besides, labels can be taken away (missing), and questions get typos and lose words; wrong labels are drawn first.

Labels of a model depend on the rows that it is asked along with, symmetric and text labels on which answers the domain has, permuted
ones on which other rows are chosen; the others on their row alone, and none but a model's on row order. Where no wrong label exists (a
domain with one answer; a permuted class that holds more than half of the chosen rows) the row stays clean, and the measured rate says
so. Of all kinds but majority_vote, a label that was to be made wrong never equals the truth.

Draws come from SipHash of the id and the SplitMix64 finaliser (Steele, Lea and Flood, 2014), vectorised in NumPy and Arrow.
"""

from __future__ import annotations

import json
import re
import shutil
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from scipy.special import ndtri

from dfpo_core import votes
from dfpo_core.config import ROW_REWARDS, VOTED_KINDS, NoiseConfig, PipelineConfig, PromptConfig, RewardNoiseConfig, parse_config
from dfpo_core.data import prompts, report
from dfpo_core.data.prepare import SPLITS
from dfpo_core.errors import UserError
from dfpo_core.models import load_tokenizer
from dfpo_core.rewards import canonical_number, normalise_text
from dfpo_core.storage import atomic_directory

_HASH_KEY = "dfpo_label_noise"  # 16 bytes; changing it changes every draw
# Independent streams of one key. `_bits` keeps streams 0 to 7 of different seeds apart.
_CHOOSE, _PICK, _REWARD, _MISSING, _TYPO, _DROP, _JUDGE = 1, 2, 3, 4, 5, 6, 7
_GAUSS = 0
_POWERS = 10 ** np.arange(19, dtype=np.int64)
_SEPARATOR = "\x1f"
_NARROW = ("row_id", "answer", "domain", "reward", "choice_labels")


def run(config: str, parent_run_id: str, data: str, output: str) -> dict[str, float]:
    """The step: noise on train.parquet, the data report written again, everything else copied byte for byte; returns the logged metrics."""
    from dfpo_core.tracking import noise_tag, step_run

    settings = parse_config(json.loads(config))
    with step_run(settings, "noise_data", parent_run_id) as step:
        with atomic_directory(output) as folder:
            shutil.copytree(data, folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns("train.parquet"))
            metrics, removed = noisy_file(Path(data) / "train.parquet", folder / "train.parquet", settings)
            with (folder / "removed.jsonl").open("a", encoding="utf-8") as file:
                file.writelines(json.dumps(entry) + "\n" for entry in removed)
            metrics |= report.write(folder, metrics)
        step.log_metrics(metrics)
        step.log_artifact(Path(output, report.PAGE))
        step.log_table("noisy_rows.json", _noisy_rows(Path(output) / "train.parquet", 50))
        for name in SPLITS:
            tags = {"noise": noise_tag(settings) if name == "train" else "none"}
            step.log_dataset(str(Path(output) / f"{name}.parquet"), name, "training" if name == "train" else "testing", tags)
    return metrics


def noisy_file(
    source: Path, target: Path, config: PipelineConfig, batch_rows: int = 250_000
) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """Write `source` with its labels to `target`, a batch of rows in memory at a time.

    Returns what `measure` says of it, and an entry for removed.jsonl on every row that left: typos can make a prompt longer than
    `prompt.max_prompt_tokens`. A voter is asked about all rows at once, so labels of a model need them in memory.

    Raises:
        UserError: a prompt became too long and `prompt.too_long` is refuse.
    """
    file, counts, removed = pq.ParquetFile(source), Counts(), []
    tokenizer = load_tokenizer(config.model, config.home_path) if config.noise.typo_rate or config.noise.word_drop_rate else None
    if config.noise.kind in VOTED_KINDS:
        batch_rows = max(1, file.metadata.num_rows)
    narrow = [name for name in _NARROW if name in file.schema_arrow.names]
    noise = LabelNoise(config.noise, config.seed, lambda: _tables(file, batch_rows, narrow))
    writer = None
    try:
        for table in _tables(file, batch_rows):
            responses = votes.sample(table.to_pylist(), config) if config.noise.kind in VOTED_KINDS and len(table) else None
            noisy = noise(table, responses)
            if tokenizer:
                noisy, entries = _fitting(noisy, tokenizer, config.prompt)
                removed += entries
            writer = writer or pq.ParquetWriter(target, noisy.schema)
            writer.write_table(noisy)
            counts.add(noisy)
    finally:
        if writer:
            writer.close()
    return counts.metrics(config.noise) | ({"noise/too_long": float(len(removed))} if tokenizer else {}), removed


def _fitting(noisy: pa.Table, tokenizer: Any, prompt: PromptConfig) -> tuple[pa.Table, list[dict[str, Any]]]:
    """The rows whose prompt still fits, and an entry on each of the others. Raises UserError where these are refused."""
    changed = noisy.filter(pc.not_equal(noisy["question"], noisy["clean_question"])).to_pylist()
    lengths = [len(ids) for ids in prompts.tokenize(tokenizer, changed, prompt)]
    too_long = [(row, length) for row, length in zip(changed, lengths, strict=True) if length > prompt.max_prompt_tokens]
    if not too_long:
        return noisy, []
    if prompt.too_long == "refuse":
        raise prompts.too_long_error([(row["row_id"], length) for row, length in too_long], noisy.num_rows, prompt)
    reason = "with its typos its prompt has {} tokens, prompt.max_prompt_tokens is {}"
    entries = [
        {"split": "train", "source": row["source"], "file": None, "line": None, "row_id": row["row_id"], "gate": "too_long"}
        | {"reason": reason.format(length, prompt.max_prompt_tokens)}
        for row, length in too_long
    ]
    leaving = pc.is_in(noisy["row_id"], pa.array([row["row_id"] for row, _ in too_long]))
    return noisy.filter(pc.invert(leaving)), entries


def _tables(file: pq.ParquetFile, rows: int, columns: list[str] | None = None) -> Iterator[pa.Table]:
    """The file in parts of at most `rows` rows; one empty table where it has none."""
    if file.metadata.num_rows == 0:
        yield file.read(columns)
    for batch in file.iter_batches(rows, columns=columns):
        yield pa.Table.from_batches([batch])


def _noisy_rows(path: Path, count: int) -> list[dict[str, Any]]:
    """The first rows with a wrong label."""
    found: list[dict[str, Any]] = []
    for table in _tables(pq.ParquetFile(path), 10_000, ["row_id", "question", "answer", "label", "is_noisy"]):
        found += table.filter(table["is_noisy"]).drop_columns("is_noisy").slice(0, count - len(found)).to_pylist()
        if len(found) == count:
            break
    return found


def measure(noisy: pa.Table, noise: NoiseConfig) -> dict[str, float]:
    """The rate asked for (where there is one: transitions and votes make as many as they make), and the rate measured, over all rows
    and by domain. With votes their mean share, with adversarial labels the share of them that had to be plausible ones."""
    counts = Counts()
    counts.add(noisy)
    return counts.metrics(noise)


class Counts:
    """What `measure` says, summed up over tables."""

    def __init__(self) -> None:
        self.rows = self.missing = self.changed_questions = 0
        self.vote_share: float | None = None
        self.by_domain: dict[str, list[int]] = {}  # rows, wrong labels
        self.by_kind: dict[str, int] = {}

    def add(self, noisy: pa.Table) -> None:
        """Add the rows of a table that LabelNoise returned."""
        self.rows += noisy.num_rows
        self.missing += noisy["label"].null_count
        if "clean_question" in noisy.column_names:
            self.changed_questions += pc.sum(pc.not_equal(noisy["question"], noisy["clean_question"])).as_py() or 0
        if "vote_share" in noisy.column_names:
            self.vote_share = (self.vote_share or 0.0) + (pc.sum(noisy["vote_share"]).as_py() or 0.0)
        for entry in noisy.group_by("domain").aggregate([("is_noisy", "count"), ("is_noisy", "sum")]).to_pylist():
            found = self.by_domain.setdefault(entry["domain"], [0, 0])
            found[0] += entry["is_noisy_count"]
            found[1] += entry["is_noisy_sum"] or 0
        for entry in noisy.group_by("noise_kind").aggregate([([], "count_all")]).to_pylist():
            self.by_kind[entry["noise_kind"]] = self.by_kind.get(entry["noise_kind"], 0) + entry["count_all"]

    def metrics(self, noise: NoiseConfig) -> dict[str, float]:
        rows, found = max(1, self.rows), {}
        if noise.kind not in ("class_conditional", "majority_vote"):
            found["noise/rate_requested"] = noise.rate if noise.kind != "none" else 0.0
        if self.vote_share is not None:
            found["noise/vote_share"] = self.vote_share / rows
        if noise.kind == "adversarial":
            plausible, liked = self.by_kind.get("plausible", 0), self.by_kind.get("adversarial", 0)
            found["noise/adversarial_fallback"] = plausible / max(1, plausible + liked)
        if noise.missing_rate or self.missing:
            found |= {"noise/missing_requested": noise.missing_rate, "noise/missing_measured": self.missing / rows}
        if noise.typo_rate or noise.word_drop_rate:
            found["noise/questions_changed"] = self.changed_questions / rows
        found["noise/rate_measured"] = sum(wrong for _, wrong in self.by_domain.values()) / rows
        return found | {f"noise/{domain}/rate_measured": wrong / count for domain, (count, wrong) in self.by_domain.items()}


def noisy_table(table: pa.Table, config: PipelineConfig) -> pa.Table:
    """`add_label_noise` of a configuration; asks the voter for responses where the kind of noise needs them. Raises UserError."""
    responses = votes.sample(table.to_pylist(), config) if config.noise.kind in VOTED_KINDS else None
    return add_label_noise(table, config.noise, config.seed, responses)


def add_label_noise(table: pa.Table, noise: NoiseConfig, seed: int, responses: list[list[str]] | None = None) -> pa.Table:
    """`LabelNoise` of one table; `responses` are the voter's to each row, for config.VOTED_KINDS."""
    return LabelNoise(noise, seed, lambda: [table])(table, responses)


class LabelNoise:
    """Adds label (what training sees), clean_answer, is_noisy and noise_kind ("none" on clean rows) to the tables of a data set.

    What a label depends on besides its own row, the answers that there are and which rows change places, is gathered beforehand, in one
    pass over all tables or two, of the columns in `_NARROW` alone. Then it is called on the tables, once each, in the same order.

    Args:
        tables: begins the data set anew; columns row_id, answer, domain, reward and choice_labels, as `prepare` writes them (numbers in
            canonical form).
        seed: the configuration's seed.
    """

    def __init__(self, noise: NoiseConfig, seed: int, tables: Callable[[], Iterable[pa.Table]]):
        self.noise, self.seed = noise, seed
        makes_labels = noise.rate or noise.kind in ("class_conditional", "majority_vote")
        self.active = noise.kind != "none" and bool(makes_labels)
        # An adversarial label that the model does not know is a plausible one.
        self.maker = "plausible" if noise.kind == "adversarial" else noise.kind
        self.classes: dict[str, _Classes] = {}
        # Of a permutation: target class of every chosen row, and keys of every table, that are still to come.
        self.swaps: dict[str, np.ndarray] = {}
        self.keys: deque[np.ndarray] = deque()
        if self.active and self.maker in ("symmetric", "permuted", "plausible"):
            self._gather(tables)

    def _gather(self, tables: Callable[[], Iterable[pa.Table]]) -> None:
        answers: dict[str, list[pa.Table]] = {}
        for table in tables():
            self._refuse_dialogues(table)
            for reward in filter(self._needs_classes, ROW_REWARDS):
                rows = np.flatnonzero(_equals(table["reward"], reward))
                if len(rows):
                    answers.setdefault(reward, []).append(_counted(table, rows, reward, self.seed))
        self.classes = {reward: _classes(found) for reward, found in answers.items()}
        if self.maker == "permuted":
            chosen: dict[str, list[tuple[np.ndarray, np.ndarray]]] = {}
            for table in tables():
                keys = text_keys(table["row_id"])
                self.keys.append(keys)
                for reward, rows in self._chosen(table, keys):
                    chosen.setdefault(reward, []).append((self.classes[reward].of(table, rows, reward), keys[rows]))
            for reward, parts in chosen.items():
                own, keys = (np.concatenate(part) for part in zip(*parts, strict=True))
                self.swaps[reward] = _permuted(self.classes[reward], own, keys)

    def _needs_classes(self, reward: str) -> bool:
        return self.maker == "permuted" or not (reward == "choice" or (self.maker == "plausible" and reward == "number"))

    def _refuse_dialogues(self, table: pa.Table) -> None:
        if self.active and _equals(table["reward"], "dialogue").any():
            raise no_label_noise(self.noise.kind)

    def _chosen(self, table: pa.Table, keys: np.ndarray, but: np.ndarray | None = None) -> Iterator[tuple[str, np.ndarray]]:
        """(reward, indices of the rows that get a wrong label), of every kind of reward that has any; those in `but` left out."""
        chosen = _uniform(keys, self.seed, _CHOOSE) < (self.noise.rate if self.active else 0.0)
        if but is not None:
            chosen &= ~but
        for reward in ROW_REWARDS:
            rows = np.flatnonzero(chosen & _equals(table["reward"], reward))
            if len(rows):
                yield reward, rows

    def __call__(self, table: pa.Table, responses: list[list[str]] | None = None) -> pa.Table:
        """The next table with its labels; the kinds in config.VOTED_KINDS need the voter's `responses` to each row, and all columns.

        Raises UserError for dialogues, which have no label.
        """
        self._refuse_dialogues(table)
        noise, seed = self.noise, self.seed
        truth = _array(table["answer"])
        keys = self.keys.popleft() if self.keys else text_keys(table["row_id"])
        if noise.kind == "class_conditional":
            return _record(table, truth, _class_conditional(truth, noise.transitions, _uniform(keys, seed, _CHOOSE)), keys, noise, seed)
        if noise.kind == "majority_vote":
            return _voted(table, truth, responses, keys, noise, seed)
        label, liked = truth, None
        kinds = pa.repeat(noise.kind, len(truth))
        if noise.kind == "adversarial":
            label, liked = _adversarial(table, truth, _uniform(keys, seed, _CHOOSE) < noise.rate, responses)
            kinds = pc.if_else(pa.array(liked), "adversarial", "plausible")
        for reward, rows in self._chosen(table, keys, liked):
            label = _replace(label, rows, self._wrong_labels(table, reward, rows, keys))
        return _record(table, truth, label, keys, noise, seed, kinds)

    def _wrong_labels(self, table: pa.Table, reward: str, rows: np.ndarray, keys: np.ndarray) -> pa.Array:
        """A string array as long as `rows`, null where there is no wrong label."""
        picks = _uniform(keys[rows], self.seed, _PICK)
        if self.maker == "permuted":
            now, self.swaps[reward] = np.split(self.swaps[reward], [len(rows)])
            return self.classes[reward].texts.take(pa.array(now, mask=now < 0))
        if reward == "choice":
            return _other_option(table, rows, picks)
        if self.maker == "plausible" and reward == "number":
            return _near_miss(_array(table["answer"]).take(pa.array(rows)), _bits(keys[rows], self.seed, _PICK))
        own = self.classes[reward].of(table, rows, reward)
        return _other_answer(self.classes[reward], own, picks, by_frequency=self.maker == "plausible")


def _voted(table: pa.Table, truth: pa.Array, responses: list[list[str]], keys: np.ndarray, noise: NoiseConfig, seed: int) -> pa.Table:
    """Labels by majority; noisy where the row's reward says that they are not the truth, missing where nothing was voted for."""
    rows = table.to_pylist()
    labels, shares = votes.majority(rows, responses)
    voted = [(index, label) for index, label in enumerate(labels) if label is not None]
    wrong = np.zeros(len(rows), dtype=bool)
    wrong[[index for index, _ in voted]] = [not right for right in votes.are_right(rows, voted)]
    table = table.append_column("vote_share", pa.array(shares, pa.float32()))
    return _record(table, truth, pa.array(labels, pa.string()), keys, noise, seed, wrong=pa.array(wrong))


def _adversarial(table: pa.Table, truth: pa.Array, chosen: np.ndarray, responses: list[list[str]]) -> tuple[pa.Array, np.ndarray]:
    """The labels with the chosen rows' strongest wrong answers put in, and where there was one."""
    rows, asked = np.flatnonzero(chosen), table.to_pylist()
    wrong = votes.strongest_wrong([asked[index] for index in rows], [responses[index] for index in rows])
    found = np.zeros(len(truth), dtype=bool)
    found[rows] = [label is not None for label in wrong]
    return _replace(truth, rows, pa.array(wrong, pa.string())), found


def no_label_noise(kind: str) -> UserError:
    """Why dialogues take no label noise."""
    problem = f"{kind} makes labels wrong, and a dialogue has none: its user's goal decides"
    return UserError("noise.kind", problem, "set it to none, and use train.reward_noise or noise.typo_rate")


def _record(
    table: pa.Table,
    truth: pa.Array,
    label: pa.Array,
    keys: np.ndarray,
    noise: NoiseConfig,
    seed: int,
    kinds: pa.Array | None = None,
    wrong: pa.Array | None = None,
) -> pa.Table:
    """The label columns, with the labels that go missing taken away and the questions corrupted.

    `kinds` is each row's kind of noise where they differ, `wrong` where a label is not the truth if comparing text does not tell.
    """
    missing = pc.or_(pa.array(_uniform(keys, seed, _MISSING) < noise.missing_rate), pc.is_null(label))
    wrong = pc.not_equal(label, truth) if wrong is None else wrong
    noisy = pc.fill_null(pc.and_(wrong, pc.invert(missing)), False)
    kinds = pc.if_else(missing, "missing", pc.if_else(noisy, noise.kind if kinds is None else kinds, "none"))
    label = pc.if_else(missing, pa.scalar(None, pa.string()), label)
    columns = {"label": label, "clean_answer": truth, "is_noisy": noisy, "noise_kind": kinds}
    for name, column in columns.items():
        table = table.append_column(name, column)
    if noise.typo_rate or noise.word_drop_rate:
        asked, ids = table["question"].to_pylist(), table["row_id"].to_pylist()
        changed = [corrupt(question, row_id, noise, seed) for question, row_id in zip(asked, ids, strict=True)]
        table = table.append_column("clean_question", table["question"])
        table = table.set_column(table.schema.get_field_index("question"), "question", pa.array(changed, pa.string()))
    return table


def reward_noise(
    rewards: Sequence[float], questions: Sequence[str], texts: Sequence[str], noise: RewardNoiseConfig, seed: int, step: int = 0
) -> list[float]:
    """Rewards as a noisy judge would give them; the same question, response, seed and step always meet the same fate.

    flips               of a 0/1 reward, drawn for each (question, response).
    simulated model     wrong with probability 1 - accuracy, drawn for the *response alone*, in normal form: what it overrates it overrates
                        under every question, so a policy can find and exploit it, as with a learned reward model.
    gaussian            added last, drawn for each (question, response).

    With `drift_steps` every rate and deviation rises linearly from 0 at step 0 to its value.

    Args:
        rewards: 0 or 1 for the flips; any number for Gaussian noise.
        questions: a key of each question, such as its row id; as many as rewards.
        texts: the responses.
        step: 0-based training step.
    """
    if not texts or not noise.active:
        return [float(reward) for reward in rewards]
    share = min(1.0, step / noise.drift_steps) if noise.drift_steps else 1.0
    # Keyed by question too: else a short answer such as 42 would be flipped for every question, or for none.
    keys = text_keys(pa.array([f"{question}\n{text}" for question, text in zip(questions, texts, strict=True)], pa.string()))
    values = np.asarray(rewards, dtype=np.float64)
    positive = max(noise.flip_rate, noise.false_positive_rate)
    negative = max(noise.flip_rate, noise.false_negative_rate)
    wrong = _uniform(keys, seed, _REWARD) < share * np.where(values < 0.5, positive, negative)
    if noise.model_accuracy < 1:
        judged = text_keys(pa.array([normalise_text(text) for text in texts], pa.string()))
        wrong = _uniform(judged, seed, _JUDGE) < share * (1 - noise.model_accuracy)
    values = np.where(wrong, 1 - values, values)
    if noise.gaussian_std:
        values = values + share * noise.gaussian_std * ndtri(_uniform(keys, seed, _GAUSS) + 2.0**-54)
    return values.tolist()


def corrupt(question: str, key: str, noise: NoiseConfig, seed: int) -> str:
    """The question with typos (two inner letters change places) and words left out. Only words of letters are touched, typos need four:
    digits and operators carry the task, and changing them would change the answer."""
    parts = re.split(r"(\s+)", question)
    words = [index for index in range(0, len(parts), 2) if parts[index].isalpha()]
    if not words:
        return question
    keys = text_keys(pa.array([f"{key}\n{index}" for index in words], pa.string()))
    dropped = _uniform(keys, seed, _DROP) < noise.word_drop_rate
    misspelt = _uniform(keys, seed, _TYPO) < noise.typo_rate
    places = _bits(keys, seed, _PICK)
    for index, drop, typo, place in zip(words, dropped.tolist(), misspelt.tolist(), places.tolist(), strict=True):
        word = parts[index]
        if drop:
            parts[index] = ""
        elif typo and len(word) >= 4:
            at = 1 + place % (len(word) - 3)
            parts[index] = word[:at] + word[at + 1] + word[at] + word[at + 2 :]
    return re.sub(r"\s+(?=\s)", "", "".join(parts)).strip() if dropped.any() else "".join(parts)


# Draws


def text_keys(texts: pa.Array | pa.ChunkedArray) -> np.ndarray:
    """(N,) uint64 SipHash of each text."""
    from pandas.util import hash_array

    return hash_array(_array(texts).to_numpy(zero_copy_only=False), hash_key=_HASH_KEY, categorize=False)


def _mix(bits: np.ndarray) -> np.ndarray:
    """The SplitMix64 finaliser, a bijection of uint64 in which every input bit moves half of the output bits."""
    bits = (bits ^ (bits >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    bits = (bits ^ (bits >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return bits ^ (bits >> np.uint64(31))


def _bits(keys: np.ndarray, seed: int, stream: int) -> np.ndarray:
    """(N,) uint64, independent for each (key, seed, stream)."""
    return _mix(keys ^ _mix(np.array([seed * 8 + stream + 1], dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)))


def _uniform(keys: np.ndarray, seed: int, stream: int) -> np.ndarray:
    """(N,) float64 in [0, 1)."""
    return (_bits(keys, seed, stream) >> np.uint64(11)) * 2.0**-53


# Wrong labels: each function returns a string array as long as its rows, null where there is no wrong label


def _class_conditional(truth: pa.Array, transitions: dict[str, dict[str, float]], draws: np.ndarray) -> pa.Array:
    """Each label by its own row of probabilities; what a row leaves over stays the truth."""
    label = truth
    for answer, row in transitions.items():
        rows = np.flatnonzero(pc.equal(truth, answer).to_numpy(zero_copy_only=False))
        names, edges = sorted(row), np.cumsum([row[name] for name in sorted(row)])
        if len(rows) and names:
            hit = np.searchsorted(edges, draws[rows], side="right")
            wrong = pa.array([*names, None], pa.string()).take(pa.array(np.minimum(hit, len(names))))
            label = _replace(label, rows, wrong)
    return label


@dataclass(frozen=True)
class _Classes:
    """The different answers of each group of rows, sorted by group and by a hash of the answer (not by row order).

    A group is a domain; rows with different choice labels are different groups.
    """

    group: np.ndarray  # (C,) group of each class
    first: np.ndarray  # (G + 1,) class that each group begins with, and C
    before: np.ndarray  # (C + 1,) rows in all classes before each, and in all
    texts: pa.Array  # (C,) one spelling of each answer
    spellings: np.ndarray  # (S,) sorted keys of (group, spelling) pairs
    of_spelling: np.ndarray  # (S,) the class of each

    def of(self, table: pa.Table, rows: np.ndarray, reward: str) -> np.ndarray:
        """(rows,) class of each row, which must be of this kind of reward."""
        part = _rows(table, rows)
        answers, groups = _array(part["answer"]).dictionary_encode(), _groups(part, reward).dictionary_encode()
        keys = _pair_keys(text_keys(groups.dictionary)[_codes(groups)], text_keys(answers.dictionary)[_codes(answers)])
        return self.of_spelling[np.searchsorted(self.spellings, keys)].astype(np.int64)


def _counted(table: pa.Table, rows: np.ndarray, reward: str, seed: int) -> pa.Table:
    """The different (group, answer) pairs of some rows and their counts, by their keys; equal `same` keys in a group are one answer."""
    part = _rows(table, rows)
    pairs = pa.table({"group": _groups(part, reward), "answer": _array(part["answer"])})
    pairs = pairs.group_by(["group", "answer"]).aggregate([([], "count_all")])
    spelling, groups = _array(pairs["answer"]), _array(pairs["group"]).dictionary_encode()
    group = text_keys(groups.dictionary)[_codes(groups)]
    same = _mix(_mix(_same_answer_keys(spelling, reward) ^ np.uint64(seed)) ^ group)
    return pa.table(
        {"group": group, "same": same, "spelling": text_keys(spelling), "rows": pairs["count_all"].cast("int32"), "answer": spelling}
    )


def _classes(counted: list[pa.Table]) -> _Classes:
    """From the `_counted` pairs of all parts of a data set, which are taken out of the list: of ten million answers there is no room for
    a second copy."""
    pairs = pa.concat_tables(counted)
    counted.clear()
    group, same, spelling, rows = (pairs[name].to_numpy() for name in ("group", "same", "spelling", "rows"))
    answers = pairs["answer"]
    del pairs
    order = np.lexsort((spelling, same, group))
    starts = np.ones(len(order), dtype=bool)
    starts[1:] = _differs(group, order) | _differs(same, order)
    del same
    class_of_pair = np.empty(len(order), dtype=np.int32)
    class_of_pair[order] = np.cumsum(starts, dtype=np.int32) - 1
    chosen, rows = order[starts], rows[order]  # the first spelling of each class
    del order
    before = np.zeros(len(chosen) + 1, dtype=np.int64)
    np.cumsum(np.add.reduceat(rows, np.flatnonzero(starts)), out=before[1:])
    del starts, rows
    new_group = np.ones(len(chosen), dtype=bool)
    new_group[1:] = _differs(group, chosen)
    keys = _pair_keys(group, spelling)
    del group, spelling
    by_key = np.argsort(keys)
    spellings, of_spelling = keys[by_key], class_of_pair[by_key]
    del keys, by_key, class_of_pair
    return _Classes(
        group=np.cumsum(new_group, dtype=np.int32) - 1,
        first=np.append(np.flatnonzero(new_group), len(chosen)),
        before=before,
        texts=_array(answers.take(pa.array(chosen))),
        spellings=spellings,
        of_spelling=of_spelling,
    )


def _differs(keys: np.ndarray, order: np.ndarray) -> np.ndarray:
    """(N - 1,) whether each key, in that order, is another than the one before."""
    keys = keys[order]
    return keys[1:] != keys[:-1]


def _pair_keys(group_keys: np.ndarray, answer_keys: np.ndarray) -> np.ndarray:
    """(N,) uint64 of (group, answer) pairs."""
    return _mix(answer_keys ^ _mix(group_keys))


def _groups(part: pa.Table, reward: str) -> pa.Array:
    domain = _array(part["domain"])
    if reward != "choice":
        return domain
    return pc.binary_join_element_wise(domain, pc.binary_join(_array(part["choice_labels"]), _SEPARATOR), _SEPARATOR)


def _same_answer_keys(spelling: pa.Array, reward: str) -> np.ndarray:
    """Equal for answers that a reward cannot tell apart; only free text has several spellings of one answer."""
    if reward != "exact":
        return text_keys(spelling)
    return text_keys(pa.array([normalise_text(text) for text in spelling.to_pylist()], pa.string()))


def _other_answer(classes: _Classes, own: np.ndarray, picks: np.ndarray, by_frequency: bool) -> pa.Array:
    """Another class of the row's group, drawn uniformly or by the number of its rows; the row's own class is cut out."""
    group = classes.group[own]
    first, last, here, after = classes.first[group], classes.first[group + 1], own, own + 1
    if by_frequency:
        first, last, here, after = (classes.before[places] for places in (first, last, here, after))
    others = last - first - (after - here)
    position = first + (picks * others).astype(np.int64)
    position += np.where(position >= here, after - here, 0)
    target = np.searchsorted(classes.before[1:], position, side="right") if by_frequency else position
    return classes.texts.take(pa.array(target, mask=others == 0))


def _permuted(classes: _Classes, own: np.ndarray, keys: np.ndarray) -> np.ndarray:
    """Rotate rows of classes `own`, sorted by class, by the size of the largest of their group: (N,) target classes, -1 for none."""
    order = np.lexsort((keys, own))
    sorted_class = own[order]
    chosen = np.bincount(own, minlength=len(classes.group))
    groups = len(classes.first) - 1
    group_rows = np.bincount(classes.group, weights=chosen, minlength=groups).astype(np.int64)
    shift = np.zeros(groups, dtype=np.int64)
    np.maximum.at(shift, classes.group, chosen)
    start = (np.cumsum(group_rows) - group_rows)[classes.group[sorted_class]]
    group = classes.group[sorted_class]
    partner = start + (np.arange(len(own)) - start + shift[group]) % group_rows[group]
    target = np.empty(len(own), dtype=np.int64)
    target[order] = sorted_class[partner]
    target[target == own] = -1
    return target


def _other_option(table: pa.Table, rows: np.ndarray, picks: np.ndarray) -> pa.Array:
    """A uniformly random other label of the row itself."""
    labels = _array(table["choice_labels"]).take(pa.array(rows))
    sizes = pc.list_value_length(labels).to_numpy()
    starts = np.cumsum(sizes) - sizes
    flat = pc.list_flatten(labels)
    parents = np.repeat(np.arange(len(rows)), sizes)
    is_truth = pc.equal(flat, _array(table["answer"]).take(pa.array(rows[parents]))).to_numpy(zero_copy_only=False)
    own = np.flatnonzero(is_truth) - starts
    pick = (picks * (sizes - 1)).astype(np.int64)
    return flat.take(pa.array(starts + pick + (pick >= own)))


def _near_miss(answers: pa.Array, bits: np.ndarray) -> pa.Array:
    """A number that a slip would give. Integers of up to 17 digits are vectorised; the rest goes digit by digit in Python."""
    small = pc.match_substring_regex(answers, r"^-?\d{1,17}$").to_numpy(zero_copy_only=False)
    wrong = np.empty(len(answers), dtype=object)
    values = pc.cast(answers.filter(pa.array(small)), pa.int64()).to_numpy()
    near = pc.cast(pa.array(_near_integers(values, bits[small])), pa.string())
    if small.all():
        return near
    wrong[small] = near.to_numpy(zero_copy_only=False)
    for index in np.flatnonzero(~small):
        wrong[index] = _one_digit_changed(answers[index].as_py(), int(bits[index]))
    return pa.array(wrong, pa.string())


def _near_integers(values: np.ndarray, bits: np.ndarray) -> np.ndarray:
    """(N,) int64, each different from `values` (magnitude below 10**17) and not below zero where `values` is not."""
    slip = (bits % np.uint64(6)).astype(np.int64)
    place_draw, digit_draw = ((bits >> np.uint64(shift)).astype(np.int64) & 0xFFFF for shift in (8, 24))
    size = np.abs(values)
    length = np.maximum(np.searchsorted(_POWERS, size, side="right"), 1)
    step = np.choose(slip, [1, -1, 10, -10, 0, 0])
    added = values + step
    added = np.where((values >= 0) & (added < 0), values - step, added)
    power = _POWERS[place_draw % length]
    digit = size // power % 10
    leading = (place_draw % length == length - 1) & (length > 1)
    new_digit = np.where(leading, (digit + digit_draw % 8) % 9 + 1, (digit + 1 + digit_draw % 9) % 10)
    changed = size + (new_digit - digit) * power
    low = _POWERS[place_draw % np.maximum(length - 1, 1)]
    ones, tens = size // low % 10, size // (low * 10) % 10
    swapped = size + (ones - tens) * (low * 10 - low)
    swapped = np.where((length < 2) | (ones == tens) | (swapped < _POWERS[length - 1]), size + 1, swapped)
    sign = np.where(values < 0, -1, 1)
    return np.where(slip < 4, added, sign * np.where(slip == 4, changed, swapped))


def _one_digit_changed(answer: str, bits: int) -> str:
    """For decimals, fractions (their numerator) and very long integers: one digit replaced by another, in canonical form."""
    places = [index for index, character in enumerate(answer.partition("/")[0]) if character.isdigit()]
    place = places[bits % len(places)]
    digit = (int(answer[place]) + 1 + (bits >> 32) % 9) % 10
    return canonical_number(f"{answer[:place]}{digit}{answer[place + 1 :]}")


# Arrow


def _array(column: Any) -> pa.Array:
    """One contiguous array."""
    return column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column


def _rows(table: pa.Table, rows: np.ndarray) -> pa.Table:
    """What classes are made of, of those rows (in order, each once)."""
    part = table.select(["answer", "domain", "choice_labels"])
    return part if len(rows) == len(part) else part.take(pa.array(rows))


def _codes(encoded: pa.DictionaryArray) -> np.ndarray:
    return encoded.indices.to_numpy().astype(np.int64)


def _equals(column: pa.ChunkedArray, value: str) -> np.ndarray:
    return pc.equal(_array(column), value).to_numpy(zero_copy_only=False)


def _replace(label: pa.Array, rows: np.ndarray, wrong: pa.Array) -> pa.Array:
    """`label` with the non-null `wrong` values put at `rows`."""
    source = np.arange(len(label))
    there = wrong.is_valid().to_numpy(zero_copy_only=False)
    source[rows[there]] = len(label) + np.flatnonzero(there)
    return pa.concat_arrays([label, wrong]).take(pa.array(source))
