"""What every critic must do: shapes, invariances, additive losses, learning a known return; and the scalar and quantile losses."""

import copy
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dfpo_core.critics import registry
from dfpo_core.critics.flow import FlowConfig, FlowCritic, bound, draw_levels, one_step, solve, stratified_noise
from dfpo_core.critics.quantile import quantile_huber
from dfpo_core.critics.scalar import clipped_value_error
from dfpo_core.types import CriticBatch, last_token

HIDDEN = 12
ALL_TERMS = {name: 0.5 for name in FlowConfig.model_fields if name.endswith("_weight")}


def build(name, seed=0, **options):
    torch.manual_seed(seed)
    entry = registry.get(name)
    critic = entry(HIDDEN, entry.config_class(**options))
    for parameter in critic.parameters():  # zero-initialised outputs would hide errors
        parameter.data += 0.1 * torch.randn_like(parameter)
    return critic


def random_batch(critic, seed, batch=3, length=5):
    g = torch.Generator().manual_seed(seed)
    hidden = torch.randn(batch, length, HIDDEN, generator=g)
    mask = torch.ones(batch, length)
    for row in range(1, batch):
        mask[row, int(torch.randint(1, length + 1, (1,), generator=g)) :] = 0
    rewards = torch.rand(batch, length, generator=g) * mask
    return CriticBatch(hidden, hidden, rewards, mask, float(mask.sum()), critic.sample_returns(hidden), torch.Generator().manual_seed(7))


def take(batch, rows, left=0, right=0):
    """Some rows of a batch, padded with arbitrary numbers; the token count stays the whole batch's."""

    def pad(x, fill):
        shape = (len(rows), left + x.shape[1] + right, *x.shape[2:])
        wide = torch.full(shape, fill)
        wide[:, left : left + x.shape[1]] = x[rows]
        return wide

    hidden = pad(batch.hidden, 3.0)
    parts = hidden, hidden, pad(batch.token_rewards, 5.0), pad(batch.mask, 0.0)
    return CriticBatch(*parts, batch.token_count, pad(batch.old_returns, -4.0), torch.Generator().manual_seed(7))


EVERYTHING = {**ALL_TERMS, "lambda_mixing": "average", "discount": 0.9}
CRITICS = [("scalar", {}), ("quantile", {"quantiles": 8}), ("flow", {}), ("flow", EVERYTHING)]


