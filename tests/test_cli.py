"""The `dfpo` command: one line and exit code 2 for each mistake, 130 after Ctrl-C, and a light client without torch."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import psutil
import pytest
from conftest import ROOT, TINY, dfpo
from mlflow import MlflowClient

from dfpo_core.config import load_config
from dfpo_core.errors import UserError

MISTAKES = {
    "missing config file": (["run", "nowhere.yaml"], "config: cannot read nowhere.yaml"),
    "unknown key": (["run", TINY, "--set", "train.stepz=3"], "train.stepz: unknown key in --set; known keys here: "),
    "wrong type": (["run", TINY, "--set", "train.steps=many"], "train.steps: "),
    "rate above 1": (["run", TINY, "--set", "noise.rate=1.5"], "got 1.5; correct the value in --set"),
    "--set without =": (["run", TINY, "--set", "train.steps"], "--set: 'train.steps' has no '='"),
    "unknown algorithm": (["run", TINY, "--set", "train.algorithm=dpo"], "algorithm"),
    "missing model": (["run", TINY, "--set", "model=./no-such-model"], "model: "),
    "missing data file": (["run", TINY, "--set", "data.train=[{kind: jsonl, name: gone.jsonl}]"], "data.train.0.name: no file gone.jsonl"),
    "unreachable tracking server": (["run", TINY, "--set", "tracking.uri=http://127.0.0.1:9"], "tracking.uri: no MLflow server answers"),
    "GPUs without a type": (["run", TINY, "--set", "cluster={gpu_count: 1, gpu_type: ''}"], "cluster.gpu_type: "),
    "output that is no YAML": (["compile", TINY, "-o", "pipeline.txt"], "--output: 'pipeline.txt' does not end in .yaml"),
    "output in no folder": (["compile", TINY, "-o", "/proc/none/x.yaml"], "--output: cannot write /proc/none/x.yaml"),
    "promotion of no run": (["promote", TINY, "--run", "0123456789abcdef0123456789abcdef"], "run_id: no run"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_gives_one_line_and_exit_code_2(mistake, tmp_path):
    arguments, expected = MISTAKES[mistake]
    home = tmp_path / "home"
    result = dfpo(*arguments, "--set", f"home={home}", cwd=tmp_path)
    assert result.returncode == 2, result.stderr
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: ") and expected in line and ";" in line
    assert mistake == "promotion of no run" or not home.exists(), "nothing is written before the checks are done"


def test_a_mistake_in_the_file_is_not_blamed_on_the_command_line(tmp_path):
    wrong = TINY.read_text(encoding="utf-8").replace("rate: 0.3", "rate: 3")
    (tmp_path / "my.yaml").write_text(wrong, encoding="utf-8")
    with pytest.raises(UserError, match=r"^noise\.rate: .*, got 3; correct the value in .*my\.yaml$"):
        load_config(tmp_path / "my.yaml", ["noise.typo_rate=0.1", "train.steps=2"])


def test_every_problem_is_reported_at_once(tmp_path):
    result = dfpo("run", TINY, "--set", f"home={tmp_path / 'home'}", "--set", "model=./gone", "--set", "train.algorithm=dpo", cwd=tmp_path)
    assert result.returncode == 2
    assert len(result.stderr.splitlines()) == 2


def test_a_mistake_that_only_a_step_can_see_ends_with_its_line_and_the_log(tmp_path):
    data = tmp_path / "bad.jsonl"
    data.write_text('{"id": "1", "query": "1+1?", "answer": "2"}\n', encoding="utf-8")
    result = dfpo("run", TINY, "--set", f"home={tmp_path / 'home'}", "--set", f"data.train=[{{kind: jsonl, name: {data}}}]")
    assert result.returncode == 2, result.stderr
    error, log = result.stderr.splitlines()[-2:]
    assert error.startswith("error: ") and "question" in error
    assert log.startswith("full log: ") and "Traceback" not in result.stderr
    assert "prepare_data  failed after" in result.stderr


def wait_for(condition, seconds: float = 90):
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if found := condition():
            return found
        time.sleep(0.1)
    raise AssertionError("timed out")


def start_run(home, *overrides: str) -> subprocess.Popen:
    settings = [word for item in (f"home={home}", *overrides) for word in ("--set", item)]
    command = [sys.executable, "-m", "pipelines.cli", "run", str(TINY), *settings]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def kill_all(process: subprocess.Popen) -> None:
    """Kill the command and what it started, if a failed test has left it running."""
    if process.poll() is None:
        for one in (*psutil.Process(process.pid).children(recursive=True), process):
            one.kill()


def interrupt(process: subprocess.Popen, number: int) -> str:
    """Send the signal to the command alone; its standard error once it and all its children have ended."""
    children = wait_for(lambda: psutil.Process(process.pid).children(recursive=True))
    process.send_signal(number)
    _, errors = process.communicate(timeout=90)
    _, alive = psutil.wait_procs(children, timeout=30)  # a killed process is there until its parent or init has noted its end
    assert not alive
    return errors


def test_ctrl_c_ends_the_steps_processes_and_kills_the_mlflow_runs(tmp_path):
    process = start_run(tmp_path, "data.train.0.size=1000000")  # minutes
    try:
        wait_for(lambda: any("Executing task \x1b[96m'prepare-data'" in log.read_text() for log in tmp_path.glob("logs/*.log")))
        client = MlflowClient(tracking_uri=f"sqlite:///{tmp_path / 'mlflow.db'}")
        experiment = client.get_experiment_by_name("dfpo").experiment_id
        wait_for(lambda: client.search_runs([experiment], "tags.`dfpo.step` = 'prepare_data'"))
        errors = interrupt(process, signal.SIGINT)
    finally:
        kill_all(process)
    assert process.returncode == 130
    assert errors.splitlines()[-1] == "interrupted" and "Traceback" not in errors
    status = {run.data.tags["dfpo.step"]: run.info.status for run in client.search_runs([experiment])}
    assert (status["pipeline"], status["prepare_data"]) == ("KILLED", "KILLED")


def test_sigterm_ends_the_steps_processes_too(tmp_path):
    process = start_run(tmp_path)
    try:
        wait_for(lambda: any("Executing task" in log.read_text() for log in tmp_path.glob("logs/*.log")))
        errors = interrupt(process, signal.SIGTERM)
    finally:
        kill_all(process)
    assert process.returncode == 130
    assert errors.splitlines()[-1] == "interrupted" and "Traceback" not in errors


def test_help_answers_in_under_a_second():
    started = time.monotonic()
    result = dfpo("--help")
    assert time.monotonic() - started < 1.0
    assert all(name in result.stdout for name in ("run", "compile", "submit", "compare", "promote", "ui", "doctor", "config"))


BLOCKED = """
import sys

