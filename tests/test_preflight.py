"""Preflight: everything wrong with a configuration, one line each, before anything runs."""

import json
import os
import socket
import subprocess
import sys

import pytest

from dfpo_core import preflight, tracking
from dfpo_core.config import parse_config
from dfpo_core.errors import UserError

UNCHANGED = {"train.algorithm": "", "noise.rate": -1.0, "seed": -1}


@pytest.fixture
def values(tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"question": "1+1", "answer": "2"}\n')
    return {"home": str(tmp_path / "home"), "data": {"train": [{"kind": "jsonl", "name": str(rows)}]}}


def lines(values, **changes):
    return [str(problem) for problem in preflight.check(parse_config(values | changes))]


def test_a_sound_configuration_has_no_problem(values):
    assert lines(values) == []


def test_every_problem_is_found_at_once(values):
    found = lines(
        values,
        model="scratch:huge",
        noise={"rate": 0.3},
        train={"algorithm": "dppo"},
        tracking={"uri": "http://127.0.0.1:9"},
        cluster={"gpu_count": 2, "gpu_type": ""},
        data={"train": [{"kind": "parquet", "name": "absent.parquet"}], "ood_test": [{"kind": "jsonl", "name": "absent.jsonl"}]},
    )
    assert [line.split(":")[0] for line in found] == [
        "model",
        "data.train.0.name",
        "data.ood_test.0.name",
        "noise.kind",
        "train.algorithm",
        "tracking.uri",
        "cluster.gpu_type",
    ]
    assert "dfpo" in found[4]  # an unknown name lists the known ones


def test_a_wrong_option_of_the_critic_is_found(values):
    (line,) = lines(values, train={"critic": {"no_such_option": 1}})
    assert line.startswith("train.critic.no_such_option: ")


def test_an_unknown_reasoning_gym_family_names_its_neighbours(values):
    pytest.importorskip("reasoning_gym")
    (line,) = lines(values, data={"train": [{"kind": "reasoning_gym", "name": "chain_sums", "size": 10}]})
    assert line.startswith("data.train.0.name: unknown reasoning-gym family 'chain_sums'; choose e.g. chain_sum")


def test_an_empty_data_file_is_named(values, tmp_path):
    (tmp_path / "empty.jsonl").touch()
    (line,) = lines(values, data={"train": [{"kind": "jsonl", "name": str(tmp_path / "empty.jsonl")}]})
    assert "empty.jsonl is empty" in line


def test_a_data_folder_that_is_not_there_is_named(values):
    (line,) = lines(values, data=values["data"] | {"folder": "/no/such/folder"})
    assert line == "data.folder: there is no folder /no/such/folder; give an existing folder, or leave it empty"


def test_a_home_inside_a_file_is_refused(values, tmp_path):
    assert lines(values, home=str(tmp_path / "rows.jsonl" / "home"))[0].startswith("home: cannot write")


def test_too_little_disk_is_named_with_both_numbers(values, monkeypatch):
    monkeypatch.setattr(preflight, "SCRATCH_FREE_BYTES", 1 << 60)
    (line,) = lines(values)
    assert line.startswith("home: ") and f"{(1 << 60) >> 20} MiB needed" in line


def test_checking_needs_no_torch(values, tmp_path):
    """With torch unimportable, as in the light client."""
    (tmp_path / "torch.py").write_text("raise ImportError('torch was imported')")
    code = (
        "import sys, importlib.util, json; import importlib\n"
        "found = importlib.util.find_spec; importlib.util.find_spec = lambda name, *a: None if name == 'torch' else found(name, *a)\n"
        "from dfpo_core import preflight, promote; from dfpo_core.config import parse_config\n"
        "print(preflight.check(parse_config(json.loads(sys.argv[1]))), 'mlflow' in sys.modules)"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])}
    done = subprocess.run([sys.executable, "-c", code, json.dumps(values)], capture_output=True, text=True, env=environment)
    assert done.stdout == "[] False\n", done.stderr


def test_parameters_of_the_ui_replace_values_and_sentinels_leave_them(values):
    config = json.dumps(values | {"seed": 5, "noise": {"kind": "plausible", "rate": 0.3}})
    assert preflight.with_overrides(config, UNCHANGED) == parse_config(json.loads(config))
    changed = preflight.with_overrides(config, {"noise.kind": "symmetric", "noise.rate": 0.0, "seed": 0, "train.learning_rate": 1e-6})
    assert (changed.noise.kind, changed.noise.rate, changed.seed, changed.train.learning_rate) == ("symmetric", 0.0, 0, 1e-6)


