"""`dfpo submit` and `dfpo recurring` with the real kfp.Client against a server that validates every request and every answer."""

from __future__ import annotations

import datetime
import os
import re
import subprocess
import sys

import pytest
from conftest import ROOT, TINY
from kfp_api import KfpServer, unknown_parameters

from dfpo_core.config import load_config
from dfpo_core.errors import UserError
from pipelines import cli, dfpo_pipeline, kfp_server, submission
from pipelines.dfpo_pipeline import compile_pipeline

COMPILED = submission.read_compiled(ROOT / "pipelines" / "dfpo_pipeline.yaml")[0]
FOR_CLUSTER = ["--set", "tracking.uri=http://mlflow.mlops.svc:5000", "--set", "train.checkpoint_uri=s3://bucket/dfpo/{run}"]
IMAGE = "registry.example/dfpo:0.1.0"
IMAGES = ["--set", f"cluster={{image: '{IMAGE}', gpu_image: '{IMAGE}', mlflow_secret: mlflow, object_store_secret: s3}}"]
POST = ("POST", "runs")


compiled_once: dict[str, str] = {}


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """The same waits, a hundred times shorter; a configuration compiled once; and a client that is in no cluster."""

    def compile_once(config, path):
        if config.to_json() not in compiled_once:
            compile_pipeline(config, path)
            compiled_once[config.to_json()] = path.read_text()
        path.write_text(compiled_once[config.to_json()])

    monkeypatch.setattr(dfpo_pipeline, "compile_pipeline", compile_once)
    monkeypatch.setattr(submission, "POLL_SECONDS", 0.1)
    monkeypatch.setattr(submission, "LONGEST_PAUSE", 0.4)
    monkeypatch.setattr(submission, "LOOK_AFTER_SECONDS", (0.01, 0.02, 0.04))
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)


@pytest.fixture
def serve():
    """Starts servers; afterwards none may have seen a request, or given an answer, that the API does not have."""
    servers = []

    def start(**options) -> KfpServer:
        servers.append(KfpServer(**options))
        return servers[-1]

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()
        assert server.violations == []


@pytest.fixture
def dfpo(capsys):
    """Runs the command in this process: (exit code, lines on stdout, lines on stderr)."""

    def run(*arguments: object) -> tuple[int, list[str], list[str]]:
        code = cli.main([str(argument) for argument in arguments])
        out, err = capsys.readouterr()
        return code, out.splitlines(), err.splitlines()

    return run


@pytest.fixture
def submit(dfpo):
    return lambda url, *more: dfpo("submit", TINY, *FOR_CLUSTER, *IMAGES, "--host", url, *more)


# ---------------------------------------------------------------------------------------------------------- one run


def test_a_submission_creates_one_run_with_typed_arguments(serve, submit):
    server = serve()
    given = ["--param", "steps=7", "--param", "gpu_count=2", "--param", "noise_rate=0.2", "--param", "model=scratch:tiny"]
    code, out, err = submit(server.url, *given, "--run-name", "seven", "--experiment", "trials", "--submission-id", "abc")
    assert (code, err) == (0, [])
    link = f"{server.url}/#/runs/details/r1"
    assert out == ["run r1", link, "MLflow http://mlflow.mlops.svc:5000: tag dfpo.pipeline_run_id = r1"]
    (body,) = server.bodies("runs")
    assert (body["display_name"], body["experiment_id"], body["description"]) == ("seven", "e1", "dfpo submission abc")
    assert body["runtime_config"]["parameters"] == {"steps": 7, "gpu_count": "2", "noise_rate": 0.2, "model": "scratch:tiny"}
    assert server.experiments["e1"]["display_name"] == "trials"
    assert not {"plugins_input", "service_account"} & body.keys()


def test_the_run_is_what_kfps_own_client_would_create(serve, submit, tmp_path):
    import kfp

    server, reference = serve(), serve()
    submit(server.url, "--param", "steps=7", "--run-name", "seven")
    config = load_config(TINY, [item for flag, item in zip((FOR_CLUSTER + IMAGES)[::2], (FOR_CLUSTER + IMAGES)[1::2], strict=True) if flag])
    compile_pipeline(config, tmp_path / "p.yaml")
    client = kfp.Client(host=reference.url, namespace="")
    client.create_run_from_pipeline_package(str(tmp_path / "p.yaml"), {"steps": 7}, run_name="seven", experiment_name="dfpo")
    (ours,), (theirs,) = server.bodies("runs"), reference.bodies("runs")
    assert set(ours) - set(theirs) == {"description"}
    assert {name: value for name, value in ours.items() if name != "description"} == theirs
    assert set(ours["pipeline_spec"]) == {"pipeline_spec", "platform_spec"}


