"""Reading sources: what is accepted, and the one line for what is not."""

import hashlib
import json
import os
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dfpo_core.config import SourceConfig
from dfpo_core.data.sources import SCHEMA, check_source, domain_of, question_key, read_source
from dfpo_core.errors import UserError

GYM_FAMILIES = ("chain_sum", "basic_arithmetic", "products", "gcd", "leg_counting", "simple_equations")


def read(source, seed=1, field="data.train.0"):
    return read_source(SourceConfig(**source), seed, field)


def jsonl(tmp_path, *rows, **options):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"".join((row if isinstance(row, bytes) else json.dumps(row).encode()) + b"\n" for row in rows))
    return {"kind": "jsonl", "name": str(path), **options}


def only_reject(source):
    rows = read(source)
    assert len(rows.rejects) == 1
    return rows.rejects[0]


def message(source, field="data.train.0"):
    with pytest.raises(UserError) as raised:
        read(source, field=field)
    assert "\n" not in str(raised.value)
    return str(raised.value)


def test_a_jsonl_row_becomes_a_row_of_the_schema(tmp_path):
    rows = read(jsonl(tmp_path, {"id": 7, "question": "1+1?", "answer": 2, "licence": "MIT"}, domain="sums"))
    assert rows.table.schema == SCHEMA
    assert rows.table.to_pylist() == [
        {"row_id": "sums/7", "question": "1+1?", "answer": "2", "domain": "sums", "reward": "number", "licence": "MIT",
         "source": str(tmp_path / "rows.jsonl"), "choices": None, "choice_labels": None, "metadata": None}
    ]  # fmt: skip
    assert rows.sha256 == hashlib.sha256((tmp_path / "rows.jsonl").read_bytes()).hexdigest()


@pytest.mark.parametrize(
    ("given", "stored"),
    [
        (18, "18"),
        (2.50, "2.5"),
        (1e-7, "0.0000001"),
        ("1,234", "1234"),
        ("It is 9 * 2 = 18\n#### 18", "18"),
        ("6/8", "0.75"),
        (10**400, "1" + "0" * 400),
    ],
)
def test_numeric_answers_are_stored_in_one_spelling(tmp_path, given, stored):
    assert read(jsonl(tmp_path, {"question": "q", "answer": given})).table["answer"].to_pylist() == [stored]


@pytest.mark.parametrize(
    "row",
    [
        {"choices": ["x", "y", "z"], "answer": "C"},
        {"choices": ["x", "y", "z"], "labels": ["A", "B", "C"], "answer": "C"},
        {"choices": {"text": ["x", "y", "z"], "label": ["A", "B", "C"]}, "answer": "C"},
        {"choices": ["x", "y", "z"], "answer": 2},
    ],
)
def test_the_four_layouts_of_a_choice_give_the_same_row(tmp_path, row):
    stored = read(jsonl(tmp_path, {"question": "q", **row}, reward="choice")).table.to_pylist()[0]
    assert (stored["answer"], stored["choices"], stored["choice_labels"]) == ("C", ["x", "y", "z"], ["A", "B", "C"])


def test_numeric_labels_win_over_an_index(tmp_path):
    source = jsonl(tmp_path, {"question": "q", "choices": ["x", "y"], "labels": ["1", "2"], "answer": 1}, reward="choice")
    assert read(source).table["answer"].to_pylist() == ["1"]


@pytest.mark.parametrize(
    ("row", "options", "field", "reason"),
    [
        (b"{", {}, "line", "is not JSON"),
        (b"[1]", {}, "line", "is not a JSON object"),
        (b'{"question": "\xff"}', {}, "line", "is not UTF-8 text"),
        ({"answer": "1"}, {}, "question", "is missing (the row has: answer)"),
        ({"question": None, "answer": "1"}, {}, "question", "is null"),
        ({"question": " \n", "answer": "1"}, {}, "question", "is empty"),
        ({"question": ["q"], "answer": "1"}, {}, "question", "is list, not text"),
        (b'{"question": "\\ud800", "answer": "1"}', {}, "question", "is not valid Unicode (half a surrogate pair)"),
        ({"question": "q"}, {}, "answer", "is missing (the row has: question)"),
        ({"question": "q", "answer": ""}, {}, "answer", "is empty"),
        ({"question": "q", "answer": True}, {}, "answer", "is bool, not text"),
        ({"question": "q", "answer": "17+25"}, {}, "answer", "'17+25' is not a plain number"),
        ({"question": "q", "answer": float("nan")}, {}, "answer", "'NaN' is not a plain number"),
        ({"question": "q", "answer": "E", "choices": ["x", "y"]}, {"reward": "choice"}, "answer", "'E' is not among the labels A, B"),
        ({"question": "q", "answer": 2, "choices": ["x", "y"]}, {"reward": "choice"}, "answer", "'2' is not among the labels A, B"),
        ({"question": "q", "answer": "A"}, {"reward": "choice"}, "choices", "a choice needs a list of at least two options"),
        ({"question": "q", "answer": "A", "choices": ["x", "y"], "labels": ["A", "A"]}, {"reward": "choice"}, "labels",
         "must be 2 different labels, one an option"),
    ],
)  # fmt: skip
def test_a_bad_row_is_set_aside_with_its_line_field_and_reason(tmp_path, row, options, field, reason):
    good = {"question": "fine", "answer": "1"} | ({"choices": ["x", "y"], "answer": "A"} if options else {})
    reject = only_reject(jsonl(tmp_path, good, b"", row, **options))
    expected = {"source": "data.train.0", "file": str(tmp_path / "rows.jsonl"), "line": 3, "field": field, "reason": reason}
    assert reject == expected


