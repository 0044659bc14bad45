"""Tracking against a real MLflow store on SQLite."""

import http.server
import json
import math
import os
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pyarrow
import pyarrow.parquet as parquet
import pytest

from dfpo_core import tracking
from dfpo_core.config import parse_config
from dfpo_core.errors import UserError


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """One home for the file: creating a store takes seconds."""
    folder = tmp_path_factory.mktemp("home")
    tracking.ensure_store(configuration(folder))
    return folder


@pytest.fixture
def config(home):
    return configuration(home)


def configuration(home, **values):
    return parse_config({"home": str(home), "data": {"train": [{"kind": "jsonl", "name": "rows.jsonl"}]}, **values})


def client_of(config):
    return tracking.connect(tracking.tracking_uri(config))


def test_the_store_and_all_artifacts_lie_under_home(config, home):
    experiment = client_of(config).get_experiment_by_name("dfpo")
    assert (home / "mlflow.db").is_file()
    assert experiment.artifact_location == (home / "mlartifacts").as_uri()


def test_two_processes_race_for_a_fresh_store_and_share_one_experiment(tmp_path):
    code = (
        "import sys; from dfpo_core import tracking; from dfpo_core.config import parse_config\n"
        "print(tracking.ensure_store(parse_config({'home': sys.argv[1], 'data': {'train': [{'kind': 'jsonl', 'name': 'x'}]}})))"
    )
    racing = [
        subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "home")], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    outputs = [process.communicate(timeout=120) for process in racing]
    assert [process.returncode for process in racing] == [0, 0], outputs
    assert [out for out, _ in outputs] == ["1\n", "1\n"]
    assert [err for _, err in outputs] == ["", ""]  # MLflow's own chatter stays off the console


def test_a_retried_preflight_finds_the_parent_again(config):
    parent = tracking.create_parent(config, "retried")
    assert tracking.create_parent(config, "retried") == parent
    run = client_of(config).get_run(parent)
    assert run.data.params["train.algorithm"] == "dfpo"
    assert run.data.params["data.train.0.name"] == "rows.jsonl"
    assert run.data.tags["dfpo.config_sha256"] == config.sha256
    assert [file.path for file in client_of(config).list_artifacts(parent)] == ["config.yaml"]


def test_one_pipeline_run_id_cannot_hold_two_configurations(config, home):
    tracking.create_parent(config, "taken")
    with pytest.raises(UserError, match="another configuration"):
        tracking.create_parent(configuration(home, seed=2), "taken")


def test_a_step_is_a_finished_child_with_its_section_and_tags(home):
    config = configuration(home, seed=7, noise={"kind": "plausible", "rate": 0.3}, train={"reward_noise": {"flip_rate": 0.1}})
    parent = tracking.create_parent(config, "step")
    with tracking.step_run(config, "noise_data", parent) as step:
        step.log_metrics({"noise/rate": 0.25}, step=3)
    run = client_of(config).get_run(step.run_id)
    assert run.info.status == "FINISHED"
    params = run.data.params
    assert {name.partition(".")[0] for name in params} == {"model", "seed", "noise"}  # this step's sections, no others
    assert (params["model"], params["seed"], params["noise.kind"], params["noise.rate"]) == ("scratch:tiny", "7", "plausible", "0.3")
    assert run.data.metrics == {"noise/rate": 0.25}
    wanted = {
        "mlflow.parentRunId": parent,
        "mlflow.runName": "noise_data",
        "dfpo.step": "noise_data",
        "dfpo.algorithm": "dfpo",
        "dfpo.noise": "plausible@0.3+flip@0.1",
        "dfpo.seed": "7",
        "dfpo.pipeline_run_id": "step",
    }
    assert wanted.items() <= run.data.tags.items()


def test_a_value_longer_than_mlflow_allows_is_cut_and_says_so(config):
    with tracking.step_run(config, "preflight", "") as step:
        step.log_params({"long": "x" * 20_000, **{f"many.{i}": i for i in range(250)}})
    params = client_of(config).get_run(step.run_id).data.params
    assert len(params["long"]) == 6000 and params["long"].endswith("config.yaml of the parent run has it whole)")
    assert params["many.249"] == "249"


def test_a_metric_that_is_not_finite_is_named_and_the_others_are_kept(config):
    with tracking.step_run(config, "train", "") as step:
        step.log_metrics({"policy/loss": math.nan, "policy/kl": math.inf, "reward/mean": 0.5})
    run = client_of(config).get_run(step.run_id)
    assert run.data.metrics == {"reward/mean": 0.5}
    assert run.data.tags["dfpo.nonfinite_metrics"] == "policy/kl, policy/loss"


