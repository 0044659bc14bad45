"""Q#: guidance and loss by hand, the guided policy against the enumerated optimum of a tree, generation, files, training, refusals."""

import itertools
import math

import numpy as np
import pytest
import torch
from training import Untracked, rows_of_sums, tiny_config, write_rows

from dfpo_core import algorithms, comparison, rollout
from dfpo_core.config import TrainConfig
from dfpo_core.critic_model import CriticModel
from dfpo_core.critics.q_function import QFunction, QFunctionConfig
from dfpo_core.errors import UserError
from dfpo_core.guided import GuidedPolicy
from dfpo_core.models import load_policy, save_policy
from dfpo_core.train import Trainer, loop, run
from dfpo_core.types import CriticBatch


def q_function(hidden_size=8, **options):
    torch.manual_seed(0)
    return QFunction(hidden_size, QFunctionConfig(**options))


def test_guidance_is_the_scaled_log_of_the_mean_exponential():
    """P(Z = 1 | s) = 0.2. A token that the guide finds as likely as the reference: ln(0.8 + 0.2 e^(1 / 0.5)); three times as likely: odds
    of 0.75, so P = 3 / 7."""
    critic = q_function(eta=0.5)
    with torch.no_grad():
        critic.out.bias.copy_(torch.tensor([math.log(0.8), math.log(0.2)]))
    guidance = critic.guidance(torch.randn(2, 8), torch.tensor([[0.0, math.log(3)]] * 2))
    assert guidance[:, 0].tolist() == pytest.approx([math.log(0.8 + 0.2 * math.e**2)] * 2, rel=1e-5)
    assert guidance[:, 1].tolist() == pytest.approx([math.log(4 / 7 + 3 / 7 * math.e**2)] * 2, rel=1e-5)


def test_the_loss_is_the_cross_entropy_of_the_reward_to_go_split_between_atoms():
    """Atoms 0, 1/2, 1, of probability 0.2, 0.3, 0.5 where guide and reference agree. Rewards 0.25, 0.5: to go 0.75 and 0.5, so token 0
    counts 1/2 for 1/2 and 1/2 for 1, token 1 for 1/2 alone. The guide finds token 1 four times as likely: 1/2 weighs 2, 1 weighs 4."""
    critic = q_function(atoms=3)
    with torch.no_grad():
        critic.out.bias.copy_(torch.tensor([0.2, 0.3, 0.5]).log())
    rewards, mask = torch.tensor([[0.25, 0.5, 9.0]]), torch.tensor([[1.0, 1.0, 0.0]])
    rewards, preference = rewards * mask, torch.tensor([[0.0, math.log(4), 7.0]])
    batch = CriticBatch(torch.randn(1, 3, 8), None, rewards, mask, 2.0, None, preference=preference)
    expected = -(0.5 * math.log(0.3) + 0.5 * math.log(0.5) + math.log(0.6 / 2.8)) / 2
    assert critic.loss(batch).loss.item() == pytest.approx(expected, rel=1e-5)


def test_the_guided_policy_converges_to_the_enumerated_optimum_of_a_tree():
    """Two tokens of three, a fixed reference, rewards 0 or 1 with known chances: pi* by brute force over all nine responses."""
    generator, eta = np.random.default_rng(0), 0.3
    reference = generator.dirichlet(np.ones(3), size=4)  # of the root and of the state after each first token
    chance = generator.uniform(size=(3, 3))
    critic, of_reference, states = q_function(hidden_size=4, eta=eta), torch.tensor(reference).float().log(), torch.eye(4)
    guide = torch.nn.Parameter(of_reference.clone())  # logits; a guide begins as the reference
    optimizer = torch.optim.Adam([*critic.parameters(), guide], 1e-2)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 700)
    for _ in range(700):
        first = generator.choice(3, size=512, p=reference[0])
        second = (generator.uniform(size=(512, 1)) > reference[1 + first].cumsum(1)[:, :2]).sum(1)
        won = generator.uniform(size=512) < chance[first, second]
        rewards = torch.tensor(np.stack([np.zeros(512), won], 1), dtype=torch.float32)
        visited, tokens = np.stack([np.zeros(512, int), 1 + first], 1), np.stack([first, second], 1)
        preference = (guide.log_softmax(-1) - of_reference)[visited, tokens]
        loss = critic.loss(CriticBatch(states[visited], None, rewards, torch.ones(512, 2), 1024.0, None, preference=preference)).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    # The best response distribution is pi_ref(y) E[exp(R / eta) | y] / normaliser; its first token and what follows are marginals of it.
    weight = {
        (a, b): reference[0, a] * reference[1 + a, b] * (1 + chance[a, b] * (math.exp(1 / eta) - 1))
        for a, b in itertools.product(range(3), repeat=2)
    }
    total = sum(weight.values())
    best_first = np.array([sum(weight[a, b] for b in range(3)) for a in range(3)]) / total
    best_second = np.array([[weight[a, b] for b in range(3)] for a in range(3)]) / (best_first[:, None] * total)
    guidance = critic.guidance(states, guide.log_softmax(-1) - of_reference).detach().numpy()
    found = reference * np.exp(guidance)
    found /= found.sum(1, keepdims=True)
    assert found[0] == pytest.approx(best_first, abs=0.03)
    assert found[1:] == pytest.approx(best_second, abs=0.03)


