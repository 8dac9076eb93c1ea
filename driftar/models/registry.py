"""Model families by name: published sizes, tiny ones for small images, official checkpoints."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor, nn

from . import sizes
from .drift_ar import DriftAR
from .drift_ar_mar import DriftARMAR
from .mar import MAR
from .mar_backbone import MARBackbone
from .transdiff import TransDiff
from .transdiff_mrar import TransDiffMRAR
from .vae import AutoencoderKL

State = dict[str, Tensor]


def _same_state(state: State) -> State:
    return state


@dataclass(frozen=True)
class OfficialFormat:
    """How a family's published checkpoints and constructors map to ours.

    Attributes:
        renamed: constructor arguments that we call otherwise, official name to ours.
        ignored: constructor arguments that describe training or sampling, not the model.
        state: from the official state dict to ours.
    """

    renamed: Mapping[str, str] = field(default_factory=dict)
    ignored: frozenset[str] = frozenset()
    state: Callable[[State], State] = _same_state

    def config(self, official: Mapping[str, Any]) -> dict[str, Any]:
        """Our constructor arguments for official ones."""
        return {
            self.renamed.get(key, key): value
            for key, value in official.items()
            if key not in self.ignored
        }


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


def _with_feature_map(state: State) -> State:
    """Drift-AR's checkpoints may leave out phi, which is a copy of the block before the last."""
    if any(key.startswith("feature_encoder.") for key in state):
        return state
    blocks = {int(key.split(".")[1]) for key in state if re.match(r"encoder_blocks\.\d+\.", key)}
    source = f"encoder_blocks.{max(blocks, default=0) - 1}."
    copies = {
        f"feature_encoder.block.{key.removeprefix(source)}": value
        for key, value in state.items()
        if key.startswith(source)
    }
    return {**state, **copies}


_TRAINING_ARGUMENTS = frozenset(
    {
        "attn_dropout",
        "diffusion_batch_mul",
        "grad_checkpointing",
        "label_drop_prob",
        "mask_ratio_min",
        "num_sampling_steps",
    }
)
_OFFICIAL = OfficialFormat(renamed={"proj_dropout": "dropout"}, ignored=_TRAINING_ARGUMENTS)


def _without_loss(state: State) -> State:
    """Autoencoders are trained together with the networks of their loss."""
    return {key: value for key, value in state.items() if not key.startswith("loss.")}


FAMILIES: dict[str, Family] = {
    "mar": Family(MAR, sizes.MAR, _OFFICIAL),
    "transdiff": Family(TransDiff, sizes.TRANSDIFF, _OFFICIAL),
    "transdiff_mrar": Family(TransDiffMRAR, sizes.TRANSDIFF_MRAR, _OFFICIAL),
    "drift_ar": Family(DriftAR, sizes.DRIFT_AR, replace(_OFFICIAL, state=_with_feature_map)),
    "drift_ar_mar": Family(DriftARMAR, sizes.DRIFT_AR_MAR, build=_build_drift_ar_mar),
    "autoencoder_kl": Family(
        AutoencoderKL, sizes.AUTOENCODER_KL, OfficialFormat(state=_without_loss)
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
