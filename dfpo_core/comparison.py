"""Which algorithm learns most under which noise: a matrix of training runs from one warm start, and the statistics of it.

A *cell* is one run: an algorithm in a setting (what is wrong with the supervision) at a seed. Cells of one seed share data, noise and
sampling seeds, so their differences are paired by seed. Each finished cell is one JSON file, written atomically: a study that was
killed goes on where it stopped.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import Field, ValidationError

from dfpo_core.config import PipelineConfig, Section, parse_config
from dfpo_core.errors import TrainingDiverged, UserError
from dfpo_core.statistics import Interval, bootstrap_mean, student_interval

RECORD = "record.json"  # artifact of a cell's MLflow run
KEY = re.compile(r"[a-z0-9][a-z0-9_.-]*")


class ComparisonConfig(Section):
    """A study: the configuration that all cells share, and what differs between them. Overrides are nested as in the configuration."""

    name: str = Field("comparison", pattern=KEY.pattern, description="name of the MLflow parent run")
    seeds: list[int] = Field(min_length=1, description="seeds of data, noise and training; a cell of each")
    base: dict[str, Any] = Field(description="the pipeline configuration that every cell starts from")
    warm_start: dict[str, Any] = Field({}, description="overrides of base for the one supervised warm start; its noise is none")
    warm_start_accuracy: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="in-domain accuracy at which the warm start stops, looked at every warm_start_every steps; 0: all steps",
    )
    warm_start_every: int = Field(10, ge=1, description="steps of the warm start between two looks at its accuracy")
    settings: dict[str, dict[str, Any]] = Field(min_length=1, description="name -> overrides: what is wrong with the supervision")
    algorithms: dict[str, dict[str, Any]] = Field(min_length=1, description="name -> overrides; train.algorithm defaults to the name")
    only: dict[str, list[str]] = Field({}, description="setting -> the algorithms to run in it; default all")
    grid: dict[str, dict[str, Any]] = Field({}, description="name -> overrides: every algorithm is also run with each (tuning)")
    reference: str = Field("dfpo", description="the algorithm that the others are compared with")
    clean: str = Field("clean", description="the setting left out of the average over noisy settings")
    noisy: list[str] = Field([], description="settings averaged as `noisy`; default: all but the clean one that every algorithm runs in")
    curve_every: int = Field(25, ge=1, description="training steps between accuracies of the learning curve")

    @property
    def averaged(self) -> list[str]:
        """The settings whose mean is `noisy`."""
        return self.noisy or [s for s in self.settings if s != self.clean and s not in self.only]

    @property
    def reported(self) -> list[str]:
        """The columns of tables and figures: every setting, and `noisy` where it is a mean of more than one."""
        return [*self.settings, *(["noisy"] if len(self.averaged) > 1 else [])]


@dataclass(frozen=True)
class Cell:
    """One run of the matrix; `point` names the entry of the tuning grid, empty without one."""

    setting: str
    algorithm: str
    seed: int
    point: str = ""

    @property
    def key(self) -> str:
        return ".".join(filter(None, (self.setting, self.algorithm, self.point, str(self.seed))))


def find_cell(study: ComparisonConfig, key: str) -> Cell:
    """The cell of a key. Raises UserError for a key that the study does not have."""
    for cell in cells(study):
        if cell.key == key:
            return cell
    raise UserError("cell", f"{key!r} is no cell of {study.name}", f"choose e.g. {cells(study)[0].key}")


def load(path: str | Path) -> ComparisonConfig:
    """Read and check a study, every cell's configuration included. Raises UserError naming the cell and field that is wrong.

    `extends: other.yaml` (beside the file) starts from another study: `base` and `warm_start` are laid over its own, anything else
    that is given replaces what it has.
    """
    values = _read(Path(path))
    if "extends" not in values:
        return parse(values)
    other = values.pop("extends")
    start = _read(Path(path).parent / str(other))
    if "extends" in start:
        raise UserError("extends", f"{other} extends another study itself", "name a study that stands alone")
    shared = {key: _merged(start.get(key, {}), values[key]) for key in ("base", "warm_start") if isinstance(values.get(key), dict)}
    return parse(start | values | shared)


def limited(study: ComparisonConfig, settings: list[str]) -> ComparisonConfig:
    """The part of a study in the given settings; its cells are the study's own. Raises UserError for a setting that it does not have."""
    for name in settings:
        if name not in study.settings:
            raise UserError("--settings", f"{name!r} is no setting of {study.name}", f"choose from: {', '.join(study.settings)}")
    kept = {name: overrides for name, overrides in study.settings.items() if name in settings}
    only = {name: algorithms for name, algorithms in study.only.items() if name in kept}
    return study.model_copy(update={"settings": kept, "only": only, "noisy": [name for name in study.noisy if name in kept]})


