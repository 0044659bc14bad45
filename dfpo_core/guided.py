"""A policy that is two models: a frozen reference, and a critic that says how much better each next token is (Q#, arXiv 2502.20548).

It is used like a causal language model by `rollout`: its backbone runs both, its hidden states are those of both side by side, and its
output embedding adds the guidance to the reference's log-probabilities. On disk it is the reference's checkpoint with a folder `guide`.
"""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from dfpo_core.critic_model import CriticModel, load_critic, save_critic

FOLDER = "guide"


class PairCache:
    """The keys and values of both backbones."""

    def __init__(self, *caches: DynamicCache):
        self.caches = caches

    def batch_repeat_interleave(self, repeats: int) -> None:
        for cache in self.caches:
            cache.batch_repeat_interleave(repeats)

    def batch_select_indices(self, indices: Tensor) -> None:
        for cache in self.caches:
            cache.batch_select_indices(indices)


class GuidedBackbone(nn.Module):
    """Both backbones on the same tokens; last hidden states (B, L, H_reference + H_critic)."""

    def __init__(self, reference: nn.Module, guide: nn.Module):
        super().__init__()
        self.reference, self.guide, self.config = reference, guide, reference.config

    def new_cache(self) -> PairCache:
        return PairCache(*(DynamicCache(config=model.config) for model in (self.reference, self.guide)))

    def forward(self, past_key_values: PairCache, **inputs) -> SimpleNamespace:
        parts = zip((self.reference, self.guide), past_key_values.caches, strict=True)
        hidden = [model(past_key_values=cache, **inputs).last_hidden_state.float() for model, cache in parts]
        return SimpleNamespace(last_hidden_state=torch.cat(hidden, -1), past_key_values=past_key_values)


class GuidedHead(nn.Module):
    """Hidden states of both -> log pi_ref(a | s) + Q(s, a) / eta (.., V), but for a constant of each state: logits."""

    def __init__(self, unembed: nn.Module, q_function: nn.Module, hidden_size: int):
        super().__init__()
        self.unembed, self.q_function, self.hidden_size = unembed, q_function, hidden_size

    def forward(self, hidden: Tensor) -> Tensor:
        of_reference, of_guide = self.plain(hidden), self.unembed(hidden[..., self.hidden_size :]).float()
        heat = self.q_function.config.temperature
        preference = (of_guide / heat).log_softmax(-1) - (of_reference / heat).log_softmax(-1)
        return of_reference + self.q_function.guidance(hidden[..., self.hidden_size :], preference)

    def plain(self, hidden: Tensor) -> Tensor:
        """Logits of the reference alone."""
        return self.unembed(hidden[..., : self.hidden_size]).float()


class GuidedPolicy(nn.Module):
    """The reference guided by a critic whose head is a critics.q_function.QFunction."""

    def __init__(self, reference: nn.Module, critic: CriticModel):
        super().__init__()
        self.reference, self.critic, self.config = reference, critic, reference.config
        self.base_model = GuidedBackbone(reference.base_model, critic.backbone)
        self.head = GuidedHead(reference.get_output_embeddings(), critic.head, reference.config.hidden_size)

    def get_output_embeddings(self) -> GuidedHead:
        return self.head

    def save_pretrained(self, directory: str | Path) -> None:
        """Write the reference's checkpoint and, beside it, the guide."""
        self.reference.save_pretrained(directory)
        description = {"name": "q_function", "config": self.critic.head.config.model_dump(mode="json")}
        save_critic(self.critic.backbone, self.critic.head, Path(directory) / FOLDER, description)


def with_guide(reference: nn.Module, directory: str | Path) -> nn.Module:
    """The guided policy of a checkpoint directory that holds a guide; the model itself where it does not."""
    folder = Path(directory) / FOLDER
    return GuidedPolicy(reference, load_critic(folder)) if (folder / "critic.json").is_file() else reference
