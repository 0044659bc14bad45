"""Schema-guided task-oriented dialogue: a rule-based user with a goal, and a service with an API (Rastogi et al. 2020, arXiv 1909.05855).

A turn of the policy either calls the service (service.py) or is heard by the user, who goes by these rules, in this order:

1. An answer to the user's own question is judged: the right value, and no other value of that slot, no number that nobody knows, no
   more than LONGEST_ANSWER words; for yes and no the first answer stands, for others a second one is heard.
2. A value that contradicts the goal is corrected.
3. Slots that the turn asks for are answered.
4. Else, once the service has found what is wanted, the next requested slot is asked; else the next constraint of the next call is told;
   else the user repeats what is to be done.

The user leaves when nothing is left to want, after PATIENCE turns without progress, and at the latest after MOST_TURNS.

The row's `metadata` is a JSON object:
    service     name, description, slots (name, description, is_categorical, possible_values), intents (name, description,
                is_transactional, required_slots, optional_slots {slot: default}, result_slots): a service of SGD's schema.json
    goal        calls [{method, parameters {slot: value}}] in order, requested [slots], target {slot: value}: the record that is wanted,
                words {slot: [how the user says it]}
    records     other records of the service, {slot: value} each
"""

from __future__ import annotations

import json
from typing import Any

from dfpo_core.environments import registry
from dfpo_core.environments.language import find, mentions, same, spellings, spoken, tokens, yes_or_no
from dfpo_core.environments.service import Service, listed, read_call
from dfpo_core.errors import UserError

MOST_TURNS = 30
PATIENCE = 4
LONGEST_ANSWER = 60  # words
LONGEST_REPLY = 1200  # characters
MOST_SENTENCES = 4  # answers and corrections in one reply
_ASKING = {"what", "which", "when", "where", "who", "whom", "how", "could", "please", "need", "tell", "provide", "specify"}
_LIMITS = {"slots": 100, "intents": 30, "calls": 10, "requested": 20, "records": 50}


