"""A dialogue that several test files share: a table in a Thai restaurant, and a policy that says it perfectly."""

from __future__ import annotations

import copy
import json
from typing import Any

from dfpo_core.environments import TURN

SERVICE = {
    "name": "Restaurants",
    "description": "Search for restaurants and reserve a table",
    "slots": [
        {"name": "cuisine"},
        {"name": "city"},
        {"name": "restaurant_name"},
        {"name": "time"},
        {"name": "party_size", "is_categorical": True, "possible_values": ["1", "2", "3"]},
        {"name": "price_range", "is_categorical": True, "possible_values": ["inexpensive", "moderate", "expensive"]},
        {"name": "has_live_music", "is_categorical": True, "possible_values": ["True", "False"]},
        {"name": "phone_number"},
    ],
    "intents": [
        {
            "name": "FindRestaurants",
            "description": "Find a restaurant",
            "required_slots": ["cuisine", "city"],
            "optional_slots": {"price_range": "dontcare"},
            "result_slots": ["restaurant_name", "cuisine", "city", "price_range", "has_live_music", "phone_number"],
        },
        {
            "name": "ReserveRestaurant",
            "description": "Reserve a table",
            "is_transactional": True,
            "required_slots": ["restaurant_name", "city", "time"],
            "optional_slots": {"party_size": "2"},
            "result_slots": ["restaurant_name", "city", "time", "party_size"],
        },
    ],
}
WANTED = {
    "restaurant_name": "Thai Basil",
    "cuisine": "Thai",
    "city": "San Jose",
    "price_range": "moderate",
    "has_live_music": "False",
    "phone_number": "408-555-0101",
    "time": "19:30",
    "party_size": "3",
}
OTHER = WANTED | {"restaurant_name": "Bangkok Cafe", "price_range": "expensive", "phone_number": "408-555-0202"}
GOAL = {
    "calls": [
        {"method": "FindRestaurants", "parameters": {"cuisine": "Thai", "city": "San Jose"}},
        {
            "method": "ReserveRestaurant",
            "parameters": {"restaurant_name": "Thai Basil", "city": "San Jose", "time": "19:30", "party_size": "3"},
        },
    ],
    "requested": ["price_range", "has_live_music"],
    "target": WANTED,
    "words": {"time": ["half past seven"]},
}
FACTS = {"service": SERVICE, "goal": GOAL, "records": [OTHER]}

FIND = 'CALL FindRestaurants(cuisine="Thai", city="San Jose")'
RESERVE = 'CALL ReserveRestaurant(restaurant_name="Thai Basil", city="San Jose", time="half past seven", party_size="3")'
PERFECT = [FIND, "I found Thai Basil.", "It is moderate.", "No.", "At what time?", RESERVE, "Your table is reserved."]


def facts(**goal: Any) -> dict[str, Any]:
    """The facts with parts of the goal replaced."""
    changed = copy.deepcopy(FACTS)
    changed["goal"] |= goal
    return changed


def row(row_id: str = "d/1", **goal: Any) -> dict[str, Any]:
    """A row as noise_data writes it."""
    return {
        "row_id": row_id,
        "question": "I want to eat Thai food in San Jose.",
        "answer": "a table",
        "label": "a table",
        "clean_answer": "a table",
        "is_noisy": False,
        "noise_kind": "none",
        "domain": "restaurants",
        "reward": "dialogue",
        "source": "test",
        "licence": "none",
        "choices": None,
        "choice_labels": None,
        "metadata": json.dumps(facts(**goal)),
    }


def said(*turns: str) -> str:
    """A response: the policy's turns."""
    return TURN.join(turns)
