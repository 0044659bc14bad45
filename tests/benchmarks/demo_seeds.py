"""The demo over several seeds: is DFPO above its supervised warm start, in and out of domain, and within its time and memory?

Pre-stated comparison: greedy accuracy of the trained policy minus that of the warm start, on the same questions, a seed a run;
DFPO is to be above in domain in at least 4 of 5 seeds. Each finished seed is a file, so a second call runs only what is missing.

    python tests/benchmarks/demo_seeds.py --seeds 1 2 3 4 5 --jobs 2
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import date
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parents[2]
RESULTS = Path(__file__).parent / "results" / "demo"
CONFIG = ROOT / "pipelines" / "configs" / "demo.yaml"
MODELS = ("base", "sft", "trained")


def run_seed(seed: int, home: Path) -> dict:
    """One `dfpo run` of the demo; returns its record: accuracies with intervals, seconds, peak memory of all its processes."""
    settings = [f"home={home}", f"seed={seed}", f"name=demo-seed-{seed}", f"promote.registered_model=dfpo-demo-seed-{seed}"]
    command = [sys.executable, "-m", "pipelines.cli", "run", str(CONFIG)] + [part for s in settings for part in ("--set", s)]
    started = time.perf_counter()
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    peak = 0
    while process.poll() is None:
        peak = max(peak, resident_bytes(process.pid))
        time.sleep(0.5)
    seconds = time.perf_counter() - started
    output = process.stdout.read()
    if process.returncode:
        raise RuntimeError(f"seed {seed} ended with code {process.returncode}:\n{output}")
    print(output, flush=True)
    return {"seed": seed, "seconds": round(seconds), "peak_memory_gb": round(peak / 1e9, 2)} | accuracies(home, seed)


def resident_bytes(pid: int) -> int:
    """Memory of a process and everything it started; shared pages count once for each, so this errs on the high side."""
    total = 0
    try:
        parent = psutil.Process(pid)
        family = [parent, *parent.children(recursive=True)]
    except psutil.NoSuchProcess:
        return 0
    for process in family:
        try:
            total += process.memory_info().rss
        except psutil.NoSuchProcess:
            continue  # it ended between the listing and the look
    return total


def accuracies(home: Path, seed: int) -> dict:
    from dfpo_core import promote

    rows = promote.compare(f"sqlite:///{home / 'mlflow.db'}")
    row = next(r for r in rows if r["name"] == f"demo-seed-{seed}" and r["status"] == "FINISHED")
    keys = [f"{model}_{split}{bound}" for model in MODELS for split in ("id", "ood") for bound in ("", "_low", "_high")]
    return {key: row[key] for key in keys}


def summary(records: list[dict]) -> str:
    """Markdown: a row a seed, the mean with a bootstrap interval over seeds of each model and of DFPO - SFT."""
    import numpy as np

    from dfpo_core.statistics import bootstrap_mean

    titles = [f"{name} {split.upper()}" for split in ("id", "ood") for name in ("base", "SFT", "DFPO")]
    lines = ["| " + " | ".join(["seed", *titles, "min", "GB"]) + " |"]
    lines.append("|---" * 9 + "|")
    columns = [f"{model}_{split}" for split in ("id", "ood") for model in MODELS]
    for r in records:
        cells = [f"{100 * r[c]:.1f}" for c in columns]
        lines.append("| " + " | ".join([str(r["seed"]), *cells, f"{r['seconds'] / 60:.1f}", f"{r['peak_memory_gb']:.1f}"]) + " |")
    lines.append("")
    for split, name in (("id", "in domain"), ("ood", "out of domain")):
        gains = np.array([r[f"trained_{split}"] - r[f"sft_{split}"] for r in records])
        interval = bootstrap_mean(gains)
        above = int((gains > 0).sum())
        lines.append(
            f"DFPO - SFT {name}: {100 * interval.mean:+.1f} points [{100 * interval.low:+.1f}, {100 * interval.high:+.1f}] "
            f"(95 % bootstrap interval over {len(gains)} seeds), above in {above} of {len(gains)}."
        )
    return "\n".join(lines) + "\n"


def figure(records: list[dict]):
    """A line a seed from base over warm start to DFPO, in and out of domain; the mean over seeds in black."""
    from matplotlib.figure import Figure

    plot = Figure(figsize=(8, 3.6), layout="constrained")
    for axis, (split, title) in zip(plot.subplots(1, 2, sharey=True), (("id", "in domain"), ("ood", "out of domain")), strict=True):
        for r in records:
            axis.plot(range(3), [100 * r[f"{m}_{split}"] for m in MODELS], color="tab:blue", alpha=0.35, marker="o", markersize=3)
        means = [100 * sum(r[f"{m}_{split}"] for r in records) / len(records) for m in MODELS]
        axis.plot(range(3), means, color="black", marker="o", linewidth=2)
        for x, y in enumerate(means):
            axis.annotate(f"{y:.0f} %", (x, y), textcoords="offset points", xytext=(0, 8), ha="center")
        axis.set_xticks(range(3), ["base", "SFT", "DFPO"])
        axis.set_xlim(-0.3, 2.3)
        axis.set_ylim(-2, 100)
        axis.set_title(title, fontsize=11)
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(axis="y", alpha=0.3)
    plot.axes[0].set_ylabel("greedy accuracy (%)")
    return plot


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3, 4, 5])
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    parser.add_argument("--home", type=Path, default=Path("~/.dfpo").expanduser(), help="MLflow store and model cache")
    arguments = parser.parse_args()
    RESULTS.mkdir(parents=True, exist_ok=True)

    def finish(seed: int) -> None:
        path = RESULTS / f"seed-{seed}.json"
        if not path.exists():
            path.write_text(json.dumps(run_seed(seed, arguments.home), indent=1) + "\n")

    with ThreadPoolExecutor(arguments.jobs) as pool:
        list(pool.map(finish, arguments.seeds))
    records = [json.loads(path.read_text()) for path in sorted(RESULTS.glob("seed-*.json"))]
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout.strip()
    command = "python tests/benchmarks/demo_seeds.py --seeds " + " ".join(str(r["seed"]) for r in records) + f" --jobs {arguments.jobs}"
    heading = f"# The demo over seeds\n\n`{command}`, commit {commit}, {date.today()}, 2 cores, one thread a process.\n"
    heading += "Greedy accuracy in per cent; minutes and peak memory of the whole run, all processes.\n\n"
    (RESULTS / "README.md").write_text(heading + summary(records))
    figure(records).savefig(RESULTS / "accuracy.png", dpi=150)
    print(summary(records))


if __name__ == "__main__":
    main()
