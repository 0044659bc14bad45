"""Submit a compiled pipeline: check first everything that can be checked here, create the run exactly once, watch it to its end.

KFP's API has no idempotency key, so each submission carries an id of its own in the run's description. Where a request to create a run
ended without an answer, the run is looked for by that id before anything is sent again.
"""

from __future__ import annotations

import datetime
import json
import math
import re
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from dfpo_core import preflight, tracking
from dfpo_core.config import PipelineConfig
from dfpo_core.errors import UserError
from pipelines.kfp_server import Refused, Server, ServerFailure, answers, in_cluster

FINAL_STATES = ("SUCCEEDED", "FAILED", "SKIPPED", "CANCELED")
POLL_SECONDS, LONGEST_PAUSE = 10.0, 60.0
ATTEMPTS = 3
LOOK_AFTER_SECONDS = (1.0, 2.0, 4.0)
"""When to look for a run whose creation was not answered: the server may still be writing it down."""
MAX_CONCURRENCY = 10
LARGEST_INTEGER = 2**53
"""KFP carries numbers as doubles: integers beyond are not exact."""
UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400}


# ---------------------------------------------------------------------------------------------------------- arguments


def read_compiled(path: Path) -> list[dict[str, Any]]:
    """The documents of a compiled pipeline: the pipeline spec and, where pods have settings, the platform spec."""
    import yaml

    return list(yaml.safe_load_all(path.read_text(encoding="utf-8")))


def read_arguments(spec: dict[str, Any], given: list[str]) -> dict[str, Any]:
    """`NAME=VALUE` texts as typed arguments of the compiled pipeline. Raises UserError for unknown, repeated and missing names and for
    wrong types: `kfp.Client` checks none of it, and the run would fail in a pod, or take the text for a default."""
    inputs = spec["root"]["inputDefinitions"]["parameters"]
    arguments: dict[str, Any] = {}
    for item in given:
        name, sign, text = item.partition("=")
        if not sign:
            raise UserError("--param", f"{item!r} has no '='", "write NAME=VALUE, e.g. --param steps=10")
        if name not in inputs:
            raise UserError(f"--param {name}", "the pipeline has no such parameter", f"choose one of: {', '.join(inputs)}")
        if name in arguments:
            raise UserError(f"--param {name}", "is given twice", "give it once")
        arguments[name] = _typed(name, text, inputs[name]["parameterType"])
    missing = [name for name, entry in inputs.items() if not entry.get("isOptional") and name not in arguments]
    if missing:
        raise UserError(f"--param {missing[0]}", "the pipeline needs it", f"add --param {missing[0]}=VALUE")
    if not re.fullmatch(r"[0-9]+", arguments.get("gpu_count", "0")):
        raise UserError("--param gpu_count", f"{arguments['gpu_count']!r} is no whole number", "write 0, 1, 2, …")
    return arguments


def _typed(name: str, text: str, kind: str) -> Any:
    def whole(text: str) -> int:
        value = int(text)
        if abs(value) > LARGEST_INTEGER:
            raise ValueError
        return value

    def finite(text: str) -> float:
        value = float(text)
        if not math.isfinite(value):
            raise ValueError
        return value

    def of_type(expected: type) -> Callable[[str], Any]:
        def read(text: str) -> Any:
            value = json.loads(text)
            if not isinstance(value, expected):
                raise ValueError
            return value

        return read

    readers: dict[str, tuple[Callable[[str], Any], str]] = {
        "STRING": (str, "text"),
        "NUMBER_INTEGER": (whole, "a whole number"),
        "NUMBER_DOUBLE": (finite, "a number"),
        "BOOLEAN": (of_type(bool), "true or false"),
        "LIST": (of_type(list), "a JSON list"),
        "STRUCT": (of_type(dict), "a JSON object"),
    }
    read, wanted = readers[kind]
    try:
        return read(text)
    except ValueError:
        raise UserError(f"--param {name}", f"{text[:60]!r} is not {wanted}", "correct the value") from None


