"""Drift-AR: autoregressive image models with a one-evaluation decoder, on ``driftar_kernels``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from driftar.models.official import load_official as load_official
    from driftar.models.registry import build_model as build_model
    from driftar.pipeline import Pipeline as Pipeline
    from driftar_kernels import __version__ as __version__

__all__ = ["Pipeline", "__version__", "build_model", "load_official"]


def __getattr__(name: str) -> Any:
    # Deferred, so that the command line can show its help without loading PyTorch.
    if name == "build_model":
        from driftar.models.registry import build_model

        return build_model
    if name == "Pipeline":
        from driftar.pipeline import Pipeline

        return Pipeline
    if name == "load_official":
        from driftar.models.official import load_official

        return load_official
    if name == "__version__":
        from driftar_kernels import __version__

        return __version__
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
