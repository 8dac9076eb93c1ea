"""The entropy-parameterised Gaussian prior of Drift-AR (Eqs. 6 and 7 of arXiv 2603.28049)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import _checks, _library, backends
from .reference import prior as reference


def entropy_to_sigma(
    entropy: Tensor, *, sigma_max: float = 0.5, tau: float = 2.0, entropy_max: float = 1.0
) -> Tensor:
    r"""Standard deviation of the prior from a normalised entropy (Eq. 6).

    .. math:: \sigma(E) = \sigma_{max} \frac{e^{E/\tau} - 1}{e^{E_{max}/\tau} - 1}

    with E clamped to [0, entropy_max] and the result to [0, sigma_max]. The paper calls it a
    variance; it is used as a standard deviation, there and here.

    Args:
        entropy: any shape.
        sigma_max: >= 0.
        tau: curvature; negative is concave, 0 is not allowed.
        entropy_max: > 0, upper end of the input range.

    Returns:
        Same shape, fp32 (fp64 for fp64 input).

    Raises:
        TypeError, ValueError: an argument of the wrong type or range.
    """
    op = "entropy_to_sigma"
    settings = _check_settings(op, sigma_max, tau, entropy_max)
    if backends.calls_cpp():
        sigma: Tensor | None = _direct_sigma(entropy, *settings)  # checks the rest
        if sigma is not None:
            return sigma
    _checks.tensor(op, "entropy", entropy)
    _checks.floating(op, entropy=entropy)
    backend = backends.select(op, entropy.device)
    if backend == "reference":
        return reference.entropy_to_sigma(entropy, *settings)
    result: Tensor = _library.call(_library.operator(op, backend), entropy, *settings)
    return result


def entropy_prior(
    mean: Tensor,
    entropy: Tensor,
    noise: Tensor,
    *,
    sigma_max: float = 0.5,
    tau: float = 2.0,
    entropy_max: float = 1.0,
) -> Tensor:
    """Sample of the prior (Eq. 7): ``mean + sigma(entropy) * noise``.

    Args:
        mean: ``[..., C]``, the projected features.
        entropy: ``[...]``, one normalised entropy per position.
        noise: shape and dtype of mean, standard normal.
        sigma_max, tau, entropy_max: see :func:`entropy_to_sigma`.

    Returns:
        Shape and dtype of mean (under autocast 16-bit inputs are widened to fp32). Gradients reach
        mean, entropy and noise.

    Raises:
        TypeError, ValueError: an argument of the wrong type, shape, device or range.
    """
    op = "entropy_prior"
    settings = _check_settings(op, sigma_max, tau, entropy_max)
    if backends.calls_cpp():
        sample: Tensor | None = _direct_prior(mean, entropy, noise, *settings)  # checks the rest
        if sample is not None:
            return sample
    mean, noise = _check_sample(op, mean, entropy, noise)
    backend = backends.select(op, mean.device)
    if backend == "reference":
        return reference.entropy_prior(mean, entropy, noise, *settings)
    result: Tensor = _library.call(_library.operator(op, backend), mean, entropy, noise, *settings)
    return result


def _check_sample(op: str, mean: Tensor, entropy: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
    """mean and noise as they are used."""
    _checks.tensor(op, "mean", mean)
    _checks.tensor(op, "entropy", entropy)
    _checks.tensor(op, "noise", noise)
    _checks.same_device(op, mean=mean, entropy=entropy, noise=noise)
    mean, noise = _checks.widen_under_autocast(mean.device, mean, noise)
    _checks.floating(op, mean=mean, noise=noise)
    _checks.floating(op, entropy=entropy)
    if mean.dim() == 0:
        raise ValueError(f"{op}: mean must have at least 1 dimension, got shape []")
    _checks.shape(op, "noise", noise, mean.shape, "[..., C]")
    _checks.shape(op, "entropy", entropy, mean.shape[:-1], "[...]")
    return mean, noise


def _check_settings(
    op: str, sigma_max: float, tau: float, entropy_max: float
) -> tuple[float, float, float]:
    if _checks.number(op, "sigma_max", sigma_max) < 0:
        raise ValueError(f"{op}: sigma_max must be >= 0, got {sigma_max}")
    if _checks.number(op, "tau", tau) == 0:
        raise ValueError(f"{op}: tau must not be 0")
    if _checks.number(op, "entropy_max", entropy_max) <= 0:
        raise ValueError(f"{op}: entropy_max must be > 0, got {entropy_max}")
    if entropy_max / tau > 700:
        raise ValueError(
            f"{op}: tau must be larger; exp(entropy_max / tau) overflows for tau = {tau}"
        )
    return float(sigma_max), float(tau), float(entropy_max)


def _sigma_fake(entropy: Tensor, sigma_max: float, tau: float, entropy_max: float) -> Tensor:
    return entropy.new_empty(entropy.shape, dtype=torch.promote_types(entropy.dtype, torch.float32))


def _sigma_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    entropy, *ctx.settings = inputs
    ctx.save_for_backward(entropy)


def _sigma_backward(operator: str, ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    (entropy,) = ctx.saved_tensors
    gradient = _library.call(_library.native(operator), grad, entropy, *ctx.settings)
    return (gradient, None, None, None)


def _sigma_backward_fake(
    grad: Tensor, entropy: Tensor, sigma_max: float, tau: float, entropy_max: float
) -> Tensor:
    return entropy.new_empty(entropy.shape)


def _prior_fake(
    mean: Tensor, entropy: Tensor, noise: Tensor, sigma_max: float, tau: float, entropy_max: float
) -> Tensor:
    return mean.new_empty(mean.shape)


def _prior_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, entropy, noise, *ctx.settings = inputs
    ctx.save_for_backward(entropy, noise)


def _prior_backward(operator: str, ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    entropy, noise = ctx.saved_tensors
    _, need_entropy, need_noise, *_ = ctx.needs_input_grad
    grad_entropy = grad_noise = None
    if need_entropy or need_noise:
        grad_entropy, grad_noise = _library.call(
            _library.native(operator),
            grad,
            entropy,
            noise,
            *ctx.settings,
            need_entropy,
            need_noise,
        )
    return (
        grad,
        grad_entropy if need_entropy else None,
        grad_noise if need_noise else None,
        None,
        None,
        None,
    )


def _prior_backward_fake(
    grad: Tensor,
    entropy: Tensor,
    noise: Tensor,
    sigma_max: float,
    tau: float,
    entropy_max: float,
    need_entropy: bool,
    need_noise: bool,
) -> tuple[Tensor, Tensor]:
    return (
        entropy.new_empty(entropy.shape if need_entropy else (0,)),
        noise.new_empty(noise.shape if need_noise else (0,)),
    )


def _no_second_derivative(ctx: Any, *gradients: Tensor) -> None:
    raise NotImplementedError(
        "entropy_to_sigma, entropy_prior: second derivatives are not provided by this backend; "
        "use_backend('reference') computes them"
    )


_library.register_fake("entropy_to_sigma", _sigma_fake)
_library.register_fake("entropy_to_sigma_backward", _sigma_backward_fake)
_library.register_autograd(
    "entropy_to_sigma", _sigma_backward, _sigma_setup, backward_op="entropy_to_sigma_backward"
)
_library.register_autograd("entropy_to_sigma_backward", _no_second_derivative)
_library.register_fake("entropy_prior", _prior_fake)
_library.register_fake("entropy_prior_backward", _prior_backward_fake)
_library.register_autograd(
    "entropy_prior", _prior_backward, _prior_setup, backward_op="entropy_prior_backward"
)
_library.register_autograd("entropy_prior_backward", _no_second_derivative)

_direct_sigma = _library.direct("entropy_to_sigma")
_direct_prior = _library.direct("entropy_prior")
