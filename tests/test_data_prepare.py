"""Splits without a common question, written all or nothing."""

import json
import os
import re
import unicodedata
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from question_files import write

from dfpo_core import noise
from dfpo_core.config import DataConfig, parse_config
from dfpo_core.data import prepare
from dfpo_core.data.sources import question_key
from dfpo_core.errors import UserError


def split(seed=1, **data):
    config = DataConfig(**data)
    return prepare.split(prepare.take(prepare.read_sources(config, seed), config, seed), config, seed)


def removed(prepared, gate="duplicate"):
    return {name: sum(entry["split"] == name and entry["gate"] == gate for entry in prepared.removed) for name in prepare.SPLITS}


def questions(table):
    return table["question"].to_pylist()


def test_tests_keep_a_question_that_training_also_has(tmp_path):
    train = write(tmp_path / "a.jsonl", ["One?", "two?", "three?", "four?", "TWO?", "five?"])
    ood = write(tmp_path / "b.jsonl", ["two?", "eight?", "five?"])
    test = write(tmp_path / "c.jsonl", ["one?", "five?", "nine?", "nine? "])
    prepared = split(train=[train], ood_test=[ood], id_test=[test])
    tables = prepared.tables
    assert questions(tables["id_test"]) == ["one?", "five?", "nine?"]
    assert questions(tables["ood_test"]) == ["two?", "eight?"]
    assert questions(tables["train"]) == ["three?", "four?"]
    assert removed(prepared) == {"train": 4, "id_test": 1, "ood_test": 1}
    places = [(entry["source"], entry["line"]) for entry in prepared.removed]
    assert places == [("data.id_test.0", 4), ("data.ood_test.0", 3)] + [("data.train.0", line) for line in (1, 2, 5, 6)]
    ids = {name: tables[name]["row_id"].to_pylist() for name in tables}
    assert prepared.removed[0]["reason"] == f"the same question as {ids['id_test'][2]}, there with the answer '2', here '3'"
    assert [entry["conflict"] for entry in prepared.removed] == [True, True, False, True, True, True]


@settings(max_examples=25, deadline=None)
@given(st.lists(st.text("aAbB \u00e9", min_size=1).filter(str.strip), min_size=8, max_size=30), st.integers(0, 9), st.randoms())
def test_splits_are_disjoint_and_the_test_is_a_function_of_the_questions(tmp_path_factory, drawn, seed, random):
    folder = tmp_path_factory.mktemp("split")
    keys = {question_key(question, None) for question in drawn}
    if len(keys) < 4:
        return
    prepared = split(seed, train=[write(folder / "a.jsonl", drawn)], id_test_size=3)
    tables = prepared.tables
    train, test = ({question_key(question, None) for question in questions(tables[name])} for name in ("train", "id_test"))
    assert train | test == keys and not train & test
    assert tables["id_test"].num_rows == len(test) == 3 and tables["train"].num_rows == len(train)
    assert removed(prepared)["train"] == len(drawn) - len(keys)
    random.shuffle(drawn)
    again = split(seed, train=[write(folder / "a.jsonl", drawn)], id_test_size=3).tables
    assert {question_key(question, None) for question in questions(again["id_test"])} == test


def test_another_seed_splits_off_other_questions(tmp_path):
    source = write(tmp_path / "a.jsonl", [f"question {index}" for index in range(200)])
    first, second = (set(questions(split(seed, train=[source], id_test_size=20).tables["id_test"])) for seed in (1, 2))
    assert len(first) == len(second) == 20 and len(first & second) < 10


def test_a_size_takes_a_sample_that_does_not_depend_on_file_order(tmp_path):
    names = [f"question {index}" for index in range(300)]
    forward = split(train=[write(tmp_path / "a.jsonl", names) | {"size": 50}], id_test_size=10).tables
    backward = split(train=[write(tmp_path / "a.jsonl", names[::-1]) | {"size": 50}], id_test_size=10).tables
    assert forward["train"].num_rows == 40
    assert set(questions(forward["train"])) == set(questions(backward["train"])) != set(names[:40])