def test_an_experiment_is_reused_by_name(serve, submit):
    server = serve()
    submit(server.url)
    submit(server.url)
    assert len(server.bodies("experiments")) == 1
    assert [run["experiment_id"] for run in server.runs.values()] == ["e1", "e1"]
    assert len({run["description"] for run in server.runs.values()}) == 2


def test_service_account_and_links_of_another_host(serve, submit):
    server = serve()
    _, out, _ = submit(server.url, "--service-account", "trainer", "--ui-host", "https://kubeflow.example/pipeline/")
    assert out[1] == "https://kubeflow.example/pipeline/#/runs/details/r1"
    assert server.runs["r1"]["service_account"] == "trainer"


def test_a_dry_run_sends_nothing(serve, submit):
    server = serve()
    code, out, _ = submit(server.url, "--param", "steps=7", "--dry-run")
    assert (code, out, server.requests) == (0, ["checked: 1 parameter(s) given, nothing sent"], [])


@pytest.mark.parametrize(
    ("choice", "sent"), [("on", {"mlflow": {"experiment_name": "dfpo"}}), ("off", {"mlflow": {"disabled": True}}), ("", None)]
)
def test_kfps_mlflow_plugin_is_told_what_to_do(serve, submit, choice, sent):
    page = {
        "mlflow": {"state": "PLUGIN_SUCCEEDED", "entries": {"run_url": {"value": "https://mlflow.example/runs/1", "render_type": "URL"}}}
    }
    server = serve(plugin_output=page if choice == "on" else None)
    _, out, _ = submit(server.url, *(["--mlflow-plugin", choice] if choice else []))
    assert server.bodies("runs")[0].get("plugins_input") == sent
    assert (out[2] == "https://mlflow.example/runs/1") == (choice == "on")


# ---------------------------------------------------------------------------------------------------------- who submits


def test_token_and_cookie_are_sent_with_every_request(serve, submit, tmp_path):
    (tmp_path / "token").write_text("secret\n")
    (tmp_path / "cookie").write_text("authservice_session=abc\n")
    for option, expected in (("token", "Bearer secret"), ("cookie", "authservice_session=abc")):
        server = serve(credentials=expected)
        code, _, err = submit(server.url, f"--{option}-file", tmp_path / option, "--wait")
        assert code == 0, err


def test_without_credentials_the_refusal_is_one_line(serve, submit):
    code, _, err = submit(serve(credentials="Bearer secret").url)
    assert code == 2
    assert re.fullmatch(r"error: --host: \S+ answered HTTP 401 \(.*\); give a valid token with --token-file", err[0])