@registry.register("dialogue")
class Dialogue:
    """One conversation: the user, the service, and what has been achieved."""

    def __init__(self, row: dict[str, Any]):
        facts = facts_of(row)
        self.goal, self.schema = facts["goal"], facts["service"]
        self.service = Service(str(row.get("row_id", "")), self.schema, self.goal, facts["records"])
        self.categories = {slot["name"]: slot["possible_values"] for slot in self.schema["slots"] if slot["is_categorical"]}
        opening = tokens(row["question"])
        self.told = {slot for slot in self.constraints if any(find(opening, said) for said in self._said(slot))}
        self.answers: dict[str, bool] = {}  # by requested slot that needs no more asking: was it told rightly
        self.asked, self.asked_before = "", False  # the user's open question
        self.turns = self.idle = 0
        self.over = False

    @staticmethod
    def briefing(row: dict[str, Any]) -> str:
        """The service's methods, one a line, with `?` behind what may be left out, and the values of slots that have a fixed list."""
        schema = facts_of(row)["service"]
        lines, used = [f"Service: {schema['description']}"], set()
        for intent in schema["intents"]:
            slots = [*intent["required_slots"], *(f"{slot}?" for slot in intent["optional_slots"])]
            used |= {slot.removesuffix("?") for slot in slots}
            lines.append(f"{intent['name']}({', '.join(slots)}): {intent['description']}")
        listed = [slot for slot in schema["slots"] if slot["is_categorical"] and slot["name"] in used]
        lines += [f"{slot['name']}: {', '.join(slot['possible_values'])}" for slot in listed]
        return "\n".join(lines)

    @property
    def constraints(self) -> dict[str, str]:
        """Every value that the user would tell, by slot, in the order of the calls."""
        return {slot: value for call in self.goal["calls"] for slot, value in call["parameters"].items()}

    # --- the conversation ------------------------------------------------------------------------------------------------------

    def reply(self, text: str) -> str | None:
        if self.over:
            return None
        self.turns += 1
        before = self._progress()
        call = read_call(text)
        said = self._hear(tokens(text), "?" in text) if call is None else self.service.call(call)
        self.idle = 0 if self._progress() > before else self.idle + 1
        self.over = said is None or self.idle >= PATIENCE or self.turns >= MOST_TURNS
        return None if self.over else said[:LONGEST_REPLY]

    def _progress(self) -> int:
        return len(self.told) + len(self.answers) + len(self.service.completed) + len(self.service.shown)

    def _hear(self, words: list[str], question: bool) -> str | None:
        parts = []
        if self.asked:
            self._judge(words)
        else:
            parts += self._corrections(words)
        if question or _ASKING & set(words):
            parts += self._asked_for(words)
        parts = list(dict.fromkeys(parts))[:MOST_SENTENCES]
        following = self._next(bool(parts))
        return " ".join([*parts, following]).strip() if following is not None else None

    def _next(self, answered: bool) -> str | None:
        """What the user wants to say next: "" for nothing more in this turn, None for goodbye."""
        self.asked = "" if self.asked in self.answers else self.asked
        open_questions = [slot for slot in self.goal["requested"] if slot not in self.answers and slot in self.service.shown]
        open_calls = [call for index, call in enumerate(self.goal["calls"]) if index not in self.service.completed]
        if open_questions:
            if not self.asked:
                self.asked, self.asked_before = open_questions[0], False
            return self._question(self.asked)
        if not open_calls:
            return None
        if answered:
            return ""
        untold = [slot for slot in open_calls[0]["parameters"] if slot not in self.told]
        return self._tell(untold[0]) if untold else f"Please do that: {self.service.intents[open_calls[0]['method']]['description']}."

    def _tell(self, slot: str) -> str:
        self.told.add(slot)
        return f"The {spoken(slot)} is {self._said(slot)[0]}."

    def _said(self, slot: str) -> list[str]:
        """How the user says the value of a constraint."""
        return [*self.goal["words"].get(slot, []), self.constraints[slot]]

    def _question(self, slot: str) -> str:
        return f"Yes or no: {spoken(slot)}?" if _is_truth(self.service.wanted[slot]) else f"What is the {spoken(slot)}?"

    # --- what the user understands ---------------------------------------------------------------------------------------------

    def _judge(self, words: list[str]) -> None:
        """Settle the open question, or ask once more."""
        slot, value = self.asked, self.service.wanted[self.asked]
        if len(words) <= LONGEST_ANSWER:
            if _is_truth(value):
                answer = yes_or_no(words, slot)
                if answer is not None:
                    self.answers[slot] = answer == same(value, "True")
            elif self._states(words, slot, value):
                self.answers[slot] = True
        if slot not in self.answers and self.asked_before:
            self.answers[slot] = False
        self.asked_before = True

    def _states(self, words: list[str], slot: str, value: str) -> bool:
        """Whether the value is stated and nothing beside it that would make it a guess."""
        place = find(words, value)
        if place is None:
            return False
        rest = [*words[: place[0]], "|", *words[place[1] :]]
        own = spellings(value)
        if any(find(rest, other) for other in self._other_values(slot) if tokens(other) not in own):
            return False
        facts = [*self.service.wanted.values(), *(way for said in self.goal["words"].values() for way in said)]
        known = {word for fact in facts for way in spellings(fact) for word in way}
        return all(word in known for word in rest if word[0].isdigit())

    def _other_values(self, slot: str) -> list[str]:
        """Values of the slot that are not the wanted one: those of a fixed list, and of the service's other records."""
        others = [*self.categories.get(slot, []), *(record[slot] for record in self.service.records if slot in record)]
        return [other for other in dict.fromkeys(others) if other and not same(other, self.service.wanted.get(slot, ""))]

    def _corrections(self, words: list[str]) -> list[str]:
        """The true value of each constraint for which the turn names another; a bare number only where the turn is about its slot."""
        found = []
        for slot in self.constraints:
            if any(find(words, said) for said in self._said(slot)):
                continue
            about = mentions(words, slot)
            if any(find(words, other) and (about or not _is_short(other)) for other in self._other_values(slot)):
                found.append(f"No. {self._tell(slot)}")
        return found

    def _asked_for(self, words: list[str]) -> list[str]:
        """Answers to questions about the parameters of the methods that the goal needs; a value that was told is told again."""
        parts, methods = [], [self.service.intents[call["method"]] for call in self.goal["calls"]]
        for slot in dict.fromkeys(slot for intent in methods for slot in (*intent["required_slots"], *intent["optional_slots"])):
            if mentions(words, slot) and slot not in self.constraints:
                parts.append(f"Any {spoken(slot)} will do.")
            elif mentions(words, slot) and not any(find(words, said) for said in self._said(slot)):
                parts.append(self._tell(slot))
        return parts

    # --- what has been achieved ------------------------------------------------------------------------------------------------

    def progress(self) -> tuple[float, float]:
        """(share of the goal's calls that were made, 0 after a wrong booking; share of the requested slots that were told)."""
        calls, requested = len(self.goal["calls"]), len(self.goal["requested"])
        done = 0.0 if self.service.wrong_bookings else len(self.service.completed) / calls
        return done, sum(self.answers.values()) / requested if requested else 1.0

    def rates(self) -> dict[str, float]:
        """task: every call of the goal made, and no wrong booking. ask: every requested slot told (absent where none is). goal: both."""
        task, ask = (float(share == 1.0) for share in self.progress())
        return {"task": task} | ({"ask": ask} if self.goal["requested"] else {}) | {"goal": task * ask}


def _is_truth(value: str) -> bool:
    return value in ("True", "False")


def _is_short(value: str) -> bool:
    """Values that stand in sentences about other things."""
    return _is_truth(value) or all(word[0].isdigit() or len(word) < 3 for word in tokens(value))


# --- reading a row -----------------------------------------------------------------------------------------------------------------