@pytest.fixture
def guided(tmp_path):
    reference, tokenizer = load_policy("scratch:tiny", tmp_path)
    torch.manual_seed(1)
    return GuidedPolicy(reference, CriticModel(reference, QFunction(reference.config.hidden_size, QFunctionConfig()))), tokenizer


def spoken(model, tokenizer, prompts, **options):
    ids, mask = rollout.pad_left([tokenizer.encode(p, add_special_tokens=False) for p in prompts], tokenizer.pad_token_id)
    settings = {"samples_per_prompt": 2, "max_new_tokens": 6, "temperature": 1.0} | options
    settings["streams"] = rollout.sampling_streams(3, 0, 0, len(prompts) * settings["samples_per_prompt"])
    ends = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    return rollout.generate(model, ids, mask, **settings, **ends)


def test_an_untrained_guide_changes_nothing(guided):
    model, tokenizer = guided
    plain, found = (spoken(m, tokenizer, ["12+3=", "4=", "12+9="]) for m in (model.reference, model))
    assert plain.response_ids.tolist() == found.response_ids.tolist()
    torch.testing.assert_close(plain.log_probs, found.log_probs, atol=1e-4, rtol=1e-4)


def test_a_guide_decides_up_to_the_switch_and_the_reference_behind_it(guided):
    model, tokenizer = guided
    row = model.reference.get_output_embeddings().weight[7].detach()

    def only_token_7(module, inputs, output):
        output.last_hidden_state = (60 * row / row.square().sum()).expand_as(output.last_hidden_state)
        return output

    model.critic.backbone.register_forward_hook(only_token_7)
    switch = torch.tensor([0, 2, 6, 6])
    found = spoken(model, tokenizer, ["12+3=", "4="], temperature=0.0, guided_tokens=switch).response_ids
    alone = spoken(model.reference, tokenizer, ["12+3=", "4="], temperature=0.0).response_ids
    assert found[0].tolist() == alone[0].tolist()
    assert found[1, :2].tolist() == [7, 7] and found[2].tolist() == [7] * 6


def test_the_preference_that_acts_is_the_one_that_was_learned_at_the_sampling_temperature(tmp_path):
    trainer = Trainer(tiny_config(tmp_path, {"algorithm": "q_sharp", "temperature": 0.7}), "scratch:tiny", rows_of_sums())
    with torch.no_grad():
        for weight in trainer.critic.backbone.layers.parameters():
            weight.add_(0.05 * torch.randn_like(weight))
    batch, _ = trainer.sample()
    seen = []
    trainer.guided.head.q_function.guidance = lambda hidden, preference: seen.append(preference) or preference
    with torch.no_grad():
        of_both = rollout.response_hidden(trainer.guided.base_model, *batch.sequences)
        trainer.guided.head(of_both)
        learned = trainer.preference(trainer.critic_reads(batch), batch)
    acting = seen[0].gather(-1, batch.response_ids[..., None])[..., 0]
    assert learned.abs().max() > 0.1
    torch.testing.assert_close(acting * batch.mask, learned * batch.mask, atol=1e-4, rtol=1e-4)


