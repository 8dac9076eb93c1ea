"""The published drift loss, formula by formula."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

TEMPERATURES = (0.02, 0.05, 0.2)


def drift_loss(
    gen: Tensor, pos: Tensor, neg: Tensor | None, temperatures: Sequence[float] = TEMPERATURES
) -> Tensor:
    """Loss in eager PyTorch with unit weights; gradients reach ``gen``."""
    count = gen.shape[1]
    repelling = count if neg is None else count + neg.shape[1]
    with torch.no_grad():
        points = torch.cat([x for x in (gen, neg, pos) if x is not None], 1)
        squared = (gen**2).sum(-1)[..., None] + (points**2).sum(-1)[:, None]
        distance = (squared - 2 * gen @ points.transpose(1, 2)).clamp(min=1e-8).sqrt()
        scale = distance.mean()
        unit = (scale / gen.shape[2] ** 0.5).clamp(min=1e-3)
        distance = distance / scale.clamp(min=1e-3)
        distance[:, :, :count] += 100.0 * torch.eye(count, dtype=gen.dtype, device=gen.device)
        goal = gen / unit
        scaled, drift = points / unit, torch.zeros_like(gen)
        for temperature in temperatures:
            logits = -distance / temperature
            affinity = (logits.softmax(2) * logits.softmax(1)).clamp(min=1e-6).sqrt()
            repel, attract = affinity[..., :repelling], affinity[..., repelling:]
            coefficients = torch.cat(
                [-repel * attract.sum(-1, keepdim=True), attract * repel.sum(-1, keepdim=True)], 2
            )
            force = coefficients @ scaled - coefficients.sum(-1, keepdim=True) * goal
            drift = drift + force / force.square().mean().clamp(min=1e-8).sqrt()
        goal = goal + drift
    return ((gen / unit - goal) ** 2).mean()
