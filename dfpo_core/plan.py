"""`dfpo plan`: what one GPU must hold in the train step, before anything is spent. Arithmetic on the model's shape: no weights, no network.

Everything is in bytes, for the worst case: prompts of prompt.max_prompt_tokens, responses of train.max_new_tokens
(conversations of train.max_conversation_tokens). What autograd
keeps follows the operations of transformers' Llama, Qwen and Mistral layers, and is checked against measured peaks
(tests/test_plan.py). Not counted are the CUDA context, communication buffers and fragmentation: RESERVED stands for them.
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
LIVE_PARAMETERS, FETCHED_PARAMETERS = 10**9, 5 * 10**7
"""Parameters that ZeRO-3 keeps gathered at most, and that are on their way: stage3_max_live_parameters and stage3_prefetch_bucket_size."""


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
    kind = str(values.get("model_type"))  # two families say so by their name alone
    named = {"query_key_norm": kind.startswith("qwen3"), "attention_bias": kind.startswith("qwen2")}
    try:
        return ArchitectureConfig.model_validate(named | known)
    except ValidationError as error:
        problem = error.errors(include_url=False)[0]
        name = ".".join(map(str, problem["loc"])) or "the shape"
        raise UserError(
            field, f"{name} of {where}: {problem['msg'].removeprefix('Value error, ')}", "give a dense decoder's config.json"
        ) from None


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


def adapter_parameters(shape: ArchitectureConfig, rank: int) -> int:
    """Weights of the low-rank adapters of one layer: two thin matrices beside each of its seven linear maps."""
    queries, keys = shape.num_attention_heads * shape.head_dim, shape.num_key_value_heads * shape.head_dim
    return rank * (2 * (shape.hidden_size + queries) + 2 * (shape.hidden_size + keys) + 3 * (shape.hidden_size + shape.intermediate_size))


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
    width = hidden_size + getattr(head, "extra", 0)

    def peaks(rows: int) -> list[int]:
        hidden, rewards, mask = torch.randn(rows, 16, width), torch.zeros(rows, 16), torch.ones(rows, 16)
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
        samples = head.sample_returns(torch.zeros(1, 1, width)).shape[-1]
    trained = sum(weight.numel() for weight in head.parameters() if weight.requires_grad)
    return Head(sum(w.numel() for w in head.parameters()), trained, samples, *((b - a) // 32 for a, b in zip(few, more, strict=True)))


# ---------------------------------------------------------------------------------------------------------- the train step


@dataclass(frozen=True)
class Work:
    """The train step of a configuration as one GPU sees it."""

    shape: ArchitectureConfig
    critic_layers: int
    head: Head | None
    numbers: str  # fp32; autocast: fp32 weights, products in bf16
    fused_attention: bool  # attention that keeps no scores
    prompts: int  # a step
    samples: int  # a prompt
    minibatch_prompts: int
    micro_prompts: int
    updates: int  # optimizer steps a rollout
    prompt_tokens: int
    response_tokens: int
    gpus: int = 1
    zero_stage: int = 0
    checkpointing: bool = False  # keep only the input of each layer, and compute the rest again
    full_passes: bool = False  # every response with a copy of its prompt, without a cache
    lora_rank: int = 0  # of the policy's adapters; 0: all its weights are trained
    vllm_share: float = 0.0  # of the GPU's memory that vLLM takes to sample; 0: the policy itself samples

    @property
    def size(self) -> int:
        """Bytes of a number that enters a product."""
        return FP32 if self.numbers == "fp32" else BF16

    @property
    def span(self) -> int:
        return self.prompt_tokens + self.response_tokens

    @property
    def queries(self) -> int:
        return self.shape.num_attention_heads * self.shape.head_dim

    @property
    def keys(self) -> int:
        return self.shape.num_key_value_heads * self.shape.head_dim

    @property
    def key_value_bytes(self) -> int:
        """One token's key and value in one layer: under autocast the rotation makes keys fp32."""
        return self.keys * (FP32 + self.size)

    @property
    def repeated(self) -> int:
        """Numbers of one token's key and value, copied to every query head; 0 where each query head has its own."""
        return 2 * self.queries * (self.shape.num_attention_heads > self.shape.num_key_value_heads)


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


