"""The trainer: token rewards and value metrics by hand, micro-batch invariance, learning, resuming after kill -9, divergence."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from dfpo_core import algorithms, checkpoint, rollout, train
from dfpo_core.config import TrainConfig
from dfpo_core.errors import TrainingDiverged, UserError
from dfpo_core.models import load_policy
from dfpo_core.rollout import ResponseHidden
from tests.training import Untracked, rows_of_sums, tiny_config, warm_checkpoint

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def warm(tmp_path_factory) -> str:
    return warm_checkpoint(tmp_path_factory.mktemp("warm"))


def trainer_of(home, warm, **settings) -> train.Trainer:
    torch.set_num_threads(1)
    return train.Trainer(tiny_config(home, settings), warm, rows_of_sums())


def test_the_sequence_reward_sits_on_the_last_token_and_the_kl_on_every_token(tmp_path, warm):
    trainer = trainer_of(tmp_path, warm, kl_coefficient=0.1)
    batch, _ = trainer.sample()
    mask = torch.tensor([[1.0, 1.0, 0.0], [1.0, 1.0, 1.0]])
    batch = replace(
        batch,
        mask=mask,
        rewards=torch.tensor([1.0, 0.0]),
        log_probs=torch.tensor([[-1.0, -2.0, -9.0], [-1.0, -1.0, -1.0]]),
        reference_log_probs=torch.tensor([[-1.5, -1.0, -1.0], [-1.0, -1.0, -3.0]]),
    )
    expected = [[-0.05, 0.1 + 1.0, 0.0], [0.0, 0.0, -0.2]]
    torch.testing.assert_close(trainer.token_rewards(batch), torch.tensor(expected))


def test_explained_variance_and_spread_by_hand():
    token_rewards = torch.tensor([[0.0, 1.0], [0.0, 0.0]])
    mask = torch.ones(2, 2)
    values = torch.tensor([[0.75, 0.75], [0.25, 0.25]])
    returns = values[..., None] + torch.tensor([-0.1, 0.1])
    metrics = train.value_metrics(token_rewards, returns, values, mask)
    # Realised returns are 1, 1, 0, 0 (variance 1/4); residuals 1/4, 1/4, -1/4, -1/4 (variance 1/16).
    assert metrics["critic/explained_variance"] == pytest.approx(0.75)
    assert metrics["critic/value_mean"] == pytest.approx(0.5)
    assert metrics["critic/value_spread"] == pytest.approx(0.1)


def test_the_clean_reward_is_logged_beside_the_noisy_one_that_trains(tmp_path, warm):
    trainer = trainer_of(tmp_path, warm, prompts_per_step=16, minibatches=1)
    batch, texts = trainer.sample()
    rows = {row["row_id"]: row for row in rows_of_sums()}
    plain = [k for k, text in enumerate(texts) if text.isdigit()]
    assert len(plain) > 10
    for column, scored in (("label", batch.rewards), ("answer", batch.clean_rewards)):
        assert [scored[k].item() for k in plain] == [float(int(texts[k]) == int(rows[batch.row_ids[k]][column])) for k in plain]
    assert batch.rewards.tolist() != batch.clean_rewards.tolist()


def test_a_reward_of_its_own_trains_and_the_rows_reward_stays_beside_it(tmp_path, warm):
    parts = [{"name": "row", "weight": 1}, {"name": "exact", "weight": 0.25}]
    trainer = trainer_of(tmp_path, warm, prompts_per_step=16, minibatches=1, reward={"name": "weighted", "parts": parts})
    batch, texts = trainer.sample()
    rows = {row["row_id"]: row for row in rows_of_sums()}
    plain = [k for k, text in enumerate(texts) if text.isdigit() and str(int(text)) == text]
    assert len(plain) > 10
    expected = [1.25 * (texts[k] == rows[batch.row_ids[k]]["label"]) for k in plain]
    assert [batch.rewards[k].item() for k in plain] == expected and any(expected)
    assert set(batch.clean_rewards.tolist()) <= {0.0, 1.0}
    assert trainer.rollout_metrics(batch)["reward/failed_checks"] == 0.0


@pytest.mark.parametrize("algorithm", sorted(algorithms.registry.names))
def test_three_steps_of_every_algorithm_move_the_weights_that_they_should(tmp_path, warm, algorithm):
    trainer = trainer_of(tmp_path, warm, algorithm=algorithm, minibatches=2, prompts_per_step=16, learning_rate=1e-3)
    parts = {"policy": trainer.policy.module, "reference": trainer.reference}
    if trainer.critic:
        parts |= {"critic backbone": trainer.critic.backbone, "critic head": trainer.critic.head}
    if trainer.policy_loss_engine:
        parts["policy loss"] = trainer.policy_loss
    before = {name: [p.clone() for p in module.parameters()] for name, module in parts.items()}
    history = [trainer.step() for _ in range(3)]
    assert all(math.isfinite(value) for metrics in history for value in metrics.values())
    assert {"reward/noisy", "reward/clean", "policy/kl_to_sft", "policy/entropy"} <= set(history[-1])
    moved = {n for n, m in parts.items() if any(not torch.equal(a, b) for a, b in zip(before[n], m.parameters(), strict=True))}
    still = {"sft_only": set(parts), "q_sharp": {"policy", "reference"}}.get(algorithm, {"reference"})
    assert moved == set(parts) - still


@pytest.mark.parametrize("algorithm", sorted(set(algorithms.registry.names) - {"sft_only"}))
def test_micro_batch_size_changes_nothing(tmp_path, warm, algorithm):
    def after_one_step(size):
        return trainer_of(tmp_path, warm, algorithm=algorithm, micro_batch_prompts=size).step()

    whole, parts = after_one_step(4), after_one_step(1)
    for name in set(whole) - {"rollout/tokens_per_second", "train/step_seconds"}:
        assert parts[name] == pytest.approx(whole[name], rel=1e-3, abs=1e-5), name


@pytest.mark.parametrize("algorithm", ["dfpo", "ppo", "grpo", "reinforce_pp"])
def test_the_reward_rises(tmp_path, warm, algorithm):
    """On clean labels, 40 steps lift the mean reward of the last five steps clearly above that of the first five."""
    rows = [row | {"label": row["answer"]} for row in rows_of_sums()]
    batches = {"prompts_per_step": 16, "samples_per_prompt": 8, "micro_batch_prompts": 16}
    config = tiny_config(tmp_path, batches | {"algorithm": algorithm, "learning_rate": 5e-4, "critic_learning_rate": 5e-4})
    trainer = train.Trainer(config, warm, rows)
    rewards = [trainer.step()["reward/noisy"] for _ in range(40)]
    assert sum(rewards[-5:]) / 5 > sum(rewards[:5]) / 5 + 0.1


def test_critic_warm_up_leaves_the_policy_alone(tmp_path, warm):
    trainer = trainer_of(tmp_path, warm, critic_warmup_steps=1)
    before = [p.clone() for p in trainer.policy.module.parameters()]
    head = [p.clone() for p in trainer.critic.head.parameters() if p.requires_grad]
    trainer.step()
    assert all(torch.equal(a, b) for a, b in zip(before, trainer.policy.module.parameters(), strict=True))
    moved = [p for p in trainer.critic.head.parameters() if p.requires_grad]
    assert not all(torch.equal(a, b) for a, b in zip(head, moved, strict=True))
    trainer.step()
    assert not all(torch.equal(a, b) for a, b in zip(before, trainer.policy.module.parameters(), strict=True))


def test_the_reference_never_moves(tmp_path, warm):
    trainer = trainer_of(tmp_path, warm, learning_rate=1e-3, critic_learning_rate=1e-2)
    before = [p.clone() for p in trainer.reference.parameters()]
    first = trainer.step()
    assert first["policy/kl_to_sft"] == pytest.approx(0.0, abs=1e-4)
    second = trainer.step()
    assert all(torch.equal(a, b) for a, b in zip(before, trainer.reference.parameters(), strict=True))
    assert abs(second["policy/kl_to_sft"]) > 1e-4


def test_a_critic_of_fewer_layers_keeps_the_first_ones(tmp_path, warm):
    trainer = trainer_of(tmp_path, warm, critic_layers=1)
    backbone = trainer.critic.backbone
    assert len(backbone.layers) == 1 and len(trainer.reference.base_model.layers) == 2
    own, reference = backbone.layers[0].mlp.up_proj.weight, trainer.reference.base_model.layers[0].mlp.up_proj.weight
    assert torch.equal(own, reference) and own.data_ptr() != reference.data_ptr()
    assert backbone.get_input_embeddings().weight.data_ptr() == trainer.reference.get_input_embeddings().weight.data_ptr()


def test_more_critic_layers_than_the_policy_has_is_one_line(tmp_path, warm):
    with pytest.raises(UserError, match="train.critic_layers: 3 is above the policy's 2 layers"):
        trainer_of(tmp_path, warm, critic_layers=3)


def test_a_saved_critic_loads_back_with_the_same_estimates(tmp_path, warm):
    from dfpo_core.critic_model import load_critic, save_critic
    from dfpo_core.critics.confidence import FEATURES

    trainer = trainer_of(tmp_path, warm, critic_layers=1)
    trainer.step()
    save_critic(
        trainer.critic.backbone,
        trainer.critic.head,
        tmp_path / "critic",
        {"name": "flow", "config": trainer.algorithm.critic_config.model_dump(mode="json")},
    )
    loaded = load_critic(tmp_path / "critic")
    batch, _ = trainer.sample()
    with torch.no_grad():
        own, other = trainer.critic_backbone(*batch.sequences), ResponseHidden(loaded.backbone)(*batch.sequences)
        torch.testing.assert_close(own, other)
        own, other = (c.reads(h, batch.log_probs, batch.entropy, batch.mask) for c, h in ((trainer.critic, own), (loaded, other)))
        assert own.shape[-1] == trainer.hidden_size + FEATURES  # DFPO's critic reads the policy's confidence too
        torch.testing.assert_close(trainer.critic.head.sample_returns(own), loaded.head.sample_returns(other))


def test_divergence_stops_with_a_clear_message_after_saving(tmp_path, warm):
    trainer = trainer_of(tmp_path, warm, learning_rate=1e30, steps=4)
    with pytest.raises(TrainingDiverged, match=r"training stopped at step \d+: .*not finite|is nan") as raised:
        train.loop(trainer, str(tmp_path / "state"), {}, Untracked())
    assert "lower train.learning_rate" in str(raised.value)
    saved = checkpoint.load(str(tmp_path / "state" / "diverged"))
    assert saved["step"] == len(saved["history"]) >= 1


def test_a_checkpoint_of_another_configuration_is_refused(tmp_path, warm):
    trainer = trainer_of(tmp_path, warm, steps=2)
    config = trainer.config
    train.loop(trainer, str(tmp_path / "state"), train.identity_of(config, warm), Untracked())
    other = tiny_config(tmp_path, {"steps": 2, "learning_rate": 3e-4})
    with pytest.raises(UserError, match="made with another train.learning_rate"):
        train.loop(train.Trainer(other, warm, rows_of_sums()), str(tmp_path / "state"), train.identity_of(other, warm), Untracked())


def test_more_steps_continue_a_finished_run(tmp_path, warm):
    identity = train.identity_of(tiny_config(tmp_path), warm)
    train.loop(trainer_of(tmp_path, warm, steps=2), str(tmp_path / "state"), identity, Untracked())
    log = Untracked()
    train.loop(trainer_of(tmp_path, warm, steps=3), str(tmp_path / "state"), identity, log)
    assert sorted(log.metrics) == [1, 2, 3] and log.params == {"resumed_from_step": 2}


# A process that trains and prints each step's metrics: the parent kills it without warning, starts it again, and compares.
DRIVER = """
import json, sys
from dfpo_core import train
from tests.training import Untracked, tiny_config, rows_of_sums
import torch
torch.set_num_threads(1)
home, warm, state, algorithm = sys.argv[1:]
config = tiny_config(home, {"steps": 12, "save_every": 3, "minibatches": 2, "epochs": 2, "algorithm": algorithm, "learning_rate": 1e-3})
log = Untracked()
train.loop(train.Trainer(config, warm, rows_of_sums()), state, train.identity_of(config, warm), log)
print(json.dumps(log.metrics))
"""


def start(tmp_path, warm, state, algorithm) -> subprocess.Popen:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    arguments = [sys.executable, "-c", DRIVER, str(tmp_path), warm, str(state), algorithm]
    return subprocess.Popen(arguments, env=environment, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.mark.parametrize("algorithm", ["dfpo", "flowrl"])
def test_metrics_after_kill_9_and_resume_are_bit_identical(tmp_path, warm, algorithm):
    undisturbed = start(tmp_path, warm, tmp_path / "whole", algorithm)
    killed = start(tmp_path, warm, tmp_path / "cut", algorithm)
    pointer, deadline = tmp_path / "cut" / checkpoint.POINTER, time.monotonic() + 120
    while not (pointer.exists() and json.loads(pointer.read_text())["step"] >= 6):
        assert killed.poll() is None and time.monotonic() < deadline
        time.sleep(0.005)
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    assert killed.returncode == -signal.SIGKILL
    resumed = start(tmp_path, warm, tmp_path / "cut", algorithm)
    outputs = [process.communicate(timeout=120) for process in (undisturbed, resumed)]
    assert [undisturbed.returncode, resumed.returncode] == [0, 0], outputs
    expected, found = (json.loads(out.strip().splitlines()[-1]) for out, _ in outputs)
    assert sorted(expected, key=int) == sorted(found, key=int) == [str(i) for i in range(1, 13)]
    for step in expected:
        timed = {"rollout/tokens_per_second", "train/step_seconds"}
        assert {k: v for k, v in found[step].items() if k not in timed} == {k: v for k, v in expected[step].items() if k not in timed}


def test_reward_flips_depend_on_question_and_response_at_the_rate_asked_for(tmp_path, warm):
    trainer = trainer_of(tmp_path, warm, prompts_per_step=16, samples_per_prompt=16, reward_noise={"flip_rate": 0.25})
    batch, texts = trainer.sample()
    plain = trainer_of(tmp_path, warm, prompts_per_step=16, samples_per_prompt=16)
    unflipped, same_texts = plain.sample()
    assert texts == same_texts
    fates: dict[tuple[str, str], set[bool]] = {}
    for i, row_id in enumerate(batch.row_ids):
        fates.setdefault((row_id, texts[i]), set()).add(batch.rewards[i].item() != unflipped.rewards[i].item())
    assert all(len(seen) == 1 for seen in fates.values())
    flipped = sum(True in seen for seen in fates.values()) / len(fates)
    assert flipped == pytest.approx(0.25, abs=5 * (0.25 * 0.75 / len(fates)) ** 0.5)


def test_a_row_without_a_label_earns_nothing_and_the_step_goes_on(tmp_path, warm):
    rows = [row | {"label": None} for row in rows_of_sums()]
    trainer = train.Trainer(tiny_config(tmp_path, noise={"missing_rate": 1.0, "missing": "zero"}), warm, rows)
    batch, _ = trainer.sample()
    assert batch.rewards.sum() == 0
    assert trainer.judged([rows[0], rows_of_sums()[1]], ["0", rows_of_sums()[1]["label"]]) == [0.0, 1.0]


# --- a rollout engine whose probabilities are not the trainer's --------------------------------------------------------------


class Sampler:
    """Samples as the policy does, and says that every token was `factor` times as likely."""

    def __init__(self, factor: float):
        self.factor, self.loaded = factor, 0

    def load(self, weights) -> None:
        self.model.load_state_dict(dict(weights))
        self.loaded += 1

    def __call__(self, *prompts, **settings):
        found = rollout.generate(self.model, *prompts, **settings)
        return replace(found, log_probs=(found.log_probs + math.log(self.factor)) * found.mask, entropy=torch.zeros_like(found.entropy))


def with_sampler(home, warm, factor: float, **settings):
    """A trainer whose rollout engine is a Sampler."""
    home.mkdir()
    trainer = train.Trainer(tiny_config(home, settings), warm, rows_of_sums())
    trainer.vllm = Sampler(factor)
    trainer.vllm.model, _ = load_policy(warm, home)
    return trainer


def test_importance_weights_by_hand():
    policy, sampler = torch.tensor([[0.5, 0.2, 0.9], [0.3, 0.1, 0.5]]).log(), torch.tensor([[0.25, 0.4, 0.1], [0.3, 0.2, 0.5]]).log()
    batch = SimpleNamespace(log_probs=policy, sampler_log_probs=sampler, mask=torch.tensor([[1.0, 1, 1], [1, 0, 0]]))
    assert train.importance_weights(batch, 3.0).tolist() == [pytest.approx([2.0, 0.5, 3.0]), pytest.approx([1.0, 1.0, 1.0])]


def test_an_engine_with_the_policys_probabilities_trains_as_the_policy_does(tmp_path, warm):
    trainer, plain = with_sampler(tmp_path / "a", warm, 1.0), train.Trainer(tiny_config(tmp_path), warm, rows_of_sums())
    curves = [[t.step() for _ in range(3)] for t in (trainer, plain)]
    for ours, theirs in zip(*curves, strict=True):
        assert ours["rollout/sampler_difference"] < 1e-5
        for key in ("policy/loss", "critic/loss", "policy/gradient_norm", "policy/entropy"):
            assert ours[key] == pytest.approx(theirs[key], rel=1e-4, abs=1e-6)
    assert trainer.vllm.loaded == 3


@pytest.mark.parametrize(
    ("factor", "cap", "weight", "cut"), [(0.5, 4.0, 2.0, 0.0), (0.1, 2.0, 2.0, 1.0), (2.0, 2.0, 0.5, 0.0), (0.5, 0.0, 1.0, 0.0)]
)
def test_tokens_count_by_the_truncated_ratio_and_the_mismatch_is_logged(tmp_path, warm, factor, cap, weight, cut):
    trainer = with_sampler(tmp_path / "a", warm, factor, importance_cap=cap)
    plain = with_sampler(tmp_path / "b", warm, 1.0)
    metrics, _ = trainer.step(), plain.step()
    assert metrics["rollout/sampler_kl"] == pytest.approx(math.log(factor), abs=1e-4)
    assert metrics["rollout/sampler_difference"] == pytest.approx(abs(math.log(factor)), abs=1e-4)
    assert metrics["rollout/truncated_weights"] == pytest.approx(cut)
    mask = plain.last.batch.mask > 0
    assert torch.allclose(trainer.last.advantages[mask], weight * plain.last.advantages[mask], atol=1e-4)
    assert plain.last.advantages[mask].abs().max() > 0.1


@pytest.mark.parametrize(("algorithm", "field"), [("flowrl", "train.importance_cap"), ("q_sharp", "train.rollout_engine")])
def test_what_vllm_cannot_sample_for_is_one_line(algorithm, field):
    with pytest.raises(UserError) as refused:
        algorithms.resolve(TrainConfig(algorithm=algorithm, rollout_engine="vllm"))
    assert refused.value.field == field


def test_vllm_that_is_not_installed_is_one_line(tmp_path, warm, monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm", None)
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "")
    with pytest.raises(UserError, match="vllm is not installed"):
        train.Trainer(tiny_config(tmp_path, {"rollout_engine": "vllm"}), warm, rows_of_sums())