def _read(path: Path) -> dict[str, Any]:
    import yaml

    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as error:
        raise UserError("config", f"cannot read {path} ({str(error).splitlines()[0]})", "give a readable YAML file") from None
    if not isinstance(values, dict):
        raise UserError("config", f"{path} is not a mapping", "start from pipelines/configs/robustness.yaml")
    return values


def parse(values: dict[str, Any]) -> ComparisonConfig:
    """Validate a nested dict; as `load`."""
    try:
        study = ComparisonConfig.model_validate(values)
    except ValidationError as error:
        problem = error.errors(include_url=False)[0]
        field = ".".join(map(str, problem["loc"])) or "config"
        raise UserError(field, problem["msg"].removeprefix("Value error, "), "correct it in the study's file") from None
    for kind in ("settings", "algorithms", "grid"):
        for name in getattr(study, kind):
            if not KEY.fullmatch(name):
                raise UserError(f"{kind}.{name}", "a name becomes part of a file name", "use a-z, 0-9, _, - and .")
    if "noisy" in study.settings:
        raise UserError("settings.noisy", "the mean over the noisy settings has this name", "give the setting another")
    for setting, names in study.only.items():
        for name in (setting, *names):
            if name not in (study.settings if name is setting else study.algorithms):
                raise UserError(f"only.{setting}", f"{name!r} is not defined", "name an entry of settings and of algorithms")
    for setting in study.noisy:
        if setting not in study.settings:
            raise UserError("noisy", f"{setting!r} is not defined", "name entries of settings")
    if study.reference not in study.algorithms:
        raise UserError("reference", f"{study.reference!r} is no entry of algorithms", "name one of them")
    parse_config(_merged(study.base, study.warm_start), "warm_start")
    from dfpo_core import algorithms

    for cell in cells(study):
        try:
            algorithms.resolve(cell_config(study, cell, "").train)
        except UserError as error:
            raise UserError(f"{cell.key}: {error.field}", error.problem, error.fix) from None
    return study


def cells(study: ComparisonConfig) -> list[Cell]:
    """Every cell, seed by seed, so that a study that is cut short has whole seeds."""
    return [
        Cell(setting, algorithm, seed, point)
        for seed in study.seeds
        for setting in study.settings
        for point in study.grid or [""]
        for algorithm in study.only.get(setting, study.algorithms)
    ]


def cell_config(study: ComparisonConfig, cell: Cell, warm_start: str) -> PipelineConfig:
    """The configuration of one cell that starts from the checkpoint directory `warm_start`."""
    fixed = {"name": cell.key, "seed": cell.seed, "sft": {"steps": 0}, **({"model": warm_start} if warm_start else {})}
    named = {"train": {"algorithm": cell.algorithm}}
    grid = study.grid.get(cell.point, {})
    return parse_config(_merged(named, study.base, study.settings[cell.setting], study.algorithms[cell.algorithm], grid, fixed), cell.key)


def _merged(*layers: dict[str, Any]) -> dict[str, Any]:
    """Nested dicts laid over each other, the last wins; lists are replaced."""
    result: dict[str, Any] = {}
    for layer in layers:
        for key, value in layer.items():
            both = isinstance(value, dict) and isinstance(result.get(key), dict)
            result[key] = _merged(result[key], value) if both else value
    return result


# ------------------------------------------------------------------------------------------------------------- running the cells


def warm_start(study: ComparisonConfig) -> str:
    """Directory of the checkpoint that all cells start from; trained on first use, kept under home by its configuration's hash."""
    config = _warm_config(study)
    included = {"seed", "model", "threads", "precision", "data", "prompt", "sft"}
    parts = config.model_dump(mode="json", include=included, exclude_defaults=True)
    name = hashlib.sha256(json.dumps([parts, _stopping_rule(study)], sort_keys=True).encode()).hexdigest()[:12]
    folder = config.home_path / "warm_starts" / name
    if not (folder / "config.json").is_file():
        folder.parent.mkdir(parents=True, exist_ok=True)
        _train_warm_start(study, folder)
    return str(folder)


def _stopping_rule(study: ComparisonConfig) -> list[Any]:
    """What decides where the warm start stops: nothing where it runs all its steps."""
    return [study.warm_start_accuracy, study.warm_start_every, study.base.get("data")] if study.warm_start_accuracy else []


def _warm_config(study: ComparisonConfig) -> PipelineConfig:
    return parse_config(_merged(study.base, study.warm_start), "warm_start")