@pytest.mark.parametrize(("name", "options"), CRITICS)
@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 1000), left=st.integers(0, 2), right=st.integers(0, 2))
def test_padding_batch_order_and_micro_batches_change_no_loss_and_no_gradient(name, options, seed, left, right):
    critic = build(name, **options)
    batch = random_batch(critic, seed)

    def gradient(outputs):
        loss = sum(o.loss for o in outputs)
        return loss.item(), torch.cat([g.flatten() for g in torch.autograd.grad(loss, [p for p in critic.parameters() if p.requires_grad])])

    whole = gradient([critic.loss(batch)])
    other = gradient([critic.loss(take(batch, [2], left, right)), critic.loss(take(batch, [1, 0], right, left))])
    assert other[0] == pytest.approx(whole[0], rel=1e-4, abs=1e-6)
    torch.testing.assert_close(other[1], whole[1], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(("name", "options"), CRITICS)
def test_metrics_add_up_over_micro_batches(name, options):
    critic = build(name, **options)
    batch = random_batch(critic, 3)
    whole = critic.loss(batch).metrics
    parts = [critic.loss(take(batch, [0])).metrics, critic.loss(take(batch, [1, 2])).metrics]
    for key, value in whole.items():
        assert sum(p[key] for p in parts) == pytest.approx(value, rel=1e-4, abs=1e-6), key


@pytest.mark.parametrize(("name", "levels"), [("scalar", 1), ("quantile", 32), ("flow", 32)])
def test_every_critic_answers_in_the_same_shapes(name, levels):
    critic, hidden = build(name), torch.randn(2, 3, HIDDEN)
    samples = critic.sample_returns(hidden)
    assert samples.shape == (2, 3, levels) and (samples.diff(dim=-1) >= 0).all()
    assert critic.value(hidden).shape == critic.uncertainty(hidden).shape == (2, 3)


@pytest.mark.parametrize("name", ["scalar", "quantile", "flow"])
def test_autocast_changes_nothing_inside_a_critic(name):
    critic = build(name)
    batch = random_batch(critic, 1)
    expected = critic.loss(batch).loss.item()
    batch.generator.manual_seed(7)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert critic.loss(batch).loss.item() == expected
        assert critic.value(batch.hidden).dtype == critic.sample_returns(batch.hidden).dtype == torch.float32
    assert torch.isfinite(critic.value(batch.hidden.bfloat16())).all()


def test_a_term_of_weight_zero_is_not_computed():
    critic = build("flow", bellman_weight=0.0, consistency_weight=0.0, jump_weight=0.0)
    names = set(critic.loss(random_batch(critic, 0)).metrics)
    assert names == {"critic/anchor_loss", "critic/loss", "critic/outside_range"}


def test_every_term_has_its_own_metric():
    critic = build("flow", **ALL_TERMS)
    names = set(critic.loss(random_batch(critic, 0)).metrics)
    terms = ("anchor", "bellman", "consistency", "jump", "straight", "risk", "lower_shape", "upper_shape", "curvature")
    assert names >= {f"critic/{term}_loss" for term in terms}


def test_the_untrained_flow_is_a_normal_over_the_return_range():
    critic = FlowCritic(HIDDEN, FlowConfig(return_range=(-1.0, 3.0), noise_levels=64))
    hidden = torch.randn(1, 2, HIDDEN)
    for steps in (1, 2, 8):
        torch.testing.assert_close(critic.sample_returns(hidden, steps)[0, 0], 1 + 2 * stratified_noise(64), atol=1e-3, rtol=1e-3)
    assert critic.value(hidden).tolist()[0] == pytest.approx([1.0, 1.0], abs=1e-6)
    assert critic.uncertainty(hidden).tolist()[0] == pytest.approx([2.0, 2.0], abs=1e-5)


def test_uncertainty_is_the_finite_difference_of_the_one_step_map():
    critic, hidden = build("flow").double(), torch.randn(2, 3, HIDDEN, dtype=torch.float64)
    velocity = bound(critic.head, critic.head.context(hidden))
    noise = stratified_noise(16).double()
    numeric = (one_step(velocity, noise + 1e-5) - one_step(velocity, noise - 1e-5)) / 2e-5
    with torch.no_grad():
        samples, slope = critic.head.jump(critic.head.context(hidden), noise)
    torch.testing.assert_close(samples, one_step(velocity, noise).detach())
    torch.testing.assert_close(slope, numeric.detach(), atol=1e-6, rtol=1e-6)


def test_uncertainty_is_the_mean_slope_of_the_one_step_map_in_units_of_the_return():
    critic, hidden = build("flow", return_range=(-1.0, 3.0), noise_levels=16), torch.randn(2, 3, HIDDEN)
    velocity, noise = critic._velocity(critic.head, hidden), stratified_noise(16)
    _, slope = torch.func.jvp(lambda eps: one_step(velocity, eps), (noise,), (torch.ones_like(noise),))
    torch.testing.assert_close(critic.uncertainty(hidden), 2 * slope.abs().mean(-1).detach())


@pytest.mark.parametrize(
    ("weighting", "weight"),
    [("none", lambda s: 1.0), ("confidence", lambda s: 1 / (1 + math.exp(2 / s)) + 0.5), ("robust", lambda s: 1 / (1 + (s / 2) ** 2))],
)
def test_loss_2_weighs_a_token_by_the_dispersion_of_its_target_flow(weighting, weight):
    # a response of two tokens: the first alone has a successor
    critic = build("flow", weighting="none")
    batch = random_batch(critic, 5, batch=1, length=2)
    plain = critic.loss(batch).metrics["critic/bellman_loss"]
    noise = draw_levels(critic.config.loss_levels, torch.Generator().manual_seed(7), torch.device("cpu")).noise.double()
    head = copy.deepcopy(critic.target_head).double()
    velocity = bound(head, head.context(batch.target_hidden[0, :1].double()))
    slope = (one_step(velocity, noise + 1e-5) - one_step(velocity, noise - 1e-5)) / 2e-5
    critic.config = critic.config.model_copy(update={"weighting": weighting, "weighting_scale": 2.0})
    batch.generator.manual_seed(7)
    assert critic.loss(batch).metrics["critic/bellman_loss"] == pytest.approx(plain * weight(slope.abs().mean().item()), rel=1e-3)


def test_one_solver_step_is_the_jump():
    critic, hidden = build("flow"), torch.randn(1, 2, HIDDEN)
    velocity, noise = critic._velocity(critic.head, hidden), stratified_noise(8)
    torch.testing.assert_close(solve(velocity, noise, 1), one_step(velocity, noise))


def test_the_last_token_skips_padding_on_both_sides():
    mask = torch.tensor([[0.0, 1, 1, 0], [1, 1, 1, 1]])
    assert last_token(mask).tolist() == [[0, 0, 1, 0], [0, 0, 0, 1]]


def test_a_masked_token_inside_a_response_is_skipped_as_if_it_were_not_there():
    critic = build("flow", **ALL_TERMS)
    short = random_batch(critic, 3, batch=1, length=4)
    hole = torch.tensor([0, 1, 9, 2, 3])  # the token after the second is somebody else's
    wide = {
        name: torch.stack([getattr(short, name)[:, i] if i < 9 else torch.full_like(getattr(short, name)[:, 0], 1e3) for i in hole], 1)
        for name in ("hidden", "target_hidden", "token_rewards", "old_returns")
    }
    mask = torch.tensor([[1.0, 1, 0, 1, 1]])
    wide = CriticBatch(mask=mask, token_count=4.0, generator=torch.Generator().manual_seed(7), **wide)
    assert critic.loss(wide).loss.item() == pytest.approx(critic.loss(short).loss.item(), rel=1e-5)


def test_the_target_head_follows_at_its_decay():
    critic = build("flow", target_decay=0.75)
    target, online = critic.target_head.out.bias.item(), critic.head.out.bias.item()
    critic.after_step()
    assert critic.target_head.out.bias.item() == pytest.approx(0.75 * target + 0.25 * online)


def test_clipped_value_error_equals_the_hand_computation():
    value, old, target = torch.tensor([0.9, 0.5]), torch.tensor([0.5, 0.5]), torch.tensor([1.0, 1.0])
    error, clipped = clipped_value_error(value, old, target, 0.2)  # 0.9 counts as 0.7
    assert error.tolist() == pytest.approx([0.09, 0.25]) and clipped.tolist() == [1, 0]
    assert clipped_value_error(value, old, target, 0.0)[0].tolist() == pytest.approx([0.01, 0.25])


def test_quantile_huber_equals_the_hand_computation():
    # levels 1/4 and 3/4 at 0 and 1, one target 1: errors 1 and 0; huber(1) at 0.5 is 0.75; mean of (0.25 * 0.75, 0)
    got = quantile_huber(torch.tensor([0.0, 1.0]), torch.tensor([1.0]), 0.5)
    assert got.item() == pytest.approx(0.25 * 0.75 / 2)
    assert quantile_huber(torch.tensor([0.0, 1.0]), torch.tensor([0.0]), 0.0).item() == pytest.approx(0.25 * 1 / 2)
