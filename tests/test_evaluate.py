"""Evaluation on answers written by hand, and as a whole on tiny random policies with a real MLflow store."""

import json
import re

import numpy as np
import pyarrow
import pyarrow.parquet as parquet
import pytest
import torch

from dfpo_core import critics, evaluate, models, promote, report, tracking
from dfpo_core.config import parse_config
from dfpo_core.critic_model import CriticModel, save_critic
from dfpo_core.critics.flow import FlowConfig
from dfpo_core.errors import UserError

RIGHT = {  # per model: which of the questions 0..7 it answers; 0-3 sums, 4-5 products in domain, 6-7 out of domain
    "base": {0},
    "sft": {0, 1, 4, 6},
    "trained": {0, 1, 2, 4, 5},
}


def configuration(home="home", **values):
    values = {"evaluate": {"samples": 2, "bootstrap_samples": 4000}, "train": {"max_new_tokens": 3}} | values
    return parse_config({"home": str(home), "name": "a <b> run", "data": {"train": [{"kind": "jsonl", "name": "x"}]}, **values})


def place(index):
    return ("id_test", "sums") if index < 4 else ("id_test", "products") if index < 6 else ("ood_test", "sums")


@pytest.fixture
def answers():
    rows = []
    for model, right in RIGHT.items():
        for index in reversed(range(8)) if model == "sft" else range(8):  # pairing must not rely on the order
            split, domain = place(index)
            shared = {"split": split, "domain": domain, "row_id": f"r{index}", "question": f"{index} < <script>x</script>", "answer": "1"}
            known = index in right
            rows.append({"model": model, **shared, "response": "1" if known else "&0", "correct": known, "mean_at_k": 0.5 * known})
    return rows


@pytest.fixture
def summary(answers):
    return evaluate.summarise(configuration(), [evaluate.Policy(label, f"/{label}", label) for label in RIGHT], answers)


def find(entries, **wanted):
    (entry,) = (entry for entry in entries if wanted.items() <= entry.items())
    return entry


def test_accuracies_by_split_and_domain_are_counted_right(summary):
    expected = {
        ("sft", "id_test", "all"): (3 / 6, 6),
        ("sft", "id_test", "sums"): (2 / 4, 4),
        ("sft", "id_test", "products"): (1 / 2, 2),
        ("trained", "id_test", "all"): (5 / 6, 6),
        ("trained", "ood_test", "all"): (0.0, 2),
        ("base", "id_test", "all"): (1 / 6, 6),
    }
    for (model, split, domain), (mean, count) in expected.items():
        entry = find(summary["accuracy"], model=model, split=split, domain=domain)
        assert (entry["mean"], entry["count"]) == (pytest.approx(mean), count)
    assert find(summary["mean_at_k"], model="sft", split="id_test", domain="all")["mean"] == pytest.approx(0.25)


def test_differences_are_paired_by_question(summary):
    entry = find(summary["differences"], first="trained", second="sft", split="id_test", domain="all")
    assert entry["mean"] == pytest.approx(2 / 6)
    # trained has all that sft has and two of six more: a paired difference cannot fall below zero, an unpaired one could
    assert entry["low"] == 0
    assert find(summary["differences"], first="trained", second="sft", split="ood_test", domain="all")["mean"] == -0.5
    assert not [entry for entry in summary["differences"] if entry["second"] == "champion"]


def test_metric_names_are_those_of_the_design(summary):
    metrics = evaluate.metrics_of(summary)
    assert metrics["eval/id_test/sums/accuracy"] == pytest.approx(3 / 4)
    assert metrics["eval/id_test/all/accuracy_sft"] == pytest.approx(3 / 6)
    assert metrics["eval/id_test/all/gain_over_sft"] == pytest.approx(2 / 6)
    assert metrics["eval/id_test/all/sft_over_base"] == pytest.approx(2 / 6)
    assert metrics["eval/id_test/all/mean_at_k"] == pytest.approx(5 / 12)
    assert {name.split("/")[2] for name in evaluate.metrics_of(summary, domains=("all",))} == {"all"}
    assert all(np.isfinite(value) for value in metrics.values())


