"""Named data sets: one line of configuration reads the local file, a folder that `datasets` saved, or a copy of the hub's repository."""

import json
import os
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dfpo_core import domains
from dfpo_core.config import SourceConfig, parse_config
from dfpo_core.data.sources import check_source, question_key, read_source
from dfpo_core.domains.math import NUMBER_FAMILIES, last_boxed
from dfpo_core.errors import UserError

DATA = os.environ.get("DFPO_DATA_DIR", "")
needs_data = pytest.mark.skipif(not DATA, reason="DFPO_DATA_DIR names no folder with the real data files")

# What the hub's copies look like: rows in their columns, and what becomes of them.
HUB_ROWS = {
    "gsm8k": [{"question": "2 + 3?", "answer": "2 + 3 = <<2+3=5>>5\n#### 5"}],
    "math": [
        {
            "problem": "Half of 1?",
            "level": "Level 1",
            "type": "Counting & Probability",
            "solution": "It is $\\frac{1}{2}$, so $\\boxed{\\frac{1}{2}}$.",
        }
    ],
    "math500": [{"problem": "p", "solution": "s", "answer": "\\pi", "subject": "Geometry", "unique_id": "test/geometry/1.json"}],
    "aime24": [{"id": 60, "problem": "p", "solution": "s", "answer": "033", "year": "2024"}],
    "amc23": [{"id": 0, "question": "q", "answer": "27.0", "url": "u"}],
    "minerva_math": [{"question": "q", "answer": "1.2e-5"}],
    "arc_challenge": [{"id": "M_1", "question": "q", "choices": {"text": ["x", "y"], "label": ["1", "2"]}, "answerKey": "2"}],
    "mmlu_stem": [
        {"question": "q", "subject": "anatomy", "choices": ["w", "x", "y", "z"], "answer": 3},
        {"question": "other", "subject": "virology", "choices": ["w", "x", "y", "z"], "answer": 0},
    ],
    "super_gpqa": [
        {"uuid": "u1", "question": "q", "options": ["x", "y"], "answer": "y", "answer_letter": "B", "discipline": "Science"},
    ],
    "gpqa": [
        {
            "Record ID": f"rec{number}",
            "Question": f"question {number}",
            "Correct Answer": "right\n",
            **{f"Incorrect Answer {wrong}": f"wrong {wrong}" for wrong in (1, 2, 3)},
        }
        for number in range(60)
    ],
    "hle": [
        {"id": "1", "question": "q", "image": "", "answer": "Rome", "answer_type": "exactMatch", "category": "Other"},
        {"id": "2", "question": "q2", "image": "data:image/png;base64,", "answer": "1", "answer_type": "exactMatch", "category": "Math"},
        {
            "id": "3",
            "question": "Which?\n\nAnswer Choices:\nA. one\nB. two",
            "image": "",
            "answer": "B",
            "answer_type": "multipleChoice",
            "category": "Math",
        },
        {"id": "4", "question": "Which of A or B?", "image": "", "answer": "B", "answer_type": "multipleChoice", "category": "Math"},
    ],
    "simple_qa": [{"metadata": "{'topic': 'Art'}", "problem": "Who?", "answer": "Ada"}],
}
HUB_ROWS["arc_easy"] = HUB_ROWS["arc_challenge"]


def read(name, field="data.id_test.0", folder="", **options):
    return read_source(SourceConfig(kind="dataset", name=name, options=options), 1, field, str(folder))


