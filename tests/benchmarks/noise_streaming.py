"""Label noise on ten million rows of Parquet: rows a second on one core and the process's peak memory, for each kind.

    python tests/benchmarks/noise_streaming.py --rows 10000000 --output tests/benchmarks/results/noise_streaming.json

Numbers and texts half and half in two domains, 20,000 and 5,000 different answers; then ten million different texts, which is the most that
the kinds with global statistics can have to keep. Each kind runs in a process of its own; the rate counts reading, labelling and writing.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

KINDS = ("symmetric", "permuted", "plausible")
CHUNK = 500_000


def write_rows(path: Path, count: int, all_different: bool) -> None:
    """`count` rows as prepare_data writes them, 500,000 in memory at a time."""
    writer = None
    for start in range(0, count, CHUNK):
        size, generator = min(CHUNK, count - start), np.random.default_rng(start)
        numbers, words = generator.integers(0, 20_000, size), generator.integers(0, 5_000, size)
        is_number = np.arange(size) % 2 == 0
        if all_different:
            words, is_number = np.arange(start, start + size), np.zeros(size, dtype=bool)
        table = pa.table(
            {
                "row_id": [f"made/{start + i:09d}" for i in range(size)],
                "question": [f"What is asked in question {start + i}, which is about as long as this?" for i in range(size)],
                "answer": [str(n) if k else f"word {w}" for n, w, k in zip(numbers, words, is_number, strict=True)],
                "domain": pa.array(np.where(is_number, "numbers", "words")),
                "reward": pa.array(np.where(is_number, "number", "exact")),
                "choices": pa.nulls(size, pa.list_(pa.string())),
                "choice_labels": pa.nulls(size, pa.list_(pa.string())),
            }
        )
        writer = writer or pq.ParquetWriter(path, table.schema)
        writer.write_table(table)
    writer.close()


def label(path: str, kind: str) -> None:
    """One kind, in this process; prints its figures as JSON."""
    from dfpo_core.config import parse_config
    from dfpo_core.noise import noisy_file

    source = {"kind": "parquet", "name": path}
    config = parse_config({"seed": 1, "model": "scratch:tiny", "data": {"train": [source]}, "noise": {"kind": kind, "rate": 0.3}})
    rows = pq.read_metadata(path).num_rows
    started = time.process_time()
    metrics, _ = noisy_file(Path(path), Path(path).with_name("noisy.parquet"), config)
    seconds = time.process_time() - started
    # Not ru_maxrss, which begins with that of the process that started this one.
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    peak = int(status["VmHWM"].split()[0]) * 1024
    print(json.dumps({"kind": kind, "rows": rows, "rows_per_second": round(rows / seconds), "peak_bytes": peak, **metrics}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=10_000_000)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--one", nargs=2, metavar=("FILE", "KIND"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        return label(*arguments.one)
    found = []
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "clean.parquet"
        for answers in ("few", "all different"):
            write_rows(path, arguments.rows, answers == "all different")
            for kind in KINDS:
                command = [sys.executable, __file__, "--one", str(path), kind]
                output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
                found.append({"answers": answers} | json.loads(output))
                print(found[-1], flush=True)
    if arguments.output:
        arguments.output.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