def test_the_second_of_two_equal_ids_is_set_aside(tmp_path):
    rows = [{"id": "a", "question": "q1", "answer": 1}, {"id": "a", "question": "q2", "answer": 2}]
    assert only_reject(jsonl(tmp_path, *rows)) | {"file": ""} == {
        "source": "data.train.0", "file": "", "line": 2, "field": "id", "reason": "the id 'a' occurs twice"
    }  # fmt: skip


def test_rows_without_ids_get_one_from_their_content(tmp_path):
    rows = [{"question": "Q  one", "answer": 1}, {"question": "two", "answer": 2}, {"question": "q one", "answer": 1}]
    ids = read(jsonl(tmp_path, *rows)).table["row_id"].to_pylist()
    assert ids[0] == ids[2] != ids[1]


def test_questions_are_the_same_up_to_case_space_and_the_order_of_options():
    assert question_key("What  is\nIT?", ["b", "A"]) == question_key("what is it?", ["a", "B"])
    assert question_key("q", ["a", "b"]) != question_key("q", ["a", "c"]) != question_key("q", None)
    assert question_key("2 - 3", None) != question_key("2 3", None)


def test_parquet_and_an_fsspec_url_read_like_jsonl(tmp_path):
    import fsspec

    table = pa.table({"id": ["a"], "question": ["q"], "answer": [3]})
    pq.write_table(table, tmp_path / "rows.parquet")
    fsspec.filesystem("memory").pipe_file("/bucket/rows.parquet", (tmp_path / "rows.parquet").read_bytes())
    local = read({"kind": "parquet", "name": str(tmp_path / "rows.parquet")})
    remote = read({"kind": "parquet", "name": "memory://bucket/rows.parquet"})
    assert local.table.drop(["source"]).to_pylist() == remote.table.drop(["source"]).to_pylist()
    assert local.table["answer"].to_pylist() == ["3"] and local.sha256 == remote.sha256


def test_a_hub_data_set_is_read_through_datasets(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))
    folder = tmp_path / "tiny_set"
    folder.mkdir()
    pq.write_table(pa.table({"question": ["q1", "q2"], "answer": ["a #### 1", "b #### 2"]}), folder / "test.parquet")
    rows = read({"kind": "hub", "name": str(folder), "options": {"split": "test"}})
    assert rows.table["answer"].to_pylist() == ["1", "2"]
    assert domain_of(SourceConfig(kind="hub", name="openai/gsm8k")) == "gsm8k"
    assert "cannot load the hub data set" in message({"kind": "hub", "name": str(folder), "options": {"split": "nope"}})
    unknown = message({"kind": "hub", "name": "x/y", "options": {"splits": "test"}})
    assert unknown == "data.train.0.options.splits: unknown option of a hub data set; choose one of: split, config, revision"


def test_unreadable_sources_are_named_in_one_line(tmp_path):
    missing = str(tmp_path / "no.jsonl")
    assert message({"kind": "jsonl", "name": missing}) == f"data.train.0.name: there is no file {missing}; give an existing path or URL"
    assert "cannot open" in message({"kind": "jsonl", "name": str(tmp_path)})
    assert "holds no rows" in message(jsonl(tmp_path))
    assert "cannot open nope://x" in message({"kind": "jsonl", "name": "nope://x"})
    broken = tmp_path / "broken.parquet"
    broken.write_bytes(b"PAR1 nothing PAR1")
    assert f"{broken} is not readable Parquet (" in message({"kind": "parquet", "name": str(broken)})
    table = tmp_path / "table.parquet"
    pq.write_table(pa.table({"prompt": ["q"], "answer": ["1"]}), table)
    expected = f"data.train.0.question_column: {table} has no column 'question'; choose one of: prompt, answer"
    assert message({"kind": "parquet", "name": str(table)}) == expected


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ({"name": "chain_sums"}, "data.train.0.name: unknown reasoning-gym family 'chain_sums'; choose e.g. chain_sum"),
        ({"options": {"terms": 3}}, "data.train.0.options.terms: unknown option of the family chain_sum; choose one of: min_terms,"),
        ({"options": {"seed": 3}}, "data.train.0.options.seed: unknown option of the family chain_sum"),
        ({"options": {"min_terms": 9}}, "data.train.0.options: chain_sum refuses them (max_terms must be >= min_terms);"),
        ({"options": {"min_terms": "x"}}, "data.train.0.options: chain_sum refuses them ("),
        ({"size": 10**7 + 1}, "data.train.0.size: at most 10000000 items of a family have seeds of their own; split the source"),
        ({"name": "pool_matrix"}, "data.train.0.name: the family pool_matrix fails to generate ("),
    ],
)
def test_mistakes_about_a_generator_are_named(source, expected):
    pytest.importorskip("reasoning_gym")
    assert message({"kind": "reasoning_gym", "name": "chain_sum", "size": 3, **source}).startswith(expected)


