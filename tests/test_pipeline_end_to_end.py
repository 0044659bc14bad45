"""The whole DAG on scratch:tiny, run once through the compiled YAML and KFP's local runner; these tests read what it left."""

from __future__ import annotations

import json
import re

import pytest

STEPS = ["preflight", "prepare_data", "noise_data", "sft", "train", "evaluate", "promote"]


@pytest.fixture(scope="module")
def parent(finished_run):
    experiment = finished_run.client.get_experiment_by_name("dfpo")
    found = finished_run.client.search_runs([experiment.experiment_id], "tags.`dfpo.step` = 'pipeline'")
    assert len(found) == 1
    return found[0]


@pytest.fixture(scope="module")
def steps(finished_run, parent):
    query = f"tags.`mlflow.parentRunId` = '{parent.info.run_id}'"
    return finished_run.client.search_runs([parent.info.experiment_id], query, order_by=["attributes.start_time ASC"])


def artifacts(client, run_id: str, path: str | None = None) -> set[str]:
    return {file.path for file in client.list_artifacts(run_id, path)}


def test_one_parent_run_ends_finished_with_the_tags_of_the_run(parent):
    assert parent.info.status == "FINISHED"
    tags = parent.data.tags
    assert (tags["dfpo.algorithm"], tags["dfpo.noise"], tags["dfpo.seed"]) == ("dfpo", "plausible@0.3", "1")


def test_every_step_is_one_finished_child_run_in_order(steps):
    assert [run.data.tags["dfpo.step"] for run in steps] == STEPS
    assert {run.info.status for run in steps} == {"FINISHED"}


def test_the_noise_rate_asked_for_and_the_rate_measured_are_logged(steps):
    metrics = steps[STEPS.index("noise_data")].data.metrics
    assert metrics["noise/rate_requested"] == 0.3
    # About 100 distinct single-digit sums: three standard deviations of a binomial share are 0.14.
    assert abs(metrics["noise/rate_measured"] - 0.3) < 0.14


def test_training_logs_its_metrics_over_the_steps(finished_run, steps):
    run = steps[STEPS.index("train")]
    names = {"policy", "critic", "rollout", "reward"}
    assert names <= {name.partition("/")[0] for name in run.data.metrics}
    rewards = next(name for name in run.data.metrics if name.startswith("reward/"))
    assert len(finished_run.client.get_metric_history(run.info.run_id, rewards)) == 3


def test_checkpoint_and_evaluation_are_artifacts(finished_run, steps):
    trained, evaluated = (steps[STEPS.index(name)].info.run_id for name in ("train", "evaluate"))
    assert "policy/config.json" in artifacts(finished_run.client, trained, "policy")
    assert {"evaluation/evaluation.json", "evaluation/answers.parquet", "evaluation/report.html"} <= artifacts(
        finished_run.client, evaluated, "evaluation"
    )


def test_evaluation_counts_agree_with_the_answers(finished_run, steps, tmp_path):
    import pyarrow.parquet as parquet

    folder = finished_run.client.download_artifacts(steps[STEPS.index("evaluate")].info.run_id, "evaluation", str(tmp_path))
    rows = parquet.read_table(f"{folder}/answers.parquet").to_pylist()
    with open(f"{folder}/evaluation.json", encoding="utf-8") as file:
        accuracy = json.load(file)["accuracy"]
    for model in ("base", "sft", "trained"):
        correct = [row["correct"] for row in rows if (row["model"], row["split"]) == (model, "id_test")]
        stated = next(e for e in accuracy if (e["model"], e["split"], e["domain"]) == (model, "id_test", "all"))
        assert len(correct) == stated["count"] == 30
        assert stated["mean"] == pytest.approx(sum(correct) / 30)


def test_the_policy_is_registered_as_candidate_and_loads_back(finished_run):
    from transformers import AutoModelForCausalLM

    client = finished_run.client
    version = client.get_model_version_by_alias("dfpo-tiny", "candidate")
    path = client.get_model_version_download_uri("dfpo-tiny", version.version).removeprefix("file://")
    assert AutoModelForCausalLM.from_pretrained(path).num_parameters() > 100_000


def test_the_command_prints_accuracies_registration_and_how_to_open_mlflow(finished_run):
    text = finished_run.result.stdout
    for title in ("base", "SFT", "DFPO", "DFPO - SFT"):
        assert re.search(rf"^{title} .*\[.*\].*\[.*\]", text, re.MULTILINE), title
    assert "registered: dfpo-tiny version 1, alias candidate" in text
    assert re.search(r"^gate: against sft: ", text, re.MULTILINE)
    assert f" ui --set home={finished_run.home}" in text


def test_without_a_terminal_the_screen_gets_one_line_a_step(finished_run):
    lines = finished_run.result.stderr.splitlines()
    assert lines[0].startswith("log: ")
    assert [line.split()[0] for line in lines[1:]] == [*STEPS, "close_run"]
    assert all(re.search(r" \d+\.\d s$", line) for line in lines[1:])


def test_the_log_has_what_the_steps_printed_and_the_intermediate_files_are_gone(finished_run):
    (log,) = (finished_run.home / "logs").iterdir()
    assert log.read_text(encoding="utf-8").count("KFP Executor") >= len(STEPS)
    assert list((finished_run.home / "outputs").iterdir()) == []


def test_compare_lists_the_run(finished_run, parent):
    from conftest import TINY, dfpo

    result = dfpo("compare", TINY, "--set", f"home={finished_run.home}")
    assert result.returncode == 0, result.stderr
    header, line = result.stdout.splitlines()
    assert header.split()[:3] == ["run", "name", "status"]
    assert line.startswith(parent.info.run_id)
    assert "plausible@0.3" in line
    assert "candidate" in line


def test_promote_repeats_the_decision_of_the_run(finished_run, parent):
    from conftest import TINY, dfpo

    result = dfpo("promote", TINY, "--set", f"home={finished_run.home}", "--run", parent.info.run_id)
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("version 1, alias candidate")
