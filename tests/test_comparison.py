"""The comparison: its matrix, its statistics by hand, real cells that learn something, resuming after a kill, refusals."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import yaml
from scipy import stats

from dfpo_core import comparison, comparison_report
from dfpo_core.data import chains
from dfpo_core.errors import UserError
from dfpo_core.statistics import student_interval

ROOT = Path(__file__).resolve().parent.parent


def small(home: Path, **changes) -> dict:
    """Two algorithms, two settings, two seeds of a few steps each."""
    sums = {"kind": "chains", "name": "sums", "size": 64, "options": {"terms": 2, "digits": 1}}
    train = {"steps": 2, "prompts_per_step": 4, "samples_per_prompt": 2, "max_new_tokens": 4, "save_every": 9}
    base = {
        "home": str(home),
        "model": "scratch:tiny",
        "data": {"train": [sums], "id_test_size": 10, "ood_test": [{"kind": "chains", "name": "maxima", "size": 10}]},
        "train": train,
    }
    values = {
        "seeds": [1, 2],
        "base": base,
        "warm_start": {"sft": {"steps": 3, "batch_size": 8, "micro_batch_size": 8}},
        "settings": {"clean": {}, "wrong": {"noise": {"kind": "plausible", "rate": 0.5}}},
        "algorithms": {"dfpo": {"train": {"critic": {"width": 8, "loss_levels": 4}}}, "grpo": {}},
        "curve_every": 1,
    }
    return values | changes


def test_the_noisy_average_is_over_the_settings_that_are_named(tmp_path):
    three = {"clean": {}, "wrong": {"noise": {"kind": "plausible", "rate": 0.5}}, "more": {"noise": {"kind": "plausible", "rate": 0.7}}}
    ends = {"clean": 0.9, "wrong": 0.6, "more": 0.2}
    records = [
        record(setting, name, seed, 0.1, end, ood=end) for setting, end in ends.items() for name in ("dfpo", "grpo") for seed in (1, 2)
    ]
    for noisy, expected in ([[], [0.4, 0.4]], [["clean", "more"], [0.55, 0.55]], [["wrong"], []]):  # of one setting: its own column again
        study = comparison.parse(small(tmp_path, settings=three, noisy=noisy))
        summary = comparison.summarise(study, records)
        means = [r["mean"] for r in summary["means"] if r["setting"] == "noisy" and r["measure"] == "average"]
        assert means == pytest.approx(expected)
        assert ("noisy |" in comparison.markdown(study, summary)) == bool(expected)
    with pytest.raises(UserError, match="noisy: 'other' is not defined"):
        comparison.parse(small(tmp_path, noisy=["other"]))
    with pytest.raises(UserError, match="settings.noisy: the mean over the noisy settings has this name"):
        comparison.parse(small(tmp_path, settings={"noisy": {}}))


def test_the_report_names_the_noisy_settings_and_draws_a_panel_for_each_setting_alone(tmp_path):
    settings = {"clean": {}} | {name: {"train": {"reward_noise": {"flip_rate": 0.1}}} for name in "abcde"}
    study = comparison.parse(small(tmp_path, settings=settings, noisy=["a", "b"]))
    records = [record(setting, name, seed, 0.1, 0.1 * seed) for setting in settings for name in study.algorithms for seed in (1, 2)]
    records = [r | {"questions": {"sums": 10}} for r in records if r["setting"] != "e"]  # five settings have records
    summary = comparison.summarise(study, records)
    drawn = comparison_report.figures(study, records, summary)
    panels = {name: [axes.get_title(loc="left") for axes in figure.axes] for name, figure in drawn.items()}
    assert panels["curves"] == ["clean", "a", "b", "c", "d"] and panels["forest"] == [*panels["curves"], "noisy"]
    assert "noisy: mean over a, b." in comparison_report.render(study, records, summary, drawn)


def test_no_two_algorithms_share_a_colour(tmp_path):
    study = comparison.parse(
        small(tmp_path, algorithms={"dfpo": {}} | {f"variant_{i}": {"train": {"algorithm": "ppo"}} for i in range(30)})
    )
    colours = dict(comparison_report._colours(study))
    assert list(colours) == list(study.algorithms) and len(set(colours.values())) == 31


def record(setting, algorithm, seed, start, end, ood=0.2, diverged="") -> dict:
    curve = [{"step": 0, "id_test": start, "ood_test": ood}, {"step": 10, "id_test": end, "ood_test": ood}]
    rest = {"noise_rate": 0.25, "cpu_seconds": 1.0, "peak_memory_bytes": 1.0}
    return {"setting": setting, "algorithm": algorithm, "seed": seed, "point": "", "curve": curve, "diverged": diverged, **rest}


def test_the_matrix_goes_seed_by_seed_and_leaves_out_what_only_says(tmp_path):
    study = comparison.parse(small(tmp_path, only={"wrong": ["dfpo"]}))
    expected = ["clean.dfpo.1", "clean.grpo.1", "wrong.dfpo.1", "clean.dfpo.2", "clean.grpo.2", "wrong.dfpo.2"]
    assert [cell.key for cell in comparison.cells(study)] == expected


def test_a_cell_lays_algorithm_over_setting_over_base(tmp_path):
    study = comparison.parse(small(tmp_path, grid={"high": {"train": {"learning_rate": 0.5}}}))
    config = comparison.cell_config(study, comparison.Cell("wrong", "grpo", 2, "high"), "/somewhere")
    assert (config.train.algorithm, config.noise.rate, config.seed, config.train.learning_rate) == ("grpo", 0.5, 2, 0.5)
    assert (config.model, config.sft.steps, config.train.steps) == ("/somewhere", 0, 2)


def test_scores_of_a_cell_by_hand():
    cell = record("clean", "dfpo", 1, 0.2, 0.6, ood=0.4)
    cell["curve"].insert(1, {"step": 5, "id_test": 0.5, "ood_test": 0.4})
    assert comparison.score_of(cell, "id") == 0.6
    assert comparison.score_of(cell, "average") == pytest.approx(0.5)
    # averages 0.3, 0.45, 0.5 at 0, 5, 10: trapezoids 1.875 + 2.375 over 10
    assert comparison.score_of(cell, "area") == pytest.approx(0.425)
    assert comparison.score_of(cell, "sampled") is None
    cell["curve"].append({"step": 30, "id_test": 0.6, "ood_test": 0.4})
    for point, share in zip(cell["curve"][1:], (0.1, 0.3, 0.5), strict=True):  # of steps 1 to 5, 6 to 10, 11 to 30
        point["metrics"] = {"reward/clean": share, "reward/noisy": 0.9}
    assert comparison.score_of(cell, "sampled") == pytest.approx((5 * 0.1 + 5 * 0.3 + 20 * 0.5) / 30)
    assert not comparison.collapsed(cell)
    assert comparison.collapsed(record("clean", "ppo", 1, 0.5, 0.4)) and comparison.collapsed(
        record("clean", "ppo", 1, 0.1, 0.2, diverged="x")
    )


def test_every_measure_is_compared_and_what_a_rival_has_not_stays_empty(tmp_path):
    study = comparison.parse(small(tmp_path))
    records = [
        record(setting, name, seed, 0.1, 0.3 + 0.1 * (name == "dfpo"))
        for setting in ("clean", "wrong")
        for name in study.algorithms
        for seed in (1, 2)
    ]
    rows = comparison.markdown(study, comparison.summarise(study, records)).split("dfpo minus the rival by every measure, wrong.")[1]
    gap = "+10.0 [+10.0, +10.0]"  # area: half of what both ends differ by on average
    assert f"| grpo | {gap} | +0.0 [+0.0, +0.0] | +5.0 [+5.0, +5.0] | +2.5 [+2.5, +2.5] |  |" in rows
    for one in records:
        one["curve"][-1]["metrics"] = {"reward/clean": 0.2 + 0.01 * one["seed"] * (one["algorithm"] == "dfpo")}
    rows = comparison.markdown(study, comparison.summarise(study, records)).split("dfpo minus the rival by every measure, wrong.")[1]
    # differences of 1 and 2 points: mean 1.5, standard error 1 / 2, t of one degree of freedom 12.706
    assert "| +2.5 [+2.5, +2.5] | +1.5 [-4.9, +7.9] |" in rows
    summary = comparison.summarise(study, records)
    page = comparison_report.render(study, [one | {"questions": {"sums": 10}} for one in records], summary, {})
    assert "dfpo minus each rival by every measure, wrong" in page and ">+1.5 [-4.9, +7.9]</td>" in page
    alone = comparison.summarise(study, [one for one in records if one["seed"] == 1])
    only = comparison.summarise(study, [one for one in records if one["algorithm"] == "dfpo"])
    assert "grpo" not in comparison.markdown(study, only)  # no rows of what has not run
    assert "by every measure" not in comparison_report.render(study, [], alone, {})  # no interval of one pair
    assert "by every measure" not in comparison.markdown(study, comparison.summarise(study, []))  # nothing has run yet


def test_tables_tell_what_every_algorithm_starts_from_and_where_runs_collapsed(tmp_path):
    study = comparison.parse(small(tmp_path))
    ends = {"clean": (0.5, 0.7), "wrong": (0.3, 0.1)}  # seeds start at 0.2 and 0.4: seed 2 of wrong ends below
    records = [record(setting, "dfpo", seed, 0.2 * seed, ends[setting][seed - 1], ood=0.1 * seed) for setting in ends for seed in (1, 2)]
    records = [one | {"noise_rate": 0.1 * one["seed"] * (one["setting"] == "wrong"), "questions": {"sums": 10}} for one in records]
    summary = comparison.summarise(study, records)
    assert summary["runs"][0]["collapsed"] == 1 and summary["runs"][0]["collapsed_in"] == {"wrong": 1}
    text = comparison.markdown(study, summary)
    assert "| *labels that are wrong* | 0.0 | 15.0 |" in text and "| *at the start* | 30.0 / 15.0 | 30.0 / 15.0 |" in text
    assert "| dfpo | 4 | 1 (wrong 1) |" in text
    page = comparison_report.render(study, records, summary, {})
    assert ">15.0</td>" in page and ">30.0 / 15.0</td>" in page and ">1 (wrong 1)</td>" in page
    without = comparison.summarise(study, records[:2])
    assert "| dfpo | 2 | 0 |" in comparison.markdown(study, without) and [s["setting"] for s in without["starts"]] == ["clean"]


def test_panels_are_spread_evenly_over_rows():
    assert [comparison_report._grid(n, 5) for n in (1, 3, 5, 6, 9, 11)] == [(1, 1), (1, 3), (1, 5), (2, 3), (2, 5), (3, 4)]


def test_differences_are_paired_by_seed_and_averaged_over_the_noisy_settings(tmp_path):
    study = comparison.parse(small(tmp_path, seeds=[1, 2, 3], settings={"clean": {}, "a": {}, "b": {}}))
    ends = {("a", "dfpo"): [0.5, 0.6, 0.9], ("a", "grpo"): [0.4, 0.3, 0.5], ("b", "dfpo"): [0.5, 0.5, 0.5], ("b", "grpo"): [0.5, 0.4, 0.1]}
    records = [record(s, a, seed, 0.1, end[seed - 1]) for (s, a), end in ends.items() for seed in (1, 2, 3)]
    paired = {(p["setting"], p["measure"]): p for p in comparison.summarise(study, records)["paired"]}
    gaps = np.array([0.1 + 0.0, 0.3 + 0.1, 0.4 + 0.4]) / 2  # mean over a and b of the ID difference, seed by seed
    low, high = stats.t.interval(0.95, 2, gaps.mean(), stats.sem(gaps))
    found = paired["noisy", "id"]
    assert (found["mean"], found["low"], found["high"], found["seeds"]) == pytest.approx((gaps.mean(), low, high, 3))
    assert paired["a", "id"]["mean"] == pytest.approx((0.1 + 0.3 + 0.4) / 3) and ("clean", "id") not in paired


def test_a_seed_that_lacks_a_noisy_setting_is_left_out_of_their_average(tmp_path):
    study = comparison.parse(small(tmp_path, settings={"clean": {}, "a": {}, "b": {}}))
    records = [record(s, "dfpo", seed, 0.1, 0.5) for s, seed in (("a", 1), ("b", 1), ("a", 2))]
    means = {(m["setting"], m["measure"]): m["seeds"] for m in comparison.summarise(study, records)["means"]}
    assert means["noisy", "id"] == 1 and means["a", "id"] == 2


def test_student_interval_agrees_with_scipy_and_refuses_one_value():
    values = np.array([0.1, 0.4, 0.2, 0.6])
    interval = student_interval(values, confidence=0.9)
    assert (interval.low, interval.high) == pytest.approx(stats.t.interval(0.9, 3, values.mean(), stats.sem(values)))
    with pytest.raises(ValueError, match="at least two"):
        student_interval(values[:1])


def test_the_best_point_of_a_grid_is_the_one_with_the_highest_mean(tmp_path):
    study = comparison.parse(small(tmp_path, grid={"low": {}, "high": {}}))
    ends = {"low": (0.5, 0.1), "high": (0.4, 0.3)}
    records = [record("clean", "dfpo", s, 0.1, end) | {"point": p} for p, of in ends.items() for s, end in enumerate(of, 1)]
    best = comparison.best_points(study, records)["dfpo"]
    assert best["best"] == "high" and best["scores"]["low"] == pytest.approx((0.35 + 0.15) / 2)
    assert best["scores"]["high"] == pytest.approx((0.3 + 0.25) / 2)
    gaps = np.array([0.3 - 0.35, 0.25 - 0.15])
    above = best["above"]["high"]["all"]
    assert (above["low"], above["high"]) == pytest.approx(stats.t.interval(0.95, 1, gaps.mean(), stats.sem(gaps)))
    assert above == best["above"]["high"]["clean"]
    text = comparison.tuning_markdown(study, {"dfpo": best})
    assert "dfpo minus its low" in text and f"| high | {100 * gaps.mean():+.1f} [" in text


def test_an_unfinished_tuning_compares_what_every_point_has(tmp_path):
    study = comparison.parse(small(tmp_path, grid={"low": {}, "high": {}}))
    found = (("low", 1, 0.5), ("low", 2, 0.1), ("high", 1, 0.4))  # on average low is below high, on the seed of both above it
    best = comparison.best_points(study, [record("clean", "dfpo", s, 0.1, end) | {"point": p} for p, s, end in found])["dfpo"]
    assert best["best"] == "low" and best["runs"] == 1 and best["above"] == {"high": {}}
    assert comparison.best_points(study, [record("clean", "dfpo", s, 0.1, 0.5) | {"point": p} for p, s in (("low", 1), ("high", 2))]) == {}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A whole small study, run once."""
    folder = tmp_path_factory.mktemp("study")
    study = comparison.parse(small(folder / "home", seeds=[1], only={"clean": ["grpo"]}))
    parent = comparison.open_parent(study)
    records = comparison.run(study, folder / "out", parent_run_id=parent)
    comparison.write(study, records, folder / "out")
    return study, folder, parent, records


