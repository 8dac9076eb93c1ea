"""Loads the compiled operators and attaches what only Python can give them: fakes and autograd.

Importing the package never fails because the compiled library does not load: the reason is kept in
``native_error``, reported once, and raised when a native backend is asked for by name.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.autograd.forward_ad as forward_ad

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


_operators: dict[str, Any] = {}


def register_fake(op: str, function: Callable[..., Any]) -> None:
    """Attach the shape function of a native operator, if it was built."""
    if native_error is None:
        torch.library.register_fake(f"{NAMESPACE}::{op}", function)


def register_autograd(
    op: str,
    backward: Callable[..., Any],
    setup_context: Callable[..., None] | None = None,
) -> None:
    """Attach the gradient formula of a native operator, if it was built."""
    if native_error is None:
        torch.library.register_autograd(f"{NAMESPACE}::{op}", backward, setup_context=setup_context)


def native(op: str) -> Any:
    """The registered operator, as ``torch.ops.driftar.<op>``."""
    found = _operators.get(op)
    if found is None:
        found = _operators[op] = getattr(getattr(torch.ops, NAMESPACE), op).default
    return found


def call(operator: Any, *arguments: Any) -> Any:
    """Run a differentiable operator, past its autograd formula where nothing needs it.

    The formula is Python, and passing it costs as much as several ATen calls.

    Raises:
        NotImplementedError: an argument carries a forward derivative, which would be lost.
    """
    if torch.compiler.is_compiling():
        return operator(*arguments)
    if forward_ad._current_level >= 0:
        _refuse_tangents(operator, arguments)
    if torch.is_grad_enabled():
        for x in arguments:
            if isinstance(x, torch.Tensor) and x.requires_grad:
                return operator(*arguments)
    with torch._C._AutoDispatchBelowAutograd():
        return operator(*arguments)


def _refuse_tangents(operator: Any, arguments: Iterable[Any]) -> None:
    for x in arguments:
        if isinstance(x, torch.Tensor) and forward_ad.unpack_dual(x).tangent is not None:
            raise NotImplementedError(
                f"{operator.name()}: forward derivatives are not provided by this backend; "
                "use_backend('reference') computes them"
            )


def define_reference(op: str, function: Callable[..., Any], fake: Callable[..., Any]) -> None:
    """Register plain PyTorch code as an opaque operator, for control flow that cannot be traced."""
    custom = torch.library.custom_op(f"{NAMESPACE}::{op}", function, mutates_args=())
    custom.register_fake(fake)
