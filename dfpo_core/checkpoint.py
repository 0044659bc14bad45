"""Resumable training state at a path or fsspec URL. A checkpoint is visible only when it is complete.

Layout: `step-00000025/state.pt` and `latest.json`, which names the newest complete folder and is replaced last, in one move.
A process killed at any moment leaves the previous checkpoint in force.
"""

from __future__ import annotations

import io
import json
import os
import random
from pathlib import Path
from typing import Any

from dfpo_core.errors import UserError
from dfpo_core.storage import disk_full_error

POINTER = "latest.json"


def rng_state() -> dict[str, Any]:
    """The state of every random number generator a training step could touch."""
    import numpy
    import torch

    kind, keys, position, has_gauss, gauss = numpy.random.get_state()
    state = {
        "python": random.getstate(),
        "numpy": (kind, keys.tolist(), position, has_gauss, gauss),
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state_all()
    return state


def set_rng_state(state: dict[str, Any]) -> None:
    import numpy
    import torch

    random.setstate(state["python"])
    kind, keys, position, has_gauss, gauss = state["numpy"]
    numpy.random.set_state((kind, numpy.array(keys, dtype=numpy.uint32), position, has_gauss, gauss))
    torch.set_rng_state(state["torch"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(state["cuda"])


def save(uri: str, step: int, state: dict[str, Any]) -> None:
    """Write `state` as the newest checkpoint, then drop the older ones. Raises UserError when the disk is full."""
    import torch
    from fsspec.core import url_to_fs

    fs, root = url_to_fs(uri)
    folder = f"step-{step:08d}"
    try:
        fs.makedirs(f"{root}/{folder}", exist_ok=True)
        with fs.open(f"{root}/{folder}/state.pt", "wb") as file:
            torch.save(state, file)
            _flush(file)
        with fs.open(f"{root}/{POINTER}.partial", "wb") as file:
            file.write(json.dumps({"folder": folder, "step": step}).encode())
            _flush(file)
        fs.mv(f"{root}/{POINTER}.partial", f"{root}/{POINTER}")
    except OSError as error:
        if fs.exists(f"{root}/{folder}"):
            fs.rm(f"{root}/{folder}", recursive=True)
        # torch's zip writer wraps ENOSPC in an OSError without the error number.
        if "No space left" in str(error):
            raise disk_full_error(uri) from error
        raise
    for path in fs.glob(f"{root}/step-*"):
        if Path(path).name != folder:
            fs.rm(path, recursive=True)


def _flush(file) -> None:
    file.flush()
    try:
        descriptor = file.fileno()
    except (AttributeError, io.UnsupportedOperation):
        return  # an object store: closing the file is what makes it durable
    os.fsync(descriptor)


def remove(uri: str) -> None:
    """Delete every checkpoint at `uri`."""
    from fsspec.core import url_to_fs

    fs, root = url_to_fs(uri)
    fs.rm(root, recursive=True)


def load(uri: str) -> dict[str, Any] | None:
    """The newest complete checkpoint, or None where there is none. Raises UserError for one that cannot be read."""
    import pickle

    import torch
    from fsspec.core import url_to_fs

    fs, root = url_to_fs(uri)
    if not fs.exists(f"{root}/{POINTER}"):
        return None
    try:
        folder = json.loads(fs.cat_file(f"{root}/{POINTER}"))["folder"]
        with fs.open(f"{root}/{folder}/state.pt", "rb") as file:
            return torch.load(file, map_location="cpu", weights_only=True)
    except (OSError, ValueError, KeyError, RuntimeError, pickle.UnpicklingError) as error:
        problem = f"the checkpoint at {uri} cannot be read ({type(error).__name__})"
        raise UserError("train.checkpoint_uri", problem, "remove it or name another place") from error
