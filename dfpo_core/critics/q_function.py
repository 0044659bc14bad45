"""The critic of Q#: the distribution of the reward-to-go of every next token, if the reference policy goes on from there.

Under a deterministic environment the policy that is best for the reward minus eta times the KL to the reference is
    pi(a | s) proportional to pi_ref(a | s) exp(Q(s, a) / eta),   Q(s, a) = eta ln E exp(Z(s, a) / eta),
Z the reward-to-go under pi_ref itself (Q#, arXiv 2502.20548): supervised learning, nothing is bootstrapped.

The critic's backbone is a second language model, pi_guide, that starts as the reference, and the distribution of Z is tilted by how much
more it thinks of a token than the reference does, its preference:
    p(z | s, a) proportional to p(z | s) (pi_guide(a | s) / pi_ref(a | s))^z,   z scaled to 0 to 1.
By Bayes' rule nothing is lost for rewards of 0 and 1: p(z | s, a) is p(z | s) pi(a | s, z) / pi_ref(a | s). And what a language model
knows of tokens is there from the start, where a new head of a row a token would have to learn it from one reward a response.
"""

from __future__ import annotations

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn import functional as F

from dfpo_core.config import Section
from dfpo_core.critics import registry
from dfpo_core.types import CriticBatch, LossOutput, masked_mean


class QFunctionConfig(Section):
    """Options of the critic that guides."""

    eta: float = Field(0.1, gt=0, description="weight of the KL to the reference policy: the smaller, the further the guided policy goes")
    atoms: int = Field(
        2, ge=2, description="values of the reward-to-go, evenly spaced over return_range; 2 are exact for rewards of 0 and 1"
    )
    return_range: tuple[float, float] = Field((0.0, 1.0), description="returns expected")
    temperature: float = Field(1.0, gt=0, description="of the preference's log-probabilities; the trainer sets it to the one it samples at")

    @model_validator(mode="after")
    def _range_increases(self):
        if self.return_range[0] >= self.return_range[1]:
            raise ValueError("return_range must be increasing")
        return self


@registry.register("q_function")
class QFunction(nn.Module):
    """A categorical distribution over `atoms` values for every (state, token). It guides a policy and drives no advantage."""

    config_class = QFunctionConfig

    def __init__(self, hidden_size: int, config: QFunctionConfig):
        super().__init__()
        self.config = config
        self.out = nn.Linear(hidden_size, config.atoms)  # p(z | s), uniform at the start
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)
        self.register_buffer("values", torch.linspace(*config.return_range, config.atoms), persistent=False)
        self.register_buffer("tilt", torch.linspace(0, 1, config.atoms), persistent=False)

    def log_probabilities(self, hidden: Tensor, preference: Tensor) -> Tensor:
        """hidden (.., H), ln pi_guide - ln pi_ref of A tokens (.., A) -> log-probability of each value of Z (.., A, atoms), fp32."""
        with torch.autocast(hidden.device.type, enabled=False):
            state = self.out(F.rms_norm(hidden.float(), hidden.shape[-1:]))
            return (state[..., None, :] + preference.float()[..., None] * self.tilt).log_softmax(-1)

    def guidance(self, hidden: Tensor, preference: Tensor) -> Tensor:
        """Q(s, a) / eta = ln E exp(Z / eta) of each token: (.., H), (.., A) -> (.., A)."""
        return (self.log_probabilities(hidden, preference) + self.values / self.config.eta).logsumexp(-1)

    def loss(self, batch: CriticBatch) -> LossOutput:
        """Cross-entropy of the reward-to-go of each sampled token; / token_count.

        A value between two atoms counts for both, in the proportion that keeps its mean.
        """
        to_go = batch.token_rewards.flip(1).cumsum(1).flip(1)
        low, high = self.config.return_range
        place = (to_go.clamp(low, high) - low) / (high - low) * (self.config.atoms - 1)
        below = place.floor().long().clamp(max=self.config.atoms - 2)
        share = place - below
        log_probabilities = self.log_probabilities(batch.hidden, batch.preference[..., None]).squeeze(-2)
        both = log_probabilities.gather(-1, torch.stack([below, below + 1], -1))
        error = -((1 - share) * both[..., 0] + share * both[..., 1])
        loss = masked_mean(error, batch.mask, batch.token_count)
        outside = masked_mean(((to_go < low) | (to_go > high)).float(), batch.mask, batch.token_count)
        return LossOutput(loss, {"critic/loss": loss.item(), "critic/outside_range": outside.item()})

    def after_step(self) -> None:
        """Nothing to do: no target is bootstrapped."""
