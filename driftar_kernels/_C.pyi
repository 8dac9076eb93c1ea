from collections.abc import Callable
from typing import Any

def build_info() -> dict[str, str]:
    """Versions and instruction sets of this build."""

def direct_call(name: str, result: type | None = None) -> Callable[..., Any]:
    """An operator as a function that stays in C++."""
