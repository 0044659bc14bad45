"""The losses of the value flow, each against numbers worked out by hand or by another route."""

import math

import numpy as np
import pytest
import torch
from scipy import integrate, stats

from dfpo_core.critics import flow_losses
from dfpo_core.critics.flow import arcsine_noise, consistency_grid, draw_levels, gaussian_rate, solve, stratified_noise


def gaussian_field(mean, std):
    """Exact instantaneous velocity of the flow from N(0,1) to an independent N(mean, std^2), whatever the step size."""

    def velocity(position, flow_time, _):
        variance = (1 - flow_time) ** 2 + (flow_time * std) ** 2
        return mean + (flow_time * std**2 - (1 - flow_time)) * (position - flow_time * mean) / variance

    return velocity


def gaussian_jump(mean, std):
    """Exact velocity averaged over a step of size d: the same flow, followed to the end of the step."""

    def velocity(position, flow_time, step_size):
        end = flow_time + step_size
        scale = (((1 - end) ** 2 + (end * std) ** 2) / ((1 - flow_time) ** 2 + (flow_time * std) ** 2)).sqrt()
        jump = (end * mean + scale * (position - flow_time * mean) - position) / step_size.clamp(min=1e-12)
        return torch.where(step_size > 0, jump, gaussian_field(mean, std)(position, flow_time, step_size))

    return velocity


def test_the_anchor_is_least_at_the_exact_field():
    noise, time = stratified_noise(2000), torch.linspace(0, 0.9, 2000)[torch.randperm(2000, generator=torch.Generator().manual_seed(0))]
    target = (0.3 + 0.5 * torch.randn(1, 1, 2000, generator=torch.Generator().manual_seed(1))).double()
    exact = flow_losses.anchor(gaussian_field(0.3, 0.5), noise, time, target)
    for other in (gaussian_field(0.4, 0.5), gaussian_field(0.3, 0.8), lambda z, t, d: torch.zeros_like(z)):
        assert flow_losses.anchor(other, noise, time, target) > exact


def test_plain_flow_matching_collapses_in_one_step_to_the_mean():
    # the field's optimum at tau = 0 is E[Z] - eps: one Euler step of it has no spread; the jump of d = 1 keeps all of it
    noise = stratified_noise(4000)[None, None]
    collapsed = solve(gaussian_field(0.3, 0.5), noise, 1)
    assert collapsed.std().item() < 1e-6 and collapsed.mean().item() == pytest.approx(0.3, abs=1e-6)
    assert solve(gaussian_field(0.3, 0.5), noise, 256).std().item() == pytest.approx(0.5, abs=5e-3)
    assert solve(gaussian_jump(0.3, 0.5), noise, 1).std().item() == pytest.approx(0.5, abs=1e-3)