def test_inside_a_cluster_the_pods_own_token_is_used(serve, dfpo, tmp_path, monkeypatch):
    server = serve(credentials="Bearer projected", multi_user=True)
    (tmp_path / "token").write_text("projected")
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "10.0.0.1")
    monkeypatch.setenv("KF_PIPELINES_SA_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.setattr(kfp_server, "IN_CLUSTER_URL", server.url)
    code, out, err = dfpo("submit", TINY, *FOR_CLUSTER, *IMAGES, "--namespace", "me", "--tracking-in-cluster")
    assert code == 0, err
    assert server.experiments["e1"]["namespace"] == "me"
    assert {query["namespace"] for method, path, query, _ in server.requests if (method, path) == ("GET", "experiments")} == {"me"}


def test_outside_a_cluster_a_host_is_needed(dfpo):
    code, _, err = dfpo("submit", TINY, *FOR_CLUSTER, *IMAGES)
    assert (code, err) == (2, ["error: --host: is missing, and this is no pod of a cluster; give the address of the KFP API server"])


def test_a_login_page_is_recognised(serve, submit):
    code, _, err = submit(serve(plan={("GET", "healthz"): "page"}).url)
    assert code == 2 and err[0].endswith("answered with a page, not as a KFP API server; check it, or log in: --token-file, --cookie-file")


@pytest.mark.parametrize(
    ("multi_user", "options", "expected"),
    [
        (True, [], "--namespace: is missing, and the server has many users"),
        (False, ["--namespace", "me"], "--namespace: is given, but the server has one user only"),
        (True, ["--namespace", "Me!"], "--namespace: 'Me!' is no namespace"),
    ],
)
def test_a_namespace_goes_with_a_server_of_many_users(serve, submit, multi_user, options, expected):
    code, _, err = submit(serve(multi_user=multi_user).url, *options)
    assert code == 2 and err[0].startswith(f"error: {expected}")


@pytest.mark.parametrize(
    ("content", "expected"),
    [(None, "cannot read"), ("", "is empty"), ("one\ntwo", "holds more than one line"), (b"\xff", "not text")],
)
def test_a_token_file_that_holds_no_token(submit, tmp_path, content, expected):
    if content is not None:
        (tmp_path / "token").write_bytes(content if isinstance(content, bytes) else content.encode())
    code, _, err = submit("http://127.0.0.1:9", "--token-file", tmp_path / "token")
    assert code == 2 and err[0].startswith("error: --token-file: ") and expected in err[0]


def test_an_untrusted_certificate_names_the_option(submit, tmp_path):
    """A TLS server with a certificate of its own making."""
    import ssl

    key = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "1", "-subj", "/CN=localhost"]
    key += ["-addext", "subjectAltName=IP:127.0.0.1", "-keyout", str(tmp_path / "key.pem"), "-out", str(tmp_path / "cert.pem")]
    try:
        subprocess.run(key, check=True, capture_output=True)
    except FileNotFoundError:
        pytest.skip("needs openssl")
    server = KfpServer()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tmp_path / "cert.pem", tmp_path / "key.pem")
    server.socket = context.wrap_socket(server.socket, server_side=True)
    try:
        url = f"https://127.0.0.1:{server.server_port}"
        code, _, err = submit(url)
        assert (code, err) == (2, [f"error: --host: the certificate of {url} is not trusted; name your authority's file with --ca-file"])
        code, _, err = submit(url, "--ca-file", tmp_path / "cert.pem")
        assert code == 0, err
    finally:
        server.shutdown()
        server.server_close()


# ---------------------------------------------------------------------------------------------------------- never twice


@pytest.mark.parametrize("answer", ["then drop", "then 500", "then 502", "then 503", "then page", "then hang", "then 504"])
def test_a_run_that_was_created_without_an_answer_is_found_and_not_created_again(serve, submit, answer):
    server = serve(plan={POST: answer})
    code, out, err = submit(server.url, "--timeout", "1")
    assert (code, err, out[0]) == (0, [], "run r1")
    assert len(server.bodies("runs")) == len(server.runs) == 1


@pytest.mark.parametrize("answer", ["drop", 500, 502, 503, 429, "page"])
def test_a_request_that_came_to_nothing_is_sent_again(serve, submit, answer):
    server = serve(plan={POST: [answer, answer]})
    code, out, err = submit(server.url)
    assert (code, err, out[0]) == (0, [], "run r1")
    assert len(server.bodies("runs")) == 3 and len(server.runs) == 1


def test_a_server_that_goes_on_failing_is_left_after_three_requests(serve, submit):
    server = serve(plan={POST: [503] * 9})
    code, _, err = submit(server.url, "--submission-id", "abc")
    assert code == 1 and len(err) == 1
    assert "answered HTTP 503 (refused with 503); no run has come of it so far; repeat the command with --submission-id abc" in err[0]
    assert len(server.bodies("runs")) == submission.ATTEMPTS == 3


@pytest.mark.parametrize("answer", ["hang", 504])
def test_a_request_that_may_still_be_at_work_is_not_sent_again(serve, submit, answer):
    server = serve(plan={POST: answer})
    code, _, err = submit(server.url, "--timeout", "1", "--submission-id", "abc")
    assert code == 1 and len(err) == 1 and "no run has come of it so far; repeat the command with --submission-id abc" in err[0]
    assert len(server.bodies("runs")) == 1


