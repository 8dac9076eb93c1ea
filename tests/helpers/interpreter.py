"""Makes Triton's interpreter fit for a test suite."""

from __future__ import annotations

import os
from typing import Any

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def size(full: int, interpreted: int) -> int:
    """A dimension of a test case, smaller where every program is interpreted."""
    return interpreted if INTERPRETED else full


def hasten() -> None:
    """Prepare Triton's language once per launch.

    The interpreter patches ``triton.language`` again for every call of a device function, which
    takes most of its time. The launch around a call has done it for the package's functions, and
    Triton's own library stays patched once it is.
    """
    from triton.runtime import interpreter

    prepared: set[str] = set()

    def call(function: Any, *arguments: Any, **keywords: Any) -> Any:
        module = function.fn.__module__
        if module.startswith("triton.") and module not in prepared:
            interpreter._patch_lang(function.fn)
            prepared.add(module)
        return function.rewrite()(*arguments, **keywords)

    interpreter.InterpretedFunction.__call__ = call
