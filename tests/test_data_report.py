"""The data report: every row that was read is accounted for, and the page says what happened."""

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from question_files import write

from dfpo_core import noise
from dfpo_core.config import DataConfig, PromptConfig, parse_config
from dfpo_core.data import prepare, report
from dfpo_core.errors import UserError
from dfpo_core.models import character_tokenizer

TEST = "A farmer has twelve red hens and each of the hens lays two eggs every single day of the week."


@pytest.fixture(scope="module")
def steps(tmp_path_factory):
    """Both data steps on rows of which one stops at every gate."""
    home = tmp_path_factory.mktemp("home")
    train = [f"What is {n} plus {n}?" for n in range(60)] + [f"Listen: {TEST}", "x" * 300, "What is 7 plus 7?", "what is 8 plus 8 ?"]
    sources = {
        "train": [write(home / "train.jsonl", train, licence="MIT") | {"domain": "<sums>"}],
        "id_test": [write(home / "id.jsonl", [TEST, "Nine & ten?"]) | {"domain": "farm"}],
        "ood_test": [{"kind": "reasoning_gym", "name": "gcd", "size": 30}],
    }
    with Path(sources["id_test"][0]["name"]).open("a") as file:
        file.write("not JSON\n")
    settings = {
        "home": str(home),
        "name": "a <b> name",
        "data": {**sources, "max_reject_fraction": 0.4},
        "prompt": {"too_long": "drop", "max_prompt_tokens": 280},
        "noise": {"kind": "symmetric", "rate": 0.4},
    }
    config = parse_config(settings)
    prepared = prepare.run(config.to_json(), "", str(home / "data"))
    noised = noise.run(config.to_json(), "", str(home / "data"), str(home / "noisy"))
    return config, prepared, noised


def facts(steps):
    return json.loads(Path(steps[0].home, "data", "report.json").read_text())


def text(page):
    """The page's text, entities resolved, as a reader sees it."""
    found = []
    parser = HTMLParser()
    parser.handle_data = found.append
    parser.feed(re.sub(r"<style>.*?</style>", "", page, flags=re.DOTALL))
    return " ".join(" ".join(found).split())


def test_every_row_that_was_read_is_in_one_column(steps):
    for source in facts(steps)["sources"]:
        gates = ("rejected", "not_sampled", "too_long", "duplicate", "overlap", "kept")
        assert source["read"] == sum(source[gate] for gate in gates)
    train, test = facts(steps)["sources"][:2]
    assert {gate: train[gate] for gate in ("read", "too_long", "duplicate", "overlap", "kept")} == {
        "read": 64, "too_long": 1, "duplicate": 1, "overlap": 1, "kept": 61
    }  # fmt: skip
    assert (test["read"], test["rejected"], test["kept"]) == (3, 1, 2)


def test_every_row_that_left_is_in_a_file_with_its_line_and_reason(steps):
    folder = Path(steps[0].home, "data")
    removed = [json.loads(line) for line in (folder / "removed.jsonl").read_text().splitlines()]
    assert [(entry["line"], entry["gate"]) for entry in removed if entry["source"] == "data.train.0"] == [
        (62, "too_long"), (63, "duplicate"), (61, "overlap")
    ]  # fmt: skip
    assert removed[0]["reason"] == "its prompt has 301 tokens, prompt.max_prompt_tokens is 280"
    (reject,) = [json.loads(line) for line in (folder / "rejects.jsonl").read_text().splitlines()]
    assert (reject["source"], reject["line"], reject["field"], reject["reason"]) == ("data.id_test.0", 3, "line", "is not JSON")


def test_metrics_count_the_same(steps):
    _, metrics, _ = steps
    assert metrics["data/train/rows"] == 61 == metrics["data/train/<sums>/rows".replace("<", "-").replace(">", "-")]
    assert [metrics[f"data/train/{gate}_removed"] for gate in ("too_long", "duplicates", "overlaps")] == [1, 1, 1]
    assert metrics["data/sources_without_licence"] == 1 and metrics["data/rows_rejected"] == 1
    assert metrics["data/train/prompt_tokens_max"] == max(len(f"What is {n} plus {n}?\n") for n in range(60))


def test_lengths_are_numpys_and_histograms_share_their_bins(steps):
    folder, lengths = Path(steps[0].home, "data"), facts(steps)["lengths"]
    for name in prepare.SPLITS:
        questions = pq.read_table(folder / f"{name}.parquet")["question"].to_pylist()
        one = lengths[name]["question_characters"]
        assert one["mean"] == pytest.approx(sum(map(len, questions)) / len(questions)) and one["max"] == max(map(len, questions))
        assert sum(one["counts"]) == len(questions)
    assert len({lengths[name]["prompt_tokens"]["top"] for name in prepare.SPLITS}) == 1


def test_a_missing_licence_is_a_warning_in_the_page_a_tag_and_a_metric(steps):
    from mlflow import MlflowClient

    config, _, _ = steps
    page = text(Path(config.home, "data", "data_report.html").read_text())
    assert f"data.id_test.0: {config.data.id_test[0].name} has no licence for 2 rows" in page
    client = MlflowClient(config.tracking_uri)
    runs = {run.data.tags["dfpo.step"]: run for run in client.search_runs([client.get_experiment_by_name("dfpo").experiment_id])}
    prepared = runs["prepare_data"]
    assert prepared.data.tags["dfpo.data.unlicensed"] == "data.id_test.0"
    inputs = {entry.dataset.name: {tag.key: tag.value for tag in entry.tags} for entry in prepared.inputs.dataset_inputs}
    origin = config.data.train[0].name
    assert inputs[origin]["licence"] == "MIT" and inputs[origin]["sha256"] == facts(steps)["sources"][0]["sha256"]
    assert inputs[config.data.id_test[0].name]["licence"] == "none"
    for step in ("prepare_data", "noise_data"):
        assert "data_report.html" in {file.path for file in client.list_artifacts(runs[step].info.run_id)}


