"""Distributional GAE (DFPO, arXiv 2602.05890): one advantage per noise level, weighed by a risk spectrum.

delta_t^k = r_t + gamma (1 - done_t) Z_k(s_{t+1}) - Z_k(s_t),   A_t^k = delta_t^k + gamma lambda A_{t+1}^k,   A_t = sum_k omega_k A_t^k
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from dfpo_core.advantages import registry
from dfpo_core.advantages.adaptive import PromptEffect, RewardNoise, RunningMean, before_last, without_effect
from dfpo_core.advantages.whiten import whiten
from dfpo_core.config import Section
from dfpo_core.critics.flow_losses import tail_weights
from dfpo_core.types import AdvantageInputs, AdvantageOutput


class GAEConfig(Section):
    """Options of generalised advantage estimation."""

    discount: float = Field(1.0, gt=0, le=1, description="gamma")
    lam: float = Field(0.95, ge=0, le=1, description="lambda")
    spectrum: Literal["uniform", "cvar", "mix", "adaptive"] = Field("uniform", description="weights of the noise levels")
    alpha: float = Field(0.25, gt=0, le=1, description="lower tail that cvar and mix look at")
    mix: float = Field(0.5, ge=0, le=1, description="share of CVaR in mix")
    mean_source: Literal["values", "samples"] = Field("values", description="mean of the samples: the critic's value, or their own")
    prompt_effect: bool = Field(False, description="take from the reward what the other responses to the prompt predict of it")
    denoise: float = Field(
        0.0, ge=0, lt=1, description="how far to draw rewards that are noise alone to the critic's value of the response"
    )
    anchors: float = Field(
        0.2, gt=0, le=0.5, description="share of a batch, at either end of the critic's ranking, that tells how noisy single rewards are"
    )
    memory: float = Field(0.9, ge=0, lt=1, description="weight of earlier batches in every running estimate of the noise")
    whiten: bool = Field(True, description="whiten over the valid tokens of the batch")


@registry.register("gae")
class GAE:
    """Distributional GAE. Its state is the running estimates of the noise: of single rewards, and what a prompt's responses share."""

    config_class = GAEConfig

    def __init__(self, config: GAEConfig):
        self.config = config
        self.noise = RewardNoise(config.memory, config.anchors)
        self.prompt_effect = PromptEffect(config.memory)

    def __call__(self, inputs: AdvantageInputs) -> AdvantageOutput:
        config, metrics = self.config, {}
        returns, token_rewards = inputs.returns, inputs.token_rewards
        if config.denoise or config.spectrum == "adaptive":
            worth = before_last(inputs.values, inputs.mask)
            self.noise.update(inputs.rewards, worth)
            metrics |= {"critic/flip_rate": self.noise.flip_rate, "critic/noise_floor": self.noise.floor}
        if config.denoise:
            remaining, gain = self.noise.denoised(inputs.rewards, worth, config.denoise)
            token_rewards = without_effect(token_rewards, inputs.rewards - remaining, inputs.mask)
            metrics["critic/reward_gain"] = gain.mean().item()
        if config.prompt_effect:
            first = (inputs.mask > 0).int().argmax(1, keepdim=True)
            effect = self.prompt_effect.predict(inputs.rewards, inputs.values.gather(1, first)[:, 0], inputs.samples_per_prompt)
            token_rewards = without_effect(token_rewards, effect, inputs.mask)
            metrics["critic/prompt_correlation"] = self.prompt_effect.correlation
        if config.mean_source == "values":
            returns = returns + (inputs.values - returns.mean(-1))[..., None]
        weights = self._weights(returns)
        advantages = (gae(token_rewards, returns, inputs.mask, config.discount, config.lam) * weights).sum(-1)
        return AdvantageOutput(whiten(advantages, inputs.mask) if config.whiten else advantages, metrics)

    def _weights(self, returns: Tensor) -> Tensor:
        count = returns.shape[-1]
        uniform = torch.full((count,), 1 / count)
        if self.config.spectrum == "cvar":
            uniform = tail_weights(count, self.config.alpha)
        elif self.config.spectrum == "mix":
            uniform = (1 - self.config.mix) * uniform + self.config.mix * tail_weights(count, self.config.alpha)
        elif self.config.spectrum == "adaptive":
            uniform = trimmed_weights(count, min(self.noise.flip_rate, 0.45))
        return uniform.to(returns)

    def state_dict(self) -> dict[str, tuple[float, float]]:
        """What a resumed run needs."""
        return {name: (mean.weighted, mean.weight) for name, mean in self._running().items()} | {"range": self.noise.range}

    def load_state_dict(self, state: dict[str, tuple[float, float]]) -> None:
        for name, mean in self._running().items():
            mean.weighted, mean.weight = state[name]
        self.noise.range = state["range"]

    def _running(self) -> dict[str, RunningMean]:
        return {"shared": self.prompt_effect.shared, "total": self.prompt_effect.total, **self.noise.running()}


def gae(token_rewards: Tensor, returns: Tensor, mask: Tensor, discount: float, lam: float) -> Tensor:
    """A_t^k of each return sample: token_rewards (B, T), returns (B, T, K), mask (B, T) -> (B, T, K), 0 where masked.

    Masked tokens are skipped wherever they stand; the last valid token is done.
    """
    advantages = torch.zeros_like(returns)
    following_return = following_advantage = torch.zeros_like(returns[:, 0])
    for t in range(mask.shape[1] - 1, -1, -1):
        valid = mask[:, t, None] > 0
        delta = token_rewards[:, t, None] + discount * following_return - returns[:, t]
        advantage = delta + discount * lam * following_advantage
        advantages[:, t] = torch.where(valid, advantage, advantages[:, t])
        following_return = torch.where(valid, returns[:, t], following_return)
        following_advantage = torch.where(valid, advantage, following_advantage)
    return advantages


def trimmed_weights(count: int, trim: float) -> Tensor:
    """Weights (K,) of the mean without the lowest and highest `trim` share of sorted samples; trim < 1/2.

    A 0/1 reward of success probability p that is flipped at rate rho has mean rho + (1 - 2 rho) p; its mean trimmed by rho is p again.
    """
    edges = torch.arange(count + 1) / count
    return edges.clamp(trim, 1 - trim).diff() / (1 - 2 * trim)
