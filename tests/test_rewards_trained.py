"""Rewards that training may take in place of each row's own: a weighted sum, a user's function, a reward model."""

import asyncio
import math
import threading

import pytest

from dfpo_core import rewards
from dfpo_core.config import RewardsConfig, parse_config
from dfpo_core.errors import UserError

ROWS = [
    {"row_id": "r/1", "question": "1+1?", "reward": "number", "answer": "2", "label": "3", "clean_answer": "2", "is_noisy": True},
    {"row_id": "r/2", "question": "a?", "reward": "exact", "answer": "a", "label": "a", "clean_answer": "a", "is_noisy": False},
]

FUNCTIONS = """
import asyncio, math
seen, most, running = [], 0, 0

def length(row, response):
    return len(response) / 10

def spy(row, response):
    seen.append(dict(row))
    return response == row["label"]

async def slow(row, response):
    global most, running
    running += 1
    most = max(most, running)
    await asyncio.sleep(0.01)
    running -= 1
    return float(response)

class Judge:
    async def __call__(self, row, response):
        return 0.5

judge = Judge()

def words(row, response):
    return "good"

def nan(row, response):
    return math.nan

def broken(row, response):
    raise KeyError("my own mistake")

constant = 3
"""


@pytest.fixture
def mine(tmp_path, monkeypatch):
    import importlib
    import sys

    (tmp_path / "reward_of_tests.py").write_text(FUNCTIONS)
    monkeypatch.syspath_prepend(str(tmp_path))
    sys.modules.pop("reward_of_tests", None)
    yield importlib.import_module("reward_of_tests")
    sys.modules.pop("reward_of_tests", None)


def create(**options):
    return rewards.create(options, RewardsConfig())


def custom(name, responses=("3", "a"), against="label", **options):
    return create(name="custom", path=f"reward_of_tests:{name}", **options).score(ROWS, list(responses), against)


def message(**options):
    with pytest.raises(UserError) as raised:
        create(**options)
    assert "\n" not in str(raised.value)
    return str(raised.value)


def test_each_rows_own_reward_is_the_default():
    assert create().score(ROWS, ["3", "a"], "label") == [1.0, 1.0]
    assert create(name="row").score(ROWS, ["3", "a"], "answer") == [0.0, 1.0] == rewards.score(ROWS, ["3", "a"])


def test_one_kind_can_be_named_for_all_rows():
    assert create(name="exact").score(ROWS, ["3", "a."], "label") == [1.0, 1.0]


# --- a user's own function


def test_a_function_sees_the_label_in_force_and_never_the_truth(mine):
    assert custom("spy") == [1.0, 1.0]
    assert [row["label"] for row in mine.seen] == ["3", "a"]
    assert not {"answer", "clean_answer", "is_noisy"} & set(mine.seen[0])
    assert custom("spy", against="answer") == [0.0, 1.0]
    assert ROWS[0]["answer"] == "2" and ROWS[0]["label"] == "3"


def test_async_calls_run_together_up_to_the_limit_and_keep_their_order(mine):
    reward = create(name="custom", path="reward_of_tests:slow", concurrency=7)
    responses = [str(i) for i in range(40)]
    assert reward.score([ROWS[0]] * 40, responses, "label") == [float(i) for i in range(40)]
    assert mine.most == 7


def test_an_async_function_works_inside_a_running_event_loop_and_in_a_thread(mine):
    async def notebook():
        return custom("slow", ("1", "2"))

    assert asyncio.run(notebook()) == [1.0, 2.0]
    results = []
    thread = threading.Thread(target=lambda: results.append(custom("slow", ("1", "2"))))
    thread.start()
    thread.join()
    assert results == [[1.0, 2.0]]


def test_an_object_with_an_async_call_is_a_function(mine):
    assert custom("judge") == [0.5, 0.5]


def test_the_mistakes_of_a_function_are_not_hidden(mine):
    with pytest.raises(KeyError, match="my own mistake"):
        custom("broken")
    for name, value in (("words", "'good'"), ("nan", "nan")):
        with pytest.raises(UserError, match=f"returned {value} for row 'r/1'; return a finite number"):
            custom(name)


def test_a_path_that_leads_nowhere_is_one_line(mine):
    assert message(name="custom", path="no colon").startswith("train.reward.path: ")
    assert "has no function constant" in message(name="custom", path="reward_of_tests:constant")
    assert "has no function nothing" in message(name="custom", path="reward_of_tests:nothing")
    assert "No module named 'reward_of_tests.deeper'" in message(name="custom", path="reward_of_tests.deeper:f")
    assert "No module named 'package_that_is_not_here'" in message(name="custom", path="package_that_is_not_here:f")


def test_a_package_that_only_the_cluster_has_passes_the_check_of_the_configuration():
    assert rewards.parse({"name": "custom", "path": "package_that_is_not_here:f"})[0] == "custom"


# --- weighted sum


def test_a_weighted_sum_adds_what_its_parts_give(mine):
    """0.75 * [1, 0] + 0.5 * [0.1, 0.3] - 2 * [1, 0]."""
    parts = [
        {"name": "row", "weight": 0.75},
        {"name": "custom", "weight": 0.5, "path": "reward_of_tests:length"},
        {"name": "exact", "weight": -2},
    ]
    assert create(name="weighted", parts=parts).score(ROWS, ["3", "bcd"], "label") == pytest.approx([0.75 + 0.05 - 2, 0.15])


