"""Conversations in training and evaluation: what is sampled, what is learned from, and that replies in between change neither."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial

import pytest
import torch

from dfpo_core import advantages, critics, environments, evaluate, policy_losses, report, rollout, sft, train
from dfpo_core.advantages.gae import gae
from dfpo_core.config import PromptConfig, load_config, parse_config
from dfpo_core.critics.bootstrap import lambda_returns
from dfpo_core.data import prompts
from dfpo_core.environments.demonstration import demonstrate
from dfpo_core.models import load_policy
from dfpo_core.promote import decide
from dfpo_core.types import AdvantageInputs, CriticBatch, PolicyLossInputs
from tests.conftest import ROOT
from tests.dialogues import FACTS, GOAL, SERVICE, row
from tests.test_prompts import characters
from tests.training import Untracked, rows_of_sums, tiny_config

LIMITS = {"max_new_tokens": 8, "max_turns": 3, "max_conversation_tokens": 500}
PROMPT = PromptConfig(max_prompt_tokens=2000)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    torch.set_num_threads(1)
    return load_policy("scratch:tiny", tmp_path_factory.mktemp("home"))


def sample(tiny, rows, samples=2, seed=1, **limits):
    model, tokenizer = tiny
    ids, mask = rollout.pad_left(prompts.encode(tokenizer, rows, PROMPT), tokenizer.pad_token_id)
    streams = rollout.sampling_streams(seed, 0, 0, len(rows) * samples)
    settings = LIMITS | {"samples_per_prompt": samples, "temperature": 1.0, "streams": streams} | limits
    return (ids, mask, *rollout.converse(partial(rollout.generate, model), tokenizer, rows, ids, mask, **settings))


def runs(mask: torch.Tensor) -> list[int]:
    """Lengths of the runs of ones in a row."""
    return [len(run) for run in "".join(str(int(value)) for value in mask.tolist()).split("0") if run]


# --- sampling ---------------------------------------------------------------------------------------------------------------------


def test_questions_are_sampled_as_before_bit_for_bit(tiny):
    model, tokenizer = tiny
    ids, mask, generation, texts = sample(tiny, rows_of_sums(3))
    plain = rollout.generate(
        model,
        ids,
        mask,
        samples_per_prompt=2,
        max_new_tokens=8,
        temperature=1.0,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        streams=rollout.sampling_streams(1, 0, 0, 6),
    )
    for name in ("response_ids", "mask", "log_probs", "entropy"):
        assert torch.equal(getattr(generation, name), getattr(plain, name))
    assert torch.equal(generation.attention_mask, plain.mask)
    assert texts == rollout.decode(tokenizer, plain.response_ids, plain.mask)


def test_a_conversation_holds_the_turns_and_between_them_what_was_said(tiny):
    _, tokenizer = tiny
    rows = [row("d/1"), rows_of_sums(1)[0], row("d/2")]
    _, _, generation, texts = sample(tiny, rows)
    assert generation.mask[2:4].sum(-1).max() <= 8 and environments.TURN not in texts[2] + texts[3]
    for i in (0, 1, 4, 5):
        length = int(generation.attention_mask[i].sum())
        assert generation.attention_mask[i, :length].all() and length <= LIMITS["max_conversation_tokens"]
        lengths, turns = runs(generation.mask[i]), texts[i].split(environments.TURN)
        assert len(lengths) == len(turns) == 3 and max(lengths) <= 8
        replies = environments.play(rows[i // 2], texts[i])[1]
        said = "".join(f"\n{reply}\n" for reply in replies[: len(turns) - 1])
        learned = generation.mask[i, :length] > 0
        assert tokenizer.decode(generation.response_ids[i, :length][~learned]) == said
        spoken = tokenizer.decode(generation.response_ids[i, :length][learned], skip_special_tokens=True)
        assert spoken == "".join(turns)
        assert (generation.log_probs[i, :length][~learned] == 0).all() and (generation.log_probs[i, :length][learned] < 0).all()


def test_sampled_and_recomputed_log_probs_equal_a_full_pass_over_the_whole_conversation(tiny):
    model, tokenizer = tiny
    rows = [row("d/1"), row("d/2")]
    ids, mask, generation, _ = sample(tiny, rows)
    hidden = rollout.response_hidden(model.base_model, ids, mask, generation.response_ids, generation.attention_mask, 2)
    batched, _ = rollout.token_log_probs(model, hidden, generation.response_ids)
    prompt_tokens = prompts.encode(tokenizer, rows, PROMPT)
    for i in range(4):
        length, prompt = int(generation.attention_mask[i].sum()), prompt_tokens[i // 2]
        response = generation.response_ids[i, :length]
        with torch.no_grad():
            logits = model(torch.tensor([prompt + response.tolist()])).logits[0]
        expected = logits.log_softmax(-1)[len(prompt) - 1 : -1].gather(-1, response[:, None])[:, 0]
        learned = generation.mask[i, :length] > 0
        torch.testing.assert_close(generation.log_probs[i, :length][learned], expected[learned], atol=1e-4, rtol=0)
        torch.testing.assert_close(batched[i, :length], expected, atol=1e-4, rtol=0)


def test_limits_end_a_conversation_before_they_are_passed(tiny):
    rows = [row("d/1")]
    first = sample(tiny, rows, max_turns=1)[2]
    assert first.response_ids.shape[1] <= 8 and torch.equal(first.mask, first.attention_mask)
    # No room for any reply and another turn: the conversation is its first turn.
    assert torch.equal(sample(tiny, rows, max_conversation_tokens=20)[2].response_ids, first.response_ids)
    longest = sample(tiny, rows, max_turns=30, max_conversation_tokens=300)[2]
    assert longest.attention_mask.sum(-1).max() <= 300


TEMPLATE = "{% for m in messages %}{{ m['role'] }}:{{ m['content'] }}<eos>\n{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"


def test_replies_stand_in_the_chat_templates_form():
    tokenizer = characters(TEMPLATE)

    def text(ids):
        return "".join("<eos>" if token == 0 else chr(token) for token in ids)

    cut, ended = prompts.reply_tokens(tokenizer, ["Hi<eos>!", "Hi"], [False, True])
    assert text(cut) == "<eos>\nuser:Hi!<eos>\nassistant:"
    assert text(ended) == "\nuser:Hi<eos>\nassistant:"
    turns = [("user", "Q"), ("assistant", "A"), ("user", "Hi")]
    conversation = [{"role": role, "content": content} for role, content in turns]
    whole = tokenizer(tokenizer.apply_chat_template(conversation, tokenize=False, add_generation_prompt=True))["input_ids"]
    prompt = prompts.encode(tokenizer, [{"row_id": "1", "question": "Q"}], PROMPT)[0]
    assert prompt + tokenizer("A")["input_ids"] + [0] + ended == whole


# --- learning ---------------------------------------------------------------------------------------------------------------------

MASK = torch.tensor([[1.0, 1, 0, 0, 1, 0, 1, 1], [1, 0, 0, 1, 1, 1, 0, 0], [1, 1, 1, 0, 0, 0, 0, 1], [1, 1, 0, 0, 0, 0, 0, 0]])


def packed(values: torch.Tensor) -> torch.Tensor:
    """The tokens where MASK is 1, moved together: what the batch is without replies."""
    out = torch.zeros_like(values)
    for i, mask in enumerate(MASK > 0):
        out[i, : int(mask.sum())] = values[i][mask]
    return out


PACKED_MASK = packed(MASK)


def valid(values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    return values[mask > 0]


def random(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_the_return_flows_from_the_last_turn_to_the_first_by_hand():
    # One token, two of a reply, two tokens; reward 1 at the end; values 0.5, 0.25, 0.75; gamma 1, lambda 1/2.
    mask = torch.tensor([[1.0, 0, 0, 1, 1]])
    rewards = torch.tensor([[0.0, 0, 0, 0, 1]])
    values = torch.tensor([[0.5, 9, -9, 0.25, 0.75]])[..., None]
    # delta: 0.25 - 0.5, 0.75 - 0.25, 1 - 0.75; A_3 = 1/4, A_2 = 1/2 + 1/8, A_1 = -1/4 + 5/16.
    expected = [[0.0625, 0, 0, 0.625, 0.25]]
    assert gae(rewards, values, mask, 1.0, 0.5)[..., 0].tolist() == expected
    # y_3 = 1, y_2 = (0.75 + 1) / 2, y_1 = (0.25 + y_2) / 2
    assert lambda_returns(rewards, values, mask, 1.0, 0.5)[..., 0].tolist() == [[0.5625, 0, 0, 0.875, 1.0]]


@pytest.mark.parametrize("name", advantages.registry.names)
def test_advantages_are_those_of_the_policys_tokens_alone(name):
    entry = advantages.registry.get(name)
    returns, values, token_rewards = random(4, 8, 5, seed=1).sort(-1).values, random(4, 8, seed=2), random(4, 8, seed=3) * MASK
    rewards = torch.tensor([1.0, 0.0, 0.5, 1.0])

    def result(select, mask):
        inputs = AdvantageInputs(select(token_rewards), rewards, mask, 2, select(returns), select(values))
        return entry(entry.config_class())(inputs).advantages

    alone = result(packed, PACKED_MASK)
    together = result(lambda tensor: tensor, MASK)
    torch.testing.assert_close(valid(together, MASK), valid(alone, PACKED_MASK))
    assert (together[MASK == 0] == 0).all()


@pytest.mark.parametrize("name", critics.ESTIMATORS)
def test_a_critics_loss_and_gradient_are_those_of_the_policys_tokens_alone(name):
    torch.manual_seed(0)
    entry = critics.registry.get(name)
    critic = entry(16, entry.config_class())
    for parameter in critic.parameters():  # output layers start at zero, which would hide everything
        torch.nn.init.normal_(parameter, std=0.2)
    hidden, target_hidden, token_rewards = random(4, 8, 16, seed=1), random(4, 8, 16, seed=2), random(4, 8, seed=3) * MASK
    old = critic.sample_returns(target_hidden).detach()

    def result(select, mask):
        state = select(hidden).clone().requires_grad_()
        generator = torch.Generator().manual_seed(5)
        batch = CriticBatch(state, select(target_hidden), select(token_rewards), mask, float(mask.sum()), select(old), generator)
        output = critic.loss(batch)
        output.loss.backward()
        return output, state.grad

    alone, alone_gradient = result(packed, PACKED_MASK)
    together, gradient = result(lambda tensor: tensor, MASK)
    assert together.loss.item() == pytest.approx(alone.loss.item(), rel=1e-4)
    assert together.metrics == pytest.approx(alone.metrics, rel=1e-4, abs=1e-5)
    assert (gradient[MASK == 0] == 0).all()
    torch.testing.assert_close(valid(gradient, MASK), valid(alone_gradient, PACKED_MASK), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("name", policy_losses.registry.names)
def test_a_policy_loss_and_its_gradient_are_those_of_the_policys_tokens_alone(name):
    entry = policy_losses.registry.get(name)
    torch.manual_seed(0)
    config = entry.config_class()
    loss = entry(config, 16) if issubclass(entry, torch.nn.Module) else entry(config)
    tensors = [random(4, 8, seed=seed) for seed in range(5)]

    def result(select, mask):
        log_probs, entropy, old, reference, advantage = (select(tensor).clone() for tensor in tensors)
        log_probs.requires_grad_()
        shared = {"rewards": torch.ones(4), "token_count": float(MASK.sum()), "sequence_count": 4, "samples_per_prompt": 2}
        shared |= {"max_new_tokens": 8, "prompt_hidden": random(4, 16, seed=9)}
        output = loss(PolicyLossInputs(log_probs, entropy, old, reference, advantage * mask, mask, **shared))
        output.loss.backward()
        return output.loss.item(), log_probs.grad

    alone, alone_gradient = result(packed, PACKED_MASK)
    together, gradient = result(lambda tensor: tensor, MASK)
    assert together == pytest.approx(alone, rel=1e-5)
    assert (gradient[MASK == 0] == 0).all()
    torch.testing.assert_close(valid(gradient, MASK), valid(alone_gradient, PACKED_MASK))


# --- training ---------------------------------------------------------------------------------------------------------------------


def small_row(row_id: str) -> dict:
    """A dialogue of one call, with a short service: for a model with one token a character."""
    goal = GOAL | {"calls": GOAL["calls"][:1], "requested": ["price_range"], "words": {}}
    slots = [slot for slot in SERVICE["slots"] if slot["name"] in ("cuisine", "city", "price_range")]
    find = SERVICE["intents"][0] | {"optional_slots": {}, "result_slots": ["price_range"]}
    wanted = {"cuisine": "Thai", "city": "San Jose", "price_range": "moderate"}
    facts = FACTS | {"service": SERVICE | {"slots": slots, "intents": [find]}, "goal": goal | {"target": wanted}, "records": []}
    return row(row_id) | {"metadata": json.dumps(facts)}


def config_of(home, **changes):
    settings = {"steps": 2, "prompts_per_step": 2, "samples_per_prompt": 2, "micro_batch_prompts": 1, **LIMITS}
    settings |= changes.pop("train", {})
    return tiny_config(home, settings, prompt=PROMPT.model_dump(), **changes)


@pytest.mark.parametrize("algorithm", ["dfpo", "grpo"])
def test_two_steps_of_training_on_conversations(tmp_path, tiny, algorithm):
    from dfpo_core.models import save_policy

    torch.set_num_threads(1)
    save_policy(*tiny, tmp_path / "sft")
    # The noise gives a policy that reaches nothing something to learn from.
    config = config_of(tmp_path, train={"algorithm": algorithm, "reward_noise": {"gaussian_std": 0.5}, "learning_rate": 1e-3})
    trainer = train.Trainer(config, str(tmp_path / "sft"), [row("d/1"), row("d/2", requested=[]), rows_of_sums(1)[0]])
    before = [parameter.detach().clone() for parameter in trainer.policy.module.parameters()]
    for _ in range(2):
        metrics = trainer.step()
        assert all(value == value for value in metrics.values())  # no NaN
        assert 1 <= metrics["rollout/turns"] <= 3 and metrics["rollout/task_completion"] == 0.0
    assert any(not torch.equal(*pair) for pair in zip(before, trainer.policy.module.parameters(), strict=True))
    batch = trainer.last.batch
    assert (trainer.last.advantages[batch.mask == 0] == 0).all()
    (shown, *_) = trainer.sample_rows(trainer.last)
    assert shown["response"].startswith("policy: ") or shown["question"] == "0+0="


def test_the_reward_sits_on_the_last_token_of_the_policy_and_the_kl_on_its_tokens_alone(tmp_path, tiny):
    from dfpo_core.models import save_policy

    save_policy(*tiny, tmp_path / "sft")
    trainer = train.Trainer(config_of(tmp_path, train={"kl_coefficient": 0.1}), str(tmp_path / "sft"), [row("d/1"), row("d/2")])
    batch, _ = trainer.sample()
    mask = torch.tensor([[1.0, 0, 1, 0], [1, 0, 0, 1]])
    log_probs = torch.tensor([[-1.0, -7, -2, -7], [-1, -7, -7, -3]])
    reference = torch.tensor([[-1.5, 0, -2, 0], [-1, 0, 0, -1]])
    batch = replace(batch, mask=mask, rewards=torch.tensor([1.0, 0.5]), log_probs=log_probs, reference_log_probs=reference)
    expected = torch.tensor([[-0.05, 0, 1.0, 0], [0, 0, 0, 0.5 + 0.2]])
    torch.testing.assert_close(trainer.token_rewards(batch), expected)


def test_the_warm_start_learns_the_scripted_turns_and_not_the_replies(tiny):
    _, tokenizer = tiny
    rows = [row("d/1"), rows_of_sums(1)[0]]
    ids, learned = sft.targets(tokenizer, rows)
    exchanges = demonstrate(rows[0])
    told = "".join(tokenizer.decode([token]) for token, own in zip(ids[0], learned[0], strict=True) if own)
    heard = "".join(tokenizer.decode([token]) for token, own in zip(ids[0], learned[0], strict=True) if not own)
    assert told == "".join(f"{turn}<eos>" for turn, _ in exchanges)
    assert heard == "".join(f"\n{reply}\n" for _, reply in exchanges if reply is not None)
    assert tokenizer.decode(ids[1]) == f"{rows[1]['label']}<eos>" and learned[1] == [1.0] * len(ids[1])


def test_a_policy_that_has_memorised_a_conversation_holds_it_to_the_end(tmp_path):
    """The path from the warm start through sampling to the score: what was learned as tokens is said, understood and rewarded."""
    config = config_of(tmp_path, sft={"steps": 90, "batch_size": 1, "micro_batch_size": 1, "learning_rate": 5e-3, "schedule": "cosine"})
    model, tokenizer = load_policy("scratch:tiny", tmp_path)
    rows = [small_row("d/1")]
    sft.train(model, tokenizer, rows, config, Untracked())
    limits = {"max_new_tokens": 80, "max_turns": 6, "max_conversation_tokens": 800}
    ((text,),) = rollout.respond(model, tokenizer, prompts.encode(tokenizer, rows, PROMPT), rows=rows, batch_size=1, **limits)
    assert text.split(environments.TURN) == [turn for turn, _ in demonstrate(rows[0])]
    assert environments.play(rows[0], text)[0].rates() == {"task": 1.0, "ask": 1.0, "goal": 1.0}


# --- evaluation -------------------------------------------------------------------------------------------------------------------


def test_the_example_configuration_is_valid_and_its_plan_counts_whole_conversations():
    config = load_config(ROOT / "pipelines" / "configs" / "dialogue.yaml")
    assert [source.reward for source in config.data.train] == ["dialogue"] and config.response_tokens == 1536
    assert parse_config({"data": {"domain": "science"}}).response_tokens == 16


def test_an_answer_of_a_conversation_is_its_transcript_with_its_rates(tmp_path):
    config = config_of(tmp_path, evaluate={"batch_size": 2})
    questions = [row("d/1") | {"split": "id_test"}, rows_of_sums(1)[0] | {"split": "id_test"}]
    talked, answered = evaluate.answer_all(config, [evaluate.Policy("base", "scratch:tiny", "x")], questions)
    assert talked["response"].startswith("policy: ") and talked["response"].count("policy: ") == 3
    assert talked["rates"] == {"task": 0.0, "ask": 0.0, "goal": 0.0} and not talked["correct"]
    assert answered["rates"] == {} and "policy: " not in answered["response"]


def test_completion_rates_are_reported_by_split_and_domain():
    config = parse_config({"data": {"domain": "dialogue"}, "evaluate": {"bootstrap_samples": 100}})
    outcomes = {
        ("id_test", "hotels"): [{"task": 1.0, "ask": 1.0, "goal": 1.0}, {"task": 1.0, "ask": 0.0, "goal": 0.0}],
        ("id_test", "buses"): [{"task": 1.0, "goal": 1.0}, {"task": 0.0, "goal": 0.0}],  # nothing is requested
        ("ood_test", "alarm"): [{"task": 0.0, "goal": 0.0}],
    }
    answers = [
        {"model": model, "split": split, "domain": domain, "row_id": f"{domain}/{number}", "question": "q", "answer": "a"}
        | {"response": "policy: x", "correct": rates["goal"] == 1.0, "mean_at_k": None, "rates": rates}
        for model in ("base", "sft", "trained")
        for (split, domain), found in outcomes.items()
        for number, rates in enumerate(found)
    ]
    policies = [evaluate.Policy(model, model, model) for model in ("base", "sft", "trained")]
    evaluation = evaluate.summarise(config, policies, answers)
    metrics = evaluate.metrics_of(evaluation)
    expected = {
        "eval/id_test/all/task_completion": 0.75,
        "eval/id_test/all/ask_completion": 0.5,
        "eval/id_test/all/goal_completion": 0.5,
        "eval/id_test/hotels/task_completion": 1.0,
        "eval/id_test/hotels/ask_completion_sft": 0.5,
        "eval/id_test/buses/goal_completion_base": 0.5,
        "eval/ood_test/alarm/goal_completion": 0.0,
    }
    assert {key: metrics[key] for key in expected} == expected
    assert "eval/id_test/buses/ask_completion" not in metrics
    drawings = report.figures(evaluation)
    html = report.render(config, evaluation, answers, decide(evaluation, config.promote), drawings)
    assert "Completion of conversations" in html and html.count("all conversations") == 3 + 2
