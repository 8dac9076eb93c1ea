"""Watches which ``driftar::`` operators a call reaches, and with which arguments."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch.utils._python_dispatch import TorchDispatchMode

NAMESPACE = "driftar::"


class Call(NamedTuple):
    """One operator call."""

    operator: Any
    arguments: tuple[Any, ...]
    keywords: dict[str, Any]


class Recorder(TorchDispatchMode):
    """Collects the operator calls of the package that happen inside it."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Call] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        keywords = kwargs or {}
        if func.name().startswith(NAMESPACE):
            copies = torch.utils._pytree.tree_map_only(
                torch.Tensor, lambda t: t.detach().clone(), (args, keywords)
            )
            self.calls.append(Call(func, *copies))
        return func(*args, **keywords)


def record(function: Callable[[], Any]) -> list[Call]:
    """The operator calls of the package that ``function`` makes."""
    with Recorder() as recorder:
        function()
    return recorder.calls


def native_operators(function: Callable[[], Any]) -> set[str]:
    """Names of the compiled operators that ``function`` reaches, opaque reference ones aside."""
    names = {
        call.operator.name().removeprefix(NAMESPACE).split(".")[0] for call in record(function)
    }
    return {name for name in names if not name.endswith("_reference")}


def registered() -> set[str]:
    """Names of all operators that the package has registered."""
    return {
        name.removeprefix(NAMESPACE)
        for name in torch._C._dispatch_get_all_op_names()
        if name.startswith(NAMESPACE)
    }
