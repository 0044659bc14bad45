"""The service of a dialogue: reads `CALL Method(slot="value", ...)` from a turn, and answers from the records that its row carries.

The answer is one of
    RESULT: 2 found                       search: a numbered line a record, at most LONGEST_LIST, in an order that is the row's own
    DONE: slot="value", ...               booking: what was booked, which is what the call says, right or wrong
    ERROR: FindBus needs origin           unknown method or parameter, a missing one, or a line that is no call
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass, field
from typing import Any

from dfpo_core.environments.language import LONGEST_TEXT, same

LONGEST_LIST = 5
_CALL_LINE = re.compile(r"^[ \t`>*-]{0,8}CALL\b(.*)$", re.MULTILINE)
_CALL = re.compile(r"\s*([A-Za-z_]\w{0,63})\s*\((.*)\)[\s`.;]*")
_ARGUMENT = re.compile(r"""\s*([A-Za-z_]\w{0,63})\s*=\s*(?:"([^"]*)"|'([^']*)'|([^,"'()]+))\s*(?:,|$)""")


@dataclass(frozen=True)
class Call:
    """One call as the policy wrote it; `method` is empty where the line is none."""

    method: str
    parameters: dict[str, str] = field(default_factory=dict)


def read_call(text: str) -> Call | None:
    """The first line of a turn that calls, or None. A turn that calls is not heard by the user."""
    line = _CALL_LINE.search(text[:LONGEST_TEXT])
    if line is None:
        return None
    match = _CALL.fullmatch(line[1])
    if match is None:
        return Call("")
    parameters, place, arguments = {}, 0, match[2].strip()
    while place < len(arguments):
        argument = _ARGUMENT.match(arguments, place)
        if argument is None or argument[1] in parameters:
            return Call("")
        parameters[argument[1]] = next(value for value in argument.groups()[1:] if value is not None).strip()
        place = argument.end()
    return Call(match[1], parameters)


class Service:
    """One row's service: its schema, the goal's calls, the record that the user wants, and other records."""

    def __init__(self, row_id: str, schema: dict[str, Any], goal: dict[str, Any], records: list[dict[str, str]]):
        self.goal = goal
        self.intents = {intent["name"]: intent for intent in schema["intents"]}
        wanted = {slot: value for call in goal["calls"] for slot, value in call["parameters"].items()} | goal["target"]
        everything = [wanted, *records]
        self.records = sorted(everything, key=lambda record: hashlib.sha256(f"{row_id} {sorted(record.items())}".encode()).digest())
        self.wanted = wanted
        self.completed: set[int] = set()  # of goal["calls"]
        self.wrong_bookings = 0
        self.shown: dict[str, str] = {}  # what the policy has been told about the wanted record

    def means(self, given: str, slot: str, value: str) -> bool:
        """Whether a parameter is the wanted value, in any spelling or in the user's own words."""
        said = self.goal["words"].get(slot, []) if value == self.wanted.get(slot) else []
        return any(same(given, way) for way in (value, *said))

    def call(self, call: Call) -> str:
        """The service's answer."""
        intent = self.intents.get(call.method)
        if not call.method:
            return 'ERROR: write CALL Method(slot="value", slot="value") on one line'
        if intent is None:
            return f"ERROR: there is no method {call.method}; there are {', '.join(self.intents)}"
        known = [*intent["required_slots"], *intent["optional_slots"]]
        for slot, value in call.parameters.items():
            if slot not in known:
                return f"ERROR: {call.method} has no parameter {slot}"
            if not value:
                return f"ERROR: {slot} is empty"
        missing = [slot for slot in intent["required_slots"] if slot not in call.parameters]
        if missing:
            return f"ERROR: {call.method} needs {', '.join(missing)}"
        serves = self._serves(call, intent)
        self.completed |= set() if serves is None else {serves}
        if not intent["is_transactional"]:
            return self._search(call, intent)
        if serves is None:
            self.wrong_bookings += 1
            return f"DONE: {listed(call.parameters)}"
        self.shown |= (booked := self._result(self.wanted, intent))
        return f"DONE: {listed(booked)}"

    def _serves(self, call: Call, intent: dict[str, Any]) -> int | None:
        """The goal's call that this one is: everything wanted is there, and nothing else but defaults and what is true of the wish."""
        for index, wish in enumerate(self.goal["calls"]):
            if wish["method"] != call.method or any(slot not in call.parameters for slot in wish["parameters"]):
                continue
            if all(self._fits(slot, value, wish["parameters"], intent) for slot, value in call.parameters.items()):
                return index
        return None

    def _fits(self, slot: str, value: str, wished: dict[str, str], intent: dict[str, Any]) -> bool:
        if slot in wished:
            return self.means(value, slot, wished[slot])
        default = intent["optional_slots"].get(slot)
        harmless = ["dontcare", *([] if default is None else [default])]
        return any(same(value, way) for way in harmless) or self.means(value, slot, self.wanted.get(slot, ""))

    def _search(self, call: Call, intent: dict[str, Any]) -> str:
        found = []
        for record in self.records:
            asked = [(slot, value) for slot, value in call.parameters.items() if slot in record and not same(value, "dontcare")]
            if all(self.means(value, slot, record[slot]) for slot, value in asked):
                found.append(record)
        if self.wanted in found[:LONGEST_LIST]:
            self.shown |= self._result(self.wanted, intent)
        lines = dict.fromkeys(listed(self._result(record, intent)) for record in found[:LONGEST_LIST])
        lines = [f"{number}. {line}" for number, line in enumerate(filter(None, lines), start=1)]
        return "\n".join([f"RESULT: {len(lines)} found", *lines])

    def _result(self, record: dict[str, str], intent: dict[str, Any]) -> dict[str, str]:
        return {slot: record[slot] for slot in intent["result_slots"] if slot in record}


def listed(values: dict[str, str]) -> str:
    """slot="value", slot="value", as in a call."""
    return ", ".join(f'{slot}="{value[:100]}"' for slot, value in values.items())
