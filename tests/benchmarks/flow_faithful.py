"""Which critic knows the whole return distribution? Flow (all terms, and plain flow matching) against quantile and IQN heads.

Each head has about the same number of parameters and sees the same single returns of fresh random states; judged on 256 states that it
has not seen. Rows replace those of the same family and head in tests/benchmarks/results/flow_faithful.json.
At the end it says for each family which of the bars (BARS) one step of the flow holds.
`python tests/benchmarks/flow_faithful.py`

The flow's jump loss weighs more here than in training (JUMP_WEIGHT), because returns are many and fresh and nothing is gained by fitting
slowly; its levels follow the arcsine law, for the tails, and loss 3 leaves d = 1 to it. Both it and IQN see DRAWN_LEVELS levels a return.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).parents[1]))
import return_families as rf  # noqa: E402

from dfpo_core.critics.flow import FlowConfig, FlowCritic, solve  # noqa: E402
from dfpo_core.critics.quantile import QuantileConfig, QuantileCritic, quantile_huber  # noqa: E402
from dfpo_core.types import CriticBatch  # noqa: E402

LEVELS, DRAWN_LEVELS, JUMP_WEIGHT = 200, 16, 30.0
OUTPUT = Path(__file__).parent / "results" / "flow_faithful.json"
BARS = {
    "W1 within 1.25 x that of 32 steps": lambda one, many: one["w1"] <= 1.25 * many["w1"],
    "std ratio 0.95 to 1.05": lambda one, many: one["family"] == "point_mass" or 0.95 <= one["std_ratio"] <= 1.05,  # 0 / 0 there
    "mean within 1 % of the range": lambda one, many: one["mean_error"] < 0.01,
    "lower CVaR within 3 %": lambda one, many: one["cvar_low_error"] < 0.03,
    "upper CVaR within 3 %": lambda one, many: one["cvar_high_error"] < 0.03,
}


class FlowHead:
    """The flow critic, by its own loss on one-token responses."""

    def __init__(self, seed: int, **options):
        config = {
            "bellman_weight": 0.0,
            "width": 56,
            "loss_levels": DRAWN_LEVELS,
            "noise_levels": LEVELS,
            "jump_weight": JUMP_WEIGHT,
            "jump_levels": "arcsine",
            "consistency_largest": 0.5,
            **options,
        }
        self.module, self.generator = FlowCritic(rf.STATE_SIZE, FlowConfig(**config)), torch.Generator().manual_seed(seed)
        self.weights = list(self.module.head.parameters())

    def loss(self, hidden, returns):
        one = torch.ones(len(returns), 1)
        batch = CriticBatch(hidden[:, None], hidden[:, None], returns[:, None], one, float(len(returns)), one[..., None], self.generator)
        return self.module.loss(batch).loss

    def after_step(self):
        self.module.after_step()

    def samples(self, hidden, steps=1):
        return self.module.sample_returns(hidden[:, None], steps)[:, 0]


class PlainFlowHead(FlowHead):
    """Flow matching only: the instantaneous field, solved by Euler steps. It has no step size to condition on."""

    def __init__(self, seed: int):
        super().__init__(seed, jump_weight=0.0, consistency_weight=0.0)

    @torch.no_grad()
    def samples(self, hidden, steps=1):
        velocity = self.module._velocity(self.module.head, hidden[:, None])
        field = solve(lambda z, tau, d: velocity(z, tau, torch.zeros_like(d)), self.module.noise, steps)
        return (self.module.shift + self.module.scale * field).sort(-1).values[:, 0]


class QuantileHead:
    """200 fixed quantiles, plain quantile loss."""

    def __init__(self, seed: int):
        self.module = QuantileCritic(rf.STATE_SIZE, QuantileConfig(quantiles=LEVELS, width=48))
        self.weights = list(self.module.parameters())

    def loss(self, hidden, returns):
        return quantile_huber(self.module._quantiles(hidden), returns[:, None], 0.0).mean()

    def after_step(self):
        pass

    def samples(self, hidden, steps=1):
        return self.module.sample_returns(hidden)


class ImplicitQuantileHead(nn.Module):
    """IQN (Dabney et al. 2018, arXiv 1806.06923): cosine embedding of the level, multiplied into the state's features."""

    def __init__(self, seed: int, width: int = 56, cosines: int = 32):
        super().__init__()
        self.state, self.level = nn.Linear(rf.STATE_SIZE, width), nn.Linear(cosines, width)
        self.first, self.second, self.out = nn.Linear(width, width), nn.Linear(width, width), nn.Linear(width, 1)
        self.frequency = math.pi * torch.arange(cosines)
        self.weights = list(self.parameters())

    def quantiles(self, hidden, levels):
        x = F.silu(self.state(hidden))[:, None] * F.silu(self.level((levels[..., None] * self.frequency).cos()))
        return self.out(F.silu(self.second(F.silu(self.first(x))))).squeeze(-1)

    def loss(self, hidden, returns):
        levels = torch.rand(DRAWN_LEVELS)
        error = returns[:, None] - self.quantiles(hidden, levels)
        return torch.maximum(levels * error, (levels - 1) * error).mean()

    def after_step(self):
        pass

    @torch.no_grad()
    def samples(self, hidden, steps=1):
        return self.quantiles(hidden, (torch.arange(LEVELS) + 0.5) / LEVELS).sort(-1).values


