"""A scripted policy that knows the goal: it shows what a perfect conversation is, to the warm start and to the tests."""

from __future__ import annotations

from typing import Any

from dfpo_core.environments.dialogue import Dialogue
from dfpo_core.environments.language import same, spoken
from dfpo_core.environments.service import listed


def next_turn(dialogue: Dialogue) -> str:
    """What the perfect policy says: it answers the open question, calls when it has been told everything, and else asks."""
    if dialogue.asked:
        value = dialogue.service.shown[dialogue.asked]
        if value in ("True", "False"):
            return "Yes." if same(value, "True") else "No."
        return f"The {spoken(dialogue.asked)} is {value}."
    for index, call in enumerate(dialogue.goal["calls"]):
        if index not in dialogue.service.completed:
            untold = [slot for slot in call["parameters"] if slot not in dialogue.told]
            if untold:
                return f"What is the {spoken(untold[0])}?"
            said = {slot: dialogue.goal["words"].get(slot, [value])[0] for slot, value in call["parameters"].items()}
            return f"CALL {call['method']}({listed(said)})"
    return "That is done."


def demonstrate(row: dict[str, Any]) -> list[tuple[str, str | None]]:
    """(turn, reply) of a conversation that reaches the goal; the last reply is None."""
    dialogue, exchanges = Dialogue(row), []
    while not dialogue.over:
        turn = next_turn(dialogue)
        exchanges.append((turn, dialogue.reply(turn)))
    return exchanges