@pytest.mark.parametrize(
    ("field", "data"),
    [
        ("data.id_test_size", {"train": ["a", "b", "c"], "id_test_size": 3}),
        ("data.train", {"train": ["a", "b"], "id_test": ["A", "b", "c"]}),
        ("data.ood_test", {"train": ["a", "b"], "ood_test": ["c"], "id_test": ["c"]}),
    ],
)
def test_an_empty_split_is_named(tmp_path, field, data):
    data = {key: [write(tmp_path / f"{key}.jsonl", value)] if isinstance(value, list) else value for key, value in data.items()}
    with pytest.raises(UserError) as raised:
        split(**data)
    assert raised.value.field == field


def test_one_id_for_two_questions_in_two_files_is_named(tmp_path):
    sources = [write(tmp_path / f"{name}.jsonl", [name], id="x") | {"domain": "d"} for name in ("a", "b")]
    with pytest.raises(UserError) as raised:
        split(train=sources[:1], id_test=sources[1:])
    problem = f"data: 1 ids name two different questions, the first is 'd/x' in {sources[0]['name']} and {sources[1]['name']};"
    assert str(raised.value) == f"{problem} give the sources different domains, or set id_column"


def test_bad_rows_above_the_allowed_share_give_one_line(tmp_path):
    good = write(tmp_path / "good.jsonl", ["a", "b"])
    bad = write(tmp_path / "bad.jsonl", ["a", "b", "", " "])
    read = prepare.read_sources(DataConfig(train=[good], ood_test=[bad]), 1)
    with pytest.raises(UserError) as raised:
        prepare.check_rejects(read, 0.49)
    where = f"2 of 4 rows are unusable, the first is {bad['name']} line 3, field question: is empty"
    assert str(raised.value).startswith(f"data.ood_test.0: {where}; correct the rows or data.ood_test.0 (columns, reward)")
    prepare.check_rejects(read, 0.5)


@pytest.fixture(scope="module")
def steps(tmp_path_factory):
    """Both data steps once, on a small generated source, with a real MLflow store."""
    pytest.importorskip("reasoning_gym")
    home = tmp_path_factory.mktemp("home")
    gym = {"kind": "reasoning_gym", "size": 300}
    settings_ = {
        "home": str(home),
        "seed": 5,
        "data": {"train": [gym | {"name": "chain_sum"}], "ood_test": [gym | {"name": "gcd", "size": 40}], "id_test_size": 50},
        "noise": {"kind": "plausible", "rate": 0.3},
    }
    config = parse_config(settings_)
    prepared = prepare.run(config.to_json(), "", str(home / "data"))
    noised = noise.run(config.to_json(), "", str(home / "data"), str(home / "noisy"))
    return config, prepared, noised


def test_prepare_writes_the_three_splits_and_a_report(steps):
    config, metrics, _ = steps
    folder = Path(config.home, "data")
    files = {f"{name}.parquet" for name in prepare.SPLITS} | {"rejects.jsonl", "removed.jsonl", "report.json", "data_report.html"}
    assert {path.name for path in folder.iterdir()} == files
    rows = {name: pq.read_table(folder / f"{name}.parquet").num_rows for name in prepare.SPLITS}
    assert rows["id_test"] == 50 and rows["train"] + 50 + metrics["data/train/duplicates_removed"] == 300
    assert {name: metrics[f"data/{name}/rows"] for name in rows} == rows
    assert metrics["data/rows_rejected"] == 0.0
    report = json.loads((folder / "report.json").read_text())
    assert [source["licences"] for source in report["sources"]] == [["Apache-2.0 (reasoning-gym)"]] * 2