def test_where_the_runs_cannot_be_listed_either_nothing_is_sent_again(serve, submit):
    server = serve(plan={POST: "then 503", ("GET", "runs"): ["", 503, 503, 503]})
    code, _, err = submit(server.url, "--submission-id", "abc")
    assert code == 1 and "whether the run exists is unknown; repeat the command with --submission-id abc" in err[0]
    code, out, err = submit(server.url, "--submission-id", "abc")
    assert (code, err, out[0]) == (0, [], "run r1")
    assert len(server.bodies("runs")) == len(server.runs) == 1


def test_a_look_that_fails_once_is_repeated_before_anything_is_sent(serve, submit):
    server = serve(plan={POST: "then drop", ("GET", "runs"): [503, 503]})
    code, out, _ = submit(server.url)
    assert (code, out[0], len(server.runs)) == (0, "run r1", 1)


def test_a_repeated_command_with_the_same_submission_id_finds_the_run(serve, submit):
    server = serve()
    for _ in range(3):
        assert submit(server.url, "--submission-id", "abc")[:2][1][0] == "run r1"
    submit(server.url, "--submission-id", "abcd")
    assert len(server.runs) == 2


# ---------------------------------------------------------------------------------------------------------- one line for each failure


@pytest.mark.parametrize(
    ("plan", "code", "expected"),
    [
        ({("GET", "healthz"): 401}, 2, "answered HTTP 401"),
        ({("GET", "healthz"): 404}, 2, "answered HTTP 404 (Not Found); check --host"),
        ({("GET", "healthz"): 503}, 1, "answered HTTP 503"),
        ({("GET", "healthz"): "hang"}, 1, "within 1 s; check the server, or give it a longer --timeout"),
        ({("GET", "healthz"): "drop"}, 2, "no KFP API server answers at"),
        ({("GET", "experiments"): 403}, 2, "answered HTTP 403 (refused with 403); check the token's rights in --namespace"),
        ({("GET", "experiments"): "drop"}, 0, ""),
        ({("GET", "experiments"): ["drop"] * 9}, 1, "closed the connection without an answer"),
        ({("GET", "experiments"): "hang"}, 1, "within 1 s"),
        ({("POST", "experiments"): 500}, 1, "answered HTTP 500 (refused with 500); check the server's log"),
        ({POST: 400}, 2, "answered HTTP 400 (refused with 400); correct the request"),
        ({POST: 403}, 2, "answered HTTP 403 (refused with 403); check the token's rights"),
        ({POST: 409}, 2, "answered HTTP 409 (refused with 409); correct the request"),
    ],
)
def test_a_failure_is_one_line_and_the_exit_code_says_whose_it_is(serve, submit, plan, code, expected):
    server = serve(plan=plan)
    result, _, err = submit(server.url, "--timeout", "1")
    assert result == code, err
    if code:
        (line,) = err
        assert line.startswith("error: --host: ") and expected in line
        assert server.runs == {} and len(server.bodies("runs")) <= 1


def test_nobody_at_the_address_gives_one_line(submit):
    code, _, err = submit("127.0.0.1:9")
    assert code == 2 and len(err) == 1
    assert err[0].startswith("error: --host: no KFP API server answers at https://127.0.0.1:9")


def test_the_server_refuses_what_the_api_does_not_have(serve):
    """The check itself: wrong types, unknown properties and unknown query parameters do not pass."""
    import kfp
    from kfp_server_api import ApiException, V2beta1Run

    server = KfpServer()
    client = kfp.Client(host=server.url, namespace="")
    for wrong in ({"display_name": 7}, {"plugins_input": {"mlflow": "on"}}, {"state": "DONE"}, {"runtime_config": {"params": {}}}):
        with pytest.raises(ApiException) as raised:
            client.runs.run_service_create_run(V2beta1Run(**wrong))
        assert raised.value.status == 422
    assert len(server.violations) == 4 and server.runs == {}
    assert unknown_parameters("GET", "/apis/v2beta1/runs", {"page_size": "1", "experiment": "x"}) == {"experiment"}
    server.shutdown()
    server.server_close()


