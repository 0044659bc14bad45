"""Environments: what talks back between the policy's turns. A row has one where its `reward` names one; other rows are one turn.

An environment is a function of the row and of what the policy has said, so a conversation is written down as the policy's turns alone,
joined by TURN, and its score is found by playing it again. Nothing here imports torch.
"""

from __future__ import annotations

from typing import Any, Protocol

from dfpo_core.registry import Registry

TURN = "\x1e"  # the record separator of ASCII; `rollout.converse` takes it out of what the policy writes

registry = Registry("environment", "dfpo_core.environments", {"dialogue": "dialogue"})


class Environment(Protocol):
    """The other side of one conversation. Entries are built as `Entry(row)` and never raise on a text."""

    def reply(self, text: str) -> str | None:
        """What comes back to the policy's turn `text`, at most a few hundred characters; None once the conversation is over."""

    def rates(self) -> dict[str, float]:
        """How well it went so far, each in [0, 1]; a rate that says nothing about this row is left out."""


def converses(row: dict[str, Any]) -> bool:
    """Whether the row is a conversation."""
    return row.get("reward") in registry.names


def start(row: dict[str, Any]) -> Environment:
    """The other side of a row that converses. Raises UserError on a row without what it needs."""
    return registry.get(row["reward"])(row)


def briefing(row: dict[str, Any]) -> str:
    """What the policy is told in front of the first turn."""
    return registry.get(row["reward"]).briefing(row)


def play(row: dict[str, Any], response: str) -> tuple[Environment, list[str | None]]:
    """The environment after the turns of `response`, and its reply to each turn up to the one that ended the conversation."""
    environment, replies = start(row), []
    for turn in response.split(TURN):
        replies.append(environment.reply(turn))
        if replies[-1] is None:
            break
    return environment, replies


def transcript(row: dict[str, Any], response: str) -> str:
    """The conversation for people to read; the response as it is where the row is no conversation."""
    if not converses(row):
        return response
    replies = play(row, response)[1]
    lines = []
    for turn, reply in zip(response.split(TURN), replies, strict=False):  # what was said after the end is not part of it
        lines += [f"policy: {turn}"] + ([f"> {reply}"] if reply is not None else [])
    return "\n".join(lines)