def plan(config: PipelineConfig, model_config: str = "", gpus: int = 0) -> Plan:
    """The plan of `config` with one process on each of `gpus` GPUs (0: train.processes, or else cluster.gpu_count).

    Raises UserError where the shape is not known, or the configuration cannot work.
    """
    from importlib.util import find_spec

    if not find_spec("torch"):
        raise UserError("plan", "counts the critic's head by running it, and torch is not installed", "run: pip install '.[train]'")
    from dfpo_core import algorithms, launch

    shape, train = architecture_of(config, model_config), config.train
    algorithm = algorithms.resolve(train)
    if algorithm.guided:
        raise UserError("train.algorithm", f"{algorithm.name} decodes with two models, which is not counted", "choose another algorithm")
    if train.critic_layers > shape.num_hidden_layers:
        problem = f"{train.critic_layers} is above the policy's {shape.num_hidden_layers} layers"
        raise UserError("train.critic_layers", problem, f"use 0 to {shape.num_hidden_layers}")
    on_gpu = gpus > 0 or config.cluster.gpu_count > 0
    gpus = gpus or config.processes
    launch.check_shares(train, gpus)
    minibatch = train.prompts_per_step // train.minibatches // gpus
    name = algorithm.critic_name
    return estimate(
        Work(
            shape=shape,
            critic_layers=(train.critic_layers or shape.num_hidden_layers) if name else 0,
            head=head_of(name, algorithm.critic_config, shape.hidden_size) if name else None,
            numbers=_numbers(config, shape, on_gpu),
            fused_attention=on_gpu,
            prompts=train.prompts_per_step // gpus,
            samples=train.samples_per_prompt,
            minibatch_prompts=minibatch,
            micro_prompts=min(train.micro_batch_prompts, minibatch),
            updates=train.epochs * train.minibatches,
            prompt_tokens=config.prompt.max_prompt_tokens,
            response_tokens=config.response_tokens,
            gpus=gpus,
            zero_stage=train.zero_stage if train.engine == "deepspeed" else 0,
            checkpointing=train.gradient_checkpointing,
            full_passes=train.full_passes,
            lora_rank=train.lora.rank,
            vllm_share=train.vllm.memory_share if train.rollout_engine == "vllm" else 0.0,
        )
    )


def _numbers(config: PipelineConfig, shape: ArchitectureConfig, on_gpu: bool) -> str:
    """What products are computed in: `precision: auto` asks the CPU that this runs on, where there is no GPU."""
    from dfpo_core.rollout import uses_bf16

    in_bf16 = config.precision != "fp32" if on_gpu else uses_bf16(config.precision, shape.hidden_size)
    return "autocast" if in_bf16 else "fp32"


def estimate(work: Work) -> Plan:
    """Bytes in each phase. Policy, reference and critic stay where they are all the time; the rest comes and goes.

    ZeRO (arXiv 1910.02054) shares the optimizer's state from stage 1 on, gradients from 2 on, weights from 3 on. DeepSpeed 0.19 keeps
    its own copy of the weights that it shares the updating of, from stage 1 on a bucket of the gradients that it sends, and at stage 3
    its share of the gradients all the time. Stage 3 gathers all of the policy's weights for the rollout, those of products as products
    see them, and for an update at most LIVE_PARAMETERS at a time beside those on their way.
    """
    shape, layers = work.shape, work.shape.num_hidden_layers
    policy = parameters(shape)
    backbone = work.critic_layers * layer_parameters(shape)[1] + shape.hidden_size if work.head else 0
    critic, trained = (backbone + work.head.parameters, backbone + work.head.trained) if work.head else (0, 0)
    adapters = layers * adapter_parameters(shape, work.lora_rank)
    tuned = adapters or policy
    weights_shared, state_shared = (work.gpus if work.zero_stage >= stage else 1 for stage in (3, 1))
    state = ADAM + FP32 * (work.zero_stage > 0)
    resident = {
        "policy weights": (policy + adapters) * FP32 // weights_shared,
        "policy optimizer": tuned * state // state_shared,
        "reference weights": policy * FP32 // weights_shared,
        "critic weights": critic * FP32 // weights_shared,
        "critic optimizer": trained * state // state_shared,
    }
    if work.zero_stage == 3:
        resident["gradients"] = (tuned + trained) * FP32 // work.gpus
        resident["buckets"] = bucket(tuned) + bucket(trained)
    tokens = work.prompts * work.samples * work.response_tokens
    # Ids, masks, log-probabilities, entropies, advantages of this step, and the figures' data of the last one.
    kept = tokens * 64 + (tokens * (shape.hidden_size * FP32 + 3 * work.head.samples * FP32) if work.head else 0)
    extra = _extra_weights(work, policy, layers, output_layer=True)
    phases = {
        "rollout": {
            "other weights": _gathered_to_sample(work, policy) if weights_shared > 1 else extra,
            "KV cache": 0 if work.vllm_share else _cache(work, work.prompts),
            "activations": 0 if work.vllm_share else _decoding(work),
        },
        # The reference always scores the rollout, the policy only where its weights move between updates.
        "scores": {
            "other weights": extra * (work.updates > 1 or weights_shared > 1),
            "KV cache": _cache(work, work.micro_prompts),
            "activations": _scoring(work),
            "rollout": kept,
        },
        "policy update": _update(work, layers, tuned, head=0) | {"other weights": extra, "rollout": kept},
    }
    if work.head:
        others = _extra_weights(work, critic, work.critic_layers, output_layer=False)
        phases["critic reading"] = {"activations": tokens * max(work.head.reading, work.head.uncertainty), "rollout": kept}
        phases["critic update"] = _update(work, work.critic_layers, trained, work.head.loss) | {"other weights": others, "rollout": kept}
    return Plan(work, {phase: resident | parts for phase, parts in phases.items()})


