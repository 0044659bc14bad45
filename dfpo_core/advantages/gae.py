"""Distributional GAE (DFPO, arXiv 2602.05890): one advantage per noise level, weighed by a risk spectrum.

delta_t^k = r_t + gamma (1 - done_t) Z_k(s_{t+1}) - Z_k(s_t),   A_t^k = delta_t^k + gamma lambda A_{t+1}^k,   A_t = sum_k omega_k A_t^k
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from dfpo_core.advantages import registry
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
    flip_rate_decay: float = Field(0.9, ge=0, lt=1, description="memory of the flip-rate estimate of adaptive, a batch")
    whiten: bool = Field(True, description="whiten over the valid tokens of the batch")


@registry.register("gae")
class GAE:
    """Distributional GAE. Keeps one state, the running flip-rate estimate of the adaptive spectrum."""

    config_class = GAEConfig

    def __init__(self, config: GAEConfig):
        self.config = config
        self.flip_rate = FlipRate(config.flip_rate_decay)

    def __call__(self, inputs: AdvantageInputs) -> AdvantageOutput:
        config, metrics = self.config, {}
        returns = inputs.returns
        if config.mean_source == "values":
            returns = returns + (inputs.values - returns.mean(-1))[..., None]
        if config.spectrum == "adaptive":
            metrics["critic/flip_rate"] = self.flip_rate.update(inputs.rewards, inputs.values, inputs.mask)
        weights = self._weights(returns)
        advantages = (gae(inputs.token_rewards, returns, inputs.mask, config.discount, config.lam) * weights).sum(-1)
        return AdvantageOutput(whiten(advantages, inputs.mask) if config.whiten else advantages, metrics)

    def _weights(self, returns: Tensor) -> Tensor:
        count = returns.shape[-1]
        uniform = torch.full((count,), 1 / count)
        if self.config.spectrum == "cvar":
            uniform = tail_weights(count, self.config.alpha)
        elif self.config.spectrum == "mix":
            uniform = (1 - self.config.mix) * uniform + self.config.mix * tail_weights(count, self.config.alpha)
        elif self.config.spectrum == "adaptive":
            uniform = trimmed_weights(count, self.flip_rate.value)
        return uniform.to(returns)

    def state_dict(self) -> dict[str, float]:
        """What a resumed run needs."""
        return {"weighted": self.flip_rate.weighted, "weight": self.flip_rate.weight}

    def load_state_dict(self, state: dict[str, float]) -> None:
        self.flip_rate.weighted, self.flip_rate.weight = state["weighted"], state["weight"]


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


class FlipRate:
    """Running estimate of the rate at which 0/1 rewards are flipped, from the critic's residuals on last tokens.

    The rate and the task's own randomness are not identifiable from rewards alone: a flip rate rho with success probability p looks
    like success probability rho + (1 - 2 rho) p. Assumption (that of the "anchor points" of Liu and Tao 2016): before the last token
    the answer is written, so true success is certain, and the critic is right about which side of 1/2 it is on. Then the residual
    |R - 1[V > 1/2]| is 1 exactly when the reward was flipped, and its mean is rho. Where the critic cannot tell, the estimate is too
    high (an upper bound: 1/2 for a critic that knows nothing), never too low. Values must come from before the critic saw these
    rewards, as rollout-time values do, or a critic that has memorised the noise reports none.
    """

    def __init__(self, decay: float):
        self.decay, self.weighted, self.weight = decay, 0.0, 0.0

    @property
    def value(self) -> float:
        """The estimate in [0, 0.45]; 0 before the first batch."""
        return min(self.weighted / self.weight, 0.45) if self.weight else 0.0

    def update(self, rewards: Tensor, values: Tensor, mask: Tensor) -> float:
        """Add a batch: rewards (B,), values (B, T), mask (B, T). Returns the new estimate."""
        last = (mask * torch.arange(1, mask.shape[1] + 1, device=mask.device)).argmax(1, keepdim=True)
        predicted = (values.gather(1, last).squeeze(1) > 0.5).to(rewards)
        self.weighted = self.decay * self.weighted + (rewards - predicted).abs().mean().item()
        self.weight = self.decay * self.weight + 1
        return self.value
