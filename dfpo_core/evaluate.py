"""Evaluation: accuracy of base, SFT, trained and champion policies on the same questions, with intervals.

Every interval is a percentile bootstrap over questions, and every difference is paired (see `statistics`). The domain `all`
is the mean over all questions of a split. One policy is in memory at a time.
"""

from __future__ import annotations

import gc
import hashlib
import json
import os
import tempfile
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

from dfpo_core import environments, models, promote, report, storage, tracking
from dfpo_core.config import PipelineConfig, parse_config
from dfpo_core.errors import UserError
from dfpo_core.statistics import bootstrap_mean, paired_difference

SPLITS = ("id_test", "ood_test")
COMPARISONS = (("trained", "sft"), ("trained", "base"), ("sft", "base"), ("trained", "champion"))
ALL = "all"
LOGGED_ANSWERS = 200
CRITIC_QUESTIONS = 64


@dataclass(frozen=True)
class Policy:
    """One evaluated policy: what it is called in tables, and where its weights are."""

    label: str
    reference: str
    identity: str  # equal for two references to the same weights
    version: str = ""  # in the model registry, of the champion


def run(
    config: str,
    parent_run_id: str,
    data: str,
    sft_checkpoint: str,
    trained_checkpoint: str,
    evaluation_output: str,
    html_path: str,
    critic_checkpoint: str = "",
) -> dict[str, float]:
    """Evaluate and write evaluation.json and answers.parquet into `evaluation_output` and the report to `html_path`.

    With the checkpoint of a critic, the report also shows what it expects of held-out responses and what came of them. Returns the
    metrics of the domain `all`, which are also copied to the parent run. Raises SystemExit(2) on bad input.
    """
    resolved = parse_config(json.loads(config))
    with tracking.step_run(resolved, "evaluate", parent_run_id) as step, ExitStack() as cleanup:
        questions = read_questions(Path(data), resolved.evaluate.max_questions)
        folder = cleanup.enter_context(tempfile.TemporaryDirectory(prefix="dfpo-champion-"))
        policies = _policies(resolved, sft_checkpoint, trained_checkpoint, step.client, folder)
        answers = answer_all(resolved, policies, questions)
        evaluation = summarise(resolved, policies, answers)
        evaluation["parent_run_id"] = parent_run_id
        with storage.atomic_directory(evaluation_output) as partial:
            _write(partial, evaluation, answers)
        figures = report.figures(evaluation) | critic_figures(resolved, trained_checkpoint, critic_checkpoint, questions)
        html = report.render(resolved, evaluation, answers, promote.decide(evaluation, resolved.promote), figures)
        _write_text(Path(html_path), html)
        _log(step, Path(data), evaluation_output, evaluation, answers, html, figures)
        headline = metrics_of(evaluation, domains=(ALL,))
        if parent_run_id:
            tracking.StepRun(step.client, parent_run_id).log_metrics(headline)
    return headline


# ---------------------------------------------------------------------------------------------------------- questions and policies


def read_questions(data: Path, limit: int) -> list[dict[str, Any]]:
    """The rows of the test splits, each with its `split`. A `limit` above 0 keeps that many of a split, chosen by row-id hash.

    Raises UserError when there is no in-domain question, or a file is missing or unreadable.
    """
    import pyarrow
    import pyarrow.parquet as parquet

    questions = []
    for split in SPLITS:
        try:
            rows = parquet.read_table(data / f"{split}.parquet").to_pylist()
        except (OSError, pyarrow.ArrowInvalid) as error:
            reason = str(error).splitlines()[0][:160]
            raise UserError("data", f"cannot read {split}.parquet ({reason})", "pass the folder that noise_data wrote") from None
        if not rows and split == "id_test":
            raise UserError("data", "id_test is empty", "set data.id_test_size or data.id_test")
        if limit:
            kept = sorted(rows, key=lambda row: hashlib.sha256(row["row_id"].encode()).digest())[:limit]
            names = {row["row_id"] for row in kept}
            rows = [row for row in rows if row["row_id"] in names]
        questions += [row | {"split": split} for row in rows]
    return questions


