"""MLflow: one parent run a pipeline run, one child run a step, and the exit codes that every step shares.

Everything goes through one `MlflowClient`, never through MLflow's global active run: steps can share a process, nothing is
printed behind our back, and a run that Kubeflow's own MLflow plugin injected (MLFLOW_RUN_ID) is resumed like any other.
`mlflow` itself takes seconds to import, so it is imported when it is first needed.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import subprocess
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from math import isfinite
from pathlib import Path
from typing import Any

from dfpo_core import storage
from dfpo_core.config import PipelineConfig, parse_config
from dfpo_core.errors import UserError

REACHABLE_SECONDS = 5
PARENT_STEP = "pipeline"
SECTIONS = {  # the parts of the configuration that a step reads, logged as its parameters
    "preflight": ("name", "home", "tracking"),
    "prepare_data": ("data", "prompt"),
    "noise_data": ("noise",),
    "sft": ("sft", "prompt", "threads", "precision"),
    "train": ("train", "prompt", "threads", "precision"),
    "evaluate": ("evaluate", "prompt", "threads", "precision"),
    "promote": ("promote",),
}
_PARAM_LENGTH, _TAG_LENGTH, _PARAMS_PER_BATCH, _METRICS_PER_BATCH = 6000, 8000, 100, 1000  # limits of MLflow
_STATUS = {"SUCCEEDED": "FINISHED", "FAILED": "FAILED", "CANCELLED": "KILLED"}  # Kubeflow -> MLflow
_QUIET = {  # read by MLflow when it is imported; a value that the user already set stays
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_LOGGING_LEVEL": "WARNING",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "GIT_PYTHON_REFRESH": "quiet",
}


# ---------------------------------------------------------------------------------------------------------- the store


def tracking_uri(config: PipelineConfig) -> str:
    """The store in use: the configured one; else, under Kubeflow's MLflow plugin, the server of the injected run; else SQLite."""
    injected = os.environ.get("MLFLOW_TRACKING_URI", "") if os.environ.get("MLFLOW_RUN_ID") else ""
    return config.tracking.uri or injected or config.tracking_uri


def connect(uri: str):
    """An `MlflowClient` for tracking and registry. Raises UserError when the server does not answer within seconds."""
    check_reachable(uri)
    for name, value in _QUIET.items():
        os.environ.setdefault(name, value)
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException

    try:
        return MlflowClient(tracking_uri=uri, registry_uri=uri)
    except (MlflowException, ImportError) as error:
        raise _store_error(uri, error) from None


def check_reachable(uri: str) -> None:
    """Ask an http(s) tracking server for its health once: MLflow's own retries would take minutes to give up.

    Raises UserError naming `tracking.uri`.
    """
    if not uri.startswith(("http://", "https://")):
        return
    try:
        urllib.request.urlopen(uri.rstrip("/") + "/health", timeout=REACHABLE_SECONDS).close()
    except urllib.error.HTTPError as error:
        if error.code >= 500:
            fix = "check the server, or a proxy before it"
            raise UserError("tracking.uri", f"{_without_password(uri)} answers with HTTP {error.code}", fix) from None
    except (OSError, ValueError) as error:  # URLError, timeouts and refused connections; a malformed URL
        reason = getattr(error, "reason", error)
        fix = "start it, correct the URI, or leave it empty for the local store"
        raise UserError("tracking.uri", f"no MLflow server answers at {_without_password(uri)} ({reason})", fix) from None


def ensure_store(config: PipelineConfig) -> str:
    """Create the SQLite store and the experiment if absent, and return the experiment's id. Safe to race: a file lock
    guards a database, and a server settles it itself. Raises UserError."""
    uri = tracking_uri(config)
    if not uri.startswith("sqlite:"):
        return _experiment_id(connect(uri), uri, config)
    database = Path(uri.removeprefix("sqlite:///")).absolute()
    try:
        database.parent.mkdir(parents=True, exist_ok=True)
        with _locked(database.with_name(database.name + ".lock")):
            return _experiment_id(connect(uri), uri, config)
    except OSError as error:
        field = "tracking.uri" if config.tracking.uri else "home"
        raise UserError(field, f"cannot write {database.parent} ({error.strerror})", "choose a folder you can write") from None


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    import fcntl

    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _experiment_id(client, uri: str, config: PipelineConfig) -> str:
    from mlflow.exceptions import MlflowException

    name = config.tracking.experiment
    remote = uri.startswith(("http", "databricks"))  # a server places artifacts; a bare database would use ./mlruns
    location = None if remote else (config.home_path / "mlartifacts").as_uri()
    try:
        experiment = client.get_experiment_by_name(name)
        if experiment is None:
            try:
                return client.create_experiment(name, artifact_location=location)
            except MlflowException as error:
                if error.error_code != "RESOURCE_ALREADY_EXISTS":  # another process was first
                    raise
                experiment = client.get_experiment_by_name(name)
    except MlflowException as error:
        raise _store_error(uri, error) from None
    if experiment.lifecycle_stage == "deleted":
        raise UserError("tracking.experiment", f"{name!r} was deleted", "restore it in MLflow, or choose another name")
    return experiment.experiment_id


