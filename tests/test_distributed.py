"""Training in several processes: two gloo processes, in the plain engine and under every stage of ZeRO, against one process."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import TWO_PROCESSES
from mlflow import MlflowClient

from dfpo_core import distributed, launch, lora, train
from dfpo_core.critic_model import load_critic
from dfpo_core.errors import TrainingDiverged, UserError
from dfpo_core.models import load_policy
from dfpo_core.rollout import ResponseHidden, ResponseTokens
from tests.training import rows_of_sums, tiny_config, warm_checkpoint, write_rows

WORKER = Path(__file__).parent / "sharded_training.py"
COMMON = {"prompts_per_step": 8, "micro_batch_prompts": 2, "epochs": 2, "learning_rate": 1e-4, "kl_coefficient": 0.01}
SHARDED = {f"zero_{stage}": {"engine": "deepspeed", "zero_stage": stage} for stage in range(4)}
CASES = {"torch": {}} | SHARDED
BF16 = {"engine": "deepspeed", "zero_stage": 3, "precision": "bf16"}
ADAPTED = {"engine": "deepspeed", "zero_stage": 3, "lora": {"rank": 4}, "gradient_checkpointing": True, "learning_rate": 1e-3}
TIMES = {"rollout/tokens_per_second", "train/step_seconds"}


@pytest.fixture(scope="module")
def warm(tmp_path_factory) -> str:
    return warm_checkpoint(tmp_path_factory.mktemp("warm"))


def trained(folder: Path, warm: str, launcher: list[str], cases: dict[str, dict]) -> dict[str, dict]:
    arguments = [f"{name}={json.dumps(COMMON | settings)}" for name, settings in cases.items()]
    done = subprocess.run([*launcher, str(WORKER), warm, str(folder), *arguments], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads((folder / "results.json").read_text())


@pytest.fixture(scope="module")
def alone(warm, tmp_path_factory):
    """The same training in one process, without a launcher: the plain engine, and where it is installed DeepSpeed."""
    cases = {"torch": {}, "adapted": ADAPTED | {"engine": "torch"}, "bf16": BF16 | {"engine": "torch"}}
    if importlib.util.find_spec("deepspeed"):
        cases["zero_3"] = SHARDED["zero_3"]
    return trained(tmp_path_factory.mktemp("alone"), warm, [sys.executable], cases)


@pytest.fixture(scope="module")
def shared(warm, tmp_path_factory):
    pytest.importorskip("deepspeed", reason="needs the extra dfpo[deepspeed]")
    return trained(tmp_path_factory.mktemp("shared"), warm, TWO_PROCESSES, CASES | {"adapted": ADAPTED, "bf16": BF16})


def assert_same_training(one: list[dict], other: list[dict]) -> None:
    assert len(one) == len(other) == 3
    for step, (expected, found) in enumerate(zip(one, other, strict=True)):
        assert expected.keys() == found.keys()
        for name in expected.keys() - TIMES:
            assert found[name] == pytest.approx(expected[name], rel=1e-4, abs=1e-4), (step, name)
    assert one[0]["critic/loss"] != one[-1]["critic/loss"]


@pytest.mark.parametrize("case", [*CASES, "adapted"])
def test_two_processes_train_as_one_does(alone, shared, case):
    """Every metric of every step, losses and gradient norms included: the sharded loss is the global one."""
    assert shared[case]["world"] == 2
    assert_same_training(alone["adapted" if case == "adapted" else "torch"]["curve"], shared[case]["curve"])


def test_deepspeed_in_one_process_needs_no_launcher(alone):
    pytest.importorskip("deepspeed", reason="needs the extra dfpo[deepspeed]")
    found = alone["zero_3"]
    assert found["world"] == 1 and found["same_weights"]
    assert_same_training(alone["torch"]["curve"], found["curve"])


def test_in_bf16_both_engines_begin_alike(alone, shared):
    """The first step's losses, before rounding has had time to change a sampled token; they are not those of fp32."""
    expected, found = alone["bf16"]["curve"][0], shared["bf16"]["curve"][0]
    for name in ("critic/loss", "policy/loss", "reward/noisy", "policy/entropy"):
        assert found[name] == pytest.approx(expected[name], rel=2e-2, abs=2e-2), name
    assert found["policy/entropy"] != pytest.approx(alone["torch"]["curve"][0]["policy/entropy"], rel=1e-6)


