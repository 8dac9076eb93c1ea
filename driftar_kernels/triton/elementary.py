"""What the kernels share: dtypes they take, products, roundings, and functions that Triton's
language lacks."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import _checks
from .._library import TRITON_INTERPRETED

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def check_dtype(op: str, name: str, value: Tensor) -> None:
    """Refuse what only other backends compute."""
    if value.dtype not in DTYPES:
        raise TypeError(
            f"{op}: {name} must be fp32, bf16 or fp16 on the triton backend, got {value.dtype}; "
            "use_backend('reference') takes it"
        )


def check_like(
    op: str,
    name: str,
    value: Tensor,
    shape: tuple[int, ...],
    meaning: str,
    model: Tensor,
    dtype: torch.dtype | None = None,
) -> None:
    """Shape, device of ``model`` and dtype (that of ``model``, unless given) of what a kernel reads
    without further checks."""
    _checks.shape(op, name, value, shape, meaning)
    if value.dtype != (dtype or model.dtype):
        raise TypeError(f"{op}: {name} must be {dtype or model.dtype}, got {value.dtype}")
    if value.device != model.device:
        raise ValueError(f"{op}: {name} must be on {model.device}, got {value.device}")


# The interpreter multiplies the bits of bf16 numbers as integers, and truncates to bf16.
INTERPRETED = tl.constexpr(TRITON_INTERPRETED)


@triton.jit
def dot(a, b, acc=None, PRECISION: tl.constexpr = "ieee"):
    """Matrix product in fp32, added to ``acc``; 16-bit products are exact."""
    if INTERPRETED:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def narrow(x, dtype: tl.constexpr):
    """fp32 numbers in ``dtype``, rounded to nearest even."""
    if INTERPRETED and dtype == tl.bfloat16:
        bits = x.to(tl.uint32, bitcast=True)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
        x = tl.where(x == x, rounded, bits).to(tl.float32, bitcast=True)
    return x.to(dtype)


@triton.jit
def is_finite(x):
    if x.dtype == tl.bfloat16:  # by the exponent's bits, which need no wider copy
        return (x.to(tl.int16, bitcast=True) & 0x7F80) != 0x7F80
    elif x.dtype == tl.float16:
        return (x.to(tl.int16, bitcast=True) & 0x7C00) != 0x7C00
    else:
        return (x - x) == 0.0


@triton.jit
def expm1(x):
    """exp(x) - 1 for fp64 x, without cancellation near 0."""
    series = x * 0.0 + 1.0
    for step in tl.static_range(16):
        series = 1.0 + x * (1.0 / (17 - step)) * series
    return tl.where(tl.abs(x) < 0.5, x * series, tl.exp(x) - 1.0)


@triton.jit
def cosine_of_turns(u):
    """cos(2 pi u) for fp64 u in [0, 1). The general cosine keeps room for huge arguments."""
    angle = (u - 0.5) * 6.283185307179586
    square = angle * angle
    series = u * 0.0 + 1.0
    for step in tl.static_range(15):
        order = 2 * (15 - step)
        series = 1.0 - square * (1.0 / (order * (order - 1))) * series
    return -series
