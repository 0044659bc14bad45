"""A small Kubernetes API server with Kubeflow Trainer's objects: what it is sent must be a TrainJob of the SDK's models, and it runs it.

Every node of a job is a process on this machine that executes the job's command with the environment that the torch-distributed runtime
gives its pods (PET_NNODES, PET_NODE_RANK, PET_MASTER_ADDR, PET_MASTER_PORT).
"""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
import threading
from datetime import datetime, timezone
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from kubeflow_trainer_api import models

NAMESPACE = "me"
GROUP = "/apis/trainer.kubeflow.org/v1alpha1"
JOBS = f"{GROUP}/namespaces/{NAMESPACE}/trainjobs"
NODE_POD = {"containers": [{"name": "node", "image": "pytorch/pytorch"}]}
RUNTIME = {
    "apiVersion": "trainer.kubeflow.org/v1alpha1",
    "kind": "ClusterTrainingRuntime",
    "metadata": {"name": "torch-distributed", "labels": {"trainer.kubeflow.org/framework": "torch"}},
    "spec": {
        "mlPolicy": {"numNodes": 1, "torch": {"numProcPerNode": "auto"}},
        "template": {
            "spec": {
                "replicatedJobs": [
                    {
                        "name": "node",
                        "template": {
                            "metadata": {"labels": {"trainer.kubeflow.org/trainjob-ancestor-step": "trainer"}},
                            "spec": {"template": {"spec": NODE_POD}},
                        },
                    }
                ]
            }
        },
    },
}


class TrainerServer:
    """`jobs` holds TrainJobs by name, `requests` what was asked. `runs`: whether jobs are executed.

    `log_fails` and `job_fails` are the next reads of a log and of a job that get a 500.
    """

    def __init__(self, folder: Path, runs: bool = True):
        self.folder, self.runs, self.log_fails = folder, runs, 0
        self.job_fails = 0
        self.jobs: dict[str, dict[str, Any]] = {}
        self.processes: dict[str, list[subprocess.Popen]] = {}
        self.requests: list[tuple[str, str]] = []
        handler = type("Handler", (_Handler,), {"server_state": self})
        self.http = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        threading.Thread(target=self.http.serve_forever, daemon=True).start()

    def client(self):
        from kubeflow.common.types import KubernetesBackendConfig
        from kubeflow.trainer import TrainerClient
        from kubernetes import client

        configuration = client.Configuration(host=f"http://127.0.0.1:{self.http.server_port}")
        return TrainerClient(KubernetesBackendConfig(namespace=NAMESPACE, client_configuration=configuration))

    def close(self) -> None:
        for name in list(self.processes):
            self.delete(name)
        self.http.shutdown()
        self.http.server_close()

    def create(self, body: dict[str, Any]) -> dict[str, Any]:
        models.TrainerV1alpha1TrainJob.from_dict(body)  # raises where a field is not the API's
        name = body["metadata"]["name"]
        now = datetime.now(timezone.utc).isoformat()
        job = body | {"metadata": body["metadata"] | {"namespace": NAMESPACE, "creationTimestamp": now}}
        self.jobs[name] = job
        trainer = body["spec"]["trainer"]
        if self.runs:
            with socket.socket() as free:
                free.bind(("127.0.0.1", 0))
                port = free.getsockname()[1]
            self.processes[name] = [self._node(name, trainer, i, port) for i in range(trainer["numNodes"])]
        return job

    def _node(self, name: str, trainer: dict[str, Any], i: int, port: int) -> subprocess.Popen:
        first, *rest = trainer["command"]
        assert first == "torchrun"
        environment = os.environ | {variable["name"]: variable.get("value", "") for variable in trainer["env"]}
        environment |= {"PET_NNODES": str(trainer["numNodes"]), "PET_NODE_RANK": str(i)}
        environment |= {"PET_MASTER_ADDR": "127.0.0.1", "PET_MASTER_PORT": str(port)}
        with self.log(name, i).open("w") as log:
            command = [sys.executable, "-m", "torch.distributed.run", *rest]
            return subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT)

    def log(self, name: str, i: int) -> Path:
        return self.folder / f"{name}-node-{i}.log"

    def show(self, name: str) -> dict[str, Any]:
        codes = [process.poll() for process in self.processes.get(name, [])]
        condition = ""
        if codes and any(codes):  # neither running (None) nor succeeded (0)
            condition = "Failed"
        elif codes and all(code == 0 for code in codes):
            condition = "Complete"
        now = datetime.now(timezone.utc).isoformat()
        told = {"type": condition, "status": "True", "reason": "Test", "message": "", "lastTransitionTime": now}
        return self.jobs[name] | ({"status": {"conditions": [told]}} if condition else {})

    def pods(self, name: str) -> list[dict[str, Any]]:
        pods = []
        for i, process in enumerate(self.processes.get(name, [])):
            code = process.poll()
            labels = {"jobset.sigs.k8s.io/replicatedjob-name": "node", "batch.kubernetes.io/job-completion-index": str(i)}
            phase = "Running" if code is None else "Failed" if code else "Succeeded"
            pods.append({"metadata": {"name": f"{name}-node-{i}", "labels": labels}, "spec": NODE_POD, "status": {"phase": phase}})
        return pods

    def delete(self, name: str) -> None:
        self.jobs.pop(name, None)
        for process in self.processes.pop(name, []):
            process.terminate()
            process.wait()


