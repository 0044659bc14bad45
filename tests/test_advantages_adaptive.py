"""Estimates of the noise against simulations with known parameters, brute-force conditional expectations and invariances."""

import numpy as np
import pytest
import torch

from dfpo_core import algorithms
from dfpo_core.advantages.adaptive import PromptEffect, RewardNoise, before_last, without_effect
from dfpo_core.advantages.gae import GAE, GAEConfig, gae
from dfpo_core.advantages.whiten import whiten
from dfpo_core.config import TrainConfig
from dfpo_core.errors import UserError
from dfpo_core.types import AdvantageInputs


def random_effects(prompts: int, samples: int, shared: float, own: float, seed: int) -> torch.Tensor:
    """Normal residuals (prompts, samples) of variance shared + own, of which `shared` belongs to the prompt."""
    generator = np.random.default_rng(seed)
    effect = np.sqrt(shared) * generator.normal(size=(prompts, 1))
    return torch.tensor(effect + np.sqrt(own) * generator.normal(size=(prompts, samples)), dtype=torch.float32)


@pytest.mark.parametrize(("shared", "own"), [(0.0, 1.0), (0.3, 0.7), (0.8, 0.2)])
def test_the_correlation_within_prompts_is_found(shared, own):
    effect, values = PromptEffect(0.95), torch.linspace(0, 1, 128).repeat_interleave(4)
    for seed in range(60):
        effect.predict(values + random_effects(128, 4, shared, own, seed).flatten(), values, 4)
    assert effect.correlation == pytest.approx(shared / (shared + own), abs=0.04)


def test_the_prediction_is_the_conditional_expectation_given_the_other_responses():
    shared, own, samples = 0.3, 0.6, 4
    effect = PromptEffect(0.0)
    for mean, known in ((effect.shared, shared), (effect.total, shared + own)):
        mean.weighted, mean.weight, mean.memory = known * 1e9, 1e9, 1.0  # so long a past that one batch changes nothing
    residual = random_effects(3, samples, shared, own, 1)
    got = effect.predict(residual.flatten(), torch.zeros(3 * samples), samples).reshape(3, samples)
    # E[u | e_k, k in others] = cov(u, e) cov(e, e)^-1 e with cov(u, e_k) = tau^2, cov(e_k, e_l) = tau^2 + s^2 1[k = l]
    covariance = shared * np.ones((samples - 1, samples - 1)) + own * np.eye(samples - 1)
    weights = shared * np.linalg.solve(covariance, np.ones(samples - 1))
    for i in range(3):
        for j in range(samples):
            others = np.delete(residual[i].numpy(), j)
            assert got[i, j].item() == pytest.approx(weights @ others, abs=1e-5)


def test_a_response_does_not_enter_its_own_prediction():
    first, second = PromptEffect(0.9), PromptEffect(0.9)
    for effect in (first, second):  # the running correlation is the past's and one batch moves it little
        for seed in range(20):
            effect.predict(random_effects(64, 4, 0.5, 0.5, seed).flatten(), torch.zeros(256), 4)
    rewards = random_effects(64, 4, 0.5, 0.5, 99).flatten()
    changed = rewards.clone()
    changed[5] += 1
    before, after = first.predict(rewards, torch.zeros(256), 4), second.predict(changed, torch.zeros(256), 4)
    assert after[5] == pytest.approx(before[5].item(), abs=0.01)
    assert (after[[4, 6, 7]] - before[[4, 6, 7]] > 0.1).all()


