"""Schedules of a training run: loss annealing (Eqs. 9, 10), learning rate, moving average."""

from __future__ import annotations

import math

import torch
from torch import nn

from .config import DriftTrainingConfig, MARTrainingConfig


def annealing_weight(step: float, total: float, *, alpha_0: float, freeze_fraction: float) -> float:
    """Weight alpha of the AR losses (Eq. 9): ``alpha_0``, linearly to 0 at the freeze.

    ``step`` and ``total`` share a unit (steps here, epochs in the published code).
    """
    end = freeze_fraction * total
    return alpha_0 * (1 - step / end) if step <= end else 0.0


def in_phase_two(step: float, total: float, *, freeze_fraction: float) -> bool:
    """Whether the AR model and its prior are frozen: after ``freeze_fraction * total`` (Eq. 10)."""
    return step > freeze_fraction * total


def learning_rate(
    step: int, total: int, *, peak: float, warmup: int, decay_from: float, final: float
) -> float:
    """Linear warm-up to ``peak``, constant until ``decay_from * total``, then a half cosine.

    It ends at ``final * peak``.
    """
    if step < warmup:
        return peak * (step + 1) / warmup
    start = decay_from * total
    if step <= start:
        return peak
    progress = min(1.0, (step - start) / max(1.0, total - start))
    return peak * (final + (1 - final) * 0.5 * (1 + math.cos(math.pi * progress)))


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Give every parameter group ``rate`` times its own "scale" (1 if it has none)."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group.get("scale", 1.0)


def follow(
    optimizer: torch.optim.Optimizer, config: MARTrainingConfig | DriftTrainingConfig, step: int
) -> float:
    """Set the learning rate that ``config`` gives for ``step``, and return it."""
    rate = learning_rate(
        step,
        config.num_steps,
        peak=config.learning_rate,
        warmup=config.warmup_steps,
        decay_from=config.decay_from,
        final=config.final_learning_rate,
    )
    set_learning_rate(optimizer, rate)
    return rate


@torch.no_grad()
def update_average(average: nn.Module, model: nn.Module, step: int, *, decay: float) -> None:
    """Moving average of parameters and buffers, with a short memory in the first steps."""
    weight = 1 - min(decay, (1 + step) / (10 + step))
    own, new = average.state_dict(), model.state_dict()
    floating = [name for name, value in own.items() if value.is_floating_point()]
    torch._foreach_lerp_(
        [own[name] for name in floating], [new[name].to(own[name]) for name in floating], weight
    )
    for name in own.keys() - set(floating):
        own[name].copy_(new[name])
