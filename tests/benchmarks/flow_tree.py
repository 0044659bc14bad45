"""Does the bootstrapped flow find the exact return distribution at every state of a token tree?

Vocabulary 3, depth 6: 364 states, 729 answers, a fixed random policy. `normal`: an answer is worth 0, 1/2 or 1, plus normal noise 0.1, so
the return of a state is a mixture of three normals with enumerable weights. `flips`: rewards 0 or 1 flipped with probability 0.1, so the
return is Bernoulli. Every update draws `--copies` continuations of every state; the critic learns by its own bootstrapped losses alone.
Prints W1 to the truth over all states (share of the range) and the rank correlation of `uncertainty` with the true standard deviation.
`python tests/benchmarks/flow_tree.py --returns normal --steps 7000 --lam 0.5`
"""

from __future__ import annotations

import argparse
import time

import numpy as np
import torch
from scipy.stats import norm, spearmanr

from dfpo_core.critics.flow import FlowConfig, FlowCritic
from dfpo_core.types import CriticBatch

VOCABULARY, DEPTH, FLIP, SPREAD, LEVELS = 3, 6, 0.1, 0.1, 200
FIRST = [(VOCABULARY**d - 1) // (VOCABULARY - 1) for d in range(DEPTH + 2)]  # index of the first state of each depth
STATES = FIRST[DEPTH]
RANGE = {"normal": (-0.25, 1.25), "flips": (0.0, 1.0)}


def tree(seed: int, kind: str) -> tuple[np.ndarray, np.ndarray, torch.Tensor]:
    """Policy (states, 3), mean reward of each answer (729,), true quantiles of every state (states, LEVELS)."""
    generator = np.random.default_rng(seed)
    policy = 0.1 + 0.7 * generator.dirichlet(np.ones(VOCABULARY), size=STATES)
    values = [FLIP, 1 - FLIP] if kind == "flips" else [0.0, 0.5, 1.0]
    answers = generator.choice(values, size=VOCABULARY**DEPTH)
    reach = np.zeros((FIRST[DEPTH + 1], VOCABULARY**DEPTH))  # probability of each answer from each state
    reach[STATES:] = np.eye(VOCABULARY**DEPTH)
    for state in reversed(range(STATES)):
        reach[state] = policy[state] @ reach[VOCABULARY * state + 1 : VOCABULARY * state + 1 + VOCABULARY]
    levels = (np.arange(LEVELS) + 0.5) / LEVELS
    if kind == "flips":
        quantiles = (levels[None] > 1 - (reach[:STATES] @ answers)[:, None]).astype(float)
    else:
        grid = np.linspace(-0.6, 1.6, 2201)
        weights = [(reach[:STATES] * (answers == value)).sum(1)[:, None] for value in values]
        cdf = sum(weight * norm.cdf((grid - value) / SPREAD) for weight, value in zip(weights, values, strict=True))
        quantiles = np.stack([np.interp(levels, row, grid) for row in cdf])
    return policy, answers, torch.tensor(quantiles, dtype=torch.float32)


def continuations(copies: int, policy, answers, kind: str, generator: np.random.Generator):
    """From every state to an answer, `copies` times: state indices, mask and token rewards, each (copies * states, DEPTH)."""
    state = np.tile(np.arange(STATES), copies)
    depth = np.searchsorted(FIRST, state, side="right") - 1
    visited, mask = np.zeros((len(state), DEPTH), int), np.zeros((len(state), DEPTH), np.float32)
    for step in range(DEPTH):
        going = depth + step < DEPTH
        visited[going, step], mask[going, step] = state[going], 1
        chances = policy[np.where(going, state, 0)].cumsum(1)[:, :-1]
        token = (generator.uniform(size=(len(state), 1)) > chances).sum(1)
        state = np.where(going, VOCABULARY * state + 1 + token, state)
    mean = answers[state - STATES]
    noisy = generator.uniform(size=len(mean)) < mean if kind == "flips" else mean + SPREAD * generator.normal(size=len(mean))
    rewards = np.zeros_like(mask)
    rewards[np.arange(len(mean)), mask.sum(1).astype(int) - 1] = noisy
    return visited, torch.tensor(mask), torch.tensor(rewards)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--returns", choices=sorted(RANGE), default="normal")
    parser.add_argument("--steps", type=int, default=7000)
    parser.add_argument("--copies", type=int, default=4)
    parser.add_argument("--rate", type=float, default=1.5e-2)
    parser.add_argument("--lam", type=float, nargs="+", default=[0.0, 0.5, 0.95, 1.0])
    arguments = parser.parse_args()
    policy, answers, truth = tree(0, arguments.returns)
    span, table = float(truth.quantile(0.999) - truth.quantile(0.001)), torch.eye(STATES)
    for lam in arguments.lam:
        torch.manual_seed(0)
        generator, start = np.random.default_rng(0), time.process_time()
        critic = FlowCritic(STATES, FlowConfig(lam=lam, loss_levels=4, noise_levels=LEVELS, return_range=RANGE[arguments.returns]))
        optimizer = torch.optim.Adam(critic.head.parameters(), arguments.rate)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, arguments.steps)
        for _ in range(arguments.steps):
            visited, mask, rewards = continuations(arguments.copies, policy, answers, arguments.returns, generator)
            hidden = table[visited]
            loss = critic.loss(CriticBatch(hidden, hidden, rewards, mask, float(mask.sum()), mask[..., None])).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            critic.after_step()
        report = []
        for solver in (1, 32):
            distance = (critic.sample_returns(table[None], solver)[0] - truth).abs().mean(1) / span
            report.append(f"{solver}-step W1 mean {distance.mean():.4f} worst {distance.max():.4f}")
        error = (critic.value(table[None])[0] - truth.mean(1)).abs() / span
        rank = spearmanr(critic.uncertainty(table[None])[0].numpy(), truth.std(1).numpy()).statistic
        cost = f"{arguments.steps} updates, {time.process_time() - start:.0f} CPU s"
        means = f"|value error| mean {error.mean():.4f} worst {error.max():.4f}; rank {rank:.3f}"
        print(f"{arguments.returns}, lambda {lam}, {cost}: {'; '.join(report)}; {means}", flush=True)


if __name__ == "__main__":
    main()