def test_a_guided_policy_is_the_same_from_its_checkpoint(guided, tmp_path):
    model, tokenizer = guided
    with torch.no_grad():
        for weight in model.critic.parameters():
            weight.add_(0.05 * torch.randn_like(weight) * weight.requires_grad)
    save_policy(model, tokenizer, tmp_path / "policy")
    loaded, _ = load_policy(str(tmp_path / "policy"), tmp_path)
    assert isinstance(loaded, GuidedPolicy)
    first, second, plain = (spoken(m, tokenizer, ["1+1="]) for m in (model, loaded, model.reference))
    assert first.response_ids.tolist() == second.response_ids.tolist() != plain.response_ids.tolist()
    torch.testing.assert_close(first.log_probs, second.log_probs)


def test_training_teaches_the_guide_and_leaves_the_policy_alone(tmp_path):
    config = tiny_config(tmp_path, {"algorithm": "q_sharp", "steps": 3, "critic_learning_rate": 1e-3})
    trainer = Trainer(config, "scratch:tiny", rows_of_sums())
    before = [p.clone() for p in trainer.policy.module.parameters()]
    batch, _ = trainer.sample()
    assert 0 < batch.critic_mask.sum() < batch.mask.sum()
    loop(trainer, str(tmp_path / "state"), {}, Untracked())
    assert len(trainer.history) == 3 and all(math.isfinite(m["critic/loss"]) for m in trainer.history)
    assert all(torch.equal(a, b) for a, b in zip(before, trainer.policy.module.parameters(), strict=True))
    assert trainer.critic.head.out.weight.abs().sum() > 0
    assert trainer.last.returns is None


def test_the_step_writes_the_guided_policy_and_no_critic(tmp_path, monkeypatch):
    config = tiny_config(tmp_path, {"algorithm": "q_sharp", "steps": 1, "save_every": 1})
    data = write_rows(tmp_path / "data", rows_of_sums())
    reference, tokenizer = load_policy("scratch:tiny", tmp_path)
    save_policy(reference, tokenizer, tmp_path / "sft")
    run(config, "", "run-1", str(data), str(tmp_path / "sft"), str(tmp_path / "policy"), str(tmp_path / "critic"))
    assert isinstance(load_policy(str(tmp_path / "policy"), tmp_path)[0], GuidedPolicy)
    assert list((tmp_path / "critic").iterdir()) == []


def test_a_cell_of_a_study_evaluates_the_guided_policy(tmp_path):
    source = {"kind": "chains", "name": "maxima", "size": 64, "options": {"terms": 2, "digits": 1}}
    train = {"steps": 2, "prompts_per_step": 8, "samples_per_prompt": 2, "max_new_tokens": 4, "epochs": 2, "save_every": 9}
    study = comparison.parse(
        {
            "seeds": [1],
            "base": {"home": str(tmp_path), "model": "scratch:tiny", "data": {"train": [source], "id_test_size": 16}, "train": train},
            "settings": {"clean": {}},
            "algorithms": {"q_sharp": {"train": {"critic_learning_rate": 1e-2, "critic_head_learning_rate": 1e-1}}},
            "reference": "q_sharp",
            "curve_every": 1,
        }
    )
    record = comparison.run_cell(study, comparison.cells(study)[0], "scratch:tiny")
    assert [point["step"] for point in record["curve"]] == [0, 1, 2]


@pytest.mark.parametrize(
    ("train", "field"),
    [
        ({"algorithm": "dfpo", "critic": {"name": "q_function"}}, "train.policy_loss.name"),
        ({"algorithm": "q_sharp", "advantage": {"name": "gae"}}, "train.advantage.name"),
        ({"algorithm": "q_sharp", "kl_coefficient": 0.1}, "train.kl_coefficient"),
        ({"algorithm": "q_sharp", "critic": {"return_range": [1, 0]}}, "train.critic"),
        ({"algorithm": "q_sharp", "critic_layers": 1}, "train.critic_layers"),
    ],
)
def test_what_a_guide_cannot_do_is_refused(train, field):
    with pytest.raises(UserError) as error:
        algorithms.resolve(TrainConfig(**train))
    assert error.value.field == field


def test_conversations_are_refused(tmp_path):
    from dialogues import row

    with pytest.raises(UserError, match="train.algorithm: q_sharp answers in one turn"):
        Trainer(tiny_config(tmp_path, {"algorithm": "q_sharp"}, prompt={"max_prompt_tokens": 999}), "scratch:tiny", [row()])
