"""Resumable state: complete or absent, on a disk and on an object store."""

from __future__ import annotations

import random

import fsspec
import numpy
import pytest
import torch
from fsspec.implementations.memory import MemoryFileSystem

from dfpo_core import checkpoint
from dfpo_core.engines.pytorch import TorchEngine
from dfpo_core.errors import UserError


@pytest.fixture(params=["path", "memory"])
def uri(request, tmp_path):
    return str(tmp_path / "state") if request.param == "path" else f"memory://{tmp_path.name}/state"


def test_nothing_saved_is_none(uri):
    assert checkpoint.load(uri) is None


def test_the_newest_state_comes_back_and_older_ones_are_dropped(uri):
    from fsspec.core import url_to_fs

    for step in (5, 10):
        checkpoint.save(uri, step, {"step": step, "weights": torch.full((3,), float(step))})
    state = checkpoint.load(uri)
    assert state["step"] == 10 and state["weights"].tolist() == [10.0] * 3
    fs, root = url_to_fs(uri)
    assert sorted(name.rsplit("/", 1)[-1] for name in fs.ls(root, detail=False)) == ["latest.json", "step-00000010"]


def test_engines_come_back_as_they_were(uri):
    def stepped(rate):
        engine = TorchEngine(torch.nn.Linear(2, 1), "layer", rate)
        engine.backward(engine(torch.ones(1, 2)).sum())
        engine.step()
        return engine

    saved = {"policy": stepped(0.1), "critic": stepped(0.2)}
    checkpoint.save(uri, 5, {"step": 5}, saved)
    loaded = {"policy": stepped(0.1), "critic": stepped(0.2)}
    checkpoint.load_engines(uri, loaded)
    for name, engine in saved.items():
        assert torch.equal(engine.module.weight, loaded[name].module.weight)
        moments = [[state["exp_avg"] for state in e.optimizer.state.values()] for e in (engine, loaded[name])]
        assert all(torch.equal(*pair) for pair in zip(*moments, strict=True))


def test_removing_leaves_nothing_to_resume_from(uri):
    checkpoint.save(uri, 5, {"step": 5})
    checkpoint.remove(uri)
    assert checkpoint.load(uri) is None


def test_a_half_written_newer_state_is_ignored(tmp_path):
    uri = str(tmp_path)
    checkpoint.save(uri, 5, {"step": 5})
    (tmp_path / "step-00000010").mkdir()
    (tmp_path / "step-00000010" / "state.pt").write_bytes(b"half")
    assert checkpoint.load(uri) == {"step": 5}


class FullDisk(MemoryFileSystem):
    """A file system on which every write meets a full disk."""

    protocol = "fulldisk"

    def open(self, path, mode="rb", **_):
        return open("/dev/full", mode) if "w" in mode else super().open(path, mode)


def test_a_full_disk_is_one_line_and_keeps_the_older_state(tmp_path):
    fsspec.register_implementation("fulldisk", FullDisk, clobber=True)
    checkpoint.save("memory://full/state", 5, {"step": 5})
    with pytest.raises(UserError, match="no space left"):
        checkpoint.save("fulldisk://full/state", 10, {"step": 10, "weights": torch.zeros(100_000)})
    assert checkpoint.load("memory://full/state") == {"step": 5}


def test_a_damaged_state_is_one_line(tmp_path):
    checkpoint.save(str(tmp_path), 5, {"step": 5})
    (tmp_path / "step-00000005" / "state.pt").write_bytes(b"damaged")
    with pytest.raises(UserError, match="train.checkpoint_uri: .* cannot be read"):
        checkpoint.load(str(tmp_path))


def test_every_generator_continues_where_it_was():
    random.seed(1), numpy.random.seed(2), torch.manual_seed(3)
    numpy.random.normal()  # leaves a cached Gaussian, part of the state
    state = checkpoint.rng_state()
    first = random.random(), numpy.random.normal(), torch.rand(1).item()
    checkpoint.set_rng_state(state)
    assert (random.random(), numpy.random.normal(), torch.rand(1).item()) == first
