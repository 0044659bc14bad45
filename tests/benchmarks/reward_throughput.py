"""How many ordinary answers a second each reward scores, and the slowest answer of the adversarial corpus.

    DFPO_DATA_DIR=... python tests/benchmarks/reward_throughput.py [results.json]

Ordinary answers to MATH (math500 and math_train): a few sentences of working-out that end in \\boxed{...}. Half of them are right; of those
a third are spelled otherwise (a decimal for a fraction, other spaces, \\dfrac). The other half give another question's answer, or the
right number off by one. Every pair of question and answer is different, so nothing is scored from memory. GSM8K for `number`, ARC for
`choice`. Time is wall clock after the workers have started; the numbers mean little on a machine that does something else.
"""

from __future__ import annotations

import json
import os
import random
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path

from dfpo_core.rewards import pool, score

DATA = Path(os.environ["DFPO_DATA_DIR"])
CORPUS = Path(__file__).parent.parent / "data" / "adversarial_answers.jsonl"
WORKING = (
    "Let us call the number we are looking for $x$. From the first condition we get $2x + 3 = 17$, which we solve for $x$. "
    "Then we put it into the second equation, $y = x^2 - 4$, and simplify step by step, being careful with the signs. "
) * 3


def read(name: str) -> list[dict]:
    with (DATA / name).open(encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def otherwise(answer: str) -> str:
    """The same value in another spelling."""
    fraction = re.fullmatch(r"(-?)\\frac\{(\d+)\}\{(\d+)\}", answer)
    if fraction:
        return f"{fraction[1]}{fraction[2]}/{fraction[3]}"
    return answer.replace("\\frac", "\\dfrac").replace("+", " + ") if not answer.isdigit() else f"{answer}.0"


def mathematics(rows: list[dict]) -> tuple[list[dict], list[str], list[float | None]]:
    """Rows, responses, and the score where it is known (another question's answer may be right by chance)."""
    draw = random.Random(0)
    responses, expected = [], []
    for row in rows:
        kind = draw.random()
        if kind < 1 / 3:
            answer, truth = row["answer"], 1.0
        elif kind < 1 / 2:
            answer, truth = otherwise(row["answer"]), 1.0
        elif kind < 3 / 4 and re.fullmatch(r"-?\d+", row["answer"]):
            answer, truth = str(int(row["answer"]) + draw.choice((-1, 1))), 0.0
        else:
            answer, truth = draw.choice(rows)["answer"], None
        responses.append(f"{WORKING}So the answer is $\\boxed{{{answer}}}$.")
        expected.append(truth)
    return [row | {"reward": "math"} for row in rows], responses, expected


def numbers(rows: list[dict]) -> tuple[list[dict], list[str], list[float | None]]:
    answers = [row["answer"].rpartition("####")[2].strip() for row in rows]
    guesses = [answer if i % 2 else str(i) for i, answer in enumerate(answers)]
    rows = [{"reward": "number", "answer": answer} for answer in answers]
    return rows, [f"{WORKING}The answer is {guess}." for guess in guesses], [1.0 if i % 2 else None for i in range(len(rows))]


def choices(rows: list[dict]) -> tuple[list[dict], list[str], list[float | None]]:
    rows = [
        {
            "reward": "choice",
            "answer": r["answer"],
            "choices": r["choices"],
            "choice_labels": r.get("labels") or list("ABCDE"[: len(r["choices"])]),
        }
        for r in rows
    ]
    return rows, [f"{WORKING}The answer is ({row['answer']})." for row in rows], [1.0] * len(rows)


def exact(rows: list[dict]) -> tuple[list[dict], list[str], list[float | None]]:
    return [{"reward": "exact", "answer": row["answer"]} for row in rows], [row["answer"] for row in rows], [1.0] * len(rows)


def rate(rows: list[dict], responses: list[str], expected: list[float | None]) -> dict[str, float]:
    started = time.perf_counter()
    scores = score(rows, responses)
    seconds = time.perf_counter() - started
    known = [(got, truth) for got, truth in zip(scores, expected, strict=True) if truth is not None]
    return {
        "answers": len(rows),
        "answers_per_second": round(len(rows) / seconds, 1),
        "as_expected": round(sum(got == truth for got, truth in known) / len(known), 5),
        "failed_checks": sum(pool.take_failures().values()),
    }


def slowest_adversarial() -> dict[str, float]:
    times = []
    for line in CORPUS.read_text().splitlines():
        case = json.loads(line)
        row = {"reward": case["reward"], "answer": case["wanted"], "choices": ["a", "b", "c", "d"], "choice_labels": ["A", "B", "C", "D"]}
        started = time.perf_counter()
        score([row], [case["response"]])
        times.append(time.perf_counter() - started)
    return {"answers": len(times), "slowest_seconds": round(max(times), 3), "mean_seconds": round(sum(times) / len(times), 4)}


def main() -> None:
    import reasoning_gym  # noqa: F401  imported outside the timing

    from dfpo_core.config import SourceConfig
    from dfpo_core.data.sources import read_source

    mathematical = read("math500.jsonl") + read("math_train.jsonl")
    source = SourceConfig(kind="reasoning_gym", name="countdown", size=1000, reward="reasoning_gym")
    gym = read_source(source, 1, "data.train.0").table.to_pylist()
    builders: dict[str, Callable] = {
        "math": lambda: mathematics(mathematical),
        "number": lambda: numbers(read("gsm8k_train.jsonl")),
        "choice": lambda: choices(read("arc_challenge_train.jsonl")),
        "exact": lambda: exact(mathematical),
        "reasoning_gym": lambda: (gym, [f"<answer>{row['answer']} </answer>".replace("*", " * ") for row in gym], [1.0] * len(gym)),
    }
    score([{"reward": "math", "answer": "x+1"}] * 2, ["\\boxed{1+x}", "\\boxed{1 + x - 0}"])  # starts the workers
    results: dict[str, dict[str, float]] = {}
    for name, build in builders.items():
        results[name] = rate(*build())
        print(f"{name:14} {results[name]}", flush=True)
    results["adversarial corpus"] = slowest_adversarial()
    print(f"{'adversarial':14} {results['adversarial corpus']}")
    if sys.argv[1:]:
        Path(sys.argv[1]).write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
