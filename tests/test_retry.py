"""A training pod that is killed and tried again: the second one has an empty disk, and finds the state at train.checkpoint_uri."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT
from mlflow import MlflowClient
from training import rows_of_sums, tiny_config, write_rows

from dfpo_core import models, tracking

RUN = "3f1c"
# What KFP's executor does in the pod: call the component with artifacts that have a path. With "kill" the machine goes away right
# after the first checkpoint.
POD = """
import os, signal, sys
from types import SimpleNamespace
from components.train.component import train
from dfpo_core import checkpoint

config, parent, run, data, warm, outputs, kill = sys.argv[1:]
if kill == "kill":
    save = checkpoint.save
    def save_and_die(*arguments):
        save(*arguments)
        os.kill(os.getpid(), signal.SIGKILL)
    checkpoint.save = save_and_die
artifact = lambda path: SimpleNamespace(path=path, metadata={})
produced = [artifact(f"{outputs}/{name}") for name in ("policy", "critic", "metrics")]
print(train.python_func(config, parent, run, artifact(data), artifact(warm), *produced)[0])
"""


def pod(disk: Path, *arguments: object) -> subprocess.CompletedProcess:
    disk.mkdir()
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HOME": str(disk)}
    command = [sys.executable, "-c", POD, *map(str, arguments)]
    return subprocess.run(command, cwd=disk, env=environment, capture_output=True, text=True, timeout=200)


@pytest.fixture(scope="module")
def attempts(tmp_path_factory):
    """(first pod, second pod, MLflow client, folder of the checkpoints): a run of 4 steps, killed after the checkpoint of step 2."""
    folder = tmp_path_factory.mktemp("retry")
    uri = f"sqlite:///{folder / 'mlflow.db'}"
    train = {"algorithm": "grpo", "steps": 4, "save_every": 2, "checkpoint_uri": f"{folder}/state/{{run}}"}
    config = tiny_config("~/.dfpo", train, tracking={"uri": uri})
    tracking.ensure_store(config)
    parent = tracking.create_parent(config, RUN)
    models.save_policy(*models.load_policy("scratch:tiny", folder), folder / "warm")
    common = (config.to_json(), parent, RUN, write_rows(folder / "data", rows_of_sums()), folder / "warm")
    first = pod(folder / "pod-1", *common, folder / "pod-1" / "out", "kill")
    kept = [str(path.relative_to(folder / "state")) for path in (folder / "state").rglob("*.*")]
    second = pod(folder / "pod-2", *common, folder / "pod-2" / "out", "live")
    return first, second, MlflowClient(tracking_uri=uri), folder, kept


def test_the_first_pod_dies_and_leaves_its_state_under_the_name_of_the_run(attempts):
    first, _, _, _, kept = attempts
    assert first.returncode == -signal.SIGKILL, first.stderr
    assert sorted(kept) == [f"{RUN}/latest.json", f"{RUN}/step-00000002/policy/engine.pt", f"{RUN}/step-00000002/state.pt"]


def test_the_second_pod_resumes_by_itself_and_has_the_whole_curve(attempts):
    _, second, client, folder, _ = attempts
    assert second.returncode == 0, second.stderr
    run = client.get_run(second.stdout.split()[-1])
    assert run.data.params["resumed_from_step"] == "2"
    assert [point.step for point in client.get_metric_history(run.info.run_id, "reward/clean")] == [1, 2, 3, 4]
    assert (folder / "pod-2" / "out" / "policy" / "config.json").is_file()


def test_after_success_nothing_is_left_at_a_place_named_after_the_run(attempts):
    folder = attempts[3]
    assert list((folder / "state").iterdir()) == []
