"""What a model answers when it is asked several times: pseudo-labels by majority vote, and the wrong answers that it likes best.

Labels by vote are how reinforcement learning goes on where nobody knows the answers (Zuo et al. 2025, TTRL, arXiv 2504.16084). Two
responses vote for the same answer where the row's reward takes them for the same: equal numbers, the same option, equal text, the same
formula.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from pathlib import Path
from typing import Any

from dfpo_core.config import PipelineConfig
from dfpo_core.rewards import extract_choice, extract_number, latex, normalise_text
from dfpo_core.rewards.answers import after_last_mark
from dfpo_core.rewards.math import final_formula


def sample(rows: list[dict[str, Any]], config: PipelineConfig) -> list[list[str]]:
    """`noise.voter.samples` responses to each row, in the rows' order.

    The same rows, voter and seed give the same responses; they are kept under `home/votes`, so that a study asks once. Raises UserError for
    a model that cannot be loaded and for prompts that are too long.
    """
    place = config.home_path / "votes" / f"{_identity(rows, config)}.json"
    if place.is_file():
        return json.loads(place.read_text(encoding="utf-8"))
    responses = _ask(rows, config)
    place.parent.mkdir(parents=True, exist_ok=True)
    partial = place.with_suffix(f".{os.getpid()}.partial")
    partial.write_text(json.dumps(responses), encoding="utf-8")
    partial.replace(place)
    return responses


def _identity(rows: list[dict[str, Any]], config: PipelineConfig) -> str:
    """Hash of all that the responses depend on; the weights of a hub id or a package are named, not read."""
    from dfpo_core.models import directory_sha256

    reference = config.noise.voter.model or config.model
    weights = directory_sha256(reference) if Path(reference).is_dir() else reference
    asked = [[row["row_id"], row["question"], row["reward"], row["choices"], row["choice_labels"]] for row in rows]
    parts = [
        weights,
        asked,
        config.prompt.model_dump(mode="json"),
        config.noise.voter.model_dump(mode="json"),
        config.seed,
        config.precision,
    ]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:24]


def _ask(rows: list[dict[str, Any]], config: PipelineConfig) -> list[list[str]]:
    import torch
    from tqdm import tqdm

    from dfpo_core import rollout
    from dfpo_core.data import prompts
    from dfpo_core.models import load_policy

    voter = config.noise.voter
    torch.set_num_threads(config.threads or torch.get_num_threads())
    torch.manual_seed(config.seed)  # a scratch model's weights
    model, tokenizer = load_policy(voter.model or config.model, config.home_path)
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    with tqdm(total=len(rows), desc="votes", unit="question", disable=None) as bar:
        return rollout.respond(
            model,
            tokenizer,
            prompts.encode(tokenizer, rows, config.prompt),
            max_new_tokens=voter.max_new_tokens,
            batch_size=voter.batch_size,
            precision=config.precision,
            temperature=voter.temperature,
            samples=voter.samples,
            seed=config.seed,
            progress=bar.update,
        )


def answer(row: dict[str, Any], response: str) -> tuple[str, str] | None:
    """(what decides whether two answers are the same, the answer as a label) of a response; None where it holds no answer."""
    if row["reward"] == "number":
        number = extract_number(response)
        return (number, number) if number is not None else None
    if row["reward"] == "choice":
        label = extract_choice(response, row["choice_labels"], row["choices"])
        return (label, label) if label is not None else None
    if row["reward"] == "math":
        formula = latex.tidy(final_formula(response)).strip()
        if not formula:
            return None
        plain = latex.plain(formula)
        return (f"value {plain.value}" if plain is not None else latex.spelling(formula)), formula
    text = (response if row["reward"] == "exact" else after_last_mark(response)[1]).strip()
    return (normalise_text(text), text) if normalise_text(text) else None


def tally(row: dict[str, Any], responses: list[str]) -> list[tuple[str, int]]:
    """(label, votes) of every answer that was given, the most votes first; a tie goes by a hash of row and answer.

    Of the spellings of one answer, the most frequent is the label, the first in the alphabet where several are.
    """
    spellings: dict[str, Counter[str]] = {}
    for found in filter(None, (answer(row, response) for response in responses)):
        spellings.setdefault(found[0], Counter())[found[1]] += 1

    def rank(key: str) -> tuple[int, bytes]:
        return -spellings[key].total(), hashlib.sha256(f"{row['row_id']}\n{key}".encode()).digest()

    return [(min(of, key=lambda s, of=of: (-of[s], s)), of.total()) for of in (spellings[key] for key in sorted(spellings, key=rank))]


def majority(rows: list[dict[str, Any]], responses: list[list[str]]) -> tuple[list[str | None], list[float]]:
    """Each row's label by vote, None where no response holds an answer, and the share of all its responses that voted for it."""
    tallies = [tally(row, texts) for row, texts in zip(rows, responses, strict=True)]
    labels = [votes[0][0] if votes else None for votes in tallies]
    shares = [votes[0][1] / len(texts) if votes else 0.0 for votes, texts in zip(tallies, responses, strict=True)]
    return labels, shares


def strongest_wrong(rows: list[dict[str, Any]], responses: list[list[str]]) -> list[str | None]:
    """The wrong answer with the most votes of each row; None where the model gave no wrong one."""
    candidates = [(index, label) for index, texts in enumerate(responses) for label, _ in tally(rows[index], texts)]
    wrong: list[str | None] = [None] * len(rows)
    for (index, label), right in zip(candidates, are_right(rows, candidates), strict=True):
        if not right and wrong[index] is None:
            wrong[index] = label
    return wrong


def are_right(rows: list[dict[str, Any]], labels: list[tuple[int, str]]) -> list[bool]:
    """Whether each label, given with its row's index, is the truth to the row's own reward."""
    from dfpo_core import rewards

    return [score >= 0.99 for score in rewards.score([rows[index] for index, _ in labels], [label for _, label in labels])]