def _train_warm_start(study: ComparisonConfig, folder: str | Path) -> None:
    """Raises UserError where the accuracy to stop at is not reached."""
    from dfpo_core import models, sft
    from dfpo_core.config import NoiseConfig
    from dfpo_core.data import prepare
    from dfpo_core.noise import add_label_noise

    config = _warm_config(study)
    _limit_threads(config)
    rows = add_label_noise(prepare.prepared_tables(config.data, config.seed)["train"], NoiseConfig(), config.seed).to_pylist()
    model, tokenizer = models.load_policy(config.model, config.home_path)
    asked = parse_config(study.base | {"seed": config.seed})
    questions = prepare.prepared_tables(asked.data, asked.seed)["id_test"].to_pylist() if study.warm_start_accuracy else []
    reached = 0.0

    def enough(step: int) -> bool:
        nonlocal reached
        if not questions or step % study.warm_start_every:
            return False
        reached = accuracies(model.eval(), tokenizer, asked, [row | {"split": "id_test"} for row in questions])["id_test"]
        model.train()
        return reached >= study.warm_start_accuracy

    sft.train(model, tokenizer, rows, config, _Silent(), enough)
    if reached < study.warm_start_accuracy:
        problem = f"not reached in {config.sft.steps} steps (accuracy {reached:.3f})"
        raise UserError("warm_start_accuracy", problem, "lower it, or raise warm_start.sft.steps")
    models.save_policy(model, tokenizer, folder)


class _Silent:
    """Stands for an MLflow run where nothing is to be logged."""

    def log_metrics(self, metrics: dict[str, float], step: int) -> None:
        pass


def run_cell(
    study: ComparisonConfig, cell: Cell, checkpoint: str, at_looks: Callable[[Any], object] = lambda trainer: None
) -> dict[str, Any]:
    """Train one cell from the directory `checkpoint` and return its record. A run that diverges is a result, not an error.

    `at_looks` is called with the trainer wherever the curve has a point.
    """
    import resource

    from dfpo_core.data import prepare
    from dfpo_core.noise import measure, noisy_table
    from dfpo_core.tracking import git_commit
    from dfpo_core.train import Trainer

    config = cell_config(study, cell, checkpoint)
    _limit_threads(config)
    wall, cpu = time.perf_counter(), time.process_time()
    tables = prepare.prepared_tables(config.data, config.seed)
    noisy = noisy_table(tables["train"], config)
    questions = [row | {"split": split} for split in ("id_test", "ood_test") for row in tables[split].to_pylist()]
    rows = [row for row in noisy.to_pylist() if row["label"] is not None or config.noise.missing == "zero"]
    trainer = Trainer(config, checkpoint, rows)
    curve, diverged = [], ""

    def look(**more: Any) -> None:
        curve.append({"step": trainer.steps_done, **accuracies_of(trainer, questions), **more})
        at_looks(trainer)

    look()
    trains = trainer.algorithm.policy_loss_name or trainer.algorithm.guided
    while trains and trainer.steps_done < config.train.steps:
        try:
            trainer.history.append(trainer.step())
        except TrainingDiverged as error:
            diverged = str(error)
            break
        if trainer.steps_done % study.curve_every == 0 or trainer.steps_done == config.train.steps:
            recent = trainer.history[-study.curve_every :]
            means = {k: float(np.mean([m[k] for m in recent if k in m])) for k in recent[-1] if k.startswith(LOGGED)}
            look(metrics=means)
    return {
        "setting": cell.setting,
        "algorithm": cell.algorithm,
        "point": cell.point,
        "seed": cell.seed,
        "steps": trainer.steps_done,
        "questions": {domain: sum(row["domain"] == domain for row in questions) for domain in curve[0]["domains"]},
        "noise_rate": measure(noisy, config.noise)["noise/rate_measured"],
        "curve": curve,
        "diverged": diverged,
        "seconds": time.perf_counter() - wall,
        "cpu_seconds": time.process_time() - cpu,
        "peak_memory_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "config_sha256": cell_sha256(study, cell),
        "commit": git_commit(),
    }


LOGGED = (
    "reward/",
    "critic/explained_variance",
    "critic/flip_rate",
    "critic/prompt_correlation",
    "critic/noise_floor",
    "policy/kl_to_sft",
    "policy/entropy",
    "rollout/response_length",
)


