"""Model families by name: published sizes, tiny ones for small images, official checkpoints."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from . import sizes
from .drift_ar import DriftAR
from .drift_ar_mar import DriftARMAR
from .mar import MAR
from .mar_backbone import MARBackbone
from .nextstep import NextStep
from .nextstep_config import NEXTSTEP_TINY
from .official_format import (
    OfficialFormat,
    architecture,
    with_feature_map,
    without_loss,
)
from .transdiff import TransDiff
from .transdiff_mrar import TransDiffMRAR
from .vae import AutoencoderKL


@dataclass(frozen=True)
class Family:
    """Models of one class.

    Attributes:
        model: their class.
        sizes: constructor arguments by name.
        official: how official checkpoints are read; None where none exist.
        build: called with the constructor arguments; the class itself by default.
    """

    model: type[nn.Module]
    sizes: Mapping[str, Mapping[str, Any]]
    official: OfficialFormat | None = None
    build: Callable[..., nn.Module] | None = None


def _build_drift_ar_mar(backbone: dict[str, Any], **options: Any) -> DriftARMAR:
    return DriftARMAR(MARBackbone(**backbone), **options)


FAMILIES: dict[str, Family] = {
    "mar": Family(MAR, sizes.MAR, OfficialFormat(architecture)),
    "transdiff": Family(TransDiff, sizes.TRANSDIFF, OfficialFormat(architecture)),
    "transdiff_mrar": Family(TransDiffMRAR, sizes.TRANSDIFF_MRAR, OfficialFormat(architecture)),
    "drift_ar": Family(DriftAR, sizes.DRIFT_AR, OfficialFormat(architecture, with_feature_map)),
    "drift_ar_mar": Family(DriftARMAR, sizes.DRIFT_AR_MAR, build=_build_drift_ar_mar),
    "nextstep_1": Family(
        NextStep,
        {"nextstep_1_tiny": NEXTSTEP_TINY},
        OfficialFormat(NextStep.config_of, NextStep.parameters_of),
    ),
    "autoencoder_kl": Family(
        AutoencoderKL, sizes.AUTOENCODER_KL, OfficialFormat(state=without_loss)
    ),
}


def known_models() -> tuple[str, ...]:
    """The names of sizes that :func:`build_model` takes."""
    return tuple(name for family in FAMILIES.values() for name in family.sizes)


def find_family(name: str) -> tuple[Family, dict[str, Any]]:
    """Family of a size's or a family's name, and the size's constructor arguments.

    Raises:
        ValueError: an unknown name.
    """
    for key, family in FAMILIES.items():
        if name in family.sizes:
            return family, dict(family.sizes[name])
        if name == key:
            return family, {}
    raise ValueError(f"name must be one of {', '.join(known_models())}; got {name!r}")


def model_class(name: str) -> type[nn.Module]:
    """Class of the models of a name; ValueError for an unknown one."""
    return find_family(name)[0].model


def build_model(name: str, **overrides: Any) -> Any:
    """A freshly initialised model.

    ``build_model(model.name, **model.config)`` builds the same architecture again.

    Args:
        name: one of :func:`known_models`, or a family ("mar") for its class's own defaults.
        overrides: constructor arguments that replace those of the name; a dict ("backbone") is
            merged.

    Returns:
        The model, in training mode, with ``name`` and ``config`` (a JSON-able dict).

    Raises:
        ValueError: an unknown name or an argument out of range.
        TypeError: an argument the model does not have.
    """
    family, options = find_family(name)
    for key, value in overrides.items():
        base = options.get(key)
        merge = isinstance(base, dict) and isinstance(value, dict)
        options[key] = {**base, **value} if merge else value  # type: ignore[dict-item]
    model = (family.build or family.model)(**options)
    model.name = name  # type: ignore[assignment]
    return model
