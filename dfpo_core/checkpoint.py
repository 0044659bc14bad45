"""Resumable training state at a path or fsspec URL. A checkpoint is visible only when it is complete.

Layout: `step-00000025/` with `state.pt` and a folder for each training engine, and `latest.json`, which names the newest complete
folder and is replaced last, in one move.
A process killed at any moment leaves the previous checkpoint in force.
"""

from __future__ import annotations

import io
import json
import os
import random
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem

from dfpo_core import distributed, storage
from dfpo_core.errors import UserError

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


def save(uri: str, step: int, state: dict[str, Any], engines: Mapping[str, Any] | None = None) -> None:
    """Write `state` and every engine as the newest checkpoint, then drop the older ones. Every process of a run takes part.

    Raises UserError when the disk is full.
    """
    import torch

    fs, root = url_to_fs(uri)
    folder = f"{root}/step-{step:08d}"
    try:
        fs.makedirs(folder, exist_ok=True)
        _save_engines(fs, folder, engines or {})
        if distributed.rank() == 0:
            with fs.open(f"{folder}/state.pt", "wb") as file:
                torch.save(state, file)
                _flush(file)
        distributed.barrier()  # the pointer is moved when all shards are there
        if distributed.rank() == 0:
            with fs.open(f"{root}/{POINTER}.partial", "wb") as file:
                file.write(json.dumps({"folder": Path(folder).name, "step": step}).encode())
                _flush(file)
            fs.mv(f"{root}/{POINTER}.partial", f"{root}/{POINTER}")
    except (OSError, RuntimeError) as error:
        # torch's zip writer wraps ENOSPC in an error without the error number.
        full = "No space left" in str(error) or getattr(error, "errno", None) in storage.NO_SPACE
        if fs.exists(folder):
            fs.rm(folder, recursive=True)
        if full:
            raise storage.disk_full_error(uri) from error
        raise
    if distributed.rank() == 0:
        for path in fs.glob(f"{root}/step-*"):
            if Path(path).name != Path(folder).name:
                fs.rm(path, recursive=True)


def _save_engines(fs, folder: str, engines: Mapping[str, Any]) -> None:
    """Each engine into a folder of its name; each process uploads what it wrote."""
    if isinstance(fs, LocalFileSystem):
        for name, engine in engines.items():
            engine.save(Path(folder, name))
        storage.synchronise(Path(folder))
        return
    with tempfile.TemporaryDirectory() as local:
        for name, engine in engines.items():
            engine.save(Path(local, name))
        if engines:
            fs.put(f"{local}/", f"{folder}/", recursive=True)


def _flush(file) -> None:
    file.flush()
    try:
        descriptor = file.fileno()
    except (AttributeError, io.UnsupportedOperation):
        return  # an object store: closing the file is what makes it durable
    os.fsync(descriptor)


def remove(uri: str) -> None:
    """Delete every checkpoint at `uri`."""
    fs, root = url_to_fs(uri)
    fs.rm(root, recursive=True)


def load(uri: str) -> dict[str, Any] | None:
    """The state of the newest complete checkpoint, or None where there is none. Raises UserError for one that cannot be read."""
    import torch

    fs, folder = _newest(uri)
    if folder is None:
        return None
    with _readable(uri), fs.open(f"{folder}/state.pt", "rb") as file:
        return torch.load(file, map_location="cpu", weights_only=True)


def load_engines(uri: str, engines: Mapping[str, Any]) -> None:
    """Bring every engine to the state of the newest complete checkpoint. Every process of a run takes part. Raises UserError."""
    fs, folder = _newest(uri)
    with _readable(uri):
        if isinstance(fs, LocalFileSystem):
            for name, engine in engines.items():
                engine.load(Path(folder, name))
            return
        # The processes of a node share one download; torchrun is the parent of all of them.
        local = Path(tempfile.gettempdir(), f"dfpo-checkpoint-{os.getppid() if distributed.world() > 1 else os.getpid()}")
        try:
            if distributed.local_rank() == 0:
                for name in engines:
                    fs.get(f"{folder}/{name}/", f"{local / name}/", recursive=True)
            distributed.barrier()
            for name, engine in engines.items():
                engine.load(local / name)
            distributed.barrier()
        finally:
            if distributed.local_rank() == 0:
                shutil.rmtree(local, ignore_errors=True)


def _newest(uri: str) -> tuple[Any, str | None]:
    """(file system, folder of the newest complete checkpoint or None)."""
    fs, root = url_to_fs(uri)
    if not fs.exists(f"{root}/{POINTER}"):
        return fs, None
    with _readable(uri):
        return fs, f"{root}/{json.loads(fs.cat_file(f'{root}/{POINTER}'))['folder']}"


@contextmanager
def _readable(uri: str) -> Iterator[None]:
    import pickle

    try:
        yield
    except (OSError, ValueError, KeyError, RuntimeError, pickle.UnpicklingError) as error:
        problem = f"the checkpoint at {uri} cannot be read ({type(error).__name__})"
        raise UserError("train.checkpoint_uri", problem, "remove it or name another place") from error