def cell_sha256(study: ComparisonConfig, cell: Cell) -> str:
    """Hash of what a cell's result depends on: its own configuration and that of the warm start, places and names left out.

    Defaults are left out too, so that a new option does not undo a study; what code and defaults a cell ran with, its `commit` tells.
    """
    places = {"home", "name", "tracking", "cluster", "promote"}
    own = cell_config(study, cell, "").model_dump(mode="json", exclude=places, exclude_defaults=True)
    excluded = places | {"train", "noise", "evaluate"}
    warm = parse_config(_merged(study.base, study.warm_start)).model_dump(mode="json", exclude=excluded, exclude_defaults=True)
    parts = [own, warm, study.curve_every, *_stopping_rule(study)]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _limit_threads(config: PipelineConfig) -> None:
    import torch

    torch.set_num_threads(config.threads or torch.get_num_threads())


def accuracies_of(trainer, questions: list[dict[str, Any]]) -> dict[str, Any]:
    """`accuracies` of a trainer's policy."""
    with trainer.acting() as policy:
        return accuracies(policy, trainer.tokenizer, trainer.config, questions)


def greedy_scores(policy, tokenizer, config: PipelineConfig, questions: list[dict[str, Any]]) -> list[float]:
    """The score of the greedy answer to each question."""
    from dfpo_core import rewards, rollout
    from dfpo_core.data import prompts

    texts = rollout.respond(
        policy,
        tokenizer,
        prompts.encode(tokenizer, questions, config.prompt),
        rows=questions,
        max_new_tokens=config.train.max_new_tokens,
        max_turns=config.train.max_turns,
        max_conversation_tokens=config.train.max_conversation_tokens,
        batch_size=config.evaluate.batch_size,
        precision=config.precision,
    )
    return rewards.score(questions, [text[0] for text in texts])


def accuracies(policy, tokenizer, config: PipelineConfig, questions: list[dict[str, Any]]) -> dict[str, Any]:
    """Greedy accuracy on rows with a `split`: `domains`, name -> accuracy, and of each split the mean over its domains."""
    scores = greedy_scores(policy, tokenizer, config, questions)
    domains: dict[str, list[float]] = {}
    splits: dict[str, list[str]] = {"id_test": [], "ood_test": []}
    for row, score in zip(questions, scores, strict=True):
        domains.setdefault(row["domain"], []).append(score)
        if row["domain"] not in splits[row["split"]]:
            splits[row["split"]].append(row["domain"])
    means = {domain: float(np.mean(values)) for domain, values in domains.items()}
    average = {split: float(np.mean([means[name] for name in names])) for split, names in splits.items() if names}
    return {"domains": means, **average}


def open_parent(study: ComparisonConfig) -> str:
    """The MLflow parent run of the study, under which every cell is a child; found again when a study goes on."""
    from dfpo_core import tracking

    digest = hashlib.sha256(study.model_dump_json().encode()).hexdigest()[:12]
    config = parse_config(_merged(study.base, {"name": study.name}))
    return tracking.create_parent(config, f"{study.name}-{digest}")


def run(
    study: ComparisonConfig,
    folder: str | Path,
    width: int = 1,
    parent_run_id: str = "",
    progress: Callable[[dict], object] | None = None,
) -> list[dict]:
    """Run every cell that `folder`/cells lacks, `width` at a time in processes of their own. Returns the records of all cells.

    With a parent, each cell is an MLflow child run. A cell file made by another configuration is run again. Raises what a cell
    raises, once the cells under way have ended.
    """
    from concurrent.futures import ProcessPoolExecutor, as_completed
    from multiprocessing import get_context

    place = Path(folder) / "cells"
    place.mkdir(parents=True, exist_ok=True)
    missing = [cell for cell in cells(study) if _read_cell(place, study, cell) is None]
    if missing:
        checkpoint = warm_start(study)
        # A process of its own a cell: its peak memory is the cell's, and nothing leaks into the next one. All are forked from one
        # server that has the heavy imports behind it and runs nothing, so that a cell does not pay for them.
        processes = get_context("forkserver")
        processes.set_forkserver_preload(["dfpo_core.train", "dfpo_core.data.prepare", "dfpo_core.noise", "transformers.models.llama"])
        with ProcessPoolExecutor(width, mp_context=processes, max_tasks_per_child=1) as pool:
            job = study.model_dump(), checkpoint, str(place), parent_run_id
            futures = [pool.submit(_run_and_write, cell, *job) for cell in missing]
            try:
                for future in as_completed(futures):
                    record = future.result()
                    if progress:
                        progress(record)
            except BaseException:
                pool.shutdown(wait=True, cancel_futures=True)
                raise
    return [_read_cell(place, study, cell) for cell in cells(study)]


def finished(study: ComparisonConfig, folder: str | Path) -> list[dict[str, Any]]:
    """Records of the cells that are done."""
    found = (_read_cell(Path(folder) / "cells", study, cell) for cell in cells(study))
    return [record for record in found if record]


