"""Argument checks shared by the operators. Every message names the operator, the argument, what it
was and what it should be. Shapes and ranges raise ValueError, types and dtypes TypeError."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence

import torch
from torch import Tensor

FLOATING = {torch.float32, torch.bfloat16, torch.float16, torch.float64}
_REAL = (int, float, torch.SymFloat, torch.SymInt)
INTEGER = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


def tensor(op: str, name: str, value: object, rank: int | None = None) -> Tensor:
    """``value`` as a tensor of ``rank`` dimensions."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{op}: {name} must be a torch.Tensor, got {type(value).__name__}")
    if rank is not None and value.dim() != rank:
        raise ValueError(f"{op}: {name} must have {rank} dimensions, got shape {_shape(value)}")
    return value


def floating(op: str, **tensors: Tensor) -> None:
    """All of one supported floating dtype."""
    found_dtypes = {value.dtype for value in tensors.values()}
    if len(found_dtypes) == 1 and found_dtypes <= FLOATING:
        return
    for name, value in tensors.items():
        if value.dtype not in FLOATING:
            raise TypeError(f"{op}: {name} must be fp32, bf16, fp16 or fp64, got {value.dtype}")
    if len(found_dtypes) > 1:
        found = ", ".join(f"{name} {value.dtype}" for name, value in tensors.items())
        raise TypeError(f"{op}: {', '.join(tensors)} must have one dtype, got {found}")


def integer(op: str, name: str, value: Tensor) -> None:
    """An integer dtype (bool is none)."""
    if value.dtype not in INTEGER:
        raise TypeError(f"{op}: {name} must have an integer dtype, got {value.dtype}")


def same_device(op: str, **tensors: Tensor | None) -> None:
    """All present tensors on one device."""
    if len({value.device for value in tensors.values() if value is not None}) > 1:
        present = {name: value.device for name, value in tensors.items() if value is not None}
        found = ", ".join(f"{name} on {device}" for name, device in present.items())
        raise ValueError(f"{op}: {', '.join(present)} must be on one device, got {found}")


def shape(op: str, name: str, value: Tensor, expected: tuple[int, ...], meaning: str) -> None:
    """Exactly ``expected``; ``meaning`` spells the dimensions, as in ``[B, N]``."""
    if value.shape != expected:
        raise ValueError(
            f"{op}: {name} must have shape {meaning} = {list(expected)}, got {_shape(value)}"
        )


def number(op: str, name: str, value: object) -> float:
    """A finite real number."""
    if isinstance(value, bool) or not isinstance(value, _REAL):
        raise TypeError(f"{op}: {name} must be a number, got {type(value).__name__}")
    # Comparisons, unlike math.isfinite, also work on the symbolic numbers of dynamic compilation.
    if not -math.inf < value < math.inf:
        raise ValueError(f"{op}: {name} must be finite, got {value}")
    return value  # type: ignore[return-value]


def integral(op: str, name: str, value: object, minimum: int | None = None) -> int:
    """An int, at least ``minimum``."""
    if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt)):
        raise TypeError(f"{op}: {name} must be an int, got {type(value).__name__}")
    if minimum is not None and value < minimum:
        raise ValueError(f"{op}: {name} must be at least {minimum}, got {value}")
    return value  # type: ignore[return-value]


def choice(op: str, name: str, value: object, allowed: Sequence[str]) -> None:
    """One of the ``allowed`` strings."""
    if value not in allowed:
        raise ValueError(
            f"{op}: {name} must be one of {', '.join(map(repr, allowed))}, got {value!r}"
        )


def readable(value: Tensor) -> bool:
    """Whether looking at the values costs no synchronisation: a real CPU tensor outside of
    tracing.
    """
    return value.device.type == "cpu" and not torch.compiler.is_compiling()


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """The dtype that autocast asks for on ``device``, or None outside of autocast."""
    kind = device.type
    if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
        return torch.get_autocast_dtype(kind)
    return None


def widen_under_autocast(device: torch.device, *tensors: Tensor) -> tuple[Tensor, ...]:
    """Under autocast, 16-bit tensors as fp32: for operators that keep full precision."""
    if autocast_dtype(device) is None:
        return tensors
    return tuple(x.float() if x.dtype in (torch.bfloat16, torch.float16) else x for x in tensors)


def without_autocast(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """A context in which plain PyTorch code computes in the dtypes it is given."""
    if torch.amp.is_autocast_available(device.type):
        return torch.autocast(device.type, enabled=False)
    return contextlib.nullcontext()


def _shape(value: Tensor) -> list[int]:
    return list(value.shape)
