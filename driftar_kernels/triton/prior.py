"""The entropy-parameterised prior (docs/ops/prior.md): one pass over memory."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .elementary import check_dtype, expm1, narrow
from .tuning import ELEMENTWISE


@triton.jit
def sigma_of(entropy, sigma_max, tau, entropy_max):
    """Eq. 6, fp64 in and out: for a small tau the exponentials leave the range of fp32.

    Comparisons are written so that a NaN entropy stays NaN.
    """
    top = tl.cast(entropy_max, tl.float64)
    limit = tl.cast(sigma_max, tl.float64)
    clamped = tl.where(entropy < 0.0, 0.0, tl.where(entropy > top, top, entropy))
    span = expm1(top / tl.cast(tau, tl.float64))
    span = tl.where(tl.abs(span) < 1e-8, 1e-8, span)
    sigma = limit * expm1(clamped / tl.cast(tau, tl.float64)) / span
    return tl.where(sigma < 0.0, 0.0, tl.where(sigma > limit, limit, sigma))


@triton.jit(do_not_specialize=["count"])
def sigma_kernel(entropy, sigma, count, sigma_max, tau, entropy_max, BLOCK: tl.constexpr):
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = index < count
    value = tl.load(entropy + index, mask=inside, other=0.0).to(tl.float64)
    tl.store(sigma + index, sigma_of(value, sigma_max, tau, entropy_max), mask=inside)


@triton.jit(do_not_specialize=["count"])
def prior_kernel(
    mean,  # [count, width]
    entropy,  # [count]
    noise,  # [count, width]
    out,  # [count, width]
    count,
    width,
    sigma_max,
    tau,
    entropy_max,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    value = tl.load(entropy + row, mask=row < count, other=0.0).to(tl.float64)
    sigma = sigma_of(value, sigma_max, tau, entropy_max).to(tl.float32)
    for first in range(0, width, COLUMNS):
        column = first + tl.arange(0, COLUMNS)
        inside = (row < count)[:, None] & (column < width)[None, :]
        at = row[:, None] * width + column[None, :]
        centre = tl.load(mean + at, mask=inside, other=0.0).to(tl.float32)
        direction = tl.load(noise + at, mask=inside, other=0.0).to(tl.float32)
        sample = narrow(centre + sigma[:, None] * direction, out.dtype.element_ty)
        tl.store(out + at, sample, mask=inside)


def entropy_to_sigma(entropy: Tensor, sigma_max: float, tau: float, entropy_max: float) -> Tensor:
    """See :func:`driftar_kernels.entropy_to_sigma`."""
    check_dtype("entropy_to_sigma", "entropy", entropy)
    source = entropy.contiguous()
    sigma = torch.empty(entropy.shape, dtype=torch.float32, device=entropy.device)
    count = entropy.numel()
    if count:
        block = ELEMENTWISE.rows * ELEMENTWISE.columns
        sigma_kernel[(triton.cdiv(count, block),)](
            source, sigma, count, sigma_max, tau, entropy_max, BLOCK=block
        )
    return sigma


def entropy_prior(
    mean: Tensor, entropy: Tensor, noise: Tensor, sigma_max: float, tau: float, entropy_max: float
) -> Tensor:
    """See :func:`driftar_kernels.entropy_prior`."""
    check_dtype("entropy_prior", "mean", mean)
    check_dtype("entropy_prior", "entropy", entropy)
    out = torch.empty(mean.shape, dtype=mean.dtype, device=mean.device)
    if out.numel():
        count = entropy.numel()
        prior_kernel[(triton.cdiv(count, ELEMENTWISE.rows),)](
            mean.contiguous(),
            entropy.contiguous(),
            noise.contiguous(),
            out,
            count,
            mean.shape[-1],
            sigma_max,
            tau,
            entropy_max,
            ROWS=ELEMENTWISE.rows,
            COLUMNS=ELEMENTWISE.columns,
        )
    return out
