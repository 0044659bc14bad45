"""Domains: what a kind of task is called, where its data sets are, how its questions are put and how answers are scored.

A domain is one file here and a line in `registry`. It names data sets, and for each the hub id and the local file, so that one line of
configuration, `{kind: dataset, name: gsm8k}`, reads either with the same code. `data.domain: math` takes the domain's train, in-domain
and out-of-domain sources where the configuration gives none, and `prompt.domain: math` its prompt. Nothing here imports torch or
datasets.

The rows of a local file (JSONL or Parquet) have the columns

    question        text, required
    answer          text or number, required; for a choice its label, or its index from 0; of a dialogue written from its goal
    id              unique in the file; made from the question where absent
    choices         list of options, or {"text": [...], "label": [...]}; only for choices
    labels          labels of the options; default A, B, C, ...
    subject         free; `options.subjects` selects by it and `options.by_subject` makes it part of the row's domain
    reward          how this row is scored; default: the source's
    source, licence default: the source's
    metadata        a JSON object for the reward and the report; of a dialogue its service and goal (dfpo_core/environments/dialogue.py)

or the columns of the hub's copy, which `DataSet.columns` and `DataSet.convert` turn into these.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from dfpo_core.errors import UserError
from dfpo_core.registry import Registry

if TYPE_CHECKING:
    from dfpo_core.config import PromptConfig

NAMES = "dialogue", "math", "science"

registry = Registry("data.domain", "dfpo_core.domains", {name: name for name in NAMES})


class LeftOut(Exception):
    """Raised by `DataSet.convert` for a row that is sound but not for us, e.g. a question about a picture; counted by reason."""


@dataclass(frozen=True)
class Split:
    """Where one split is: the hub's name for it, and the stem of the local file (`*.jsonl`, `*.parquet`, or a folder)."""

    hub: str
    file: str


@dataclass(frozen=True)
class DataSet:
    """One data set by name. `splits` may have `train` (used under data.train) and `test` (used under id_test and ood_test)."""

    about: str
    hub: str  # id on the hub
    licence: str  # of the hub's copy; a row's own licence column goes first
    reward: str  # of rows that do not name their own
    splits: dict[str, Split]
    configs: tuple[str, ...] = ()  # the hub's configurations that are read one after the other; empty: its only one
    subjects: tuple[str, ...] = ()  # rows of other subjects are left out; empty: every subject
    columns: dict[str, str] = field(default_factory=dict)  # our column: the hub's; applied to rows that have all of these
    join: dict[str, Split] = field(default_factory=dict)  # columns that name a row (its `id`) of another table, which takes their place
    convert: Callable[[dict[str, Any]], dict[str, Any]] | None = None  # of such a row after renaming; may raise LeftOut, ValueError


class Domain:
    """Base of the entries; they are never instantiated. The sources of a split are entries of data.train, data.id_test, data.ood_test."""

    reward: str  # of rows that no data set or source says anything about
    prompt: PromptConfig
    data_sets: dict[str, DataSet]
    train: tuple[dict[str, Any], ...] = ()
    id_test: tuple[dict[str, Any], ...] = ()
    ood_test: tuple[dict[str, Any], ...] = ()


def data_sets() -> dict[str, DataSet]:
    """Every named data set of every domain. Raises ValueError where two domains use one name."""
    found: dict[str, DataSet] = {}
    for name in registry.names:
        for key, entry in registry.get(name).data_sets.items():
            if key in found:
                raise ValueError(f"two domains have a data set called {key!r}")
            found[key] = entry
    return found


def data_set(name: str, key: str = "data") -> DataSet:
    """The data set called `name`. Raises UserError naming `key`, the configuration key that asked for it."""
    known = data_sets()
    if name not in known:
        close = difflib.get_close_matches(name, known, n=3) or sorted(known)
        raise UserError(key, f"unknown data set {name!r}", f"choose one of: {', '.join(close)}")
    return known[name]


def subject_key(subject: Any) -> str:
    """One spelling of a subject: `Counting & Probability` and `counting_and_probability` are the same."""
    words = "".join(c if c.isalnum() else " " for c in str(subject).lower().replace("&", " and "))
    return "_".join(words.split())