def _store_error(uri: str, error: Exception) -> UserError:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return UserError("tracking.uri", f"{_without_password(uri)} cannot be used: {lines[0][:300]}", "check the URI and the credentials")


def _without_password(uri: str) -> str:
    return re.sub(r"//[^/@]*@", "//", uri)


# ---------------------------------------------------------------------------------------------------------- one run


@dataclass(frozen=True)
class StepRun:
    """An open MLflow run. Every method writes at once, and raises MlflowException when the store refuses."""

    client: Any
    run_id: str

    def log_params(self, params: dict[str, Any]) -> None:
        """Log a nested dict as flat `a.b` parameters. What is longer than MLflow allows is cut, and ends by saying so."""
        from mlflow.entities import Param

        entries = [Param(_key(name), _cut(value, _PARAM_LENGTH)) for name, value in flatten(params).items()]
        for start in range(0, len(entries), _PARAMS_PER_BATCH):
            self.client.log_batch(self.run_id, params=entries[start : start + _PARAMS_PER_BATCH])

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        """Log the finite metrics; the names of the others are kept in the tag `dfpo.nonfinite_metrics` (Kubeflow refuses
        them, and a chart cannot show them)."""
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        finite = {name: float(value) for name, value in metrics.items() if isfinite(value)}
        entries = [Metric(_key(name), value, now, step or 0) for name, value in finite.items()]
        for start in range(0, len(entries), _METRICS_PER_BATCH):
            self.client.log_batch(self.run_id, metrics=entries[start : start + _METRICS_PER_BATCH])
        if missing := sorted(set(metrics) - set(finite)):
            self.set_tags({"dfpo.nonfinite_metrics": ", ".join(missing)})

    def log_table(self, name: str, rows: list[dict[str, Any]]) -> None:
        """Add rows to the table artifact `name` (`*.json`), which the MLflow UI shows as a table."""
        columns = list(dict.fromkeys(key for row in rows for key in row))
        if rows:
            self.client.log_table(self.run_id, {column: [row.get(column) for row in rows] for column in columns}, name)

    def log_figure(self, name: str, figure) -> None:
        """Log a matplotlib figure as the artifact `name` (`*.png`)."""
        self.client.log_figure(self.run_id, figure, name)

    def log_artifact(self, file: str | Path, artifact_path: str | None = None) -> None:
        self.client.log_artifact(self.run_id, str(file), artifact_path)

    def log_artifacts(self, local_dir: str | Path, artifact_path: str | None = None) -> None:
        self.client.log_artifacts(self.run_id, str(local_dir), artifact_path)

    def log_dataset(self, path: str | Path, name: str, context: str, tags: dict[str, str] | None = None) -> None:
        """Log a Parquet file as a dataset input: its digest, columns and row count, not its content."""
        from mlflow.entities import DatasetInput, InputTag

        labels = {"mlflow.data.context": context, **(tags or {})}
        entry = DatasetInput(_dataset(Path(path), name), [InputTag(key, str(value)[:500]) for key, value in labels.items()])
        self.client.log_inputs(self.run_id, [entry])

    def log_source(self, origin: str, sha256: str, rows: int, context: str, tags: dict[str, str]) -> None:
        """Log what rows were read from (a file, URL, hub id or generator) as a dataset input."""
        from mlflow.entities import Dataset, DatasetInput, InputTag

        source, profile = json.dumps({"uri": origin}), json.dumps({"num_rows": rows})
        entry = Dataset(origin[-500:], sha256[:8], source_type="local", source=source, profile=profile)
        labels = {"mlflow.data.context": context, **tags}
        self.client.log_inputs(self.run_id, [DatasetInput(entry, [InputTag(key, str(value)[:500]) for key, value in labels.items()])])

    def set_tags(self, tags: dict[str, Any]) -> None:
        from mlflow.entities import RunTag

        entries = [RunTag(name, _cut(value, _TAG_LENGTH)) for name, value in tags.items()]
        for start in range(0, len(entries), _PARAMS_PER_BATCH):
            self.client.log_batch(self.run_id, tags=entries[start : start + _PARAMS_PER_BATCH])