def test_the_closed_form_rate_is_the_flow_between_two_standard_normals():
    position, time = torch.linspace(-2, 2, 9), torch.linspace(0, 0.5, 9)
    for size in (0.0, 0.25, 0.5):
        step = torch.full((9,), size)
        exact = gaussian_jump(0.0, 1.0)(position, time, step)
        torch.testing.assert_close(position * gaussian_rate(time, step), exact, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("discount", [1.0, 0.7])
def test_the_bellman_path_starts_at_the_noise_ends_at_the_target_and_moves_at_its_velocity(discount):
    reward, following = torch.tensor([[0.4]], dtype=torch.float64), gaussian_jump(0.6, 0.5)
    noise, steps = stratified_noise(5).double(), 64

    def path(tau):
        return flow_losses.bellman_path(following, noise, torch.full((5,), tau, dtype=torch.float64), reward, discount, steps)

    torch.testing.assert_close(path(0.0)[0][0, 0], noise)
    torch.testing.assert_close(path(1.0)[0][0, 0], 0.4 + discount * (0.6 + 0.5 * noise))
    for tau in (0.2, 0.5, 0.8):
        slope = (path(tau + 1e-5)[0] - path(tau - 1e-5)[0]) / 2e-5
        torch.testing.assert_close(path(tau)[1], slope, atol=1e-4, rtol=1e-4)


def test_with_no_reward_and_no_discount_the_bellman_path_is_the_flow_of_the_following_state():
    following, noise = gaussian_jump(0.6, 0.5), stratified_noise(5)
    time = torch.full((5,), 0.4)
    image, velocity = flow_losses.bellman_path(following, noise, time, torch.zeros(1, 1), 1.0, 4)
    torch.testing.assert_close(velocity, following(image, time, torch.zeros(5)))


def test_both_weightings_equal_their_formulas():
    sigma = torch.tensor([0.5, 2.0])
    confidence = [1 / (1 + math.exp(2)) + 0.5, 1 / (1 + math.exp(0.5)) + 0.5]
    assert flow_losses.confidence_weight(sigma, 1.0).tolist() == pytest.approx(confidence)
    assert flow_losses.robust_weight(sigma, 1.0).tolist() == pytest.approx([0.8, 0.2])


def test_the_exact_flow_is_geometrically_consistent_and_the_bare_field_is_not():
    step = torch.tensor([1.0, 0.5, 0.25])
    time, position = torch.tensor([0.0, 0.5, 0.25]), torch.tensor([[[0.3, -1.0, 0.7]]])
    exact, field = gaussian_jump(0.2, 0.4), gaussian_field(0.2, 0.4)
    assert flow_losses.geometric_consistency(exact, exact, position, time, step, 0.0).item() < 1e-10
    assert flow_losses.geometric_consistency(field, field, position, time, step, 0.0).item() > 1e-2


@pytest.mark.parametrize(("largest", "sizes"), [(1.0, [0.125, 0.25, 0.5, 1.0]), (0.5, [0.125, 0.25, 0.5])])
def test_step_sizes_are_drawn_equally_often_and_flow_times_stand_on_their_grid(largest, sizes):
    levels = draw_levels(1200, torch.Generator().manual_seed(0), torch.device("cpu"))
    step_size, flow_time, smallest = consistency_grid(levels, largest, 3)
    found, counts = step_size.unique(return_counts=True)
    assert found.tolist() == sizes and smallest == 0.125
    assert counts.tolist() == pytest.approx([1200 / len(sizes)] * len(sizes), abs=2)
    assert (flow_time % step_size == 0).all() and (flow_time + step_size <= 1).all()


def test_a_step_that_stands_off_is_pulled_by_loss_3_as_its_distance_and_by_the_quantile_loss_as_its_square():
    """Why `consistency_largest` 0.5 exists. Returns 0 or 1, each half of the time; the jump steps at level 1/2 + distance instead."""
    noise = stratified_noise(20000)
    level, y, still = torch.special.ndtr(noise), torch.tensor([0.0, 1.0]), torch.zeros(20000)
    pulls = {}
    for distance in (0.01, 0.02):
        jump = lambda z, t, d, at=0.5 + distance: (torch.special.ndtr(z) > at).float() - z  # noqa: E731
        right = (level > 0.5).float() - noise
        half_steps = lambda z, t, d, right=right: right  # noqa: E731
        consistency = flow_losses.geometric_consistency(jump, half_steps, noise, still, still + 1, 0.0).item()
        excess = [flow_losses.jump_quantiles(noise + v, noise, y).item() for v in (jump(noise, still, still), right)]
        pulls[distance] = consistency, excess[0] - excess[1]
    assert pulls[0.01] == pytest.approx((0.01, 0.01**2 / 2), rel=0.02)
    assert pulls[0.02] == pytest.approx((0.02, 0.02**2 / 2), rel=0.02)


def test_geometric_consistency_teaches_nothing_through_its_target():
    theta = torch.tensor(0.5, requires_grad=True)
    step, time, position = torch.tensor([1.0]), torch.zeros(1), torch.tensor([[[0.3]]])
    constant = lambda z, t, d: theta * torch.ones_like(z)  # noqa: E731
    target = lambda z, t, d: theta * 2 * torch.ones_like(z)  # noqa: E731
    flow_losses.geometric_consistency(constant, target, position, time, step, 0.0).sum().backward()
    assert theta.grad.item() == pytest.approx(2 * (0.5 - 1.0))


def test_tail_means_equal_the_hand_computation():
    samples = torch.tensor([0.0, 1.0, 2.0, 3.0, 10.0])
    assert [x.item() for x in flow_losses.tail_means(samples, 0.4)] == pytest.approx([0.5, 6.5])
    # alpha 0.3 takes the first sample whole (0.2) and half of the second (0.1): (0 * 0.2 + 1 * 0.1) / 0.3
    assert [x.item() for x in flow_losses.tail_means(samples, 0.3)] == pytest.approx([1 / 3, (10 * 0.2 + 3 * 0.1) / 0.3])


def test_tail_means_of_a_normal_match_scipy():
    samples = stratified_noise(4000)
    expected, _ = integrate.quad(lambda x: x * stats.norm.pdf(x) / 0.1, -10, stats.norm.ppf(0.1))
    low, high = flow_losses.tail_means(samples, 0.1)
    assert low.item() == pytest.approx(expected, abs=2e-3) and high.item() == pytest.approx(-expected, abs=2e-3)


def test_regression_targets_of_the_tails_are_unbiased_from_single_returns():
    generator = np.random.default_rng(0)
    returns = torch.tensor(generator.normal(size=(200_000, 1, 1)), dtype=torch.float32)
    own = stratified_noise(40).expand(200_000, 1, 40)
    low, high = flow_losses.tail_targets(returns, own, 0.1)
    assert low.mean().item() == pytest.approx(-1.755, abs=0.02) and high.mean().item() == pytest.approx(1.755, abs=0.02)


def test_conditional_value_risk_equals_the_hand_computation():
    samples = torch.tensor([[[0.0, 1.0, 2.0, 3.0]]])  # tails of 0.25: 0 and 3
    targets = torch.tensor([[0.5]]), torch.tensor([[1.0]])
    assert flow_losses.conditional_value_risk(samples, targets, 0.25, (2.0, 3.0)).item() == pytest.approx(2 * 0.25 + 3 * 4)


def test_tail_shape_terms_equal_the_hand_computation():
    samples = torch.tensor([0.0, 4.0, 5.0, 11.0])  # mean 5, tails of 0.25: 0 and 11
    assert flow_losses.lower_contraction(samples, 0.25, torch.tensor(3.0)).item() == pytest.approx((5 - 3) ** 2)
    assert flow_losses.lower_contraction(samples, 0.25, torch.tensor(6.0)).item() == 0
    assert flow_losses.upper_expansion(samples, 0.25, torch.tensor(8.0)).item() == pytest.approx((8 - 6) ** 2)
    assert flow_losses.upper_expansion(samples, 0.25, torch.tensor(5.0)).item() == 0
    assert flow_losses.curvature(samples).item() == pytest.approx(((5 - 8 + 0) ** 2 + (11 - 10 + 4) ** 2) / 2)


@pytest.mark.parametrize(("term", "limit", "which"), [(flow_losses.lower_contraction, 0.5, 0), (flow_losses.upper_expansion, 3.0, 1)])
def test_a_tail_shape_term_moves_its_own_tail_and_leaves_the_mean(term, limit, which):
    samples = stratified_noise(40).requires_grad_()
    start = [x.item() for x in flow_losses.tail_means(samples, 0.1)]
    for _ in range(200):
        (gradient,) = torch.autograd.grad(term(samples, 0.1, torch.tensor(limit)), samples)
        samples = (samples - 0.2 * gradient).detach().requires_grad_()
    end = [x.item() for x in flow_losses.tail_means(samples, 0.1)]
    moved = [abs(b - a) for a, b in zip(start, end, strict=True)]
    assert moved[which] > 0.5 and moved[which] > 4 * moved[1 - which]
    assert abs(samples.mean().item()) < 0.01 * (samples.max() - samples.min()).item()


def test_the_quantile_loss_of_the_jump_is_least_at_the_quantile_function():
    noise = stratified_noise(60)
    target = torch.distributions.Exponential(2.0).icdf((torch.arange(60) + 0.5) / 60)[None, None]
    exact = torch.tensor(stats.expon.ppf(stats.norm.cdf(noise.numpy()), scale=0.5))[None, None]
    best = flow_losses.jump_quantiles(exact, noise, target)
    for other in (exact + 0.1, exact * 1.3, exact.mean() + 0 * exact):
        assert flow_losses.jump_quantiles(other, noise, target) > best


def test_arcsine_levels_follow_their_law():
    levels = stats.norm.cdf(arcsine_noise((torch.arange(20000) + 0.5) / 20000).numpy())
    assert stats.kstest(levels, stats.beta(0.5, 0.5).cdf).statistic < 1e-3


def test_the_quantile_loss_keeps_a_bootstrapped_target_as_it_is():
    # few, stratified, coupled: y(eps_i) = 2 eps_i. Leaving out the pair i = i would pull both ends in
    noise = stratified_noise(6)
    target = 2 * noise[None, None]
    samples = target.clone()
    best = flow_losses.jump_quantiles(samples, noise, target)
    for i in range(6):
        for step in (-0.05, 0.05):
            moved = samples + step * torch.nn.functional.one_hot(torch.tensor(i), 6)
            assert flow_losses.jump_quantiles(moved, noise, target) > best


def test_the_straightness_penalty_is_zero_only_for_one_velocity_along_the_path():
    noise, time, target = torch.tensor([0.5]), torch.tensor([0.5]), torch.tensor([[[1.0]]])
    assert flow_losses.straightness(lambda z, t, d: torch.ones_like(z), noise, time, target).item() == 0
    # v = z: at the middle of the path 0.75, at the start 0.5
    assert flow_losses.straightness(lambda z, t, d: z, noise, time, target).item() == pytest.approx(0.0625)