def test_tables_and_datasets_can_be_read_back(config, tmp_path):
    parquet.write_table(pyarrow.table({"question": ["a", "b"], "size": [1, 2]}), tmp_path / "train.parquet")
    with tracking.step_run(config, "train", "") as step:
        step.log_table("samples.json", [{"question": "a", "answer": "1"}])
        step.log_table("samples.json", [{"question": "b"}])
        step.log_dataset(tmp_path / "train.parquet", "train", "training", {"noise": "plausible@0.3"})
    client = client_of(config)
    path = client.download_artifacts(step.run_id, "samples.json", str(tmp_path))
    table = json.loads(Path(path).read_text())
    assert table["columns"] == ["question", "answer"] and [row[0] for row in table["data"]] == ["a", "b"]
    entry = client.get_run(step.run_id).inputs.dataset_inputs[0]
    assert entry.dataset.name == "train" and json.loads(entry.dataset.profile)["num_rows"] == 2
    assert {tag.key: tag.value for tag in entry.tags} == {"mlflow.data.context": "training", "noise": "plausible@0.3"}


def test_a_users_mistake_ends_with_one_line_and_code_2(config, capsys):
    parent = tracking.create_parent(config, "mistake")
    with pytest.raises(SystemExit) as end, tracking.step_run(config, "sft", parent) as step:
        raise UserError("sft.steps", "is wrong", "correct it")
    assert end.value.code == 2
    assert capsys.readouterr().err == "error: sft.steps: is wrong; correct it\n"
    client = client_of(config)
    assert client.get_run(step.run_id).info.status == "FAILED"
    for run_id in (step.run_id, parent):
        assert client.get_run(run_id).data.tags["dfpo.error"] == "sft.steps: is wrong; correct it"


def test_ctrl_c_ends_with_code_130_and_a_killed_run(config, capsys):
    with pytest.raises(SystemExit) as end, tracking.step_run(config, "train", "") as step:
        signal.raise_signal(signal.SIGINT)
    assert end.value.code == 130
    assert capsys.readouterr().err == "interrupted\n"
    assert client_of(config).get_run(step.run_id).info.status == "KILLED"


def test_any_other_failure_is_recorded_and_raised_again(config):
    parent = tracking.create_parent(config, "crash")
    with pytest.raises(ZeroDivisionError), tracking.step_run(config, "train", parent) as step:
        1 / 0  # noqa: B018
    client = client_of(config)
    assert client.get_run(step.run_id).info.status == "FAILED"
    for run_id in (step.run_id, parent):
        assert client.get_run(run_id).data.tags["dfpo.failure"] == "ZeroDivisionError: division by zero"


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_full_disk_is_one_line_and_code_2(config, capsys):
    with pytest.raises(SystemExit) as end, tracking.step_run(config, "sft", ""), open("/dev/full", "w") as file:
        file.write("x" * 100_000)
    assert end.value.code == 2
    assert "no space left on the disk" in capsys.readouterr().err


def test_a_retry_that_succeeds_is_a_new_child_and_clears_the_parent(config):
    parent = tracking.create_parent(config, "second-attempt")
    with pytest.raises(RuntimeError), tracking.step_run(config, "train", parent):
        raise RuntimeError("out of memory")
    with tracking.step_run(config, "train", parent):
        pass
    client = client_of(config)
    runs = tracking.children(client, client.get_run(parent).info.experiment_id, parent)
    assert [run.info.status for run in runs] == ["FAILED", "FINISHED"]
    assert not {"dfpo.failure", "dfpo.failed_step"} & client.get_run(parent).data.tags.keys()


@pytest.mark.parametrize(("status", "expected"), [("SUCCEEDED", "FINISHED"), ("FAILED", "FAILED"), ("CANCELLED", "KILLED")])
def test_the_exit_handler_closes_the_parent_and_steps_that_were_killed(config, status, expected):
    parent = tracking.create_parent(config, f"closing-{status}")
    client = client_of(config)
    experiment = client.get_run(parent).info.experiment_id
    killed = client.create_run(experiment, tags={"mlflow.parentRunId": parent}).info.run_id
    tracking.close_parent(config.to_json(), f"closing-{status}", status, "task train failed" if status == "FAILED" else "")
    run = client.get_run(parent)
    assert run.info.status == expected
    assert run.data.tags.get("dfpo.failure") == ("task train failed" if status == "FAILED" else None)
    assert client.get_run(killed).info.status == "KILLED"


