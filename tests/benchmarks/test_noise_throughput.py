"""Rows a second of label noise on one core, beside a row-wise Python loop in the same process. Prints the rates (pytest -s)."""

import hashlib
import random
import time

import numpy as np
import pyarrow as pa
import pytest

from dfpo_core.config import NoiseConfig
from dfpo_core.noise import add_label_noise

ROWS, LOOP_ROWS = 1_000_000, 20_000
LABELS = ["A", "B", "C", "D"]


@pytest.fixture(scope="module", params=["number", "choice", "exact"])
def table(request):
    random_ = np.random.default_rng(0)
    answers = {
        "number": [str(value) for value in random_.integers(-50, 5000, ROWS)],
        "choice": [LABELS[value] for value in random_.integers(0, 4, ROWS)],
        "exact": [f"word {value}" for value in random_.integers(0, 20_000, ROWS)],
    }[request.param]
    return pa.table(
        {
            "row_id": [f"gsm8k/gsm8k-train-{index}" for index in range(ROWS)],
            "answer": answers,
            "domain": ["gsm8k", "math"] * (ROWS // 2),
            "reward": [request.param] * ROWS,
            "choice_labels": pa.array([LABELS if request.param == "choice" else None] * ROWS, pa.list_(pa.string())),
        }
    )


def row_wise(table, rate, seed):
    """What one would write first: a loop over rows, one hash and one generator a row."""
    rows = table.to_pylist()
    others = {domain: sorted({row["answer"] for row in rows if row["domain"] == domain}) for domain in ("gsm8k", "math")}
    for row in rows:
        generator = random.Random(hashlib.sha256(f"{seed}{row['row_id']}".encode()).digest())
        noisy = generator.random() < rate
        row["label"] = generator.choice(others[row["domain"]]) if noisy else row["answer"]
    return rows


@pytest.mark.parametrize("kind", ["symmetric", "permuted", "plausible"])
def test_vectorised_noise_is_far_faster_than_a_loop(table, kind):
    started = time.process_time()
    add_label_noise(table, NoiseConfig(kind=kind, rate=0.3), 1)
    vectorised = ROWS / (time.process_time() - started)
    started = time.process_time()
    row_wise(table.slice(0, LOOP_ROWS), 0.3, 1)
    loop = LOOP_ROWS / (time.process_time() - started)
    print(f"\n{table['reward'][0]} {kind}: {vectorised / 1e6:.2f} M rows/s, loop {loop / 1e6:.3f} M rows/s, ratio {vectorised / loop:.0f}")
    assert vectorised > 5 * loop