def test_the_page_is_escaped_and_loads_nothing_from_elsewhere(steps):
    page = Path(steps[0].home, "noisy", "data_report.html").read_text()
    assert "a <b> name" not in page and "a &lt;b&gt; name" in page
    assert not re.findall(r"(?:src|href)=", page) and "http" not in page


def test_the_page_after_noise_shows_what_was_asked_for_what_was_measured_and_examples(steps):
    config, _, metrics = steps
    before, after = (text(Path(config.home, folder, "data_report.html").read_text()) for folder in ("data", "noisy"))
    rows = pq.read_table(Path(config.home, "noisy", "train.parquet"))
    wrong = sum(rows["is_noisy"].to_pylist()) / rows.num_rows
    assert (
        f"{wrong:.1%} of 61 training labels are wrong by design; 40.0% was asked for" in after and wrong == metrics["noise/rate_measured"]
    )
    assert "wrong by design" not in before
    shown = [row for row in rows.to_pylist() if row["is_noisy"] and row["question"] in after]
    assert len(shown) == report.EXAMPLES and all(f"{row['answer']} {row['label']}" in after for row in shown)


def test_examples_come_from_every_kind_and_domain(tmp_path):
    rows = [
        {"row_id": f"{domain}/{n}", "question": f"{domain} {n}", "answer": "1", "label": "2", "domain": domain, "is_noisy": True,
         "noise_kind": kind}
        for domain, kind in (("a", "x"), ("a", "y"), ("b", "x"))
        for n in range(50)
    ]  # fmt: skip
    clean = [rows[0] | {"row_id": "c", "label": "1", "is_noisy": False, "noise_kind": "none"}]
    pq.write_table(pa.Table.from_pylist(rows + clean), tmp_path / "train.parquet", row_group_size=7)
    found = report.noise_facts(pq.ParquetFile(tmp_path / "train.parquet"))
    assert found["domains"] == {"a": [101, 100], "b": [50, 50]} and found["kinds"] == {"x": 100, "y": 50, "none": 1}
    places = [(row["domain"], row["noise_kind"]) for row in found["examples"]]
    assert {place: places.count(place) for place in set(places)} == {("a", "x"): 4, ("a", "y"): 4, ("b", "x"): 4}


def test_examples_show_missing_labels_and_changed_questions(tmp_path):
    row = {"row_id": "d/1", "question": "waht is it", "clean_question": "what is it", "answer": "1", "label": "1", "domain": "d"}
    rows = [
        row | {"is_noisy": False, "noise_kind": "none"},
        row | {"row_id": "d/2", "question": "fine?", "clean_question": "fine?", "label": None, "is_noisy": False, "noise_kind": "missing"},
        row | {"row_id": "d/3", "question": "kept?", "clean_question": "kept?", "is_noisy": False, "noise_kind": "none"},
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "train.parquet")
    found = report.noise_facts(pq.ParquetFile(tmp_path / "train.parquet"))
    assert found["kinds"] == {"question": 1, "missing": 1, "none": 1}
    assert [(shown["row_id"], shown["noise_kind"]) for shown in found["examples"]] == [("d/2", "missing"), ("d/1", "question")]
    page = text(report._noise_examples(found["examples"]))
    assert "missing fine? 1 no label" in page and "question what is it waht is it 1" in page


def test_a_prompt_that_is_too_long_fails_the_step_unless_dropping_is_asked_for(tmp_path):
    data = DataConfig(train=[write(tmp_path / "a.jsonl", ["short", "q" * 50])], id_test_size=1)
    tables = prepare.take(prepare.read_sources(data, 1), data, 1)
    with pytest.raises(UserError) as raised:
        prepare.fit(tables, character_tokenizer(), PromptConfig(max_prompt_tokens=50))
    assert raised.value.field == "prompt.max_prompt_tokens" and "1 of 2 prompts are longer than 50 tokens" in str(raised.value)
    kept, dropped = prepare.fit(tables, character_tokenizer(), PromptConfig(max_prompt_tokens=50, too_long="drop"))
    assert kept["train"]["question"].to_pylist() == ["short"] and [entry["line"] for entry in dropped] == [2]
    kept, dropped = prepare.fit(tables, character_tokenizer(), PromptConfig(max_prompt_tokens=51))
    assert kept["train"]["prompt_tokens"].to_pylist() == [6, 51] and dropped == []


def test_a_split_of_which_every_prompt_is_too_long_is_named(tmp_path):
    data = DataConfig(train=[write(tmp_path / "a.jsonl", ["q" * 50, "r" * 60])], id_test_size=1)
    tables = prepare.take(prepare.read_sources(data, 1), data, 1)
    kept, _ = prepare.fit(tables, character_tokenizer(), PromptConfig(max_prompt_tokens=9, too_long="drop"))
    with pytest.raises(UserError, match="data.train: no row is left without prompts that are too long and duplicates"):
        prepare.split(kept, data, 1)