def _run_and_write(cell: Cell, values: dict[str, Any], checkpoint: str, place: str, parent_run_id: str) -> dict[str, Any]:
    study = ComparisonConfig.model_validate(values)
    record = tracked_cell(study, cell, checkpoint, parent_run_id) if parent_run_id else run_cell(study, cell, checkpoint)
    record.pop("mlflow_run_id", None)
    path = Path(place) / f"{cell.key}.json"
    partial = path.with_suffix(f".{os.getpid()}.partial")
    partial.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    partial.replace(path)
    return record


def start(study: str, output: str) -> str:
    """The pipeline's first step: the warm start into the directory `output`; returns the id of the study's MLflow run."""
    from dfpo_core import tracking

    with tracking.exit_codes():
        parsed = parse(json.loads(study))
        parent_run_id = open_parent(parsed)
        _train_warm_start(parsed, output)
    return parent_run_id


def run_tracked(study: str, key: str, checkpoint: str) -> str:
    """The pipeline's step for one cell: returns the MLflow run with its record, an earlier one where the cell is done already."""
    from dfpo_core import tracking

    with tracking.exit_codes():
        parsed = parse(json.loads(study))
        cell = find_cell(parsed, key)
        parent_run_id = open_parent(parsed)
        client = tracking.connect(tracking.tracking_uri(parse_config(parsed.base)))
        query = f"tags.`mlflow.parentRunId` = '{parent_run_id}' and tags.`dfpo.cell_sha256` = '{cell_sha256(parsed, cell)}'"
        experiment = client.get_run(parent_run_id).info.experiment_id
        done = client.search_runs([experiment], f"{query} and attributes.status = 'FINISHED'", max_results=1)
    if done:
        return done[0].info.run_id
    return tracked_cell(parsed, cell, checkpoint, parent_run_id)["mlflow_run_id"]


def report(study: str, parent_run_id: str, cell_runs: list[str], output: str, html_path: str) -> None:
    """The pipeline's last step: results, tables, figures and report from the cells' records; closes the study's MLflow run."""
    from dfpo_core import tracking

    with tracking.exit_codes():
        parsed = parse(json.loads(study))
        client = tracking.connect(tracking.tracking_uri(parse_config(parsed.base)))
        records = []
        for run_id in cell_runs:
            with tempfile.TemporaryDirectory() as folder:
                records.append(json.loads(Path(client.download_artifacts(run_id, RECORD, folder)).read_text(encoding="utf-8")))
        write(parsed, records, output)
        shutil.copyfile(Path(output) / "report.html", html_path)
        close(parsed, parent_run_id, output)


def close(study: ComparisonConfig, parent_run_id: str, folder: str | Path) -> None:
    """Put what `write` wrote onto the study's MLflow run and end it."""
    from dfpo_core import tracking

    client = tracking.connect(tracking.tracking_uri(parse_config(study.base)))
    parent = tracking.StepRun(client, parent_run_id)
    for path in sorted(Path(folder).iterdir()):
        if path.is_file():
            parent.log_artifact(path, "comparison")
    client.set_terminated(parent_run_id, "FINISHED")


def tracked_cell(study: ComparisonConfig, cell: Cell, checkpoint: str, parent_run_id: str) -> dict[str, Any]:
    """`run_cell` as an MLflow child run named after the cell, tagged so that the UI can group by setting, algorithm and seed."""
    from dfpo_core import tracking

    with tracking.step_run(cell_config(study, cell, checkpoint), "cell", parent_run_id) as child:
        child.client.update_run(child.run_id, name=cell.key)
        names = {"dfpo.setting": cell.setting, "dfpo.algorithm": cell.algorithm, "dfpo.grid_point": cell.point or "none"}
        child.set_tags(names | {"dfpo.cell_sha256": cell_sha256(study, cell)})
        record = run_cell(study, cell, checkpoint)
        child.client.log_text(child.run_id, json.dumps(record), RECORD)
        for point in record["curve"]:
            accuracies = {f"eval/{k}": v for k, v in point["domains"].items()}
            averages = {f"eval/{split}/all": point[split] for split in ("id_test", "ood_test") if split in point}
            child.log_metrics(accuracies | averages | point.get("metrics", {}), point["step"])
        cost = {name: record[name] for name in ("seconds", "cpu_seconds", "peak_memory_bytes")}
        child.log_metrics({f"train/{name}": value for name, value in cost.items()})
    return record | {"mlflow_run_id": child.run_id}


def _read_cell(place: Path, study: ComparisonConfig, cell: Cell) -> dict[str, Any] | None:
    path = place / f"{cell.key}.json"
    if not path.is_file():
        return None
    record = json.loads(path.read_text(encoding="utf-8"))
    return record if record["config_sha256"] == cell_sha256(study, cell) else None


