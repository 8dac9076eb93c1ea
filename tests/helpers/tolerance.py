"""The error rule: a kernel may err at most ``factor`` times as much as plain PyTorch at its dtype.

Both errors are measured against the fp64 oracle on the inputs as stored. A floor of half a unit in
the last place of the largest oracle value keeps the rule meaningful where plain PyTorch is exact.
NaN and infinities must stand exactly where the oracle has them.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

VALUE_FACTOR = 2.0
GRADIENT_FACTOR = 3.0


def half_ulp(largest: float, dtype: torch.dtype) -> float:
    """Half a unit in the last place of ``largest`` in ``dtype``."""
    return 0.5 * torch.finfo(dtype).eps * largest


def largest_finite(value: Tensor) -> float:
    """Largest finite magnitude, 0 if there is none."""
    finite = value.detach()[torch.isfinite(value)]
    return float(finite.abs().max()) if finite.numel() else 0.0


def max_error(actual: Tensor, truth: Tensor, name: str = "value") -> float:
    """Largest absolute deviation; AssertionError when shapes, NaNs or infinities differ."""
    assert actual.shape == truth.shape, f"{name}: shape {actual.shape}, expected {truth.shape}"
    found, wanted = actual.detach().cpu().double(), truth.detach().cpu().double()
    for kind, test in (("NaN", torch.isnan), ("+inf", torch.isposinf), ("-inf", torch.isneginf)):
        wrong = (test(found) != test(wanted)).nonzero()
        assert not len(wrong), (
            f"{name}: {kind} at {len(wrong)} wrong places, first {wrong[0].tolist()}: "
            f"got {found[tuple(wrong[0])]}, expected {wanted[tuple(wrong[0])]}"
        )
    finite = torch.isfinite(wanted)
    error = (found[finite] - wanted[finite]).abs()
    return float(error.max()) if error.numel() else 0.0


def assert_close_to_truth(
    actual: Tensor,
    truth: Tensor,
    plain: Tensor | None = None,
    *,
    factor: float = VALUE_FACTOR,
    floor: float = 0.0,
    name: str = "value",
) -> None:
    """error(actual) <= max(factor * error(plain) + half ulp, floor), errors against ``truth``.

    Args:
        actual: the kernel's result.
        truth: the fp64 oracle.
        plain: the same formula in plain PyTorch at the kernel's dtype; without it only half an ulp
            and ``floor`` are granted.
        factor: 2 for values, 3 for gradients.
        floor: an error that is always granted; absolute.
        name: for the message.
    """
    error = max_error(actual, truth, name)
    granted = half_ulp(largest_finite(truth), actual.dtype)
    if plain is not None:
        # Plain PyTorch may itself overflow; such places say nothing about what is achievable.
        usable = torch.isfinite(plain) & torch.isfinite(truth)
        granted += factor * max_error(plain[usable], truth[usable], f"{name} in plain PyTorch")
    granted = max(granted, floor)
    assert error <= granted, f"{name}: error {error:.3e}, granted {granted:.3e}"


def assert_relative(actual: Tensor, truth: Tensor, tolerance: float, name: str = "value") -> None:
    """Largest error at most ``tolerance`` times the largest oracle value."""
    error, allowed = max_error(actual, truth, name), tolerance * largest_finite(truth)
    assert error <= allowed, f"{name}: error {error:.3e}, allowed {allowed:.3e}"


def assert_bitwise(left: Iterable[Tensor | None], right: Iterable[Tensor | None]) -> None:
    """Pairwise the same shape, dtype and numbers; -0 equals 0, NaN equals nothing."""
    for index, (a, b) in enumerate(zip(left, right, strict=True)):
        if a is None or b is None:
            assert a is b, f"item {index}: only one is None"
        else:
            assert a.dtype == b.dtype and torch.equal(a, b), f"item {index}: {a} is not {b}"
