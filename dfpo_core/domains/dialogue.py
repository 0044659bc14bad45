"""Dialogue: tasks that a user wants done with a service, from the Schema-Guided Dialogue data set (SGD, arXiv 1909.05855).

A row is a conversation with a simulated user who has the goal of a real one; the words of the real one are not replayed. `question` is
what the user says first, and `metadata` holds service, goal and records as dfpo_core/environments/dialogue.py lists them. A JSONL or
Parquet file of your own has these two columns (`answer` is written from the goal), and `reward: dialogue`.

SGD's own files are read too: one with a dialogue a row (id, domain, service, turns, calls, goal_slots, requested_slots) beside a table of
services (`sgd_schema`: SGD's schema.json, one service a row with its name as id). A dialogue's goal is the last successful call of each
method, as far as they agree on every slot, with the record that the last of them found; the records of the other calls are what the
service finds besides. Not checked: the layout of copies on the hub, whose rows must have these columns.
"""

from __future__ import annotations

from typing import Any

from dfpo_core.config import PromptConfig
from dfpo_core.domains import DataSet, Domain, LeftOut, Split, registry
from dfpo_core.environments.dialogue import checked, described
from dfpo_core.environments.language import find, same, tokens

_MOST_RECORDS = 2  # beside the wanted one
_COLUMNS = "id", "service", "domain", "turns", "calls", "goal_slots", "requested_slots"


def from_sgd(row: dict[str, Any]) -> dict[str, Any]:
    """A dialogue of SGD in our columns. Raises LeftOut where it has no goal that can be reached, ValueError where it is malformed."""
    try:
        return _converted(_without_nulls(row))
    except (AttributeError, IndexError, KeyError, TypeError) as error:
        raise ValueError(f"is no dialogue in SGD's layout ({type(error).__name__}: {error})") from None


def _converted(row: dict[str, Any]) -> dict[str, Any]:
    schema = row["service"]
    intents = {intent["name"]: intent for intent in schema["intents"]}
    successful = [call for call in row["calls"] if call.get("result") and call["method"] in intents]
    if not successful:
        raise LeftOut("no call found anything")
    target, others = _wanted(successful)
    calls = _goal_calls(successful, target, intents)
    results = {slot for call in calls for slot in intents[call["method"]]["result_slots"]}
    requested = [slot for slot in row["requested_slots"] if slot in target and slot in results]
    constraints = {slot: value for call in calls for slot, value in call["parameters"].items()}
    categorical = {slot["name"] for slot in schema["slots"] if slot["is_categorical"]}
    words = {slot: [way.replace('"', "'") for way in said] for slot, said in row["goal_slots"].items() if said and slot in constraints}
    # The user may have changed their mind after the last call: for a slot with fixed values that can be seen.
    words = {slot: said for slot, said in words.items() if slot not in categorical or any(same(way, constraints[slot]) for way in said)}
    goal = {"calls": calls, "requested": requested, "target": target, "words": words}
    facts = {"service": _plain(schema), "goal": goal, "records": others[:_MOST_RECORDS]}
    question = _opening(row, calls, intents, words)
    return row | {
        "question": question,
        "answer": described(checked(facts)),
        "metadata": facts,
        "subject": row["domain"],
        "reward": "dialogue",
    }


def _without_nulls(value: Any) -> Any:
    """Parquet gives every object the keys of all, with null where there is nothing."""
    if isinstance(value, dict):
        return {key: _without_nulls(part) for key, part in value.items() if part is not None}
    return [_without_nulls(part) for part in value] if isinstance(value, list) else value


def _wanted(successful: list[dict[str, Any]]) -> tuple[dict[str, str], list[dict[str, str]]]:
    """(the record of the last call, with what earlier calls say of the same one; the other records)."""
    target, others = dict(successful[-1]["result"]), []
    for call in reversed(successful[:-1]):
        record = dict(call["result"])
        found = {slot: value for slot, value in record.items() if slot not in call["parameters"]}
        if found and all(target.get(slot, value) == value for slot, value in record.items()) and any(slot in target for slot in found):
            target = record | target
        elif record not in others:
            others.append(record)
    return target, others


