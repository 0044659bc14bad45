"""The plain engine: fp32 weights and AdamW, whole in every process; gradients are summed over the processes."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dfpo_core import distributed
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
    """Owns one module's optimizer. `backward` may be called several times before `step` (gradient accumulation)."""

    def __init__(self, module: nn.Module, name: str, learning_rate: float, weight_decay: float = 0.0, max_grad_norm: float = 1.0):
        self.module, self.name, self.learning_rate, self.max_grad_norm = module, name, learning_rate, max_grad_norm
        self.parameters = [p for p in module.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.parameters, lr=learning_rate, weight_decay=weight_decay, fused=True)

    def __call__(self, *inputs) -> Any:
        return self.module(*inputs)

    def backward(self, loss: Tensor, last: bool = True) -> None:
        """Add the gradient of `loss`. Raises TrainingDiverged before a non-finite loss touches a gradient."""
        check_finite(loss, self.name)
        loss.backward()

    def step(self, factor: float = 1.0) -> float:
        """Clip, update with the peak rate times `factor`, clear. Returns the gradient norm before clipping.

        Raises TrainingDiverged, leaving the weights as they were, when the norm is not finite.
        """
        for parameter in self.parameters if distributed.world() > 1 else ():
            if parameter.grad is None:  # it may have one elsewhere
                parameter.grad = torch.zeros_like(parameter)
            distributed.add(parameter.grad)
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, self.max_grad_norm).item()
        check_norm(norm, self.name)
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate * factor
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return norm

    @contextmanager
    def gathered(self, exact: bool = True) -> Iterator[nn.Module]:
        yield self.module

    def save(self, folder: Path) -> None:
        """Write weights and optimizer state, frozen weights included, so that a checkpoint stands alone."""
        if distributed.rank() == 0:
            folder.mkdir(parents=True, exist_ok=True)
            with (folder / "engine.pt").open("wb") as file:
                torch.save({"module": self.module.state_dict(), "optimizer": self.optimizer.state_dict()}, file)

    def load(self, folder: Path) -> None:
        state = torch.load(folder / "engine.pt", map_location="cpu", weights_only=True)
        self.module.load_state_dict(state["module"])
        self.optimizer.load_state_dict(state["optimizer"])


def check_finite(loss: Tensor, name: str) -> None:
    """Raise TrainingDiverged, in every process, where the loss of one of them is not finite."""
    finite = torch.isfinite(loss.detach())
    if distributed.total(float(not finite)):
        raise TrainingDiverged(f"the {name} loss is {loss.item()}" if not finite else f"the {name} loss of another process is not finite")


def check_norm(norm: float, name: str) -> None:
    if not math.isfinite(norm):
        raise TrainingDiverged(f"the {name} gradient norm is {norm}")