def with_arguments(config: PipelineConfig, arguments: dict[str, Any]) -> PipelineConfig:
    """The configuration that the run will have: `config` with the arguments laid over it, as the pods will do. Raises UserError."""
    values = {key: arguments[name] for name, key in preflight.PARAMETERS.items() if name in arguments}
    resolved = preflight.with_overrides(arguments.get("config", config.to_json()), values, arguments.get("data", ""))
    given = {name: arguments[name] for name in ("image", "gpu_image", "gpu_type", "gpu_count") if name in arguments}
    cluster = config.cluster.model_copy(update=given | {"gpu_count": int(given.get("gpu_count", config.cluster.gpu_count))})
    return resolved.model_copy(update={"cluster": cluster})


# ---------------------------------------------------------------------------------------------------------- checks


def check_for_cluster(config: PipelineConfig, tracking_in_cluster: bool = False, recurring: bool = False) -> list[UserError]:
    """What would be lost or impossible in pods: stores on a pod's own disk, a tracking server that nobody can reach, GPUs without a
    type. `tracking_in_cluster`: only pods reach the tracking server, so do not try it from here."""
    return [*_stores(config, recurring), *_accelerators(config), *_tracking_server(config, tracking_in_cluster)]


def _stores(config: PipelineConfig, recurring: bool) -> Iterator[UserError]:
    cluster = config.cluster
    on_volume = bool(cluster.pvc) and config.home_path.is_relative_to(cluster.pvc_mount_path)
    if config.tracking_uri.startswith(("sqlite:", "file:")) and not on_volume:
        problem = "a local store would end with the first pod"
        yield UserError("tracking.uri", problem, "set the URI of an MLflow server, or home to a folder of cluster.pvc")
    if cluster.retries and not on_volume and not config.train.checkpoint_uri:
        problem = "is empty, and a retried training pod would find no state"
        yield UserError("train.checkpoint_uri", problem, "set a URL, home to a folder of cluster.pvc, or cluster.retries to 0")
    if recurring and config.train.checkpoint_uri and "{run}" not in config.train.checkpoint_uri:
        problem = "is the same for every run, so the second would go on from the end of the first"
        yield UserError("train.checkpoint_uri", problem, "put {run} into it")


def _accelerators(config: PipelineConfig) -> Iterator[UserError]:
    if config.cluster.gpu_count and not config.cluster.gpu_type:
        problem = f"{config.cluster.gpu_count} GPUs asked for without a type"
        yield UserError("cluster.gpu_type", problem, "set it, e.g. nvidia.com/gpu")


def _tracking_server(config: PipelineConfig, tracking_in_cluster: bool) -> Iterator[UserError]:
    uri = config.tracking_uri
    if urlsplit(uri).password:
        problem = "holds a password, which everybody could read in the run's parameters"
        yield UserError("tracking.uri", problem, "keep it in a secret and name that in cluster.mlflow_secret")
    elif not tracking_in_cluster and not _only_in_cluster(uri):
        try:
            tracking.check_reachable(uri)
        except UserError as error:
            said = str(error).removeprefix(f"{error.field}: ")
            yield UserError(error.field, said, "or, if only pods reach it, add --tracking-in-cluster")


def _only_in_cluster(uri: str) -> bool:
    """A Kubernetes service name (NAME.NAMESPACE.svc…), which resolves in pods only."""
    host = urlsplit(uri).hostname or ""
    return host.endswith((".svc", ".svc.cluster.local")) and not in_cluster()


