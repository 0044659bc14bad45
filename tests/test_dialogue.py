"""Dialogues worked by hand: what the user and the service reply, what each conversation earns, and nothing that breaks them."""

from __future__ import annotations

import json
import os

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dfpo_core import environments, rewards
from dfpo_core.config import NoiseConfig, RewardNoiseConfig, RewardsConfig, SourceConfig, parse_config
from dfpo_core.data import prepare, prompts
from dfpo_core.data.sources import read_source
from dfpo_core.domains.dialogue import from_sgd
from dfpo_core.environments import TURN
from dfpo_core.environments.demonstration import demonstrate
from dfpo_core.environments.dialogue import LONGEST_ANSWER, LONGEST_REPLY, MOST_TURNS, PATIENCE, Dialogue, checked
from dfpo_core.environments.language import LONGEST_TEXT, find, mentions, same, tokens, yes_or_no
from dfpo_core.environments.service import Call, read_call
from dfpo_core.errors import UserError
from dfpo_core.noise import add_label_noise, reward_noise
from dfpo_core.preflight import check
from tests.dialogues import FACTS, FIND, PERFECT, RESERVE, WANTED, facts, row, said

DATA = os.environ.get("DFPO_DATA_DIR", "")
needs_data = pytest.mark.skipif(not DATA, reason="DFPO_DATA_DIR names no folder with the real data files")


def score(*turns: str, **goal) -> float:
    return rewards.score([row(**goal)], [said(*turns)])[0]


def rates(*turns: str, **goal) -> dict[str, float]:
    return environments.play(row(**goal), said(*turns))[0].rates()


# --- conversations --------------------------------------------------------------------------------------------------------------


def test_the_perfect_conversation_word_by_word():
    dialogue = Dialogue(row())
    replies = [dialogue.reply(turn) for turn in PERFECT]
    assert replies[0].splitlines()[0] == "RESULT: 2 found" and len(replies[0].splitlines()) == 3
    assert replies[1:] == [
        "What is the price range?",
        "Yes or no: has live music?",
        "The restaurant name is Thai Basil.",
        "The time is half past seven.",
        'DONE: restaurant_name="Thai Basil", city="San Jose", time="19:30", party_size="3"',
        None,
    ]
    assert dialogue.rates() == {"task": 1.0, "ask": 1.0, "goal": 1.0}
    assert score(*PERFECT) == 1.0


# With the weights 0.4, 0.2, 0.4: 0.4 * (calls made / 2, 0 after a wrong booking) + 0.2 * (slots told / 2) + 0.4 * [all of it].
@pytest.mark.parametrize(
    ("changes", "expected", "task", "ask"),
    [
        ({}, 1.0, 1, 1),
        ({5: "It is all booked for you."}, 0.2 + 0.2, 0, 1),  # searched, never booked
        ({5: RESERVE.replace(', party_size="3"', "")}, 0.2, 0, 1),  # forgot the party: booked for the default of 2
        ({5: RESERVE.replace("half past seven", "8 pm")}, 0.2, 0, 1),  # a wrong value: booked wrongly
        ({5: RESERVE.replace("Thai Basil", "Bangkok Cafe")}, 0.2, 0, 1),
        ({5: RESERVE.replace("half past seven", "7:30 pm")}, 1.0, 1, 1),  # another spelling of 19:30
        ({2: "I will tell you later.", 3: "Later."}, 0.4, 1, 0),  # both calls; each slot was asked twice
        ({0: "I know a place: Thai Basil."}, 0.0, 0, 0),  # four turns that bring nothing on, and the user leaves
    ],
)
def test_what_a_change_to_the_perfect_conversation_earns(changes, expected, task, ask):
    turns = [changes.get(index, turn) for index, turn in enumerate(PERFECT)]
    assert score(*turns) == pytest.approx(expected)
    found = rates(*turns)
    assert (found["task"], found["ask"], found["goal"]) == (task, ask, task * ask)


