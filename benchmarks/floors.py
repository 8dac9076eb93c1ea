"""Limits of this machine: what the arithmetic or the memory traffic alone would cost."""

from __future__ import annotations

import functools
import statistics
import time

import torch


@functools.cache
def gemm_rate(size: int = 1024) -> float:
    """FLOP/s of PyTorch's fp32 matrix product at the current thread count (median of 15)."""
    a, b = torch.randn(size, size), torch.randn(size, size)
    times = []
    for _ in range(17):
        start = time.perf_counter()
        torch.mm(a, b)
        times.append(time.perf_counter() - start)
    return 2 * size**3 / statistics.median(times[2:])


@functools.cache
def copy_rate(megabytes: int = 256) -> float:
    """Bytes/s read plus written by a large copy (median of 9)."""
    source = torch.zeros(megabytes * 2**18)
    target = torch.empty_like(source)
    times = []
    for _ in range(11):
        start = time.perf_counter()
        target.copy_(source)
        times.append(time.perf_counter() - start)
    return 2 * source.numel() * 4 / statistics.median(times[2:])
