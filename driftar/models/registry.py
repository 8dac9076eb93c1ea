"""Models by name: published sizes and tiny ones for small images."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from .drift_ar import DriftAR
from .mar import MAR
from .mar_backbone import MARBackbone
from .nextstep import NextStep
from .nextstep_config import NEXTSTEP


def _mar_size(
    width: int, depth: int, heads: int, head_depth: int, head_width: int
) -> dict[str, Any]:
    return {
        "encoder_embed_dim": width,
        "encoder_depth": depth,
        "encoder_num_heads": heads,
        "decoder_embed_dim": width,
        "decoder_depth": depth,
        "decoder_num_heads": heads,
        "diffloss_d": head_depth,
        "diffloss_w": head_width,
    }


# 8x8 grey images in [-1, 1], modelled as 16 tokens of 2x2 pixels.
_MAR_TINY: dict[str, Any] = {
    "img_size": 8,
    "vae_stride": 1,
    "patch_size": 2,
    "vae_embed_dim": 1,
    "encoder_embed_dim": 64,
    "encoder_depth": 2,
    "encoder_num_heads": 4,
    "decoder_embed_dim": 64,
    "decoder_depth": 3,
    "decoder_num_heads": 4,
    "class_num": 10,
    "buffer_size": 4,
    "dropout": 0.0,
    "latent_scale": 1.0,
    "diffloss_d": 3,
    "diffloss_w": 96,
    "clip_denoised": 1.0,
}
_HEAD_OPTIONS = ("diffloss_d", "diffloss_w", "clip_denoised")

_MAR: dict[str, dict[str, Any]] = {
    "mar_tiny": _MAR_TINY,
    "mar_base": _mar_size(768, 12, 12, 6, 1024),
    "mar_large": _mar_size(1024, 16, 16, 8, 1280),
    "mar_huge": _mar_size(1280, 20, 16, 12, 1536),
}


def backbone_config(config: dict[str, Any]) -> dict[str, Any]:
    """The part of a MAR's configuration that describes its backbone."""
    return {key: value for key, value in config.items() if key not in _HEAD_OPTIONS}


_DRIFT_AR_MAR: dict[str, dict[str, Any]] = {
    "drift_ar_mar_tiny": {
        "backbone": backbone_config(_MAR_TINY),
        "drift_depth": 2,
        "drift_num_heads": 4,
        "draft_depth": 2,
        "draft_num_heads": 4,
        "dropout": 0.0,
    },
}


def _build_drift_ar_mar(backbone: dict[str, Any], **options: Any) -> DriftAR:
    return DriftAR(MARBackbone(**backbone), **options)


_BUILDERS: dict[str, tuple[Callable[..., nn.Module], dict[str, Any]]] = {
    **{name: (MAR, config) for name, config in _MAR.items()},
    **{name: (NextStep, config) for name, config in NEXTSTEP.items()},
    **{name: (_build_drift_ar_mar, config) for name, config in _DRIFT_AR_MAR.items()},
}


def known_models() -> tuple[str, ...]:
    """The names that :func:`build_model` takes."""
    return tuple(_BUILDERS)


def model_class(name: str) -> type[nn.Module]:
    """Class of the models of a name.

    Raises:
        ValueError: an unknown name.
    """
    if name in _MAR:
        return MAR
    if name in _DRIFT_AR_MAR:
        return DriftAR
    if name in NEXTSTEP:
        return NextStep
    raise _unknown(name)


def _unknown(name: str) -> ValueError:
    return ValueError(f"name must be one of {', '.join(known_models())}; got {name!r}")


def build_model(name: str, **overrides: Any) -> Any:
    """A freshly initialised model.

    ``build_model(model.name, **model.config)`` builds the same architecture again.

    Args:
        name: one of :func:`known_models`.
        overrides: constructor arguments that replace those of the name; a dict ("backbone") is
            merged.

    Returns:
        The model, in training mode, with ``name`` and ``config`` (a JSON-able dict).

    Raises:
        ValueError: an unknown name or an argument out of range.
        TypeError: an argument the model does not have.
    """
    if name not in _BUILDERS:
        raise _unknown(name)
    builder, defaults = _BUILDERS[name]
    options = dict(defaults)
    for key, value in overrides.items():
        base = options.get(key)
        merge = isinstance(base, dict) and isinstance(value, dict)
        options[key] = {**base, **value} if merge else value  # type: ignore[dict-item]
    model = builder(**options)
    model.name = name  # type: ignore[assignment]
    return model
