"""The `dfpo` command. Exit code 0; 2 with one line for a user's mistake; 130 after Ctrl-C; 1 for a failure.

Imports that take time happen inside the commands, so that `dfpo --help` answers at once.
"""

from __future__ import annotations

import argparse
import os
import shlex
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

from dfpo_core.errors import UserError

if TYPE_CHECKING:
    from dfpo_core.config import PipelineConfig

DEMO = Path(__file__).parent / "configs" / "demo.yaml"


def main(arguments: list[str] | None = None) -> int:
    """Run one command and return its exit code; only failures that are nobody's mistake raise."""
    parsed = _parser().parse_args(arguments)
    try:
        return parsed.command(parsed)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="dfpo", description="Post-train a language model on noisy feedback with a flow critic.")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    def add(name, command, summary, default_config=False):
        sub = commands.add_parser(name, help=summary, description=summary)
        sub.add_argument("config", metavar="CONFIG", nargs="?" if default_config else None, default=str(DEMO), help="YAML file")
        sub.add_argument("--set", metavar="KEY=VALUE", action="append", default=[], help="override, e.g. --set train.steps=10")
        sub.set_defaults(command=command)
        return sub

    run = add("run", run_pipeline, "run the whole pipeline on this machine")
    run.add_argument("--keep-outputs", action="store_true", help="keep the steps' intermediate files after a success")
    compiling = add("compile", compile_config, "write the compiled pipeline")
    compiling.add_argument("-o", "--output", metavar="FILE", required=True, help="YAML file to write")
    submitting = add("submit", submit, "compile, check and submit to a Kubeflow Pipelines server")
    _add_server_options(submitting)
    _add_submit_options(submitting)
    scheduled = commands.add_parser("recurring", help="list or switch the recurring runs of a Kubeflow Pipelines server")
    scheduled.add_argument("action", choices=["list", "enable", "disable", "delete"])
    scheduled.add_argument("id", metavar="ID", nargs="?", default="", help="recurring run")
    _add_server_options(scheduled)
    scheduled.set_defaults(command=recurring)
    comparing = add("compare", compare, "table of the runs in the experiment", default_config=True)
    comparing.add_argument("--run", metavar="ID", action="append", default=[], help="only this parent run; may be repeated")
    promoting = add("promote", promote, "apply the gate again to an evaluated run", default_config=True)
    promoting.add_argument("--run", metavar="ID", required=True, help="MLflow parent run (`dfpo compare` lists them)")
    ui = add("ui", open_ui, "serve the MLflow UI of the local store", default_config=True)
    ui.add_argument("--port", type=int, default=5000, help="port on this machine (5000)")
    ui.add_argument("--dry-run", action="store_true", help="print the command instead")
    add("doctor", doctor, "versions, accelerators, threads, disk, caches and tracking store", default_config=True)
    planning = add("plan", plan, "memory of the training step on one GPU, and whether it fits")
    planning.add_argument("--gpu-memory", metavar="SIZE", default="", help="memory of one GPU, e.g. 80GiB (cluster.gpu_memory)")
    planning.add_argument("--gpus", metavar="N", type=int, default=0, help="GPUs (train.processes, or else cluster.gpu_count)")
    planning.add_argument("--model-config", metavar="FILE", default="", help="config.json of the model, or its folder")
    printing = add("config", show_config, "the resolved configuration, as the pipeline's JSON or with descriptions", default_config=True)
    printing.add_argument("--describe", action="store_true", help="every field with its value and description")
    return parser


def _add_server_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--host", default="", help="address of the KFP API server; empty inside the cluster")
    parser.add_argument("--namespace", default="", help="Kubernetes namespace, for multi-user servers")
    credentials = parser.add_mutually_exclusive_group()
    credentials.add_argument("--token-file", default="", metavar="FILE", help="file with a bearer token, read again for each request")
    credentials.add_argument("--cookie-file", default="", metavar="FILE", help="file with the Cookie header of a browser session")
    parser.add_argument("--ca-file", default="", metavar="FILE", help="certificates to trust instead of the usual ones")
    parser.add_argument("--ui-host", default="", help="address of the KFP web pages, for links; default: --host")
    parser.add_argument("--timeout", type=int, default=30, help="seconds that one request may take (30)")


