"""The plain engine: one process, fp32 weights, AdamW."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from dfpo_core.errors import TrainingDiverged


def learning_rate_factor(step: int, total: int, warmup: int, schedule: str) -> float:
    """Multiplier of the peak rate at 0-based `step`: linear warm-up, then constant, linear to 0 or cosine to 0 at `total`."""
    if step < warmup:
        return (step + 1) / warmup
    if schedule == "constant":
        return 1.0
    progress = min(1.0, (step - warmup) / max(1, total - warmup))
    return 1.0 - progress if schedule == "linear" else 0.5 * (1.0 + math.cos(math.pi * progress))


class TorchEngine:
    """Owns one module's optimizer. `backward` may be called several times before `step` (gradient accumulation).

    `learning_rates` gives the peak rate of each direct submodule that it names; "" is the rate of the whole module.
    """

    def __init__(
        self, module: nn.Module, name: str, learning_rates: dict[str, float], weight_decay: float = 0.0, max_grad_norm: float = 1.0
    ):
        self.module, self.name, self.max_grad_norm = module, name, max_grad_norm
        groups = [
            {"params": [p for p in module.get_submodule(part).parameters() if p.requires_grad], "lr": rate, "peak_rate": rate}
            for part, rate in learning_rates.items()
        ]
        self.parameters = [p for group in groups for p in group["params"]]
        self.optimizer = torch.optim.AdamW(groups, weight_decay=weight_decay, fused=True)

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of `loss`. Raises TrainingDiverged before a non-finite loss touches a gradient."""
        if not torch.isfinite(loss):
            raise TrainingDiverged(f"the {self.name} loss is {loss.item()}")
        loss.backward()

    def step(self, factor: float = 1.0) -> float:
        """Clip, update with each peak rate times `factor`, clear. Returns the gradient norm before clipping.

        Raises TrainingDiverged, leaving the weights as they were, when the norm is not finite.
        """
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, self.max_grad_norm).item()
        if not math.isfinite(norm):
            raise TrainingDiverged(f"the {self.name} gradient norm is {norm}")
        for group in self.optimizer.param_groups:
            group["lr"] = group["peak_rate"] * factor
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return norm

    def state_dict(self) -> dict[str, Any]:
        """Weights and optimizer state; frozen weights included, so that a checkpoint stands alone."""
        return {"module": self.module.state_dict(), "optimizer": self.optimizer.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.module.load_state_dict(state["module"])
        self.optimizer.load_state_dict(state["optimizer"])

    @contextmanager
    def gathered(self) -> Iterator[nn.Module]:
        """The module with all its weights present, for generation and saving."""
        yield self.module
