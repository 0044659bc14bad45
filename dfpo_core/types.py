"""The typed values that a training step passes around. B sequences, T response tokens, K noise levels, H hidden size."""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace

import torch
from torch import Tensor

from dfpo_core import distributed


@dataclass(frozen=True)
class Rollout:
    """One batch of sampled responses. Prompts are left-padded, responses right-padded.

    The response to a row that is a conversation holds the policy's turns and, between them, what was said to it: tokens that the
    models read (`attention_mask`) and that nothing is learned from (`mask` is 0). Returns flow over them to the next turn.

    Rows that share a prompt are adjacent: row i belongs to prompt i // samples_per_prompt, so prompt tensors have
    B / samples_per_prompt rows.
    """

    prompt_ids: Tensor  # (P, L) int64
    prompt_mask: Tensor  # (P, L) int64, 1 on real tokens
    response_ids: Tensor  # (B, T) int64, EOS included
    mask: Tensor  # (B, T) float, 1 on tokens of the policy, each EOS included
    attention_mask: Tensor  # (B, T) float, 1 on every token that is no padding
    log_probs: Tensor  # (B, T) under the policy that sampled, as the training computes them
    sampler_log_probs: Tensor  # (B, T) as the rollout engine computed them
    reference_log_probs: Tensor  # (B, T) under the frozen reference policy
    entropy: Tensor  # (B, T) of the sampling distribution
    rewards: Tensor  # (B,) what training sees (noisy)
    clean_rewards: Tensor  # (B,) against the true answer, for logging only
    row_ids: tuple[str, ...]  # (B,) data rows
    samples_per_prompt: int
    critic_mask: Tensor  # (B, T) float, 1 on tokens that the critic learns from: `mask`, or what a guided policy's reference sampled

    @property
    def token_count(self) -> float:
        """Number of valid response tokens in the batch."""
        return float(self.mask.sum())

    @property
    def sequences(self) -> tuple[Tensor, Tensor, Tensor, Tensor, int]:
        """What a model reads: prompts, responses, their masks, and how many responses share a prompt."""
        return self.prompt_ids, self.prompt_mask, self.response_ids, self.attention_mask, self.samples_per_prompt

    def select(self, prompts: Tensor) -> Rollout:
        """The sub-batch of the given prompt indices, with all their responses."""
        n = self.samples_per_prompt
        rows = (prompts[:, None] * n + torch.arange(n, device=prompts.device)).flatten()
        picked = {f.name: getattr(self, f.name)[rows] for f in fields(self) if f.name not in _NOT_PER_RESPONSE}
        return replace(
            self,
            prompt_ids=self.prompt_ids[prompts],
            prompt_mask=self.prompt_mask[prompts],
            row_ids=tuple(self.row_ids[i] for i in rows.tolist()),
            **picked,
        )

    def everywhere(self) -> Rollout:
        """The rollouts of all processes, one after the other; this very one where there is one process only."""
        if distributed.world() == 1:
            return self
        tensors = {f.name: getattr(self, f.name) for f in fields(self) if isinstance(getattr(self, f.name), Tensor)}
        gathered = {name: distributed.gather_rows(tensor, left=name.startswith("prompt_")) for name, tensor in tensors.items()}
        return replace(self, row_ids=tuple(distributed.gather_list(list(self.row_ids))), **gathered)


_NOT_PER_RESPONSE = {"prompt_ids", "prompt_mask", "row_ids", "samples_per_prompt"}


@dataclass(frozen=True)
class LossOutput:
    """A scalar loss with gradient, and detached numbers to log."""

    loss: Tensor
    metrics: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class CriticBatch:
    """What a critic's loss sees. `target_hidden` comes from the rollout pass: the target costs no second backbone pass."""

    hidden: Tensor  # (B, T, H) with gradient: position that predicts token t
    target_hidden: Tensor  # (B, T, H) without gradient, same positions, from the rollout-time backbone
    token_rewards: Tensor  # (B, T) r_t
    mask: Tensor  # (B, T)
    token_count: float  # valid tokens in the global minibatch that this is a part of
    old_returns: Tensor  # (B, T, K) the critic's samples at rollout time (for value clipping)
    generator: torch.Generator | None = None  # a CPU generator that draws the flow times
    preference: Tensor | None = None  # (B, T) with gradient, of the sampled tokens: ln pi_guide - ln pi_ref, for the critic of Q#


@dataclass(frozen=True)
class AdvantageInputs:
    """What an advantage estimator sees."""

    token_rewards: Tensor  # (B, T) r_t, KL penalty included
    rewards: Tensor  # (B,) sequence rewards without the KL penalty
    mask: Tensor  # (B, T)
    samples_per_prompt: int  # rows i*n .. i*n+n-1 share a prompt
    returns: Tensor | None = None  # (B, T, K) the critic's sorted return samples; None without a critic
    values: Tensor | None = None  # (B, T) the critic's estimate of the mean return; None without a critic


@dataclass(frozen=True)
class AdvantageOutput:
    """Advantages, whitened over valid tokens where the estimator says so, zero on masked positions."""

    advantages: Tensor  # (B, T)
    metrics: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class PolicyLossInputs:
    """What a policy loss sees; all tensors are (B, T) unless said otherwise."""

    log_probs: Tensor  # with gradient
    entropy: Tensor  # with gradient
    old_log_probs: Tensor
    reference_log_probs: Tensor
    advantages: Tensor
    mask: Tensor
    rewards: Tensor  # (B,)
    token_count: float  # valid tokens in the global minibatch
    sequence_count: int  # sequences in the global minibatch
    samples_per_prompt: int
    max_new_tokens: int = 0  # the generation budget, the same for every batch of a run
    prompt_hidden: Tensor | None = None  # (B, H) the policy's state after the prompt's last token, with gradient


def last_token(mask: Tensor) -> Tensor:
    """1.0 on the last valid token of each row: (B, T) -> (B, T). That token is done, whatever it is."""
    valid = (mask > 0).float()
    return valid * (valid.flip(1).cumsum(1).flip(1) == 1)


def masked_mean(values: Tensor, mask: Tensor, count: float | None = None) -> Tensor:
    """Sum of `values` where `mask` is 1, over `count` (default: the mask's own sum). NaN at masked positions is ignored."""
    total = torch.where(mask > 0, values, torch.zeros_like(values)).sum()
    return total / (mask.sum().clamp(min=1.0) if count is None else count)
