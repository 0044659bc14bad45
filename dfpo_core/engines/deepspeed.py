"""DeepSpeed's ZeRO: stage 1 shards the optimizer state over the processes, 2 the gradients too, 3 the weights too; 0 shards nothing.

Weights are fp32 and products bf16 where the configuration says so, as in the plain engine, so that both compute the same. Optimizer and
gradient clipping are torch's AdamW and the global norm.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dfpo_core import distributed
from dfpo_core.engines.pytorch import check_finite, check_norm
from dfpo_core.errors import UserError

TAG = "engine"
BUCKET = 5 * 10**7
"""Gradients that are sent at once, at most. From stage 1 on DeepSpeed holds memory for as many, whatever the size of the model."""


def library() -> Any:
    """DeepSpeed, joined to this run's processes. Raises UserError where it is not installed."""
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
    try:
        import deepspeed
    except ImportError:
        raise UserError("train.engine", "deepspeed is not installed", "run: pip install 'dfpo[deepspeed]'") from None
    from deepspeed.git_version_info import installed_ops

    if not torch.cuda.is_available() and not installed_ops.get("deepspeed_shm_comm"):
        # The CPU accelerator would compile its shared-memory collectives for minutes on first use; gloo's are the same.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.utils.logger.setLevel("WARNING")
    if not dist.is_initialized():  # one process, that torchrun did not start
        os.environ.setdefault("LOCAL_RANK", "0")  # DeepSpeed asks for it
        dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo", store=dist.HashStore(), rank=0, world_size=1)
    if not deepspeed.comm.is_initialized():
        deepspeed.init_distributed(verbose=False)
    return deepspeed


def configuration(stage: int, max_grad_norm: float, bf16: bool, trained: int = BUCKET) -> dict[str, Any]:
    """DeepSpeed's own configuration. Sizes of batches are the trainer's: it says which backward pass is the last before a step."""
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": max_grad_norm,
        "zero_optimization": {"stage": stage, "reduce_bucket_size": min(BUCKET, trained)},
        # No module on the list: DeepSpeed would send the weights of those as bf16, and what is gathered would not be what is trained.
        "torch_autocast": {"enabled": bf16, "dtype": "bfloat16", "lower_precision_safe_modules": []},
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 10**9,
    }


class DeepSpeedEngine:
    """A module under ZeRO with its own AdamW."""

    def __init__(
        self, module: nn.Module, name: str, learning_rate: float, stage: int, weight_decay: float, max_grad_norm: float, bf16: bool = False
    ):
        self.name, self.learning_rate, self.stage, self.bf16 = name, learning_rate, stage, bf16
        self.library = library()
        self.plain = without_weights(module) if stage == 3 else None
        trained = [p for p in module.parameters() if p.requires_grad]
        self.engine, *_ = self.library.initialize(
            model=module,
            optimizer=torch.optim.AdamW(trained, lr=learning_rate, weight_decay=weight_decay),
            config=configuration(stage, max_grad_norm, bf16, sum(p.numel() for p in trained)),
        )
        self.module = self.engine.module

    def __call__(self, *inputs) -> Any:
        outputs = self.engine(*inputs)
        for output in outputs if isinstance(outputs, tuple) else (outputs,):
            # DeepSpeed averages over the processes; the losses are normalised by global counts and their gradients add up.
            if output.requires_grad:
                output.register_hook(lambda gradient: gradient * distributed.world())
        return outputs

    def backward(self, loss: Tensor, last: bool = True) -> None:
        """Add the gradient of `loss`. Raises TrainingDiverged before a non-finite loss touches a gradient."""
        check_finite(loss, self.name)
        self.engine.set_gradient_accumulation_boundary(last)
        self.engine.backward(loss, scale_wrt_gas=False)

    def step(self, factor: float = 1.0) -> float:
        """Clip, update with the peak rate times `factor`, clear. Returns the gradient norm before clipping.

        Raises TrainingDiverged when the norm is not finite; the weights are lost then, as DeepSpeed updates before it tells.
        """
        for group in self.engine.optimizer.param_groups:
            group["lr"] = self.learning_rate * factor
        norm = None
        if self.stage == 0:  # DeepSpeed clips there, and keeps the norm to itself
            norm = torch.nn.utils.get_total_norm([p.grad for p in self.module.parameters() if p.grad is not None])
        self.engine.step()
        norm = float(self.engine.get_global_grad_norm() if norm is None else norm)
        check_norm(norm, self.name)
        return norm

    @contextmanager
    def gathered(self, exact: bool = True) -> Iterator[nn.Module]:
        """Stage 3: a copy of the module whose weights are, inside the context, the gathered ones: it has none of DeepSpeed's hooks.

        Gathered one by one, so that what goes over the wire is there once more for one of them only.
        """
        if self.stage < 3:
            yield self.module
            return
        lower = set() if exact or not self.bf16 else product_weights(self.module)
        whole: dict[int, Tensor] = {}
        for p in self.module.parameters():
            with self.library.zero.GatheredParameters([p]):
                whole[id(p)] = p.data.to(torch.bfloat16 if id(p) in lower else p.dtype, copy=True)
        parameters = dict(self.module.named_parameters(remove_duplicate=False))
        self.plain.load_state_dict({name: whole[id(p)] for name, p in parameters.items()}, assign=True, strict=False)
        try:
            yield self.plain
        finally:
            empty = {name: torch.empty(p.ds_shape, device="meta") for name, p in parameters.items()}
            self.plain.load_state_dict(empty, assign=True, strict=False)

    def save(self, folder: Path) -> None:
        """Every process writes its shard of weights and optimizer state."""
        folder.mkdir(parents=True, exist_ok=True)
        self.engine.save_checkpoint(str(folder), tag=TAG)

    def load(self, folder: Path) -> None:
        path, _ = self.engine.load_checkpoint(str(folder), tag=TAG)
        if path is None:
            raise OSError(f"no shards of {self.name} for {distributed.world()} processes in {folder}")


def sharded(module: nn.Module, stage: int, bf16: bool = False) -> nn.Module:
    """A frozen module to call: at stage 3 each process keeps a shard of its weights and gathers a layer's when it needs them."""
    if stage < 3:
        return module
    engine, *_ = library().initialize(model=module, config=configuration(stage, 0.0, bf16))
    return engine


def product_weights(module: nn.Module) -> set[int]:
    """The ids of the weights that enter products only, which autocast casts before each: those of linear layers that embed nothing."""
    linear = {id(layer.weight) for layer in module.modules() if isinstance(layer, nn.Linear)}
    return linear - {id(layer.weight) for layer in module.modules() if isinstance(layer, nn.Embedding)}


def without_weights(module: nn.Module) -> nn.Module:
    """A copy with the same buffers, and parameters that have a shape and no data; shared parameters stay shared."""
    memo = {id(p): nn.Parameter(torch.empty_like(p, device="meta"), requires_grad=False) for p in module.parameters()}
    return copy.deepcopy(module, memo)