def _add_submit_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--param", metavar="NAME=VALUE", action="append", default=[], help="pipeline parameter, e.g. --param steps=10")
    parser.add_argument("--experiment", default="dfpo", help="KFP experiment (dfpo)")
    parser.add_argument("--run-name", default="", help="name of the run; default: the configuration's name and the submission id")
    parser.add_argument("--service-account", default="", help="Kubernetes service account of the pods; default: the server's")
    parser.add_argument("--tracking-in-cluster", action="store_true", help="do not try tracking.uri from here: only pods reach it")
    parser.add_argument("--mlflow-plugin", choices=["on", "off"], default="", help="KFP's MLflow plugin: in our experiment, or not at all")
    parser.add_argument("--submission-id", default="", metavar="ID", help="of an earlier try: use the run that it made, if it made one")
    parser.add_argument("--dry-run", action="store_true", help="check everything, send nothing")
    waiting = parser.add_argument_group("waiting")
    waiting.add_argument("--wait", action="store_true", help="print the states of the tasks until the run ends; exit 1 unless it succeeds")
    waiting.add_argument("--give-up-after", type=int, default=600, metavar="SECONDS", help="without an answer from the server (600)")
    recurring = parser.add_argument_group("recurring runs")
    recurring.add_argument("--cron", default="", help='six fields, seconds first: "0 0 9 * * 1-5"')
    recurring.add_argument("--every", default="", metavar="INTERVAL", help="90s, 15m, 6h or 1d")
    recurring.add_argument("--disabled", action="store_true", help="create it switched off (`dfpo recurring enable ID`)")
    recurring.add_argument("--max-concurrency", type=int, default=1, metavar="N", help="runs of it at a time, 1 to 10 (1)")
    recurring.add_argument("--no-catch-up", action="store_true", help="after a pause start the latest run only, not all that were left out")


def _server(arguments: argparse.Namespace):
    from pipelines.kfp_server import Server

    if arguments.timeout < 1:
        raise UserError("--timeout", f"{arguments.timeout} s is no time", "give at least 1")
    names = ("host", "namespace", "token_file", "cookie_file", "ca_file", "ui_host", "timeout")
    return Server(**{name: getattr(arguments, name) for name in names})


def _load(arguments: argparse.Namespace) -> PipelineConfig:
    from dfpo_core.config import load_config

    return load_config(arguments.config, arguments.set)


# ---------------------------------------------------------------------------------------------------------- run


def run_pipeline(arguments: argparse.Namespace) -> int:
    """Check the configuration, run the compiled pipeline through KFP's local runner, print the result."""
    config = _load(arguments)
    if _print_problems(config):
        return 2
    for name in (signal.SIGTERM, signal.SIGHUP):  # end the steps with us, as Ctrl-C does
        signal.signal(name, signal.default_int_handler)
    from pipelines.dfpo_pipeline import compile_pipeline
    from pipelines.local_run import LocalRun

    stem = f"{config.name}-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}"
    run = LocalRun(log=config.home_path / "logs" / f"{stem}.log", outputs=config.home_path / "outputs" / stem)
    print(f"log: {run.log}", file=sys.stderr)
    try:
        with tempfile.TemporaryDirectory(prefix="dfpo-") as folder:
            compiled = Path(folder) / "pipeline.yaml"
            compile_pipeline(config, compiled)
            succeeded = run.execute(compiled)
    except BaseException as error:
        _close_run(config, run.pipeline_run_id, "CANCELLED" if isinstance(error, KeyboardInterrupt) else "FAILED")
        raise
    return _report_success(config, run, arguments.keep_outputs) if succeeded else _report_failure(config, run)


def _print_problems(config: PipelineConfig) -> bool:
    """Print every problem that preflight finds, one line each; True if there is one."""
    from dfpo_core import preflight

    problems = preflight.check(config)
    for problem in problems:
        print(f"error: {problem}", file=sys.stderr)
    return bool(problems)


def _close_run(config: PipelineConfig, pipeline_run_id: str, status: str) -> None:
    """Do what the exit handler could not: KFP's runner was stopped before it came to it."""
    if pipeline_run_id:
        from dfpo_core import tracking

        tracking.close_parent(config.to_json(), pipeline_run_id, status)