HEADS = {
    "flow": FlowHead,
    "flow, no jump loss": lambda seed: FlowHead(seed, jump_weight=0.0, consistency_largest=1.0),
    "flow matching only": PlainFlowHead,
    "200 quantiles": QuantileHead,
    "IQN": ImplicitQuantileHead,
}


def fit(head, family, steps: int, batch: int = 512, rate: float = 8e-3, seed: int = 0):
    """Train on single returns of fresh states, cosine schedule."""
    generator = np.random.default_rng(seed)
    optimizer = torch.optim.Adam(head.weights, rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        states = rf.random_states(batch, generator)
        returns = torch.tensor(rf.draw(family, states, generator), dtype=torch.float32)
        loss = head.loss(torch.tensor(states, dtype=torch.float32), returns)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        head.after_step()
    return sum(p.numel() for p in head.weights)


def crps(samples: torch.Tensor, truth: torch.Tensor) -> float:
    """E|Z - Y| - E|Z - Z'| / 2, mean over states; samples and truth (N, K) are equally likely values."""
    first = (samples[:, :, None] - truth[:, None, :]).abs().mean((1, 2))
    return float((first - (samples[:, :, None] - samples[:, None, :]).abs().mean((1, 2)) / 2).mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--families", nargs="+", default=list(rf.FAMILIES))
    parser.add_argument("--heads", nargs="+", default=list(HEADS))
    arguments = parser.parse_args()
    kept = json.loads(OUTPUT.read_text()) if OUTPUT.exists() else []
    states = rf.random_states(256, np.random.default_rng(99))
    hidden = torch.tensor(states, dtype=torch.float32)
    for name in arguments.families:
        truth = rf.true_quantiles(rf.FAMILIES[name], states, LEVELS)
        for label in arguments.heads:
            torch.manual_seed(arguments.seed)
            head, start, rows = HEADS[label](arguments.seed), time.process_time(), []
            size = fit(head, rf.FAMILIES[name], arguments.steps, seed=arguments.seed)
            for solver in (1, 2, 4, 8, 16, 32) if label.startswith("flow") else (1,):
                samples = head.samples(hidden, solver)
                row = {"family": name, "head": label, "parameters": size, "updates": arguments.steps, "seed": arguments.seed}
                row |= {"solver_steps": solver, **rf.errors(samples, truth)}
                row |= {"crps": crps(samples, truth), "crps_of_truth": crps(truth, truth), "cpu_seconds": time.process_time() - start}
                if label.startswith("flow"):
                    value = head.module.value(hidden[:, None])[:, 0]
                    row["value_error"] = float((value - truth.mean(1)).abs().mean() / (truth.max() - truth.min()))
                rows.append(row)
                print({k: round(v, 4) if isinstance(v, float) else v for k, v in row.items()}, flush=True)
            kept = [row for row in kept if (row["family"], row["head"]) != (name, label)] + rows
            OUTPUT.write_text(json.dumps(kept, indent=1) + "\n")
    for name in arguments.families:
        rows = {row["solver_steps"]: row for row in kept if (row["family"], row["head"]) == (name, "flow")}
        missed = [bar for bar, holds in BARS.items() if rows and not holds(rows[1], rows[32])]
        print(f"{name}: {'not trained' if not rows else 'misses ' + ', '.join(missed) if missed else 'holds every bar'}")


if __name__ == "__main__":
    main()
