"""What a critic reads of the policy: features by hand, nothing of the future, nothing of the padding, and what it is good for."""

import math

import pytest
import torch

from dfpo_core import algorithms
from dfpo_core.config import TrainConfig
from dfpo_core.critics import confidence, registry
from dfpo_core.errors import UserError
from dfpo_core.types import CriticBatch


def test_the_features_are_those_worked_out_by_hand():
    log_probs, entropy = torch.tensor([[-1.0, -3.0, -2.0]]), torch.tensor([[0.5, 0.25, 0.0]])
    first, second, third = confidence.features(log_probs, entropy, torch.ones(1, 3))[0].tolist()
    assert first == pytest.approx([1, 0, 0, 0, 0, 0.5])
    assert second == pytest.approx([math.exp(-1), -0.2, -1, -0.5, -0.5, 0.25])
    assert third == pytest.approx([math.exp(-4), -0.8, -2, -1.5, -1.5, 0])


def test_improbable_tokens_are_cut_and_no_feature_is_huge():
    log_probs = torch.full((1, 50), -torch.inf)
    features = confidence.features(log_probs, torch.zeros(1, 50), torch.ones(1, 50))
    assert features.isfinite().all() and features.abs().max() <= 10


def test_a_feature_knows_nothing_of_its_own_token_or_a_later_one():
    generator = torch.Generator().manual_seed(0)
    log_probs, entropy, mask = -torch.rand(2, 8, generator=generator), torch.rand(2, 8, generator=generator), torch.ones(2, 8)
    for t in range(8):
        changed = log_probs.clone()
        changed[:, t:] -= 1
        same = confidence.features(log_probs, entropy, mask)[:, : t + 1], confidence.features(changed, entropy, mask)[:, : t + 1]
        torch.testing.assert_close(*same)


def test_padding_on_either_side_and_what_stands_in_it_change_nothing():
    generator = torch.Generator().manual_seed(0)
    log_probs, entropy = -torch.rand(3, 5, generator=generator), torch.rand(3, 5, generator=generator)
    alone = confidence.features(log_probs, entropy, torch.ones(3, 5))
    for left in (0, 2, 4):
        padded_log_probs, padded_entropy, mask = torch.full((3, 9), torch.nan), torch.full((3, 9), torch.nan), torch.zeros(3, 9)
        place = slice(left, left + 5)
        padded_log_probs[:, place], padded_entropy[:, place], mask[:, place] = log_probs, entropy, 1
        padded = confidence.features(padded_log_probs, padded_entropy, mask)
        torch.testing.assert_close(padded[:, place], alone)
        assert (padded[mask == 0] == 0).all()


@pytest.mark.parametrize("name", ["flow", "scalar"])
def test_a_critic_whose_hidden_states_tell_nothing_learns_from_confidence(name):
    """Rewards are right with the probability that the policy gave the whole response; hidden states are noise."""

    def explained(reads):
        torch.manual_seed(0)
        generator = torch.Generator().manual_seed(0)
        options = {"width": 16, "loss_levels": 8, "lam": 1.0} if name == "flow" else {"lam": 1.0, "value_clip": 0.0}
        critic = registry.get(name)(8, registry.get(name).config_class(confidence=reads, **options))
        optimizer = torch.optim.Adam([p for p in critic.parameters() if p.requires_grad], 1e-2)

        def draw(count):
            log_probs, mask = -2.0 * (torch.rand(count, 4, generator=generator) < 0.2), torch.ones(count, 4)
            rewards = torch.zeros(count, 4)
            rewards[:, -1] = (torch.rand(count, generator=generator) < log_probs[:, :-1].sum(1).exp()).float()
            hidden = torch.randn(count, 4, 8, generator=generator)
            if reads:
                hidden = torch.cat([hidden, confidence.features(log_probs, torch.zeros(count, 4), mask)], -1)
            return hidden, rewards, mask, log_probs

        for _ in range(100):
            hidden, rewards, mask, _ = draw(256)
            old = critic.sample_returns(hidden)
            optimizer.zero_grad()
            critic.loss(CriticBatch(hidden, hidden, rewards, mask, 1024.0, old, generator)).loss.backward()
            optimizer.step()
            critic.after_step()
        hidden, _, _, log_probs = draw(2000)
        chance = log_probs[:, :-1].sum(1).exp()
        return 1 - ((critic.value(hidden)[:, -1] - chance).var() / chance.var()).item()

    assert explained(True) > 0.8
    assert explained(False) < 0.2


def test_dfpo_reads_confidence_ppo_does_not_and_critics_that_cannot_say_so():
    assert algorithms.resolve(TrainConfig()).critic_config.confidence
    assert not algorithms.resolve(TrainConfig(algorithm="ppo")).critic_config.confidence
    with pytest.raises(UserError, match="train.critic.confidence"):
        algorithms.resolve(TrainConfig(algorithm="dvpo", critic={"confidence": True}))
