"""Starting the processes of a training step: torchrun on this machine, one process a GPU.

The step's own process keeps the MLflow run and waits; process 0 writes metrics and artifacts into that run. What a process raises comes
back as what the step raises, so a user's mistake is one line and exit code 2 wherever it is found.

    python -m torch.distributed.run --standalone --nproc-per-node N -m dfpo_core.launch FOLDER
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dfpo_core import distributed, tracking
from dfpo_core.config import PipelineConfig, TrainConfig
from dfpo_core.errors import TrainingDiverged, UserError

JOB, RESULT, FAILURE = "job.json", "result.json", "failure-{rank}.json"


def processes(config: PipelineConfig) -> int:
    """Processes that train on this machine. Raises UserError for more than it has GPUs."""
    import torch

    gpus = torch.cuda.device_count()
    if gpus and config.train.processes > gpus:
        raise UserError("train.processes", f"{config.train.processes} processes for {gpus} GPUs", f"use 0 to {gpus}")
    return config.train.processes or gpus or 1


def check_shares(settings: TrainConfig, count: int) -> None:
    """Raise UserError where `count` processes cannot have equal shares of every minibatch, or cannot train the algorithm at all."""
    from dfpo_core import algorithms

    if settings.prompts_per_step % (settings.minibatches * count):
        problem = f"{settings.prompts_per_step} prompts in {settings.minibatches} minibatches do not divide among {count} processes"
        raise UserError("train.prompts_per_step", problem, f"use a multiple of {settings.minibatches * count}")
    if settings.engine != "torch" and algorithms.resolve(settings).guided:
        raise UserError("train.engine", f"{settings.algorithm} samples with two models at once", "use torch")


def train(config: PipelineConfig, count: int, run_id: str, arguments: dict[str, str]) -> dict[str, float]:
    """Train in `count` processes of this machine and wait for them. Returns the last step's metrics; raises what one of them raised."""
    with tempfile.TemporaryDirectory() as folder:
        job = {"config": config.to_json(), "run_id": run_id, "arguments": arguments}
        Path(folder, JOB).write_text(json.dumps(job))
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count), "-m", "dfpo_core.launch", folder]
        code = subprocess.run([sys.executable, *launcher], env=os.environ | {"OMP_NUM_THREADS": str(config.threads or 1)}).returncode
        return result_of(Path(folder), f"a training process ended with code {code}; its traceback is above" if code else "")


def result_of(folder: Path, problem: str) -> dict[str, float]:
    """What process 0 left in `folder`; raises what the first failed process left there, or else RuntimeError where there is a problem."""
    failures = sorted(folder.glob(FAILURE.format(rank="*")), key=lambda path: path.stat().st_mtime_ns)
    for failure in (json.loads(path.read_text()) for path in failures):
        if failure["kind"] == "UserError":
            raise UserError(*failure["arguments"])
        if failure["kind"] == "TrainingDiverged":
            raise TrainingDiverged(*failure["arguments"])
    if problem or not (folder / RESULT).is_file():
        raise RuntimeError(problem or "training ended without a result; its log is above")
    return json.loads((folder / RESULT).read_text())


def main(folder: Path) -> None:
    """One process of the step."""
    job = json.loads((folder / JOB).read_text())
    distributed.join()
    process(job, job["arguments"], lambda name, text: (folder / name).write_text(text))


def process(
    job: dict[str, Any], arguments: dict[str, str], write: Callable[[str, str], Any], finish: Callable[[], None] | None = None
) -> None:
    """Train as `job` says, and `write` what came of it, a name and its text. Process 0 calls `finish` before it tells that it is done."""
    from dfpo_core.train import work

    config = PipelineConfig.model_validate_json(job["config"])
    try:
        first = distributed.rank() == 0
        run = tracking.attach(config, job["run_id"]) if first else tracking.Unlogged()
        summary = work(config, run, **arguments)
        if first:
            if finish:
                finish()
            write(RESULT, json.dumps(summary))
        distributed.leave()
    except (UserError, TrainingDiverged) as error:
        told = [error.field, error.problem, error.fix] if isinstance(error, UserError) else [str(error)]
        write(FAILURE.format(rank=distributed.rank()), json.dumps({"kind": type(error).__name__, "arguments": told}))
        sys.exit(2)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
