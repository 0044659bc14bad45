"""Promotion: register the trained policy, and move the alias `champion` to it only where the gate holds. Needs no torch.

The gate compares on the same questions with the current champion, or with the SFT policy while there is no champion:
the lower bound of the paired difference must be above `min_id_gain` in domain, and at least `-max_ood_loss` out of domain.
The alias `candidate` always moves to the newest version.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dfpo_core import tracking
from dfpo_core.config import PipelineConfig, PromoteConfig, parse_config
from dfpo_core.errors import UserError

CHAMPION, CANDIDATE = "champion", "candidate"
POLICY_ARTIFACT = "policy"


@dataclass(frozen=True)
class Decision:
    """Whether the gate holds, why, and every number that it was decided on."""

    promoted: bool
    reason: str
    rival: str  # "champion" or "sft"
    id_gain: float
    id_low: float
    min_id_gain: float
    ood_gain: float | None  # None without out-of-domain questions
    ood_low: float | None
    max_ood_loss: float


def decide(evaluation: dict[str, Any], gate: PromoteConfig) -> Decision:
    """Apply the gate to the content of evaluation.json. Raises UserError when the in-domain comparison is missing."""
    rival = "champion" if evaluation.get("champion_version") else "sft"
    in_domain, out_of_domain = (_difference(evaluation, rival, split) for split in ("id_test", "ood_test"))
    if in_domain is None:
        raise UserError("evaluation", f"has no paired difference of trained and {rival} on id_test", "run evaluate again")
    failures = []
    if not in_domain["low"] > gate.min_id_gain:
        failures.append(f"the in-domain lower bound {in_domain['low']:+.4f} is not above {gate.min_id_gain:+.4f}")
    if out_of_domain and not out_of_domain["low"] >= -gate.max_ood_loss:
        failures.append(f"the out-of-domain lower bound {out_of_domain['low']:+.4f} is below {-gate.max_ood_loss:+.4f}")
    ood_text = f"{out_of_domain['low']:+.4f} >= {-gate.max_ood_loss:+.4f}" if out_of_domain else "no questions"
    held = f"in domain {in_domain['low']:+.4f} > {gate.min_id_gain:+.4f}, out of domain {ood_text}"
    return Decision(
        promoted=not failures,
        reason=f"against {rival}: {' and '.join(failures) or held}",
        rival=rival,
        id_gain=in_domain["mean"],
        id_low=in_domain["low"],
        min_id_gain=gate.min_id_gain,
        ood_gain=out_of_domain["mean"] if out_of_domain else None,
        ood_low=out_of_domain["low"] if out_of_domain else None,
        max_ood_loss=gate.max_ood_loss,
    )


def _difference(evaluation: dict[str, Any], rival: str, split: str) -> dict[str, Any] | None:
    wanted = {"first": "trained", "second": rival, "split": split, "domain": "all"}
    return next((entry for entry in evaluation["differences"] if wanted.items() <= entry.items()), None)


# ---------------------------------------------------------------------------------------------------------- entry points


def run(config: str, parent_run_id: str, train_run_id: str, evaluation: str) -> dict[str, Any]:
    """The promote step: register, decide, move the aliases, record. `evaluation` is the folder that evaluate wrote.

    Returns version, aliases (comma-separated), promoted, reason, and the numbers of the decision.
    """
    resolved = parse_config(json.loads(config))
    with tracking.step_run(resolved, "promote", parent_run_id) as step:
        return _promote(resolved, step, parent_run_id, train_run_id, read_evaluation(Path(evaluation)))


def promote_run(uri: str, run_id: str) -> dict[str, Any]:
    """Promote a finished pipeline run by the id of its parent or of its train run, from what MLflow holds: the same gate on
    the same evaluation. Returns what `run` returns; raises UserError when the run has nothing to promote."""
    client = tracking.connect(uri)
    chosen = _existing_run(client, run_id)
    parent_run_id = chosen.data.tags.get("mlflow.parentRunId", run_id)
    steps = tracking.children(client, chosen.info.experiment_id, parent_run_id)
    trained = chosen if chosen.data.tags.get("dfpo.step") == "train" else _latest(steps, "train", run_id)
    folder = _artifact(client, _latest(steps, "evaluate", run_id), "evaluation/evaluation.json").parent
    config = _logged_config(client, parent_run_id, uri)
    evaluation = read_evaluation(folder)
    with tracking.step_run(config, "promote", parent_run_id) as step:
        return _promote(config, step, parent_run_id, trained.info.run_id, evaluation)


def compare(uri: str, experiment: str = "dfpo", run_ids: Iterable[str] = ()) -> list[dict[str, Any]]:
    """One row a pipeline run, newest first: run_id, name, status, started (ms), algorithm, noise, seed, version, aliases, and
    `<model>_<id|ood>` with `_low` and `_high` for base, sft and trained; None where the run has no such number.

    `run_ids` are parent runs; empty takes all of the experiment. Raises UserError on an unknown run or experiment.
    """
    client = tracking.connect(uri)
    run_ids = list(run_ids)
    if run_ids:
        runs = [_existing_run(client, run_id) for run_id in run_ids]
    else:
        found = client.get_experiment_by_name(experiment)
        if found is None:
            raise UserError("tracking.experiment", f"no experiment {experiment!r}", "check the name and the tracking URI")
        query = f"tags.`dfpo.step` = '{tracking.PARENT_STEP}'"
        runs = client.search_runs([found.experiment_id], query, max_results=1000, order_by=["attributes.start_time DESC"])
    aliases = {name: _aliases(client, name) for name in {_version_of(run)[0] for run in runs} - {""}}
    return [_row(run, aliases) for run in runs]


def _row(run, aliases: dict[str, dict[str, list[str]]]) -> dict[str, Any]:
    tags, (name, version) = run.data.tags, _version_of(run)
    row: dict[str, Any] = {
        "run_id": run.info.run_id,
        "name": run.info.run_name,
        "status": run.info.status,
        "started": run.info.start_time,
        **{key: tags.get(f"dfpo.{key}", "") for key in ("algorithm", "noise", "seed")},
        "version": version,
        "aliases": ", ".join(aliases.get(name, {}).get(version, [])),
    }
    for model in ("base", "sft", "trained"):
        for split in ("id", "ood"):
            key = f"eval/{split}_test/all/accuracy" + ("" if model == "trained" else f"_{model}")
            row |= {f"{model}_{split}{bound}": run.data.metrics.get(f"{key}{bound}") for bound in ("", "_low", "_high")}
    return row


# ---------------------------------------------------------------------------------------------------------- the registry


def champion_version(client, name: str) -> str:
    """The version that the alias `champion` points to; empty when there is no such model or alias."""
    from mlflow.exceptions import MlflowException

    try:
        return str(client.get_model_version_by_alias(name, CHAMPION).version)
    except MlflowException as error:
        # a missing alias is INVALID_PARAMETER_VALUE, a missing model RESOURCE_DOES_NOT_EXIST
        if error.error_code in ("INVALID_PARAMETER_VALUE", "RESOURCE_DOES_NOT_EXIST"):
            return ""
        raise


def download(client, name: str, version: str, folder: str) -> str:
    """Copy a registered version's files under `folder`, and return where they are. Raises UserError when they are gone."""
    from mlflow.artifacts import download_artifacts
    from mlflow.exceptions import MlflowException

    source = client.get_model_version_download_uri(name, version)
    try:
        return download_artifacts(artifact_uri=source, dst_path=folder, tracking_uri=client.tracking_uri)
    except (MlflowException, OSError) as error:
        problem = f"version {version} of {name} cannot be read ({str(error).splitlines()[0][:160]})"
        raise UserError("promote.registered_model", problem, "restore its files, or move the alias to another version") from None