def facts_of(row: dict[str, Any]) -> dict[str, Any]:
    """The row's metadata. Raises UserError that names the row."""
    try:
        return checked(json.loads(row["metadata"]))
    except (KeyError, TypeError, ValueError) as error:
        problem = f"row {row.get('row_id')!r} is no dialogue ({error})"
        raise UserError("reward", problem, "give it metadata with service and goal, or choose another reward") from None


def checked(facts: Any) -> dict[str, Any]:
    """The metadata of a dialogue with everything optional filled in. Raises ValueError that says what is wrong."""
    service = _object(_object(facts, "metadata"), "service", "metadata")
    goal = _object(facts, "goal", "metadata")
    slots = [
        {"description": "", "is_categorical": False, "possible_values": []} | _object(slot, "service.slots")
        for slot in _list(service, "slots", "service")
    ]
    empty = {"description": "", "is_transactional": False, "required_slots": [], "optional_slots": {}, "result_slots": []}
    intents = [empty | _object(intent, "service.intents") for intent in _list(service, "intents", "service")]
    if not all(isinstance(default, str) for intent in intents for default in _object(intent, "optional_slots", "intents").values()):
        raise ValueError("optional_slots must have texts for defaults")
    names = {_text(slot, "name", "service.slots") for slot in slots}
    methods = {_text(intent, "name", "service.intents"): intent for intent in intents}
    for intent in intents:
        for key in ("required_slots", "optional_slots", "result_slots"):
            _check_names(intent[key], names, f"{key} of {intent['name']}")
    calls = [{"parameters": {}} | _object(call, "goal.calls") for call in _list(goal, "calls", "goal")]
    if not calls:
        raise ValueError("goal.calls is empty")
    for call in calls:
        if call.get("method") not in methods:
            raise ValueError(f"goal.calls names no method of the service: {str(call.get('method'))[:40]!r}")
        allowed = {*methods[call["method"]]["required_slots"], *methods[call["method"]]["optional_slots"]}
        _check_values(call["parameters"], allowed, f"a call of {call['method']}")
        missing = [slot for slot in methods[call["method"]]["required_slots"] if slot not in call["parameters"]]
        if missing:
            raise ValueError(f"a call of {call['method']} has no value for {missing[0]}")
    target, requested = goal.get("target", {}), _list({"requested": [], **goal}, "requested", "goal")
    _check_values(target, names, "goal.target")
    wanted = {slot: value for call in calls for slot, value in call["parameters"].items()}
    for call in calls:
        for slot, value in call["parameters"].items():
            if value != {**wanted, **target}[slot]:
                raise ValueError(f"the goal has two values of {slot}")
    for slot in requested:
        if slot not in target or not any(slot in methods[call["method"]]["result_slots"] for call in calls):
            raise ValueError(f"the requested slot {str(slot)[:40]!r} is in no result")
    words = _object({"words": {}, **goal}, "words", "goal")
    for slot, said in words.items():
        if slot not in names or not isinstance(said, list) or not all(isinstance(way, str) and way for way in said):
            raise ValueError("goal.words must be lists of texts by slot")
    records = _list({"records": [], **facts}, "records", "metadata")
    for record in records:
        _check_values(record, names, "records")
    if any(not isinstance(value, str) for slot in slots for value in slot["possible_values"]):
        raise ValueError("possible_values must be texts")
    return {
        "service": service | {"description": str(service.get("description", "")), "slots": slots, "intents": intents},
        "goal": {"calls": calls, "requested": requested, "target": target, "words": words},
        "records": records,
    }


def described(facts: dict[str, Any]) -> str:
    """The goal in a line: what stands as the row's answer."""
    calls = [f"{call['method']}({listed(call['parameters'])})" for call in facts["goal"]["calls"]]
    requested = facts["goal"]["requested"]
    return "; ".join([*calls, f"tell {', '.join(requested)}"] if requested else calls)


def _object(container: Any, key: str, where: str = "") -> dict[str, Any]:
    value = container.get(key) if where else container
    if not isinstance(value, dict):
        raise ValueError(f"{f'{where}.{key}' if where else key} is no object")
    return value


def _list(container: dict[str, Any], key: str, where: str) -> list[Any]:
    value = container.get(key)
    if not isinstance(value, list) or len(value) > _LIMITS[key]:
        raise ValueError(f"{where}.{key} is no list of at most {_LIMITS[key]}")
    return value


def _text(container: dict[str, Any], key: str, where: str) -> str:
    if not isinstance(container.get(key), str) or not container[key]:
        raise ValueError(f"{where} need a {key}")
    return container[key]


def _check_names(found: Any, names: set[str], where: str) -> None:
    unknown = [name for name in found if name not in names]
    if unknown:
        raise ValueError(f"{where}: the service has no slot {str(unknown[0])[:40]!r}")


def _check_values(values: Any, names: set[str], where: str) -> None:
    if not isinstance(values, dict) or not all(isinstance(value, str) and value for value in values.values()):
        raise ValueError(f"{where} must be texts by slot")
    _check_names(values, names, where)