# ---------------------------------------------------------------------------------------------------------- recurring runs


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (
            ["--cron", "0 0 9 * * 1-5", "--max-concurrency", "2", "--no-catch-up"],
            {"trigger": {"cron_schedule": {"cron": "0 0 9 * * 1-5"}}, "max_concurrency": "2", "no_catchup": True, "mode": "ENABLE"},
        ),
        (
            ["--every", "6h", "--disabled"],
            {
                "trigger": {"periodic_schedule": {"interval_second": "21600"}},
                "max_concurrency": "1",
                "no_catchup": False,
                "mode": "DISABLE",
            },
        ),
    ],
)
def test_a_recurring_run(serve, submit, options, expected):
    server = serve()
    code, out, err = submit(server.url, *options, "--run-name", "nightly", "--mlflow-plugin", "on", "--param", "steps=5")
    assert code == 0, err
    assert out == ["recurring run r1", f"{server.url}/#/recurringrun/details/r1"]
    (body,) = server.bodies("recurringruns")
    assert {name: body[name] for name in expected} == expected
    assert (body["display_name"], body["runtime_config"]["parameters"]) == ("nightly", {"steps": 5})
    assert body["plugins_input"] == {"mlflow": {"experiment_name": "dfpo"}}
    assert server.runs == {}


def test_a_recurring_run_is_created_once_too(serve, submit):
    server = serve(plan={("POST", "recurringruns"): "then drop"})
    code, out, _ = submit(server.url, "--every", "1d")
    assert (code, out[0]) == (0, "recurring run r1")
    assert len(server.bodies("recurringruns")) == len(server.recurring_runs) == 1


def test_recurring_runs_are_listed_and_switched(serve, submit, dfpo):
    server = serve()
    submit(server.url, "--every", "1d", "--run-name", "nightly")
    assert dfpo("recurring", "list", "--host", server.url)[1] == ["r1  enable    nightly"]
    assert dfpo("recurring", "disable", "r1", "--host", server.url)[1] == ["disabled r1"]
    assert server.recurring_runs["r1"]["mode"] == "DISABLE"
    assert dfpo("recurring", "enable", "r1", "--host", server.url)[1] == ["enabled r1"]
    code, _, err = dfpo("recurring", "delete", "r9", "--host", server.url)
    assert code == 2 and "answered HTTP 404 (recurring_run_id r9 not found)" in err[0]
    code, _, err = dfpo("recurring", "enable", "--host", server.url)
    assert code == 2 and err[0].startswith("error: ID: ")


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--cron", "0 9 * * 1-5"], "--cron: '0 9 * * 1-5' has not six fields"),
        (["--cron", "0 0 9 * * 1-5", "--every", "6h"], "--cron: or --every"),
        (["--every", "6 hours"], "--every: '6 hours' is no interval"),
        (["--every", "0h"], "--every: '0h' is no interval"),
        (["--every", "1h", "--max-concurrency", "11"], "--max-concurrency: 11 is out of range"),
        (["--every", "1h", "--max-concurrency", "0"], "--max-concurrency: 0 is out of range"),
        (["--every", "1h", "--wait"], "--wait: does not go with a recurring run"),
        (["--disabled"], "--cron: or --every is missing"),
        (["--no-catch-up"], "--cron: or --every is missing"),
    ],
)
def test_a_schedule_that_makes_no_sense_is_refused(submit, options, expected):
    code, _, err = submit("http://127.0.0.1:9", *options)
    assert code == 2 and err[0].startswith(f"error: {expected}")


# ---------------------------------------------------------------------------------------------------------- waiting


def at(second: int) -> str:
    return datetime.datetime(2026, 1, 1, 0, 0, second, tzinfo=datetime.timezone.utc).isoformat()


def task(name: str, state: str, created: int = 0, error: str = "") -> dict:
    return {"display_name": name, "state": state, "create_time": at(created)} | ({"error": {"message": error}} if error else {})


def run_with(state: str, *tasks: dict) -> dict:
    return {"state": state, "run_details": {"task_details": list(tasks)}}


def test_waiting_prints_each_change_of_a_task_once(serve, submit):
    states = [
        {"state": "PENDING"},
        run_with("RUNNING", task("preflight-driver", "SUCCEEDED"), task("preflight", "RUNNING", 1)),
        run_with("RUNNING", task("preflight", "SUCCEEDED", 1), task("prepare-data", "RUNNING", 2)),
        run_with("RUNNING", task("preflight", "SUCCEEDED", 1), task("prepare-data", "RUNNING", 2)),
        run_with("SUCCEEDED", task("preflight", "SUCCEEDED", 1), task("prepare-data", "SUCCEEDED", 2)),
    ]
    code, _, err = submit(serve(states=states).url, "--wait")
    assert code == 0
    assert [line if line.startswith("MLflow") else line.split(maxsplit=1)[1] for line in err] == [
        "run           pending",
        "preflight     running",
        "run           running",
        "preflight     succeeded",
        "MLflow run: the one with tag dfpo.pipeline_run_id = r1",
        "prepare-data  running",
        "prepare-data  succeeded",
        "run           succeeded",
    ]