def _report_success(config: PipelineConfig, run, keep_outputs: bool) -> int:
    import shutil

    from pipelines.summary import parent_of, render_decision, render_run

    parent = parent_of(config, run.pipeline_run_id)
    print(f"\n{render_run(parent)}\n\n{render_decision(config, parent)}")
    print(f"MLflow run {parent.info.run_id}; open it with: {_ui_hint(config)}")
    if not keep_outputs:  # checkpoints, report and answers are in MLflow
        shutil.rmtree(run.outputs)
    return 0


def _report_failure(config: PipelineConfig, run) -> int:
    from pipelines.summary import failure_of, parent_of

    reason, code = failure_of(parent_of(config, run.pipeline_run_id))
    if not reason:  # no parent run yet: preflight itself failed, and its line is in the log
        lines = [line for line in run.log.read_text(encoding="utf-8").splitlines() if line.startswith("error: ")]
        reason, code = (lines[-1].removeprefix("error: "), 2) if lines else (f"step {run.failed} failed", 1)
    print(f"error: {reason}\nfull log: {run.log}", file=sys.stderr)
    return code


def _ui_hint(config: PipelineConfig) -> str:
    if not config.tracking_uri.startswith("sqlite:"):
        return config.tracking_uri
    home = "" if config.home == "~/.dfpo" else f" --set home={shlex.quote(config.home)}"
    program = shlex.quote(sys.argv[0])
    return f"{program if os.access(sys.argv[0], os.X_OK) else f'python {program}'} ui{home}"


# ---------------------------------------------------------------------------------------------------------- compile and submit


def compile_config(arguments: argparse.Namespace) -> int:
    """Write the compiled pipeline of a configuration."""
    config, output = _load(arguments), Path(arguments.output)
    if output.suffix not in (".yaml", ".yml"):
        raise UserError("--output", f"{output.name!r} does not end in .yaml", "KFP reads the format from the name")
    from pipelines.dfpo_pipeline import compile_pipeline

    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        compile_pipeline(config, output)
    except OSError as error:
        raise UserError("--output", f"cannot write {output} ({error.strerror})", "choose a folder you can write") from None
    print(output)
    return 0


def submit(arguments: argparse.Namespace) -> int:
    """Check everything that can be checked here, create one run or recurring run, and with --wait watch it to its end."""
    config, server = _load(arguments), _server(arguments)
    from pipelines import submission
    from pipelines.dfpo_pipeline import compile_pipeline
    from pipelines.kfp_server import ServerFailure, connect

    schedule = _schedule(arguments)
    submission_id = arguments.submission_id or submission.new_submission_id()
    with tempfile.TemporaryDirectory(prefix="dfpo-") as folder:
        compile_pipeline(config, Path(folder) / "dfpo.yaml")
        documents = submission.read_compiled(Path(folder) / "dfpo.yaml")
    parameters = submission.read_arguments(documents[0], arguments.param)
    resolved = submission.with_arguments(config, parameters)
    for warning in submission.warnings_for_cluster(resolved):
        print(f"warning: {warning}", file=sys.stderr)
    problems = submission.check_for_cluster(resolved, arguments.tracking_in_cluster, recurring=bool(schedule))
    for problem in problems:
        print(f"error: {problem}", file=sys.stderr)
    if problems:
        return 2
    if arguments.dry_run:
        print(f"checked: {len(parameters)} parameter(s) given, nothing sent")
        return 0
    wanted = submission.Submission(
        documents,
        parameters,
        arguments.experiment,
        arguments.run_name or f"{config.name} {submission_id}",
        submission_id,
        arguments.service_account,
        submission.mlflow_plugin_input(arguments.mlflow_plugin, resolved),
        schedule,
    )
    try:
        client = connect(server)
        run = submission.submit(client, server, wanted, look_first=bool(arguments.submission_id))
        if schedule:
            print(f"recurring run {run.recurring_run_id}\n{server.link(f'recurringrun/details/{run.recurring_run_id}')}")
            return 0
        print(f"run {run.run_id}\n{server.link(f'runs/details/{run.run_id}')}")
        print(submission.plugin_link(run) or f"MLflow {resolved.tracking_uri}: tag dfpo.pipeline_run_id = {run.run_id}", flush=True)
        if not arguments.wait:
            return 0
        changes = submission.watch(client, server, run.run_id, submission.task_names(documents[0]), arguments.give_up_after)
        return _wait(changes, resolved, run.run_id, server.link(f"runs/details/{run.run_id}"))
    except ServerFailure as failure:
        print(f"error: {failure}", file=sys.stderr)
        return 1