def test_choosing_no_noise_also_drops_the_rate(values):
    config = json.dumps(values | {"noise": {"kind": "plausible", "rate": 0.3}})
    assert preflight.with_overrides(config, {"noise.kind": "none", "noise.rate": -1.0}).noise.rate == 0


@pytest.mark.parametrize(
    ("reference", "source"),
    [
        ("gym:chain_sum:300", {"kind": "reasoning_gym", "name": "chain_sum", "size": 300}),
        ("gym:chain_sum", {"kind": "reasoning_gym", "name": "chain_sum", "size": 70}),  # as many rows as it replaces
        ("folder/rows.JSONL", {"kind": "jsonl", "name": "folder/rows.JSONL"}),
        ("s3://bucket/rows.parquet", {"kind": "parquet", "name": "s3://bucket/rows.parquet"}),
        ("openai/gsm8k", {"kind": "hub", "name": "openai/gsm8k"}),
        ("gsm8k", {"kind": "dataset", "name": "gsm8k"}),
    ],
)
def test_a_data_reference_names_a_source(reference, source):
    assert preflight.source_of(reference, [{"size": 50}, {"size": 20}]) == source


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"noise.rate": 1.5}, "noise.rate"),
        ({"noise.rate": -0.5}, "noise.rate"),
        ({"noise.kind": "loud"}, "noise.kind"),
        ({"train.steps": 0}, "train.steps"),
        ({"train.learning_rate": float("nan")}, "train.learning_rate"),
        ({"seed": 2**31}, "seed"),
    ],
)
def test_a_parameter_out_of_range_is_one_line_that_names_the_field(values, changes, field):
    with pytest.raises(UserError, match=rf"^{field}: ") as error:
        preflight.with_overrides(json.dumps(values), changes)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("config", ["{", "[1]", "null"])
def test_a_configuration_that_is_no_json_object_is_refused(config):
    with pytest.raises(UserError, match="^config: "):
        preflight.with_overrides(config, {"seed": 3})


def test_a_generator_size_that_is_no_number_is_refused(values):
    with pytest.raises(UserError, match="^data: "):
        preflight.with_overrides(json.dumps(values), {}, data="gym:chain_sum:many")


def test_run_prints_one_line_a_problem_and_ends_with_code_2(values, capsys):
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        values["tracking"] = {"uri": f"http://127.0.0.1:{closed.getsockname()[1]}"}
        with pytest.raises(SystemExit) as end:
            preflight.run(json.dumps(values), "bad", model="scratch:huge", algorithm="dppo")
    assert end.value.code == 2
    errors = capsys.readouterr().err.splitlines()
    assert [line.split(": ")[1] for line in errors] == ["model", "train.algorithm", "tracking.uri"]
    assert not os.path.exists(values["home"])  # nothing half-made


def test_run_returns_the_resolved_configuration_and_a_parent_run(values):
    resolved, parent = preflight.run(json.dumps(values), "good", noise_kind="symmetric", noise_rate=0.2, seed=4, steps=3)
    config = parse_config(json.loads(resolved))
    assert (config.noise.kind, config.noise.rate, config.seed, config.train.steps) == ("symmetric", 0.2, 4, 3)
    client = tracking.connect(tracking.tracking_uri(config))
    run = client.get_run(parent)
    assert run.info.status == "RUNNING" and run.data.tags["dfpo.pipeline_run_id"] == "good"
    (child,) = tracking.children(client, run.info.experiment_id, parent)
    assert child.data.tags["dfpo.step"] == "preflight" and child.info.status == "FINISHED"
    assert child.data.params["packages.python"] == sys.version.split()[0]
    assert child.data.metrics["preflight/free_bytes"] > 0


def test_a_cache_folder_that_cannot_be_written_to_is_named(monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setenv("HF_HOME", str(tmp_path / "file" / "huggingface"))  # not even root can write there
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "new" / "triton"))
    monkeypatch.delenv("TORCH_EXTENSIONS_DIR", raising=False)
    assert [str(problem) for problem in preflight.check_cache_folders()] == [
        f"HF_HOME: {tmp_path}/file/huggingface cannot be written to; name a folder under /tmp"
    ]