def test_a_retried_task_shows_its_latest_attempt(serve, submit):
    states = [
        run_with("RUNNING", task("train", "FAILED", 1, "node lost"), task("train", "RUNNING", 5)),
        run_with("SUCCEEDED", task("train", "SUCCEEDED", 5), task("train", "FAILED", 1, "node lost")),
    ]
    code, _, err = submit(serve(states=states).url, "--wait")
    assert code == 0
    assert [line.split()[1:] for line in err] == [["train", "running"], ["run", "running"], ["train", "succeeded"], ["run", "succeeded"]]


@pytest.mark.parametrize("state", ["FAILED", "CANCELED", "SKIPPED"])
def test_a_run_that_does_not_succeed_ends_with_code_1_and_its_reasons(serve, submit, state):
    server = serve(states=[run_with(state, task("train", "FAILED", 1, "out of memory\non node 3"))])
    code, _, err = submit(server.url, "--wait")
    assert code == 1
    assert err[-2:] == [
        "error: train: out of memory on node 3",
        f"error: the run ended as {state.lower()}; see {server.url}/#/runs/details/r1",
    ]


def test_waiting_survives_failed_polls_and_says_so_once(serve, submit):
    server = serve(states=["RUNNING", "SUCCEEDED"], plan={("GET", "runs/r1"): ["", 503, 502, "drop", "hang", 429]})
    code, _, err = submit(server.url, "--wait", "--timeout", "1")
    assert code == 0
    assert [line.split("  ", 1)[1].split("(")[0].strip() for line in err] == [
        "run           running",
        "run           no answer, trying again",
        "run           succeeded",
    ]


def test_waiting_gives_up_after_the_stated_time_and_the_run_goes_on(serve, submit):
    server = serve(states=["RUNNING"], plan={("GET", "runs/r1"): ["", *[503] * 99]})
    code, _, err = submit(server.url, "--wait", "--give-up-after", "1")
    assert code == 1
    assert "could not be read for 1 s" in err[-1] and f"the run goes on: see {server.url}/#/runs/details/r1" in err[-1]


def test_a_run_that_was_deleted_ends_the_wait(serve, submit):
    code, _, err = submit(serve(plan={("GET", "runs/r1"): 404}).url, "--wait")
    assert code == 2 and "answered HTTP 404" in err[-1]


def test_a_token_renewed_in_its_file_is_taken_up(serve, submit, tmp_path, monkeypatch):
    server = serve(states=["RUNNING", "SUCCEEDED"], credentials="Bearer first")
    token = tmp_path / "token"
    token.write_text("first")
    pauses = []

    def renew(seconds):
        server.credentials = "Bearer second"
        pauses.append(seconds)
        if len(pauses) == 2:  # one poll was refused
            token.write_text("second")

    monkeypatch.setattr(submission.time, "sleep", renew)
    code, _, err = submit(server.url, "--token-file", token, "--wait")
    assert code == 0, err
    assert "401" in err[1]


def test_ctrl_c_ends_the_watching_and_says_that_the_run_goes_on(serve, submit, monkeypatch):
    server = serve(states=["RUNNING"])

    def interrupt(seconds):
        raise KeyboardInterrupt

    monkeypatch.setattr(submission.time, "sleep", interrupt)
    code, _, err = submit(server.url, "--wait")
    assert code == 130
    assert err[-2:] == [f"the run goes on: {server.url}/#/runs/details/r1", "interrupted"]


