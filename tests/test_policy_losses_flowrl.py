"""FlowRL's trajectory balance against hand-computed numbers."""

import math
from dataclasses import replace

import pytest
import torch

from dfpo_core.policy_losses import registry
from dfpo_core.policy_losses.flowrl import FlowRLConfig, balance_residual, importance_weight
from dfpo_core.types import PolicyLossInputs


def make(hidden=6, seed=0, **options):
    torch.manual_seed(seed)
    loss = registry.get("flowrl")(FlowRLConfig(**options), hidden)
    for parameter in loss.parameters():  # the zero-initialised output would hide errors
        parameter.data += 0.1 * torch.randn_like(parameter)
    return loss


def case(seed=0, batch=4, length=5, hidden=6):
    g = torch.Generator().manual_seed(seed)
    shape = batch, length
    mask = (torch.arange(length) < torch.tensor([[5], [2], [3], [1]])).float()
    log_probs = (-torch.rand(shape, generator=g)).requires_grad_()
    old, reference = log_probs.detach() + 0.1 * torch.randn(shape, generator=g), -torch.rand(shape, generator=g)
    advantages = torch.randn(batch, 1, generator=g) * mask
    prompt = torch.randn(batch, hidden, generator=g).requires_grad_()
    parts = log_probs, torch.rand(shape, generator=g), old, reference, advantages, mask, torch.zeros(batch)
    return PolicyLossInputs(*parts, float(mask.sum()), batch, 2, max_new_tokens=length, prompt_hidden=prompt)


def test_the_published_defaults():
    assert (FlowRLConfig().beta, FlowRLConfig().clip_low, FlowRLConfig().clip_high) == (15.0, 0.2, 0.28)


def test_the_residual_equals_the_hand_computation():
    # log Z 2, mean log pi (-1 - 3) / 2 = -2, mean log pi_ref (-2 - 4) / 2 = -3, beta r = 15 * 0.5: 2 - 2 - 7.5 + 3 = -4.5
    policy, reference = torch.tensor([[-1.0, -3.0, float("nan")]]), torch.tensor([[-2.0, -4.0, -9.0]])
    mask = torch.tensor([[1.0, 1.0, 0.0]])
    assert balance_residual(torch.tensor([2.0]), policy, reference, torch.tensor([0.5]), mask, 15.0).item() == pytest.approx(-4.5)


@pytest.mark.parametrize(
    ("differences", "weight", "clipped"),
    [((0.1, 0.05), math.exp(0.15), 0), ((0.3, 0.2), 1.28, 1), ((-0.5, 0.1), 0.8, 1)],
)
def test_the_weight_is_the_clipped_ratio_of_the_whole_sequence(differences, weight, clipped):
    policy = torch.tensor([[*differences, 50.0]], requires_grad=True)
    got, active = importance_weight(policy, torch.zeros(1, 3), torch.tensor([[1.0, 1.0, 0.0]]), 0.2, 0.28)
    assert got.item() == pytest.approx(weight, abs=1e-6) and active.item() == clipped and not got.requires_grad


def test_the_loss_equals_a_loop_over_sequences():
    loss, inputs = make(), case()
    log_z = loss.log_z(inputs.prompt_hidden).tolist()
    total = 0.0
    for i, n in enumerate((5, 2, 3, 1)):
        policy, old, reference = (getattr(inputs, x)[i, :n].tolist() for x in ("log_probs", "old_log_probs", "reference_log_probs"))
        weight = min(max(math.exp(sum(policy) - sum(old)), 0.8), 1.28)
        total += weight * (log_z[i] + sum(policy) / n - 15 * inputs.advantages[i, 0].item() - sum(reference) / n) ** 2
    assert loss(inputs).loss.item() == pytest.approx(total / 4, rel=1e-5)


def test_log_z_starts_at_zero_and_is_learned_together_with_the_prompt_state():
    fresh = registry.get("flowrl")(FlowRLConfig(), 6)
    assert fresh.log_z(torch.randn(3, 6)).tolist() == [0, 0, 0]
    loss, inputs = make(), case()
    loss(inputs).loss.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in loss.parameters())
    assert inputs.prompt_hidden.grad.abs().sum() > 0


def test_training_on_one_prompt_reaches_the_target_distribution():
    """Two one-token responses, rewards 0 and 1: the balance holds at pi = pi_ref exp(beta r) / Z, Z = sum of pi_ref exp(beta r)."""
    loss, logits = make(beta=1.5), torch.zeros(2, requires_grad=True)
    reference, prompt, ones = torch.tensor([0.7, 0.3]).log(), torch.ones(2, 6), torch.ones(2, 1)
    optimizer = torch.optim.Adam([*loss.parameters(), logits], lr=0.02)
    for _ in range(400):
        policy = logits.log_softmax(0)[:, None]
        reward = torch.tensor([[0.0], [1.0]])
        inputs = PolicyLossInputs(policy, policy, policy.detach(), reference[:, None], reward, ones, reward[:, 0], 2.0, 2, 2, 1, prompt)
        optimizer.zero_grad()
        loss(inputs).loss.backward()
        optimizer.step()
    weights = 0.7, 0.3 * math.exp(1.5)
    assert logits.softmax(0).tolist() == pytest.approx([w / sum(weights) for w in weights], abs=0.01)
    assert loss.log_z(prompt)[0].item() == pytest.approx(math.log(sum(weights)), abs=0.01)


def test_the_loss_and_metrics_of_a_batch_are_the_sums_over_its_shards():
    loss, inputs = make(), case()
    tensors = "log_probs", "entropy", "old_log_probs", "reference_log_probs", "advantages", "mask", "rewards", "prompt_hidden"
    shards = [loss(replace(inputs, **{name: getattr(inputs, name)[rows] for name in tensors})) for rows in (slice(0, 1), slice(1, 4))]
    whole = loss(inputs)
    assert sum(s.loss.item() for s in shards) == pytest.approx(whole.loss.item(), rel=1e-5)
    for name, value in whole.metrics.items():
        assert sum(s.metrics[name] for s in shards) == pytest.approx(value, rel=1e-4, abs=1e-6), name


def test_masked_positions_change_neither_loss_nor_gradient():
    loss, inputs = make(), case()
    hole = inputs.mask == 0
    spoiled = replace(inputs, old_log_probs=torch.where(hole, -200.0, inputs.old_log_probs), advantages=inputs.advantages + 1e6 * hole)
    a, b = loss(inputs), loss(spoiled)
    assert a.metrics == b.metrics
    (gradient,) = torch.autograd.grad(b.loss, inputs.log_probs)
    assert torch.isfinite(gradient).all() and (gradient[hole] == 0).all()
