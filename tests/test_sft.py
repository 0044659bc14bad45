"""The supervised warm start: its loss against a plain cross-entropy, accumulation, data order, and that it learns."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from dfpo_core import rollout, sft
from dfpo_core.engines.pytorch import TorchEngine, learning_rate_factor
from dfpo_core.errors import TrainingDiverged, UserError
from dfpo_core.models import load_policy
from tests.training import Untracked, rows_of_sums, tiny_config, write_rows


def batch(tokenizer, rows):
    prompt = rollout.pad_left([tokenizer.encode(r["question"]) for r in rows], tokenizer.pad_token_id)
    labels, _ = sft.targets(tokenizer, rows)
    ids, mask = rollout.pad_right(labels, tokenizer.pad_token_id)
    return (*prompt, ids, mask, mask), labels


def test_the_loss_is_the_mean_cross_entropy_of_label_tokens_and_the_end(tmp_path):
    model, tokenizer = load_policy("scratch:tiny", tmp_path)
    rows = [{"question": "12+3=", "label": "15"}, {"question": "1+1=", "label": "2"}]
    tensors, labels = batch(tokenizer, rows)
    total, count = 0.0, 0
    for row, label in zip(rows, labels, strict=True):
        assert label[-1] == tokenizer.eos_token_id
        ids = tokenizer.encode(row["question"]) + label
        logits = model(torch.tensor([ids])).logits[0, -len(label) - 1 : -1]
        total += functional.cross_entropy(logits, torch.tensor(label), reduction="sum").item()
        count += len(label)
    assert sft.sft_loss(model, *tensors, count).item() == pytest.approx(total / count, abs=1e-5)


def test_micro_batches_add_up_to_the_batch(tmp_path):
    model, tokenizer = load_policy("scratch:tiny", tmp_path)
    rows = rows_of_sums(8)
    whole, labels = batch(tokenizer, rows)
    count = sum(map(len, labels))
    parts = [batch(tokenizer, rows[i : i + 3])[0] for i in (0, 3, 6)]
    assert sum(sft.sft_loss(model, *part, count).item() for part in parts) == pytest.approx(
        sft.sft_loss(model, *whole, count).item(), abs=1e-5
    )


def test_each_pass_over_the_data_visits_every_row_once_in_a_new_order():
    drawn = [i for step in range(9) for i in sft.batch_indices(12, 4, step, seed=3)]
    passes = [drawn[i : i + 12] for i in (0, 12, 24)]
    assert all(sorted(p) == list(range(12)) for p in passes)
    assert passes[0] != passes[1]


def test_a_step_draws_the_same_rows_wherever_the_run_starts():
    assert sft.batch_indices(10, 7, 5, seed=1) == [sft.batch_indices(10, 1, step, seed=1)[0] for step in range(35, 42)]


def test_the_warm_start_learns_its_labels(tmp_path):
    """64 sums a batch, 60 steps: the loss falls from ln(99) = 4.6 (a uniform guess) to below 2."""
    config = tiny_config(tmp_path, sft={"steps": 60, "batch_size": 16, "micro_batch_size": 16, "learning_rate": 3e-3})
    model, tokenizer = load_policy("scratch:tiny", tmp_path)
    log = Untracked()
    sft.train(model, tokenizer, rows_of_sums(), config, log)
    losses = [log.metrics[step]["sft/loss"] for step in range(1, 61)]
    assert losses[0] == pytest.approx(4.6, abs=0.3)
    assert losses[-1] < 2.0


@pytest.mark.parametrize(
    ("step", "expected"),
    [(0, 0.25), (3, 1.0), (4, 1.0), (9, 0.5), (14, 0.0)],
)
def test_the_linear_schedule_warms_up_and_ends_at_zero(step, expected):
    assert learning_rate_factor(step, 14, 4, "linear") == pytest.approx(expected)


def test_the_cosine_schedule_is_at_half_height_half_way():
    assert learning_rate_factor(10, 20, 0, "cosine") == pytest.approx(0.5)


def test_a_loss_that_is_not_finite_stops_before_it_touches_a_weight():
    layer = torch.nn.Linear(2, 1)
    before = layer.weight.clone()
    engine = TorchEngine(layer, "policy", 0.1)
    with pytest.raises(TrainingDiverged, match="policy loss is nan"):
        engine.backward(layer(torch.tensor([[float("nan"), 1.0]])).sum())
    layer.weight.grad = torch.tensor([[float("inf"), 0.0]])
    with pytest.raises(TrainingDiverged, match="gradient norm"):
        engine.step()
    assert torch.equal(layer.weight, before)


def test_gradients_are_clipped_to_the_norm_asked_for():
    layer = torch.nn.Linear(1, 1, bias=False)
    engine = TorchEngine(layer, "policy", 0.1, max_grad_norm=0.5)
    engine.backward((layer(torch.tensor([[3.0]])) * 2).sum())
    assert engine.step() == pytest.approx(6.0)


@pytest.mark.parametrize(
    ("rows", "problem"),
    [([], "training split is empty"), ([{"row_id": "a", "question": "q"}], "lacks the column 'label'")],
)
def test_a_training_split_that_cannot_be_used_is_one_line(tmp_path, rows, problem):
    folder = write_rows(tmp_path, rows) if rows else _empty(tmp_path)
    with pytest.raises(UserError, match=problem):
        sft.labelled(folder, ("row_id", "question", "label"))


def _empty(folder):
    import pyarrow
    import pyarrow.parquet

    schema = pyarrow.schema([(name, pyarrow.string()) for name in ("row_id", "question", "label")])
    pyarrow.parquet.write_table(schema.empty_table(), folder / "train.parquet")
    return folder


def test_an_unreadable_training_split_is_one_line(tmp_path):
    (tmp_path / "train.parquet").write_bytes(b"not parquet")
    with pytest.raises(UserError, match="cannot read"):
        sft.labelled(tmp_path, ("row_id",))


def test_rows_without_a_label_are_left_out_unless_asked_for(tmp_path):
    rows = rows_of_sums(4)
    rows[1]["label"] = None
    folder = write_rows(tmp_path / "data", rows)
    assert [row["row_id"] for row in sft.labelled(folder, ("label",))] == ["row-0", "row-2", "row-3"]
    assert len(sft.labelled(folder, ("label",), keep_missing=True)) == 4
    write_rows(tmp_path / "none", [row | {"label": None} for row in rows[:1]] + rows[1:2])
    with pytest.raises(UserError, match="noise.missing_rate: leaves no training row"):
        sft.labelled(tmp_path / "none", ("label",))
