"""Drift loss, forward and backward, against the published formula in eager PyTorch."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

import driftar_kernels as dk

from . import floors, peers

# (B, N, P, Q, S): many small problems, long features, one large problem.
SHAPES = [(256, 64, 64, 16, 128), (16, 64, 64, 32, 640), (1, 640, 640, 32, 384)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def bench_drift_loss(shape: tuple[int, int, int, int, int], race: Callable[..., None]) -> None:
    batch, count, positives, negatives, features = shape
    gen = torch.randn(batch, count, features, requires_grad=True)
    pos = torch.randn(batch, positives, features) + 0.5
    neg = torch.randn(batch, negatives, features) - 0.5

    expected = torch.autograd.grad(
        peers.eager_drift_loss(gen.double(), pos.double(), neg.double()), gen
    )[0]
    actual = torch.autograd.grad(dk.drift_loss(gen, pos, neg), gen)[0]
    assert (actual - expected).abs().max() <= 1e-3 * expected.abs().max()

    # One product for the distances, one per temperature for the forces.
    flops = 4 * 2 * batch * count * (count + positives + negatives) * features
    race(
        lambda: torch.autograd.grad(dk.drift_loss(gen, pos, neg), gen),
        {"eager": lambda: torch.autograd.grad(peers.eager_drift_loss(gen, pos, neg), gen)},
        flops / floors.gemm_rate(),
    )