class _Handler(BaseHTTPRequestHandler):
    server_state: TrainerServer

    def log_message(self, *_) -> None:
        pass

    def _answer(self, code: int, body: Any) -> None:
        text = (body if isinstance(body, str) else json.dumps(body)).encode()
        self.send_response(code)
        self.send_header("Content-Type", "text/plain" if isinstance(body, str) else "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def _respond(self) -> None:
        state, url = self.server_state, urlsplit(self.path)
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        state.requests.append((self.command, url.path))
        job = re.fullmatch(rf"{JOBS}/([^/]+)", url.path)
        log = re.fullmatch(rf"/api/v1/namespaces/{NAMESPACE}/pods/([^/]+)-node-(\d+)/log", url.path)
        if self.command == "POST" and url.path == JOBS:
            self._answer(201, state.create(json.loads(body)))
        elif self.command == "GET" and url.path == JOBS:
            kind = {"apiVersion": "trainer.kubeflow.org/v1alpha1", "kind": "TrainJobList", "metadata": {}}
            self._answer(200, kind | {"items": [state.show(name) for name in state.jobs]})
        elif job and state.job_fails and self.command == "GET":
            state.job_fails -= 1
            self._answer(500, {"kind": "Status", "message": "the API server restarts"})
        elif job and job[1] in state.jobs and self.command == "GET":
            self._answer(200, state.show(job[1]))
        elif job and job[1] in state.jobs and self.command == "DELETE":
            state.delete(job[1])
            self._answer(200, {"kind": "Status", "status": "Success"})
        elif url.path == f"{GROUP}/clustertrainingruntimes/torch-distributed":
            self._answer(200, RUNTIME)
        elif url.path == f"/api/v1/namespaces/{NAMESPACE}/pods":
            name = re.search(r"jobset-name%3D([^,&%]+)", url.query)[1]
            self._answer(200, {"kind": "PodList", "apiVersion": "v1", "metadata": {}, "items": state.pods(name)})
        elif log and state.log_fails:
            state.log_fails -= 1
            self._answer(500, {"kind": "Status", "message": "the node is gone"})
        elif log:
            self._answer(200, state.log(log[1], int(log[2])).read_text())
        else:
            self._answer(404, {"kind": "Status", "reason": "NotFound", "code": 404})

    do_GET = do_POST = do_DELETE = _respond  # noqa: N815