def register(client, name: str, train_run_id: str, tags: dict[str, str]) -> str:
    """The version of the train run's policy, created unless a former attempt did; the registered model is created if absent.

    Nothing is left behind when it fails. Raises UserError when the run has no logged policy.
    """
    from mlflow.exceptions import MlflowException

    run = _existing_run(client, train_run_id)
    logged = {Path(file.path).name for file in client.list_artifacts(train_run_id, POLICY_ARTIFACT)}
    if "config.json" not in logged:  # the registry accepts a source that does not exist
        raise UserError("train_run_id", f"run {train_run_id} has no artifact {POLICY_ARTIFACT}/config.json", "give a finished train run")
    for version in client.search_model_versions(f"name='{name}'"):
        if version.run_id == train_run_id:
            return str(version.version)
    created = _create_model(client, name)
    source = f"{run.info.artifact_uri}/{POLICY_ARTIFACT}"
    try:
        return str(client.create_model_version(name, source, run_id=train_run_id, tags=tags).version)
    except MlflowException:
        if created:
            client.delete_registered_model(name)
        raise


def _create_model(client, name: str) -> bool:
    from mlflow.exceptions import MlflowException

    try:
        client.create_registered_model(name, description="Policies trained by DFPO; `champion` passed the gate of its pipeline run.")
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
        return False
    return True