def _goal_calls(successful: list[dict[str, Any]], target: dict[str, str], intents: dict[str, Any]) -> list[dict[str, Any]]:
    """The last call of each method, in order, with the wanted record's values; a call that contradicts a later one is no part of it."""
    calls: list[dict[str, Any]] = []
    constraints: dict[str, str] = {}
    for call in reversed(successful):
        if call["method"] in {known["method"] for known in calls}:
            continue
        parameters = {slot: value if call is successful[-1] else target.get(slot, value) for slot, value in call["parameters"].items()}
        allowed = [*intents[call["method"]]["required_slots"], *sorted(intents[call["method"]]["optional_slots"])]
        parameters = {slot: parameters[slot] for slot in allowed if parameters.get(slot, "dontcare") != "dontcare"}
        complete = all(slot in parameters for slot in intents[call["method"]]["required_slots"])
        if complete and all(constraints.get(slot, value) == value == target.get(slot, value) for slot, value in parameters.items()):
            constraints |= parameters
            calls.insert(0, {"method": call["method"], "parameters": parameters})
        elif call is successful[-1]:
            raise LeftOut("the last call lacks a slot, or its result contradicts it")
    return calls


def _opening(row: dict[str, Any], calls: list[dict[str, Any]], intents: dict[str, Any], words: dict[str, list[str]]) -> str:
    """The real user's first sentence, or a plain one where a value in it is not the goal's any more."""
    first = next((text.strip() for speaker, text in row["turns"] if speaker == "U" and text.strip()), "")
    final = {slot: value for call in calls for slot, value in call["parameters"].items()}
    spoken = tokens(first)
    outdated = [
        value
        for call in row["calls"]
        for slot, value in call["parameters"].items()
        if final.get(slot, value) != value and find(spoken, value) and not any(find(spoken, way) for way in words.get(slot, []))
    ]
    if first and not outdated:
        return first
    # Fewer words than make two questions overlap: many rows may say this.
    wish = " ".join(intents[calls[-1]["method"]]["description"].split()[:9])
    return f"Please help me: {wish[:1].lower()}{wish[1:]}."


def _plain(schema: dict[str, Any]) -> dict[str, Any]:
    """The service without the columns of the file that it stands in, in an order that does not depend on its format."""
    intents = [intent | {"optional_slots": dict(sorted(intent["optional_slots"].items()))} for intent in schema["intents"]]
    return {"name": schema["service_name"], "description": schema["description"], "slots": schema["slots"], "intents": intents}


@registry.register("dialogue")
class Dialogue(Domain):
    """Conversations of several turns with a user and an API; the out-of-domain services are never trained on."""

    reward = "dialogue"
    prompt = PromptConfig(
        system=(
            "You help a user to get something done with a service. In each turn you either talk to the user or call the service. A call is "
            'one line, for example CALL FindRestaurants(city="San Jose", cuisine="Thai"), and its result comes back to you alone. Ask the '
            "user for what a call needs, call, and answer the user's questions from the result, briefly."
        ),
        max_prompt_tokens=1024,
    )
    data_sets = {
        "sgd": DataSet(
            about="conversations about 11 services of 6 kinds; train and test share services",
            hub="google-research-datasets/schema_guided_dstc8",
            licence="CC BY-SA 4.0",
            reward="dialogue",
            splits={"train": Split("train", "sgd_train"), "test": Split("validation", "sgd_test_id")},
            columns={name: name for name in _COLUMNS},
            join={"service": Split("schema", "sgd_schema")},
            convert=from_sgd,
        ),
        "sgd_ood": DataSet(
            about="conversations about 8 services of 6 other kinds",
            hub="google-research-datasets/schema_guided_dstc8",
            licence="CC BY-SA 4.0",
            reward="dialogue",
            splits={"test": Split("test", "sgd_test_ood")},
            columns={name: name for name in _COLUMNS},
            join={"service": Split("schema", "sgd_schema")},
            convert=from_sgd,
        ),
    }
    train = ({"kind": "dataset", "name": "sgd", "options": {"by_subject": True}},)
    id_test = ({"kind": "dataset", "name": "sgd", "options": {"by_subject": True}},)
    ood_test = ({"kind": "dataset", "name": "sgd_ood", "options": {"by_subject": True}},)
