"""Limits of this machine: what the arithmetic or the memory traffic alone would cost."""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable

import torch

_ROUNDS = 15


def _median_seconds(call: Callable[[], object]) -> float:
    times = []
    for _ in range(_ROUNDS + 2):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return statistics.median(times[2:])


@functools.cache
def gemm_rate(dtype: torch.dtype = torch.float32, size: int = 1024) -> float:
    """FLOP/s of PyTorch's matrix product at the current thread count.

    For 16-bit types the better of theirs and fp32's, which any kernel can widen to.
    """
    a, b = torch.randn(2, size, size).to(dtype)
    rate = 2 * size**3 / _median_seconds(lambda: torch.mm(a, b))
    return rate if dtype == torch.float32 else max(rate, gemm_rate(torch.float32, size))


@functools.cache
def read_rate(size: int) -> float:
    """Bytes/s at which ``size`` bytes are read again and again, from whatever cache holds them."""
    a, b = torch.randn(2, max(size // 8, 1))
    return 8 * a.numel() / _median_seconds(lambda: torch.dot(a, b))


def gemm_seconds(flops: float, dtype: torch.dtype = torch.float32) -> float:
    """Time of ``flops`` floating-point operations in matrix products."""
    return flops / gemm_rate(dtype)


def read_seconds(size: int) -> float:
    """Time of reading ``size`` bytes once."""
    return size / read_rate(size)