@pytest.mark.parametrize(
    "lie",
    [
        "It is expensive.",  # another record's value
        "It is cheap.",  # nobody's value
        "It is inexpensive, moderate or expensive.",  # all of them
        "It is moderate, and 17 99 4 are numbers too.",  # numbers that nobody knows
        "moderate " * (LONGEST_ANSWER + 1),  # more than anybody listens to
        "",
    ],
)
def test_a_requested_slot_that_is_not_told_rightly_in_two_tries_counts_as_not_told(lie):
    turns = [FIND, "I found it.", lie, lie, "No.", RESERVE, "Done."]
    assert rates(*turns) == {"task": 1.0, "ask": 0.0, "goal": 0.0}
    assert score(*turns) == pytest.approx(0.4 + 0.2 / 2)  # both calls, one of two slots
    assert score(FIND, "I found it.", lie, "It is moderate.", "No.", RESERVE, "Done.") == 1.0


def test_yes_and_no_at_once_is_no_answer_and_the_first_clear_one_stands():
    start = [FIND, "I found it.", "It is moderate."]
    end = [RESERVE, "Done."]
    assert score(*start, "Yes and no.", "No.", *end) == 1.0
    assert score(*start, "Yes and no.", "Yes, no.", *end) == pytest.approx(0.5)
    assert score(*start, "Yes.", "No, sorry.", *end) == pytest.approx(0.5)
    assert score(*start, "It doesn't.", *end) == 1.0


def test_what_was_never_found_is_never_asked_so_a_guess_earns_nothing():
    assert score("It is moderate. No live music. Thai Basil.") == 0.0
    assert score("") == 0.0
    assert rates("") == {"task": 0.0, "ask": 0.0, "goal": 0.0}


def test_a_row_that_requests_nothing_has_no_ask_rate_and_its_weight_goes_to_the_rest():
    turns = [FIND, "Found.", "At what time?", RESERVE, "Done."]
    assert rates(*turns, requested=[]) == {"task": 1.0, "goal": 1.0}
    assert score(*turns, requested=[]) == 1.0
    assert score(FIND, requested=[]) == pytest.approx(0.4 * 0.5 / 0.8)


def test_weights_are_configurable_and_a_whole_goal_is_1_with_any():
    strict = rewards.create({"name": "dialogue", "task_weight": 0, "ask_weight": 0, "goal_weight": 1}, RewardsConfig())
    assert strict.score([row(), row()], [said(*PERFECT), said(*PERFECT[:-2])], "label") == [1.0, 0.0]
    with pytest.raises(UserError, match=r"train.reward.goal_weight: Input should be greater than 0"):
        rewards.parse({"name": "dialogue", "goal_weight": 0})


def test_the_user_answers_what_is_asked_corrects_what_is_wrong_and_else_volunteers():
    dialogue = Dialogue(row(requested=[]))
    assert dialogue.reply("Which cuisine, and in what city?") == "The cuisine is Thai. The city is San Jose."
    assert dialogue.reply("For how many people is that, and in which price range?") == "Any price range will do. The party size is 3."
    assert dialogue.reply("Hello!") == "Please do that: Find a restaurant."
    assert dialogue.reply(FIND).startswith("RESULT: 2 found")
    assert dialogue.reply("How about Bangkok Cafe?") == "No. The restaurant name is Thai Basil."
    assert dialogue.reply("Hm.") == "The time is half past seven."
    assert dialogue.reply("Hm.") == "Please do that: Reserve a table."


def test_the_user_leaves_after_turns_without_progress_and_nobody_talks_for_ever():
    dialogue = Dialogue(row())
    replies = [dialogue.reply(FIND) for _ in range(PATIENCE + 2)]
    assert [reply is None for reply in replies] == [False] * PATIENCE + [True, True]
    talked = environments.play(row(), said(*["Which one?"] * 200))[1]
    assert len(talked) <= MOST_TURNS and talked[-1] is None


def test_turns_after_the_end_change_nothing():
    wrong = RESERVE.replace("San Jose", "Oakland")
    assert score(*PERFECT, wrong, wrong) == 1.0
    assert environments.transcript(row(), said(*PERFECT, "more")).endswith("policy: Your table is reserved.")
    assert environments.transcript({"reward": "number"}, "42") == "42"