def test_the_exit_handler_keeps_the_reason_that_the_step_gave(config):
    parent = tracking.create_parent(config, "own-words")
    with pytest.raises(RuntimeError), tracking.step_run(config, "train", parent):
        raise RuntimeError("out of memory")
    tracking.close_parent(config.to_json(), "own-words", "FAILED", "task train failed")
    assert client_of(config).get_run(parent).data.tags["dfpo.failure"] == "RuntimeError: out of memory"


def test_closing_a_run_that_preflight_refused_is_no_failure(config, capsys):
    tracking.close_parent(config.to_json(), "never-made", "FAILED")
    assert "preflight made none for never-made" in capsys.readouterr().err


def test_a_run_that_kubeflow_injected_is_resumed_and_its_parent_is_ours(config, monkeypatch):
    client = client_of(config)
    experiment = client.create_experiment("KFP-Default", artifact_location=(config.home_path / "kfp").as_uri())
    kubeflow_parent = client.create_run(experiment).info.run_id
    injected = client.create_run(experiment, tags={"mlflow.parentRunId": kubeflow_parent}).info.run_id
    monkeypatch.setenv("MLFLOW_RUN_ID", injected)
    assert tracking.create_parent(config, "injected") == kubeflow_parent
    with tracking.step_run(config, "preflight", kubeflow_parent) as step:
        step.log_metrics({"x": 1.0})
    assert step.run_id == injected
    assert client.get_run(injected).data.tags["dfpo.pipeline_run_id"] == "injected"
    tracking.close_parent(config.to_json(), "injected", "SUCCEEDED")
    assert client.get_run(kubeflow_parent).info.status == "FINISHED"
    monkeypatch.setenv("MLFLOW_RUN_ID", "0" * 32)  # made on another server
    with tracking.step_run(config, "sft", kubeflow_parent) as step:
        pass
    assert client.get_run(step.run_id).data.tags["mlflow.parentRunId"] == kubeflow_parent


def test_the_injected_server_is_used_only_with_an_injected_run(config, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://mlflow:5000")
    assert tracking.tracking_uri(config) == f"sqlite:///{config.home_path}/mlflow.db"
    monkeypatch.setenv("MLFLOW_RUN_ID", "a" * 32)
    assert tracking.tracking_uri(config) == "http://mlflow:5000"


def test_an_unreachable_server_is_one_line(home, capsys):
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))  # bound and not listening: connections are refused
        config = configuration(home, tracking={"uri": f"http://me:secret@127.0.0.1:{closed.getsockname()[1]}"})
        with pytest.raises(SystemExit) as end, tracking.step_run(config, "sft", ""):
            pass
    assert end.value.code == 2
    line = capsys.readouterr().err
    assert line.startswith("error: tracking.uri: no MLflow server answers at http://127.0.0.1") and line.count("\n") == 1


def test_a_server_that_never_answers_is_given_up_on(home, monkeypatch):
    monkeypatch.setattr(tracking, "REACHABLE_SECONDS", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as silent, pytest.raises(UserError, match="timed out"):
        tracking.ensure_store(configuration(home, tracking={"uri": f"http://127.0.0.1:{silent.getsockname()[1]}"}))


def test_a_server_that_is_not_mlflow_is_one_line(home):
    server = http.server.HTTPServer(("127.0.0.1", 0), http.server.BaseHTTPRequestHandler)  # answers 501 to everything
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        with pytest.raises(UserError, match=r"tracking\.uri: .* answers with HTTP 501"):
            tracking.ensure_store(configuration(home, tracking={"uri": f"http://127.0.0.1:{server.server_port}"}))
    finally:
        server.shutdown()
        server.server_close()


@pytest.mark.parametrize("uri", ["ftp://example", "file:///tmp/somewhere", "sqlite:////proc/no/mlflow.db"])
def test_a_store_of_a_kind_that_mlflow_refuses_is_one_line(home, uri):
    with pytest.raises(UserError, match=r"^tracking\.uri: "):
        tracking.ensure_store(configuration(home, tracking={"uri": uri}))


def test_a_deleted_experiment_is_named(config, home):
    gone = configuration(home, tracking={"experiment": "gone"})
    client_of(config).delete_experiment(tracking.ensure_store(gone))
    with pytest.raises(UserError, match=r"tracking\.experiment: 'gone' was deleted"):
        tracking.ensure_store(gone)


def test_nested_values_become_flat_names():
    assert tracking.flatten({"a": {"b": [1, 2], "c": [{"d": "x"}]}, "e": None}) == {"a.b": "[1, 2]", "a.c.0.d": "x", "e": None}
