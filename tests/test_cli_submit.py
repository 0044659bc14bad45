"""Submission with the real kfp.Client against a small HTTP server: arguments checked first, one line for each failure, one POST a run."""

from __future__ import annotations

import json
import socket
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import yaml
from conftest import ROOT, TINY, dfpo

from dfpo_core.config import load_config
from dfpo_core.errors import UserError
from pipelines.submission import check_for_cluster, read_arguments

COMPILED = ROOT / "pipelines" / "dfpo_pipeline.yaml"
FOR_CLUSTER = ["--set", "tracking.uri=http://mlflow:5000", "--set", "train.checkpoint_uri=s3://bucket/dfpo"]


class ApiServer(ThreadingHTTPServer):
    """Answers the KFP API's paths that a submission uses; `fail` maps a path's last part to a status, or to "hang"."""

    def __init__(self, fail=None, states=("SUCCEEDED",)):
        super().__init__(("127.0.0.1", 0), Handler)
        self.fail, self.states, self.requests = fail or {}, list(states), []
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def bodies(self, path: str) -> list[dict]:
        return [body for method, where, body, _ in self.requests if (method, where) == ("POST", path)]


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        self.answer(None)

    def do_POST(self):
        self.answer(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

    def answer(self, body):
        path = self.path.partition("?")[0].removeprefix("/apis/v2beta1/")
        self.server.requests.append((self.command, path, body, self.headers.get("Authorization")))
        failure = self.server.fail.get((self.command, path))
        if failure == "hang":
            time.sleep(5)
            return
        if failure == "drop":
            self.connection.shutdown(socket.SHUT_RDWR)
            return
        status = failure if isinstance(failure, int) else 200
        self.reply(status, {"message": f"refused with {status}"} if status != 200 else self.content(path))

    def content(self, path: str) -> dict:
        if path == "healthz":
            return {"multi_user": False}
        if path == "experiments":
            return {} if self.command == "GET" else {"experiment_id": "e1", "display_name": "dfpo"}
        states = self.server.states
        return {"run_id": "r1", "state": states.pop(0) if len(states) > 1 and self.command == "GET" else states[0]}

    def reply(self, status: int, value: dict) -> None:
        data = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_):
        """Keep the test's output clean."""


@pytest.fixture
def serve():
    servers = []

    def start(**options) -> ApiServer:
        servers.append(ApiServer(**options))
        return servers[-1]

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def submit(url: str, *more: str):
    return dfpo("submit", TINY, *FOR_CLUSTER, "--host", url, *more)


def test_a_submission_sends_the_compiled_pipeline_with_typed_arguments_once(serve, tmp_path):
    server = serve()
    (tmp_path / "token").write_text("secret\n")
    more = ["--param", "steps=7", "--param", "gpu_count=2", "--param", "noise_rate=0.2", "--run-name", "seven"]
    result = submit(server.url, *more, "--token-file", str(tmp_path / "token"), "--wait")
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines() == ["run r1", f"{server.url}/#/runs/details/r1"]
    (body,) = server.bodies("runs")
    assert body["display_name"] == "seven" and body["experiment_id"] == "e1"
    assert body["runtime_config"]["parameters"] == {"steps": 7, "gpu_count": "2", "noise_rate": 0.2}
    sent = body["pipeline_spec"].get("pipeline_spec", body["pipeline_spec"])
    assert sent["pipelineInfo"]["name"] == "dfpo"
    assert {token for *_, token in server.requests} == {"Bearer secret"}
    assert result.stderr.split()[-1] == "succeeded"


def test_waiting_for_a_run_that_fails_ends_with_code_1(serve):
    result = submit(serve(states=["FAILED"]).url, "--wait")
    assert result.returncode == 1
    assert result.stderr.split()[-1] == "failed"


@pytest.mark.parametrize(
    ("failure", "expected"),
    [
        ({("GET", "healthz"): 401}, "answered HTTP 401"),
        ({("GET", "healthz"): 503}, "answered HTTP 503"),
        ({("POST", "runs"): 400}, "answered HTTP 400 (refused with 400); correct the request"),
        ({("POST", "runs"): 403}, "answered HTTP 403 (refused with 403); check the token"),
        ({("POST", "runs"): 500}, "answered HTTP 500 (refused with 500); check the server's log"),
        ({("POST", "runs"): "hang"}, "within 2 s; the run may exist all the same: look for it in the KFP UI"),
        ({("POST", "runs"): "drop"}, "closed the connection without an answer; the run may exist"),
        ({("GET", "healthz"): "hang"}, "no KFP API server answers"),
    ],
)
def test_a_server_that_fails_gives_one_line_and_never_a_second_post(serve, failure, expected):
    server = serve(fail=failure)
    result = submit(server.url, "--timeout", "2")
    assert result.returncode == 2
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: --host: ") and expected in line
    assert len(server.bodies("runs")) <= 1


def test_nobody_at_the_address_gives_one_line():
    result = submit("127.0.0.1:9")
    assert result.returncode == 2
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: --host: no KFP API server answers at https://127.0.0.1:9")


@pytest.mark.parametrize(
    ("argument", "expected"),
    [
        ("step=7", "--param step: the pipeline has no such parameter; choose one of: algorithm, config"),
        ("steps=seven", "--param steps: 'seven' is not a whole number"),
        ("steps=7.5", "--param steps: '7.5' is not a whole number"),
        ("noise_rate=high", "--param noise_rate: 'high' is not a number"),
        ("gpu_count=two", "--param gpu_count: 'two' is no whole number"),
        ("steps", "--param: 'steps' has no '='"),
    ],
)
def test_arguments_are_checked_against_the_compiled_inputs(argument, expected):
    with pytest.raises(UserError) as raised:
        read_arguments(COMPILED, [argument])
    assert str(raised.value).startswith(expected)


def test_every_parameter_of_the_compiled_pipeline_can_be_given_as_text():
    inputs = next(yaml.safe_load_all(COMPILED.read_text()))["root"]["inputDefinitions"]["parameters"]
    assert read_arguments(COMPILED, [f"{name}=1" for name in inputs]).keys() == inputs.keys()


@pytest.mark.parametrize(
    ("overrides", "fields"),
    [
        ([], ["tracking.uri", "train.checkpoint_uri"]),
        (["tracking.uri=http://mlflow:5000", "cluster.retries=0"], []),
        (["home=/mnt/dfpo/home", "cluster.pvc=claim"], []),
        (["home=/elsewhere", "cluster.pvc=claim"], ["tracking.uri", "train.checkpoint_uri"]),
        (["tracking.uri=http://x", "train.checkpoint_uri=s3://b/x", "cluster={gpu_count: 1, gpu_type: ''}"], ["cluster.gpu_type"]),
    ],
)
def test_what_a_pod_would_lose_is_refused_before_submitting(overrides, fields):
    assert [problem.field for problem in check_for_cluster(load_config(TINY, overrides))] == fields