# ----------------------------------------------------------------------------------------------------------------- the statistics


MEASURES = {
    "id": "ID at the end",
    "ood": "OOD at the end",
    "average": "average at the end",
    "area": "average over the curve",
    "sampled": "right in training",
}

SAMPLED_NOTE = "Right in training: the share of the responses sampled in all training steps that the true answers call right."


def score_of(record: dict[str, Any], measure: str) -> float | None:
    """One number of a cell, by the key of MEASURES; accuracies are greedy but for `sampled`.

    `sampled` is the share of the responses sampled in training, at its temperature, that are right by the true answers, whatever reward
    they got: what the algorithm maximises, measured on thousands of responses (Q#'s are in part the reference's). None where nothing
    was trained.
    """
    if measure == "sampled":
        looks = [point for point in record["curve"] if "reward/clean" in point.get("metrics", {})]
        steps = np.diff([0, *(point["step"] for point in looks)])
        return float(np.average([point["metrics"]["reward/clean"] for point in looks], weights=steps)) if looks else None
    if measure == "area":
        steps = [point["step"] for point in record["curve"]]
        heights = [_average(point) for point in record["curve"]]
        return float(np.trapezoid(heights, steps) / (steps[-1] - steps[0])) if len(steps) > 1 else heights[0]
    end = record["curve"][-1]
    return {"id": end["id_test"], "ood": _ood(end), "average": _average(end)}[measure]


def _ood(point: dict[str, Any]) -> float:
    """Out-of-domain accuracy; a study without such questions has the in-domain one."""
    return point.get("ood_test", point["id_test"])


def _average(point: dict[str, Any]) -> float:
    return (point["id_test"] + _ood(point)) / 2


def collapsed(record: dict[str, Any]) -> bool:
    """Whether a run diverged, or ends below the in-domain accuracy that it started from."""
    return bool(record["diverged"]) or record["curve"][-1]["id_test"] < record["curve"][0]["id_test"]


