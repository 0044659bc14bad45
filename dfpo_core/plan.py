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
    """A critic's head: its parameters, and the bytes that a token takes at the peak of each of its calls."""

    parameters: int
    trained: int
    samples: int
    reading: int
    uncertainty: int
    loss: int


def head_of(name: str, options: Any, hidden_size: int) -> Head:
    """Counted by running the head on a few random tokens, since every critic is different and every head is small."""
    import torch

    from dfpo_core import critics
    from dfpo_core.types import CriticBatch

    head = critics.registry.get(name)(hidden_size, options)

    def peaks(rows: int) -> list[int]:
        hidden = torch.randn(rows, 16, hidden_size)
        rewards, mask = torch.zeros(2, rows, 16)[0], torch.ones(rows, 16)
        with PeakBytes() as reading:
            returns = head.sample_returns(hidden)
            head.value(hidden)
        with PeakBytes() as uncertainty:
            head.uncertainty(hidden)
        with PeakBytes() as loss:
            levels = torch.Generator().manual_seed(0)
            batch = CriticBatch(hidden.requires_grad_(), hidden.detach(), rewards, mask, float(mask.sum()), returns, levels)
            head.loss(batch).loss.backward()
        return [returns.shape[-1], reading.peak, uncertainty.peak, loss.peak]

    few, more = peaks(2), peaks(4)
    counts = [parameter.numel() for parameter in head.parameters()], [p.numel() for p in head.parameters() if p.requires_grad]
    return Head(sum(counts[0]), sum(counts[1]), few[0], *((b - a) // 32 for a, b in zip(few[1:], more[1:], strict=True)))