def test_wrong_labels_correlate_and_flips_do_not():
    """40 % of the prompts with a label that no response meets, against 28 % of the responses flipped; a critic that knows the prompt."""
    generator = np.random.default_rng(0)
    solved = generator.uniform(size=(3000, 1)).repeat(4, 1)
    right = generator.uniform(size=(3000, 4)) < solved
    labels = right & (generator.uniform(size=(3000, 1)) > 0.4)
    flips = right ^ (generator.uniform(size=(3000, 4)) < 0.28)
    found = []
    for rewards, values in ((labels, 0.6 * solved), (flips, 0.28 + 0.44 * solved)):
        effect = PromptEffect(0.9)
        effect.predict(torch.tensor(rewards.astype(np.float32)).flatten(), torch.tensor(values.astype(np.float32)).flatten(), 4)
        found.append(effect.correlation)
    # labels: shared variance 0.24 E[p^2] = 0.08, total E[0.6 p (1 - 0.6 p)] = 0.18
    assert found[0] == pytest.approx(0.08 / 0.18, abs=0.04)
    assert found[1] == pytest.approx(0.0, abs=0.03)


def judged(chances, flip: float, generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Whether responses of these chances to be right are, and their 0/1 rewards, flipped at the given rate."""
    right = generator.uniform(size=len(chances)) < chances
    rewards = right ^ (generator.uniform(size=len(chances)) < flip)
    return tuple(torch.tensor(x, dtype=torch.float32) for x in (right, rewards))


def known(flip: float) -> RewardNoise:
    """The estimates of an endless past of responses that are surely wrong or surely right."""
    noise = RewardNoise(0.9, 0.2)
    for end, mean in (("low", flip), ("high", 1 - flip)):
        for moment in noise.moments[end]:
            moment.add(mean)
    noise.range = (0.0, 1.0)
    return noise


@pytest.mark.parametrize("flip", [0.0, 0.15, 0.4])
def test_the_denoised_reward_is_the_posterior_of_the_clean_one(flip):
    noise = known(flip)
    assert noise.flip_rate == pytest.approx(flip)
    for chance in (0.01, 0.3, 0.5, 0.9):
        value = flip + (1 - 2 * flip) * chance
        for reward in (0.0, 1.0):
            likelihood = (1 - flip, flip) if reward else (flip, 1 - flip)  # of this reward for a right and for a wrong response
            posterior = chance * likelihood[0] / (chance * likelihood[0] + (1 - chance) * likelihood[1])
            got, _ = noise.denoised(torch.tensor([reward]), torch.tensor([value]), 1.0)
            assert got.item() == pytest.approx(flip + (1 - 2 * flip) * posterior, abs=1e-5)  # in units of the noisy reward


def test_gaussian_noise_has_the_floor_of_its_variance():
    generator, noise = np.random.default_rng(0), RewardNoise(0.9, 0.2)
    for _ in range(30):
        chances = generator.uniform(size=256) ** 8  # most are nearly 0
        right, _ = judged(chances, 0.0, generator)
        noise.update(right + 0.3 * torch.tensor(generator.normal(size=256), dtype=torch.float32), torch.tensor(chances))
    assert noise.floor == pytest.approx(0.09, abs=0.02)


@pytest.mark.parametrize(("flip", "gain"), [(0.0, 0.0), (0.28, 0.04)])
def test_what_remains_of_a_reward_is_nearer_to_the_truth_and_clean_rewards_stay(flip, gain):
    generator, noise = np.random.default_rng(0), RewardNoise(0.9, 0.2)
    for _ in range(30):
        chances = generator.beta(0.3, 0.9, size=4096)
        right, rewards = judged(chances, flip, generator)
        values = torch.tensor(flip + (1 - 2 * flip) * chances, dtype=torch.float32)
        noise.update(rewards, values)
    fresh = (noise.denoised(rewards, values, 0.95)[0] - values, rewards - values)  # what a critic that knows the chance does not know
    truth = right - torch.tensor(chances, dtype=torch.float32)
    with_floor, as_it_is = (torch.corrcoef(torch.stack([x, truth]))[0, 1].item() for x in fresh)
    assert with_floor - as_it_is > gain - 0.02


@pytest.mark.parametrize(("anchors", "flip_rate", "floor"), [(0.1, 0.0, 0.0), (0.2, 0.5, 0.25), (0.3, 1 / 3, 2 / 9), (0.01, 0.0, 0.0)])
def test_the_anchors_are_the_given_share_of_the_batch_at_either_end_and_one_response_at_least(anchors, flip_rate, floor):
    noise = RewardNoise(0.9, anchors)
    noise.update(torch.tensor([0.0, 1, 0, 1, 0, 1, 0, 1, 0, 1]), torch.arange(10) / 10)  # of the lowest 1, 2, 3: 0, 1, 1 rewarded
    assert noise.flip_rate == pytest.approx(flip_rate) and noise.floor == pytest.approx(floor)


def test_a_critic_that_cannot_rank_finds_all_of_the_variance_and_a_share_of_the_reward_is_kept():
    generator, noise = np.random.default_rng(0), RewardNoise(0.9, 0.2)
    for _ in range(30):
        _, rewards = judged(np.full(256, 0.5), 0.0, generator)
        noise.update(rewards, torch.full((256,), 0.5))
    assert noise.floor == pytest.approx(0.25, abs=0.01)
    remaining, gain = noise.denoised(rewards, torch.full((256,), 0.5), 0.9)
    torch.testing.assert_close(remaining, 0.5 + gain * (rewards - 0.5))
    assert gain.min() >= 0.1 - 1e-6 and gain.max() < 0.15


def test_the_effect_is_taken_from_the_last_token():
    mask = torch.tensor([[1.0, 1.0, 0.0], [1.0, 1.0, 1.0]])
    result = without_effect(torch.zeros(2, 3), torch.tensor([0.5, -0.25]), mask)
    assert result.tolist() == [[0.0, -0.5, 0.0], [0.0, 0.0, 0.25]]


def adaptive_case(seed: int) -> AdvantageInputs:
    generator = torch.Generator().manual_seed(seed)
    mask = torch.ones(8, 3)
    mask[3, 2] = 0
    rewards = torch.randint(0, 2, (8,), generator=generator).float()
    token_rewards = torch.zeros(8, 3)
    token_rewards[torch.arange(8), mask.sum(1).long() - 1] = rewards
    returns = torch.rand(8, 3, 6, generator=generator).sort(-1).values
    return AdvantageInputs(token_rewards, rewards, mask, 4, returns, returns.mean(-1))


def test_the_advantage_is_the_weighted_gae_of_the_corrected_reward():
    case = adaptive_case(1)
    estimator = GAE(GAEConfig(prompt_effect=True, denoise=0.5))
    estimator.noise = known(0.2)
    got = estimator(case).advantages
    effect = PromptEffect(0.9).predict(case.rewards, case.values[:, 0], 4)
    noise, worth = known(0.2), before_last(case.values, case.mask)
    noise.update(case.rewards, worth)
    remaining = noise.denoised(case.rewards, worth, 0.5)[0]
    assert (remaining != case.rewards).any()
    token_rewards = without_effect(case.token_rewards, effect + case.rewards - remaining, case.mask)
    plain = gae(token_rewards, case.returns, case.mask, 1.0, 0.95).mean(-1)
    torch.testing.assert_close(got, whiten(plain, case.mask))


def test_a_resumed_estimate_continues_where_it_stopped():
    config = GAEConfig(prompt_effect=True, denoise=0.5, spectrum="adaptive")
    first, second = GAE(config), GAE(config)
    first(adaptive_case(1))
    second.load_state_dict(first.state_dict())
    before, after = first(adaptive_case(2)), second(adaptive_case(2))
    assert before.metrics == after.metrics
    torch.testing.assert_close(before.advantages, after.advantages, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("train", "field"),
    [
        ({"algorithm": "grpo", "advantage": {"denoise": 0.5}}, "train.advantage.denoise"),
        ({"algorithm": "dfpo", "advantage": {"prompt_effect": True}, "samples_per_prompt": 1}, "train.samples_per_prompt"),
    ],
)
def test_what_has_nothing_to_work_on_is_refused(train, field):
    with pytest.raises(UserError) as error:
        algorithms.resolve(TrainConfig(**train))
    assert error.value.field == field
