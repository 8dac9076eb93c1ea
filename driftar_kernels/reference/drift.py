"""The multi-temperature drifting field in plain PyTorch, with every N x M matrix in sight.

Follows the published loss (golden numbers) except for the distances: points are centred first,
which changes nothing in exact arithmetic, and distances are taken from differences instead of a
Gram matrix.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

MIN_DISTANCE = 1e-4  # sqrt of the published floor of squared distances
MIN_SCALE = 1e-3
MIN_AFFINITY = 1e-3  # sqrt of the published floor of the softmax product
SELF_DISTANCE = 100.0  # added between a generated sample and itself, in units of `scale`
MIN_MEAN_SQUARE = 1e-8


def concatenate(gen: Tensor, pos: Tensor, neg: Tensor | None) -> tuple[Tensor, Tensor]:
    """Centred generated points ``[B, N, S]`` and all points ``[B, M, S]`` in the order gen, neg,
    pos.
    """
    dtype = torch.promote_types(gen.dtype, torch.float32)
    parts = [x.to(dtype) for x in (gen, neg, pos) if x is not None]
    points = torch.cat(parts, dim=1)
    points = points - points.mean(1, keepdim=True)
    return points[:, : gen.shape[1]], points


def drift_distances(
    gen: Tensor, pos: Tensor, neg: Tensor | None, weight: Tensor
) -> tuple[Tensor, Tensor]:
    """Distances ``[B, N, M]`` and the two sums of the scale: weighted distances / N, weights."""
    generated, points = concatenate(gen, pos, neg)
    distance = torch.cdist(generated, points, compute_mode="donot_use_mm_for_euclid_dist").clamp(
        min=MIN_DISTANCE
    )
    sums = torch.stack([(distance * weight[:, None]).sum() / gen.shape[1], weight.sum()])
    return distance, sums


def drift_force(
    gen: Tensor,
    pos: Tensor,
    neg: Tensor | None,
    weight: Tensor,
    scale: Tensor,
    temperatures: Sequence[float],
) -> tuple[Tensor, Tensor]:
    """Raw force of each temperature ``[T, B, N, S]`` and its sum of squares ``[T]``.

    With l = -D / R, D = d / max(scale, 1e-3) (+ 100 on the diagonal) and Y the points in units of
    scale_inputs = max(scale / sqrt(S), 1e-3)::

        a_ij = max(exp(l_ij - (lse_row_i + lse_col_j) / 2), 1e-3) w_j
        F_i  = A-_i sum_pos a_ij y_j - A+_i sum_neg a_ij y_j

    A+ and A- are the sums of a over the positives and over the rest.
    """
    generated, points = concatenate(gen, pos, neg)
    count, features = generated.shape[1:]
    negatives = points.shape[1] - pos.shape[1]
    distance, _ = drift_distances(gen, pos, neg, weight)
    distance = distance / scale.clamp(min=MIN_SCALE)
    index = torch.arange(count, device=gen.device)
    distance[:, index, index] += SELF_DISTANCE
    scaled = points / input_scale(scale, features)

    forces = []
    for temperature in temperatures:
        logits = -distance / temperature
        normaliser = logits.logsumexp(2, keepdim=True) + logits.logsumexp(1, keepdim=True)
        affinity = (logits - 0.5 * normaliser).exp().clamp(min=MIN_AFFINITY) * weight[:, None]
        repel, attract = affinity[..., :negatives], affinity[..., negatives:]
        toward_pos = repel.sum(-1, keepdim=True) * (attract @ scaled[:, negatives:])
        toward_neg = attract.sum(-1, keepdim=True) * (repel @ scaled[:, :negatives])
        forces.append(toward_pos - toward_neg)
    raw = torch.stack(forces)
    return raw, raw.square().sum((1, 2, 3))


def input_scale(scale: Tensor, features: int) -> Tensor:
    """Unit of the coordinates: ``max(scale / sqrt(S), 1e-3)``."""
    return (scale / features**0.5).clamp(min=MIN_SCALE)
