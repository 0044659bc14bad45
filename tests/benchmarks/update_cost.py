"""What the flow critic costs a whole training step: DFPO over PPO, by the same trainer, on the same rollouts.

    python tests/benchmarks/update_cost.py study        # the 0.3 M parameters of pipelines/configs/robustness.yaml
    python tests/benchmarks/update_cost.py smollm2      # SmolLM2-135M-Instruct, pipelines/configs/demo.yaml with a critic of full depth

Both algorithms step at learning rate 1e-12 from the same seed, so they sample the same tokens; steps alternate in one process and the
ratio is that of the medians. CPU seconds of `Trainer.step`, and of its update: everything after sampling and scoring (hidden states,
return samples, advantages, losses, optimizer steps). Peak resident memory comes from one further process an algorithm. The bars are 1.15
for the update and 1.1 for memory. Writes tests/benchmarks/results/update_cost.json.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch

from dfpo_core import comparison
from dfpo_core.config import PipelineConfig, load_config, parse_config
from dfpo_core.data import prepare
from dfpo_core.train import Trainer

CONFIGS = Path(__file__).parents[2] / "pipelines" / "configs"
OUTPUT = Path(__file__).parent / "results" / "update_cost.json"
STILL = {
    "learning_rate": 1e-12,
    "critic_learning_rate": 1e-12,
    "critic_head_learning_rate": 1e-12,
    "warmup_steps": 0,
    "critic_warmup_steps": 0,
}
SETTINGS = {"study": {"steps": 20}, "smollm2": {"steps": 5, "critic_layers": 0}}


def configuration(setting: str, algorithm: str, home: str) -> PipelineConfig:
    """The setting's own configuration with `algorithm` and, for DFPO, its options there."""
    train = {"algorithm": algorithm, **STILL, **SETTINGS[setting]}
    if setting == "study":
        study = comparison.load(CONFIGS / "robustness.yaml")
        merged = {**study.base, "home": home}
        merged["train"] = {**study.base["train"], **study.algorithms[algorithm].get("train", {}), **train}
        return parse_config(merged)
    values = load_config(CONFIGS / "demo.yaml").model_dump(mode="json")
    return parse_config({**values, "home": home, "train": {**values["train"], **train}})


class Measured:
    """A trainer whose steps are timed: (CPU seconds of the step, of its update)."""

    def __init__(self, config: PipelineConfig):
        torch.set_num_threads(1)
        rows = prepare.prepared_tables(config.data, config.seed)["train"].to_pylist()
        rows = [row | {"label": row["answer"]} for row in rows]
        self.trainer = Trainer(config, config.model, rows)
        self._sample, self.trainer.sample = self.trainer.sample, self._timed_sample

    def _timed_sample(self):
        start = time.process_time()
        result = self._sample()
        self.sampling = time.process_time() - start
        return result

    def step(self) -> tuple[float, float]:
        start = time.process_time()
        self.trainer.step()
        whole = time.process_time() - start
        return whole, whole - self.sampling


def seconds(setting: str, home: str) -> dict[str, dict[str, float]]:
    """Median CPU seconds of a step and of its update, by algorithm; the first step of each warms up."""
    measured = {name: Measured(configuration(setting, name, home)) for name in ("dfpo", "ppo")}
    times = {name: [] for name in measured}
    tokens = {name: [] for name in measured}
    for _ in range(1 + SETTINGS[setting]["steps"]):
        for name, one in measured.items():
            times[name].append(one.step())
            tokens[name].append(one.trainer.last.batch.token_count)
    assert tokens["dfpo"] == tokens["ppo"], "the two did not sample the same tokens"
    return {
        name: dict(zip(("step", "update"), map(statistics.median, zip(*rows[1:], strict=True)), strict=True))
        for name, rows in times.items()
    }


def peak_memory(setting: str, algorithm: str, home: str) -> float:
    """MB resident at most, of a process that takes two steps of `algorithm`."""
    command = [sys.executable, __file__, setting, "--memory-of", algorithm, "--home", home]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("setting", choices=SETTINGS)
    parser.add_argument("--home", default="~/.dfpo", help="where converted models lie")
    parser.add_argument("--memory-of", choices=("dfpo", "ppo"), help="only take two steps of this one and print the peak")
    arguments = parser.parse_args()
    if arguments.memory_of:
        one = Measured(configuration(arguments.setting, arguments.memory_of, arguments.home))
        one.step(), one.step()
        # ru_maxrss of a child counts what its parent held when it forked.
        print(int(re.search(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text())[1]) / 1024)
        return
    times = seconds(arguments.setting, arguments.home)
    memory = {name: peak_memory(arguments.setting, name, arguments.home) for name in ("dfpo", "ppo")}
    record = {"cpu_seconds": times, "peak_mb": memory}
    record["ratio"] = {part: times["dfpo"][part] / times["ppo"][part] for part in ("step", "update")}
    record["ratio"]["memory"] = memory["dfpo"] / memory["ppo"]
    print(json.dumps({arguments.setting: record}, indent=1))
    results = json.loads(OUTPUT.read_text()) if OUTPUT.exists() else {}
    OUTPUT.write_text(json.dumps({**results, arguments.setting: record}, indent=1) + "\n")


if __name__ == "__main__":
    main()