def test_samples_show_gains_and_losses_before_the_rest(answers):
    samples = report.pick_samples(answers, 3)
    # newly right: r2, r5; newly wrong: r6; right for none: r3, r7
    assert [sample["row_id"] for sample in samples] == ["r2", "r6", "r3"]
    assert samples[1]["sft_correct"] and not samples[1]["trained_correct"]
    assert len(report.pick_samples(answers, 100)) == 8


def test_the_report_escapes_text_and_loads_nothing(summary, answers):
    decision = promote.decide(summary, configuration().promote)
    html = report.render(configuration(), summary, answers, decision, report.figures(summary))
    assert html == report.render(configuration(), summary, answers, decision, report.figures(summary))
    assert "<script" not in html and "&lt;script&gt;" in html and "a &lt;b&gt; run" in html
    outside = re.findall(r"(?:src|href)\s*=\s*\"(?!data:)[^\"]*|url\(|@import", html)
    assert outside == []
    assert html.count("data:image/svg+xml;base64,") == 2
    assert "83.3%" in html and "The gate does not hold" in html


def test_questions_beyond_the_limit_are_left_out_whatever_their_order(tmp_path):
    rows = [{"row_id": f"r{i}", "domain": "sums"} for i in range(30)]
    chosen = []
    for order in (rows, rows[::-1]):
        for split in evaluate.SPLITS:
            parquet.write_table(pyarrow.Table.from_pylist(order), tmp_path / f"{split}.parquet")
        chosen.append({(row["split"], row["row_id"]) for row in evaluate.read_questions(tmp_path, 10)})
    assert chosen[0] == chosen[1] and len(chosen[0]) == 20


def test_a_missing_an_unreadable_and_an_empty_split_are_named(tmp_path):
    with pytest.raises(UserError, match=r"cannot read id_test\.parquet"):
        evaluate.read_questions(tmp_path, 0)
    (tmp_path / "id_test.parquet").write_text("no parquet")
    with pytest.raises(UserError, match=r"cannot read id_test\.parquet"):
        evaluate.read_questions(tmp_path, 0)
    parquet.write_table(pyarrow.table({"row_id": pyarrow.array([], pyarrow.string())}), tmp_path / "id_test.parquet")
    with pytest.raises(UserError, match="id_test is empty"):
        evaluate.read_questions(tmp_path, 0)


# ---------------------------------------------------------------------------------------------------------- the whole step


def write_questions(folder):
    folder.mkdir()
    for split, count in (("id_test", 12), ("ood_test", 6)):
        rows = [
            {"row_id": f"{split}{i}", "question": f"{i}+{i}", "answer": str(2 * i), "domain": ("sums", "more")[i % 2], "reward": "number"}
            for i in range(count)
        ]
        parquet.write_table(pyarrow.Table.from_pylist(rows), folder / f"{split}.parquet")


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory):
    """Base, SFT (the base's own weights: sft.steps = 0) and a trained policy, evaluated; the trained one is the champion already."""
    home = tmp_path_factory.mktemp("home")
    write_questions(home / "data")
    config = configuration(home, model=str(home / "base"))
    model, tokenizer = models.load_policy("scratch:tiny", home)
    models.save_policy(model, tokenizer, home / "base")
    models.save_policy(model, tokenizer, home / "sft")
    with torch.no_grad():
        model.lm_head.weight.add_(torch.randn(model.lm_head.weight.shape, generator=torch.Generator().manual_seed(0)) * 0.1)
    models.save_policy(model, tokenizer, home / "trained")
    parent = tracking.create_parent(config, "whole")
    with tracking.step_run(config, "train", parent) as step:
        step.log_artifacts(home / "trained", "policy")
    version = promote.register(step.client, "dfpo", step.run_id, {})
    step.client.set_registered_model_alias("dfpo", "champion", version)
    critic = CriticModel(model, critics.registry.get("flow")(model.config.hidden_size, FlowConfig()), layers=1)
    save_critic(critic.backbone, critic.head, home / "critic", {"name": "flow", "config": FlowConfig().model_dump(mode="json")})
    folders = [str(home / name) for name in ("data", "sft", "trained", "out", "html", "critic")]
    metrics = evaluate.run(config.to_json(), parent, *folders)
    return config, home, parent, step.client, metrics


