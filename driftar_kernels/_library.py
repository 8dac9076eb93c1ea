"""Loads the compiled operators and attaches what only Python can give them: fakes and autograd.

Importing the package never fails because the compiled library does not load: the reason is kept in
``native_error``, reported once, and raised when a native backend is asked for by name.
"""

from __future__ import annotations

import importlib.util
import inspect
import os
import warnings
from collections.abc import Callable, Iterable, Iterator
from functools import partial
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
    _direct_call: Callable[..., Any] = _C.direct_call
except (ImportError, OSError, AttributeError) as error:  # the last: built from older sources
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
# Settled before the first call, so that torch.compile sees constants.
TRITON_INSTALLED = importlib.util.find_spec("triton") is not None
TRITON_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

_operators: dict[str, Any] = {}


def register_fake(
    op: str, fake: Callable[..., Any], *, mutates: tuple[str, ...] = (), twin: bool = True
) -> None:
    """Attach the shape function of an operator, and derive the operator's Triton twin from it.

    The signature of ``fake`` is the operator's schema, so the twin exists whether or not the
    compiled library does. ``mutates`` names the arguments that are written in place; without
    ``twin`` the operator is native only.
    """
    if twin:
        _define_twin(op, fake, mutates)
    if native_error is None:
        torch.library.register_fake(f"{NAMESPACE}::{op}", fake)
    for suffix in _variants(native=True, twin=twin):
        native(op + suffix)  # found now: a traced backward pass must not change the cache


def register_autograd(
    op: str,
    backward: Callable[..., Any],
    setup_context: Callable[..., None] | None = None,
    *,
    backward_op: str | None = None,
    native: bool = True,
) -> None:
    """Attach the gradient formula of an operator; ``backward`` gets the variant of
    ``backward_op``, where one is named, as its first argument. Without ``native`` only the Triton
    twin gets it.
    """
    for suffix in _variants(native=native, twin=True):
        formula = partial(backward, f"{backward_op}{suffix}") if backward_op else backward
        torch.library.register_autograd(
            f"{NAMESPACE}::{op}{suffix}", formula, setup_context=setup_context
        )


def _variants(*, native: bool, twin: bool) -> list[str]:
    """Suffixes of the names under which an operator is registered."""
    built = native and native_error is None
    return ([""] if built else []) + ([TRITON_SUFFIX] if twin else [])


def _define_twin(op: str, fake: Callable[..., Any], mutates: tuple[str, ...]) -> None:
    """Compilers see through the twin, to the launches of its kernels. Where these are interpreted,
    or missing, there is nothing that they could compile, and the twin is opaque."""

    def launch(*arguments: Any) -> Any:
        from . import triton  # takes a while to import, and nobody else needs it

        return getattr(triton, op)(*arguments)

    launch.__signature__ = inspect.signature(fake, eval_str=True)  # type: ignore[attr-defined]
    name = f"{NAMESPACE}::{op}{TRITON_SUFFIX}"
    compiled = TRITON_INSTALLED and not TRITON_INTERPRETED
    define: Any = torch.library.triton_op if compiled else torch.library.custom_op
    define(name, launch, mutates_args=mutates).register_fake(fake)
    if compiled:
        # PyTorch fills this for operators whose source names their kernels, as ours do not.
        from torch._library.triton import triton_ops_to_kernels

        triton_ops_to_kernels[name] = _TritonKernels()


class _TritonKernels(list[object]):
    """All kernels of the package, found when they are asked for: compiled code that is kept on disk
    goes by their sources."""

    def __iter__(self) -> Iterator[object]:
        from . import triton

        return iter(triton.kernels())


def operator(op: str, backend: str) -> Any:
    """The registered operator that ``backend`` runs."""
    return native(op + TRITON_SUFFIX if backend == "triton" else op)


def native(op: str) -> Any:
    """The registered operator, as ``torch.ops.driftar.<op>``."""
    found = _operators.get(op)
    if found is None:
        found = _operators[op] = getattr(getattr(torch.ops, NAMESPACE), op).default
    return found


def direct(op: str, result: type | None = None) -> Callable[..., Any]:
    """The C++ operator as a function that stays in C++ (csrc/python/direct_call.h); ``result`` is
    the type of named tuples that it returns.

    It returns None, having done nothing, where a call is not for it; always, where nothing was
    built.
    """
    return _no_direct_call if native_error is not None else _direct_call(op, result)


def _no_direct_call(*arguments: Any) -> None:
    return None


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


def differentiates(x: torch.Tensor) -> bool:
    """Whether a call on ``x`` must carry a derivative, backward or forward."""
    return (x.requires_grad and torch.is_grad_enabled()) or forward_ad._current_level >= 0


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