def test_cells_of_one_seed_start_from_the_same_policy_on_the_same_questions(finished):
    _, _, _, records = finished
    assert len(records) == 3 and len({json.dumps(r["curve"][0]["domains"]) for r in records}) == 1
    assert [p["step"] for p in records[0]["curve"]] == [0, 1, 2]
    rates = {r["setting"]: r["noise_rate"] for r in records}
    assert rates["clean"] == 0 and 0.3 < rates["wrong"] < 0.7
    assert records[0]["questions"] == {"sums": 10, "maxima": 10}


def test_a_cell_shows_its_trainer_wherever_the_curve_has_a_point(finished):
    study, _, _, records = finished
    seen = []
    checkpoint = comparison.warm_start(study)
    cell = comparison.find_cell(study, f"{records[0]['setting']}.{records[0]['algorithm']}.1")
    again = comparison.run_cell(study, cell, checkpoint, lambda trainer: seen.append(trainer.steps_done))
    assert seen == [point["step"] for point in again["curve"]]
    assert [p["domains"] for p in again["curve"]] == [p["domains"] for p in records[0]["curve"]]  # looking changes nothing


def test_every_cell_is_a_tagged_child_of_the_parent_run(finished):
    study, folder, parent, _ = finished
    from dfpo_core import tracking
    from dfpo_core.config import parse_config

    client = tracking.connect(tracking.tracking_uri(parse_config(study.base)))
    runs = tracking.children(client, client.get_run(parent).info.experiment_id, parent)
    assert {run.info.run_name for run in runs} == {cell.key for cell in comparison.cells(study)}
    tags = {(run.data.tags["dfpo.setting"], run.data.tags["dfpo.algorithm"], run.data.tags["dfpo.seed"]) for run in runs}
    assert ("wrong", "grpo", "1") in tags
    assert all("eval/id_test/all" in run.data.metrics and run.info.status == "FINISHED" for run in runs)


