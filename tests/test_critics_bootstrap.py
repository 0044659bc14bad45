"""Lambda-returns of values and of return samples, against brute force and closed forms."""

import itertools

import numpy as np
import pytest
import torch

from dfpo_core.critics.bootstrap import lambda_returns, sampled_horizons, sampled_lambda_returns


def brute_force(rewards, values, discount, lam):
    """(1 - lam) sum over n of lam^(n-1) times the n-step return, the last n-step return taking the rest. One row, no padding."""
    length, result = len(rewards), []
    for t in range(length):
        total, weight_left = 0.0, 1.0
        for n in range(1, length - t + 1):
            end = t + n
            n_step = sum(discount**i * rewards[t + i] for i in range(n)) + (discount**n * values[end] if end < length else 0.0)
            weight = weight_left if end == length else (1 - lam) * lam ** (n - 1)
            total, weight_left = total + weight * n_step, weight_left - weight
        result.append(total)
    return result


@pytest.mark.parametrize(("discount", "lam"), list(itertools.product((1.0, 0.8), (0.0, 0.3, 0.9, 1.0))))
def test_lambda_returns_equal_the_weighted_n_step_returns(discount, lam):
    generator = np.random.default_rng(0)
    rewards, values = generator.normal(size=5), generator.normal(size=5)
    got = lambda_returns(torch.tensor(rewards)[None], torch.tensor(values)[None, :, None], torch.ones(1, 5), discount, lam)
    assert got.flatten().tolist() == pytest.approx(brute_force(rewards, values, discount, lam), abs=1e-9)


@pytest.mark.parametrize(("discount", "lam"), list(itertools.product((1.0, 0.8), (0.0, 0.3, 0.9, 1.0))))
def test_sampled_lambda_returns_have_the_same_mean(discount, lam):
    generator = np.random.default_rng(1)
    rewards, values = generator.normal(size=5), generator.normal(size=5)
    count = 200_000  # stratified horizons: the mean over samples is exact to about 1 / count
    horizons = sampled_horizons((torch.arange(count) + 0.5) / count, lam)
    bootstrap = torch.tensor(values)[None, :, None].expand(1, 5, count)
    got = sampled_lambda_returns(torch.tensor(rewards)[None], bootstrap, torch.ones(1, 5), discount, horizons).mean(-1)
    assert got.flatten().tolist() == pytest.approx(brute_force(rewards, values, discount, lam), abs=1e-4)


def test_horizons_are_geometric():
    horizons = sampled_horizons((torch.arange(100_000) + 0.5) / 100_000, 0.7)
    for n in (1, 2, 5):
        assert (horizons == n).float().mean().item() == pytest.approx(0.3 * 0.7 ** (n - 1), abs=1e-4)


@pytest.mark.parametrize("lam", [0.0, 0.5, 1.0])
def test_discount_and_the_last_token_are_where_they_should_be(lam):
    # r = (0, 0, 1), true values at gamma 0.5: 0.25, 0.5, 1: any lambda returns them
    exact = torch.tensor([[0.25, 0.5, 1.0]])
    rewards, mask = torch.tensor([[0.0, 0.0, 1.0]]), torch.ones(1, 3)
    assert torch.equal(lambda_returns(rewards, exact[..., None], mask, 0.5, lam)[..., 0], exact)
    horizons = torch.tensor([1, 2, 7])
    sampled = sampled_lambda_returns(rewards, exact[..., None].expand(1, 3, 3), mask, 0.5, horizons)
    torch.testing.assert_close(sampled, exact[..., None].expand(1, 3, 3))


def test_averaging_shrinks_the_spread_and_sampling_does_not():
    # a fair coin decided at the last token; the critic already knows Z in {0, 1} with probability 1/2 at both states
    count, lam = 4000, 0.5
    bootstrap = (torch.arange(count) % 2).float().expand(2, 2, count)  # two rows: outcome 0 and outcome 1
    rewards, mask = torch.tensor([[0.0, 0.0], [0.0, 1.0]]), torch.ones(2, 2)
    uniforms = (torch.randperm(count, generator=torch.Generator().manual_seed(0)) + 0.5) / count
    sampled = sampled_lambda_returns(rewards, bootstrap, mask, 1.0, sampled_horizons(uniforms, lam))[:, 0]
    average = lambda_returns(rewards, bootstrap, mask, 1.0, lam)[:, 0]
    assert sampled.std().item() == pytest.approx(0.5, abs=0.01)  # the fair coin's
    assert average.std().item() == pytest.approx(0.5 / 2**0.5, abs=0.01)  # the mean of two independent fair coins'


@pytest.mark.parametrize("sampled", [False, True])
def test_padding_holes_and_batch_order_change_no_target(sampled):
    g = torch.Generator().manual_seed(3)
    rewards, bootstrap = torch.randn(2, 4, generator=g), torch.randn(2, 4, 3, generator=g)
    mask = torch.tensor([[1.0, 1, 1, 1], [1, 1, 1, 0]])
    horizons = torch.tensor([1, 2, 4])

    def targets(r, b, m):
        return sampled_lambda_returns(r, b, m, 0.9, horizons) if sampled else lambda_returns(r, b, m, 0.9, 0.7)

    expected = targets(rewards, bootstrap, mask)
    places = [1, 2, 5, 6]  # padding left, right and in between
    wide = [torch.full((2, 8, *x.shape[2:]), fill) for x, fill in ((rewards, float("nan")), (bootstrap, 5.0), (mask, 0.0))]
    for target, source in zip(wide, (rewards, bootstrap, mask), strict=True):
        target[:, places] = source.flip(0)
    got = targets(*wide)
    torch.testing.assert_close(got[:, places].flip(0), expected)
    assert (got[:, [0, 3, 4, 7]] == 0).all()
