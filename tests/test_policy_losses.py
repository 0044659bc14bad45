"""The clipped surrogate against hand-computed numbers."""

import math
from dataclasses import replace

import pytest
import torch
from pydantic import ValidationError

from dfpo_core.policy_losses import registry
from dfpo_core.policy_losses.ppo_clip import PPOClipConfig, clipped_surrogate, kl_estimate
from dfpo_core.types import PolicyLossInputs


def case(seed=0, batch=4, length=5):
    g = torch.Generator().manual_seed(seed)
    shape = batch, length
    mask = (torch.rand(shape, generator=g) > 0.3).float()
    log_probs = (-torch.rand(shape, generator=g)).requires_grad_()
    old, reference = -torch.rand(shape, generator=g), -torch.rand(shape, generator=g)
    advantages, entropy = torch.randn(shape, generator=g), torch.rand(shape, generator=g)
    return PolicyLossInputs(log_probs, entropy, old, reference, advantages, mask, torch.zeros(batch), float(mask.sum()), batch, 1)


def make(**options):
    return registry.get("ppo_clip")(PPOClipConfig(**options))


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "clipped"),
    [
        (1.1, 2.0, -2.2, 0),  # inside the band
        (1.5, 2.0, -2.56, 1),  # rises no further than 1.28
        (0.5, 2.0, -1.0, 0),  # the pessimistic side of a good action is not clipped
        (0.5, -2.0, 1.6, 1),  # falls no further than 0.8
        (1.5, -2.0, 3.0, 0),
        (9.0, -2.0, 6.0, 1),  # dual clip at 3
    ],
)
def test_asymmetric_and_dual_clip_equal_the_hand_computation(ratio, advantage, loss, clipped):
    got, active = clipped_surrogate(torch.tensor([ratio]), torch.tensor([advantage]), 0.2, 0.28, 3.0)
    assert got.item() == pytest.approx(loss)
    assert active.item() == clipped


def test_kl_estimators_equal_their_formulas_and_k3_is_never_negative():
    policy, reference = torch.tensor([0.5, 0.2]).log(), torch.tensor([0.25, 0.4]).log()
    x = [math.log(2), -math.log(2)]
    assert kl_estimate(policy, reference, "k1").tolist() == pytest.approx(x)
    assert kl_estimate(policy, reference, "k2").tolist() == pytest.approx([v * v / 2 for v in x])
    assert kl_estimate(policy, reference, "k3").tolist() == pytest.approx([0.5 - 1 + x[0], 2 - 1 + x[1]])


def test_k1_and_k3_average_to_the_exact_divergence():
    policy, reference = torch.tensor([0.5, 0.3, 0.2]), torch.tensor([0.2, 0.2, 0.6])
    exact = (policy * (policy / reference).log()).sum()
    for estimator in ("k1", "k3"):
        estimate = (policy * kl_estimate(policy.log(), reference.log(), estimator)).sum()
        assert estimate.item() == pytest.approx(exact.item(), abs=1e-6)


def test_the_gradient_at_the_old_policy_is_minus_the_advantage_over_the_token_count():
    inputs = case()
    inputs = replace(inputs, old_log_probs=inputs.log_probs.detach())
    make()(inputs).loss.backward()
    torch.testing.assert_close(inputs.log_probs.grad, -inputs.advantages * inputs.mask / inputs.token_count)


def test_entropy_bonus_and_kl_enter_with_their_weights():
    inputs = case()
    plain, valid = make()(inputs).loss, inputs.mask > 0
    entropy = inputs.entropy[valid].mean()
    kl = kl_estimate(inputs.log_probs, inputs.reference_log_probs, "k2")[valid].mean()
    both = make(entropy_weight=0.1, kl_weight=0.3, kl_estimator="k2")(inputs).loss
    assert both.item() == pytest.approx((plain - 0.1 * entropy + 0.3 * kl).item(), abs=1e-6)


def test_the_budget_average_divides_the_sum_over_tokens_by_a_constant():
    """Dr. GRPO (arXiv 2503.20783): at the old policy the gradient of a token is -A / (sequences x budget), whatever was sampled."""
    inputs = case()
    inputs = replace(inputs, old_log_probs=inputs.log_probs.detach(), max_new_tokens=50)
    make(average="budget")(inputs).loss.backward()
    torch.testing.assert_close(inputs.log_probs.grad, -inputs.advantages * inputs.mask / (4 * 50))


@pytest.mark.parametrize("average", ["tokens", "budget"])
def test_the_loss_and_metrics_of_a_batch_are_the_sums_over_its_shards(average):
    inputs = replace(case(), max_new_tokens=9)
    loss = make(entropy_weight=0.01, kl_weight=0.1, average=average)
    shards = []
    for rows in (slice(0, 1), slice(1, 4)):
        tensors = ("log_probs", "entropy", "old_log_probs", "reference_log_probs", "advantages", "mask", "rewards")
        shards.append(loss(replace(inputs, **{name: getattr(inputs, name)[rows] for name in tensors})))
    whole = loss(inputs)
    assert sum(s.loss.item() for s in shards) == pytest.approx(whole.loss.item(), abs=1e-6)
    for name, value in whole.metrics.items():
        assert sum(s.metrics[name] for s in shards) == pytest.approx(value, abs=1e-6), name


def test_masked_positions_change_neither_loss_nor_gradient():
    inputs = case()
    hole = inputs.mask == 0
    advantages, old = torch.where(hole, 1e6, inputs.advantages), torch.where(hole, -200.0, inputs.old_log_probs)
    spoiled = replace(inputs, advantages=advantages, old_log_probs=old)
    a, b = make()(inputs), make()(spoiled)
    assert a.metrics == b.metrics
    (grad,) = torch.autograd.grad(b.loss, inputs.log_probs)
    assert torch.isfinite(grad).all() and (grad[hole] == 0).all()


def test_a_dual_clip_inside_the_clip_range_is_refused():
    with pytest.raises(ValidationError, match="dual_clip"):
        PPOClipConfig(dual_clip=1.1)