def test_a_check_reads_no_rows_but_finds_wrong_options():
    for source in ({"kind": "hub", "name": "x", "options": {"a": 1}}, {"kind": "reasoning_gym", "name": "nothing", "size": 1}):
        with pytest.raises(UserError):
            check_source(SourceConfig(**source), "data.train.0")


@pytest.mark.parametrize("family", GYM_FAMILIES)
def test_arithmetic_families_give_plain_numbers_and_do_not_share_items_between_splits_or_seeds(family):
    pytest.importorskip("reasoning_gym")
    source = {"kind": "reasoning_gym", "name": family, "size": 60}
    first = read(source)
    assert first.rejects == [] and first.table.num_rows == 60
    assert read(source).table.equals(first.table)
    for other in (read(source, seed=2), read(source, field="data.ood_test.0")):
        shared = set(other.table["question"].to_pylist()) & set(first.table["question"].to_pylist())
        assert len(shared) <= 6  # products of one-digit numbers repeat; neighbouring seeds would share 59


@pytest.mark.parametrize("given", [{"depth": [1, 2]}, '{"depth": [1, 2]}'])
def test_metadata_is_kept_as_json_text(tmp_path, given):
    rows = read(jsonl(tmp_path, {"question": "q", "answer": 1, "metadata": given})).table.to_pylist()
    assert json.loads(rows[0]["metadata"]) == {"depth": [1, 2]}


@pytest.mark.parametrize(("given", "reason"), [("notes", "is not JSON"), ([1], "is not a JSON object"), ("7", "is not a JSON object")])
def test_metadata_that_is_no_json_object_is_rejected_and_another_column_can_be_named(tmp_path, given, reason):
    source = jsonl(tmp_path, {"question": "q", "answer": 1, "metadata": given})
    assert [(reject["field"], reject["reason"]) for reject in read(source).rejects] == [("metadata", reason)]
    assert read({**source, "metadata_column": "extra"}).table["metadata"].to_pylist() == [None]


def test_a_reasoning_gym_row_carries_what_its_scorer_reads():
    pytest.importorskip("reasoning_gym")
    source = {"kind": "reasoning_gym", "name": "spell_backward", "size": 3, "reward": "exact", "options": {"max_word_len": 5}}
    metadata = [json.loads(row["metadata"]) for row in read(source).table.to_pylist()]
    assert [entry["source_dataset"] for entry in metadata] == ["spell_backward"] * 3
    assert [entry["source_options"] for entry in metadata] == [{"max_word_len": 5}] * 3


def test_a_text_family_needs_the_exact_reward():
    pytest.importorskip("reasoning_gym")
    source = {"kind": "reasoning_gym", "name": "spell_backward", "size": 20}
    rows = read({**source, "reward": "exact"}).table.to_pylist()
    assert all(row["question"].split(": ")[-1][::-1] == row["answer"] for row in rows)
    assert len(read(source).rejects) == 20


REAL = {
    "gsm8k_train": (7473, {}),
    "gsm8k_test": (1319, {}),
    "math_train": (7470, {"reward": "exact"}),
    "math500": (500, {"reward": "exact"}),
    "arc_challenge_train": (1056, {"reward": "choice"}),
    "arc_challenge_test": (1172, {"reward": "choice"}),
    "mmlu_stem": (3018, {"reward": "choice"}),
}


@pytest.mark.skipif("DFPO_DATA_DIR" not in os.environ, reason="DFPO_DATA_DIR names no folder with the real data files")
@pytest.mark.parametrize("name", REAL)
def test_every_row_of_the_real_files_is_accepted(name):
    count, options = REAL[name]
    rows = read({"kind": "jsonl", "name": str(Path(os.environ["DFPO_DATA_DIR"], f"{name}.jsonl")), **options})
    assert (rows.table.num_rows, rows.rejects) == (count, [])
    assert all(rows.table["licence"].to_pylist())
