"""The entropy-parameterised prior in eager PyTorch."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def entropy_prior(
    mean: Tensor,
    entropy: Tensor,
    noise: Tensor,
    sigma_max: float = 0.5,
    tau: float = 2.0,
    entropy_max: float = 1.0,
) -> Tensor:
    """Eq. 7 with the standard deviation of Eq. 6, in as few passes as eager PyTorch allows."""
    factor = sigma_max / math.expm1(entropy_max / tau)
    sigma = (torch.expm1(entropy.clamp(0.0, entropy_max) / tau) * factor).clamp(0.0, sigma_max)
    return torch.addcmul(mean, sigma[..., None], noise)
