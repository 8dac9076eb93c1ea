"""Packages that only some features need, imported where they are needed."""

from __future__ import annotations

import importlib
from typing import Any

__all__ = ["require"]


def require(package: str, extra: str, purpose: str) -> Any:
    """Import and return a package of the extra `extra`; ImportError that says how to get it."""
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise ImportError(
            f"{purpose} needs {package}: pip install 'driftar[{extra}]' ({error})"
        ) from error