@pytest.mark.parametrize(
    ("text", "reply"),
    [
        ("CALL FindRestaurants", 'ERROR: write CALL Method(slot="value", slot="value") on one line'),
        ('CALL FindRestaurants(city="a" "b")', 'ERROR: write CALL Method(slot="value", slot="value") on one line'),
        ('CALL FindRestaurants(city="a", city="b")', 'ERROR: write CALL Method(slot="value", slot="value") on one line'),
        ("CALL Find(city=a)", "ERROR: there is no method Find; there are FindRestaurants, ReserveRestaurant"),
        ("CALL FindRestaurants(town=a)", "ERROR: FindRestaurants has no parameter town"),
        ("CALL FindRestaurants(city=a)", "ERROR: FindRestaurants needs cuisine"),
        ('CALL FindRestaurants(city="", cuisine=b)', "ERROR: city is empty"),
        ("CALL FindRestaurants(city=Oakland, cuisine='Thai')", "RESULT: 0 found"),
        ('Sure!\nCALL FindRestaurants(city="san jose", cuisine="THAI", price_range="expensive")', "RESULT: 1 found"),
    ],
)
def test_the_service_answers_every_call(text, reply):
    assert Dialogue(row()).reply(text).splitlines()[0] == reply


def test_calls_are_read_from_a_line_of_their_own():
    assert read_call("We could CALL it a day.") is None
    assert read_call("`CALL F(a=\"x, (y)\", b='z')`") == Call("F", {"a": "x, (y)", "b": "z"})
    assert read_call("CALL F()\nCALL G()") == Call("F", {})
    assert read_call("x" * LONGEST_TEXT + "\nCALL F()") is None


@pytest.mark.parametrize(
    ("given", "value", "expected"),
    [
        ("March 5th", "2019-03-05", True),
        ("the 5th", "2019-03-05", False),
        ("5th of March", "2019-03-05", True),
        ("7:30pm", "19:30", True),
        ("7:30 am", "19:30", False),
        ("12 am", "00:00", True),
        ("$4,032", "4032", True),
        ("4.6", "4.60", True),
        ("Three", "3", True),
        ("+1 602-222-1111", "+1 602-222-1111", True),
        ("", "x", False),
    ],
)
def test_spellings_of_a_value(given, value, expected):
    assert same(given, value) is expected


def test_words_of_a_value_must_stand_together_and_whole():
    assert find(tokens("It costs $163 a night"), "63") is None
    assert find(tokens("Meet at 7:30 p.m. on March 21st"), "2019-03-21") == (6, 9)
    assert find(tokens("Thai food at a Basil"), "Thai Basil") is None
    assert mentions(tokens("When would you like to check in?"), "check_in_date")
    assert not mentions(tokens("When would you like to check in?"), "check_out_date")
    assert yes_or_no(tokens("It has no live music"), "has_live_music") is False
    assert yes_or_no(tokens("Hello"), "has_live_music") is None


# --- nothing breaks it ------------------------------------------------------------------------------------------------------------

PIECES = [
    FIND,
    RESERVE,
    "CALL ",
    "CALL FindRestaurants(",
    'city="',
    '"',
    "(",
    ")",
    ",",
    "=",
    "What is the city?",
    "No.",
    "moderate",
    "\n",
    "\x00",
]
turns_of_any_kind = st.lists(st.one_of(st.text(max_size=200), st.lists(st.sampled_from(PIECES), max_size=8).map("".join)), max_size=12)


@settings(max_examples=150, deadline=None)
@given(turns_of_any_kind)
def test_any_turns_are_replied_to_within_bounds_and_scored(turns):
    environment, replies = environments.play(row(), TURN.join(turns))
    assert len(replies) <= MOST_TURNS and all(reply is None or len(reply) <= LONGEST_REPLY for reply in replies)
    value = rewards.score([row()], [TURN.join(turns)])[0]
    assert 0.0 <= value <= 1.0 and value == rewards.score([row()], [TURN.join(turns)])[0]
    assert (value == 1.0) == (environment.rates()["goal"] == 1.0)


