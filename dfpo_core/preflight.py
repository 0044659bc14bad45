"""Preflight: every problem that can be found in seconds, before a pod or an hour is spent. Needs no torch."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from dfpo_core import domains, models, tracking
from dfpo_core.config import PipelineConfig, SourceConfig, parse_config
from dfpo_core.errors import UserError

SCRATCH_FREE_BYTES, MODEL_FREE_BYTES = 200 << 20, 2 << 30  # checkpoints of the tiny preset; of a model of 135 M parameters
DEFAULT_GENERATED_ROWS = 1000
PARAMETERS = {  # parameters of the pipeline that override one value of the configuration
    "model": "model",
    "algorithm": "train.algorithm",
    "noise_kind": "noise.kind",
    "noise_rate": "noise.rate",
    "seed": "seed",
    "steps": "train.steps",
    "learning_rate": "train.learning_rate",
}
REPORTED_PACKAGES = ("dfpo", "torch", "transformers", "deepspeed", "vllm", "mlflow", "kfp", "kubeflow", "reasoning-gym")
CACHE_VARIABLES = ("HF_HOME", "TORCH_EXTENSIONS_DIR", "TRITON_CACHE_DIR")


def run(
    config: str,
    pipeline_run_id: str,
    model: str = "",
    data: str = "",
    algorithm: str = "",
    noise_kind: str = "",
    noise_rate: float = -1.0,
    seed: int = -1,
    steps: int = -1,
    learning_rate: float = -1.0,
) -> tuple[str, str]:
    """Resolve the configuration, check it and open the MLflow parent run: (resolved configuration as JSON, parent run id).

    The parameters are the ones a person changes in the Kubeflow UI; an empty string and -1 mean "as in the configuration".
    Problems are printed one a line, and end the process with code 2.
    """
    with tracking.exit_codes():
        given = {
            "model": model,
            "algorithm": algorithm,
            "noise_kind": noise_kind,
            "noise_rate": noise_rate,
            "seed": seed,
            "steps": steps,
            "learning_rate": learning_rate,
        }
        resolved = with_overrides(config, {PARAMETERS[name]: value for name, value in given.items()}, data)
        problems = check(resolved)
        for problem in problems[:-1]:
            print(f"error: {problem}", file=sys.stderr)
        if problems:
            raise problems[-1]
        parent_run_id = tracking.create_parent(resolved, pipeline_run_id)
        with tracking.step_run(resolved, "preflight", parent_run_id) as step:
            step.log_params({"packages": installed_versions()})
            step.log_metrics({"preflight/free_bytes": shutil.disk_usage(_existing(resolved.home_path)).free})
    return resolved.to_json(), parent_run_id


def with_overrides(config: str, values: dict[str, Any], data: str = "") -> PipelineConfig:
    """The configuration with `section.key` values replaced, except those that are empty or -1, and `data` as its only
    training source. Raises UserError for anything that does not validate."""
    try:
        document = json.loads(config)
    except ValueError:
        raise UserError("config", "is not JSON", "pass the output of `dfpo compile`, or the text of a JSON file") from None
    if not isinstance(document, dict):
        raise UserError("config", "holds no mapping", "pass the whole configuration as one JSON object")
    for name, value in values.items():
        if value in ("", -1):
            continue
        section, _, key = name.rpartition(".")
        target = document.setdefault(section, {}) if section else document
        if isinstance(target, dict):  # else parse_config refuses the section
            target[key] = value
    if values.get("noise.kind") == "none" and values.get("noise.rate", -1) == -1:
        document["noise"] = {"kind": "none"}
    if data and isinstance(document.get("data"), dict):
        document["data"]["train"] = [source_of(data, document["data"].get("train"))]
    return parse_config(document, "the parameters")


def source_of(reference: str, replaced: Any = None) -> dict[str, Any]:
    """The source that a data reference names: `*.jsonl`, `*.parquet`, `gym:FAMILY[:SIZE]`, a named data set, else a hub data set id.

    Without a SIZE a generator makes as many rows as the sources it replaces. Raises UserError.
    """
    if reference.startswith("gym:"):
        family, _, size = reference.removeprefix("gym:").partition(":")
        if size and not size.isdigit():
            raise UserError("data", f"{size!r} is no number of rows", "write gym:FAMILY:SIZE, e.g. gym:basic_arithmetic:2000")
        sizes = [source.get("size", 0) for source in replaced or [] if isinstance(source, dict)]
        return {"kind": "reasoning_gym", "name": family, "size": int(size) if size else sum(sizes) or DEFAULT_GENERATED_ROWS}
    if reference in domains.data_sets():
        return {"kind": "dataset", "name": reference}
    suffix = reference.rpartition(".")[2].lower()
    return {"kind": suffix if suffix in ("jsonl", "parquet") else "hub", "name": reference}


def check(config: PipelineConfig) -> list[UserError]:
    """Every problem found, in the order of the configuration; empty when there is none."""
    return [problem for part in (_home, _model, _data, _noise, _algorithm, _reward, _tracking, _cluster) for problem in part(config)]


def _raised(function: Callable, *arguments) -> Iterator[UserError]:
    try:
        function(*arguments)
    except UserError as error:
        yield error


def _home(config: PipelineConfig) -> Iterator[UserError]:
    folder = _existing(config.home_path)
    if not folder.is_dir() or not os.access(folder, os.W_OK | os.X_OK):
        yield UserError("home", f"cannot write {config.home_path}", "choose a folder you can write")
        return
    needed = SCRATCH_FREE_BYTES if config.model.startswith("scratch:") else MODEL_FREE_BYTES
    free = shutil.disk_usage(folder).free
    if free < needed:
        problem = f"{free >> 20} MiB free on the disk of {config.home_path}, {needed >> 20} MiB needed"
        yield UserError("home", problem, "free some, or set home to another disk")


def _existing(path: Path) -> Path:
    """The closest ancestor that exists, or the path itself."""
    return next(folder for folder in (path, *path.parents) if folder.exists())


def _model(config: PipelineConfig) -> Iterator[UserError]:
    yield from _raised(models.check_reference, config.model)


def _data(config: PipelineConfig) -> Iterator[UserError]:
    folder = config.data.folder
    if folder and "://" not in folder and not Path(folder).expanduser().is_dir():
        yield UserError("data.folder", f"there is no folder {folder}", "give an existing folder, or leave it empty")
    for split in ("train", "id_test", "ood_test"):
        for index, source in enumerate(getattr(config.data, split)):
            yield from _source(source, f"data.{split}.{index}")


def _source(source: SourceConfig, field: str) -> Iterator[UserError]:
    if source.kind in ("jsonl", "parquet") and "://" not in source.name:
        path = Path(source.name).expanduser()
        if not path.is_file():
            yield UserError(f"{field}.name", f"no file {source.name}", "give the path of an existing file")
        elif not os.access(path, os.R_OK):
            yield UserError(f"{field}.name", f"cannot read {source.name}", "change its permissions")
        elif path.stat().st_size == 0:
            yield UserError(f"{field}.name", f"{source.name} is empty", "give a file with rows")
    elif source.kind in ("dataset", "hub") or (source.kind == "reasoning_gym" and find_spec("reasoning_gym")):
        from dfpo_core.data.sources import check_source

        yield from _raised(check_source, source, field)


def _noise(config: PipelineConfig) -> Iterator[UserError]:
    if config.noise.kind == "none" and config.noise.rate > 0:
        yield UserError("noise.kind", f"is none, but noise.rate is {config.noise.rate:g}", "choose a kind, or set the rate to 0")
    elif config.noise.kind != "none" and any(source.reward == "dialogue" for source in config.data.train):
        from dfpo_core.noise import no_label_noise

        yield no_label_noise(config.noise.kind)
    if config.noise.voter.model:
        for problem in _raised(models.check_reference, config.noise.voter.model):
            yield UserError("noise.voter.model", problem.problem, problem.fix)


def _algorithm(config: PipelineConfig) -> Iterator[UserError]:
    from dfpo_core import algorithms

    unknown = list(_raised(algorithms.check_name, config.train.algorithm))
    yield from unknown
    if not unknown and find_spec("torch"):  # the options' own classes need it
        problems = list(_raised(algorithms.resolve, config.train))
        yield from problems
        if not problems:
            from dfpo_core import launch

            yield from _raised(launch.check_shares, config.train, config.processes)


def _reward(config: PipelineConfig) -> Iterator[UserError]:
    from dfpo_core import rewards

    yield from _raised(rewards.parse, config.train.reward)


def _tracking(config: PipelineConfig) -> Iterator[UserError]:
    yield from _raised(tracking.check_reachable, tracking.tracking_uri(config))


def check_nodes(config: PipelineConfig) -> None:
    """Raise UserError for several training nodes that would not see the same checkpoints and the same tracking store."""
    cluster, uri = config.cluster, config.train.checkpoint_uri
    if cluster.nodes == 1:
        return
    claimed = cluster.pvc and uri.startswith(cluster.pvc_mount_path.rstrip("/") + "/")
    if not claimed and ("://" not in uri or uri.startswith("file:")):
        problem = f"{uri or 'the default, a folder under home,'} is not seen by all of the {cluster.nodes} nodes"
        raise UserError("train.checkpoint_uri", problem, "name an object store, or a folder under cluster.pvc_mount_path")
    if not config.tracking.uri:
        problem = f"the default, a store under home, is not seen by all of the {cluster.nodes} nodes"
        raise UserError("tracking.uri", problem, "name a tracking server")


def _cluster(config: PipelineConfig) -> Iterator[UserError]:
    if config.cluster.gpu_count and not config.cluster.gpu_type:
        yield UserError("cluster.gpu_type", f"{config.cluster.gpu_count} GPUs asked for without a type", "set it, e.g. nvidia.com/gpu")


def installed_versions() -> dict[str, str]:
    """Versions of Python and of the packages that decide results; a package that is absent is left out."""
    versions = {"python": sys.version.split()[0]}
    for package in REPORTED_PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:  # an optional extra
            continue
    return versions


def accelerators() -> list[str]:
    """Name and memory of each GPU that torch sees; empty without torch."""
    if not find_spec("torch"):
        return []
    import torch

    found = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    return [f"{device.name} ({device.total_memory / 2**30:.0f} GiB)" for device in found]


def check_cache_folders() -> list[UserError]:
    """The folders that the libraries are told to write to, and may not: a pod of a random uid finds out hours later otherwise."""
    folders = {name: Path(os.environ[name]).expanduser() for name in CACHE_VARIABLES if os.environ.get(name)}
    shut = {name: path for name, path in folders.items() if not (_existing(path).is_dir() and os.access(_existing(path), os.W_OK))}
    return [UserError(name, f"{folder} cannot be written to", "name a folder under /tmp") for name, folder in shut.items()]