class Block:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {"torch", "transformers", "datasets", "matplotlib", "reasoning_gym", "math_verify"}:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Block())
from pipelines.cli import main
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["compile", str(TINY), "-o", "x.yaml"], 0),
        (["compare", str(TINY)], 0),
        (["config", str(TINY)], 0),
        (["promote", str(TINY), "--run", "0" * 32], 2),
        (["submit", str(TINY), "--host", "http://127.0.0.1:9", "--set", "tracking.uri=http://x", "--set", "cluster.retries=0"], 2),
    ],
)
def test_the_light_client_works_without_the_training_packages(arguments, code, tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", BLOCKED, *arguments, "--set", f"home={tmp_path}"]
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert result.returncode == code, result.stderr
    assert "No module named" not in result.stderr


def test_the_pipeline_file_is_a_command_of_its_own(tmp_path):
    command = [sys.executable, str(ROOT / "pipelines" / "dfpo_pipeline.py"), "compile", str(TINY), "-o", str(tmp_path / "x.yaml")]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    subprocess.run(command, cwd=tmp_path, env=environment, check=True, capture_output=True)
    assert (tmp_path / "x.yaml").stat().st_size > 10_000


def test_config_prints_what_the_pipeline_carries_and_every_description(tmp_path):
    values = json.loads(dfpo("config", TINY, "--set", "train.learning_rate=1e-6").stdout)
    assert values["train"]["learning_rate"] == 1e-6
    described = dfpo("config", TINY, "--describe").stdout
    assert any(line.startswith("train.samples_per_prompt ") and line.endswith("responses a prompt") for line in described.splitlines())


def test_ui_prints_the_command_that_serves_the_local_store(tmp_path):
    result = dfpo("ui", TINY, "--set", f"home={tmp_path}", "--port", "5055", "--dry-run")
    assert f"-m mlflow server --backend-store-uri sqlite:///{tmp_path}/mlflow.db" in result.stdout
    assert result.stdout.rstrip().endswith("--port 5055")


def test_doctor_names_versions_store_and_problems(tmp_path):
    result = dfpo("doctor", TINY, "--set", f"home={tmp_path / 'home'}")
    assert result.returncode == 0, result.stdout
    assert "mlflow" in result.stdout and result.stdout.splitlines()[-1] == "ready"
    broken = dfpo("doctor", TINY, "--set", f"home={tmp_path / 'home'}", "--set", "model=./gone")
    assert broken.returncode == 1
    assert "problem: model: " in broken.stdout