def rows(*arguments, **options):
    return read(*arguments, **options).table.to_pylist()


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A folder that holds a data set under its hub id, as Parquet files of a copied repository with the card that lists them."""
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")

    def write(name):
        entry, repository = domains.data_set(name), tmp_path / "hub" / domains.data_set(name).hub
        card = ["---", "configs:"]
        for config in entry.configs or ("default",):
            card += [f"- config_name: {config}", "  data_files:"]
            for split in entry.splits.values():
                (repository / config).mkdir(parents=True, exist_ok=True)
                rows = HUB_ROWS[name] if len(entry.configs) < 2 else [row | {"type": config} for row in HUB_ROWS[name]]
                pq.write_table(pa.Table.from_pylist(rows), repository / config / f"{split.hub}.parquet")
                card += [f"  - split: {split.hub}", f"    path: {config}/{split.hub}.parquet"]
        (repository / "README.md").write_text("\n".join([*card, "---", ""]))
        return tmp_path / "hub"

    return write


@pytest.mark.parametrize("name", HUB_ROWS)
def test_the_hubs_columns_become_the_documented_ones(hub, name):
    entry = domains.data_set(name)
    field = "data.id_test.0" if "test" in entry.splits else "data.train.0"
    found = rows(name, field, hub(name))
    assert found and all(row["domain"] == name and row["licence"] == entry.licence for row in found)
    first = found[0]
    expected = {
        "gsm8k": ("2 + 3?", "5"),
        "math": ("Half of 1?", "\\frac{1}{2}"),
        "math500": ("p", "\\pi"),
        "aime24": ("p", "33"),
        "amc23": ("q", "27"),
        "minerva_math": ("q", "1.2e-5"),
        "arc_challenge": ("q", "2"),
        "arc_easy": ("q", "2"),
        "mmlu_stem": ("q", "D"),
        "super_gpqa": ("q", "B"),
        "hle": ("q", "Rome"),
        "simple_qa": ("Who?", "Ada"),
    }
    if name in expected:
        assert (first["question"], first["answer"]) == expected[name]


def test_every_data_set_has_an_example_of_its_hub_rows_here():
    assert set(HUB_ROWS) == set(domains.registry.get("math").data_sets) | set(domains.registry.get("science").data_sets)


def test_every_configuration_of_the_hub_is_read(hub):
    assert len(rows("math", "data.train.0", hub("math"))) == 7
    (found,) = rows("math", "data.train.0", hub("math"), subjects=["Number Theory"], by_subject=True)
    assert found["domain"] == "math.number_theory"


def test_gpqa_options_are_shuffled_by_question_and_the_right_one_stays_right(hub):
    found = rows("gpqa", folder=hub("gpqa"))
    assert all(row["choices"][row["choice_labels"].index(row["answer"])] == "right" for row in found)
    counts = {label: sum(row["answer"] == label for row in found) for label in "ABCD"}
    assert min(counts.values()) >= 5  # 60 draws from four: fewer than 5 of one has probability below 0.01
    assert rows("gpqa", folder=hub("gpqa")) == found


def test_what_is_not_for_us_is_left_out_with_its_reason_and_count(hub):
    hle = read("hle", folder=hub("hle"))
    assert hle.left_out == {"a question about a picture": 1, "a choice whose options do not stand one a line": 1}
    choice = hle.table.to_pylist()[1]
    assert (choice["question"], choice["choices"], choice["answer"], choice["reward"]) == ("Which?", ["one", "two"], "B", "choice")
    assert hle.lines == [1, 3] and hle.rejects == []
    assert read("mmlu_stem", folder=hub("mmlu_stem")).left_out == {"of another subject": 1}


def test_a_folder_that_datasets_saved_reads_like_the_hub_and_like_jsonl(tmp_path, hub):
    from datasets import Dataset, DatasetDict

    saved = DatasetDict({"train": Dataset.from_list(HUB_ROWS["gsm8k"]), "test": Dataset.from_list(HUB_ROWS["gsm8k"])})
    saved.save_to_disk(tmp_path / "saved" / "gsm8k")
    Dataset.from_list(HUB_ROWS["gsm8k"]).save_to_disk(tmp_path / "stem" / "gsm8k_test")
    lines = tmp_path / "rows.jsonl"
    lines.write_text(json.dumps(HUB_ROWS["gsm8k"][0]) + "\n")
    expected = rows("gsm8k", folder=hub("gsm8k"))
    for found in (rows("gsm8k", folder=tmp_path / "saved"), rows("gsm8k", folder=tmp_path / "stem"), rows("gsm8k", path=str(lines))):
        assert [row | {"source": ""} for row in found] == [row | {"source": ""} for row in expected]


def test_a_hub_copy_with_a_licence_of_its_own_states_it(tmp_path):
    from datasets import Dataset, DatasetInfo

    Dataset.from_list(HUB_ROWS["gsm8k"], info=DatasetInfo(license="odc-by")).save_to_disk(tmp_path / "set")
    found = read_source(SourceConfig(kind="hub", name=str(tmp_path / "set")), 1, "data.train.0")
    assert found.table["licence"].to_pylist() == ["odc-by"]
    given = read_source(SourceConfig(kind="hub", name=str(tmp_path / "set"), licence="mine"), 1, "data.train.0")
    assert given.table["licence"].to_pylist() == ["mine"]


def test_the_file_in_the_folder_goes_before_a_copy_of_the_repository(tmp_path, hub):
    folder = hub("gsm8k")
    (folder / "gsm8k_test.jsonl").write_text('{"question": "local?", "answer": 1, "licence": "mine"}\n')
    (found,) = rows("gsm8k", folder=folder)
    assert (found["question"], found["licence"]) == ("local?", "mine")


def test_mistakes_about_a_named_data_set_are_one_line():
    def message(function, *arguments, **options):
        with pytest.raises(UserError) as raised:
            function(*arguments, **options)
        return str(raised.value)

    assert message(SourceConfig, kind="dataset", name="gsm9k").startswith("data: unknown data set 'gsm9k'; choose one of: gsm8k")
    train = message(check_source, SourceConfig(kind="dataset", name="math500"), "data.train.0")
    assert train == "data.train.0.options.split: the data set math500 has no split 'train'; choose one of: test"
    unknown = message(read, "gsm8k", sample=3)
    assert unknown.startswith("data.id_test.0.options.sample: unknown option of the data set gsm8k; choose one of: split, path")
    assert message(read, "gsm8k", folder="/no/such/folder").startswith("data.folder: there is no folder /no/such/folder")
    assert message(parse_config, {"data": {"domain": "maths"}}).startswith(
        "data.domain: unknown name 'maths'; choose one of: dialogue, math, science"
    )


def test_a_subject_that_is_asked_for_must_be_there(tmp_path):
    lines = tmp_path / "rows.jsonl"
    lines.write_text('{"question": "q", "choices": ["x", "y"], "answer": 0}\n')
    assert read("mmlu_stem", path=str(lines)).rejects == []
    assert read("mmlu_stem", path=str(lines), subjects=["anatomy"]).rejects[0]["field"] == "subject"


def test_a_domain_fills_what_the_configuration_leaves_open():
    config = parse_config({"data": {"domain": "math", "ood_test": [{"kind": "dataset", "name": "aime24"}]}, "prompt": {"domain": "math"}})
    assert [source.name for source in config.data.train] == ["gsm8k", "math"]
    assert [source.name for source in config.data.ood_test] == ["aime24"]
    assert config.data.train[0].licence == "MIT" and config.prompt.examples
    assert parse_config(json.loads(config.to_json())) == config
    own = parse_config({"data": {"domain": "science"}, "prompt": {"domain": "science", "system": "Be brief.", "examples": []}})
    assert (own.prompt.system, own.prompt.examples) == ("Be brief.", [])
    assert own.prompt.answer_format == domains.registry.get("science").prompt.answer_format


@pytest.mark.parametrize("name", domains.NAMES)
def test_every_source_of_a_domain_can_be_asked_for_and_no_test_question_set_is_trained_on(name):
    entry = domains.registry.get(name)
    for split in ("train", "id_test", "ood_test"):
        for index, source in enumerate(getattr(entry, split)):
            check_source(SourceConfig(**source), f"data.{split}.{index}")
    trained = {source["name"] for source in entry.train}
    assert not trained & {source["name"] for source in entry.ood_test}


@pytest.mark.parametrize("family", NUMBER_FAMILIES)
def test_every_listed_family_gives_plain_numbers(family):
    pytest.importorskip("reasoning_gym")
    found = read_source(SourceConfig(kind="reasoning_gym", name=family, size=20), 1, "data.train.0")
    assert found.table.num_rows == 20


@pytest.mark.parametrize(
    ("solution", "answer"),
    [
        ("so \\boxed{7}", "7"),
        ("first \\boxed{1}, then \\boxed{\\frac{a}{b}}.", "\\frac{a}{b}"),
        ("$\\fbox{x}$", "x"),
        ("is $\\boxed 5$", "5"),
        ("\\boxed{\\text{(A)}}", "\\text{(A)}"),
    ],
)
def test_the_answer_of_a_worked_solution_is_its_last_box(solution, answer):
    assert last_boxed(solution) == answer


@pytest.mark.parametrize("solution", ["no box", "\\boxed{1"])
def test_a_solution_without_a_closed_box_is_a_bad_row(tmp_path, solution):
    lines = tmp_path / "rows.jsonl"
    lines.write_text(json.dumps({"problem": "p", "solution": solution, "type": "Algebra", "level": "1"}) + "\n")
    (reject,) = read("math", "data.train.0", path=str(lines)).rejects
    assert (reject["line"], reject["field"]) == (1, "answer")


@needs_data
@pytest.mark.parametrize(
    ("name", "field", "count"),
    [
        ("gsm8k", "data.train.0", 7473),
        ("gsm8k", "data.id_test.0", 1319),
        ("math", "data.train.0", 7470),
        ("math500", "data.id_test.0", 500),
        ("arc_challenge", "data.train.0", 1056),
        ("arc_challenge", "data.id_test.0", 1172),
        ("mmlu_stem", "data.ood_test.0", 3018),
    ],
)
def test_the_real_files_are_read_by_name(name, field, count):
    found = read(name, field, DATA)
    assert (found.table.num_rows, found.rejects, found.left_out) == (count, [], {})
    assert Path(found.origin).parent == Path(DATA)


@needs_data
def test_subjects_of_the_real_files_can_be_chosen_and_told_apart():
    found = read("mmlu_stem", "data.ood_test.0", DATA, subjects=["Astronomy", "machine_learning"], by_subject=True)
    counts = {entry["values"]: entry["counts"] for entry in found.table["domain"].value_counts().to_pylist()}
    assert counts == {"mmlu_stem.astronomy": 152, "mmlu_stem.machine_learning": 112}
    algebra = read("math", "data.train.0", DATA, subjects=["counting_and_probability"])
    assert algebra.table.num_rows == 767 and len({question_key(q, None) for q in algebra.table["question"].to_pylist()}) > 700
