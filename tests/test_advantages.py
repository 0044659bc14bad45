"""Advantages against hand-computed numbers, brute force and invariances."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dfpo_core.advantages import registry
from dfpo_core.advantages.adaptive import RewardNoise
from dfpo_core.advantages.gae import gae, trimmed_weights
from dfpo_core.advantages.whiten import whiten
from dfpo_core.critics.flow import FlowConfig, FlowCritic
from dfpo_core.types import AdvantageInputs, CriticBatch


def inputs(token_rewards, mask, returns=None, values=None, rewards=None, samples_per_prompt=1):
    rewards = token_rewards.sum(1) if rewards is None else rewards
    return AdvantageInputs(token_rewards, rewards, mask, samples_per_prompt, returns, values)


def make(name, **options):
    entry = registry.get(name)
    return entry(entry.config_class(**options))


def brute_force_gae(rewards, values, discount, lam):
    """Sum over u of (discount lam)^(u-t) delta_u for one row without padding."""
    nxt = np.append(values[1:], 0.0)
    delta = rewards + discount * nxt - values
    return [sum((discount * lam) ** (u - t) * delta[u] for u in range(t, len(delta))) for t in range(len(delta))]


def random_case(seed, batch=3, length=6, levels=5):
    g = torch.Generator().manual_seed(seed)
    mask = torch.ones(batch, length)
    for row in range(batch):
        mask[row, int(torch.randint(1, length + 1, (1,), generator=g)) :] = 0
    rewards = torch.randn(batch, length, generator=g) * mask
    returns = torch.randn(batch, length, levels, generator=g).sort(-1).values
    return rewards, mask, returns


def test_gae_of_two_tokens_equals_the_hand_computation():
    # r = (0, 1), V = (0.5, 0.8), gamma 0.9, lambda 0.5: delta_2 = 0.2, delta_1 = 0.9*0.8-0.5 = 0.22, A_1 = 0.22 + 0.45*0.2 = 0.31
    result = gae(torch.tensor([[0.0, 1.0]]), torch.tensor([[[0.5], [0.8]]]), torch.ones(1, 2), 0.9, 0.5)
    assert result.flatten().tolist() == pytest.approx([0.31, 0.2], abs=1e-6)


def test_each_noise_level_gets_the_brute_force_gae():
    rewards, mask, returns = random_case(1)
    result = gae(rewards, returns, mask, 0.97, 0.9)
    for row in range(3):
        n = int(mask[row].sum())
        for k in range(5):
            expected = brute_force_gae(rewards[row, :n].numpy(), returns[row, :n, k].numpy(), 0.97, 0.9)
            assert result[row, :n, k].tolist() == pytest.approx(expected, abs=1e-5)
        assert (result[row, n:] == 0).all()


@pytest.mark.parametrize("mean_source", ["samples", "values"])
@pytest.mark.parametrize("seed", range(5))
def test_uniform_weights_equal_scalar_gae_of_the_mean(seed, mean_source):
    rewards, mask, returns = random_case(seed)
    values = torch.randn(rewards.shape, generator=torch.Generator().manual_seed(seed))
    mean = returns.mean(-1) if mean_source == "samples" else values
    result = make("gae", whiten=False, mean_source=mean_source)(inputs(rewards, mask, returns, values)).advantages
    expected = gae(rewards, mean[..., None], mask, 1.0, 0.95)[..., 0]
    assert (result - expected).abs().max() < 1e-6


def test_the_cvar_spectrum_values_a_state_by_its_lower_tail():
    # one token, samples 0..3, alpha 0.5: the value is (0 + 1) / 2, the advantage of reward 2 is 1.5
    returns = torch.tensor([[[0.0, 1.0, 2.0, 3.0]]])
    case = inputs(torch.tensor([[2.0]]), torch.ones(1, 1), returns, returns.mean(-1))
    assert make("gae", whiten=False, spectrum="cvar", alpha=0.5)(case).advantages.item() == pytest.approx(1.5)
    # half the mean (1.5), half the CVaR (0.5): 2 - 1.0
    assert make("gae", whiten=False, spectrum="mix", alpha=0.5, mix=0.5)(case).advantages.item() == pytest.approx(1.0)


def test_the_mean_of_the_critic_replaces_the_mean_of_the_samples():
    returns = torch.tensor([[[0.0, 1.0, 2.0, 3.0]]])
    case = inputs(torch.tensor([[2.0]]), torch.ones(1, 1), returns, torch.tensor([[1.0]]))  # samples shift down by 0.5
    assert make("gae", whiten=False, spectrum="cvar", alpha=0.5)(case).advantages.item() == pytest.approx(2.0)


def test_trimming_by_the_flip_rate_recovers_the_clean_success_probability():
    levels = 1000
    for flip, clean in ((0.1, 0.3), (0.3, 0.8), (0.4, 0.5)):
        noisy = flip + (1 - 2 * flip) * clean
        quantiles = ((torch.arange(levels) + 0.5) / levels > 1 - noisy).float()
        assert (trimmed_weights(levels, flip) * quantiles).sum().item() == pytest.approx(clean, abs=0.003)


@pytest.mark.parametrize("flip", [0.0, 0.1, 0.2, 0.3, 0.4])
def test_the_flip_rate_is_estimated_within_five_hundredths_from_the_values_of_a_critic_in_training(flip):
    # a flow critic that starts knowing nothing, and sees flipped rewards only; an answer is right where the state says so
    torch.manual_seed(0)
    generator, noise, mask = torch.Generator().manual_seed(0), RewardNoise(0.9, 0.2), torch.ones(256, 1)
    critic = FlowCritic(8, FlowConfig(width=16, loss_levels=8, noise_levels=16))
    optimizer = torch.optim.Adam(critic.head.parameters(), 1e-2)
    for _ in range(120):
        hidden = torch.randn(256, 1, 8, generator=generator)
        right = hidden[:, 0, 0] > 0.3
        rewards = (right ^ (torch.rand(256, generator=generator) < flip)).float()
        noise.update(rewards, critic.value(hidden)[:, 0])  # the values of before the update
        batch = CriticBatch(hidden, hidden, rewards[:, None], mask, 256.0, critic.sample_returns(hidden), generator)
        optimizer.zero_grad()
        critic.loss(batch).loss.backward()
        optimizer.step()
        critic.after_step()
    assert noise.flip_rate == pytest.approx(flip, abs=0.05)
    assert noise.floor == pytest.approx(flip * (1 - flip), abs=0.03)


def test_the_adaptive_spectrum_is_uniform_on_clean_rewards():
    rewards, mask, returns = random_case(2)
    clean = torch.tensor([0.0, 1.0, 1.0])
    values = clean[:, None].expand_as(mask).contiguous()
    case = inputs(rewards, mask, returns, values, clean)
    output = make("gae", spectrum="adaptive")(case)
    assert output.metrics["critic/flip_rate"] == 0
    torch.testing.assert_close(output.advantages, make("gae")(case).advantages)


def test_a_resumed_flip_rate_continues_where_it_stopped():
    rewards, mask, returns = random_case(4)
    case = inputs(rewards, mask, returns, returns.mean(-1), torch.tensor([0.0, 1.0, 0.0]))
    first, second = make("gae", spectrum="adaptive"), make("gae", spectrum="adaptive")
    first(case)
    second.load_state_dict(first.state_dict())
    assert first(case).metrics == second(case).metrics


def test_group_advantages_equal_the_hand_computation():
    rewards = torch.tensor([1.0, 0.0, 0.0, 0.0, 1.0, 1.0, 1.0, 1.0])
    mask = torch.ones(8, 2)
    mask[1, 1] = 0
    output = make("group")(inputs(torch.zeros(8, 2), mask, rewards=rewards, samples_per_prompt=4))
    # mean 1/4, std sqrt(3)/4: sqrt(3) for the right one, -1/sqrt(3) for the others; a group of equals has none
    assert output.advantages[:, 0].tolist() == pytest.approx([3**0.5, *[-(3**-0.5)] * 3, 0, 0, 0, 0], abs=1e-4)
    assert output.advantages[1, 1] == 0
    assert output.metrics["reward/groups_without_signal"] == 0.5
    plain = make("group", divide_by_std=False)(inputs(torch.zeros(8, 2), mask, rewards=rewards, samples_per_prompt=4))
    assert plain.advantages[:4, 0].tolist() == pytest.approx([0.75, -0.25, -0.25, -0.25])


def test_reinforce_pp_is_the_whitened_reward_to_go():
    rewards = torch.tensor([[0.1, 0.2, 1.0], [0.0, 0.5, 0.0]])
    mask = torch.tensor([[1.0, 1, 1], [1, 1, 0]])
    got = make("reinforce_pp", discount=0.5)(inputs(rewards, mask)).advantages
    to_go = np.array([0.1 + 0.1 + 0.25, 0.2 + 0.5, 1.0, 0.25, 0.5])
    expected = (to_go - to_go.mean()) / to_go.std()
    assert got[mask > 0].tolist() == pytest.approx(expected.tolist(), abs=1e-5)


def test_reinforce_pp_with_baseline_subtracts_the_group_mean():
    rewards = torch.tensor([1.0, 0.0, 1.0, 1.0])
    case = inputs(rewards[:, None], torch.ones(4, 1), rewards=rewards, samples_per_prompt=2)
    got = make("reinforce_pp", group_baseline=True)(case).advantages[:, 0]
    expected = np.array([0.5, -0.5, 0, 0]) / np.array([0.5, -0.5, 0, 0]).std()
    assert got.tolist() == pytest.approx(expected.tolist(), abs=1e-4)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 1000), st.integers(0, 3), st.integers(0, 3))
def test_padding_on_either_side_and_batch_order_change_no_advantage(seed, left, right):
    rewards, mask, returns = random_case(seed)
    estimator = make("gae")
    expected = estimator(inputs(rewards, mask, returns, returns.mean(-1))).advantages
    order = torch.randperm(3, generator=torch.Generator().manual_seed(seed))

    def pad(x, fill):
        return torch.nn.functional.pad(x[order], (left, right), value=fill)

    wide = torch.stack([pad(returns[..., k], 7.0) for k in range(5)], -1)
    padded = estimator(inputs(pad(rewards, 9.0), pad(mask, 0.0), wide, wide.mean(-1))).advantages
    torch.testing.assert_close(padded[:, left : left + 6], expected[order], atol=1e-5, rtol=1e-5)
    assert (padded[:, :left] == 0).all() and (padded[:, left + 6 :] == 0).all()


def test_whitening_ignores_masked_values_even_when_they_are_nan():
    values = torch.tensor([[1.0, 3.0, float("nan")]])
    assert whiten(values, torch.tensor([[1.0, 1, 0]])).tolist()[0] == pytest.approx([-1, 1, 0])
