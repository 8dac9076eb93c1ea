"""Rectified flow of whole images as TransDiff uses it: training loss and Euler-Maruyama sampler.

``x_t = (1 - t) data + t noise`` with t from 1 (noise) to 0 (data); the network predicts the
velocity ``noise - data`` and is told the time ``tau = 1000 t``.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor

from .diffusion import Noise

TIME_SCALE = 1000
LAST_TIME = 0.04  # below it one deterministic step leads to the data

Velocity = Callable[[Tensor, Tensor], Tensor]  # (x [N, ...], tau [N]) -> [N, ...]


def sampling_times(num_steps: int) -> list[float]:
    """Times of the sampler: ``num_steps`` from 1 to 0.04 evenly, then 0."""
    return [*torch.linspace(1, LAST_TIME, num_steps, dtype=torch.float64).tolist(), 0.0]


def reverse_drift(velocity: Tensor, x: Tensor, t: float) -> Tensor:
    """Drift of the reverse SDE whose noise has variance 2t.

    With the score ``s = -((1 - t) v + x) / t`` it is ``v - t s = (2 - t) v + x``.
    """
    return (2 - t) * velocity + x


def sample(
    velocity: Velocity,
    start: Tensor,
    noise: Noise,
    *,
    num_steps: int,
    guidance: float | None = None,
    scale_mean: float = 1.0,
    scale_noise: float = 1.0,
) -> Tensor:
    """Integrate from noise to data, one network evaluation per step.

    With ``guidance`` the network's contexts are the rows' conditional ones followed by as many
    unconditional ones: it is evaluated on x twice and ``v_u + w (v_c - v_u)`` is followed.

    Args:
        start: ``[B, ...]``, standard normal.
        noise: ``noise(shape)``, one draw of ``start``'s shape for every step but the last.
        guidance: w, or None.
        scale_mean, scale_noise: factors of drift and noise, in every step but the last.
    """
    times = sampling_times(num_steps)
    x, branches = start, 1 if guidance is None else 2
    for index, (t, following) in enumerate(pairwise(times)):
        tau = x.new_full((branches * x.shape[0],), TIME_SCALE * t)
        predicted = velocity(torch.cat([x] * branches), tau)
        if guidance is not None:
            conditional, unconditional = predicted.chunk(2)
            predicted = unconditional + guidance * (conditional - unconditional)
        step = reverse_drift(predicted, x, t) * (following - t)
        if index < num_steps - 1:
            deviation = math.sqrt(2 * t * (t - following))
            x = x + scale_mean * step + scale_noise * deviation * noise(tuple(x.shape))
        else:
            x = x + step
    return x


def velocity_loss(velocity: Velocity, target: Tensor, tau: Tensor, noise: Tensor) -> Tensor:
    """Mean squared error of the velocity at integer times.

    Args:
        target: data ``[B, ...]``.
        tau: ``[B]``, whole numbers in 0..999 (truncated before use, as published).
        noise: like target, standard normal.
    """
    tau = tau.trunc().to(target.dtype)
    t = (tau / TIME_SCALE).reshape(-1, *[1] * (target.dim() - 1))
    x = (1 - t) * target + t * noise
    return (velocity(x, tau) - (noise - target)).square().mean()
