"""What the policy thought of its own response so far, beside the hidden states, as an input of a critic.

A critic's backbone starts as a copy of the policy, but its hidden state where token t is predicted says what may come next, not how likely
the tokens before were under the policy that chose them. A response of improbable tokens is a wrong one far more often, and a critic
would need its whole capacity to find out, if at all, what the rollout already knows. log pi(y_u), u < t, and the entropy at t depend on the
state alone, so that a value that reads them is still a value of the state and a baseline without bias.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

FEATURES = 6
LOWEST, DEEPEST = -10.0, -20.0  # where log-probabilities of a token and of a prefix are cut


def features(log_probs: Tensor, entropy: Tensor, mask: Tensor) -> Tensor:
    """Of a response's tokens before t and the policy's entropy at t, each about of size 1: (B, T) each -> (B, T, FEATURES).

    The probability of the tokens so far, its logarithm, the mean, the last and the lowest log-probability, the entropy in nats. All but
    the entropy are of tokens that are sampled already; masked tokens (what others said in a conversation) count as certain.
    """
    sampled = torch.where(mask > 0, log_probs.clamp(min=LOWEST), torch.zeros_like(log_probs))
    so_far, count = before(sampled.cumsum(1)), before(mask.cumsum(1))
    columns = (
        so_far.exp(),
        so_far.clamp(min=DEEPEST) / 5,
        so_far / count.clamp(min=1),
        before(sampled) / 2,
        before(sampled.cummin(1).values) / 2,
        entropy,
    )
    return torch.where(mask[..., None] > 0, torch.stack(columns, -1), torch.zeros((), device=mask.device)).detach()


def before(running: Tensor) -> Tensor:
    """The value of the token before, 0 at the first: (B, T) -> (B, T)."""
    return F.pad(running, (1, 0))[:, :-1]


def normalised(read: Tensor, extra: int) -> Tensor:
    """(.., H + extra), fp32 at least: RMS-normalised hidden states, whatever their backbone's scale, and the `extra` features behind them.

    Features are scaled by sqrt(H / extra): as much of what a head's first layer sees at its start, and learned as fast, as the H others.
    """
    read = read.to(torch.promote_types(read.dtype, torch.float32))
    size = read.shape[-1] - extra
    hidden = F.rms_norm(read[..., :size], (size,))
    return torch.cat([hidden, read[..., size:] * math.sqrt(size / extra)], -1) if extra else hidden