def test_the_mlflow_parent_is_linked_once_preflight_made_it(serve, dfpo, tmp_path):
    """A real MLflow server, and a parent run made as preflight makes it."""
    import socket
    import time
    import urllib.request

    from dfpo_core import tracking

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    uri = f"http://127.0.0.1:{port}"
    command = [sys.executable, "-m", "mlflow", "server", "--backend-store-uri", f"sqlite:///{tmp_path}/m.db", "--workers", "1"]
    process = subprocess.Popen(
        [*command, "--port", str(port), "--default-artifact-root", str(tmp_path)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        for _ in range(1000):
            try:
                urllib.request.urlopen(f"{uri}/health", timeout=1).close()
                break
            except OSError:
                time.sleep(0.1)
        server = serve(states=[run_with("RUNNING", task("preflight", "SUCCEEDED", 1)), "SUCCEEDED"])
        overrides = [f"tracking.uri={uri}", "cluster.retries=0", f"home={tmp_path}"]
        run_id = tracking.create_parent(load_config(TINY, overrides), "r1")
        settings = [word for item in overrides for word in ("--set", item)]
        code, _, err = dfpo("submit", TINY, *settings, "--host", server.url, "--wait")
    finally:
        process.terminate()
        process.wait()
    assert code == 0, err
    (line,) = [line for line in err if line.startswith("MLflow run: ")]
    assert re.fullmatch(rf"MLflow run: {uri}/#/experiments/\d+/runs/{run_id}", line)


# ---------------------------------------------------------------------------------------------------------- arguments


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (["step=7"], "--param step: the pipeline has no such parameter; choose one of: algorithm, config"),
        (["steps=seven"], "--param steps: 'seven' is not a whole number"),
        (["steps=7.5"], "--param steps: '7.5' is not a whole number"),
        (["seed=9007199254740993"], "--param seed: '9007199254740993' is not a whole number"),
        (["noise_rate=high"], "--param noise_rate: 'high' is not a number"),
        (["noise_rate=nan"], "--param noise_rate: 'nan' is not a number"),
        (["noise_rate=inf"], "--param noise_rate: 'inf' is not a number"),
        (["gpu_count=two"], "--param gpu_count: 'two' is no whole number"),
        (["steps"], "--param: 'steps' has no '='"),
        (["steps=1", "steps=2"], "--param steps: is given twice"),
    ],
)
def test_arguments_are_checked_against_the_compiled_inputs(given, expected):
    with pytest.raises(UserError) as raised:
        submission.read_arguments(COMPILED, given)
    assert str(raised.value).startswith(expected)


def compiled_with(kind: str, **more) -> dict:
    return {"root": {"inputDefinitions": {"parameters": {"it": {"parameterType": kind, "isOptional": True} | more}}}}


@pytest.mark.parametrize(
    ("kind", "good", "value", "bad"),
    [
        ("BOOLEAN", "true", True, "yes"),
        ("BOOLEAN", "false", False, "1"),
        ("LIST", "[1, 2]", [1, 2], '{"a": 1}'),
        ("STRUCT", '{"a": 1}', {"a": 1}, "[1]"),
        ("STRING", "1", "1", None),
        ("NUMBER_DOUBLE", "1e-6", 1e-6, "1e-6x"),
        ("NUMBER_INTEGER", "-3", -3, ""),
    ],
)
def test_every_type_of_the_pipeline_spec_is_read_and_checked(kind, good, value, bad):
    spec = compiled_with(kind)
    assert submission.read_arguments(spec, [f"it={good}"]) == {"it": value}
    if bad is not None:
        with pytest.raises(UserError, match="--param it: "):
            submission.read_arguments(spec, [f"it={bad}"])


def test_a_parameter_without_a_default_is_needed():
    with pytest.raises(UserError, match="--param it: the pipeline needs it; add --param it=VALUE"):
        submission.read_arguments(compiled_with("STRING", isOptional=False), [])


def test_every_parameter_of_the_compiled_pipeline_can_be_given_as_text():
    inputs = COMPILED["root"]["inputDefinitions"]["parameters"]
    assert submission.read_arguments(COMPILED, [f"{name}=1" for name in inputs]).keys() == inputs.keys()


def test_a_value_that_the_pods_would_refuse_is_refused_here(submit):
    for given, field in (("noise_rate=1.5", "noise.rate"), ("seed=-2", "seed"), ("config={}", "data"), ("data=gym:x:y", "data")):
        code, _, err = submit("http://127.0.0.1:9", "--param", given)
        assert code == 2 and err[0].startswith(f"error: {field}: "), err


# ---------------------------------------------------------------------------------------------------------- checks on the client


