"""Which rows are one question, which training rows give a test question away, and what equal questions say about the labels.

Two rows are the same question when `sources.question_key` agrees, and nearly the same when `near_key` does too. A training question
overlaps with a test question when they share `overlap_words` words in a row (13 in Brown et al. 2020, arXiv 2005.14165, appendix C),
counted in text without case and punctuation. Word sequences that occur in more than `overlap_common` questions of a split are
boilerplate ("State the final answer to the following arithmetic problem ..."), as there, and do not count.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from dfpo_core.data.sources import question_key
from dfpo_core.rewards import normalise_text
from dfpo_core.statistics import bootstrap_mean, wilson

_HASH_KEY = "dfpo_word_overlp"  # 16 bytes
_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)
_NOT_A_WORD = r"[^\pL\pN]+"
_DROPPED = re.compile(r"\b(?:an?|the)\b|[;:?\"'“”‘’`]|(?<!\d)[.,]|[.,](?!\d)")
_OPERATOR = re.compile(r"\s*([-+*/^=<>()\[\]])\s*")


@dataclass(frozen=True)
class Overlap:
    """One training row that shares a word sequence with a test row; both are row numbers of the tables that were compared."""

    train_row: int
    test_row: int
    words: str


def keys(table: pa.Table) -> list[str]:
    """`sources.question_key` of every row. Dialogues that begin alike are two when their goals are."""
    rows = table.select(["question", "choices", "reward", "answer"]).to_pylist()
    return [question_key(row["question"], [row["answer"]] if row["reward"] == "dialogue" else row["choices"]) for row in rows]


def near_key(question: str, choices: list[str] | None) -> str:
    """Equal for questions that differ only in case, spaces, articles or punctuation that ends or quotes (`2 - 3` is not `2 + 3`)."""
    options = sorted(_loose(choice) for choice in choices or ())
    return "\n".join([_loose(question), *options])


def _loose(text: str) -> str:
    return " ".join(_OPERATOR.sub(r"\1", _DROPPED.sub(" ", normalise_text(text))).split())


def overlaps(train: list[str], test: list[str], words: int, common: int) -> list[Overlap]:
    """Every training text that shares `words` words in a row with a test text, once each, in the order of the training texts.

    Memory and time grow with the number of words: 100,000 questions of 50 words take seconds. A gram is a 64-bit hash; 10^7 of
    them on each side collide by accident with probability 5e-6.
    """
    train_words, test_words = _words(train), _words(test)
    grams, places, rows = _grams(*train_words, words)
    test_grams, test_places, test_rows = _grams(*test_words, words)
    if not len(grams) or not len(test_grams):
        return []
    boilerplate = np.union1d(_frequent(grams, rows, common), _frequent(test_grams, test_rows, common))
    kept = ~np.isin(test_grams, boilerplate)
    unique, first = np.unique(test_grams[kept], return_index=True)
    shared = np.flatnonzero(np.isin(grams, unique))
    starts = shared[np.unique(rows[shared], return_index=True)[1]]  # the first shared gram of each training row
    tests = first[np.searchsorted(unique, grams[starts])]
    found = []
    for row, place, test_row in zip(rows[starts], places[starts], test_rows[kept][tests], strict=True):
        text = " ".join(train_words[0].dictionary.take(train_words[0].indices.slice(int(place), words)).to_pylist())
        found.append(Overlap(int(row), int(test_row), text))
    return found


def _words(texts: list[str]) -> tuple[pa.DictionaryArray, np.ndarray]:
    """(every word of every text, the text that each belongs to)."""
    plain = pc.utf8_lower(pc.utf8_normalize(pa.array(texts, pa.string()), form="NFKC"))
    split = pc.split_pattern(pc.utf8_trim_whitespace(pc.replace_substring_regex(plain, _NOT_A_WORD, " ")), " ")
    words, rows = pc.list_flatten(split), pc.list_parent_indices(split)
    there = pc.not_equal(words, "")  # a text without words splits into one empty one
    return words.filter(there).dictionary_encode(), rows.filter(there).to_numpy()


def _grams(words: pa.DictionaryArray, rows: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(uint64 hash, place of the first word, text) of every run of `size` words inside a text."""
    from pandas.util import hash_array

    if len(rows) < size:
        return np.empty(0, np.uint64), np.empty(0, np.int64), np.empty(0, np.int64)
    vocabulary = hash_array(words.dictionary.to_numpy(zero_copy_only=False), hash_key=_HASH_KEY, categorize=False)
    hashed = vocabulary[words.indices.to_numpy()]
    count = len(rows) - size + 1
    grams = np.zeros(count, np.uint64)
    for offset in range(size):  # a polynomial in an odd number, modulo 2**64
        grams = grams * _MULTIPLIER + hashed[offset : offset + count]
    places = np.flatnonzero(rows[:count] == rows[size - 1 :])
    return grams[places], places, rows[places]