def test_results_are_written_as_json_and_as_a_table(finished):
    _, folder, _, records = finished
    written = json.loads((folder / "out" / "results.json").read_text())
    assert written["records"] == records
    assert "| dfpo |" in (folder / "out" / "summary.md").read_text()


def test_a_study_that_was_killed_goes_on_and_keeps_the_cells_it_has(tmp_path):
    values = small(tmp_path / "home", seeds=[1], settings={"clean": {}})
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(values))
    code = "import sys; from dfpo_core import comparison as c\nif __name__ == '__main__': s = c.load(sys.argv[1]); c.run(s, sys.argv[2])"
    (tmp_path / "go.py").write_text(code)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(tmp_path / "go.py"), str(tmp_path / "study.yaml"), str(tmp_path / "out")]
    process = subprocess.Popen(command, env=environment, start_new_session=True)
    deadline = time.monotonic() + 240
    while not list((tmp_path / "out").glob("cells/*.json")):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    kept = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("cells/*.json")}
    assert len(kept) == 1
    study = comparison.load(tmp_path / "study.yaml")
    assert len(comparison.run(study, tmp_path / "out")) == 2
    assert {path: path.stat().st_mtime_ns for path in kept} == kept


def test_a_cell_of_another_configuration_is_run_again(tmp_path):
    study = comparison.parse(small(tmp_path))
    cell = comparison.cells(study)[0]
    changed = small(tmp_path)
    changed["base"]["train"]["learning_rate"] = 0.5
    assert comparison.cell_sha256(study, cell) != comparison.cell_sha256(comparison.parse(changed), cell)
    moved = comparison.parse(small(tmp_path / "elsewhere"))
    assert comparison.cell_sha256(study, cell) == comparison.cell_sha256(moved, cell)


