"""The Bellman recursion of the value flow: contraction, discount, lambda and loss 2 on chains with known return distributions."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import stats

from dfpo_core.critics.bootstrap import lambda_returns
from dfpo_core.critics.flow import FlowConfig, FlowCritic
from dfpo_core.types import CriticBatch

sys.path.insert(0, str(Path(__file__).parent / "benchmarks"))
import flow_tree  # noqa: E402

STATES = torch.randn(4, 16, generator=torch.Generator().manual_seed(5))


def chain_batch(count, length, noise, generator):
    """Rows of a chain of `length` states: token rewards 0.2 with a normal disturbance at the end."""
    rewards = torch.full((count, length), 0.2)
    rewards[:, -1] += noise * torch.randn(count, generator=generator)
    hidden = STATES[:length].expand(count, length, -1)
    mask = torch.ones(count, length)
    return CriticBatch(hidden, hidden, rewards, mask, float(mask.sum()), torch.zeros(count, length, 1), generator)


def train(config, steps, length=3, noise=0.2, count=64, seed=0):
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    critic = FlowCritic(16, config)
    optimizer = torch.optim.Adam(critic.head.parameters(), 1e-2)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        loss = critic.loss(chain_batch(count, length, noise, generator)).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        critic.after_step()
    return critic


def chain_quantiles(length, discount, noise, levels):
    """Exact quantiles of the return at each state: normal, mean and deviation discounted from the end."""
    place = [sum(0.2 * discount**i for i in range(length - t)) for t in range(length)]
    spread = [noise * discount ** (length - 1 - t) for t in range(length)]
    grid = stats.norm.ppf((np.arange(levels) + 0.5) / levels)
    return torch.tensor(np.array(place)[:, None] + np.array(spread)[:, None] * grid, dtype=torch.float32)


def worst_distance(critic, discount, length=3, noise=0.2):
    """Largest W1 over the states of the chain, one-step samples against the truth, as a share of the returns' range."""
    truth = chain_quantiles(length, discount, noise, critic.config.noise_levels)
    samples = critic.sample_returns(STATES[:length][None])[0]
    return ((samples - truth).abs().mean(-1).max() / (truth.max() - truth.min())).item()


def test_the_distributional_bellman_update_contracts_by_the_discount():
    # two critics of a stochastic chain: W1 between their Bellman images is at most gamma times the distance before
    g = torch.Generator().manual_seed(0)
    rewards, mask = torch.rand(1, 6, generator=g), torch.ones(1, 6)
    for discount in (0.9, 0.5):
        first, second = (torch.randn(1, 6, 64, generator=g).sort(-1).values for _ in range(2))
        for _ in range(4):
            before = (first - second).abs().mean(-1).max()
            first, second = (lambda_returns(rewards, z, mask, discount, 0.0).sort(-1).values for z in (first, second))
            assert (first - second).abs().mean(-1).max() <= discount * before + 1e-6


def test_repeated_bellman_updates_reach_the_fixed_point():
    rewards, mask = torch.tensor([[0.5, 0.25, 1.0]]), torch.ones(1, 3)
    samples = torch.randn(1, 3, 8, generator=torch.Generator().manual_seed(0))
    for _ in range(3):
        samples = lambda_returns(rewards, samples, mask, 0.5, 0.0)
    torch.testing.assert_close(samples, torch.tensor([0.875, 0.75, 1.0])[None, :, None].expand(1, 3, 8))


@pytest.mark.parametrize(("discount", "lam"), [(0.7, 0.0), (0.7, 0.5), (0.7, 1.0)])
def test_the_flow_finds_the_return_distribution_of_every_state(discount, lam):
    config = FlowConfig(width=32, loss_levels=8, discount=discount, lam=lam, bellman_weight=0.3, noise_levels=64)
    assert worst_distance(train(config, 600), discount) < 0.02


def test_a_heavy_loss_2_leaves_the_fixed_point_where_it_is():
    config = FlowConfig(width=32, loss_levels=8, discount=0.7, lam=0.0, bellman_weight=3.0, noise_levels=64)
    critic = train(config, 600)
    undiscounted = chain_quantiles(3, 1.0, 0.2, 64)  # where a missing factor gamma would pull
    samples = critic.sample_returns(STATES[:3][None])[0]
    assert worst_distance(critic, 0.7) < 0.03
    assert (samples[0] - undiscounted[0]).abs().mean() > 0.1


@pytest.mark.parametrize(("kind", "lam"), [("normal", 0.0), ("flips", 0.95)])
def test_the_bootstrapped_losses_alone_find_the_distribution_at_every_state_of_a_tree(kind, lam):
    # 13 states, 27 answers, enumerated; benchmarks/flow_tree.py takes depth 4 and 6 and trains longer
    tree = flow_tree.random_tree(kind, 3, 0)
    found = flow_tree.judge(flow_tree.train(tree, 400, 1, 1.5e-2, 0, lam=lam, **flow_tree.OPTIONS), tree)
    assert found["w1_1_step"] < 0.055 and found["w1_1_step_worst"] < 0.09
    assert found["rank_correlation"] > 0.9


def test_the_enumeration_of_a_tree_agrees_with_its_simulation():
    tree = flow_tree.random_tree("normal", 2, 3)
    _, _, rewards = flow_tree.continuations(tree, np.random.default_rng(0).uniform(size=(20000, tree.states, 3)))
    drawn = rewards.sum(1).reshape(20000, tree.states).sort(0).values
    levels = ((np.arange(flow_tree.LEVELS) + 0.5) / flow_tree.LEVELS * 20000).astype(int)
    assert (drawn[levels].T - tree.quantiles).abs().mean() < 0.01
