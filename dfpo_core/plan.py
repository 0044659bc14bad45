"""`dfpo plan`: what one GPU must hold in the train step, before anything is spent. Arithmetic on the model's shape, no weights, no network.

Everything is in bytes. Lengths are the worst case: prompts of prompt.max_prompt_tokens, responses of train.max_new_tokens. The
counts of what autograd keeps follow the operations of transformers' Llama, Qwen and Mistral layers and are checked against measured
peaks (tests/test_plan.py). Not counted: what the CUDA context, communication buffers and the allocator's fragmentation take;
RESERVED stands for them on a GPU.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dfpo_core import models
from dfpo_core.config import ArchitectureConfig, PipelineConfig
from dfpo_core.errors import UserError

UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40}
RESERVED = 0.06
"""Share of a GPU's memory that the CUDA context and fragmentation take."""
FP32, BF16 = 4, 2
ADAM = 2 * FP32


def read_bytes(text: str, field: str) -> int:
    """`80GiB`, `80Gi`, `80GB` or a plain number, in bytes. Raises UserError."""
    found = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?) ?([KMGT]i?)?B?", text.strip())
    if not found or float(found[1]) == 0:
        raise UserError(field, f"{text!r} is no amount of memory", "write e.g. 80GiB")
    return int(float(found[1]) * UNITS[found[2] or ""])


# ---------------------------------------------------------------------------------------------------------- the model's shape


def architecture_of(config: PipelineConfig, model_config: str = "") -> ArchitectureConfig:
    """The model's shape: from `model_config` (a config.json or its folder), the configuration, or what the model reference names.

    Raises UserError for a hub id without either, since nothing is downloaded.
    """
    reference = config.model
    if model_config:
        return _from_file(Path(model_config).expanduser(), "--model-config")
    if config.architecture:
        return config.architecture
    models.check_reference(reference)
    if reference.startswith("scratch:"):
        shape = models.PRESETS[reference.removeprefix("scratch:")]
        fixed = {"vocab_size": len(models.character_tokenizer()), "tie_word_embeddings": True}
        return _from_values(shape | fixed, reference, "model")
    if reference.startswith("pkg:"):
        return _from_gguf(models.packaged_file(reference.removeprefix("pkg:")))
    if reference.endswith(".gguf"):
        return _from_gguf(Path(reference).expanduser())
    folder = Path(reference).expanduser()
    if not folder.is_dir():
        raise UserError(
            "architecture", f"the shape of {reference} is not known here", "copy it from its config.json, or give --model-config FILE"
        )
    return _from_file(folder, "model")


def _from_file(path: Path, field: str) -> ArchitectureConfig:
    path = path / "config.json" if path.is_dir() else path
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(field, f"cannot read {path} ({type(error).__name__})", "give a config.json or its folder") from None
    if not isinstance(values, dict):
        raise UserError(field, f"{path} holds no mapping", "give a model's config.json")
    return _from_values(values, str(path), field)


def _from_values(values: dict[str, Any], where: str, field: str) -> ArchitectureConfig:
    """The fields of a Hugging Face config.json that memory depends on, with transformers' defaults for what it leaves out."""
    from pydantic import ValidationError

    if any("expert" in name and value for name, value in values.items()):
        raise UserError(field, f"{where} is a mixture of experts", "only dense decoders can be planned")
    known = {name: values[name] for name in ArchitectureConfig.model_fields if values.get(name) is not None}
    try:
        return ArchitectureConfig.model_validate({"query_key_norm": str(values.get("model_type")).startswith("qwen3"), **known})
    except ValidationError as error:
        problem = error.errors(include_url=False)[0]
        name = ".".join(map(str, problem["loc"])) or "the shape"
        raise UserError(field, f"{name} of {where}: {problem['msg'].removeprefix('Value error, ')}", "give a dense decoder's config.json") from None


def _from_gguf(path: Path) -> ArchitectureConfig:
    try:
        from gguf import GGUFReader
    except ImportError:
        raise UserError("model", f"reading {path.name} needs gguf", "run: pip install gguf") from None
    reader = GGUFReader(path)
    kind = reader.fields["general.architecture"].contents()
    names = {
        "hidden_size": "embedding_length",
        "intermediate_size": "feed_forward_length",
        "num_hidden_layers": "block_count",
        "num_attention_heads": "attention.head_count",
        "num_key_value_heads": "attention.head_count_kv",
        "head_dim": "attention.key_length",
    }
    values = {ours: reader.fields[f"{kind}.{theirs}"].contents() for ours, theirs in names.items() if f"{kind}.{theirs}" in reader.fields}
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    values |= {"vocab_size": int(tensors["token_embd.weight"].shape[1]), "tie_word_embeddings": "output.weight" not in tensors}
    return _from_values(values | {"model_type": kind}, path.name, "model")


