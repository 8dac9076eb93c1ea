"""Makes Triton's interpreter fit for a test suite."""

from __future__ import annotations

import os
from typing import Any

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def size(full: int, interpreted: int) -> int:
    """A dimension of a test case, smaller where every program is interpreted."""
    return interpreted if INTERPRETED else full


def hasten() -> None:
    """Patch Triton's language once.

    The interpreter patches it for every launch and every call of a device function, and restores it
    after the launch, which takes most of its time. Nothing in a process of tests needs the original
    back.
    """
    from triton.runtime import interpreter

    patch = interpreter._patch_lang
    patched: set[str] = set()

    def patch_once(function: Any) -> Any:
        if function.__module__ not in patched:
            patched.add(function.__module__)
            patch(function)
        return interpreter._LangPatchScope()  # restores nothing

    interpreter._patch_lang = patch_once