def warnings_for_cluster(config: PipelineConfig) -> list[str]:
    """What may be meant so, and often is not: `field: what will happen; what would prevent it`."""
    cluster, warnings = config.cluster, []
    for key, image in {"image": cluster.image, "gpu_image": cluster.gpu_image}.items():
        if not is_pinned(image):
            warnings.append(f"cluster.{key}: {image} can change between two pods of a run; pin it by digest or version")
        if not _names_registry(image):
            warnings.append(f"cluster.{key}: {image} names no registry; only nodes that already hold it can start it")
    if config.tracking_uri.startswith("http") and not cluster.mlflow_secret:
        warnings.append("cluster.mlflow_secret: no credentials reach the pods; name a secret if the MLflow server asks for them")
    sources = [source for split in ("train", "id_test", "ood_test") for source in getattr(config.data, split)]
    if config.train.checkpoint_uri.startswith("s3://") and not cluster.object_store_secret:
        warnings.append(
            "cluster.object_store_secret: no credentials for train.checkpoint_uri reach the pods; name a secret if it needs them"
        )
    if not cluster.hub_secret and any(source.kind in ("hub", "dataset") for source in sources):
        warnings.append("cluster.hub_secret: no hub token reaches the pods; name a secret if a data set is gated")
    files = [source.name for source in sources if source.kind in ("jsonl", "parquet")]
    if config.data.folder:
        files.append(config.data.folder)
    if config.model.startswith(("/", "./", "../", "~")) or config.model.endswith(".gguf"):
        files.append(config.model)
    for path in files:
        if "://" not in path and not (cluster.pvc and Path(path).is_relative_to(cluster.pvc_mount_path)):
            warnings.append(f"{path}: is not on cluster.pvc; pods see it only if the image holds it")
    return warnings


def is_pinned(image: str) -> bool:
    """By digest, or by a tag that names a version: one with a number in it, `latest` and friends have none."""
    name, _, digest = image.partition("@")
    tag = name.rpartition("/")[2].partition(":")[2]
    return digest.startswith("sha256:") or any(character.isdigit() for character in tag)


def _names_registry(image: str) -> bool:
    first, slash, _ = image.partition("/")
    return bool(slash) and ("." in first or ":" in first or first == "localhost")


# ---------------------------------------------------------------------------------------------------------- what is submitted


@dataclass(frozen=True)
class Schedule:
    """When a recurring run starts a run: by `cron` (six fields, seconds first) or every so many seconds."""

    cron: str = ""
    every_seconds: int = 0
    enabled: bool = True
    max_concurrency: int = 1
    catch_up: bool = True
    """Start every run that a pause left out; without, only the latest."""

    def __post_init__(self):
        if bool(self.cron) == bool(self.every_seconds):
            raise UserError("--cron", "or --every: one of them says when", "give one")
        if self.cron and not re.fullmatch(r"([0-9A-Za-z*/,?-]+ +){5}[0-9A-Za-z*/,?-]+", self.cron.strip()):
            raise UserError("--cron", f"{self.cron!r} has not six fields", 'put the seconds first, e.g. --cron "0 0 9 * * 1-5"')
        if not 1 <= self.max_concurrency <= MAX_CONCURRENCY:
            raise UserError("--max-concurrency", f"{self.max_concurrency} is out of range", f"give 1 to {MAX_CONCURRENCY}")


def read_interval(text: str) -> int:
    """`90s`, `15m`, `6h`, `1d` as seconds. Raises UserError."""
    match = re.fullmatch(r"([1-9][0-9]{0,7})([smhd])", text)
    if not match:
        raise UserError("--every", f"{text!r} is no interval", "write a number and s, m, h or d, e.g. --every 6h")
    return int(match[1]) * UNITS[match[2]]


def new_submission_id() -> str:
    return f"{time.strftime('%Y%m%d-%H%M%S')}-{uuid.uuid4().hex[:8]}"


@dataclass(frozen=True)
class Submission:
    """One run, or recurring run, to create."""

    documents: list[dict[str, Any]]
    """The compiled pipeline."""
    arguments: dict[str, Any]
    experiment: str
    run_name: str
    submission_id: str = field(default_factory=new_submission_id)
    service_account: str = ""
    plugins_input: dict[str, dict[str, Any]] = field(default_factory=dict)
    schedule: Schedule | None = None

    @property
    def mark(self) -> str:
        """What the description of the run says, and what it is found by."""
        return f"dfpo submission {self.submission_id}"