def _policies(config: PipelineConfig, sft_checkpoint: str, trained_checkpoint: str, client, folder: str) -> list[Policy]:
    policies = [_policy("base", config.model), _policy("sft", sft_checkpoint), _policy("trained", trained_checkpoint)]
    name = config.promote.registered_model
    version = promote.champion_version(client, name)
    if version:
        policies.append(_policy("champion", promote.download(client, name, version, folder), version))
    return policies


def _policy(label: str, reference: str, version: str = "") -> Policy:
    path = Path(reference).expanduser()
    return Policy(label, reference, models.directory_sha256(path) if path.is_dir() else reference, version)


# ---------------------------------------------------------------------------------------------------------- answers


def answer_all(config: PipelineConfig, policies: list[Policy], questions: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row a policy and question: model, split, domain, row_id, question, answer, response, correct, mean_at_k, rates.

    `rates` are those of a conversation's environment, such as task, ask and goal; its response is the transcript.
    Policies with the same weights are run once.
    """
    done: dict[str, list[dict[str, Any]]] = {}
    for policy in policies:
        if policy.identity not in done:
            done[policy.identity] = _answer(config, policy, questions)
    return [{"model": policy.label, **row} for policy in policies for row in done[policy.identity]]


def _answer(config: PipelineConfig, policy: Policy, questions: list[dict[str, Any]]) -> list[dict[str, Any]]:
    import torch

    from dfpo_core import rewards

    if config.threads:
        torch.set_num_threads(config.threads)
    responses, drawn = _respond(config, policy, questions)
    gc.collect()  # the model is out of scope: its memory goes before the next one is loaded
    torch.cuda.empty_cache()
    correct = rewards.score(questions, responses, limits=config.rewards)
    means: list[float | None] = [None] * len(questions)
    if drawn:
        repeated = [row for row, texts in zip(questions, drawn, strict=True) for _ in texts]
        scores = rewards.score(repeated, [text for texts in drawn for text in texts], limits=config.rewards)
        means = np.asarray(scores).reshape(len(questions), -1).mean(1).tolist()
    columns = ("split", "domain", "row_id", "question", "answer")
    return [
        {name: row[name] for name in columns}
        | {"response": environments.transcript(row, text), "correct": score >= 1.0, "mean_at_k": mean, "rates": _rates(row, text)}
        for row, text, score, mean in zip(questions, responses, correct, means, strict=True)
    ]


def _rates(row: dict[str, Any], response: str) -> dict[str, float]:
    """How a conversation went, by rate; empty for a question."""
    return environments.play(row, response)[0].rates() if environments.converses(row) else {}


def _respond(config: PipelineConfig, policy: Policy, questions: list[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """(greedy response to each question, `evaluate.samples` sampled ones to each or none)."""
    import torch
    from tqdm import tqdm

    from dfpo_core import rollout
    from dfpo_core.data import prompts

    settings, samples = config.evaluate, config.evaluate.samples
    model, tokenizer = models.load_policy(policy.reference, config.home_path)
    model = model.to("cuda" if torch.cuda.is_available() else "cpu")
    encoded = prompts.encode(tokenizer, questions, config.prompt)
    limits = {name: getattr(config.train, name) for name in ("max_new_tokens", "max_turns", "max_conversation_tokens")}
    common: dict[str, Any] = {"rows": questions, "precision": config.precision, **limits}
    total = len(questions) * (2 if samples else 1)
    with tqdm(total=total, desc=f"evaluate {policy.label}", unit="question", disable=None) as bar:
        greedy = rollout.respond(model, tokenizer, encoded, batch_size=settings.batch_size, progress=bar.update, **common)
        drawn: list[list[str]] = []
        if samples:
            drawing = {"temperature": settings.temperature, "samples": samples, "seed": config.seed}
            batch_size = max(1, settings.batch_size // samples)  # as many sequences at once as in the greedy pass
            drawn = rollout.respond(model, tokenizer, encoded, batch_size=batch_size, progress=bar.update, **drawing, **common)
    return [texts[0] for texts in greedy], drawn


def critic_figures(config: PipelineConfig, trained_checkpoint: str, critic_checkpoint: str, questions: list[dict[str, Any]]) -> dict:
    """`value_fan` of one sampled response and `calibration` over one response to each of up to CRITIC_QUESTIONS in-domain questions.

    Realised returns are clean rewards: a critic that was trained on noisy ones should lie off the diagonal by just that noise. Empty
    without a critic, which is how an algorithm that has none is written.
    """
    if not (Path(critic_checkpoint) / "critic.json").is_file():
        return {}
    from dfpo_core import figures, rewards

    rows = [row for row in questions if row["split"] == "id_test"][:CRITIC_QUESTIONS]
    tokenizer, sampled, texts, (returns, values, uncertainty) = _sample_with_critic(config, trained_checkpoint, critic_checkpoint, rows)
    scores = np.asarray(rewards.score(rows, texts, limits=config.rewards))
    realised, valid = np.broadcast_to(scores[:, None], values.shape), sampled.mask.numpy() > 0
    i = int(valid.sum(-1).argmax())  # the longest response has the most to show
    tokens = [tokenizer.decode([token]) for token in sampled.response_ids[i].numpy()[valid[i]]]
    one = [array[i][valid[i]] for array in (returns, values, realised - values, uncertainty)]
    title = f"{rows[i]['question'].strip()[-60:]}   answer {rows[i]['answer']}, reward {scores[i]:.0f}"
    return {
        "value_fan": figures.value_fan(tokens, *one, title),
        "calibration": figures.calibration(*(array[valid] for array in (returns, values, realised))),
    }


def _sample_with_critic(config: PipelineConfig, trained_checkpoint: str, critic_checkpoint: str, rows: list[dict[str, Any]]) -> tuple:
    """(tokenizer, one sampled response a row, its text, the critic's (returns (B, T, K), values (B, T), uncertainty (B, T)) as arrays)."""
    import torch

    from dfpo_core import rollout
    from dfpo_core.critic_model import load_critic
    from dfpo_core.data import prompts

    model, tokenizer = models.load_policy(trained_checkpoint, config.home_path)
    ids, mask = rollout.pad_left(prompts.encode(tokenizer, rows, config.prompt), tokenizer.pad_token_id)
    with rollout.autocast(config.precision, model.config.hidden_size), torch.no_grad():
        sampled, texts = rollout.converse(
            partial(rollout.generate, model),
            tokenizer,
            rows,
            ids,
            mask,
            samples_per_prompt=1,
            max_new_tokens=config.train.max_new_tokens,
            max_turns=config.train.max_turns,
            max_conversation_tokens=config.train.max_conversation_tokens,
            temperature=config.train.temperature,
            streams=rollout.sampling_streams(config.seed, 0, 0, len(rows)),
        )
        critic = load_critic(critic_checkpoint)
        hidden = rollout.response_hidden(critic.backbone, ids, mask, sampled.response_ids, sampled.attention_mask, 1).float()
        hidden = critic.reads(hidden, sampled.log_probs, sampled.entropy, sampled.mask)
        estimates = critic.head.sample_returns(hidden), critic.head.value(hidden), critic.head.uncertainty(hidden)
    return tokenizer, sampled, texts, tuple(estimate.numpy() for estimate in estimates)


# ---------------------------------------------------------------------------------------------------------- summary


def summarise(config: PipelineConfig, policies: list[Policy], answers: list[dict[str, Any]]) -> dict[str, Any]:
    """The content of evaluation.json: accuracies, mean@k and paired differences by split and domain, and what was compared.

    Every list entry carries mean, low, high and count (questions). `completion` has the rates of conversations, over those in which a
    rate says something.
    """
    settings = config.evaluate
    bootstrap = {"confidence": settings.confidence, "samples": settings.bootstrap_samples, "seed": config.seed}
    groups = _group(answers)
    labels = [policy.label for policy in policies]
    places = sorted({(split, domain) for _, split, domain in groups}, key=lambda place: (place[0], place[1] != ALL, place[1]))
    accuracy, mean_at_k, completion, differences = [], [], [], []
    for (split, domain), label in product(places, labels):
        rows = groups[label, split, domain]
        where = {"model": label, "split": split, "domain": domain}
        accuracy.append(where | asdict(bootstrap_mean(_correct(rows), **bootstrap)))
        rates = [row.get("rates", {}) for row in rows]
        for name in dict.fromkeys(name for found in rates for name in found):
            values = [found[name] for found in rates if name in found]
            completion.append(where | {"rate": name} | asdict(bootstrap_mean(values, **bootstrap)))
        if settings.samples:
            mean_at_k.append(where | asdict(bootstrap_mean([row["mean_at_k"] for row in rows], **bootstrap)))
    for (split, domain), (first, second) in product(places, COMPARISONS):
        if first in labels and second in labels:
            pair = _correct(groups[first, split, domain]), _correct(groups[second, split, domain])
            where = {"first": first, "second": second, "split": split, "domain": domain}
            differences.append(where | asdict(paired_difference(*pair, **bootstrap)))
    return {
        "models": [asdict(policy) for policy in policies],
        "accuracy": accuracy,
        "mean_at_k": mean_at_k,
        "completion": completion,
        "differences": differences,
        "settings": settings.model_dump() | {"seed": config.seed, "max_new_tokens": config.train.max_new_tokens},
        "registered_model": config.promote.registered_model,
        "champion_version": next((policy.version for policy in policies if policy.version), ""),
        "config_sha256": config.sha256,
    }


def _group(answers: list[dict[str, Any]]) -> dict[tuple[str, str, str], list[dict[str, Any]]]:
    """Answers by (model, split, domain), in row-id order so that two models' lists pair up; `all` holds a whole split."""
    groups: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    for row in sorted(answers, key=lambda row: row["row_id"]):
        for domain in {row["domain"], ALL}:
            groups.setdefault((row["model"], row["split"], domain), []).append(row)
    return groups


def _correct(rows: list[dict[str, Any]]) -> np.ndarray:
    return np.array([row["correct"] for row in rows], dtype=np.float64)


def metrics_of(evaluation: dict[str, Any], domains: tuple[str, ...] | None = None) -> dict[str, float]:
    """Flat metrics: `eval/<split>/<domain>/accuracy` is the trained policy's, `…/accuracy_sft` another's, each with `_low` and
    `_high`; `…/mean_at_k` and, of conversations, `…/task_completion`, `…/ask_completion` and `…/goal_completion` likewise;
    `…/gain_over_sft` is a paired difference of the trained policy, `…/sft_over_base` of SFT."""
    metrics: dict[str, float] = {}
    named = [(kind, entry, entry["model"]) for kind in ("accuracy", "mean_at_k") for entry in evaluation[kind]]
    named += [(f"{entry['rate']}_completion", entry, entry["model"]) for entry in evaluation["completion"]]
    entries = [(kind if model == "trained" else f"{kind}_{model}", entry) for kind, entry, model in named]
    for entry in evaluation["differences"]:
        prefix = "gain_over" if entry["first"] == "trained" else f"{entry['first']}_over"
        entries.append((f"{prefix}_{entry['second']}", entry))
    for name, entry in entries:
        if domains is None or entry["domain"] in domains:
            key = f"eval/{entry['split']}/{entry['domain']}/{name}"
            metrics |= {key: entry["mean"], f"{key}_low": entry["low"], f"{key}_high": entry["high"]}
    return metrics


# ---------------------------------------------------------------------------------------------------------- files and MLflow


def _write(folder: Path, evaluation: dict[str, Any], answers: list[dict[str, Any]]) -> None:
    import pyarrow
    import pyarrow.parquet as parquet

    text = [(name, pyarrow.string()) for name in ("model", "split", "domain", "row_id", "question", "answer", "response")]
    schema = pyarrow.schema([*text, ("correct", pyarrow.bool_()), ("mean_at_k", pyarrow.float64()), ("rates", pyarrow.string())])
    written = [row | {"rates": json.dumps(row["rates"])} for row in answers]
    parquet.write_table(pyarrow.Table.from_pylist(written, schema=schema), folder / "answers.parquet")
    (folder / "evaluation.json").write_text(json.dumps(evaluation, indent=1, ensure_ascii=False), encoding="utf-8")


def _write_text(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    try:
        partial.write_text(text, encoding="utf-8")
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def _log(
    step, data: Path, folder: str, evaluation: dict[str, Any], answers: list[dict[str, Any]], html: str, figures: dict[str, Any]
) -> None:
    for split in SPLITS:
        step.log_dataset(data / f"{split}.parquet", split, "evaluation")
    step.log_metrics(metrics_of(evaluation))
    step.log_artifacts(folder, "evaluation")
    step.client.log_text(step.run_id, html, "evaluation/report.html")
    step.log_table("sample_answers.json", report.pick_samples(answers, LOGGED_ANSWERS))
    for name, figure in figures.items():
        step.log_figure(f"figures/{name}.png", figure)