LONG = [
    "(",
    ")",
    "CALL F(" + "a=b,",
    'CALL F(a="',
    "\x1e",
    "moderate ",
    "9",
    "\n",
    "CALL ",
    "½",
    "\ud800",
    "= ",
    "no yes ",
    "CALL F() . ",
    "ǆ",
]


@pytest.mark.parametrize("piece", LONG)
def test_100_kilobytes_of_anything_earn_nothing(piece):
    text = piece * (100_000 // len(piece))
    assert score(text) == 0.0
    assert score(FIND, "Found.", text, text, text, text) <= 0.2 + 0.1


def test_the_same_row_and_turns_give_the_same_conversation_and_records_stand_in_an_order_of_the_row():
    def order(name):
        return Dialogue(row(name)).reply(FIND)

    assert order("d/1") == order("d/1")
    assert len({order(f"d/{number}") for number in range(20)}) == 2


# --- rows -------------------------------------------------------------------------------------------------------------------------


def without(path: str) -> dict:
    changed = facts()
    *parents, last = path.split(".")
    place = changed
    for part in parents:
        place = place[int(part)] if part.isdigit() else place[part]
    del place[last]
    return changed


@pytest.mark.parametrize(
    ("broken", "reason"),
    [
        (None, "metadata is no object"),
        ({}, "metadata.service is no object"),
        (without("goal"), "metadata.goal is no object"),
        (without("service.slots"), "service.slots is no list of at most 100"),
        (without("service.intents.0.name"), "service.intents need a name"),
        (facts(calls=[]), "goal.calls is empty"),
        (facts(calls=[{"method": "Fly"}]), "goal.calls names no method of the service: 'Fly'"),
        (facts(calls=[{"method": "FindRestaurants"}]), "a call of FindRestaurants has no value for cuisine"),
        (facts(target=WANTED | {"city": "Oakland"}), "the goal has two values of city"),
        (facts(target={"price": "1"}), "goal.target: the service has no slot 'price'"),
        (facts(requested=["stars"]), "the requested slot 'stars' is in no result"),
        (facts(words={"time": "late"}), "goal.words must be lists of texts by slot"),
        (FACTS | {"records": [{"city": 1}]}, "records must be texts by slot"),
    ],
)
def test_a_row_that_is_no_dialogue_is_rejected_with_the_reason(tmp_path, broken, reason):
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps({"question": "Hello", "metadata": broken}) + "\n" + json.dumps({"question": "Hello", "metadata": FACTS}))
    found = read_source(SourceConfig(kind="jsonl", name=str(file), reward="dialogue"), 1, "data.train.0")
    assert [(reject["line"], reject["field"], reject["reason"]) for reject in found.rejects] == [(1, "metadata", reason)]
    assert found.table["answer"].to_pylist() == [
        'FindRestaurants(cuisine="Thai", city="San Jose"); ReserveRestaurant(restaurant_name="Thai Basil", city="San Jose", '
        'time="19:30", party_size="3"); tell price_range, has_live_music'
    ]
    with pytest.raises(UserError, match="is no dialogue"):
        environments.start({"row_id": "x", "reward": "dialogue", "question": "Hello", "metadata": json.dumps(broken)})