@pytest.mark.parametrize(
    ("parts", "expected"),
    [
        ([], "train.reward.parts: "),
        ([{"name": "row"}], "train.reward.parts: parts.0.weight must be a number, got None; correct the value"),
        ([{"name": "row", "weight": 1}, {"name": "nothing", "weight": 1}], "train.reward.parts: train.reward.name: unknown name 'nothing'"),
        ([{"name": "exact", "weight": 1, "size": 2}], "train.reward.parts: parts.0.size: unknown option of exact"),
    ],
)
def test_a_wrong_part_is_named(parts, expected):
    assert message(name="weighted", parts=parts).startswith(expected)


def test_wrong_names_and_options_are_one_line():
    known = "choice, custom, dialogue, exact, math, number, reasoning_gym, reward_model, row, weighted"
    assert message(name="nothing") == f"train.reward.name: unknown name 'nothing'; choose one of: {known}"
    assert message(name=3).startswith("train.reward.name: 3 is not a name")
    assert message(name="math", size=3) == "train.reward.size: unknown option of math; known options: none"
    assert message(name="custom") == "train.reward.path: custom needs it; add it"


# --- reward model


def classifier(folder, classes, template=None, words=None):
    """A tiny Llama with a random classification head and the package's character tokenizer, saved."""
    import torch
    from transformers import LlamaConfig, LlamaForSequenceClassification

    from dfpo_core.models import character_tokenizer

    tokenizer = character_tokenizer()
    tokenizer.chat_template = template
    shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "max_position_embeddings": 64}
    config = LlamaConfig(vocab_size=len(tokenizer), num_labels=classes, pad_token_id=None, eos_token_id=tokenizer.eos_token_id, **shape)
    torch.manual_seed(0)
    LlamaForSequenceClassification(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


RESPONSES = ["2", "a long answer", "x", "22", "another one", ""]


def by_hand(folder, texts):
    """Logits of each text alone, without padding."""
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    model, tokenizer = AutoModelForSequenceClassification.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    model.config.pad_token_id = tokenizer.pad_token_id
    with torch.no_grad():
        return [model(torch.tensor([tokenizer(text, add_special_tokens=False)["input_ids"]])).logits[0].tolist() for text in texts]


def test_one_logit_becomes_its_sigmoid_in_batches_of_any_size(tmp_path):
    folder = classifier(tmp_path / "model", 1)
    logits = by_hand(folder, ["1+1?" + response for response in RESPONSES])
    expected = [1 / (1 + math.exp(-logit)) for (logit,) in logits]
    assert max(expected) - min(expected) > 1e-3
    for batch_size in (1, 4, 16):
        reward = create(name="reward_model", model=folder, batch_size=batch_size)
        assert reward.score([ROWS[0]] * len(RESPONSES), RESPONSES, "label") == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize(("chosen", "index"), [(-1, 2), (0, 0), (1, 1)])
def test_several_classes_become_the_probability_of_one_through_the_chat_template(tmp_path, chosen, index):
    template = "{% for message in messages %}[{{ message['role'] }}]{{ message['content'] }}{% endfor %}"
    folder = classifier(tmp_path / "model", 3, template)
    logits = by_hand(folder, [f"[user]1+1?[assistant]{response}" for response in RESPONSES])
    expected = [math.exp(row[index]) / sum(math.exp(value) for value in row) for row in logits]
    reward = create(name="reward_model", model=folder, positive_class=chosen)
    assert reward.score([ROWS[0]] * len(RESPONSES), RESPONSES, "answer") == pytest.approx(expected, abs=1e-5)
    assert reward.score([], [], "answer") == []


def test_what_is_too_long_for_the_reward_model_is_refused_and_not_cut(tmp_path):
    folder = classifier(tmp_path / "model", 1)
    reward = create(name="reward_model", model=folder)
    assert len(reward.score(ROWS[:1], ["x" * 60], "label")) == 1
    with pytest.raises(UserError, match="train.reward.max_tokens: a question and its response have 65 tokens, more than 64"):
        reward.score(ROWS[:1], ["x" * 61], "label")


def test_a_model_that_cannot_judge_is_one_line(tmp_path):
    assert "is no class of a model with 2" in message(name="reward_model", model=classifier(tmp_path / "two", 2), positive_class=2)
    assert "names a language model" in message(name="reward_model", model="scratch:tiny")
    assert "no directory" in message(name="reward_model", model=str(tmp_path / "nothing"))
    (tmp_path / "empty").mkdir()
    assert "no config.json" in message(name="reward_model", model=str(tmp_path / "empty"))
    (tmp_path / "empty" / "config.json").write_text('{"model_type": "llama"}')
    assert message(name="reward_model", model=str(tmp_path / "empty")).startswith("train.reward.model: cannot load ")


# --- in the pipeline's configuration


def test_preflight_names_a_wrong_reward():
    from dfpo_core import preflight

    source = {"kind": "reasoning_gym", "name": "chain_sum", "size": 10}
    config = parse_config({"data": {"train": [source]}, "train": {"reward": {"name": "custom", "path": "x"}}})
    assert [problem.field for problem in preflight._reward(config)] == ["train.reward.path"]