def layer_parameters(shape: ArchitectureConfig) -> tuple[int, int]:
    """(weights of the linear maps, all weights) of one layer."""
    queries, keys = shape.num_attention_heads * shape.head_dim, shape.num_key_value_heads * shape.head_dim
    linear = 2 * shape.hidden_size * (queries + keys) + 3 * shape.hidden_size * shape.intermediate_size
    biases = (queries + 2 * keys) * shape.attention_bias
    norms = 2 * shape.hidden_size + 2 * shape.head_dim * shape.query_key_norm
    return linear, linear + biases + norms


def parameters(shape: ArchitectureConfig) -> int:
    """Weights of the whole model; a tied output layer counts once."""
    embeddings = shape.vocab_size * shape.hidden_size * (1 if shape.tie_word_embeddings else 2)
    return embeddings + shape.num_hidden_layers * layer_parameters(shape)[1] + shape.hidden_size


# ---------------------------------------------------------------------------------------------------------- the critic's head


@dataclass(frozen=True)
class Head:
    """A critic's head: its parameters, its return samples, and the bytes a token takes at the peak of each of its calls."""

    parameters: int
    trained: int
    samples: int
    reading: int
    uncertainty: int
    loss: int


def head_of(name: str, options: Any, hidden_size: int) -> Head:
    """Counted by running the head on a few random tokens: every critic is different, and every head is small."""
    import torch

    from dfpo_core import critics
    from dfpo_core.peak_bytes import PeakBytes
    from dfpo_core.types import CriticBatch

    head = critics.registry.get(name)(hidden_size, options)

    def peaks(rows: int) -> list[int]:
        hidden, rewards, mask = torch.randn(rows, 16, hidden_size), torch.zeros(rows, 16), torch.ones(rows, 16)
        with PeakBytes() as reading:
            returns = head.sample_returns(hidden)
            head.value(hidden)
        with PeakBytes() as uncertainty:
            head.uncertainty(hidden)
        with PeakBytes() as loss:
            generator = torch.Generator().manual_seed(0)
            batch = CriticBatch(hidden.clone().requires_grad_(), hidden, rewards, mask, float(mask.sum()), returns, generator)
            head.loss(batch).loss.backward()
        head.zero_grad()
        return [reading.peak, uncertainty.peak, loss.peak]

    with torch.random.fork_rng(devices=[]):
        few, more = peaks(2), peaks(4)
        samples = head.sample_returns(torch.zeros(1, 1, hidden_size)).shape[-1]
    trained = sum(weight.numel() for weight in head.parameters() if weight.requires_grad)
    return Head(sum(w.numel() for w in head.parameters()), trained, samples, *((b - a) // 32 for a, b in zip(few, more, strict=True)))


# ---------------------------------------------------------------------------------------------------------- the train step


@dataclass(frozen=True)
class Work:
    """The train step of a configuration as one GPU sees it."""

    shape: ArchitectureConfig
    critic_layers: int
    head: Head | None
    autocast: bool  # products in bf16 from fp32 weights
    fused_attention: bool  # attention that keeps no scores
    prompts: int  # a step
    samples: int  # a prompt
    minibatch_prompts: int
    micro_prompts: int
    updates: int  # optimizer steps a rollout
    prompt_tokens: int
    response_tokens: int


@dataclass(frozen=True)
class Plan:
    """Bytes on one GPU in each phase of a training step, by what they are for."""

    work: Work
    phases: dict[str, dict[str, int]]

    @property
    def totals(self) -> dict[str, int]:
        return {phase: sum(parts.values()) for phase, parts in self.phases.items()}

    @property
    def peak(self) -> int:
        return max(self.totals.values())


def plan(config: PipelineConfig, model_config: str = "") -> Plan:
    """The plan of `config`. Raises UserError where the shape is not known, or the configuration cannot work."""
    from dfpo_core import algorithms

    shape, train = architecture_of(config, model_config), config.train
    algorithm = algorithms.resolve(train)
    if train.critic_layers > shape.num_hidden_layers:
        problem = f"{train.critic_layers} is above the policy's {shape.num_hidden_layers} layers"
        raise UserError("train.critic_layers", problem, f"use 0 to {shape.num_hidden_layers}")
    name = algorithm.critic_name
    on_gpu = config.cluster.gpu_count > 0
    minibatch = train.prompts_per_step // train.minibatches
    return estimate(
        Work(
            shape=shape,
            critic_layers=(train.critic_layers or shape.num_hidden_layers) if name else 0,
            head=head_of(name, algorithm.critic_config, shape.hidden_size) if name else None,
            autocast=config.precision == "bf16" or (config.precision == "auto" and (on_gpu or _narrow_pays(shape.hidden_size))),
            fused_attention=on_gpu,
            prompts=train.prompts_per_step,
            samples=train.samples_per_prompt,
            minibatch_prompts=minibatch,
            micro_prompts=min(train.micro_batch_prompts, minibatch),
            updates=train.epochs * train.minibatches,
            prompt_tokens=config.prompt.max_prompt_tokens,
            response_tokens=train.max_new_tokens,
        )
    )


def _narrow_pays(hidden_size: int) -> bool:
    """What `precision: auto` chooses on this CPU."""
    from contextlib import nullcontext

    from dfpo_core.rollout import autocast

    return not isinstance(autocast("auto", hidden_size, "cpu"), nullcontext)


def estimate(work: Work) -> Plan:
    """Bytes in each phase. Policy, reference and critic stay where they are all the time; the rest comes and goes."""
    shape = work.shape
    policy = parameters(shape)
    backbone = work.critic_layers * layer_parameters(shape)[1] + shape.hidden_size if work.head else 0
    critic, trained = (backbone + work.head.parameters, backbone + work.head.trained) if work.head else (0, 0)
    resident = {
        "policy weights": policy * FP32,
        "policy optimizer": policy * ADAM,
        "reference weights": policy * FP32,
        "critic weights": critic * FP32,
        "critic optimizer": trained * ADAM,
    }
    tokens = work.prompts * work.samples * work.response_tokens
    # Ids, masks, log-probabilities, entropies, advantages of this step, and the figures' data of the last one.
    kept = tokens * 64 + (tokens * (shape.hidden_size * FP32 + 3 * work.head.samples * FP32) if work.head else 0)
    layers = shape.num_hidden_layers
    narrow = _narrow_weights(work, layers, output_layer=True)
    phases = {
        "rollout": {"narrow weights": narrow, "KV cache": _cache(work, work.prompts), "activations": _decoding(work)},
        # The reference always scores the rollout, the policy only where its weights move between updates.
        "scores": {
            "narrow weights": narrow * (work.updates > 1),
            "KV cache": _cache(work, work.micro_prompts),
            "activations": _scoring(work),
            "rollout": kept,
        },
        "policy update": _update(work, layers, policy, head=0) | {"narrow weights": narrow, "rollout": kept},
    }
    if work.head:
        parts = _update(work, work.critic_layers, trained, head=work.head.loss)
        phases["critic reading"] = {"activations": tokens * max(work.head.reading, work.head.uncertainty), "rollout": kept}
        phases["critic update"] = parts | {"narrow weights": _narrow_weights(work, work.critic_layers, False), "rollout": kept}
    return Plan(work, {phase: resident | parts for phase, parts in phases.items()})


def _widths(work: Work) -> tuple[int, int, int]:
    """(hidden, all query heads, all key heads)."""
    shape = work.shape
    return shape.hidden_size, shape.num_attention_heads * shape.head_dim, shape.num_key_value_heads * shape.head_dim


def _narrow_weights(work: Work, layers: int, output_layer: bool) -> int:
    """The bf16 copies of trained weights that autocast keeps from their first use to the backward pass."""
    weights = layers * layer_parameters(work.shape)[0] + output_layer * work.shape.vocab_size * work.shape.hidden_size
    return weights * BF16 * work.autocast


def _key_value_bytes(work: Work) -> int:
    """Bytes of one token's key and value in one layer: the rotation makes keys fp32 even under autocast."""
    return _widths(work)[2] * (FP32 + (BF16 if work.autocast else FP32))


def _cache(work: Work, prompts: int) -> int:
    """Keys and values of `prompts` prompts with all their responses; one layer is there twice while it grows."""
    span = prompts * work.samples * (work.prompt_tokens + work.response_tokens)
    return span * _key_value_bytes(work) * (work.shape.num_hidden_layers + 1)


def _repeated_heads(work: Work) -> int:
    """Keys and values copied to every query head, floats a token; 0 where each query head has its own."""
    return 2 * _widths(work)[1] * (work.shape.num_attention_heads > work.shape.num_key_value_heads)


def _decoding(work: Work) -> int:
    """Working set of the larger of reading the prompts and sampling one token of every sequence."""
    hidden = work.shape.hidden_size
    size, shape = (BF16 if work.autocast else FP32), work.shape
    span, sequences = work.prompt_tokens + work.response_tokens, work.prompts * work.samples
    prompt_tokens = work.prompts * work.prompt_tokens
    reading = prompt_tokens * (3 * hidden * FP32 + (3 * shape.intermediate_size + _repeated_heads(work)) * size)
    sampling = sequences * (shape.vocab_size * 20 + span * _repeated_heads(work) * size + hidden * 12)
    if not work.fused_attention:
        reading += 3 * prompt_tokens * shape.num_attention_heads * work.prompt_tokens * FP32
        sampling += 3 * sequences * shape.num_attention_heads * span * FP32
    return max(reading, sampling)


def _scoring(work: Work) -> int:
    """Working set of one micro-batch's log-probabilities without gradient, the cache aside: one layer, then the logits."""
    hidden = work.shape.hidden_size
    size, shape = (BF16 if work.autocast else FP32), work.shape
    sequences = work.micro_prompts * work.samples
    tokens, span = sequences * work.response_tokens, work.prompt_tokens + work.response_tokens
    mlp, attention = tokens * 3 * shape.intermediate_size * size, sequences * span * _repeated_heads(work) * size
    if not work.fused_attention:
        attention += 3 * tokens * shape.num_attention_heads * span * FP32
    return tokens * hidden * FP32 + max(max(mlp, attention) + tokens * 2 * hidden * FP32, tokens * shape.vocab_size * 4 * FP32)


def _update(work: Work, layers: int, trained: int, head: int) -> dict[str, int]:
    """Gradients and activations of an update of `layers` layers under the output layer (head 0) or a head of `head` bytes a token."""
    shape, (hidden, queries, keys) = work.shape, _widths(work)
    size = BF16 if work.autocast else FP32
    sequences = work.micro_prompts * work.samples
    prompts, responses = work.micro_prompts * work.prompt_tokens, sequences * (work.response_tokens - 1)
    tokens, span = prompts + responses, work.prompt_tokens + work.response_tokens
    # One layer, what the backward pass needs of a token: both norms' inputs and results in fp32, the inputs of the seven products
    # (autocast casts one for each product), rotated queries, the attention's result, and four tensors of the MLP.
    if work.autocast:
        token_bytes = hidden * (4 * FP32 + 5 * BF16) + (2 * queries + 4 * shape.intermediate_size) * BF16
    else:
        token_bytes = (6 * hidden + 2 * queries + 4 * shape.intermediate_size) * FP32
    token_bytes += shape.query_key_norm * (queries + keys) * (2 * FP32 if work.autocast else FP32)
    # Every response has its own copy of its prompt's keys and values; keys that are not repeated are still cast.
    cached = _key_value_bytes(work) + (_repeated_heads(work) or keys * work.autocast) * size
    scores = shape.num_attention_heads * (prompts * work.prompt_tokens + responses * span)
    layer = tokens * token_bytes + (prompts + sequences * span) * cached
    layer += shape.num_attention_heads * tokens * FP32 if work.fused_attention else scores * (FP32 + (BF16 if work.autocast else 0))
    working = max(prompts, responses) * 3 * shape.intermediate_size * size
    if not work.fused_attention:
        working += 2 * shape.num_attention_heads * responses * span * FP32
    read = sequences * work.response_tokens
    top = read * (hidden * 3 * FP32 + (head or shape.vocab_size * 18))
    gradients = trained * FP32
    if work.minibatch_prompts > work.micro_prompts:  # those of the earlier micro-batches are there from the start
        return {"gradients": gradients, "activations": layers * layer + max(top, working)}
    # Layer by layer the activations go and the gradients come: the peak is at the one end or the other.
    start, end = layers * layer + max(top, working), layer + working
    return {"gradients": gradients, "activations": max(start - gradients, end)}
