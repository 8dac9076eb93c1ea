"""A model's configuration: the arguments of its constructor."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def constructor_arguments(scope: dict[str, Any], *, without: Sequence[str] = ()) -> dict[str, Any]:
    """A constructor's keyword arguments: its ``locals()`` before anything was assigned."""
    dropped = {"self", "__class__", *without}
    return {key: value for key, value in scope.items() if key not in dropped}
