"""The critics of DVPO and Robust PPO against hand-computed numbers and independent NumPy."""

import numpy as np
import pytest
import torch

from dfpo_core.critics import multi_quantile
from dfpo_core.critics.ensemble import worst_member
from dfpo_core.critics.quantile import quantile_huber
from tests.test_critics_heads import HIDDEN, build, random_batch, take

RIVALS = [
    ("ensemble", {}),
    ("ensemble", {"member": "quantile", "quantiles": 8, "discount": 0.9}),
    ("multi_quantile", {"quantiles": 20}),
    ("multi_quantile", {"quantiles": 20, "lambda_mixing": "sampled", "lam": 0.5}),
]


@pytest.mark.parametrize(("name", "options"), RIVALS)
def test_padding_order_and_micro_batches_change_no_loss_no_metric_and_no_gradient(name, options):
    critic = build(name, **options)
    batch = random_batch(critic, 3)

    def result(outputs):
        loss = sum(o.loss for o in outputs)
        return {k: sum(o.metrics[k] for o in outputs) for k in outputs[0].metrics}, torch.autograd.grad(loss, list(critic.parameters()))

    whole, parts = result([critic.loss(batch)]), result([critic.loss(take(batch, [2], 1, 2)), critic.loss(take(batch, [1, 0], 2, 0))])
    assert parts[0] == pytest.approx(whole[0], rel=1e-4, abs=1e-6)
    torch.testing.assert_close(parts[1], whole[1], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(("name", "options", "levels"), [("ensemble", {}, 1), (*RIVALS[1], 8), ("multi_quantile", {}, 200)])
def test_shapes_are_those_of_every_critic(name, options, levels):
    critic, hidden = build(name, **options), torch.randn(2, 3, HIDDEN)
    samples = critic.sample_returns(hidden)
    assert samples.shape == (2, 3, levels) and (samples.diff(dim=-1) >= 0).all()
    assert critic.value(hidden).shape == critic.uncertainty(hidden).shape == (2, 3)
    torch.testing.assert_close(critic.value(hidden), samples.mean(-1))


@pytest.mark.parametrize("threshold", [0.0, 0.02, 0.5, 3.0])
def test_the_sorted_quantile_loss_equals_the_one_over_all_pairs(threshold):
    g = torch.Generator().manual_seed(0)
    heads = torch.randn(2, 3, 4, 11, generator=g, requires_grad=True)
    targets = torch.randn(2, 3, 7, generator=g).sort(-1).values
    fast = multi_quantile.heads_huber(heads, targets, threshold)
    pairs = quantile_huber(heads, targets[..., None, :], threshold).mean(-1)
    torch.testing.assert_close(fast, pairs)
    gradients = [torch.autograd.grad(x.sum(), heads)[0] for x in (fast, pairs)]
    torch.testing.assert_close(*gradients)


def test_consistency_is_the_mean_squared_difference_over_pairs_of_heads():
    heads = np.random.default_rng(1).normal(size=(3, 5))
    pairs = [((heads[i] - heads[j]) ** 2).mean() for i in range(3) for j in range(i)]
    assert multi_quantile.head_consistency(torch.tensor(heads)).item() == pytest.approx(np.mean(pairs))


def test_tail_calibration_mean_shift_and_shape_equal_numpy():
    g = np.random.default_rng(2)
    own, target = np.sort(g.normal(size=20)), np.sort(2 * g.normal(size=20) + 1)
    a, b = torch.tensor(own, dtype=torch.float32), torch.tensor(target, dtype=torch.float32)
    # a tail of 0.2 of 20 samples is 4 of them
    calibration = (own[:4].mean() - target[:4].mean()) ** 2 + (own[-4:].mean() - target[-4:].mean()) ** 2
    assert multi_quantile.tail_calibration(a, b, 0.2).item() == pytest.approx(calibration, rel=1e-5)
    assert multi_quantile.mean_shift(a, b).item() == pytest.approx(max(target.mean() - own.mean(), 0), rel=1e-5)
    assert multi_quantile.mean_shift(b, a).item() == pytest.approx(max(own.mean() - target.mean(), 0), rel=1e-5)
    for x, y, p, q in ((a, b, own, target), (b, a, target, own)):
        shape = max(p[:4].var() - q[:4].var(), 0) + max(q[-4:].var() - p[-4:].var(), 0)
        assert multi_quantile.tail_shape(x, y, 0.2).item() == pytest.approx(shape, rel=1e-4, abs=1e-6)


def test_curvature_charges_a_convex_lower_and_a_concave_upper_tail_only():
    k = torch.arange(12.0)  # second differences of k^2 are 2: convex everywhere, which is wrong on the left only
    assert multi_quantile.tail_curvature(k**2, 0.2).item() == pytest.approx(2.0)
    assert multi_quantile.tail_curvature(-(k**2), 0.2).item() == pytest.approx(2.0)
    assert multi_quantile.tail_curvature((k - 5.5) ** 3, 0.2).item() == 0.0
    assert multi_quantile.tail_curvature(3 * k, 0.2).item() == pytest.approx(0.0)


def test_every_dvpo_term_has_its_weight_and_its_metric():
    options = {f"{term}_weight": 0.0 for term in ("consistency", "risk", "mean_shift", "shape", "curvature")}
    critic = build("multi_quantile", quantiles=20)
    output = critic.loss(random_batch(critic, 0))
    extra = sum(output.metrics[f"critic/{option.removesuffix('_weight')}_loss"] for option in options)
    expected = output.metrics["critic/quantile_loss"] + 0.1 * extra
    assert output.loss.item() == pytest.approx(expected, rel=1e-5)
    alone = build("multi_quantile", quantiles=20, **options)
    assert set(alone.loss(random_batch(alone, 0)).metrics) == {"critic/loss", "critic/quantile_loss"}


def test_the_dvpo_defaults_are_the_published_ones():
    config = multi_quantile.MultiQuantileConfig()
    assert (config.quantiles, config.risk_weight) == (200, 0.1)


def test_the_worst_member_is_the_one_with_the_lowest_mean():
    members = torch.tensor([[0.0, 1.0], [-5.0, 5.5], [0.2, 0.2]])  # means 0.5, 0.25, 0.2
    assert worst_member(members).tolist() == pytest.approx([0.2, 0.2])


def test_every_member_of_the_ensemble_learns_the_worst_case_target():
    critic = build("ensemble", members=3, lam=0.0, discount=0.9)
    batch = random_batch(critic, 1, batch=1, length=2)
    with torch.no_grad():
        members = critic.heads(batch.hidden)[0, :, :, 0].numpy()
    r1, r2 = batch.token_rewards[0].tolist()
    targets = np.array([[r1 + 0.9 * members[1].min()], [r2]])
    output = critic.loss(batch)
    assert output.loss.item() == pytest.approx(((members - targets) ** 2).mean(), rel=1e-5)
    assert output.metrics["critic/pessimism"] == pytest.approx((members.mean(1) - members.min(1)).mean(), rel=1e-4)


@pytest.mark.parametrize(("name", "options"), [("ensemble", {}), RIVALS[1], ("multi_quantile", {"quantiles": 50})])
def test_a_rival_critic_learns_the_mean_of_a_coin_flip(name, options):
    from dfpo_core.types import CriticBatch

    torch.manual_seed(0)
    critic = build(name, **options)
    optimizer, generator = torch.optim.Adam(critic.parameters(), lr=3e-3), torch.Generator().manual_seed(1)
    hidden = torch.ones(64, 1, HIDDEN)
    for _ in range(150):
        won = (torch.rand(64, 1, generator=generator) < 0.3).float()
        batch = CriticBatch(hidden, hidden, won, torch.ones(64, 1), 64.0, critic.sample_returns(hidden), generator)
        optimizer.zero_grad()
        critic.loss(batch).loss.backward()
        optimizer.step()
    assert critic.value(hidden)[0, 0].item() == pytest.approx(0.3, abs=0.12)
