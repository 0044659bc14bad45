"""Rules that both Dockerfiles keep. The images themselves are not built here."""

from __future__ import annotations

import re

import pytest
from conftest import ROOT

FILES = [ROOT / "images" / kind / "Dockerfile" for kind in ("cpu", "gpu")]
each_image = pytest.mark.parametrize("path", FILES, ids=lambda path: path.parent.name)


def instructions(path) -> list[tuple[str, str]]:
    """(instruction, arguments) in order, with continued lines joined and comments dropped."""
    text = "\n".join(line for line in path.read_text(encoding="utf-8").splitlines() if not line.lstrip().startswith("#"))
    lines = [line for line in re.sub(r"\\\n\s*", "", text).splitlines() if line.strip()]
    return [tuple(line.split(maxsplit=1)) for line in lines]


@each_image
def test_the_last_user_is_not_root(path):
    assert [arguments for name, arguments in instructions(path) if name == "USER"][-1] == "10001:10001"


@each_image
def test_everything_that_is_written_goes_under_tmp(path):
    environment = " ".join(arguments for name, arguments in instructions(path) if name == "ENV")
    for variable in ("HOME", "HF_HOME", "TORCH_EXTENSIONS_DIR", "TRITON_CACHE_DIR"):
        assert re.search(rf"(^|\s){variable}=/tmp(/\w+)?(\s|$)", environment), variable


@each_image
def test_installed_versions_are_pinned(path):
    for name, arguments in instructions(path):
        for command in arguments.split("&&") if name == "RUN" else []:
            if "pip install" in command:
                local = "/build/dfpo" in command
                words = [word for word in command.split("install", 1)[1].split() if not word.startswith(("-", "/"))]
                assert local or "-c /build/constraints.txt" in command or words, command
                assert all("==" in word for word in words), command


@each_image
def test_a_source_change_leaves_the_dependency_layer_alone(path):
    steps = instructions(path)
    dependencies = next(i for i, (name, text) in enumerate(steps) if name == "RUN" and "requirements.txt" in text)
    source = next(i for i, (name, text) in enumerate(steps) if name == "COPY" and text.startswith("dfpo_core"))
    stamped = next(i for i, (name, text) in enumerate(steps) if name == "ARG" and text.startswith("COMMIT"))
    assert dependencies < source < stamped


@each_image
def test_kfp_is_the_compilers_version_and_comes_without_dependencies(path):
    assert "pip install --no-deps kfp==2.17.0" in path.read_text(encoding="utf-8")
    assert '"kfp==2.17.0"' in (ROOT / "pyproject.toml").read_text(encoding="utf-8")


@each_image
def test_labels_carry_version_and_commit(path):
    labels = next(text for name, text in instructions(path) if name == "LABEL")
    assert 'image.version="${VERSION}"' in labels and 'image.revision="${COMMIT}"' in labels


def test_the_constraints_pin_every_requirement_exactly():
    pins = (ROOT / "images" / "cpu" / "constraints.txt").read_text(encoding="utf-8").splitlines()[1:]
    assert all(re.fullmatch(r"[A-Za-z0-9_.-]+==[A-Za-z0-9.]+", line) for line in pins)
    pinned = {line.partition("==")[0].lower().replace("_", "-") for line in pins}
    required = (ROOT / "images" / "cpu" / "requirements.txt").read_text(encoding="utf-8").splitlines()[1:]
    assert {name.lower().replace("_", "-") for name in required} <= pinned