@pytest.mark.parametrize(
    ("changes", "field", "reason"),
    [
        ({"seeds": []}, "seeds", "at least 1"),
        ({"colour": 1}, "colour", "not permitted"),
        ({"reference": "ppo"}, "reference", "no entry of algorithms"),
        ({"settings": {"A b": {}}}, "settings.A b", "file name"),
        ({"only": {"clean": ["ppo"]}}, "only.clean", "not defined"),
        ({"algorithms": {"dfpo": {"train": {"stepz": 1}}}}, "clean.dfpo.1: train.stepz", "unknown key"),
        ({"algorithms": {"dfpo": {}, "ppo": {"train": {"critic": {"width": 3}}}}}, "clean.ppo.1: train.critic.width", "unknown option"),
    ],
)
def test_a_study_that_cannot_run_is_refused_before_anything_is_spent(tmp_path, changes, field, reason):
    with pytest.raises(UserError) as caught:
        comparison.parse(small(tmp_path, **changes))
    assert caught.value.field == field and reason in str(caught.value)


def test_a_part_of_a_study_has_the_cells_that_it_has_in_the_whole(tmp_path):
    study = comparison.load(ROOT / "pipelines" / "configs" / "robustness.yaml")
    part = comparison.limited(study, ["flips_28", "labels_20"])
    assert comparison.cells(part) == [cell for cell in comparison.cells(study) if cell.setting in ("flips_28", "labels_20")]
    assert part.noisy == ["flips_28"]
    cell = comparison.cells(part)[0]
    assert comparison.cell_config(part, cell, "") == comparison.cell_config(study, cell, "")
    with pytest.raises(UserError, match="'flips_29' is no setting of robustness; choose from: flips_28, labels_40"):
        comparison.limited(study, ["flips_29"])