@pytest.mark.parametrize("case", [*CASES, "adapted", "bf16"])
def test_a_resumed_run_is_the_run_itself_bit_for_bit(shared, case):
    curve, resumed = shared[case]["curve"][-1:], shared[case]["resumed"]
    for expected, found in zip(curve, resumed, strict=True):
        assert {k: v for k, v in found.items() if k not in TIMES} == {k: v for k, v in expected.items() if k not in TIMES}
    assert shared[case]["same_weights"]


@pytest.mark.parametrize("case", [*CASES, "adapted"])
def test_what_is_saved_is_a_plain_checkpoint_of_the_trained_policy(shared, case):
    assert shared[case]["saved_difference"] < 1e-4


# --- the step -------------------------------------------------------------------------------------------------------------------


def step(folder: Path, warm: str, settings: dict) -> tuple[dict, str, object]:
    """The training step in two processes: (summary, run id, MLflow client)."""
    pytest.importorskip("deepspeed", reason="needs the extra dfpo[deepspeed]")
    uri = f"sqlite:///{folder / 'mlflow.db'}"
    settings = COMMON | {"steps": 2, "processes": 2, "engine": "deepspeed", "zero_stage": 3, "checkpoint_uri": f"{folder}/state"} | settings
    config = tiny_config(folder / "home", settings, tracking={"uri": uri})
    data = write_rows(folder / "data", rows_of_sums())
    return *train.run(config, "", "run", str(data), warm, str(folder / "policy"), str(folder / "critic")), MlflowClient(tracking_uri=uri)


def test_the_step_starts_its_processes_and_logs_one_run(tmp_path, warm):
    summary, run_id, client = step(tmp_path, warm, {})
    run = client.get_run(run_id)
    assert run.info.status == "FINISHED" and run.data.params["processes"] == "2"
    curve = client.get_metric_history(run_id, "critic/loss")
    assert [point.step for point in curve] == [1, 2] and curve[-1].value == pytest.approx(summary["critic/loss"])
    names = {artifact.path for artifact in client.list_artifacts(run_id)}
    assert {"policy", "critic", "samples", "value_fan", "learning_curves.png"} <= names
    model, _ = load_policy(str(tmp_path / "policy"), tmp_path)
    critic = load_critic(tmp_path / "critic")
    hidden = critic.backbone(torch.ones(1, 3).long()).last_hidden_state
    reads = critic.reads(hidden, -torch.ones(1, 3), torch.ones(1, 3), torch.ones(1, 3))
    assert critic.head.sample_returns(reads).isfinite().all() and model.config.hidden_size == hidden.shape[-1]


def test_a_mistake_found_in_a_process_is_the_steps_one_line(tmp_path, warm, capfd):
    with pytest.raises(SystemExit) as ended:
        step(tmp_path, warm, {"prompts_per_step": 3})
    assert ended.value.code == 2
    assert "error: train.prompts_per_step: 3 prompts in 1 minibatches do not divide among 2 processes" in capfd.readouterr().err


def test_what_a_process_leaves_behind_decides_what_the_step_raises(tmp_path):
    with pytest.raises(RuntimeError, match="without a result"):
        launch.result_of(tmp_path, "")
    (tmp_path / "result.json").write_text('{"critic/loss": 1.5}')
    assert launch.result_of(tmp_path, "") == {"critic/loss": 1.5}
    with pytest.raises(RuntimeError, match="ended with code -9"):
        launch.result_of(tmp_path, "a process ended with code -9")
    (tmp_path / "failure-1.json").write_text('{"kind": "TrainingDiverged", "arguments": ["the loss is nan"]}')
    with pytest.raises(TrainingDiverged, match="the loss is nan"):
        launch.result_of(tmp_path, "a process ended with code 1")


def test_more_processes_than_gpus_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert launch.processes(tiny_config(tmp_path)) == 2
    with pytest.raises(UserError, match="train.processes: 3 processes for 2 GPUs"):
        launch.processes(tiny_config(tmp_path, {"processes": 3}))


# --- pieces ---------------------------------------------------------------------------------------------------------------------


