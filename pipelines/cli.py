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
    _add_submit_options(add("submit", submit, "compile and submit to a Kubeflow Pipelines server"))
    comparing = add("compare", compare, "table of the runs in the experiment", default_config=True)
    comparing.add_argument("--run", metavar="ID", action="append", default=[], help="only this parent run; may be repeated")
    promoting = add("promote", promote, "apply the gate again to an evaluated run", default_config=True)
    promoting.add_argument("--run", metavar="ID", required=True, help="MLflow parent run (`dfpo compare` lists them)")
    ui = add("ui", open_ui, "serve the MLflow UI of the local store", default_config=True)
    ui.add_argument("--port", type=int, default=5000, help="port on this machine (5000)")
    ui.add_argument("--dry-run", action="store_true", help="print the command instead")
    add("doctor", doctor, "versions, threads, disk, model cache and tracking store", default_config=True)
    printing = add("config", show_config, "the resolved configuration, as the pipeline's JSON or with descriptions", default_config=True)
    printing.add_argument("--describe", action="store_true", help="every field with its value and description")
    return parser


def _add_submit_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--host", default="", help="address of the KFP API server; empty inside the cluster")
    parser.add_argument("--namespace", default="", help="Kubernetes namespace, for multi-user servers")
    parser.add_argument("--experiment", default="dfpo", help="KFP experiment (dfpo)")
    parser.add_argument("--run-name", default="", help="name of the run; default: the configuration's name and the time")
    parser.add_argument("--token-file", default="", help="file with a bearer token")
    parser.add_argument("--param", metavar="NAME=VALUE", action="append", default=[], help="pipeline parameter, e.g. --param steps=10")
    parser.add_argument("--timeout", type=int, default=30, help="seconds that one request may take (30)")
    parser.add_argument("--wait", action="store_true", help="print states until the run ends; exit 1 unless it succeeds")


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
    """Compile, check arguments against the compiled inputs, and create one run."""
    config = _load(arguments)
    from pipelines import submission
    from pipelines.dfpo_pipeline import compile_pipeline

    problems = submission.check_for_cluster(config)
    for problem in problems:
        print(f"error: {problem}", file=sys.stderr)
    if problems:
        return 2
    token = _read_token(arguments.token_file) if arguments.token_file else ""
    server = submission.Server(arguments.host, arguments.namespace, token, arguments.timeout)
    run_name = arguments.run_name or f"{config.name} {time.strftime('%Y-%m-%d %H:%M:%S')}"
    with tempfile.TemporaryDirectory(prefix="dfpo-") as folder:
        compiled = Path(folder) / "dfpo.yaml"
        compile_pipeline(config, compiled)
        parameters = submission.read_arguments(compiled, arguments.param)
        run_id, link = submission.submit(compiled, parameters, server, arguments.experiment, run_name)
    print(f"run {run_id}\n{link}", flush=True)
    return 0 if not arguments.wait or submission.wait(run_id, server) == "SUCCEEDED" else 1


def _read_token(path: str) -> str:
    try:
        token = Path(path).expanduser().read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError("--token-file", f"cannot read {path} ({getattr(error, 'strerror', 'not text')})", "check the path") from None
    if not token:
        raise UserError("--token-file", f"{path} is empty", "write the token into it")
    return token


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
    print(f"{'cpus':<14} {os.cpu_count()}, OMP_NUM_THREADS={os.environ.get('OMP_NUM_THREADS', 'not set')}, threads={config.threads}")
    folder = next(path for path in (config.home_path, *config.home_path.parents) if path.exists())
    print(f"{'home':<14} {config.home_path}, {shutil.disk_usage(folder).free / 2**30:.1f} GiB free")
    cached = sorted(path.name for path in (config.home_path / "models").glob("*")) or ["none"]
    print(f"{'models cached':<14} {', '.join(cached)}")
    print(f"{'tracking':<14} {config.tracking_uri}")
    problems = preflight.check(config)
    for problem in problems:
        print(f"problem: {problem}")
    print("ready" if not problems else f"{len(problems)} problem(s)")
    return 1 if problems else 0


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
