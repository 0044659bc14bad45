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


class RewardNoise:
    """How noisy the reward of one response is, and the reward without what is noise alone.

    Anchors (Liu and Tao 2016): the share `anchors` of a batch that the critic thinks worst, before the last token, is all wrong, or
    the share that it thinks best is all right; then what their rewards differ by is noise. The smaller of both variances is the
    floor, and for 0/1 rewards the share of either end that got the other reward, if it is the smaller, is the rate of flips. The critic
    need only rank responses, by values from before it saw these rewards, as rollout-time values are. Where it cannot, the estimates
    are too high (all of the variance), never too low but for chance.

    The reward that remains is the linear posterior mean of what the response is worth, given its reward R and the value V before its
    last token, which is the prior:    V + g (R - V),    g = 1 - floor / sigma^2,    sigma^2 = (high - V) (V - low).
    sigma^2 is the variance of a reward that is `low` or `high`, the extremes seen so far, and the most that any reward between them can
    have (Bhatia and Davis 2000). A reward of 1 for a response that is surely wrong is taken for noise, one for a response that could
    as well be right for news. Where rewards are clean and an end of the ranking is certain, the floor is 0 and g is 1.
    """

    def __init__(self, memory: float, anchors: float):
        self.anchors = anchors
        self.moments = {end: (RunningMean(memory), RunningMean(memory)) for end in ("low", "high")}
        self.range = (torch.inf, -torch.inf)  # smallest and largest reward so far

    def update(self, rewards: Tensor, values: Tensor) -> None:
        """Add a batch: rewards (B,), values before the last token (B,)."""
        count, order = max(1, round(self.anchors * len(rewards))), values.argsort()
        for end, chosen in (("low", order[:count]), ("high", order[-count:])):
            for power, mean in enumerate(self.moments[end], 1):
                mean.add(rewards[chosen].pow(power).mean().item())
        self.range = min(self.range[0], rewards.min().item()), max(self.range[1], rewards.max().item())

    @property
    def floor(self) -> float:
        """Variance of the reward of a response whose worth is certain; 0 before the first batch."""
        return max(0.0, min(square.value - mean.value**2 for mean, square in self.moments.values()))

    @property
    def flip_rate(self) -> float:
        """Rate of flips of 0/1 rewards, in [0, 1/2]; 0 before the first batch."""
        return min(min(mean.value, 1 - mean.value) for mean, _ in self.moments.values())

    def denoised(self, rewards: Tensor, values: Tensor, share: float) -> tuple[Tensor, Tensor]:
        """Rewards (B,) and values before the last token (B,) -> (what remains of the rewards, g), (B,) each; g is 1 - share at least."""
        low, high = self.range
        variance = ((high - values) * (values - low)).clamp(min=1e-12)
        gain = 1 - share * (self.floor / variance).clamp(max=1.0)
        return values + gain * (rewards - values), gain

    def running(self) -> dict[str, RunningMean]:
        """Every running mean by name."""
        return {f"{end}_{power}": mean for end, pair in self.moments.items() for power, mean in enumerate(pair, 1)}


def before_last(values: Tensor, mask: Tensor) -> Tensor:
    """The value of each row's last valid token, at which the response is written but for its end: (B, T) -> (B,)."""
    return (values * last_token(mask)).sum(1)


def without_effect(token_rewards: Tensor, effect: Tensor, mask: Tensor) -> Tensor:
    """Token rewards (B, T) with the prompt's effect (B,) taken from the last token's, where the sequence reward is."""
    return token_rewards - effect[:, None] * last_token(mask)