def _dataset(path: Path, name: str):
    import pyarrow.parquet as parquet
    from mlflow.entities import Dataset

    digest = hashlib.sha256()
    with path.open("rb") as file:
        for block in iter(lambda: file.read(1 << 22), b""):
            digest.update(block)
    described = parquet.read_metadata(path)
    columns = [{"type": str(field.type), "name": field.name, "required": not field.nullable} for field in parquet.read_schema(path)]
    return Dataset(
        name,
        digest.hexdigest()[:8],
        source_type="local",
        source=json.dumps({"uri": str(path)}),
        schema=json.dumps({"mlflow_colspec": columns}),
        profile=json.dumps({"num_rows": described.num_rows, "num_elements": described.num_rows * described.num_columns}),
    )


def flatten(values: Any, prefix: str = "") -> dict[str, Any]:
    """`{"a": {"b": [1, {"c": 2}]}}` -> `{"a.b.0": 1, "a.b.1.c": 2}`; lists of plain values stay whole, as JSON."""
    if isinstance(values, list) and not any(isinstance(item, (dict, list)) for item in values):
        return {prefix: json.dumps(values)}
    items = values.items() if isinstance(values, dict) else enumerate(values) if isinstance(values, list) else None
    if items is None:
        return {prefix: values}
    flat: dict[str, Any] = {}
    for key, value in items:
        flat |= flatten(value, f"{prefix}.{key}" if prefix else str(key))
    return flat


def _key(name: str) -> str:
    return re.sub(r"[^\w\-./ :]", "_", name)[:250]


def _cut(value: Any, length: int) -> str:
    text, note = str(value), " … (cut; config.yaml of the parent run has it whole)"
    return text if len(text) <= length else text[: length - len(note)] + note


# ---------------------------------------------------------------------------------------------------------- runs of a pipeline


def create_parent(config: PipelineConfig, pipeline_run_id: str) -> str:
    """The id of the parent run of a pipeline run, created on the first call: a retried preflight finds it again.

    Under Kubeflow's MLflow plugin the parent that the plugin made is used. Raises UserError when the id belongs to a run
    with another configuration.
    """
    experiment = ensure_store(config)
    client = connect(tracking_uri(config))
    run_id = find_parent(client, experiment, pipeline_run_id) or _injected_parent(client)
    if run_id is None:
        run_id = client.create_run(experiment, run_name=config.name, tags=_source_tags()).info.run_id
    run, tags = StepRun(client, run_id), client.get_run(run_id).data.tags
    if tags.get("dfpo.config_sha256", config.sha256) != config.sha256:
        raise UserError("pipeline_run_id", f"{pipeline_run_id!r} belongs to a run with another configuration", "use a new id")
    client.update_run(run_id, status="RUNNING")
    run.set_tags(_tags(config, PARENT_STEP, pipeline_run_id))
    run.log_params(config.model_dump(mode="json"))
    client.log_text(run_id, _as_yaml(config), "config.yaml")
    return run_id


def find_parent(client, experiment: str, pipeline_run_id: str) -> str | None:
    """The parent run tagged with a pipeline run id, or None. Under Kubeflow's MLflow plugin its experiment is searched too."""
    if "'" in pipeline_run_id or not pipeline_run_id:
        raise UserError("pipeline_run_id", f"{pipeline_run_id!r} is no id", "use letters, digits and dashes")
    query = f"tags.`dfpo.pipeline_run_id` = '{pipeline_run_id}' and tags.`dfpo.step` = '{PARENT_STEP}'"
    injected = _injected_run(client)
    found = client.search_runs([experiment, *([injected.info.experiment_id] if injected else [])], query, max_results=1)
    return found[0].info.run_id if found else None


def _injected_parent(client) -> str | None:
    injected = _injected_run(client)
    return injected.data.tags.get("mlflow.parentRunId") if injected else None


