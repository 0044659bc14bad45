"""Low-rank adapters (Hu et al. 2021, arXiv 2106.09685) by peft, in the place of the policy's linear layers."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dfpo_core.config import LoRAConfig
from dfpo_core.errors import UserError

BASE = ".base_layer"


def add(model: nn.Module, config: LoRAConfig) -> None:
    """Put an adapter on every linear layer but the output layer, and freeze everything else. Raises UserError without peft."""
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError:
        raise UserError("train.lora.rank", "peft is not installed", "run: pip install 'dfpo[deepspeed]', or use 0") from None
    inject_adapter_in_model(LoraConfig(r=config.rank, lora_alpha=config.alpha, target_modules="all-linear"), model)


@torch.no_grad()
def merged_state(model: nn.Module) -> dict[str, Tensor]:
    """The state of the same model without adapters, with what they add in its weights; the model's own state where it has none."""
    if not hasattr(model, "peft_config"):
        return model.state_dict()
    from peft.tuners.lora import LoraLayer

    state = {name.replace(BASE, ""): tensor for name, tensor in model.state_dict().items() if ".lora_" not in name}
    for name, module in model.named_modules():
        if isinstance(module, LoraLayer):
            (adapter,) = module.active_adapters
            state[f"{name}.weight"] = state[f"{name}.weight"] + module.get_delta_weight(adapter)
    return state
