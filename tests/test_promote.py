"""The promotion gate by hand-computed cases, and the registry on a real MLflow store."""

import json

import pytest
import yaml

from dfpo_core import promote, tracking
from dfpo_core.config import PromoteConfig, parse_config
from dfpo_core.errors import UserError


def evaluation(id_low=0.02, ood_low=-0.01, champion="", **changes):
    """The part of evaluation.json that the gate reads; the other comparison holds values that must not be used."""
    rival, other = ("champion", "sft") if champion else ("sft", "base")
    differences = []
    for split, low in (("id_test", id_low), ("ood_test", ood_low)):
        if low is not None:
            place = {"first": "trained", "split": split, "domain": "all", "count": 50}
            differences.append(place | {"second": other, "mean": 0.9, "low": 0.9, "high": 0.9})
            differences.append(place | {"second": rival, "domain": "sums", "mean": 0.9, "low": 0.9, "high": 0.9})
            differences.append(place | {"second": rival, "mean": low + 0.03, "low": low, "high": low + 0.06})
    return {"champion_version": champion, "differences": differences, **changes}


@pytest.mark.parametrize(
    ("id_low", "ood_low", "gate", "promoted"),
    [
        (0.02, -0.01, {}, True),
        (0.0, 0.0, {}, False),  # a bound of exactly the margin is not above it
        (-0.001, 0.5, {}, False),
        (0.02, -0.05, {}, True),  # a bound of exactly the allowed loss still holds
        (0.02, -0.051, {}, False),
        (0.02, -0.01, {"min_id_gain": 0.02}, False),
        (-0.05, 0.0, {"min_id_gain": -0.1}, True),
        (0.02, -0.001, {"max_ood_loss": 0.0}, False),
        (0.02, 0.0, {"max_ood_loss": 0.0}, True),
        (0.02, None, {}, True),  # no out-of-domain questions
    ],
)
@pytest.mark.parametrize("champion", ["", "3"])
def test_the_gate_decides_by_both_lower_bounds(id_low, ood_low, gate, promoted, champion):
    decision = promote.decide(evaluation(id_low, ood_low, champion), PromoteConfig(**gate))
    assert decision.promoted is promoted
    assert (decision.rival, decision.id_low, decision.ood_low) == ("champion" if champion else "sft", id_low, ood_low)


def test_a_refusal_names_every_bound_that_failed():
    reason = promote.decide(evaluation(-0.1, -0.2), PromoteConfig()).reason
    assert reason == (
        "against sft: the in-domain lower bound -0.1000 is not above +0.0000 and the out-of-domain lower bound -0.2000 is below -0.0500"
    )


def test_an_evaluation_without_the_comparison_is_refused():
    with pytest.raises(UserError, match="no paired difference of trained and champion"):
        promote.decide(evaluation() | {"champion_version": "3"}, PromoteConfig())


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    folder = tmp_path_factory.mktemp("home")
    tracking.ensure_store(configuration(folder, "unused"))
    return folder


def configuration(home, model):
    return parse_config(
        {"home": str(home), "data": {"train": [{"kind": "jsonl", "name": "x"}]}, "promote": {"registered_model": model}, "name": model}
    )


class Trained:
    """A pipeline run up to evaluate: a parent, and a train run with a policy artifact."""

    def __init__(self, config, tmp_path, run="run", files=("config.json",)):
        policy = tmp_path / run / "policy"
        policy.mkdir(parents=True)
        for name in files:
            (policy / name).write_text("{}")
        self.config, self.folder = config, tmp_path / run
        self.parent = tracking.create_parent(config, f"{config.name}-{run}")
        self.client = tracking.connect(tracking.tracking_uri(config))
        with tracking.step_run(config, "train", self.parent) as step:
            step.log_artifacts(policy, "policy")
        self.train_run = step.run_id

    def promote(self, **values):
        (self.folder / "evaluation.json").write_text(json.dumps(evaluation(**values)))
        return promote.run(self.config.to_json(), self.parent, self.train_run, str(self.folder))


def test_the_first_policy_to_pass_becomes_champion_and_the_decision_is_recorded(home, tmp_path):
    run = Trained(configuration(home, "first"), tmp_path)
    result = run.promote(id_low=0.02)
    assert (result["version"], result["aliases"], result["promoted"]) == ("1", "candidate,champion", True)
    version = run.client.get_model_version("first", "1")
    assert version.run_id == run.train_run
    assert version.tags["dfpo.gate.id_low"] == "0.02" and version.tags["dfpo.gate.promoted"] == "True"
    assert version.tags["dfpo.parent_run_id"] == run.parent and version.tags["dfpo.algorithm"] == "dfpo"
    parent = run.client.get_run(run.parent)
    assert parent.data.tags["dfpo.model_version"] == "first/1" and parent.data.tags["dfpo.promoted"] == "true"
    child = tracking.children(run.client, parent.info.experiment_id, run.parent)[-1]
    assert child.data.metrics["promote/promoted"] == 1.0 and child.data.metrics["promote/id_low"] == 0.02
    decision = json.loads(open(run.client.download_artifacts(child.info.run_id, "decision.json", str(tmp_path))).read())  # noqa: SIM115
    assert decision["reason"] == result["reason"] and decision["ood_low"] == -0.01


def test_a_policy_that_fails_becomes_candidate_only(home, tmp_path):
    config = configuration(home, "second")
    Trained(config, tmp_path, "good").promote(id_low=0.02)
    run = Trained(config, tmp_path, "bad")
    result = run.promote(id_low=-0.02, champion="1")
    assert (result["version"], result["aliases"], result["promoted"]) == ("2", "candidate", False)
    assert promote.champion_version(run.client, "second") == "1"


