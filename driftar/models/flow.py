"""Flow matching of single tokens: loss, guidance and the stochastic sampler of NextStep-1.

Time runs from noise (t = 0) to data (t = 1): ``x_t = t data + (1 - t) noise``, and the network
predicts the velocity ``v = data - noise``.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor

from .diffusion import Noise

Velocity = Callable[[Tensor, Tensor], Tensor]  # (x [N, C], t [N]) -> [N, C]


def flow_matching_loss(
    network: Velocity, target: Tensor, t: Tensor, noise: Tensor, mask: Tensor | None = None
) -> Tensor:
    """Mean squared error of the velocity, over the channels and then the tokens.

    Args:
        network: called once.
        target: clean tokens ``[N, C]``.
        t: ``[N]`` in [0, 1].
        noise: ``[N, C]``, standard normal.
        mask: ``[N]``, weight of every token; all 1 if None.
    """
    time = t[:, None].to(target.dtype)
    predicted = network(time * target + (1 - time) * noise, t)
    errors = (predicted.float() - (target - noise).float()).square().mean(-1)
    return errors.mean() if mask is None else (errors * mask).sum() / (mask.sum() + 1e-8)


def score_of_velocity(velocity: Tensor, x: Tensor, t: Tensor | float) -> Tensor:
    """Score of the density of x_t: ``(t v - x) / (1 - t)``."""
    return (t * velocity - x) / (1 - t)


def shifted_times(num_steps: int, shift: float, last_step_size: float) -> Tensor:
    """Times of the network evaluations ``[num_steps]``, from 0 to ``1 - last_step_size``, shifted.

    ``t <- t / (shift - (shift - 1) t)``: a shift above 1 spends more steps near the noise.
    """
    times = torch.linspace(0, 1 - last_step_size, num_steps)
    return times / (shift - (shift - 1) * times)


def guidance_branches(cfg: float, cfg_img: float) -> int:
    """How many conditions every token has: 1, 2 (cfg > 1) or 3 (cfg_img > 1 as well)."""
    return 1 + (cfg > 1) + (cfg_img > 1)


def guided(velocity: Tensor, branches: int, cfg: float, cfg_img: float) -> Tensor:
    """Mix the branches ``[branches * N, C]`` of a velocity into ``[N, C]``.

    Two: ``u + cfg (c - u)``. Three (condition, image only, nothing):
    ``u + cfg_img (i - u) + cfg (c - i)``.
    """
    if branches == 1:
        return velocity
    if branches == 2:
        conditional, blank = velocity.chunk(2)
        return blank + cfg * (conditional - blank)
    conditional, image, blank = velocity.chunk(3)
    return blank + cfg_img * (image - blank) + cfg * (conditional - image)


def sample(
    network: Velocity,
    noise: Noise,
    *,
    rows: int,
    channels: int,
    noise_repeat: int,
    cfg: float,
    cfg_img: float,
    num_steps: int,
    shift: float,
    last_step_size: float,
) -> Tensor:
    """Euler-Maruyama from noise to tokens ``[rows, C]`` in fp32, ``num_steps`` evaluations.

    ``dx = (v + (1 - t) score) dt + sqrt(2 (1 - t)) dW`` between the times; the last step, of
    ``last_step_size``, follows v without noise.

    Args:
        network: evaluated on ``branches * rows`` tokens, the branches one after the other.
        noise: asked ``num_steps`` times for ``[noise_repeat, C]``: the start, then a draw per
            stochastic step. The draws are tiled over the rows, as published.
    """
    branches = guidance_branches(cfg, cfg_img)
    times = shifted_times(num_steps, shift, last_step_size).tolist()

    def tiled() -> Tensor:
        return noise((noise_repeat, channels)).float().repeat(rows // noise_repeat, 1)

    def velocity(x: Tensor, t: float) -> Tensor:
        count = branches * rows
        out = network(x.repeat(branches, 1), torch.full((count,), t, device=x.device))
        return guided(out.float(), branches, cfg, cfg_img)

    x = tiled()
    for t, following in pairwise(times):
        v = velocity(x, t)
        step = following - t
        drift = v + (1 - t) * score_of_velocity(v, x, t)
        x = x + drift * step + (2 * (1 - t) * step) ** 0.5 * tiled()
    return x + velocity(x, times[-1]) * last_step_size