def reversed_number(text: str) -> int:
    return int(text[::-1])


@pytest.mark.parametrize("name", sorted(chains.FAMILIES))
def test_every_link_of_a_chain_is_right(name):
    operations = {"+": lambda a, b: a + b, "-": lambda a, b: a - b, "*": lambda a, b: a * b, "^": max}
    operation = operations[chains.FAMILIES[name]]
    for row in chains.rows(name, 200, seed=3, terms=4, digits=2):
        numbers = [reversed_number(part) for part in row["question"].rstrip("=").split(chains.FAMILIES[name])]
        links = [reversed_number(part) for part in row["response"].split("=")]
        assert len(numbers) == 4 and len(links) == 3 and min(links) >= 0
        for before, number, after in zip([numbers[0], *links], numbers[1:], links, strict=False):
            assert operation(before, number) == after
        assert row["answer"] == row["response"].rpartition("=")[2]


def test_a_longer_list_of_chains_begins_with_the_shorter_one():
    assert chains.rows("sums", 5, 1, 3, 2) == chains.rows("sums", 50, 1, 3, 2)[:5]
    assert chains.rows("sums", 5, 1, 3, 2) != chains.rows("sums", 5, 2, 3, 2)


@pytest.mark.parametrize(
    ("name", "options", "field"),
    [("sum", {}, "x.name"), ("sums", {"term": 2}, "x.options.term"), ("sums", {"terms": 1}, "x.options.terms")],
)
def test_a_chain_that_cannot_be_made_is_refused(name, options, field):
    with pytest.raises(UserError) as caught:
        chains.check(name, options, "x")
    assert caught.value.field == field


