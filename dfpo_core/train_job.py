"""Training on several nodes: the training step submits a Kubeflow TrainJob, streams its log and waits for it.

The job's pods and the step share a folder beside the resumable checkpoints, which must therefore be an object store or on the claim that
all pods mount. Each pod runs torchrun, told about the others by the runtime's environment (PET_NNODES, PET_NODE_RANK, PET_MASTER_ADDR, ..):

    torchrun --nproc-per-node N -m dfpo_core.train_job FOLDER
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem

from dfpo_core import distributed, launch
from dfpo_core.config import ClusterConfig, PipelineConfig
from dfpo_core.errors import UserError

INPUTS, OUTPUTS = ("data", "sft_checkpoint"), ("policy_output", "critic_output")
NODE = "node"  # of the runtime: the replicated job, and its container
POLL_SECONDS = 10
LOST_POLLS = 30  # in a row, after which the cluster's API counts as gone
LAST_LINES = 50  # of the other nodes' logs, where a job fails


def wanted(config: PipelineConfig) -> bool:
    """Whether the step runs in a pod of a pipeline that trains on several nodes; local runs ignore the cluster section."""
    return config.cluster.nodes > 1 and "KUBERNETES_SERVICE_HOST" in os.environ


def train(config: PipelineConfig, uri: str, run_id: str, arguments: dict[str, str], client=None) -> dict[str, float]:
    """Train in a TrainJob whose folder is `uri`, and wait for it. Returns the last step's metrics; raises what one of its processes raised.

    `client` is a kubeflow.trainer.TrainerClient (default: of this pod's service account and namespace). Raises RuntimeError where the
    job fails, and TimeoutError where cluster.timeout_seconds are over.
    """
    try:
        from kubeflow.trainer import TrainerClient
    except ImportError:
        raise UserError("cluster.nodes", "kubeflow is not installed in the image", "install dfpo[nodes], or use 1") from None
    client = client or TrainerClient()
    name = job_name(uri)
    _clear(client, name)  # an earlier try of this step may have left it, training into the same checkpoints
    _stage(config, uri, run_id, arguments)
    client.train(**request(config, uri, name))
    print(f"TrainJob {name}: {config.cluster.nodes} nodes, {config.processes_a_node} process(es) on each", flush=True)
    with _deleted_if_stopped(client, name):
        status = _wait(client, name, config.cluster.timeout_seconds or math.inf)
    for i in range(1, config.cluster.nodes if status == "Failed" else 1):  # the first node's log may only tell that another one is gone
        print(f"the end of the log of node {i}:", flush=True)
        _print_log(client, name, 0, f"{NODE}-{i}", LAST_LINES)
    fs, folder = url_to_fs(uri)
    with tempfile.TemporaryDirectory() as local:
        _download(fs, folder, local, depth=1)
        problem = "" if status == "Complete" else f"TrainJob {name} is {status}; its log is above"
        metrics = launch.result_of(Path(local), problem)
    for key in OUTPUTS:
        _download(fs, f"{folder}/{key}", arguments[key])
    return metrics


def job_name(uri: str) -> str:
    """The name of the job whose folder is `uri`: the same for every try of a step."""
    return "dfpo-" + hashlib.sha256(uri.encode()).hexdigest()[:16]


def request(config: PipelineConfig, uri: str, name: str) -> dict[str, Any]:
    """Arguments of TrainerClient.train: image, nodes, resources, and everything that the pipeline gives a training pod otherwise."""
    from kubeflow.trainer.options import ActiveDeadlineSeconds, Labels, Name, TrainerCommand
    from kubeflow.trainer.types.types import CustomTrainerContainer

    cluster = config.cluster
    memory, cpu = cluster.memory_limit or cluster.memory_request, cluster.cpu_limit or cluster.cpu_request
    resources = {"cpu": cpu, "memory": memory, cluster.gpu_type: str(cluster.gpu_count) if cluster.gpu_count else ""}
    container = CustomTrainerContainer(
        image=cluster.gpu_image,
        num_nodes=cluster.nodes,
        resources_per_node={key: amount for key, amount in resources.items() if amount},
        env={"MLFLOW_TRACKING_URI": config.tracking.uri, "OMP_NUM_THREADS": str(config.threads or 1)},
    )
    command = ["torchrun", "--nproc-per-node", str(config.processes_a_node), "-m", "dfpo_core.train_job", uri]
    options = [Name(name), TrainerCommand(command), _patch(cluster)]
    options += [Labels(dict(cluster.labels))] if cluster.labels else []
    options += [ActiveDeadlineSeconds(cluster.timeout_seconds)] if cluster.timeout_seconds else []
    return {"runtime": cluster.train_job_runtime, "trainer": container, "options": options}


def _patch(cluster: ClusterConfig):
    """Secrets, claim, shared memory, places and labels of the job's pods, as the pipeline's own training pod has them."""
    from kubeflow.trainer.options import kubernetes as k8s

    secrets = [{"name": secret, "key": key, "optional": True} for secret, keys in cluster.secrets for key in keys]
    env = [{"name": reference["key"], "valueFrom": {"secretKeyRef": reference}} for reference in secrets]
    volumes, mounts = [], []
    if cluster.pvc:
        volumes.append({"name": "checkpoints", "persistentVolumeClaim": {"claimName": cluster.pvc}})
        mounts.append({"name": "checkpoints", "mountPath": cluster.pvc_mount_path})
    if cluster.shm_size:
        volumes.append({"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": cluster.shm_size}})
        mounts.append({"name": "shm", "mountPath": "/dev/shm"})
    spec = k8s.PodSpecPatch(
        volumes=volumes or None,
        containers=[k8s.ContainerPatch(NODE, env=env or None, volume_mounts=mounts or None)] if env or mounts else None,
        image_pull_secrets=[{"name": name} for name in cluster.image_pull_secrets] or None,
        node_selector=dict(cluster.node_selector) or None,
        tolerations=[toleration.given for toleration in cluster.tolerations] or None,
    )
    pod = k8s.PodTemplatePatch(metadata={"labels": dict(cluster.labels)} if cluster.labels else None, spec=spec)
    job = k8s.ReplicatedJobPatch(NODE, k8s.JobTemplatePatch(spec=k8s.JobSpecPatch(pod)))
    return k8s.RuntimePatch(k8s.TrainingRuntimeSpecPatch(k8s.JobSetTemplatePatch(spec=k8s.JobSetSpecPatch([job]))))


def _clear(client, name: str) -> None:
    """Delete the job of this name, if there is one, and wait until it is gone."""
    if not _exists(client, name):
        return
    client.delete_job(name)
    while _exists(client, name):
        time.sleep(POLL_SECONDS / 10)


def _exists(client, name: str) -> bool:
    try:
        return bool(client.get_job(name))
    except RuntimeError as error:
        if getattr(error.__cause__, "status", None) == 404:
            return False
        raise


@contextmanager
def _deleted_if_stopped(client, name: str) -> Iterator[None]:
    """Delete the job where the step ends before it: cancelled with the pipeline run (SIGTERM), interrupted, or out of time."""

    def stop(*_) -> None:
        raise SystemExit(128 + signal.SIGTERM)

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    except (SystemExit, KeyboardInterrupt, TimeoutError):
        client.delete_job(name)
        raise
    finally:
        signal.signal(signal.SIGTERM, before)


def _wait(client, name: str, seconds: float) -> str:
    """Print the first node's log as it comes, until the job is Complete or Failed. Raises TimeoutError after so many seconds.

    A look that fails is made again; RuntimeError where LOST_POLLS in a row do.
    """
    deadline, seen, lost = time.monotonic() + seconds, 0, 0
    while True:
        try:
            status, lost = client.get_job(name).status, 0
        except (RuntimeError, TimeoutError) as error:
            status, lost = "Unknown", lost + 1
            print(f"TrainJob {name} cannot be seen now: {error.__cause__ or error}", flush=True)
            if lost == LOST_POLLS:
                raise RuntimeError(f"TrainJob {name} could not be seen {lost} times in a row; it may still run") from error
        if status not in ("Created", "Unknown"):
            seen = _print_log(client, name, seen)
        if status in ("Complete", "Failed"):
            return status
        if time.monotonic() > deadline:
            raise TimeoutError(f"TrainJob {name} ran past cluster.timeout_seconds ({seconds} s) and was deleted; a retry resumes")
        time.sleep(POLL_SECONDS)


def _print_log(client, name: str, seen: int, step: str = f"{NODE}-0", most: int = 0) -> int:
    """Print the lines of a node's log after the first `seen`, the last `most` of them (0: all). One that cannot be read now is told."""
    try:
        lines = list(client.get_job_logs(name, follow=False, step=step))
    except RuntimeError as error:
        print(f"the log of TrainJob {name} cannot be read now: {error.__cause__ or error}", flush=True)
        return seen
    for line in lines[seen:][-most:]:
        print(line, flush=True)
    return max(seen, len(lines))


def _stage(config: PipelineConfig, uri: str, run_id: str, arguments: dict[str, str]) -> None:
    """Put the job's description and its inputs into the folder; drop what an earlier try wrote there."""
    fs, folder = url_to_fs(uri)
    if fs.exists(folder):
        fs.rm(folder, recursive=True)
    fs.makedirs(folder, exist_ok=True)
    for key in INPUTS:
        _upload(fs, arguments[key], f"{folder}/{key}")
    job = {"config": config.to_json(), "run_id": run_id, "pipeline_run_id": arguments["pipeline_run_id"]}
    fs.pipe_file(f"{folder}/{launch.JOB}", json.dumps(job).encode())


def _upload(fs, source: str, folder: str) -> None:
    """Copy the files under the local folder `source`: one by one, since file systems disagree on what copying a folder into one means."""
    for path in sorted(Path(source).rglob("*")):
        if path.is_file():
            target = f"{folder}/{path.relative_to(source).as_posix()}"
            fs.makedirs(target.rsplit("/", 1)[0], exist_ok=True)
            fs.put_file(str(path), target)


def _download(fs, folder: str, target: str, depth: int | None = None) -> None:
    """Copy the files under `folder`, which may hold none, to the local folder `target`."""
    Path(target).mkdir(parents=True, exist_ok=True)
    for path in fs.find(folder, maxdepth=depth):
        local = Path(target, path[len(folder) :].lstrip("/"))
        local.parent.mkdir(parents=True, exist_ok=True)
        fs.get_file(path, str(local))


def main(uri: str) -> None:
    """One process of the job. Inputs come once a node, outputs go from the first process."""
    distributed.join()
    fs, folder = url_to_fs(uri)
    job = json.loads(fs.cat_file(f"{folder}/{launch.JOB}"))
    mounted = isinstance(fs, LocalFileSystem)
    # The processes of a node share a folder; nodes may share a machine, and torchrun numbers them.
    local = Path(folder) if mounted else Path(tempfile.gettempdir(), f"{job_name(uri)}-{os.environ.get('GROUP_RANK', '0')}")
    if not mounted and distributed.local_rank() == 0:
        shutil.rmtree(local, ignore_errors=True)
        for key in INPUTS:
            _download(fs, f"{folder}/{key}", str(local / key))
    distributed.barrier()
    arguments = {key: str(local / key) for key in INPUTS + OUTPUTS} | {"pipeline_run_id": job["pipeline_run_id"]}

    def finish() -> None:
        for key in () if mounted else OUTPUTS:
            _upload(fs, arguments[key], f"{folder}/{key}")

    launch.process(job, arguments, lambda name, text: fs.pipe_file(f"{folder}/{name}", text.encode()), finish)


if __name__ == "__main__":
    main(sys.argv[1])
