"""Every critic with every policy loss and advantage that makes sense trains for three steps; the others are refused with a reason."""

from __future__ import annotations

import math
from itertools import product

import pytest
import torch

from dfpo_core import algorithms, critics, train
from dfpo_core.advantages.group import GroupAdvantage, GroupConfig
from dfpo_core.advantages.reinforce_pp import ReinforcePP, ReinforcePPConfig
from dfpo_core.config import TrainConfig
from dfpo_core.errors import UserError
from dfpo_core.types import AdvantageInputs
from tests.training import rows_of_sums, tiny_config, warm_checkpoint

ADVANTAGES = {
    "gae": {"name": "gae"},
    "reinforce_pp": {"name": "reinforce_pp", "critic_baseline": True},
    "group": {"name": "group", "baseline": "critic"},
}


@pytest.fixture(scope="module")
def warm(tmp_path_factory) -> str:
    return warm_checkpoint(tmp_path_factory.mktemp("warm"), steps=20)


@pytest.mark.parametrize(("critic", "advantage"), list(product(sorted(critics.ESTIMATORS), sorted(ADVANTAGES))))
def test_every_critic_drives_every_advantage_with_the_clipped_loss_for_three_steps(tmp_path, warm, critic, advantage):
    torch.set_num_threads(1)
    options = {"critic": {"name": critic}, "advantage": ADVANTAGES[advantage], "steps": 3, "critic_warmup_steps": 1}
    trainer = train.Trainer(tiny_config(tmp_path, options), warm, rows_of_sums())
    policy = [p.clone() for p in trainer.policy.parameters]
    head = [p.clone() for p in trainer.critic.head.parameters() if p.requires_grad]
    for _ in range(3):
        metrics = trainer.step()
        assert all(math.isfinite(value) for value in metrics.values())
    assert any(not torch.equal(a, b) for a, b in zip(policy, trainer.policy.parameters, strict=True))
    after = (p for p in trainer.critic.head.parameters() if p.requires_grad)
    assert any(not torch.equal(a, b) for a, b in zip(head, after, strict=True))


@pytest.mark.parametrize("critic", sorted(critics.ESTIMATORS))
def test_flowrl_takes_no_critic(critic):
    options = {"critic": {"name": critic}, "advantage": ADVANTAGES["group"]}
    with pytest.raises(UserError, match="log Z is its baseline"):
        algorithms.resolve(TrainConfig(algorithm="flowrl", **options))


@pytest.mark.parametrize("advantage", ["reinforce_pp", "group"])
def test_a_critic_baseline_without_a_critic_is_refused(advantage):
    with pytest.raises(UserError, match="a critic baseline needs a critic"):
        algorithms.resolve(TrainConfig(algorithm="grpo", advantage=ADVANTAGES[advantage]))


def test_two_baselines_at_once_are_refused():
    with pytest.raises(UserError, match="exclude each other"):
        algorithms.resolve(TrainConfig(advantage={**ADVANTAGES["reinforce_pp"], "group_baseline": True}))


def inputs() -> AdvantageInputs:
    """Two prompts of two responses, two tokens each; the second response of the first prompt has one token."""
    mask = torch.tensor([[1.0, 1], [1, 0], [1, 1], [1, 1]])
    rewards = torch.tensor([1.0, 0, 1, 1])
    token_rewards = torch.tensor([[0.0, 1], [0, 0], [0, 1], [0, 1]])
    values = torch.tensor([[0.25, 0.5], [0.25, 9], [0.75, 0.5], [0.75, 1]])
    return AdvantageInputs(token_rewards, rewards, mask, 2, values[..., None], values)


def test_the_group_advantage_with_a_critic_baseline_is_the_reward_minus_the_value_of_the_prompt():
    out = GroupAdvantage(GroupConfig(baseline="critic", divide_by_std=False))(inputs()).advantages
    assert out.tolist() == [[0.75, 0.75], [-0.25, 0], [0.25, 0.25], [0.25, 0.25]]


def test_reinforce_pp_with_a_critic_baseline_whitens_the_reward_to_go_minus_the_value():
    out = ReinforcePP(ReinforcePPConfig(critic_baseline=True))(inputs()).advantages
    raw = [0.75, 0.5, -0.25, 0.25, 0.5, 0.25, 0.0]  # valid tokens, row by row
    mean = sum(raw) / 7
    spread = math.sqrt(sum((x - mean) ** 2 for x in raw) / 7)
    got = out[inputs().mask > 0].tolist()
    assert got == pytest.approx([(x - mean) / spread for x in raw], abs=1e-4)