def written(folder: Path, name: str, values: dict) -> Path:
    path = folder / name
    path.write_text(yaml.safe_dump(values), encoding="utf-8")
    return path


def test_a_study_that_extends_another_lays_base_over_base_and_replaces_the_rest(tmp_path):
    written(tmp_path, "first.yaml", small(tmp_path))
    own = {"extends": "first.yaml", "seeds": [7], "base": {"train": {"steps": 5}}, "settings": {"clean": {}}}
    study = comparison.load(written(tmp_path, "second.yaml", own))
    assert [cell.key for cell in comparison.cells(study)] == ["clean.dfpo.7", "clean.grpo.7"]
    assert study.base["train"] == small(tmp_path)["base"]["train"] | {"steps": 5}


@pytest.mark.parametrize(
    ("other", "said"), [("second.yaml", "extends another study itself"), ("none.yaml", "cannot read"), (3, "cannot read")]
)
def test_a_study_extends_one_that_stands_alone(tmp_path, other, said):
    with pytest.raises(UserError, match=said):
        comparison.load(written(tmp_path, "second.yaml", {"extends": other}))


def test_the_warm_start_stops_at_the_accuracy_asked_for(tmp_path):
    from dfpo_core import models

    values = small(tmp_path, warm_start_accuracy=0.3, warm_start_every=10, warm_start={"sft": {"steps": 400, "batch_size": 32}})
    values["base"]["data"] = {"train": [{"kind": "chains", "name": "maxima", "size": 500, "options": {"terms": 2, "digits": 1}}]}
    values["base"]["data"] |= {"id_test": [{"kind": "chains", "name": "maxima", "size": 100, "options": {"terms": 2, "digits": 1}}]}
    values["warm_start"]["sft"] |= {"micro_batch_size": 32, "learning_rate": 1e-3}
    study = comparison.parse(values)
    model, tokenizer = models.load_policy(comparison.warm_start(study), tmp_path)
    config = comparison.cell_config(study, comparison.cells(study)[0], "")
    from dfpo_core.data.prepare import prepared_tables

    questions = [row | {"split": "id_test"} for row in prepared_tables(config.data, 0)["id_test"].to_pylist()]
    reached = comparison.accuracies(model, tokenizer, config, questions)["id_test"]
    assert 0.3 <= reached < 0.8  # far from what 400 steps reach


def test_a_warm_start_that_never_gets_there_says_so_and_leaves_nothing(tmp_path):
    study = comparison.parse(small(tmp_path, warm_start_accuracy=0.9, warm_start_every=3))
    with pytest.raises(UserError, match=r"warm_start_accuracy: not reached in 3 steps \(accuracy 0\.\d+\)"):
        comparison.warm_start(study)
    assert not list((tmp_path / "warm_starts").iterdir())


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("robustness", 360),
        ("robustness_tuning", 36),
        ("robustness_tuning_lambda", 30),
        ("robustness_tuning_kl", 36),
        ("robustness_tuning_dfpo", 72),
        ("robustness_tuning_again", 160),
        ("robustness_tuning_critic", 72),
        ("robustness_tuning_flow", 66),
        ("robustness_tuning_schedule", 81),
        ("robustness_confirmation", 200),
        ("robustness_votes", 140),
        ("ablation", 90),
        ("robustness_smollm2", 12),
    ],
)
def test_the_studies_that_come_with_the_package_are_valid(name, count):
    """Cells by hand: (5 x 12 + 3 x 4) x 5 seeds; 2 settings x 2 points x 9; 5 algorithms x 2 points x 3 seeds; 9 x 2 points x 2 seeds;
    4 settings x 9 points x 2 seeds; 4 settings x 5 points x 8 seeds; 6 algorithms x 2 settings x 3 points x 2 seeds;
    3 settings x 11 points x 2 seeds; 3 settings x 3 points x 9; 5 settings x 2 algorithms x 20 seeds; 7 algorithms x 20 seeds;
    30 variants x 3 seeds; 4 algorithms x 3 seeds."""
    assert len(comparison.cells(comparison.load(ROOT / "pipelines" / "configs" / f"{name}.yaml"))) == count