def mlflow_plugin_input(choice: str, config: PipelineConfig) -> dict[str, dict[str, Any]]:
    """What to tell KFP's own MLflow plugin: `on` puts its runs into our experiment, `off` keeps it out, "" leaves the server's default."""
    return {"": {}, "on": {"mlflow": {"experiment_name": config.tracking.experiment}}, "off": {"mlflow": {"disabled": True}}}[choice]


def submit(client, server: Server, submission: Submission, look_first: bool = False):
    """Create the run or recurring run, and return it as the server describes it. It is created once, whatever happens on the way.

    `look_first`: an earlier command may have created it under the same submission id. Raises UserError when the server refuses;
    ServerFailure, naming the submission id, when it is unknown whether the run exists or the server failed until the end.
    """
    with answers(server):
        experiment_id = client.create_experiment(submission.experiment, namespace=server.namespace).experiment_id
    if look_first and (found := _find(client, server, submission, experiment_id)):
        return found
    attempts = 0
    while True:
        try:
            return _create(client, server, submission, experiment_id)
        except ServerFailure as failure:
            attempts += 1
            found, known = _look_for(client, server, submission, experiment_id)
            if found:
                return found
            # A server that did not answer in time may still create the run: only a person can decide to send it again.
            if not known or failure.timed_out or attempts == ATTEMPTS:
                state = "no run has come of it so far" if known else "whether the run exists is unknown"
                again = f"repeat the command with --submission-id {submission.submission_id}: it looks for the run before it creates one"
                raise ServerFailure(f"{failure.problem}; {state}", again) from None


def _create(client, server: Server, submission: Submission, experiment_id: str):
    """One request. The client's own run_pipeline can set neither a description nor plugins_input; the API's model can."""
    from kfp_server_api import V2beta1RecurringRun, V2beta1Run, V2beta1RuntimeConfig

    content = {
        "display_name": submission.run_name,
        "description": submission.mark,
        "experiment_id": experiment_id,
        "pipeline_spec": _pipeline_spec(submission.documents),
        "runtime_config": V2beta1RuntimeConfig(parameters=submission.arguments),
        "service_account": submission.service_account or None,
        "plugins_input": submission.plugins_input or None,
    }
    schedule = submission.schedule
    with answers(server):
        if schedule is None:
            run = client.runs.run_service_create_run(V2beta1Run(**content))
            complete = bool(run.run_id)
        else:
            content |= _as_trigger(schedule)
            run = client.recurring_runs.recurring_run_service_create_recurring_run(V2beta1RecurringRun(**content))
            complete = bool(run.recurring_run_id)
    if not complete:
        raise ServerFailure(f"{server.url} answered with something else than a run")
    return run


def _pipeline_spec(documents: list[dict[str, Any]]) -> dict[str, Any]:
    return dict(zip(("pipeline_spec", "platform_spec"), documents, strict=True)) if documents[1:] else documents[0]


def _as_trigger(schedule: Schedule) -> dict[str, Any]:
    """64-bit integers are text in the API's JSON."""
    from kfp_server_api import RecurringRunMode, V2beta1CronSchedule, V2beta1PeriodicSchedule, V2beta1Trigger

    if schedule.cron:
        trigger = V2beta1Trigger(cron_schedule=V2beta1CronSchedule(cron=schedule.cron.strip()))
    else:
        trigger = V2beta1Trigger(periodic_schedule=V2beta1PeriodicSchedule(interval_second=str(schedule.every_seconds)))
    return {
        "trigger": trigger,
        "mode": RecurringRunMode.ENABLE if schedule.enabled else RecurringRunMode.DISABLE,
        "max_concurrency": str(schedule.max_concurrency),
        "no_catchup": not schedule.catch_up,
    }


