"""Shared by the tests: the repository root, a command runner, and one run of the whole pipeline a session."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
TINY = ROOT / "pipelines" / "configs" / "tiny.yaml"
# A script and its arguments follow.
TWO_PROCESSES = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


def pytest_configure() -> None:
    """A shell's background job ignores ctrl-c, and so would everything it starts, the commands that the tests interrupt included."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


def dfpo(*arguments: object, cwd: Path | None = None, env: dict[str, str] | None = None, timeout: int = 250) -> subprocess.CompletedProcess:
    """Run the `dfpo` command in a process of its own."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **(env or {})}
    command = [sys.executable, "-m", "pipelines.cli", *map(str, arguments)]
    return subprocess.run(command, cwd=cwd or ROOT, env=environment, capture_output=True, text=True, timeout=timeout)


@dataclass(frozen=True)
class FinishedRun:
    """A pipeline run of the tiny profile: its home folder, how the command ended, and a client of its store."""

    home: Path
    result: subprocess.CompletedProcess

    @property
    def client(self):
        from mlflow import MlflowClient

        uri = f"sqlite:///{self.home / 'mlflow.db'}"
        return MlflowClient(tracking_uri=uri, registry_uri=uri)


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory) -> FinishedRun:
    """The whole DAG on scratch:tiny, through the compiled YAML and KFP's local runner, from a folder that is not the repository."""
    home = tmp_path_factory.mktemp("home")
    result = dfpo("run", TINY, "--set", f"home={home}", cwd=tmp_path_factory.mktemp("elsewhere"))
    assert result.returncode == 0, result.stdout + result.stderr
    return FinishedRun(home, result)
