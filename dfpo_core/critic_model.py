"""A critic with a backbone of its own: the first layers of the SFT policy, trained at the critic's learning rate, under a head."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from dfpo_core.critics import confidence
from dfpo_core.errors import UserError
from dfpo_core.storage import atomic_directory


class CriticModel(nn.Module):
    """`head` (a registered critic) on hidden states of `backbone`.

    Input embeddings are shared with `policy` and frozen: they are a large part of a small model, and the head needs no new ones.
    `policy` must therefore be a model that is not trained (the reference), or the sharing would leak the policy's updates.
    """

    def __init__(self, policy: nn.Module, head: nn.Module, layers: int = 0):
        super().__init__()
        self.backbone = truncated_backbone(policy.base_model, layers)
        self.head = head
        self.backbone.requires_grad_(True)
        self.backbone.get_input_embeddings().requires_grad_(False)

    def reads(self, hidden: Tensor, log_probs: Tensor, entropy: Tensor, mask: Tensor) -> Tensor:
        """What the head reads: hidden states (B, T, H), and behind them what its `confidence` asks for, of (B, T) each."""
        if not getattr(self.head, "extra", 0):
            return hidden
        return torch.cat([hidden, confidence.features(log_probs, entropy, mask).to(hidden.dtype)], -1)


def truncated_backbone(backbone: nn.Module, layers: int) -> nn.Module:
    """A deep copy of the first `layers` layers (0: all) that shares the input embeddings' tensor. Raises UserError."""
    depth = backbone.config.num_hidden_layers
    if layers > depth:
        raise UserError("train.critic_layers", f"{layers} is above the policy's {depth} layers", f"use 0 to {depth}")
    if layers and not isinstance(getattr(backbone, "layers", None), nn.ModuleList):
        raise UserError("train.critic_layers", f"{type(backbone).__name__} has no list of layers to cut", "use 0, which copies all")
    weight = backbone.get_input_embeddings().weight
    # deepcopy takes the memo as what is already copied: the embedding weight, and the layers that are cut away.
    memo = {id(weight): weight}
    if layers:
        memo |= {id(layer): nn.Identity() for layer in backbone.layers[layers:]}
    copied = copy.deepcopy(backbone, memo)
    if layers:
        copied.layers = copied.layers[:layers]
        copied.config.num_hidden_layers = layers
        if getattr(copied.config, "layer_types", None):
            copied.config.layer_types = copied.config.layer_types[:layers]
    copied.get_input_embeddings().weight = nn.Parameter(weight.detach(), requires_grad=False)
    return copied


def save_critic(backbone: nn.Module, head: nn.Module, directory, description: dict) -> None:
    """Write backbone (HF format), head weights and `critic.json`; the directory appears only when complete."""
    import json

    from safetensors.torch import save_file

    with atomic_directory(directory) as partial:
        backbone.save_pretrained(partial / "backbone")
        save_file({k: v.contiguous() for k, v in head.state_dict().items()}, str(partial / "head.safetensors"))
        (partial / "critic.json").write_text(json.dumps(description, indent=2, sort_keys=True))


def load_critic(directory) -> CriticModel:
    """The critic that `save_critic` wrote."""
    import json
    from pathlib import Path

    from safetensors.torch import load_file
    from transformers import AutoModel

    from dfpo_core import critics

    description = json.loads((Path(directory) / "critic.json").read_text())
    backbone = AutoModel.from_pretrained(Path(directory) / "backbone", dtype=torch.float32)
    entry = critics.registry.get(description["name"])
    head = entry(backbone.config.hidden_size, entry.config_class(**description["config"]))
    head.load_state_dict(load_file(str(Path(directory) / "head.safetensors")))
    critic = CriticModel.__new__(CriticModel)
    nn.Module.__init__(critic)
    critic.backbone, critic.head = backbone, head
    return critic.eval()