def test_adapters_learn_and_leave_the_rest_alone(tmp_path, warm):
    trainer = train.Trainer(tiny_config(tmp_path, {"lora": {"rank": 4}, "learning_rate": 1e-2}), warm, rows_of_sums())
    before = {name: p.clone() for name, p in trainer.policy.module.named_parameters()}
    trainer.step()
    moved = {name for name, p in trainer.policy.module.named_parameters() if not torch.equal(p, before[name])}
    assert moved and all(".lora_" in name for name in moved)
    model = trainer.policy.module.model
    state = lora.merged_state(model)
    layer = model.base_model.layers[0].mlp.up_proj
    change = layer.lora_B["default"].weight @ layer.lora_A["default"].weight * (32 / 4)
    torch.testing.assert_close(state["model.layers.0.mlp.up_proj.weight"], layer.base_layer.weight + change)
    assert state.keys() == load_policy(warm, tmp_path)[0].state_dict().keys()


def test_full_passes_and_checkpointing_give_the_same_hidden_states_and_gradients(tmp_path, warm):
    trainer = train.Trainer(tiny_config(tmp_path), warm, rows_of_sums())
    batch, _ = trainer.sample()
    gradients = []
    for full, checkpointed in ((False, False), (True, False), (True, True)):
        model, _ = load_policy(warm, tmp_path)
        if checkpointed:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        hidden = ResponseHidden(model.base_model, full)(*batch.sequences)
        log_probs, _, _ = ResponseTokens(model, full=full)(*batch.sequences)
        valid = batch.mask > 0
        (hidden[valid].square().sum() + log_probs[valid].sum()).backward()
        gradients.append([hidden[valid].detach(), log_probs[valid].detach(), *(p.grad for p in model.parameters())])
        assert not any(layer.training for layer in model.base_model.layers)
    for other in gradients[1:]:
        for expected, found in zip(gradients[0], other, strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def kept_numbers(module, inputs) -> int:
    """Numbers that a forward pass keeps for the backward pass."""
    sizes = []

    def keep(tensor):
        sizes.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        module(*inputs)
    return sum(sizes)


def test_checkpointing_keeps_less_for_the_backward_pass(tmp_path, warm):
    kept = {}
    for checkpointed in (False, True):
        model, _ = load_policy(warm, tmp_path)
        if checkpointed:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        sequences = torch.ones(4, 3).long(), torch.ones(4, 3).long(), torch.ones(4, 8).long(), torch.ones(4, 8), 1
        kept[checkpointed] = kept_numbers(ResponseHidden(model.base_model, True), sequences)
    assert kept[True] < kept[False] / 4


@pytest.mark.parametrize(
    ("settings", "field"),
    [
        ({"algorithm": "q_sharp", "engine": "deepspeed"}, "train.engine"),
        ({"prompts_per_step": 4, "minibatches": 4}, "train.prompts_per_step"),
    ],
)
def test_what_cannot_be_shared_is_one_line(tmp_path, warm, monkeypatch, settings, field):
    monkeypatch.setattr(distributed, "world", lambda: 2)
    with pytest.raises(UserError, match=f"^{field}: "):
        train.Trainer(tiny_config(tmp_path, settings), warm, rows_of_sums())


@pytest.mark.parametrize(
    ("package", "settings", "field"),
    [("deepspeed", {"engine": "deepspeed"}, "train.engine"), ("peft", {"lora": {"rank": 4}}, "train.lora.rank")],
)
def test_a_missing_package_is_one_line(tmp_path, warm, monkeypatch, package, settings, field):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UserError, match=f"^{field}: .*{package} is not installed.*pip install"):
        train.Trainer(tiny_config(tmp_path, settings), warm, rows_of_sums())


def test_one_process_gathers_itself():
    tensor = torch.arange(6.0).view(2, 3)
    assert distributed.gather_rows(tensor) is tensor
    assert distributed.total(2.5) == 2.5 and distributed.totals({"a": 1.0}) == {"a": 1.0}
    assert torch.equal(distributed.own_rows(tensor, tensor), tensor) and distributed.share(4) == slice(0, 4)
    with pytest.raises(TrainingDiverged, match="here"), distributed.together(TrainingDiverged):
        raise TrainingDiverged("here")