def summarise(study: ComparisonConfig, records: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """Means with bootstrap intervals over seeds for every (setting, algorithm), and differences reference - rival paired by seed.

    `noisy` stands for the mean over the noisy settings, of seeds that have all of them. Paired intervals are Student's t:
    a percentile bootstrap of five pairs is too narrow.
    """
    by_cell = {(r["setting"], r["algorithm"], r["seed"]): r for r in records}
    rows, pairs = [], []
    for algorithm in study.algorithms:
        for setting in study.reported:
            for measure in MEASURES:
                values = _by_seed(study, by_cell, setting, algorithm, measure)
                if not values:
                    continue
                interval = bootstrap_mean(np.array(list(values.values())))
                rows.append({"setting": setting, "algorithm": algorithm, "measure": measure, **_numbers(interval)})
                difference = _paired(_by_seed(study, by_cell, setting, study.reference, measure), values)
                if algorithm != study.reference and difference:
                    pairs.append({"setting": setting, "rival": algorithm, "measure": measure, **difference})
    runs: dict[str, list[dict]] = {}
    for record in by_cell.values():
        runs.setdefault(record["algorithm"], []).append(record)
    cost = [
        {
            "algorithm": name,
            "runs": len(of),
            "collapsed": (fallen := Counter(r["setting"] for r in of if collapsed(r))).total(),
            "collapsed_in": dict(fallen),
            "cpu_seconds": float(np.median([r["cpu_seconds"] for r in of])),
            "peak_memory_bytes": float(np.median([r["peak_memory_bytes"] for r in of])),
        }
        for name, of in runs.items()
    ]
    starts = [
        {
            "setting": setting,
            "wrong_labels": float(np.mean([r["noise_rate"] for r in of])),
            "id": float(np.mean([r["curve"][0]["id_test"] for r in of])),
            "ood": float(np.mean([_ood(r["curve"][0]) for r in of])),
        }
        for setting in study.settings
        if (of := [r for r in by_cell.values() if r["setting"] == setting])
    ]
    return {"starts": starts, "means": rows, "paired": pairs, "runs": cost}


def _by_seed(study: ComparisonConfig, by_cell: dict, setting: str, algorithm: str, measure: str) -> dict[int, float]:
    """seed -> score, for the seeds that have it."""
    names = study.averaged if setting == "noisy" else [setting]
    result = {}
    for seed in study.seeds:
        found = [by_cell.get((name, algorithm, seed)) for name in names]
        scores = [score_of(record, measure) for record in found if record]
        if scores and len(scores) == len(names) and None not in scores:
            result[seed] = float(np.mean(scores))
    return result


def _paired(first: dict[int, float], second: dict[int, float]) -> dict[str, float]:
    """First minus second over the seeds of both, with Student's t interval; empty for fewer than two seeds."""
    seeds = sorted(first.keys() & second.keys())
    return _numbers(student_interval(np.array([first[seed] - second[seed] for seed in seeds]))) if len(seeds) > 1 else {}


def _numbers(interval: Interval) -> dict[str, float]:
    return {"mean": interval.mean, "low": interval.low, "high": interval.high, "seeds": interval.count}


def best_points(study: ComparisonConfig, records: Iterable[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Tuning: algorithm -> its grid point with the highest mean `average`, every point's score, and what it is above the first point.

    Scores are means over the (setting, seed) that every point of the algorithm has, so that an unfinished tuning compares like with like.
    `above` has for each other point its difference from the grid's first, paired by seed, in each setting and over `all`, where there are
    two seeds at least.
    """
    records, result = list(records), {}
    by_point = {p: {(r["setting"], r["algorithm"], r["seed"]): r for r in records if r["point"] == p} for p in study.grid}
    for algorithm in dict.fromkeys(r["algorithm"] for r in records):
        scores = {p: {s: _by_seed(study, of, s, algorithm, "average") for s in study.settings} for p, of in by_point.items()}
        scores = {p: of for p, of in scores.items() if any(of.values())}
        common = [(s, z) for s in study.settings for z in study.seeds if all(z in of[s] for of in scores.values())]
        if common:
            means = {p: float(np.mean([of[s][z] for s, z in common])) for p, of in scores.items()}
            first, *others = scores
            above = {p: _above(scores[p], scores[first]) for p in others}
            best = max(means, key=means.__getitem__)
            result[algorithm] = {"best": best, "scores": means, "runs": len(common), "against": first, "above": above}
    return result


def _above(point: dict[str, dict[int, float]], first: dict[str, dict[int, float]]) -> dict[str, dict[str, float]]:
    """setting, or `all` of those that both points have -> point minus first, paired by seed; both are setting -> seed -> score."""
    shared = [setting for setting in point if point[setting].keys() & first[setting].keys()]
    seeds = [z for z in {seed for s in shared for seed in point[s]} if all(z in point[s] and z in first[s] for s in shared)]
    whole = ({z: float(np.mean([of[s][z] for s in shared])) for z in seeds} for of in (point, first))
    gaps = {setting: _paired(point[setting], first[setting]) for setting in shared} | {"all": _paired(*whole)}
    return {name: gap for name, gap in gaps.items() if gap}


def tuning_markdown(study: ComparisonConfig, tuning: dict[str, dict[str, Any]]) -> str:
    """Tables of `best_points`: every point's score, and for an algorithm that has several seeds what each is above the first point."""
    lines = ["Average of in-domain and out-of-domain accuracy at the end, in points, over settings and seeds.", ""]
    lines += ["| algorithm | best | " + " | ".join(study.grid) + " |", "|---|---|" + "---|" * len(study.grid)]
    for algorithm, found in tuning.items():
        shown = [f"{100 * found['scores'][p]:.1f}" if p in found["scores"] else "" for p in study.grid]
        lines.append(f"| {algorithm} | {found['best']} | " + " | ".join(shown) + " |")
    for algorithm, found in tuning.items():
        settings = [s for s in [*study.settings, "all"] if any(s in gaps for gaps in found["above"].values())]
        if settings:
            lines += ["", f"{algorithm} minus its {found['against']}, paired by seed, 95 % (Student's t).", ""]
            lines += [f"| | {' | '.join(settings)} |", "|---|" + "---|" * len(settings)]
            lines += [f"| {p} | " + " | ".join(_gap(gaps.get(s)) for s in settings) + " |" for p, gaps in found["above"].items()]
    return "\n".join(lines) + "\n"


def markdown(study: ComparisonConfig, summary: dict[str, Any]) -> str:
    """Tables: accuracy by setting, paired differences over the noisy settings and by setting, runs and cost."""
    means = {(r["setting"], r["algorithm"], r["measure"]): r for r in summary["means"]}
    settings = [s for s in study.reported if any(key[0] == s for key in means)]
    present = _present(study, summary)
    lines = ["Accuracy at the end in points, mean over seeds: in domain / out of domain.", "", f"| | {' | '.join(settings)} |"]
    lines.append("|---|" + "---|" * len(settings))
    for name, shown in starts_by_setting(summary):
        lines.append(f"| *{name}* | {' | '.join(shown.get(s, '') for s in settings)} |")
    for algorithm in present:
        found = [tuple(means.get((s, algorithm, m)) for m in ("id", "ood")) for s in settings]
        lines.append(f"| {algorithm} | " + " | ".join(f"{_points(a)} / {_points(b)}" if a and b else "" for a, b in found) + " |")
    lines += ["", f"{study.reference} minus the rival, average of ID and OOD, paired by seed, 95 % (Student's t).", ""]
    lines += [f"| | {' | '.join(settings)} |", "|---|" + "---|" * len(settings)]
    pairs = {(p["setting"], p["rival"]): p for p in summary["paired"] if p["measure"] == "average"}
    for rival in present:
        if rival != study.reference:
            lines.append(f"| {rival} | " + " | ".join(_gap(pairs.get((s, rival))) for s in settings) + " |")
    column, rows = by_measure(study, summary)
    if rows:
        where = f"the mean over {', '.join(study.averaged)}" if column == "noisy" else column
        lines += ["", f"{study.reference} minus the rival by every measure, {where}. {SAMPLED_NOTE}", ""]
        lines += [f"| | {' | '.join(MEASURES.values())} |", "|---|" + "---|" * len(MEASURES)]
        lines += [f"| {' | '.join(row)} |" for row in rows]
    lines += ["", "| | runs | collapsed | CPU s a run | peak MB |", "|---|---|---|---|---|"]
    for row in summary["runs"]:
        memory = row["peak_memory_bytes"] / 1e6
        lines.append(f"| {row['algorithm']} | {row['runs']} | {collapses(row)} | {row['cpu_seconds']:.0f} | {memory:.0f} |")
    return "\n".join(lines) + "\n"


def starts_by_setting(summary: dict[str, Any]) -> list[tuple[str, dict[str, str]]]:
    """(what it is, setting -> as shown) of what every algorithm starts from: the labels, and the accuracy of the warm start."""
    starts = summary["starts"]
    return [
        ("labels that are wrong", {entry["setting"]: f"{100 * entry['wrong_labels']:.1f}" for entry in starts}),
        ("at the start", {entry["setting"]: f"{100 * entry['id']:.1f} / {100 * entry['ood']:.1f}" for entry in starts}),
    ]


def collapses(row: dict[str, Any]) -> str:
    """The number of an algorithm's collapsed runs and, where there are any, the settings that they were in."""
    where = ", ".join(f"{setting} {number}" for setting, number in row["collapsed_in"].items())
    return f"{row['collapsed']} ({where})" if where else "0"


def _points(entry: dict[str, float]) -> str:
    return f"{100 * entry['mean']:.1f}"


def by_measure(study: ComparisonConfig, summary: dict[str, Any]) -> tuple[str, list[list[str]]]:
    """(the last setting reported that has results, a row for each rival: its name and the paired difference by each of MEASURES)."""
    measured = {entry["setting"] for entry in summary["means"]}
    column = next((s for s in reversed(study.reported) if s in measured), "")
    gaps = {(p["rival"], p["measure"]): p for p in summary["paired"] if p["setting"] == column}
    rivals = [name for name in _present(study, summary) if name != study.reference]
    return column, [[name, *(_gap(gaps.get((name, measure))) for measure in MEASURES)] for name in rivals]


def _present(study: ComparisonConfig, summary: dict[str, Any]) -> list[str]:
    """The study's algorithms that have results."""
    measured = {entry["algorithm"] for entry in summary["means"]}
    return [name for name in study.algorithms if name in measured]


def _gap(entry: dict[str, float] | None) -> str:
    return f"{100 * entry['mean']:+.1f} [{100 * entry['low']:+.1f}, {100 * entry['high']:+.1f}]" if entry else ""


def write(study: ComparisonConfig, records: list[dict[str, Any]], folder: str | Path) -> dict[str, Any]:
    """Write results.json (every record and the summary) and summary.md into `folder`. Returns the summary."""
    place = Path(folder)
    place.mkdir(parents=True, exist_ok=True)
    summary = {"tuning": best_points(study, records)} if study.grid else summarise(study, records)
    text = tuning_markdown(study, summary["tuning"]) if study.grid else markdown(study, summary)
    (place / "results.json").write_text(json.dumps({"summary": summary, "records": records}, indent=1) + "\n", encoding="utf-8")
    (place / "summary.md").write_text(text, encoding="utf-8")
    if not study.grid:
        from dfpo_core import comparison_report

        figures = comparison_report.figures(study, records, summary)
        for name, figure in figures.items():
            figure.savefig(place / f"{name}.png", dpi=110)
        (place / "report.html").write_text(comparison_report.render(study, records, summary, figures), encoding="utf-8")
    return summary
