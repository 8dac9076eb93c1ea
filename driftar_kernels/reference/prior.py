"""The entropy-parameterised prior (Eqs. 6 and 7 of arXiv 2603.28049) in plain PyTorch."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def exponential_range(tau: float, entropy_max: float) -> float:
    """``exp(entropy_max / tau) - 1``, kept away from 0 as the published code does."""
    value = math.expm1(entropy_max / tau)
    return value if abs(value) >= 1e-8 else 1e-8


def entropy_to_sigma(entropy: Tensor, sigma_max: float, tau: float, entropy_max: float) -> Tensor:
    """``sigma_max (exp(E / tau) - 1) / (exp(entropy_max / tau) - 1)``, E and the result clamped to
    their ranges.
    """
    wide = entropy.to(torch.promote_types(entropy.dtype, torch.float32))
    growth = torch.expm1(wide.clamp(0.0, entropy_max) / tau)
    return (sigma_max * growth / exponential_range(tau, entropy_max)).clamp(0.0, sigma_max)


def entropy_prior(
    mean: Tensor, entropy: Tensor, noise: Tensor, sigma_max: float, tau: float, entropy_max: float
) -> Tensor:
    """``mean + sigma(E) noise``: mean and noise ``[..., C]``, entropy ``[...]``."""
    sigma = entropy_to_sigma(entropy, sigma_max, tau, entropy_max)
    return (mean + sigma[..., None] * noise).to(mean.dtype)