def _injected_run(client):
    """The run that Kubeflow's MLflow plugin made for this task, or None: without the plugin, or on another server."""
    from mlflow.exceptions import MlflowException

    run_id = os.environ.get("MLFLOW_RUN_ID")
    try:
        return client.get_run(run_id) if run_id else None
    except MlflowException as error:
        if error.error_code in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
            return None
        raise


def close_parent(config: str, pipeline_run_id: str, status: str, error: str = "") -> None:
    """End the parent run: SUCCEEDED, FAILED or CANCELLED, as Kubeflow's exit handler reports it.

    Steps that were killed without a chance to say so (their run is still open) are closed too. `config` is the JSON string
    that the pipeline was given; where preflight refused it there is no run to close.
    """
    with exit_codes():
        if status not in _STATUS:
            raise UserError("status", f"unknown value {status!r}", f"choose one of: {', '.join(_STATUS)}")
        resolved = parse_config(json.loads(config))
        client = connect(tracking_uri(resolved))
        run_id = find_parent(client, ensure_store(resolved), pipeline_run_id)
        if run_id is None:
            print(f"no MLflow run to close: preflight made none for {pipeline_run_id}", file=sys.stderr)
            return
        parent = client.get_run(run_id)
        for child in children(client, parent.info.experiment_id, run_id):
            if child.info.status == "RUNNING" and child.info.run_id != os.environ.get("MLFLOW_RUN_ID"):
                client.set_terminated(child.info.run_id, "KILLED")
        if error and not {"dfpo.error", "dfpo.failure"} & parent.data.tags.keys():  # the step's own words say more
            StepRun(client, run_id).set_tags({"dfpo.failure": error})
        client.set_terminated(run_id, _STATUS[status])


def children(client, experiment: str, parent_run_id: str) -> list:
    """The step runs of a parent run, oldest first."""
    query = f"tags.`mlflow.parentRunId` = '{parent_run_id}'"
    return list(client.search_runs([experiment], query, max_results=1000, order_by=["attributes.start_time ASC"]))


@contextmanager
def step_run(config: PipelineConfig, step: str, parent_run_id: str) -> Iterator[StepRun]:
    """The MLflow run of one step, as a context.

    On the way out the run becomes FINISHED; KILLED after Ctrl-C (exit code 130); FAILED otherwise. A UserError is printed as
    one line and ends the process with code 2; any other exception is re-raised. The reason is kept as a tag, `dfpo.error` or
    `dfpo.failure`, on the step's run and its parent. An empty `parent_run_id` makes a run of its own.
    """
    with exit_codes():
        ensure_store(config)
        run = _open(config, step, parent_run_id)
        try:
            yield run
        except BaseException as raised:
            error = disk_full(raised, config) or raised
            _record_failure(run, step, parent_run_id, error)
            raise error from raised.__cause__
        _clear_failure(run.client, step, parent_run_id)
        run.client.set_terminated(run.run_id, "FINISHED")


def attach(config: PipelineConfig, run_id: str) -> StepRun:
    """A step's run that another process has opened, and will close."""
    return StepRun(connect(tracking_uri(config)), run_id)


class Unlogged:
    """The run of a process that logs nothing, because another one does: takes every call."""

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *_, **__: None


def _open(config: PipelineConfig, step: str, parent_run_id: str) -> StepRun:
    client = connect(tracking_uri(config))
    parent = client.get_run(parent_run_id) if parent_run_id else None
    tags = _tags(config, step, parent.data.tags.get("dfpo.pipeline_run_id", "") if parent else "")
    injected = _injected_run(client)
    if injected:
        run = StepRun(client, injected.info.run_id)
        if parent and "mlflow.parentRunId" not in injected.data.tags:
            tags["mlflow.parentRunId"] = parent_run_id
        client.update_run(run.run_id, status="RUNNING")
        run.set_tags(tags)
    else:
        if parent:
            tags["mlflow.parentRunId"] = parent_run_id
        experiment = parent.info.experiment_id if parent else ensure_store(config)
        run = StepRun(client, client.create_run(experiment, run_name=step, tags=_source_tags() | tags).info.run_id)
    values = config.model_dump(mode="json")
    run.log_params({name: values[name] for name in ("model", "seed", *SECTIONS.get(step, ()))})
    return run


