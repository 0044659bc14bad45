"""What noise does to rewards, estimated while training, and what an advantage can do about it.

Noise comes in two kinds that call for opposite remedies. A wrong label spoils all responses to its prompt alike; what the other
responses got then says what this one would have got anyway. A reward flipped for one response says nothing of the others; a group's mean
is then noise itself, and the critic, which averages over the whole run, is the better baseline. `PromptEffect` measures which it is.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dfpo_core.types import last_token


class RunningMean:
    """Exponentially weighted mean over batches, without the bias of its start."""

    def __init__(self, memory: float):
        self.memory, self.weighted, self.weight = memory, 0.0, 0.0

    @property
    def value(self) -> float:
        """The mean; 0 before the first batch."""
        return self.weighted / self.weight if self.weight else 0.0

    def add(self, number: float) -> None:
        self.weighted = self.memory * self.weighted + number
        self.weight = self.memory * self.weight + 1


class PromptEffect:
    """What the n responses to a prompt share beyond the critic: R_ij = V(x_i) + u_i + e_ij, a one-way random-effects model.

    u_i (variance tau^2) is a wrong label or the critic's own error, e_ij (variance s^2) the response's own merit and luck. The best linear
    predictor of u_i from the other m = n - 1 responses (Henderson 1975) is their mean residual times
        m rho / (1 + (m - 1) rho),   rho = tau^2 / (tau^2 + s^2), the intraclass correlation,
    rho estimated from products of residuals of the same prompt. It leaves out the response itself, so that subtracting it from the reward
    changes the variance of the policy gradient and not its mean. rho = 0 leaves the critic alone as the baseline; with a critic that
    explains nothing, rho = 1 makes it the leave-one-out mean of the group (Kool et al. 2019).
    """

    def __init__(self, memory: float):
        self.shared, self.total = RunningMean(memory), RunningMean(memory)

    @property
    def correlation(self) -> float:
        """rho in [0, 1]; 0 before the first batch."""
        return min(max(self.shared.value / self.total.value, 0.0), 1.0) if self.total.value > 0 else 0.0

    def predict(self, rewards: Tensor, values: Tensor, samples_per_prompt: int) -> Tensor:
        """Add a batch and predict u for each response from the others: rewards (B,), values of the prompts (B,) -> (B,)."""
        residual = (rewards - values).reshape(-1, samples_per_prompt)
        others, of_all = samples_per_prompt - 1, residual.sum(1, keepdim=True)
        pairs = (of_all.square() - residual.square().sum(1, keepdim=True)) / (samples_per_prompt * others)
        self.shared.add(pairs.mean().item())
        self.total.add(residual.square().mean().item())
        shrink = others * self.correlation / (1 + (others - 1) * self.correlation)
        return (shrink * (of_all - residual) / others).reshape(-1)


class NoiseFloor:
    """The variance that every return has, however good or bad the response: the low quantile of Var Z(s) over tokens, over batches.

    With rewards flipped at rate rho, a prompt that is always or never solved has returns of variance rho (1 - rho), and its advantages
    are noise; any other has more. sigma^2 - floor is then the part of a state's variance that a policy can still do something about, and
    `weight` = 1 - share min(1, floor / sigma^2) turns down what is noise alone. Without such prompts the floor is too high and the
    weights too equal; whitening takes out what they have in common. Where rewards are clean the floor is 0 and every weight 1.
    """

    def __init__(self, memory: float, quantile: float):
        self.quantile, self.floor = quantile, RunningMean(memory)

    def weight(self, returns: Tensor, mask: Tensor, share: float) -> Tensor:
        """Add a batch, and the weights of its tokens: returns (B, T, K), mask (B, T) -> (B, T) in [1 - share, 1]."""
        variance = returns.var(-1, correction=0)
        self.floor.add(torch.quantile(variance[mask > 0], self.quantile).item())
        return 1 - share * (self.floor.value / variance.clamp(min=1e-12)).clamp(max=1.0)


def without_effect(token_rewards: Tensor, effect: Tensor, mask: Tensor) -> Tensor:
    """Token rewards (B, T) with the prompt's effect (B,) taken from the last token's, where the sequence reward is."""
    return token_rewards - effect[:, None] * last_token(mask)
