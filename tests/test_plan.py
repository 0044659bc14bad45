"""The memory plan: parameter counts against transformers, peaks against torch's profiler, ZeRO by hand, and what `dfpo plan` says."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
import torch
from conftest import ROOT, TINY, TWO_PROCESSES
from peak_memory import PROMPT_TOKENS, RESPONSE_TOKENS, peak_of_a_step, untrained_model
from training import tiny_config
from transformers import AutoConfig, AutoModelForCausalLM

from dfpo_core import models
from dfpo_core import plan as planning
from dfpo_core.config import ArchitectureConfig, load_config
from dfpo_core.errors import UserError
from dfpo_core.peak_bytes import PeakBytes
from pipelines.cli import main

WORKER = Path(__file__).parent / "peak_memory.py"
QWEN3_8B = ROOT / "pipelines" / "configs" / "qwen3_8b_math.yaml"
LLAMA = {"model_type": "llama", "hidden_size": 256, "intermediate_size": 640, "num_hidden_layers": 4, "num_attention_heads": 4}
QWEN3 = {
    "model_type": "qwen3",
    "hidden_size": 192,
    "intermediate_size": 576,
    "num_hidden_layers": 5,
    "num_attention_heads": 6,
    "head_dim": 64,
}


def shape_of(**values) -> ArchitectureConfig:
    return planning._from_values(values, "a test", "model")


# --- the model's shape --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "values",
    [
        LLAMA | {"vocab_size": 1000, "tie_word_embeddings": True},
        LLAMA | {"vocab_size": 1000, "num_key_value_heads": 2, "tie_word_embeddings": False},
        QWEN3 | {"vocab_size": 777, "num_key_value_heads": 2, "tie_word_embeddings": False},
        LLAMA | {"model_type": "qwen2", "vocab_size": 1000, "num_key_value_heads": 1, "tie_word_embeddings": True},
        LLAMA | {"model_type": "mistral", "vocab_size": 1000, "num_key_value_heads": 4, "tie_word_embeddings": False},
    ],
)
def test_parameters_are_those_of_the_model(values):
    values = dict(values)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(
            AutoConfig.for_model(values["model_type"], **{k: v for k, v in values.items() if k != "model_type"})
        )
    assert planning.parameters(shape_of(**values)) == sum(weight.numel() for weight in model.parameters())


def test_a_checkpoint_directory_needs_no_network_and_no_weights(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(LLAMA | {"vocab_size": 500, "tie_word_embeddings": True}))
    config = load_config(TINY, [f"model={tmp_path}"])
    assert planning.architecture_of(config).hidden_size == 256
    assert planning.architecture_of(load_config(TINY, ["model=someone/else"]), str(tmp_path / "config.json")).vocab_size == 500


def test_the_scratch_preset_has_the_shape_of_its_model(tmp_path):
    model, _ = models.load_policy("scratch:tiny", tmp_path)
    assert planning.parameters(planning.architecture_of(load_config(TINY))) == sum(weight.numel() for weight in model.parameters())


def test_the_packaged_model_has_the_shape_in_its_file():
    shape = planning.architecture_of(load_config(ROOT / "pipelines" / "configs" / "demo.yaml"))
    assert planning.parameters(shape) == 134_515_008  # as on its model card, 135 M


# --- measured peaks -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "settings", "precision"),
    [
        (LLAMA | {"num_key_value_heads": 2, "tie_word_embeddings": False}, {"micro_batch_prompts": 2}, "fp32"),
        (LLAMA | {"num_hidden_layers": 2, "tie_word_embeddings": True}, {"micro_batch_prompts": 4, "samples_per_prompt": 2}, "bf16"),
        (QWEN3 | {"num_key_value_heads": 2, "tie_word_embeddings": False}, {"critic_layers": 2, "minibatches": 2}, "fp32"),
        (QWEN3 | {"num_key_value_heads": 2, "tie_word_embeddings": True}, {"algorithm": "grpo"}, "fp32"),
        (QWEN3 | {"num_key_value_heads": 2, "tie_word_embeddings": False}, {"gradient_checkpointing": True}, "fp32"),
        (LLAMA | {"tie_word_embeddings": True}, {"lora": {"rank": 8}}, "fp32"),
    ],
    ids=["llama", "llama-bf16", "qwen3-short-critic", "qwen3-grpo", "checkpointing", "lora"],
)
def test_the_peak_is_within_15_percent_of_the_measured_one(tmp_path, shape, settings, precision):
    config = measured_config(tmp_path, untrained_model(tmp_path, shape | {"vocab_size": 4000}), settings, precision)
    assert planning.plan(config).peak == pytest.approx(peak_of_a_step(config), rel=0.15)


def measured_config(home, model: str, settings: dict, precision: str = "fp32"):
    small = {"prompts_per_step": 4, "samples_per_prompt": 4, "max_new_tokens": RESPONSE_TOKENS, "save_every": 1000}
    return tiny_config(home, small | settings, model=model, precision=precision, prompt={"max_prompt_tokens": PROMPT_TOKENS})


ZERO = {
    "1": ({"zero_stage": 1, "micro_batch_prompts": 1}, "fp32"),
    "2": ({"zero_stage": 2}, "fp32"),
    "3": ({"zero_stage": 3}, "fp32"),
    "3-bf16-checkpointing": ({"zero_stage": 3, "gradient_checkpointing": True, "prompts_per_step": 2, "samples_per_prompt": 2}, "bf16"),
}


@pytest.fixture(scope="module")
def zero_peaks(tmp_path_factory):
    """Name of the case -> (configuration, peaks of its two processes)."""
    folder = tmp_path_factory.mktemp("zero")
    model = untrained_model(folder, QWEN3 | {"hidden_size": 384, "num_hidden_layers": 3, "num_key_value_heads": 2, "vocab_size": 2000})
    sharded = {"engine": "deepspeed", "processes": 2}
    configs = {name: measured_config(folder, model, sharded | settings, precision) for name, (settings, precision) in ZERO.items()}
    cases = [f"{name}={config.to_json()}" for name, config in configs.items()]
    done = subprocess.run([*TWO_PROCESSES, str(WORKER), str(folder), *cases], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    return {name: (config, [int((folder / f"{name}-{rank}").read_text()) for rank in (0, 1)]) for name, config in configs.items()}


@pytest.mark.parametrize("case", ZERO)
def test_the_peak_under_zero_is_within_15_percent_of_that_of_two_processes(zero_peaks, case):
    config, measured = zero_peaks[case]
    assert [planning.plan(config).peak] * 2 == pytest.approx(measured, rel=0.15)


def test_peak_bytes_counts_what_is_alive_at_once():
    with PeakBytes() as counted:
        a = torch.zeros(1000)
        b = a + 1  # 8000 bytes
        del a
        c = b.view(10, 100)  # shares b's storage
        d = torch.zeros(500)  # 6000
        d.mul_(2)
    assert (counted.live, counted.peak) == (6000, 8000)
    del b, c, d
    assert counted.live == 0


# --- ZeRO by hand -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("stage", "weights", "gradients", "optimizer"),
    # Stage 0 has torch's AdamW; from 1 on the optimizer has a copy of the weights; at 3 the gradients are the critic's too.
    [(0, 4, 4, 8), (1, 4, 4, 12 / 4), (2, 4, 4 / 4, 12 / 4), (3, 4 / 4, 4 / 4, 12 / 4)],
)
def test_zero_shares_optimizer_then_gradients_then_weights(stage, weights, gradients, optimizer):
    changes = ["train.engine=deepspeed", f"train.zero_stage={stage}", "train.algorithm=grpo", "train.micro_batch_prompts=1"]
    config = load_config(TINY, changes)
    plan = planning.plan(config, gpus=4)
    count = planning.parameters(plan.work.shape)
    update = plan.phases["policy update"]
    found = [update[name] / count for name in ("policy weights", "gradients", "policy optimizer", "reference weights")]
    assert found == pytest.approx([weights, gradients, optimizer, weights], rel=1e-4)
    assert update.get("buckets", 0) == (4 * count if stage else 0)  # smaller than DeepSpeed's limit
    assert plan.work.prompts == config.train.prompts_per_step // 4


def test_gradient_checkpointing_and_smaller_micro_batches_lower_the_update():
    def update(*changes: str) -> int:
        return planning.plan(load_config(QWEN3_8B, list(changes)), gpus=8).totals["policy update"]

    plain, kept = update("train.gradient_checkpointing=false"), update()
    more = update("train.micro_batch_prompts=2")
    assert kept < 0.5 * plain
    assert kept < more < 2 * kept


def test_vllm_takes_its_share_and_the_policy_no_cache():
    plain, sampled = (planning.plan(load_config(QWEN3_8B, [f"train.rollout_engine={name}"])) for name in ("hf", "vllm"))
    assert plain.phases["rollout"]["KV cache"] > 0 == sampled.phases["rollout"]["KV cache"]
    assert sampled.phases["policy update"] == plain.phases["policy update"]
    memory = int(sampled.peak / (1 - planning.RESERVED - 0.3))
    assert planning.fits(sampled, memory + 2**20) and not planning.fits(sampled, memory - 2**20)
    assert "30% for vLLM" in planning.verdict(sampled, memory)


def test_adapters_are_what_peft_adds():
    from dfpo_core import lora
    from dfpo_core.config import LoRAConfig

    values = QWEN3 | {"vocab_size": 777, "num_key_value_heads": 2, "tie_word_embeddings": False}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**values))
    lora.add(model, LoRAConfig(rank=3))
    added = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert values["num_hidden_layers"] * planning.adapter_parameters(shape_of(**values), 3) == added


def test_the_paper_scale_configuration_is_qwen3_8b_and_fits_eight_gpus_of_80_gib(capsys):
    config = load_config(QWEN3_8B)
    # 8.2 billion parameters, 6.95 without embeddings, says the model card.
    shape = planning.architecture_of(config)
    embeddings = 2 * shape.vocab_size * shape.hidden_size
    assert round(planning.parameters(shape) / 1e9, 1) == 8.2
    assert round((planning.parameters(shape) - embeddings) / 1e9, 2) == 6.95
    assert (config.cluster.gpu_count, config.train.steps, config.train.algorithm) == (8, 500, "dfpo")
    assert main(["plan", str(QWEN3_8B)]) == 0
    assert "fits: the " in capsys.readouterr().out
    assert main(["plan", str(QWEN3_8B), "--set", "train.engine=torch"]) == 1  # all of the weights on every GPU


# --- the command --------------------------------------------------------------------------------------------------------------


def test_the_table_adds_up_and_says_whether_it_fits(capsys):
    assert main(["plan", str(TINY), "--gpu-memory", "2GiB"]) == 0
    lines = capsys.readouterr().out.splitlines()
    rows = {line[:18].strip(): [float(cell.replace("-", "0")) for cell in line[18:].split()] for line in lines[3:-2]}
    total = rows.pop("total")
    assert {"policy weights", "policy optimizer", "critic weights", "gradients", "KV cache", "activations"} <= set(rows)
    assert total == pytest.approx([sum(column) for column in zip(*rows.values(), strict=True)], abs=0.05)
    assert lines[-1].startswith("fits: ")
    assert main(["plan", str(TINY), "--gpu-memory", "4MiB"]) == 1
    assert "does not fit: " in capsys.readouterr().out
    assert main(["plan", str(TINY)]) == 0
    assert "give --gpu-memory" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("text", "expected"), [("80GiB", 80 * 2**30), ("80Gi", 80 * 2**30), ("80GB", 80 * 10**9), ("1.5 Ti", 3 * 2**39), ("512", 512)]
)
def test_amounts_of_memory(text, expected):
    assert planning.read_bytes(text, "--gpu-memory") == expected


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--gpu-memory", "lots"], "--gpu-memory: 'lots' is no amount of memory"),
        (["--gpu-memory", "0"], "--gpu-memory: '0' is no amount of memory"),
        (["--gpus", "-1"], "--gpus: -1 is below 0"),
        (["--gpus", "3"], "train.prompts_per_step: 8 prompts in 1 minibatches do not divide among 3 processes"),
        (["--model-config", "gone.json"], "--model-config: cannot read gone.json (FileNotFoundError)"),
        (["--set", "model=Qwen/Qwen3-8B"], "architecture: the shape of Qwen/Qwen3-8B is not known here"),
        (["--set", "model=./gone"], "model: no directory ./gone"),
        (["--set", "train.critic_layers=3"], "train.critic_layers: 3 is above the policy's 2 layers"),
        (["--set", "train.algorithm=dfpoo"], "train.algorithm: "),
        (["--set", "architecture={hidden_size: 8}"], "architecture.intermediate_size: Field required"),
    ],
)
def test_a_mistake_is_one_line(arguments, message, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert main(["plan", str(TINY), *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {message}") and error.count("\n") == 1


def test_the_light_client_is_told_what_to_install(monkeypatch, capsys):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert main(["plan", str(TINY)]) == 2
    assert capsys.readouterr().err.startswith("error: plan: counts the critic's head by running it, and torch is not installed; run: pip")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([1], "holds no mapping"),
        ({"hidden_size": 64}, "intermediate_size of .*: Field required"),
        (LLAMA | {"vocab_size": 10, "num_experts": 8}, "is a mixture of experts"),
        (LLAMA | {"vocab_size": 10, "num_key_value_heads": 3}, "must be a multiple"),
        (LLAMA | {"vocab_size": "many"}, "vocab_size of "),
    ],
)
def test_a_config_json_that_cannot_be_planned_is_refused(tmp_path, values, message):
    (tmp_path / "config.json").write_text(json.dumps(values))
    with pytest.raises(UserError, match=f"^--model-config: .*{message}"):
        planning.architecture_of(load_config(TINY), str(tmp_path))
