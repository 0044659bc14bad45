"""Data parallelism: one process a GPU, each with an equal share of a step's prompts. In a single process everything here is the identity.

Processes are started by torchrun (dfpo_core.launch) and joined by `join`. They hold the same random state, draw the same numbers and take
the same decisions; only what they sample and the gradients differ, and gradients are summed.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def join() -> None:
    """Meet the other processes of the environment that torchrun made (RANK, WORLD_SIZE, MASTER_ADDR, ..): NCCL on GPUs, gloo without."""
    if torch.cuda.is_available():
        torch.cuda.set_device(local_rank())
    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")


def leave() -> None:
    dist.destroy_process_group()


def world() -> int:
    """Number of processes."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """This process's number; 0 writes what is written once."""
    return dist.get_rank() if dist.is_initialized() else 0


def local_rank() -> int:
    """This process's number on its node."""
    return int(os.environ.get("LOCAL_RANK", 0))


def device() -> torch.device:
    """The GPU of this process, or the CPU."""
    return torch.device("cuda", local_rank()) if torch.cuda.is_available() else torch.device("cpu")


def barrier() -> None:
    if world() > 1:
        dist.barrier()


def add(tensor: Tensor) -> Tensor:
    """Sum over the processes, in place."""
    if world() > 1:
        dist.all_reduce(tensor)
    return tensor


def total(value: float) -> float:
    """Sum of a number over the processes."""
    return value if world() == 1 else add(torch.tensor(value, dtype=torch.float64, device=device())).item()


def totals(values: dict[str, float]) -> dict[str, float]:
    """Sums of numbers over the processes, which must have the same keys."""
    if world() == 1 or not values:
        return values
    names = sorted(values)
    sums = add(torch.tensor([values[name] for name in names], dtype=torch.float64, device=device()))
    return dict(zip(names, sums.tolist(), strict=True))


def gather_rows(tensor: Tensor, left: bool = False) -> Tensor:
    """Every process's rows, in the order of the processes: (B, T, ..) -> (world * B, longest T, ..), zeros to the right or `left`."""
    if world() == 1:
        return tensor
    if tensor.dim() > 1:
        longest = torch.tensor(tensor.shape[1], device=device())
        dist.all_reduce(longest, dist.ReduceOp.MAX)
        missing = int(longest) - tensor.shape[1]
        sides = (missing, 0) if left else (0, missing)
        tensor = torch.nn.functional.pad(tensor, (0, 0) * (tensor.dim() - 2) + sides)
    tensor = tensor.contiguous()
    parts = [torch.empty_like(tensor) for _ in range(world())]
    dist.all_gather(parts, tensor)
    return torch.cat(parts)


def own_rows(tensor: Tensor, like: Tensor) -> Tensor:
    """The part of a tensor of `gather_rows` that belongs to this process, as wide as `like`, its own (B, T, ..) tensor."""
    start = rank() * like.shape[0]
    rows = tensor[start : start + like.shape[0]]
    return rows[:, : like.shape[1]] if tensor.dim() > 1 else rows


def gather_list(values: list[Any]) -> list[Any]:
    """Every process's list, one after the other."""
    if world() == 1:
        return values
    parts: list[Any] = [None] * world()
    dist.all_gather_object(parts, values)
    return [value for part in parts for value in part]


def share(count: int) -> slice:
    """This process's part of `count` things, which the number of processes divides."""
    each = count // world()
    return slice(rank() * each, (rank() + 1) * each)


@contextmanager
def together(error: type[Exception]) -> Iterator[None]:
    """Raise `error` in every process if one of them raises it inside, so that none waits for another that has stopped."""
    failure = None
    try:
        yield
    except error as raised:
        failure = raised
    if total(float(failure is not None)):
        raise failure or error("it failed in another process")