def _record_failure(run: StepRun, step: str, parent_run_id: str, error: BaseException) -> None:
    from mlflow.exceptions import MlflowException

    tags = {"dfpo.failed_step": step}
    if isinstance(error, UserError):
        tags["dfpo.error"] = str(error)
    elif not isinstance(error, KeyboardInterrupt):
        tags["dfpo.failure"] = f"{type(error).__name__}: {error}"
    try:
        for run_id in filter(None, (run.run_id, parent_run_id)):
            StepRun(run.client, run_id).set_tags(tags)
        run.client.set_terminated(run.run_id, "KILLED" if isinstance(error, KeyboardInterrupt) else "FAILED")
    except MlflowException as problem:  # e.g. the disk of the store is full: the step's own error matters more
        print(f"warning: MLflow could not record the failure of {step} ({str(problem).splitlines()[0][:200]})", file=sys.stderr)


def _clear_failure(client, step: str, parent_run_id: str) -> None:
    """A retry succeeded: the parent no longer carries the failure of the earlier attempt."""
    tags = client.get_run(parent_run_id).data.tags if parent_run_id else {}
    if tags.get("dfpo.failed_step") == step:
        for name in {"dfpo.failed_step", "dfpo.error", "dfpo.failure"} & tags.keys():
            client.delete_tag(parent_run_id, name)


@contextmanager
def exit_codes() -> Iterator[None]:
    """Turn a user's mistake into one line on stderr and exit code 2, and Ctrl-C into code 130."""
    try:
        yield
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        raise SystemExit(130) from None


def disk_full(error: BaseException | None, config: PipelineConfig) -> UserError | None:
    """The UserError for a full disk, where that is the cause of `error` or of anything it was raised from; else None."""
    while error is not None:
        full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
        if full or "database or disk is full" in str(error):
            where = getattr(error, "filename", None) or config.home_path
            return storage.disk_full_error(where)
        error = error.__cause__ or error.__context__
    return None


# ---------------------------------------------------------------------------------------------------------- tags


def _tags(config: PipelineConfig, step: str, pipeline_run_id: str) -> dict[str, str]:
    tags = {
        "dfpo.step": step,
        "dfpo.algorithm": config.train.algorithm,
        "dfpo.noise": noise_tag(config),
        "dfpo.seed": str(config.seed),
        "dfpo.config_sha256": config.sha256,
        "dfpo.pipeline_run_id": pipeline_run_id,
        "dfpo.git_commit": git_commit(),
    }
    return {name: value for name, value in tags.items() if value}


def noise_tag(config: PipelineConfig) -> str:
    """`plausible@0.3`, `none`, or with more kinds `plausible@0.3+missing@0.4+flip@0.1`."""
    labels, judge = config.noise, config.train.reward_noise
    kinds = {
        labels.kind: labels.rate,
        "missing": labels.missing_rate,
        "typo": labels.typo_rate,
        "word_drop": labels.word_drop_rate,
        "flip": judge.flip_rate,
        "false_positive": judge.false_positive_rate,
        "false_negative": judge.false_negative_rate,
        "reward_model": 1 - judge.model_accuracy,
        "gaussian": judge.gaussian_std,
    }
    found = [f"{kind}@{rate:g}" for kind, rate in kinds.items() if rate > 1e-12 and kind != "none"]
    if labels.kind in ("class_conditional", "majority_vote"):  # these have no rate
        found.insert(0, labels.kind)
    return "+".join(found) or "none"


@cache
def git_commit() -> str:
    """The commit of the checkout that this file is tracked in; empty for an installed copy."""
    here = Path(__file__).parent
    for command in (["ls-files", "--error-unmatch", "tracking.py"], ["rev-parse", "HEAD"]):
        try:
            done = subprocess.run(["git", "-C", str(here), *command], capture_output=True, text=True, timeout=10)
        except (OSError, subprocess.TimeoutExpired):
            return ""
        if done.returncode:
            return ""
    return done.stdout.strip()


def _source_tags() -> dict[str, str]:
    """What the MLflow UI shows as user and source."""
    import getpass

    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # a random uid without a passwd entry, as clusters use
        user = str(os.getuid())
    return {"mlflow.user": user, "mlflow.source.name": "dfpo", "mlflow.source.type": "LOCAL"}


def _as_yaml(config: PipelineConfig) -> str:
    import yaml

    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