def test_rows_of_ones_own_read_the_same_from_jsonl_parquet_and_a_saved_hub_data_set(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq
    from datasets import Dataset

    lines = [{"id": "1", "question": "Hello", "metadata": json.dumps(FACTS), "licence": "mine"}]
    (tmp_path / "rows.jsonl").write_text(json.dumps(lines[0] | {"metadata": FACTS}))
    pq.write_table(pa.Table.from_pylist(lines), tmp_path / "rows.parquet")
    Dataset.from_list(lines).save_to_disk(tmp_path / "rows")
    found = []
    for kind, name in (("jsonl", "rows.jsonl"), ("parquet", "rows.parquet"), ("hub", "rows")):
        source = SourceConfig(kind=kind, name=str(tmp_path / name), reward="dialogue", domain="mine")
        found += read_source(source, 1, "data.train.0").table.to_pylist()
    assert len(found) == 3 and found[0]["row_id"] == "mine/1" and found[0]["answer"].endswith("tell price_range, has_live_music")
    assert all(row_ | {"source": ""} == found[0] | {"source": ""} for row_ in found[1:])
    assert rewards.score(found, [said(FIND, *PERFECT[1:])] * 3) == [1.0] * 3


def paths(value, here=()):
    """Every place in nested objects and lists."""
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [here, *(path for key, part in inside for path in paths(part, (*here, key)))]


scalars = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False), st.text(max_size=5), st.just([]), st.just({}))
anything = st.one_of(scalars, st.lists(scalars, max_size=3), st.dictionaries(st.text(max_size=5), scalars, max_size=3))


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(paths(FACTS)[1:]), anything)
def test_a_row_with_anything_anywhere_is_refused_or_talks(path, value):
    changed = facts()
    place = changed
    for part in path[:-1]:
        place = place[part]
    place[path[-1]] = value
    broken = row() | {"metadata": json.dumps(changed)}
    try:
        dialogue = environments.start(broken)
    except UserError:
        return
    assert prompts.user_turn(broken, parse_config({"data": {"domain": "dialogue"}}).prompt)
    assert all(dialogue.reply(turn) != "" for turn in [*PERFECT, "Which city?", "How about Bangkok Cafe?"])
    assert 0.0 <= rewards.score([broken], [said(*PERFECT)])[0] <= 1.0


def test_the_prompt_lists_the_service_above_what_the_user_says():
    lines = prompts.user_turn(row(), parse_config({"data": {"domain": "dialogue"}, "prompt": {"domain": "dialogue"}}).prompt).splitlines()
    assert lines[1] == "FindRestaurants(cuisine, city, price_range?): Find a restaurant"
    assert lines[3] == "party_size: 1, 2, 3" and lines[-1] == "I want to eat Thai food in San Jose."


def test_label_noise_is_refused_and_reward_noise_is_not():
    import pyarrow as pa

    table = pa.Table.from_pylist([row()]).drop_columns(["label", "clean_answer", "is_noisy", "noise_kind"])
    with pytest.raises(UserError, match="noise.kind: symmetric makes labels wrong, and a dialogue has none"):
        add_label_noise(table, NoiseConfig(kind="symmetric", rate=0.1), 1)
    assert add_label_noise(table, NoiseConfig(), 1)["label"].to_pylist() == ["a table"]
    config = parse_config({"data": {"domain": "dialogue", "folder": "."}, "noise": {"kind": "plausible", "rate": 0.2}})
    assert "noise.kind" in [problem.field for problem in check(config)]
    assert reward_noise([1.0, 0.25], ["a", "b"], ["x", "y"], RewardNoiseConfig(flip_rate=1.0), 1) == [0.0, 0.75]


# --- SGD --------------------------------------------------------------------------------------------------------------------------


def sgd_row() -> dict:
    """A dialogue in which the user looks in another city first, and takes the second of two restaurants."""
    searched = {"restaurant_name": "Bangkok Cafe", "cuisine": "Thai", "city": "Oakland", "price_range": "expensive"}
    booked = {name: WANTED[name] for name in ("restaurant_name", "cuisine", "city", "price_range", "time", "party_size")}
    service = facts()["service"]
    slots = [{"is_categorical": False, "possible_values": [], **slot} for slot in service["slots"]]
    return {
        "id": "1",
        "domain": "Restaurants",
        "service": {"id": "R", "service_name": "R", **service, "slots": slots},
        "turns": [["U", "Thai food in Oakland, please."], ["S", "Bangkok Cafe?"]],
        "goal_slots": {"city": ["San Jose"], "time": ['7 o"clock'], "price_range": ["expensive"], "party_size": ["two"]},
        "requested_slots": ["price_range", "phone_number"],
        "calls": [
            {"method": "FindRestaurants", "parameters": {"cuisine": "Thai", "city": "Oakland"}, "result": searched},
            {"method": "ReserveRestaurant", "parameters": {"restaurant_name": "x", "city": "San Jose", "time": "1"}, "result": None},
            {"method": "ReserveRestaurant", "parameters": GOAL_PARAMETERS, "result": booked},
        ],
    }


