"""REINFORCE++ (arXiv 2501.03262): the discounted reward to go, whitened over all tokens of the batch, optionally minus a baseline."""

from __future__ import annotations

import torch
from pydantic import Field, model_validator

from dfpo_core.advantages import registry
from dfpo_core.advantages.gae import gae
from dfpo_core.advantages.group import group_centred
from dfpo_core.advantages.whiten import whiten
from dfpo_core.config import Section
from dfpo_core.types import AdvantageInputs, AdvantageOutput


class ReinforcePPConfig(Section):
    """Options of REINFORCE++."""

    discount: float = Field(1.0, gt=0, le=1, description="gamma of the reward to go")
    group_baseline: bool = Field(False, description="subtract the mean reward of the prompt's group first (REINFORCE++-baseline)")
    critic_baseline: bool = Field(False, description="subtract the critic's value of each token first")

    @model_validator(mode="after")
    def _one_baseline(self):
        if self.group_baseline and self.critic_baseline:
            raise ValueError("group_baseline and critic_baseline exclude each other")
        return self


@registry.register("reinforce_pp")
class ReinforcePP:
    """A_t = whiten(sum over u >= t of gamma^(u-t) r_u), KL penalties in the reward included."""

    config_class = ReinforcePPConfig

    def __init__(self, config: ReinforcePPConfig):
        self.config = config

    def __call__(self, inputs: AdvantageInputs) -> AdvantageOutput:
        nothing = torch.zeros_like(inputs.token_rewards)[..., None]
        to_go = gae(inputs.token_rewards, nothing, inputs.mask, self.config.discount, 1.0)[..., 0]
        if self.config.group_baseline:
            centred = group_centred(inputs.rewards, inputs.samples_per_prompt).reshape(-1)
            to_go = to_go - (inputs.rewards - centred)[:, None]
        if self.config.critic_baseline:
            to_go = to_go - inputs.values
        return AdvantageOutput(whiten(to_go, inputs.mask))
