"""Which backend runs an operator, and why another one does not.

Every backend answers with reasons. The same text is shown by ``python -m driftar_kernels``,
raised when a backend is asked for by name, and consulted by the default order: nothing falls
back silently.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType

import torch

from . import _library

ENVIRONMENT_VARIABLE = "DRIFTAR_KERNELS_BACKEND"


@dataclass(frozen=True)
class Backend:
    """A way of running the operators.

    Attributes:
        name: what users pass to :func:`use_backend`.
        description: one line for people.
        devices: device types whose tensors it takes.
        missing: why it cannot run in this process, or None when it can.
    """

    name: str
    description: str
    devices: tuple[str, ...]
    missing: Callable[[], str | None]

    def unsupported_reason(self, device: torch.device) -> str | None:
        """Why tensors on ``device`` cannot be given to this backend; None when they can."""
        reason = self.missing()
        if reason is None and device.type not in self.devices:
            reason = f"it takes {' and '.join(self.devices)} tensors, not {device.type} tensors"
        return reason


def _cpu_missing() -> str | None:
    return _library.native_error


def _cuda_missing() -> str | None:
    if _library.native_error is not None:
        return _library.native_error
    if not _library.build_info.get("cuda_architectures"):
        return "this build contains no CUDA kernels"
    if not torch.cuda.is_available():
        return "there is no CUDA device"
    return None


def _triton_missing() -> str | None:
    if not _library.TRITON_INSTALLED:
        return "the package triton is not installed"
    if not _library.TRITON_INTERPRETED and not torch.cuda.is_available():
        return "there is no CUDA device (TRITON_INTERPRET=1 runs its kernels on the CPU, slowly)"
    return None


BACKENDS: dict[str, Backend] = {
    backend.name: backend
    for backend in (
        Backend("cpu", "C++, vectorised, multi-threaded", ("cpu",), _cpu_missing),
        Backend("cuda", "CUDA C++", ("cuda",), _cuda_missing),
        Backend(
            "triton",
            "Triton (interpreted)" if _library.TRITON_INTERPRETED else "Triton",
            ("cpu", "cuda") if _library.TRITON_INTERPRETED else ("cuda",),
            _triton_missing,
        ),
        Backend("reference", "plain PyTorch", ("cpu", "cuda", "meta"), lambda: None),
    )
}

_CPP = (None, "cpu")  # choices that end in the C++ operators
# Tensors of other traces are of subclasses, or seen by modes: direct calls leave them.
_is_traced = torch.compiler.is_dynamo_compiling

# The documented order: the first backend that takes a device's tensors runs them.
DEFAULT_ORDER: dict[str, tuple[str, ...]] = {"cpu": ("cpu", "reference"), "cuda": ("reference",)}


class _Choice(threading.local):
    """The explicit choice of this thread. A plain attribute, which torch.compile guards on."""

    name: str | None = None


_choice = _Choice()


def _known(name: str, source: str) -> Backend:
    if name not in BACKENDS:
        raise ValueError(f"{source}: unknown backend {name!r}; known are {', '.join(BACKENDS)}")
    return BACKENDS[name]


def available_backends() -> list[str]:
    """Names of the backends that can run in this process now."""
    return [name for name, backend in BACKENDS.items() if backend.missing() is None]


class use_backend:
    """Choose the backend by name, for the calling thread.

    A call sets it until the next call; a ``with`` block restores the previous choice at its end::

        use_backend("reference")
        with use_backend("cpu"):
            ...

    The environment variable ``DRIFTAR_KERNELS_BACKEND`` sets the choice of a whole process.
    ``use_backend(None)`` returns to the default order.

    Raises:
        ValueError: no such backend.
        RuntimeError: it cannot run here; the message says why.
    """

    def __init__(self, name: str | None) -> None:
        if name is not None:
            reason = _known(name, "use_backend").missing()
            if reason is not None:
                raise RuntimeError(f"use_backend: backend {name!r} is not available: {reason}")
        self.previous = _choice.name
        _choice.name = name

    def __enter__(self) -> use_backend:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        _choice.name = self.previous


def _process_choice() -> str | None:
    name = os.environ.get(ENVIRONMENT_VARIABLE) or None
    if name is not None:
        _known(name, ENVIRONMENT_VARIABLE)
    return name


_process_default = _process_choice()


def calls_cpp() -> bool:
    """Whether CPU tensors may go straight to the C++ operators (``_library.direct``), past all that
    takes longer than a small call: nothing traces it, and nothing else was chosen.
    """
    return not _is_traced() and (_choice.name or _process_default) in _CPP


def select(op: str, device: torch.device) -> str:
    """The backend that runs ``op`` on tensors of ``device``.

    Raises:
        RuntimeError: the explicitly chosen backend cannot run this call, with the reason.
    """
    name = _choice.name or _process_default
    if name is not None:
        reason = BACKENDS[name].unsupported_reason(device)
        if reason is not None:
            raise RuntimeError(f"{op}: backend {name!r} cannot run this call: {reason}")
        return name
    for name in DEFAULT_ORDER.get(device.type, ("reference",)):
        if BACKENDS[name].missing() is None:
            return name
    return "reference"
