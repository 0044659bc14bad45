"""Does the bootstrapped flow find the exact return distribution at every state of a token tree?

Vocabulary 3, depth 6: 364 states, 729 answers, a fixed random policy. `normal`: an answer is worth 0, 1/2 or 1, plus normal noise 0.1, so
the return of a state is a mixture of three normals with enumerable weights. `flips`: rewards 0 or 1 flipped with probability 0.1, so the
return is Bernoulli. Every update draws `--copies` continuations of every state; the critic learns by its own bootstrapped losses alone.
The random numbers of a state are a shifted Sobol sequence, so that what is left is the critic's error and not the samples'.
Judged by W1 to the truth at every state (share of the range) and the rank correlation of `uncertainty` with the true standard deviation.

    python tests/benchmarks/flow_tree.py --depth 4 --steps 5000                               # adds to results/flow_tree.json
    python tests/benchmarks/flow_tree.py --returns normal --steps 8000                        # depth 6
    python tests/benchmarks/flow_tree.py --returns flips --steps 8000 --rate 5e-3 --keep critic.pt
    python tests/benchmarks/flow_tree.py --returns flips --steps 900 --rate 2e-3 --copies 4 --seeds 1 --start critic.pt
    python tests/benchmarks/flow_tree.py --compare weighting none confidence robust --seeds 0 1 2 --depth 4 --steps 600

The (noise, flow time) levels are shared by all tokens of an update, so many levels and one copy of each state converge faster than the
reverse at the same cost: 32 levels here. What is left at the end on flips is mostly the place of the step, which the last updates' samples
decide: hence more continuations at a smaller rate to end with, at depth 6, where 12,000 updates of one at 1.5e-2 leave 2.5 % at the worst.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
import yaml
from scipy.stats import norm, qmc, spearmanr

from dfpo_core.critics.flow import FlowConfig, FlowCritic
from dfpo_core.types import CriticBatch

VOCABULARY, FLIP, SPREAD, LEVELS = 3, 0.1, 0.1, 200
OPTIONS = {"loss_levels": 32, "jump_weight": 30.0, "jump_levels": "arcsine", "consistency_largest": 0.5}
TOGETHER = 40  # states of the first depths that are one batch
RANGE = {"normal": (-0.25, 1.25), "flips": (0.0, 1.0)}
OUTPUT = Path(__file__).parent / "results" / "flow_tree.json"


@dataclass(frozen=True)
class Tree:
    """All states of all depths below `depth`, breadth first, with what is known of them."""

    kind: str  # "normal" or "flips"
    depth: int
    policy: np.ndarray  # (states, 3) probability of each token
    answers: np.ndarray  # (3^depth,) mean reward
    quantiles: torch.Tensor  # (states, LEVELS) of the true return

    @property
    def states(self) -> int:
        return len(self.policy)


def first_states(depth: int) -> list[int]:
    """Index of the first state of each depth, 0 to depth + 1."""
    return [(VOCABULARY**d - 1) // (VOCABULARY - 1) for d in range(depth + 2)]


def random_tree(kind: str, depth: int, seed: int) -> Tree:
    """A random policy and random answers, and by enumeration the exact return distribution of every state."""
    generator, first = np.random.default_rng(seed), first_states(depth)
    states, leaves = first[depth], VOCABULARY**depth
    policy = 0.1 + 0.7 * generator.dirichlet(np.ones(VOCABULARY), size=states)
    values = [FLIP, 1 - FLIP] if kind == "flips" else [0.0, 0.5, 1.0]
    answers = generator.choice(values, size=leaves)
    reach = np.zeros((first[depth + 1], leaves))  # probability of each answer from each state
    reach[states:] = np.eye(leaves)
    for state in reversed(range(states)):
        reach[state] = policy[state] @ reach[VOCABULARY * state + 1 : VOCABULARY * state + 1 + VOCABULARY]
    levels = (np.arange(LEVELS) + 0.5) / LEVELS
    if kind == "flips":
        quantiles = (levels[None] > 1 - (reach[:states] @ answers)[:, None]).astype(float)
    else:
        grid = np.linspace(-0.6, 1.6, 2201)
        weights = [(reach[:states] * (answers == value)).sum(1)[:, None] for value in values]
        cdf = sum(weight * norm.cdf((grid - value) / SPREAD) for weight, value in zip(weights, values, strict=True))
        quantiles = np.stack([np.interp(levels, row, grid) for row in cdf])
    return Tree(kind, depth, policy, answers, torch.tensor(quantiles, dtype=torch.float32))


def continuations(tree: Tree, uniform: np.ndarray) -> tuple[np.ndarray, torch.Tensor, torch.Tensor]:
    """From every state to an answer, by its random numbers `uniform` (copies, states, depth + 1): one a token, the last for the noise.

    State indices, mask and token rewards, each (copies * states, depth).
    """
    state = np.tile(np.arange(tree.states), len(uniform))
    uniform = uniform.reshape(len(state), -1)
    depth = np.searchsorted(first_states(tree.depth), state, side="right") - 1
    visited, mask = np.zeros((len(state), tree.depth), int), np.zeros((len(state), tree.depth), np.float32)
    for step in range(tree.depth):
        going = depth + step < tree.depth
        visited[going, step], mask[going, step] = state[going], 1
        chances = tree.policy[np.where(going, state, 0)].cumsum(1)[:, :-1]
        token = (uniform[:, step, None] > chances).sum(1)
        state = np.where(going, VOCABULARY * state + 1 + token, state)
    mean, count, last = tree.answers[state - tree.states], len(state), uniform[:, -1]
    noisy = last < mean if tree.kind == "flips" else mean + SPREAD * norm.ppf(last)
    rewards = np.zeros_like(mask)
    rewards[np.arange(count), mask.sum(1).astype(int) - 1] = noisy
    return visited, torch.tensor(mask), torch.tensor(rewards)


def train(tree: Tree, steps: int, copies: int, rate: float, seed: int, start: Path | None = None, **options) -> FlowCritic:
    """A critic of one-hot states, or the one in the file `start`, trained by its own losses, cosine schedule."""
    torch.manual_seed(seed)
    table, shift = torch.eye(tree.states), np.random.default_rng(seed).uniform(size=(tree.states, tree.depth + 1))
    points = qmc.Sobol(tree.depth + 1, rng=seed)
    edges = [0, *(state for state in first_states(tree.depth)[: tree.depth] if state >= TOGETHER), tree.states]
    critic = FlowCritic(tree.states, FlowConfig(noise_levels=LEVELS, return_range=RANGE[tree.kind], **options))
    if start:
        critic.load_state_dict(torch.load(start))
    optimizer = torch.optim.Adam(critic.head.parameters(), rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        visited, mask, rewards = continuations(tree, (points.random(copies)[:, None] + shift) % 1)
        optimizer.zero_grad()
        for low, high in pairwise(edges):  # rows of about one length, for the sake of time
            rows = np.flatnonzero((visited[:, 0] >= low) & (visited[:, 0] < high))
            length = int(mask[rows].sum(1).max())
            hidden, part, earned = table[visited[rows, :length]], mask[rows, :length], rewards[rows, :length]
            critic.loss(CriticBatch(hidden, hidden, earned, part, float(mask.sum()), part[..., None])).loss.backward()
        optimizer.step()
        schedule.step()
        critic.after_step()
    return critic


def judge(critic: FlowCritic, tree: Tree) -> dict[str, float]:
    """Distances to the truth over all states, in shares of the range of the returns."""
    span = float(tree.quantiles.quantile(0.999) - tree.quantiles.quantile(0.001))
    table, found = torch.eye(tree.states)[None], {}
    for solver in (1, 32):
        distance = (critic.sample_returns(table, solver)[0] - tree.quantiles).abs().mean(1) / span
        found |= {f"w1_{solver}_step": distance.mean().item(), f"w1_{solver}_step_worst": distance.max().item()}
    error = (critic.value(table)[0] - tree.quantiles.mean(1)).abs() / span
    rank = spearmanr(critic.uncertainty(table)[0].numpy(), tree.quantiles.std(1).numpy()).statistic
    return found | {"value_error": error.mean().item(), "value_error_worst": error.max().item(), "rank_correlation": float(rank)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--returns", choices=sorted(RANGE), nargs="+", default=sorted(RANGE))
    parser.add_argument("--depth", type=int, default=6)
    parser.add_argument("--steps", type=int, default=6000)
    parser.add_argument("--copies", type=int, default=1)
    parser.add_argument("--rate", type=float, default=1.5e-2)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--start", type=Path, help="file of a critic to go on from, which --keep wrote")
    parser.add_argument("--keep", type=Path, help="file for the critic")
    parser.add_argument("--set", nargs="+", default=[], metavar="OPTION=VALUE", help="options of the critic")
    parser.add_argument("--compare", nargs="+", default=["lam", "0.95"], metavar=("OPTION", "VALUE"), help="an option and its values")
    parser.add_argument("--output", type=Path, default=OUTPUT)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    given = OPTIONS | {key: yaml.safe_load(value) for key, value in (pair.split("=") for pair in arguments.set)}
    name, *values = arguments.compare
    rows = json.loads(arguments.output.read_text()) if arguments.output.exists() else []
    for kind in arguments.returns:
        tree = random_tree(kind, arguments.depth, 0)
        for value in map(yaml.safe_load, values):
            for seed in arguments.seeds:
                options, began = given | {name: value}, time.process_time()
                critic = train(tree, arguments.steps, arguments.copies, arguments.rate, seed, arguments.start, **options)
                if arguments.keep:
                    torch.save(critic.state_dict(), arguments.keep)
                row = {"returns": kind, "depth": arguments.depth, "updates": arguments.steps, "copies": arguments.copies, "seed": seed}
                row |= {"goes_on": bool(arguments.start), "rate": arguments.rate, "cpu_seconds": time.process_time() - began}
                row |= options | judge(critic, tree)
                rows.append(row)
                print({key: round(v, 4) if isinstance(v, float) else v for key, v in row.items()}, flush=True)
                arguments.output.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