def _extra_weights(work: Work, count: int, layers: int, output_layer: bool) -> int:
    """Copies of weights in a pass: autocast's in bf16, kept to the backward pass, or those that ZeRO-3 gathers."""
    if work.zero_stage == 3 and work.gpus > 1:
        return min(count, LIVE_PARAMETERS + FETCHED_PARAMETERS) * FP32
    if work.numbers == "autocast":
        return (layers * layer_parameters(work.shape)[0] + output_layer * work.shape.vocab_size * work.shape.hidden_size) * BF16
    return 0


def bucket(trained: int) -> int:
    """Bytes that DeepSpeed keeps for the gradients that are sent at once."""
    from dfpo_core.engines.deepspeed import BUCKET

    return min(trained, BUCKET) * FP32


def _gathered_to_sample(work: Work, policy: int) -> int:
    """Bytes of the policy's weights, those of products in their precision."""
    shape = work.shape
    products = shape.num_hidden_layers * layer_parameters(shape)[0]
    products += 0 if shape.tie_word_embeddings else shape.vocab_size * shape.hidden_size
    return policy * FP32 - products * (FP32 - work.size)


def _cache(work: Work, prompts: int) -> int:
    """Keys and values of `prompts` prompts with all their responses; one layer is there twice while it grows."""
    return prompts * work.samples * work.span * work.key_value_bytes * (work.shape.num_hidden_layers + 1)


def _decoding(work: Work) -> int:
    """Working set of the larger of reading the prompts and sampling one token of every sequence."""
    shape, size = work.shape, work.size
    tokens, sequences = work.prompts * work.prompt_tokens, work.prompts * work.samples
    reading = tokens * (3 * shape.hidden_size * FP32 + (3 * shape.intermediate_size + work.repeated) * size)
    sampling = sequences * (shape.vocab_size * 5 * FP32 + work.span * work.repeated * size + shape.hidden_size * 3 * FP32)
    if not work.fused_attention:
        reading += 3 * tokens * shape.num_attention_heads * work.prompt_tokens * FP32
        sampling += 3 * sequences * shape.num_attention_heads * work.span * FP32
    return max(reading, sampling)


def _scoring(work: Work) -> int:
    """Working set of one micro-batch's log-probabilities without gradient, the cache aside: one layer, then the logits."""
    shape, sequences = work.shape, work.micro_prompts * work.samples
    tokens = sequences * work.response_tokens
    mlp, attention = tokens * 3 * shape.intermediate_size * work.size, sequences * work.span * work.repeated * work.size
    if not work.fused_attention:
        attention += 3 * tokens * shape.num_attention_heads * work.span * FP32
    return tokens * shape.hidden_size * FP32 + max(
        max(mlp, attention) + tokens * 2 * shape.hidden_size * FP32, tokens * shape.vocab_size * 4 * FP32
    )


def _update(work: Work, layers: int, trained: int, head: int) -> dict[str, int]:
    """Gradients and activations of an update of `layers` layers under the output layer (head 0) or a head of `head` bytes a token."""
    shape, sequences = work.shape, work.micro_prompts * work.samples
    copies = sequences if work.full_passes else work.micro_prompts
    prompts, responses = copies * work.prompt_tokens, sequences * (work.response_tokens - 1)
    layer = _kept_by_a_layer(work, prompts, responses)
    working = max(prompts, responses) * 3 * shape.intermediate_size * work.size
    if not work.fused_attention:
        working += 2 * shape.num_attention_heads * responses * work.span * FP32
    # The last norm; then the logits, their log-softmax, probabilities and gradients, in fp32, or the critic's head.
    top = sequences * work.response_tokens * (shape.hidden_size * 3 * FP32 + (head or shape.vocab_size * 18))
    if work.checkpointing:
        every = layers * (prompts + responses) * shape.hidden_size * FP32
        start = every + max(top, layer + working)
    else:
        start = layers * layer + max(top, working)
    if work.zero_stage == 3:  # gradients and one bucket are there all the time; what of it is sent is there twice
        return {"activations": start, "gradients sent": bucket(trained)}
    shared = {"buckets": bucket(trained)} if work.zero_stage else {}
    gradients = trained * FP32 // (work.gpus if work.zero_stage == 2 else 1)
    if work.minibatch_prompts > work.micro_prompts:  # earlier micro-batches' gradients are there from the start
        return {"gradients": gradients, "activations": start} | shared
    # Layer by layer the activations go and the gradients come: the peak is at the one end or the other.
    return {"gradients": gradients, "activations": max(start - gradients, layer + working)} | shared