GOAL_PARAMETERS = FACTS["goal"]["calls"][1]["parameters"]


def test_a_dialogue_of_sgd_becomes_the_goal_that_its_user_ended_with():
    converted = from_sgd(sgd_row())
    goal = converted["metadata"]["goal"]
    # The last call of each method, the search with the record's own city; phone_number is in no result, so nobody asks for it.
    assert goal["calls"] == [
        {"method": "FindRestaurants", "parameters": {"cuisine": "Thai", "city": "San Jose"}},
        FACTS["goal"]["calls"][1],
    ]
    assert goal["requested"] == ["price_range"]
    # "two" is not the 3 that was booked: the words are left out; price_range is in no call.
    assert goal["words"] == {"city": ["San Jose"], "time": ["7 o'clock"]}
    assert [record["restaurant_name"] for record in converted["metadata"]["records"]] == ["Bangkok Cafe"]
    assert converted["question"] == "Please help me: reserve a table."  # Oakland is not the goal any more
    checked(converted["metadata"])


@needs_data
def test_every_dialogue_of_the_real_files_can_be_done_perfectly():
    config = parse_config({"data": {"domain": "dialogue", "folder": DATA}})
    tables = prepare.prepared_tables(config.data, 1)
    kinds = {name: {row["domain"].partition(".")[2] for row in table.to_pylist()} for name, table in tables.items()}
    assert kinds["train"] == kinds["id_test"] == {"hotels", "movies", "buses", "events", "restaurants", "rentalcars"}
    assert kinds["ood_test"] == {"services", "alarm", "flights", "weather", "trains", "payment"}
    for table in tables.values():
        rows = table.to_pylist()
        responses = [TURN.join(turn for turn, _ in demonstrate(row)) for row in rows]
        assert set(rewards.score(rows, responses)) == {1.0}
        assert set(rewards.score(rows, ["I can help with that."] * len(rows))) == {0.0}


@needs_data
def test_the_real_files_read_the_same_from_parquet(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    for name in ("sgd_test_id", "sgd_schema"):
        with open(os.path.join(DATA, f"{name}.jsonl"), encoding="utf-8") as lines:
            pq.write_table(pa.Table.from_pylist([json.loads(line) for line in lines]), tmp_path / f"{name}.parquet")
    found = [read_source(SourceConfig(kind="dataset", name="sgd"), 1, "data.id_test.0", folder) for folder in (DATA, str(tmp_path))]
    rows = [[row | {"metadata": json.loads(row["metadata"])} for row in read.table.to_pylist()] for read in found]
    assert len(rows[0]) > 150 and rows[0] == rows[1] and found[1].rejects == []


@needs_data
def test_services_are_chosen_by_their_kind():
    options = {"subjects": ["Hotels", "movies"], "by_subject": True}
    found = read_source(SourceConfig(kind="dataset", name="sgd", options=options), 1, "data.train.0", DATA)
    assert set(found.table["domain"].to_pylist()) == {"sgd.hotels", "sgd.movies"} and found.rejects == []


def test_a_dialogue_whose_service_is_not_in_the_table_is_rejected(tmp_path):
    schema = sgd_row()["service"]
    (tmp_path / "sgd_schema.jsonl").write_text(json.dumps(schema))
    lines = [sgd_row() | {"id": str(number), "service": name} for number, name in enumerate(("R", "S"))] + [
        sgd_row() | {"calls": 5, "id": "3"}
    ]
    (tmp_path / "sgd_train.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    for folder, options in ((str(tmp_path), {}), ("", {"path": str(tmp_path / "sgd_train.jsonl")})):
        found = read_source(SourceConfig(kind="dataset", name="sgd", options=options), 1, "data.train.0", folder)
        assert found.rejects[0]["reason"] == "'S' is not in the table of that name"
        assert found.rejects[1]["reason"].startswith("is no dialogue in SGD's layout (TypeError")