def test_noise_changes_training_labels_only(steps):
    config, _, metrics = steps
    clean, noisy = Path(config.home, "data"), Path(config.home, "noisy")
    for name in ("id_test.parquet", "ood_test.parquet", "rejects.jsonl", "removed.jsonl", "report.json"):
        assert (clean / name).read_bytes() == (noisy / name).read_bytes()
    before, after = (pq.read_table(folder / "train.parquet") for folder in (clean, noisy))
    assert after.select(before.column_names).equals(before)
    assert after.column_names[-4:] == ["label", "clean_answer", "is_noisy", "noise_kind"]
    wrong = [a != b for a, b in zip(after["label"].to_pylist(), after["answer"].to_pylist(), strict=True)]
    assert metrics["noise/rate_measured"] == sum(wrong) / len(wrong) and 0.15 < metrics["noise/rate_measured"] < 0.45


def test_the_steps_are_in_mlflow_with_their_data(steps):
    from mlflow import MlflowClient

    config, prepared, noised = steps
    client = MlflowClient(config.tracking_uri)
    experiment = client.get_experiment_by_name("dfpo").experiment_id
    runs = {run.data.tags["dfpo.step"]: run for run in client.search_runs([experiment])}
    assert runs["prepare_data"].data.metrics == prepared and runs["noise_data"].data.metrics == noised
    logged = {entry.dataset.name: entry for entry in runs["prepare_data"].inputs.dataset_inputs}
    assert logged.keys() == {"train", "id_test", "ood_test", "gym:chain_sum", "gym:gcd"}
    tags = {tag.key: tag.value for tag in logged["train"].tags}
    assert tags["licence"] == "Apache-2.0 (reasoning-gym)" and len(tags["sha256"]) == 64


def test_prepare_ends_with_code_2_one_line_and_no_output(tmp_path, steps, capfd):
    config, _, _ = steps
    source = write(tmp_path / "bad.jsonl", ["a", "", "b"])
    broken = config.model_copy(update={"data": DataConfig(train=[source], id_test_size=1)})
    with pytest.raises(SystemExit) as ended:
        prepare.run(broken.to_json(), "", str(tmp_path / "out"))
    assert ended.value.code == 2
    lines = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error:")]
    assert lines == [
        f"error: data.train.0: 1 of 3 rows are unusable, the first is {source['name']} line 2, field question: is empty; "
        "correct the rows or data.train.0 (columns, reward), or raise data.max_reject_fraction"
    ]
    assert [path.name for path in tmp_path.iterdir()] == ["bad.jsonl"]


@pytest.mark.skipif("DFPO_DATA_DIR" not in os.environ, reason="DFPO_DATA_DIR names no folder with the real data files")
def test_math_and_science_from_the_real_files_share_no_question_and_no_thirteen_words_between_train_and_test():
    names = {"train": ("gsm8k", "math", "arc_challenge"), "id_test": ("gsm8k", "math500", "arc_challenge"), "ood_test": ("mmlu_stem",)}
    sources = {split_name: [{"kind": "dataset", "name": name} for name in entries] for split_name, entries in names.items()}
    prepared = split(folder=os.environ["DFPO_DATA_DIR"], overlap_common=100_000, **sources)
    tables = prepared.tables
    keys = {name: {question_key(q, c) for q, c in zip(questions(t), t["choices"].to_pylist(), strict=True)} for name, t in tables.items()}
    assert not keys["train"] & (keys["id_test"] | keys["ood_test"]) and not keys["id_test"] & keys["ood_test"]

    def grams(name):
        texts = (re.findall(r"[^\W_]+", unicodedata.normalize("NFKC", question).lower()) for question in questions(tables[name]))
        return {" ".join(words[start : start + 13]) for words in texts for start in range(len(words) - 12)}

    assert not grams("train") & (grams("id_test") | grams("ood_test"))
    read = sum(tables[name].num_rows for name in tables) + len(prepared.removed)
    assert read == 7473 + 7470 + 1056 + 1319 + 500 + 1172 + 3018
    gone = {entry["row_id"]: entry["gate"] for entry in prepared.removed}
    assert gone["arc_challenge/CSZ20740"] == "overlap"  # the test split has it as CSZ_2009_8_CSZ20740
