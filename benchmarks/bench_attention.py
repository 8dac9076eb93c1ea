"""Attention with entropy against SDPA without it and against the materialised map."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

import driftar_kernels as dk

from . import floors, peers

SHAPES = [(8, 16, 256, 64), (1, 16, 1024, 64), (1, 16, 2048, 64), (1, 8, 2048, 128)]


def _inputs(shape: tuple[int, ...], requires_grad: bool) -> list[torch.Tensor]:
    return [torch.randn(shape, requires_grad=requires_grad) for _ in range(3)]


def _check(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> None:
    result = dk.attention(query, key, value, is_causal=True, normalize=False)
    out, entropy = peers.materialised_entropy(query.double(), key.double(), value.double())
    torch.testing.assert_close(result.out.double(), out, rtol=1e-4, atol=1e-5)
    assert result.entropy is not None
    torch.testing.assert_close(result.entropy.double(), entropy, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def bench_forward(shape: tuple[int, int, int, int], race: Callable[..., None]) -> None:
    query, key, value = _inputs(shape, requires_grad=False)
    _check(query[:1], key[:1], value[:1])
    batch, heads, length, width = shape
    flops = 2 * batch * heads * length * length * width  # two products, half of each
    race(
        lambda: dk.attention(query, key, value, is_causal=True),
        {
            "SDPA without entropy": lambda: peers.sdpa(query, key, value),
            "materialised map": lambda: peers.materialised_entropy(query, key, value),
        },
        flops / floors.gemm_rate(),
    )


@pytest.mark.parametrize("shape", SHAPES[:2], ids=str)
def bench_forward_backward(shape: tuple[int, int, int, int], race: Callable[..., None]) -> None:
    query, key, value = _inputs(shape, requires_grad=True)
    _check(*(x.detach()[:1] for x in (query, key, value)))
    batch, heads, length, width = shape
    flops = 7 * batch * heads * length * length * width

    def ours() -> None:
        result = dk.attention(query, key, value, is_causal=True)
        assert result.entropy is not None
        torch.autograd.grad(result.out.sum() + result.entropy.sum(), (query, key, value))

    def sdpa() -> None:
        torch.autograd.grad(peers.sdpa(query, key, value).sum(), (query, key, value))

    race(ours, {"SDPA without entropy": sdpa}, flops / floors.gemm_rate())
