"""Group-relative advantages: a response is compared with the other responses to its prompt (GRPO, arXiv 2402.03300)."""

from __future__ import annotations

from typing import Literal

from pydantic import Field
from torch import Tensor

from dfpo_core.advantages import registry
from dfpo_core.config import Section
from dfpo_core.types import AdvantageInputs, AdvantageOutput


class GroupConfig(Section):
    """Options of group-relative advantages."""

    baseline: Literal["group", "critic"] = Field("group", description="what a reward is compared with: the group's mean or V(prompt)")
    divide_by_std: bool = Field(True, description="divide by the group's standard deviation; false as in Dr. GRPO (arXiv 2503.20783)")


@registry.register("group")
class GroupAdvantage:
    """A_t = (R - mean of the group) / std of the group, the same on every token. Token-level rewards (KL) do not enter.

    With `baseline` critic, the mean is the critic's value of the prompt, V at the first response token, from before it saw this batch.
    """

    config_class = GroupConfig

    def __init__(self, config: GroupConfig):
        self.config = config

    def __call__(self, inputs: AdvantageInputs) -> AdvantageOutput:
        centred = group_centred(inputs.rewards, inputs.samples_per_prompt)
        spread = centred.square().mean(1, keepdim=True).sqrt()
        same = (spread < 1e-6).float().mean().item()
        if self.config.baseline == "critic":
            first = (inputs.mask > 0).int().argmax(1, keepdim=True)
            centred = (inputs.rewards - inputs.values.gather(1, first)[:, 0]).reshape(centred.shape)
        if self.config.divide_by_std:
            centred = centred / (spread + 1e-6)
        return AdvantageOutput(centred.reshape(-1, 1) * inputs.mask, {"reward/groups_without_signal": same})


def group_centred(rewards: Tensor, samples_per_prompt: int) -> Tensor:
    """Rewards (B,) minus the mean of their group: (B / n, n)."""
    groups = rewards.reshape(-1, samples_per_prompt)
    return groups - groups.mean(1, keepdim=True)
