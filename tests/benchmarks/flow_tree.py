"""Does the bootstrapped flow find the exact return distribution at every state of a token tree?

Vocabulary 3, depth 6: 364 states, 729 answers, a fixed random policy, rewards 0 or 1 flipped with probability 0.1: the return at a state is
Bernoulli with an enumerable probability. Prints, for several lambda_c, W1 to the truth (share of the range) over all states and the rank
correlation of `uncertainty` with the true standard deviation. `python tests/benchmarks/flow_tree.py --steps 1500`
"""

from __future__ import annotations

import argparse

import numpy as np
import torch
from scipy.stats import spearmanr

from dfpo_core.critics.flow import FlowConfig, FlowCritic
from dfpo_core.types import CriticBatch

VOCABULARY, DEPTH, FLIP = 3, 6, 0.1
FIRST = [(VOCABULARY**d - 1) // (VOCABULARY - 1) for d in range(DEPTH + 1)]  # index of the first state of each depth


def tree(seed: int):
    """Policy (states, 3), noisy success probability of every state, noisy success probability of every leaf, one-hot hidden states."""
    generator = np.random.default_rng(seed)
    policy = 0.2 + 0.4 * generator.dirichlet(np.ones(VOCABULARY), size=FIRST[DEPTH])  # every state is visited
    leaves = np.where(generator.uniform(size=VOCABULARY**DEPTH) < 0.5, 1 - FLIP, FLIP)
    values = np.concatenate([np.zeros(FIRST[DEPTH]), leaves])
    for state in reversed(range(FIRST[DEPTH])):
        children = VOCABULARY * state + 1 + np.arange(VOCABULARY)
        values[state] = policy[state] @ values[children]
    return policy, values[: FIRST[DEPTH]], leaves, torch.eye(FIRST[DEPTH])


def rollouts(count: int, policy, leaves, generator: np.random.Generator):
    """State indices (count, DEPTH) and rewards (count,)."""
    state, visited = np.zeros(count, dtype=int), []
    for _ in range(DEPTH):
        visited.append(state)
        token = (generator.uniform(size=(count, 1)) > policy[state].cumsum(1)[:, :-1]).sum(1)
        state = VOCABULARY * state + 1 + token
    return np.stack(visited, 1), (generator.uniform(size=count) < leaves[state - FIRST[DEPTH]]).astype(np.float32)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--rate", type=float, default=3e-3)
    parser.add_argument("--lam", type=float, nargs="+", default=[0.0, 0.5, 0.95, 1.0])
    arguments = parser.parse_args()
    policy, values, leaves, table = tree(0)
    levels = (np.arange(200) + 0.5) / 200
    truth = torch.tensor(levels[None] > 1 - values[:, None], dtype=torch.float32)
    for lam in arguments.lam:
        torch.manual_seed(0)
        generator = np.random.default_rng(0)
        critic = FlowCritic(FIRST[DEPTH], FlowConfig(lam=lam, loss_levels=8, noise_levels=200))
        optimizer = torch.optim.Adam(critic.head.parameters(), arguments.rate)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, arguments.steps)
        mask = torch.ones(arguments.batch, DEPTH)
        for _ in range(arguments.steps):
            states, outcome = rollouts(arguments.batch, policy, leaves, generator)
            rewards = torch.zeros_like(mask)
            rewards[:, -1] = torch.tensor(outcome)
            hidden = table[states]
            loss = critic.loss(CriticBatch(hidden, hidden, rewards, mask, float(mask.sum()), mask[..., None])).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            critic.after_step()
        report = []
        for solver in (1, 32):
            distance = (critic.sample_returns(table[None], solver)[0] - truth).abs().mean(1)
            report.append(f"{solver}-step W1 mean {distance.mean():.4f} worst {distance.max():.4f}")
        error = np.abs(critic.value(table[None])[0].numpy() - values)
        rank = spearmanr(critic.uncertainty(table[None])[0].numpy(), np.sqrt(values * (1 - values))).statistic
        print(f"lambda {lam}: {'; '.join(report)}; |value error| mean {error.mean():.4f}; rank {rank:.3f}", flush=True)


if __name__ == "__main__":
    main()