def test_every_policy_answers_every_question(evaluated):
    config, home, *_ = evaluated
    answers = parquet.read_table(home / "out" / "answers.parquet").to_pylist()
    assert len(answers) == 4 * 18
    by_model = {label: [row["response"] for row in answers if row["model"] == label] for label in ("base", "sft", "trained", "champion")}
    assert by_model["base"] == by_model["sft"] and by_model["trained"] == by_model["champion"]
    assert by_model["trained"] != by_model["base"]


def test_equal_weights_differ_by_exactly_zero(evaluated):
    config, home, *_ = evaluated
    summary = json.loads((home / "out" / "evaluation.json").read_text())
    assert summary["champion_version"] == "1"
    for first, second in (("sft", "base"), ("trained", "champion")):
        entry = find(summary["differences"], first=first, second=second, split="id_test", domain="all")
        assert (entry["mean"], entry["low"], entry["high"]) == (0, 0, 0)


def test_files_and_headline_metrics_reach_mlflow(evaluated):
    config, home, parent, client, metrics = evaluated
    run = tracking.children(client, client.get_run(parent).info.experiment_id, parent)[-1]
    logged = {file.path for folder in ("evaluation", "figures", None) for file in client.list_artifacts(run.info.run_id, folder)}
    assert {"evaluation/evaluation.json", "evaluation/answers.parquet", "evaluation/report.html"} <= logged
    assert {"figures/accuracy.png", "figures/differences.png", "sample_answers.json"} <= logged
    assert client.get_run(parent).data.metrics == metrics
    assert [entry.dataset.name for entry in run.inputs.dataset_inputs] == ["id_test", "ood_test"]
    assert (home / "html").read_text().startswith("<!doctype html>")
    assert not [path for path in home.iterdir() if path.name.startswith(".")]  # no partial files


def test_a_registered_policy_loads_by_alias_with_transformers_and_gives_the_same_logits(evaluated, monkeypatch):
    from mlflow.artifacts import download_artifacts
    from transformers import AutoModelForCausalLM, AutoTokenizer

    config, home, _, client, _ = evaluated
    monkeypatch.setenv("MLFLOW_TRACKING_URI", client.tracking_uri)  # as a user of the registry sets it
    path = download_artifacts("models:/dfpo@champion")
    ids = AutoTokenizer.from_pretrained(path)("12+30", return_tensors="pt").input_ids
    with torch.no_grad():
        loaded = AutoModelForCausalLM.from_pretrained(path)(ids).logits
        original = AutoModelForCausalLM.from_pretrained(home / "trained")(ids).logits
    assert torch.equal(loaded, original)


def test_a_champion_whose_files_are_gone_is_one_line(evaluated, tmp_path):
    config, home, _, client, _ = evaluated
    experiment = tracking.ensure_store(config)
    run = client.create_run(experiment)
    client.create_registered_model("gone")
    version = client.create_model_version("gone", run.info.artifact_uri + "/policy", run_id=run.info.run_id).version
    with pytest.raises(UserError, match=r"promote\.registered_model: version 1 of gone cannot be read"):
        promote.download(client, "gone", version, str(tmp_path))


def test_the_report_shows_the_critic_and_mlflow_has_its_figures(evaluated):
    _, home, parent, client, _ = evaluated
    html = (home / "html").read_text()
    assert "<h2>The critic</h2>" in html and html.count("<figure>") == 4
    step = next(
        run for run in tracking.children(client, client.get_run(parent).info.experiment_id, parent) if "evaluate" in run.info.run_name
    )
    assert {"figures/value_fan.png", "figures/calibration.png"} <= {f.path for f in client.list_artifacts(step.info.run_id, "figures")}


def test_without_a_critic_there_is_nothing_to_show(tmp_path):
    assert evaluate.critic_figures(configuration(), "nowhere", str(tmp_path), []) == {}
