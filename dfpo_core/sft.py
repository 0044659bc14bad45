"""Supervised warm start: next-token cross-entropy on the training labels as they are (wrong ones included), EOS learned.

A conversation has no label: its target is what a scripted policy that knows the goal says, turn by turn.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from dfpo_core import environments, rollout
from dfpo_core.config import PipelineConfig
from dfpo_core.data import prompts
from dfpo_core.engines.pytorch import TorchEngine, learning_rate_factor
from dfpo_core.environments.demonstration import demonstrate
from dfpo_core.errors import UserError
from dfpo_core.models import load_policy, save_policy


def sft_loss(
    model, prompt_ids: Tensor, prompt_mask: Tensor, response_ids: Tensor, attention_mask: Tensor, mask: Tensor, token_count: float
) -> Tensor:
    """Cross-entropy over the tokens where `mask` is 1, divided by their count in the whole batch, so that micro-batches add up."""
    hidden = rollout.response_hidden(model.base_model, prompt_ids, prompt_mask, response_ids, attention_mask, 1)
    log_probs, _ = rollout.token_log_probs(model, hidden, response_ids)
    return -(log_probs * mask).sum() / token_count


def batch_indices(rows: int, batch_size: int, step: int, seed: int) -> list[int]:
    """Rows of 0-based `step`: a pure function of (seed, step) that walks a fresh permutation each pass over the data."""
    chosen = []
    for position in range(step * batch_size, (step + 1) * batch_size):
        epoch, offset = divmod(position, rows)
        if offset == 0 or not chosen:
            order = torch.randperm(rows, generator=torch.Generator().manual_seed(seed * 1_000_003 + epoch))
        chosen.append(int(order[offset]))
    return chosen


def labelled(data: str | Path, columns: tuple[str, ...], keep_missing: bool = False) -> list[dict]:
    """Rows of the noised training split, without those whose label is missing (null) unless `keep_missing`.

    Raises UserError when the folder or a column is missing, or there are no rows.
    """
    import pyarrow.parquet

    path = Path(data) / "train.parquet"
    try:
        table = pyarrow.parquet.read_table(path)
    except (OSError, pyarrow.ArrowInvalid) as error:
        raise UserError("data", f"cannot read {path} ({str(error).splitlines()[0][:120]})", "run noise_data first") from None
    missing = [name for name in columns if name not in table.column_names]
    if missing:
        raise UserError("data", f"{path} lacks the column {missing[0]!r}", "run noise_data on it first")
    if table.num_rows == 0:
        raise UserError("data.train", "the training split is empty", "add rows or lower data.id_test_size")
    rows = [row for row in table.to_pylist() if keep_missing or row.get("label") is not None]
    if not rows:
        raise UserError("noise.missing_rate", "leaves no training row with a label", "lower it")
    return rows


def targets(tokenizer, rows: list[dict]) -> tuple[list[list[int]], list[list[float]]]:
    """(tokens, 1.0 on those to learn) of each row: label tokens followed by EOS, or a whole conversation."""
    ids, learned = [], []
    for row in rows:
        exchanges = demonstrate(row) if environments.converses(row) else [(row["label"], None)]
        replies = prompts.reply_tokens(tokenizer, [reply for _, reply in exchanges if reply is not None], [True] * (len(exchanges) - 1))
        ids.append([])
        learned.append([])
        for (text, _), reply in zip(exchanges, [*replies, []], strict=True):
            turn = tokenizer.encode(text, add_special_tokens=False) + [tokenizer.eos_token_id]
            ids[-1] += turn + reply
            learned[-1] += [1.0] * len(turn) + [0.0] * len(reply)
    return ids, learned


def run(config: str | PipelineConfig, parent_run_id: str, data: str, output: str) -> dict[str, float]:
    """The step: warm-start `config.model` on `data/train.parquet`, write an HF checkpoint to `output`, return the last metrics."""
    from dfpo_core import tracking

    config = PipelineConfig.model_validate_json(config) if isinstance(config, str) else config
    with tracking.step_run(config, "sft", parent_run_id) as step_run:
        torch.set_num_threads(config.threads or torch.get_num_threads())
        rows = labelled(data, ("row_id", "question", "label"))
        step_run.log_dataset(str(Path(data) / "train.parquet"), "train", "training", {"noise": config.noise.kind})
        model, tokenizer = load_policy(config.model, config.home_path)
        metrics = train(model, tokenizer, rows, config, step_run)
        save_policy(model, tokenizer, output)
        step_run.log_artifacts(output, "policy")
        return metrics


def train(
    model, tokenizer, rows: list[dict], config: PipelineConfig, step_run, enough: Callable[[int], bool] | None = None
) -> dict[str, float]:
    """The loop: `config.sft.steps` optimizer steps in place. Returns the last step's metrics (empty without steps).

    `enough` is asked after every step, with the number of steps done, whether to stop there.
    """
    from tqdm import tqdm

    settings, metrics = config.sft, {}
    if settings.steps == 0:
        return metrics
    prompt_tokens = prompts.encode(tokenizer, rows, config.prompt)
    target_tokens, learned = targets(tokenizer, rows)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    engine = TorchEngine(model.to(device), "sft", settings.learning_rate, settings.weight_decay, settings.max_grad_norm)
    for step in tqdm(range(settings.steps), desc="sft", disable=None):
        started = time.perf_counter()
        chosen = batch_indices(len(rows), settings.batch_size, step, config.seed)
        token_count = sum(sum(learned[i]) for i in chosen)
        total = 0.0
        for start in range(0, len(chosen), settings.micro_batch_size):
            part = chosen[start : start + settings.micro_batch_size]
            prompt = rollout.pad_left([prompt_tokens[i] for i in part], tokenizer.pad_token_id)
            ids, attention_mask = rollout.pad_right([target_tokens[i] for i in part], tokenizer.pad_token_id)
            mask = torch.tensor([learned[i] + [0.0] * (ids.shape[1] - len(learned[i])) for i in part])
            with rollout.autocast(config.precision, model.config.hidden_size, device):
                loss = sft_loss(model, *(t.to(device) for t in (*prompt, ids, attention_mask, mask)), token_count)
            engine.backward(loss)
            total += loss.item()
        norm = engine.step(learning_rate_factor(step, settings.steps, settings.warmup_steps, settings.schedule))
        seconds = time.perf_counter() - started
        metrics = {"sft/loss": total, "sft/gradient_norm": norm, "sft/tokens_per_second": token_count / seconds}
        step_run.log_metrics(metrics, step + 1)
        if enough and enough(step + 1):
            break
    model.to("cpu").eval()
    return metrics
