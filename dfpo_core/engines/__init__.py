"""Training engines: what turns a loss into new weights. `pytorch` holds everything in every process, `deepspeed` shards it (ZeRO 0 to 3).

One interface, in every process of a run at once:
    engine(...)                 the module's forward pass
    backward(loss, last)        add a gradient; `last` with the last one before a step. Losses and gradients add up over the processes
    step(factor) -> norm        clip, update, clear
    gathered(exact)             context: the module with all its weights present; not exact: as products under autocast see them
    save(folder), load(folder)  weights and optimizer state, exactly
"""

from __future__ import annotations

from typing import Any

from torch import nn

from dfpo_core.config import TrainConfig
from dfpo_core.engines.pytorch import TorchEngine


def create(settings: TrainConfig, module: nn.Module, name: str, learning_rate: float, bf16: bool = False) -> Any:
    """The engine of `train.engine` around a module of a language model's size; `bf16`: its products are in bf16."""
    if settings.engine == "deepspeed":
        from dfpo_core.engines.deepspeed import DeepSpeedEngine

        return DeepSpeedEngine(module, name, learning_rate, settings.zero_stage, settings.weight_decay, settings.max_grad_norm, bf16)
    return TorchEngine(module, name, learning_rate, settings.weight_decay, settings.max_grad_norm)
