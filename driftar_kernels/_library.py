"""Loads the compiled operators and attaches what only Python can give them: fakes and autograd.

Importing the package never fails because the compiled library does not load: the reason is kept in
``native_error``, reported once, and raised when a native backend is asked for by name.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch

NAMESPACE = "driftar"

native_error: str | None = None
build_info: dict[str, str] = {}

try:
    from . import _C

    build_info = _C.build_info()
    if build_info["problem"]:
        raise ImportError(build_info["problem"])
except (ImportError, OSError) as error:
    native_error = (
        "the compiled library driftar_kernels._C did not load with "
        f"PyTorch {torch.__version__}: {error}"
    )
    warnings.warn(
        f"driftar_kernels: {native_error}. The slower reference backend runs instead; "
        "reinstall with `pip install -e .` to build the kernels for this PyTorch.",
        stacklevel=3,
    )


TRITON_SUFFIX = "_triton"

_fragment = torch.library.Library(NAMESPACE, "FRAGMENT")


def _variants() -> tuple[str, ...]:
    """Name suffixes under which every operator is registered."""
    return (TRITON_SUFFIX,) if native_error else ("", TRITON_SUFFIX)


def register_fake(op: str, fake: Callable[..., Any], mutates: tuple[str, ...] = ()) -> None:
    """Attach the shape function of an operator, and derive the operator's Triton twin from it.

    The signature of ``fake`` is the operator's schema, so the twin exists whether or not the
    compiled library does. ``mutates`` names the arguments that are written in place.
    """
    twin = op + TRITON_SUFFIX
    _fragment.define(torch.library.infer_schema(fake, mutates_args=mutates, op_name=twin))
    for device in ("CPU", "CUDA"):
        _fragment.impl(twin, _triton_launcher(op), device)
    for suffix in _variants():
        torch.library.register_fake(f"{NAMESPACE}::{op}{suffix}", fake)


def register_autograd(
    op: str,
    backward: Callable[..., Any],
    setup_context: Callable[..., None] | None = None,
    *,
    backward_op: str | None = None,
) -> None:
    """Attach the gradient formula of an operator; ``backward`` gets the variant of
    ``backward_op``, where one is named, as its first argument.
    """
    for suffix in _variants():
        formula = partial(backward, f"{backward_op}{suffix}") if backward_op else backward
        torch.library.register_autograd(
            f"{NAMESPACE}::{op}{suffix}", formula, setup_context=setup_context
        )


def _triton_launcher(op: str) -> Callable[..., Any]:
    def launch(*arguments: Any) -> Any:
        from . import triton  # takes a while to import, and nobody else needs it

        device = next(x.device for x in arguments if isinstance(x, torch.Tensor))
        guard = torch.cuda.device(device) if device.type == "cuda" else nullcontext()
        with guard:
            return getattr(triton, op)(*arguments)

    return launch


def operator(op: str, backend: str) -> Any:
    """The registered operator that ``backend`` runs."""
    return native(op + TRITON_SUFFIX if backend == "triton" else op)


def native(op: str) -> Any:
    """The registered operator, as ``torch.ops.driftar.<op>``."""
    return getattr(getattr(torch.ops, NAMESPACE), op).default


def define_reference(op: str, function: Callable[..., Any], fake: Callable[..., Any]) -> None:
    """Register plain PyTorch code as an opaque operator, for control flow that cannot be traced."""
    custom = torch.library.custom_op(f"{NAMESPACE}::{op}", function, mutates_args=())
    custom.register_fake(fake)