@pytest.mark.parametrize(
    ("overrides", "fields"),
    [
        ([], ["tracking.uri", "train.checkpoint_uri"]),
        (["tracking.uri=http://mlflow.mlops.svc:5000", "cluster.retries=0"], []),
        (["home=/mnt/dfpo/home", "cluster.pvc=claim"], []),
        (["home=/elsewhere", "cluster.pvc=claim"], ["tracking.uri", "train.checkpoint_uri"]),
        (["home=/mnt/dfpo/home", "cluster={pvc: claim, gpu_count: 1, gpu_type: ''}"], ["cluster.gpu_type"]),
        (["tracking.uri=http://me:secret@mlflow.mlops.svc:5000", "cluster.retries=0"], ["tracking.uri"]),
        (["tracking.uri=http://127.0.0.1:9", "cluster.retries=0"], ["tracking.uri"]),
    ],
)
def test_what_a_pod_would_lose_or_not_reach_is_refused_before_submitting(overrides, fields):
    problems = submission.check_for_cluster(load_config(TINY, overrides))
    assert [problem.field for problem in problems] == fields


def test_a_tracking_server_that_only_pods_reach_must_be_declared():
    config = load_config(TINY, ["tracking.uri=http://127.0.0.1:9", "cluster.retries=0"])
    (problem,) = submission.check_for_cluster(config)
    assert str(problem).endswith("or, if only pods reach it, add --tracking-in-cluster") and str(problem).count("tracking.uri: ") == 1
    assert submission.check_for_cluster(config, tracking_in_cluster=True) == []


def test_recurring_runs_do_not_share_a_checkpoint(submit):
    code, _, err = submit("http://127.0.0.1:9", "--every", "1d", "--set", "train.checkpoint_uri=s3://bucket/dfpo")
    assert code == 2 and err[0].startswith("error: train.checkpoint_uri: is the same for every run")


def test_gpus_given_as_parameters_are_checked_with_their_type(submit):
    code, _, err = submit("http://127.0.0.1:9", "--param", "gpu_count=2", "--param", "gpu_type=")
    assert code == 2 and err[0].startswith("error: cluster.gpu_type: 2 GPUs asked for without a type")


@pytest.mark.parametrize(
    ("image", "pinned"),
    [
        ("registry.example/dfpo:0.1.0", True),
        ("registry.example/dfpo@sha256:" + "0" * 64, True),
        ("localhost:5000/dfpo:v2", True),
        ("localhost:5000/dfpo", False),
        ("registry.example/dfpo:latest", False),
        ("registry.example/dfpo", False),
        ("registry.example/dfpo2:main", False),
    ],
)
def test_an_image_is_pinned_by_digest_or_by_a_version(image, pinned):
    assert submission.is_pinned(image) == pinned


def test_warnings_name_the_field_and_do_not_stop_a_submission(serve, dfpo):
    server = serve()
    given = ["--param", "gpu_image=registry.example/dfpo:latest", "--set", "data.ood_test=[{kind: jsonl, name: /data/x.jsonl}]"]
    code, out, err = dfpo("submit", TINY, *FOR_CLUSTER, *given, "--host", server.url)
    assert (code, out[0]) == (0, "run r1")
    assert [line.partition(": ")[2].partition(";")[0] for line in err] == [
        "cluster.image: dfpo-cpu:0.1.0 names no registry",
        "cluster.gpu_image: registry.example/dfpo:latest can change between two pods of a run",
        "cluster.mlflow_secret: no credentials reach the pods",
        "cluster.object_store_secret: no credentials for train.checkpoint_uri reach the pods",
        "/data/x.jsonl: is not on cluster.pvc",
    ]
    on_volume = load_config(TINY, ["data.ood_test=[{kind: jsonl, name: /mnt/dfpo/x.jsonl}]", "cluster={pvc: claim, image: 'a.b/c:1'}"])
    assert [line for line in submission.warnings_for_cluster(on_volume) if "x.jsonl" in line] == []


def test_the_command_submits_from_a_process_of_its_own(serve, tmp_path):
    server = serve()
    command = [sys.executable, "-m", "pipelines.cli", "submit", str(TINY), *FOR_CLUSTER, *IMAGES, "--host", server.url]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout.startswith("run r1\n")