def test_a_champion_that_changed_since_the_evaluation_refuses_the_promotion(home, tmp_path):
    config = configuration(home, "changed")
    Trained(config, tmp_path, "other").promote(id_low=0.02)
    result = Trained(config, tmp_path, "mine").promote(id_low=0.5)  # evaluated while there was no champion
    assert result["promoted"] is False and result["aliases"] == "candidate"
    assert result["reason"] == "the champion is now version 1, the evaluation compared with none: evaluate again"


def test_a_retried_promotion_changes_nothing(home, tmp_path):
    run = Trained(configuration(home, "retried"), tmp_path)
    first, again = run.promote(id_low=0.02), run.promote(id_low=0.02)
    assert (again["version"], again["aliases"], again["promoted"]) == (first["version"], first["aliases"], True)
    assert len(run.client.search_model_versions("name='retried'")) == 1


def test_a_train_run_without_a_policy_leaves_no_registered_model(home, tmp_path, capsys):
    run = Trained(configuration(home, "empty"), tmp_path, files=("notes.txt",))
    with pytest.raises(SystemExit) as end:
        run.promote(id_low=0.02)
    assert end.value.code == 2
    assert capsys.readouterr().err.startswith("error: train_run_id: ")
    assert not [model for model in run.client.search_registered_models() if model.name == "empty"]


def test_a_name_that_the_registry_refuses_leaves_no_registered_model(home, tmp_path):
    from mlflow.exceptions import MlflowException

    run = Trained(configuration(home, "sla/sh"), tmp_path)
    with pytest.raises(MlflowException):
        run.promote(id_low=0.02)
    assert not [model for model in run.client.search_registered_models() if "sh" in model.name]


def test_the_evaluation_of_another_pipeline_run_is_refused(home, tmp_path, capsys):
    run = Trained(configuration(home, "mixed"), tmp_path)
    with pytest.raises(SystemExit):
        run.promote(id_low=0.02, parent_run_id="0" * 32)
    assert capsys.readouterr().err.startswith("error: evaluation: belongs to the pipeline run 000")
    assert not [model for model in run.client.search_registered_models() if model.name == "mixed"]


def test_a_missing_evaluation_is_one_line(home, tmp_path, capsys):
    run = Trained(configuration(home, "unevaluated"), tmp_path)
    with pytest.raises(SystemExit):
        promote.run(run.config.to_json(), run.parent, run.train_run, str(tmp_path / "nowhere"))
    assert capsys.readouterr().err.startswith("error: evaluation: cannot read")


@pytest.fixture
def evaluated(home, tmp_path, request):
    """A finished pipeline run whose evaluation is in MLflow, as `dfpo promote` and `dfpo compare` find it."""
    run = Trained(configuration(home, request.node.name), tmp_path)
    with tracking.step_run(run.config, "evaluate", run.parent) as step:
        step.client.log_text(step.run_id, json.dumps(evaluation(id_low=0.02)), "evaluation/evaluation.json")
    headline = {"eval/id_test/all/accuracy": 0.7, "eval/id_test/all/accuracy_low": 0.6, "eval/ood_test/all/accuracy_sft": 0.3}
    tracking.StepRun(run.client, run.parent).log_metrics(headline)
    return run


@pytest.mark.parametrize("by", ["parent", "train_run"])
def test_a_finished_run_is_promoted_by_the_id_of_its_parent_or_train_run(evaluated, by):
    result = promote.promote_run(tracking.tracking_uri(evaluated.config), getattr(evaluated, by))
    assert (result["promoted"], result["aliases"]) == (True, "candidate,champion")
    assert evaluated.client.get_run(evaluated.parent).data.tags["dfpo.promoted"] == "true"


def test_compare_lists_parents_with_their_accuracies_and_aliases(evaluated):
    uri, name = tracking.tracking_uri(evaluated.config), evaluated.config.name
    (before,) = promote.compare(uri, run_ids=[evaluated.parent])
    assert (before["version"], before["aliases"]) == ("", "")
    promote.promote_run(uri, evaluated.parent)
    tracking.close_parent(evaluated.config.to_json(), f"{name}-run", "SUCCEEDED")
    (row,) = (row for row in promote.compare(uri) if row["run_id"] == evaluated.parent)
    wanted = {"name": name, "status": "FINISHED", "algorithm": "dfpo", "noise": "none", "seed": "1", "version": "1"}
    wanted |= {"aliases": "candidate, champion", "trained_id": 0.7, "trained_id_low": 0.6, "sft_ood": 0.3, "base_id": None}
    assert wanted.items() <= row.items()


@pytest.mark.parametrize("step", ["train", "evaluate"])
def test_a_run_that_lacks_a_step_cannot_be_promoted(home, tmp_path, step):
    config = configuration(home, f"lacks-{step}")
    parent = Trained(config, tmp_path).parent if step == "evaluate" else tracking.create_parent(config, "lacks-train")
    with pytest.raises(UserError, match=f"has no finished {step} step"):
        promote.promote_run(tracking.tracking_uri(config), parent)


def test_unknown_runs_and_experiments_are_one_line(home):
    uri = tracking.tracking_uri(configuration(home, "x"))
    for call in (lambda: promote.promote_run(uri, "f" * 32), lambda: promote.compare(uri, run_ids=["no such id"])):
        with pytest.raises(UserError, match="^run_id: no run"):
            call()
    with pytest.raises(UserError, match=r"^tracking\.experiment: no experiment 'other'"):
        promote.compare(uri, "other")


def test_the_logged_configuration_is_the_one_that_ran(home, tmp_path):
    run = Trained(configuration(home, "config"), tmp_path)
    path = run.client.download_artifacts(run.parent, "config.yaml", str(tmp_path))
    assert parse_config(yaml.safe_load(open(path))) == run.config  # noqa: SIM115
