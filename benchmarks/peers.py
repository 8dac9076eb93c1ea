"""The named competitors: what people use today in place of each operator."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def sdpa(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """PyTorch's own attention, causal, without entropy."""
    return F.scaled_dot_product_attention(query, key, value, is_causal=True)


def materialised_entropy(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """The published way: the whole softmax map, then p log p."""
    length = query.shape[2]
    scores = query @ key.transpose(-1, -2) * query.shape[-1] ** -0.5
    hidden = torch.ones(length, length, dtype=torch.bool).triu(1)
    p = scores.masked_fill(hidden, -torch.inf).softmax(-1)
    entropy = -(p * p.clamp(min=1e-8).log()).sum(-1)
    return p @ value, entropy


def eager_drift_loss(
    gen: Tensor, pos: Tensor, neg: Tensor, temperatures: tuple[float, ...] = (0.02, 0.05, 0.2)
) -> Tensor:
    """The published drift loss, formula by formula, in eager PyTorch with unit weights."""
    count, negatives = gen.shape[1], gen.shape[1] + neg.shape[1]
    with torch.no_grad():
        points = torch.cat([gen, neg, pos], 1)
        squared = (gen**2).sum(-1)[..., None] + (points**2).sum(-1)[:, None]
        distance = (squared - 2 * gen @ points.transpose(1, 2)).clamp(min=1e-8).sqrt()
        scale = distance.mean()
        unit = (scale / gen.shape[2] ** 0.5).clamp(min=1e-3)
        distance = distance / scale.clamp(min=1e-3)
        distance[:, range(count), range(count)] += 100.0
        goal = gen / unit
        scaled, drift = points / unit, torch.zeros_like(gen)
        for temperature in temperatures:
            logits = -distance / temperature
            affinity = (logits.softmax(2) * logits.softmax(1)).clamp(min=1e-6).sqrt()
            repel, attract = affinity[..., :negatives], affinity[..., negatives:]
            coefficients = torch.cat(
                [-repel * attract.sum(-1, keepdim=True), attract * repel.sum(-1, keepdim=True)], 2
            )
            force = coefficients @ scaled - coefficients.sum(-1, keepdim=True) * goal
            drift = drift + force / force.square().mean().clamp(min=1e-8).sqrt()
        goal = goal + drift
    return ((gen / unit - goal) ** 2).mean()


def python_walk(parents: list[int], draft: Tensor, target: Tensor, tolerance: float) -> int:
    """Tree verification node by node in Python; the deepest living node."""
    accept = (draft - target).norm(dim=-1) <= tolerance
    level: list[int] = []
    best, deepest = -1, 0
    for node, parent in enumerate(parents):
        lives = bool(accept[node]) and (parent < 0 or level[parent] > 0)
        level.append((1 if parent < 0 else level[parent] + 1) if lives else 0)
        if level[node] > deepest:
            best, deepest = node, level[node]
    return best