def _schedule(arguments: argparse.Namespace):
    from pipelines.submission import Schedule, read_interval

    if not (arguments.cron or arguments.every):
        if arguments.disabled or arguments.no_catch_up or arguments.max_concurrency != 1:
            raise UserError("--cron", "or --every is missing: the other options are those of a recurring run", "say when it runs")
        return None
    if arguments.wait:
        raise UserError("--wait", "does not go with a recurring run, which never ends", "leave it out")
    every = read_interval(arguments.every) if arguments.every else 0
    return Schedule(arguments.cron, every, not arguments.disabled, arguments.max_concurrency, not arguments.no_catch_up)


def _wait(changes, config: PipelineConfig, run_id: str, link: str) -> int:
    """Print each change until the run ends; the exit code. Ctrl-C ends the watching, not the run."""
    state, failures = "", []
    try:
        for change in changes:
            text = change.state.lower() if change.state else f"no answer, trying again ({change.problem})"
            print(f"{time.strftime('%H:%M:%S')}  {change.task or 'run':<13} {text}", file=sys.stderr, flush=True)
            if change.state == "FAILED" and change.problem:
                failures.append(f"{change.task or 'run'}: {change.problem}")
            if (change.task, change.state) == ("preflight", "SUCCEEDED"):
                print(_parent_link(config, run_id), file=sys.stderr, flush=True)
            state = change.state if not change.task and change.state else state
    except KeyboardInterrupt:
        print(f"the run goes on: {link}", file=sys.stderr)
        raise
    if state == "SUCCEEDED":
        return 0
    for line in failures:
        print(f"error: {' '.join(line.split())}", file=sys.stderr)
    print(f"error: the run ended as {state.lower()}; see {link}", file=sys.stderr)
    return 1


def _parent_link(config: PipelineConfig, run_id: str) -> str:
    """The page of the MLflow run that preflight made; what to look for, where the MLflow server is out of reach from here."""
    from pipelines.summary import parent_of

    try:
        parent = parent_of(config, run_id) if config.tracking_uri.startswith("http") else None
    except UserError:  # the pods' server need not be ours
        parent = None
    if parent is None:
        return f"MLflow run: the one with tag dfpo.pipeline_run_id = {run_id}"
    return f"MLflow run: {config.tracking_uri}/#/experiments/{parent.info.experiment_id}/runs/{parent.info.run_id}"


def recurring(arguments: argparse.Namespace) -> int:
    """List, switch on, switch off or delete the recurring runs of a server."""
    from pipelines.kfp_server import ServerFailure, answers, connect

    server = _server(arguments)
    if (arguments.action == "list") == bool(arguments.id):
        fix = "leave the id out" if arguments.id else f"write: dfpo recurring {arguments.action} ID"
        raise UserError("ID", "goes with enable, disable and delete, and not with list", fix)
    try:
        client = connect(server)
        with answers(server):
            if arguments.action == "list":
                found = client.list_recurring_runs(page_size=100, namespace=server.namespace).recurring_runs or []
            else:
                getattr(client, f"{arguments.action}_recurring_run")(arguments.id)
    except ServerFailure as failure:
        print(f"error: {failure}", file=sys.stderr)
        return 1
    if arguments.action == "list":
        for run in found:
            print(f"{run.recurring_run_id}  {(run.status or run.mode or '').lower():<8}  {run.display_name}")
    else:
        print(f"{arguments.action}d {arguments.id}")
    return 0


# ---------------------------------------------------------------------------------------------------------- compare and promote


def compare(arguments: argparse.Namespace) -> int:
    """Print the pipeline runs of the experiment, newest first."""
    from dfpo_core import promote, tracking
    from pipelines.summary import render_comparison

    config = _load(arguments)
    tracking.ensure_store(config)
    rows = promote.compare(tracking.tracking_uri(config), config.tracking.experiment, arguments.run)
    print(render_comparison(rows) if rows else f"no runs yet in experiment {config.tracking.experiment!r} of {config.tracking_uri}")
    return 0