def _look_for(client, server: Server, submission: Submission, experiment_id: str):
    """(the run of a submission or None, whether the last look was answered)."""
    known = False
    for seconds in LOOK_AFTER_SECONDS:
        time.sleep(seconds)
        try:
            found = _find(client, server, submission, experiment_id)
        except ServerFailure:
            known = False
            continue
        if found:
            return found, True
        known = True
    return None, known


def _find(client, server: Server, submission: Submission, experiment_id: str):
    """The run, or recurring run, that carries the submission's mark; None where there is none."""
    query = {"predicates": [{"operation": "IS_SUBSTRING", "key": "description", "string_value": submission.mark}]}
    page = ""
    while True:
        listing = client.list_recurring_runs if submission.schedule else client.list_runs
        with answers(server):
            answer = listing(page_token=page, page_size=100, experiment_id=experiment_id, filter=json.dumps(query))
        runs = (answer.recurring_runs if submission.schedule else answer.runs) or []
        for run in runs:
            if (run.description or "") == submission.mark:
                return run
        page = answer.next_page_token or ""
        if not page:
            return None


# ---------------------------------------------------------------------------------------------------------- watching a run


@dataclass(frozen=True)
class Change:
    """Something new about a run: a task's state, the run's own (task ""), or that it cannot be read for now (no state)."""

    task: str
    state: str
    problem: str = ""


def watch(client, server: Server, run_id: str, tasks: set[str], give_up_after: float) -> Iterator[Change]:
    """What changes until the run ends; the last change is the run's final state.

    A request that fails is repeated, with longer pauses, until none has succeeded for `give_up_after` seconds: then ServerFailure.
    UserError when the server refuses (the run is gone, or hidden from this user). The run goes on whatever happens here.
    """
    states: dict[str, str] = {}
    pause, last_answer, failing = POLL_SECONDS, time.monotonic(), False
    while states.get("") not in FINAL_STATES:
        if states or failing:
            time.sleep(pause)
        try:
            with answers(server):
                run = client.get_run(run_id)
        except (ServerFailure, Refused) as error:
            if isinstance(error, Refused) and error.status != 401:  # a token can be renewed in its file
                raise
            if time.monotonic() - last_answer > give_up_after:
                problem = f"the run's state could not be read for {give_up_after:g} s ({_problem(error)})"
                raise ServerFailure(problem, f"the run goes on: see {server.link(f'runs/details/{run_id}')}") from None
            if not failing:
                yield Change("", "", _problem(error))
            pause, failing = min(2 * pause, LONGEST_PAUSE), True
            continue
        pause, last_answer, failing = POLL_SECONDS, time.monotonic(), False
        for change in _states(run, tasks):
            if change.state != states.get(change.task):
                states[change.task] = change.state
                yield change


def _problem(error: Exception) -> str:
    return error.problem if isinstance(error, ServerFailure) else str(error)


def _states(run: Any, tasks: set[str]) -> Iterator[Change]:
    """The state of each of the pipeline's own tasks (KFP lists its drivers too) at its latest attempt, then of the run."""
    details = (run.run_details.task_details if run.run_details else None) or []
    latest = {detail.display_name: detail for detail in sorted(details, key=_created) if detail.display_name in tasks and detail.state}
    for name, detail in latest.items():
        yield Change(name, detail.state, _error(detail))
    yield Change("", run.state or "PENDING", _error(run))


def _created(detail: Any) -> float:
    return detail.create_time.timestamp() if isinstance(detail.create_time, datetime.datetime) else 0.0


def _error(item: Any) -> str:
    return (item.error.message or "") if item.error else ""


def task_names(spec: dict[str, Any]) -> set[str]:
    """The names of the tasks that run a container."""
    return {name.removeprefix("exec-") for name in spec["deploymentSpec"]["executors"]}


def plugin_link(run: Any) -> str:
    """The page of the MLflow run that KFP's plugin made for this run; "" where it made none."""
    output = (run.plugins_output or {}).get("mlflow")
    entry = (output.entries or {}).get("run_url") if output else None
    return str(entry.value) if entry and entry.value else ""
