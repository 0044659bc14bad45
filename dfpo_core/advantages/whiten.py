"""Whitening over the valid tokens of a batch."""

from __future__ import annotations

import torch
from torch import Tensor

from dfpo_core.types import masked_mean


def whiten(values: Tensor, mask: Tensor) -> Tensor:
    """(values - mean) / std over the tokens where mask is 1, 0 elsewhere: (B, T). Constant values become 0."""
    mean = masked_mean(values, mask)
    variance = masked_mean((values - mean).square(), mask)
    return torch.where(mask > 0, (values - mean) * torch.rsqrt(variance + 1e-8), torch.zeros_like(values))