def promote(arguments: argparse.Namespace) -> int:
    """Apply the gate to a run that was evaluated earlier, from what MLflow holds of it."""
    from dfpo_core import promote as gate
    from dfpo_core import tracking

    config = _load(arguments)
    tracking.ensure_store(config)
    decision = gate.promote_run(tracking.tracking_uri(config), arguments.run)
    print(f"version {decision['version']}, alias {decision['aliases']}; {decision['reason']}")
    return 0


# ---------------------------------------------------------------------------------------------------------- ui, doctor, config


def open_ui(arguments: argparse.Namespace) -> int:
    """Replace this process by the MLflow server on the local store."""
    config = _load(arguments)
    if not config.tracking_uri.startswith("sqlite:"):
        print(f"the runs are on the MLflow server at {config.tracking_uri}: open it in a browser")
        return 0
    command = [sys.executable, "-m", "mlflow", "server", "--backend-store-uri", config.tracking_uri]
    command += ["--default-artifact-root", (config.home_path / "mlartifacts").as_uri()]
    command += ["--workers", "1", "--host", "127.0.0.1", "--port", str(arguments.port)]
    if arguments.dry_run:
        print(shlex.join(command))
        return 0
    if not config.tracking.uri:
        config.home_path.mkdir(parents=True, exist_ok=True)
    print(f"MLflow of {config.tracking_uri}: http://127.0.0.1:{arguments.port} (Ctrl-C ends it)", flush=True)
    os.execv(command[0], command)


def doctor(arguments: argparse.Namespace) -> int:
    """Print what decides whether a run works here; exit 1 if something would stop it."""
    import shutil

    from dfpo_core import preflight

    config = _load(arguments)
    for package, version in preflight.installed_versions().items():
        print(f"{package:<14} {version}")
    print(f"{'accelerators':<14} {', '.join(preflight.accelerators()) or 'none'}")
    print(f"{'cpus':<14} {os.cpu_count()}, OMP_NUM_THREADS={os.environ.get('OMP_NUM_THREADS', 'not set')}, threads={config.threads}")
    folder = next(path for path in (config.home_path, *config.home_path.parents) if path.exists())
    print(f"{'home':<14} {config.home_path}, {shutil.disk_usage(folder).free / 2**30:.1f} GiB free")
    cached = sorted(path.name for path in (config.home_path / "models").glob("*")) or ["none"]
    print(f"{'models cached':<14} {', '.join(cached)}")
    print(f"{'tracking':<14} {config.tracking_uri}")
    print(f"{'user':<14} uid {os.getuid()}, gid {os.getgid()}")
    problems = preflight.check(config) + preflight.check_cache_folders()
    for problem in problems:
        print(f"problem: {problem}")
    print("ready" if not problems else f"{len(problems)} problem(s)")
    return 1 if problems else 0


def plan(arguments: argparse.Namespace) -> int:
    """Print the estimate of dfpo_core.plan; exit 1 if it does not fit into the memory given."""
    config = _load(arguments)
    from dfpo_core import plan as planning

    if arguments.gpus < 0:
        raise UserError("--gpus", f"{arguments.gpus} is below 0", "give a number of GPUs")
    given = arguments.gpu_memory or config.cluster.gpu_memory
    memory = planning.read_bytes(given, "--gpu-memory" if arguments.gpu_memory else "cluster.gpu_memory") if given else 0
    estimate = planning.plan(config, arguments.model_config, arguments.gpus)
    print(planning.render(estimate, memory))
    return 0 if not memory or planning.fits(estimate, memory) else 1


def show_config(arguments: argparse.Namespace) -> int:
    """Print the configuration as the pipeline carries it, or every field with its value and description."""
    config = _load(arguments)
    if arguments.describe:
        _describe(config, "")
    else:
        print(config.to_json())
    return 0


def _describe(section, prefix: str) -> None:
    from pydantic import BaseModel

    for name, field in type(section).model_fields.items():
        value = getattr(section, name)
        items = value if isinstance(value, list) else []
        if isinstance(value, BaseModel):
            _describe(value, f"{prefix}{name}.")
        elif items and isinstance(items[0], BaseModel):
            for index, item in enumerate(items):
                _describe(item, f"{prefix}{name}.{index}.")
        else:
            print(f"{prefix + name:<38} {value!r:<28} {field.description}")


if __name__ == "__main__":
    sys.exit(main())
