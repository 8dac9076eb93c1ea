"""The entropy-parameterised prior (docs/ops/prior.md): one pass over memory."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .elementary import check_dtype, check_like, expm1, narrow
from .launch import launch
from .tuning import ELEMENTWISE


@triton.jit
def range_of(tau, entropy_max):
    """exp(E_max / tau) - 1 in fp64, kept away from 0."""
    span = expm1(tl.cast(entropy_max, tl.float64) / tl.cast(tau, tl.float64))
    return tl.where(tl.abs(span) < 1e-8, 1e-8, span)


@triton.jit
def sigma_of(entropy, sigma_max, tau, entropy_max):
    """Eq. 6, fp64 in and out: for a small tau the exponentials leave the range of fp32.

    Comparisons are written so that a NaN entropy stays NaN.
    """
    top = tl.cast(entropy_max, tl.float64)
    limit = tl.cast(sigma_max, tl.float64)
    clamped = tl.where(entropy < 0.0, 0.0, tl.where(entropy > top, top, entropy))
    sigma = limit * expm1(clamped / tl.cast(tau, tl.float64)) / range_of(tau, entropy_max)
    return tl.where(sigma < 0.0, 0.0, tl.where(sigma > limit, limit, sigma))


@triton.jit
def slope_of(entropy, sigma_max, tau, entropy_max):
    """d sigma / d E, fp64 in and out; 0 where E is clamped."""
    curvature = tl.cast(tau, tl.float64)
    factor = tl.cast(sigma_max, tl.float64) / (curvature * range_of(tau, entropy_max))
    inside = (entropy >= 0.0) & (entropy <= tl.cast(entropy_max, tl.float64))
    return tl.where(inside, factor * tl.exp(tl.where(inside, entropy, 0.0) / curvature), 0.0)


@triton.jit(do_not_specialize=["count"])
def sigma_kernel(entropy, sigma, count, sigma_max, tau, entropy_max, BLOCK: tl.constexpr):
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = index < count
    value = tl.load(entropy + index, mask=inside, other=0.0).to(tl.float64)
    tl.store(sigma + index, sigma_of(value, sigma_max, tau, entropy_max), mask=inside)


@triton.jit(do_not_specialize=["count"])
def sigma_backward_kernel(
    grad, entropy, grad_entropy, count, sigma_max, tau, entropy_max, BLOCK: tl.constexpr
):
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = index < count
    value = tl.load(entropy + index, mask=inside, other=0.0).to(tl.float64)
    slope = slope_of(value, sigma_max, tau, entropy_max).to(tl.float32)
    gradient = tl.load(grad + index, mask=inside, other=0.0) * slope
    tl.store(grad_entropy + index, narrow(gradient, grad_entropy.dtype.element_ty), mask=inside)


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


@triton.jit(do_not_specialize=["count"])
def prior_backward_kernel(
    grad,  # [count, width]
    entropy,  # [count]
    noise,  # [count, width]
    grad_entropy,  # [count], unless it is not needed
    grad_noise,  # [count, width], unless it is not needed
    count,
    width,
    sigma_max,
    tau,
    entropy_max,
    NEED_ENTROPY: tl.constexpr,
    NEED_NOISE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    value = tl.load(entropy + row, mask=row < count, other=0.0).to(tl.float64)
    sigma = sigma_of(value, sigma_max, tau, entropy_max).to(tl.float32)
    product = tl.zeros([ROWS, COLUMNS], tl.float32)
    for first in range(0, width, COLUMNS):
        column = first + tl.arange(0, COLUMNS)
        inside = (row < count)[:, None] & (column < width)[None, :]
        at = row[:, None] * width + column[None, :]
        gradient = tl.load(grad + at, mask=inside, other=0.0).to(tl.float32)
        if NEED_ENTROPY:
            product += gradient * tl.load(noise + at, mask=inside, other=0.0).to(tl.float32)
        if NEED_NOISE:
            scaled = narrow(gradient * sigma[:, None], grad_noise.dtype.element_ty)
            tl.store(grad_noise + at, scaled, mask=inside)
    if NEED_ENTROPY:
        slope = slope_of(value, sigma_max, tau, entropy_max).to(tl.float32)
        total = narrow(tl.sum(product, 1) * slope, grad_entropy.dtype.element_ty)
        tl.store(grad_entropy + row, total, mask=row < count)


def entropy_to_sigma(entropy: Tensor, sigma_max: float, tau: float, entropy_max: float) -> Tensor:
    """See :func:`driftar_kernels.entropy_to_sigma`."""
    check_dtype("entropy_to_sigma", "entropy", entropy)
    source = entropy.contiguous()
    sigma = torch.empty(entropy.shape, dtype=torch.float32, device=entropy.device)
    count = entropy.numel()
    if count:
        block = ELEMENTWISE.rows * ELEMENTWISE.columns
        launch(
            sigma_kernel,
            (triton.cdiv(count, block),),
            source,
            sigma,
            count,
            sigma_max,
            tau,
            entropy_max,
            BLOCK=block,
        )
    return sigma


def entropy_to_sigma_backward(
    grad: Tensor, entropy: Tensor, sigma_max: float, tau: float, entropy_max: float
) -> Tensor:
    """Gradient of entropy; ``grad`` has the fp32 of sigma."""
    op = "entropy_to_sigma_backward"
    check_dtype(op, "entropy", entropy)
    check_like(op, "grad", grad, entropy.shape, "of entropy", entropy, torch.float32)
    grad_entropy = torch.empty(entropy.shape, dtype=entropy.dtype, device=entropy.device)
    count = entropy.numel()
    if count:
        block = ELEMENTWISE.rows * ELEMENTWISE.columns
        launch(
            sigma_backward_kernel,
            (triton.cdiv(count, block),),
            grad.contiguous(),
            entropy.contiguous(),
            grad_entropy,
            count,
            sigma_max,
            tau,
            entropy_max,
            BLOCK=block,
        )
    return grad_entropy


def entropy_prior(
    mean: Tensor, entropy: Tensor, noise: Tensor, sigma_max: float, tau: float, entropy_max: float
) -> Tensor:
    """See :func:`driftar_kernels.entropy_prior`."""
    op = "entropy_prior"
    check_dtype(op, "mean", mean)
    check_dtype(op, "entropy", entropy)
    check_like(op, "noise", noise, mean.shape, "[..., D]", mean)
    check_like(op, "entropy", entropy, mean.shape[:-1], "[...]", mean, entropy.dtype)
    out = torch.empty(mean.shape, dtype=mean.dtype, device=mean.device)
    if out.numel():
        count = entropy.numel()
        launch(
            prior_kernel,
            (triton.cdiv(count, ELEMENTWISE.rows),),
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


def entropy_prior_backward(
    grad: Tensor,
    entropy: Tensor,
    noise: Tensor,
    sigma_max: float,
    tau: float,
    entropy_max: float,
    need_entropy: bool,
    need_noise: bool,
) -> tuple[Tensor, Tensor]:
    """Gradients of entropy and noise; empty where they are not needed."""
    op = "entropy_prior_backward"
    check_dtype(op, "grad", grad)
    check_dtype(op, "entropy", entropy)
    check_like(op, "noise", noise, grad.shape, "[..., D]", grad)
    check_like(op, "entropy", entropy, grad.shape[:-1], "[...]", grad, entropy.dtype)
    device, none = grad.device, (0,)
    grad_entropy = torch.empty(
        entropy.shape if need_entropy else none, dtype=entropy.dtype, device=device
    )
    grad_noise = torch.empty(noise.shape if need_noise else none, dtype=noise.dtype, device=device)
    count = entropy.numel()
    if count:
        launch(
            prior_backward_kernel,
            (triton.cdiv(count, ELEMENTWISE.rows),),
            grad.contiguous(),
            entropy.contiguous(),
            noise.contiguous(),
            grad_entropy,
            grad_noise,
            count,
            grad.shape[-1],
            sigma_max,
            tau,
            entropy_max,
            NEED_ENTROPY=need_entropy,
            NEED_NOISE=need_noise,
            ROWS=ELEMENTWISE.rows,
            COLUMNS=ELEMENTWISE.columns,
        )
    return grad_entropy, grad_noise