def _frequent(grams: np.ndarray, rows: np.ndarray, common: int) -> np.ndarray:
    """Grams that stand in more than `common` different texts."""
    order = np.lexsort((rows, grams))
    grams, rows = grams[order], rows[order]
    once = np.ones(len(grams), bool)
    once[1:] = (grams[1:] != grams[:-1]) | (rows[1:] != rows[:-1])
    unique, counts = np.unique(grams[once], return_counts=True)
    return unique[counts > common]


# What labels look like without the truth


def disagreement(groups: dict[str, list[tuple[str, int]]]) -> dict[str, float] | None:
    """How often rows that ask one question carry different labels, and the label noise that would explain it.

    Two copies with independent errors at rate p, spread evenly over K - 1 wrong answers, differ with probability
    d = 2 p - p^2 K / (K - 1); solved for p. Free answers count as K without end: there two wrong labels never agree.

    Args:
        groups: by question, (label, number of options or 0) of every row that asks it; groups of one are passed over.

    Returns:
        questions, rows, disagreement, estimate, low and high (95 %), or None without a repeated question.
    """
    repeated = [group for group in groups.values() if len(group) > 1]
    if not repeated:
        return None
    options = [count for group in repeated for _, count in group if count > 1]
    wrong = float(np.mean(options)) - 1 if 2 * len(options) > sum(map(len, repeated)) else math.inf
    differ = float(np.mean([_pairs_that_differ([label for label, _ in group]) for group in repeated]))
    low, high = wilson(differ, len(repeated))
    rates = {name: _error_rate(value, wrong) for name, value in (("estimate", differ), ("low", low), ("high", high))}
    return {"questions": len(repeated), "rows": sum(map(len, repeated)), "disagreement": differ, **rates}


def _error_rate(differ: float, wrong: float) -> float:
    """The smaller p with differ = 2 p - p^2 (1 + 1 / wrong), `wrong` answers being wrong; the rate of a blind guess where none is."""
    factor = 1 + 1 / wrong
    return (1 - math.sqrt(max(0.0, 1 - differ * factor))) / factor


def _pairs_that_differ(labels: list[str]) -> float:
    """The share of the pairs of labels that are different."""
    _, counts = np.unique(labels, return_counts=True)
    total = len(labels)
    return 1 - float((counts * (counts - 1)).sum()) / (total * (total - 1))


def by_question(table: pa.Table, column: str, near: bool) -> dict[str, list[tuple[str, int]]]:
    """(label, number of options) of every row by its question, for `disagreement`. A choice's label is its option's text, since the
    options of a copy may stand in another order."""
    groups: dict[str, list[tuple[str, int]]] = {}
    for row in table.select(["question", "choices", "choice_labels", column]).to_pylist():
        label, options = row[column], row["choices"] or []
        if label is None:  # noise may have taken it away
            continue
        if options and label in row["choice_labels"]:
            label = options[row["choice_labels"].index(label)]
        key = near_key(row["question"], options) if near else question_key(row["question"], options)
        groups.setdefault(key, []).append((normalise_text(label), len(options)))
    return groups


def noise_estimates(table: pa.Table, column: str, seed: int) -> list[dict[str, Any]]:
    """Every estimate of the share of wrong labels that needs no truth: name, rows behind it, estimate, low, high, explanation.

    Args:
        table: columns question, choices, choice_labels and `column`, the label to judge; `vote_share` where a model voted.
    """
    found = []
    if "reward" in table.column_names:
        table = table.filter(pc.not_equal(table["reward"], "dialogue"))  # equal openings of different goals are no disagreement
    if "vote_share" in table.column_names and table["vote_share"].null_count < table.num_rows:
        shares = pc.drop_null(table["vote_share"]).to_numpy()
        wrong = bootstrap_mean(1 - shares, seed=seed)
        why = "1 - mean share of the votes that the label got; right if a vote share is the probability of being right"
        found.append(_estimate("votes", len(shares), wrong.mean, wrong.low, wrong.high, why))
    for name, near in (("duplicates", False), ("near_duplicates", True)):
        if measured := disagreement(by_question(table, column, near)):
            groups = f"groups of {'near ' if near else ''}copies: {measured['questions']:,}"
            why = f"{groups}; labels differ in {measured['disagreement']:.1%} of pairs; right if errors are independent and truths equal"
            found.append(_estimate(name, measured["rows"], measured["estimate"], measured["low"], measured["high"], why))
    return found


def _estimate(name: str, rows: int, estimate: float, low: float, high: float, why: str) -> dict[str, Any]:
    return {"name": name, "rows": int(rows), "estimate": float(estimate), "low": float(low), "high": float(high), "why": why}
