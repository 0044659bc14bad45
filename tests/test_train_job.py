"""Training on several nodes: the TrainJob that is asked for, and a job of two nodes that really trains, on an API server of our own."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import sys
import threading

import pytest
from mlflow import MlflowClient

from dfpo_core import launch, train, train_job
from dfpo_core.config import parse_config
from dfpo_core.errors import UserError
from dfpo_core.models import load_policy
from dfpo_core.preflight import check_nodes
from tests.trainer_api import NAMESPACE, TrainerServer
from tests.training import rows_of_sums, tiny_config, warm_checkpoint, write_rows

CLUSTER = {
    "nodes": 2,
    "gpu_count": 4,
    "gpu_image": "registry.example/dfpo-gpu:1",
    "cpu_request": "8",
    "memory_request": "64Gi",
    "memory_limit": "128Gi",
    "shm_size": "16Gi",
    "node_selector": {"zone": "a"},
    "tolerations": [{"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}],
    "pvc": "checkpoints",
    "pvc_mount_path": "/mnt/dfpo",
    "mlflow_secret": "mlflow-auth",
    "hub_secret": "hub-auth",
    "object_store_secret": "s3-auth",
    "image_pull_secrets": ["pull-auth"],
    "labels": {"team": "rl"},
    "timeout_seconds": 3600,
}


@pytest.fixture(scope="module")
def warm(tmp_path_factory) -> str:
    return warm_checkpoint(tmp_path_factory.mktemp("warm"))


@pytest.fixture
def server(tmp_path, monkeypatch):
    monkeypatch.setattr(train_job, "POLL_SECONDS", 0.5)
    server = TrainerServer(tmp_path)
    yield server
    server.close()


def step(server, monkeypatch, folder, warm, settings=None, cluster=None):
    """The training step as a pod runs it: (metrics, MLflow run id, MLflow client)."""
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "127.0.0.1")
    client = server.client()
    monkeypatch.setattr("kubeflow.trainer.TrainerClient", lambda: client)
    uri = f"sqlite:///{folder / 'mlflow.db'}"
    small = {"steps": 2, "checkpoint_uri": str(folder / "shared" / "{run}")} | (settings or {})
    pods = {"nodes": 2, "gpu_image": "dfpo:1", "cpu_request": "1", "memory_request": "2Gi", "shm_size": ""} | (cluster or {})
    config = tiny_config(folder / "home", small, tracking={"uri": uri}, cluster=pods)
    data = write_rows(folder / "data", rows_of_sums())
    found = train.run(config, "", "run", str(data), warm, str(folder / "policy"), str(folder / "critic"))
    return *found, MlflowClient(tracking_uri=uri)


def test_the_job_asks_for_all_that_the_configuration_says(server, tmp_path):
    server.runs = False
    config = tiny_config(tmp_path, tracking={"uri": "http://mlflow.mlops.svc:5000"}, cluster=CLUSTER)
    server.client().train(**train_job.request(config, "s3://bucket/run-job", "dfpo-1"))
    job = server.jobs["dfpo-1"]
    assert job["metadata"]["labels"] == {"team": "rl"} and job["metadata"]["namespace"] == NAMESPACE
    spec = job["spec"]
    assert spec["runtimeRef"] == {"name": "torch-distributed", "kind": "ClusterTrainingRuntime"} | spec["runtimeRef"]
    assert spec["activeDeadlineSeconds"] == 3600
    trainer = spec["trainer"]
    assert (trainer["image"], trainer["numNodes"]) == ("registry.example/dfpo-gpu:1", 2)
    assert trainer["command"] == ["torchrun", "--nproc-per-node", "4", "-m", "dfpo_core.train_job", "s3://bucket/run-job"]
    asked = {"cpu": "8", "memory": "128Gi", "nvidia.com/gpu": "4"}
    assert trainer["resourcesPerNode"]["requests"] == asked == trainer["resourcesPerNode"]["limits"]
    assert {"name": "MLFLOW_TRACKING_URI", "value": "http://mlflow.mlops.svc:5000"} in trainer["env"]
    (patch,) = spec["runtimePatches"]
    (node,) = patch["trainingRuntimeSpec"]["template"]["spec"]["replicatedJobs"]
    pod = node["template"]["spec"]["template"]
    assert node["name"] == "node" and pod["metadata"]["labels"] == {"team": "rl"}
    assert pod["spec"]["nodeSelector"] == {"zone": "a"}
    assert pod["spec"]["tolerations"] == CLUSTER["tolerations"]
    assert pod["spec"]["imagePullSecrets"] == [{"name": "pull-auth"}]
    volumes = {volume["name"]: volume for volume in pod["spec"]["volumes"]}
    assert volumes["checkpoints"]["persistentVolumeClaim"]["claimName"] == "checkpoints"
    assert volumes["shm"]["emptyDir"] == {"medium": "Memory", "sizeLimit": "16Gi"}
    (container,) = pod["spec"]["containers"]
    assert {(mount["name"], mount["mountPath"]) for mount in container["volumeMounts"]} == {
        ("checkpoints", "/mnt/dfpo"),
        ("shm", "/dev/shm"),
    }
    secrets = {e["name"]: e["valueFrom"]["secretKeyRef"] for e in container["env"]}
    assert secrets["HF_TOKEN"] == {"name": "hub-auth", "key": "HF_TOKEN", "optional": True}
    assert {"MLFLOW_TRACKING_TOKEN", "AWS_SECRET_ACCESS_KEY"} <= set(secrets)


def test_a_bare_configuration_asks_for_nothing_more(server, tmp_path):
    server.runs = False
    config = tiny_config(tmp_path, cluster={"nodes": 3, "shm_size": "", "memory_request": "", "cpu_request": ""})
    server.client().train(**train_job.request(config, "/mnt/dfpo/run-job", "dfpo-1"))
    spec = server.jobs["dfpo-1"]["spec"]
    assert spec["trainer"]["numNodes"] == 3 and "activeDeadlineSeconds" not in spec
    assert not spec["trainer"].get("resourcesPerNode", {}).get("requests")


def test_one_secret_may_hold_the_keys_of_several_purposes(server, tmp_path):
    server.runs = False
    config = tiny_config(tmp_path, cluster={"nodes": 2, "mlflow_secret": "all", "hub_secret": "all", "object_store_secret": "all"})
    server.client().train(**train_job.request(config, "s3://bucket/run-job", "dfpo-1"))
    (patch,) = server.jobs["dfpo-1"]["spec"]["runtimePatches"]
    (node,) = patch["trainingRuntimeSpec"]["template"]["spec"]["replicatedJobs"]
    (container,) = node["template"]["spec"]["template"]["spec"]["containers"]
    assert {"HF_TOKEN", "MLFLOW_TRACKING_TOKEN", "AWS_SECRET_ACCESS_KEY"} <= {variable["name"] for variable in container["env"]}


def test_two_nodes_train_as_one_process_does_whatever_an_earlier_try_left(server, monkeypatch, tmp_path, warm, capfd):
    left = tmp_path / "shared" / "run-job"
    left.mkdir(parents=True)
    (left / launch.RESULT).write_text(json.dumps({"critic/loss": -1.0}))
    name = "dfpo-" + hashlib.sha256(str(left).encode()).hexdigest()[:16]
    server.runs = False
    server.client().train(**train_job.request(tiny_config(tmp_path, cluster={"nodes": 2}), str(left), name))
    server.runs = True
    metrics, run_id, client = step(server, monkeypatch, tmp_path, warm)
    order = [method for method, path in server.requests if path.endswith(("trainjobs", name)) and method != "GET"]
    assert order == ["POST", "DELETE", "POST"] and list(server.jobs) == [name]
    run = client.get_run(run_id)
    assert run.info.status == "FINISHED" and run.data.params["processes"] == "2"
    assert [point.step for point in client.get_metric_history(run_id, "critic/loss")] == [1, 2]
    assert load_policy(str(tmp_path / "policy"), tmp_path)[0] and (tmp_path / "critic" / "critic.json").is_file()
    assert f"TrainJob {name}: 2 nodes, 1 process(es) on each" in capfd.readouterr().out
    alone = tmp_path / "alone"
    config = tiny_config(alone, {"steps": 2})
    data = write_rows(tmp_path / "data", rows_of_sums())
    one, _ = train.run(config, "", "alone", str(data), warm, str(alone / "policy"), str(alone / "critic"))
    for key in ("critic/loss", "policy/loss", "policy/gradient_norm", "reward/clean"):
        assert metrics[key] == pytest.approx(one[key], rel=1e-4, abs=1e-6)


def test_a_store_that_is_not_mounted_is_copied_from_and_to(server, monkeypatch, tmp_path, warm):
    config = tiny_config(tmp_path / "home", {"steps": 1}, tracking={"uri": f"sqlite:///{tmp_path / 'mlflow.db'}"}, cluster={"nodes": 2})
    data = write_rows(tmp_path / "data", rows_of_sums())
    run = MlflowClient(tracking_uri=config.tracking.uri).create_run("0")
    arguments = {"data": str(data), "sft_checkpoint": warm, "policy_output": str(tmp_path / "policy")}
    arguments |= {"critic_output": str(tmp_path / "critic"), "pipeline_run_id": "run"}
    store = f"dir://job::file://{tmp_path / 'store'}"
    metrics = train_job.train(config, store, run.info.run_id, arguments, server.client())
    assert "critic/loss" in metrics
    assert load_policy(str(tmp_path / "policy"), tmp_path)[0] and (tmp_path / "critic" / "critic.json").is_file()
    assert (tmp_path / "store" / "job" / "policy_output" / "config.json").is_file()


def test_a_mistake_found_on_a_node_is_the_steps_one_line(server, monkeypatch, tmp_path, warm, capfd):
    server.log_fails = 1
    with pytest.raises(SystemExit) as ended:
        step(server, monkeypatch, tmp_path, warm, {"prompts_per_step": 3})
    captured = capfd.readouterr()
    assert ended.value.code == 2
    assert "error: train.prompts_per_step: 3 prompts in 1 minibatches do not divide among 2 processes" in captured.err
    assert "cannot be read now" in captured.out


def test_a_node_that_dies_fails_the_step_and_its_log_is_shown(server, monkeypatch, tmp_path, warm, capfd):
    with pytest.raises(RuntimeError, match="TrainJob dfpo-[0-9a-f]{16} is Failed; its log is above"):
        step(server, monkeypatch, tmp_path, broken(warm, tmp_path))
    assert "Traceback" in capfd.readouterr().out


def broken(warm, folder) -> str:
    """A copy of the checkpoint whose weights are no weights."""
    shutil.copytree(warm, folder / "broken")
    (folder / "broken" / "model.safetensors").write_bytes(b"nothing")
    return str(folder / "broken")


@pytest.fixture
def waiting(server, tmp_path):
    """A client of a server on which the job dfpo-1 waits for its pods for ever."""
    server.runs = False
    client = server.client()
    client.train(**train_job.request(tiny_config(tmp_path, cluster={"nodes": 2}), "/mnt/run-job", "dfpo-1"))
    return client


def test_a_job_past_its_time_is_deleted(server, waiting):
    message = r"TrainJob dfpo-1 ran past cluster.timeout_seconds \(1 s\)"
    with pytest.raises(TimeoutError, match=message), train_job._deleted_if_stopped(waiting, "dfpo-1"):
        train_job._wait(waiting, "dfpo-1", 1)
    assert not server.jobs


def test_a_cancelled_step_takes_its_job_along(server, waiting):
    before = signal.getsignal(signal.SIGTERM)
    threading.Timer(1.0, os.kill, (os.getpid(), signal.SIGTERM)).start()
    with pytest.raises(SystemExit) as ended, train_job._deleted_if_stopped(waiting, "dfpo-1"):
        train_job._wait(waiting, "dfpo-1", 60)
    assert ended.value.code == 143
    assert not server.jobs
    assert signal.getsignal(signal.SIGTERM) is before


def test_an_api_server_that_is_away_for_a_while_is_asked_again(server, waiting, monkeypatch, capsys):
    server.job_fails = 2
    with pytest.raises(TimeoutError):
        train_job._wait(waiting, "dfpo-1", 2)
    assert capsys.readouterr().out.count("cannot be seen now") == 2
    monkeypatch.setattr(train_job, "LOST_POLLS", 3)
    server.job_fails = 100
    with pytest.raises(RuntimeError, match="could not be seen 3 times in a row; it may still run"):
        train_job._wait(waiting, "dfpo-1", 60)
    assert server.jobs  # it is not known whether it runs


@pytest.mark.parametrize(
    ("uri", "tracking", "cluster", "field"),
    [
        ("", "http://mlflow:5000", {}, "train.checkpoint_uri"),
        ("/data/{run}", "http://mlflow:5000", {"pvc": "claim"}, "train.checkpoint_uri"),
        ("s3://bucket/{run}", "", {}, "tracking.uri"),
        ("s3://bucket/{run}", "http://mlflow:5000", {}, None),
        ("/mnt/dfpo/{run}", "http://mlflow:5000", {"pvc": "claim"}, None),
    ],
)
def test_nodes_must_see_one_store(tmp_path, uri, tracking, cluster, field):
    config = tiny_config(tmp_path, {"checkpoint_uri": uri}, tracking={"uri": tracking}, cluster={"nodes": 2} | cluster)
    if field is None:
        return check_nodes(config)
    with pytest.raises(UserError) as refused:
        check_nodes(config)
    assert refused.value.field == field
    check_nodes(parse_config(config.model_dump() | {"cluster": {}}))  # one node has no such need


def test_a_local_run_ignores_the_nodes(tmp_path, monkeypatch):
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    assert not train_job.wanted(tiny_config(tmp_path, cluster={"nodes": 2}))


def test_an_image_without_the_sdk_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "kubeflow.trainer", None)
    with pytest.raises(UserError, match="cluster.nodes: kubeflow is not installed in the image"):
        train_job.train(tiny_config(tmp_path, cluster={"nodes": 2}), "s3://bucket/job", "run", {})