def _promote(config: PipelineConfig, step, parent_run_id: str, train_run_id: str, evaluation: dict[str, Any]) -> dict[str, Any]:
    client, name = step.client, config.promote.registered_model
    if evaluation.get("parent_run_id", parent_run_id) != parent_run_id:  # a cached or misplaced file would promote the wrong policy
        raise UserError("evaluation", f"belongs to the pipeline run {evaluation['parent_run_id']}", "pass the one of this run")
    decision = decide(evaluation, config.promote)
    describing = {key: value for key, value in client.get_run(step.run_id).data.tags.items() if key.startswith("dfpo.")}
    describing.pop("dfpo.step", None)
    version = register(client, name, train_run_id, describing | {"dfpo.parent_run_id": parent_run_id})
    decision = _unless_champion_changed(decision, evaluation.get("champion_version", ""), champion_version(client, name), version)
    client.set_registered_model_alias(name, CANDIDATE, version)
    if decision.promoted:
        client.set_registered_model_alias(name, CHAMPION, version)
    aliases = ",".join(sorted(_aliases(client, name).get(version, [])))
    result = {"registered_model": name, "version": version, "aliases": aliases, **asdict(decision)}
    _record(step, parent_run_id, result)
    return {key: value for key, value in result.items() if value is not None}


def _unless_champion_changed(decision: Decision, evaluated: str, current: str, version: str) -> Decision:
    """Refuse a decision that was made against another champion; a repeated promotion of the champion itself stays."""
    if current == version:
        return Decision(**asdict(decision) | {"promoted": True, "reason": f"version {version} is the champion already"})
    if current != evaluated:
        was = f"version {evaluated}" if evaluated else "none"
        reason = f"the champion is now version {current or 'none'}, the evaluation compared with {was}: evaluate again"
        return Decision(**asdict(decision) | {"promoted": False, "reason": reason})
    return decision


def _record(step, parent_run_id: str, result: dict[str, Any]) -> None:
    """The decision, in every place where one looks for it: version tags, the step's artifact and metrics, the parent's tags."""
    client, name, version = step.client, result["registered_model"], result["version"]
    for key, value in result.items():
        if value is not None and key not in ("registered_model", "version", "aliases"):
            client.set_model_version_tag(name, version, f"dfpo.gate.{key}", str(value))
    client.log_dict(step.run_id, result, "decision.json")
    step.log_metrics({f"promote/{key}": float(value) for key, value in result.items() if isinstance(value, (bool, float))})
    tags = {"dfpo.model_version": f"{name}/{version}", "dfpo.promoted": str(result["promoted"]).lower(), "dfpo.decision": result["reason"]}
    for run_id in filter(None, (step.run_id, parent_run_id)):
        tracking.StepRun(client, run_id).set_tags(tags)


def _aliases(client, name: str) -> dict[str, list[str]]:
    """Version -> its aliases; empty for a model that does not exist."""
    from mlflow.exceptions import MlflowException

    try:
        registered = client.get_registered_model(name)
    except MlflowException as error:
        if error.error_code == "RESOURCE_DOES_NOT_EXIST":
            return {}
        raise
    found: dict[str, list[str]] = {}
    for alias, version in sorted(registered.aliases.items()):
        found.setdefault(str(version), []).append(alias)
    return found


# ---------------------------------------------------------------------------------------------------------- what MLflow holds


def read_evaluation(folder: Path) -> dict[str, Any]:
    """The content of evaluation.json. Raises UserError when it is missing or damaged."""
    path = folder / "evaluation.json"
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError("evaluation", f"cannot read {path} ({error})", "pass the folder that evaluate wrote") from None


def _existing_run(client, run_id: str):
    from mlflow.exceptions import MlflowException

    try:
        return client.get_run(run_id)
    except MlflowException as error:
        if error.error_code not in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
            raise
        raise UserError("run_id", f"no run {run_id!r} in this tracking store", "take an id from `dfpo compare`") from None


def _latest(steps: list, name: str, run_id: str):
    finished = [run for run in steps if run.data.tags.get("dfpo.step") == name and run.info.status == "FINISHED"]
    if not finished:
        raise UserError("run_id", f"run {run_id} has no finished {name} step", "let the pipeline run finish, or choose another run")
    return finished[-1]


def _artifact(client, run, path: str) -> Path:
    from mlflow.artifacts import download_artifacts
    from mlflow.exceptions import MlflowException

    try:
        return Path(download_artifacts(artifact_uri=f"{run.info.artifact_uri}/{path}", tracking_uri=client.tracking_uri))
    except (MlflowException, OSError) as error:
        problem = f"artifact {path} of run {run.info.run_id} cannot be read ({str(error).splitlines()[0][:160]})"
        raise UserError("run_id", problem, "restore it, or run the pipeline again") from None


def _logged_config(client, parent_run_id: str, uri: str) -> PipelineConfig:
    import yaml

    path = _artifact(client, client.get_run(parent_run_id), "config.yaml")
    values = yaml.safe_load(path.read_text(encoding="utf-8"))
    config = parse_config(values, f"config.yaml of run {parent_run_id}")
    if tracking.tracking_uri(config) == uri:
        return config
    return parse_config(values | {"tracking": values["tracking"] | {"uri": uri}})  # the pods may know the server by another name


def _version_of(run) -> tuple[str, str]:
    """(registered model, version) that a parent run ended in; empty strings without one."""
    name, _, version = run.data.tags.get("dfpo.model_version", "").rpartition("/")
    return name, version