def _kept_by_a_layer(work: Work, prompts: int, responses: int) -> int:
    """What the backward pass of one layer needs of `prompts` prompt tokens and `responses` response tokens.

    Both norms' inputs and results, the inputs of the seven products (autocast casts one for each), the rotated queries, attention's
    result, and four tensors of the MLP; keys and values once a response, of which each has its own copy of its prompt's.
    """
    shape, size = work.shape, work.size
    norms = {"fp32": 6 * FP32, "autocast": 4 * FP32 + 5 * BF16, "bf16": 2 * (FP32 + 2 * BF16)}[work.numbers]
    normed_heads = {"fp32": 2 * FP32, "autocast": FP32 + BF16, "bf16": FP32 + BF16}[work.numbers] * shape.query_key_norm
    token = shape.hidden_size * norms + (2 * work.queries + 4 * shape.intermediate_size) * size + (work.queries + work.keys) * normed_heads
    # Keys that are not repeated are still cast by autocast.
    cached = work.key_value_bytes + (work.repeated or work.keys * (work.numbers == "autocast")) * size
    tokens = (prompts + responses) * token + (prompts + work.micro_prompts * work.samples * work.span) * cached
    if work.fused_attention:
        return tokens + (prompts + responses) * shape.num_attention_heads * FP32
    scores = shape.num_attention_heads * (prompts * work.prompt_tokens + responses * work.span)
    return tokens + scores * (FP32 if work.numbers == "fp32" else FP32 + BF16)


# ---------------------------------------------------------------------------------------------------------- what is printed

REMEDIES = {
    "activations": "lower train.micro_batch_prompts or train.max_new_tokens, or keep only layer inputs (train.gradient_checkpointing)",
    "KV cache": "lower train.prompts_per_step or train.samples_per_prompt, or use more GPUs",
    "rollout": "lower train.prompts_per_step or train.samples_per_prompt, or use more GPUs",
}


def render(plan: Plan, memory: int = 0) -> str:
    """The plan as a table of GiB, and whether it fits into `memory` bytes, where they are given."""
    work, phases = plan.work, list(plan.phases)
    critic = f", critic of {work.critic_layers} layers" if work.head else ", no critic"
    engine = f"ZeRO-{work.zero_stage}" if work.zero_stage else "all of the weights on every GPU"
    engine = f"{work.gpus} process(es), {engine}, {work.numbers}"
    lines = [f"{parameters(work.shape) / 1e9:.2f} billion parameters{critic}; {engine}; GiB on one GPU:", ""]
    names = list(dict.fromkeys(name for parts in plan.phases.values() for name in parts))
    rows = [[name, *(plan.phases[phase].get(name, 0) for phase in phases)] for name in names]
    rows.append(["total", *plan.totals.values()])
    lines.append(f"{'':<18}" + "".join(f"{phase:>16}" for phase in phases))
    lines += [f"{name:<18}" + "".join(f"{size / 2**30:>16.2f}" if size else f"{'-':>16}" for size in sizes) for name, *sizes in rows]
    return "\n".join([*lines, "", verdict(plan, memory)])


def fits(plan: Plan, memory: int) -> bool:
    return plan.peak <= _usable(plan, memory)


def _usable(plan: Plan, memory: int) -> float:
    return memory * (1 - RESERVED - plan.work.vllm_share)


def verdict(plan: Plan, memory: int) -> str:
    """One line: the peak, whether it fits, and otherwise what would help most."""
    phase = max(plan.totals, key=plan.totals.get)
    peak = f"the {phase} needs {plan.peak / 2**30:.2f} GiB"
    if not memory:
        return f"{peak}; give --gpu-memory or cluster.gpu_memory to see whether that fits"
    kept = f"{RESERVED:.0%} being kept in reserve" + (f", {plan.work.vllm_share:.0%} for vLLM" if plan.work.vllm_share else "")
    usable = f"{_usable(plan, memory) / 2**30:.2f} of {memory / 2**30:.2f} GiB, {kept}"
    if fits(plan, memory):
        return f"fits: {peak}; there are {usable}"
    largest = max(plan.phases[phase], key=plan.phases[phase].get)
    remedy = REMEDIES.get(largest, "use more GPUs, or a higher train.zero_stage")
    return f"does not fit: {peak}; there are {usable}; most are {largest}: {remedy}"
