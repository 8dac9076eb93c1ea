"""How official checkpoints and constructors map to ours, family by family."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

State = dict[str, Tensor]

# Arguments of the official constructors that describe training and sampling, not the model.
_TRAINING_ARGUMENTS = frozenset(
    {
        "R_list",
        "attn_dropout",
        "diffusion_batch_mul",
        "grad_checkpointing",
        "label_drop_prob",
        "mask_ratio_min",
        "norm_layer",
        "num_sampling_steps",
    }
)
_RENAMED_ARGUMENTS = {"proj_dropout": "dropout"}


def _unchanged(state: State) -> State:
    return state


@dataclass(frozen=True)
class OfficialFormat:
    """How a family's published constructors and checkpoints map to ours.

    Attributes:
        config: from official constructor arguments (or a config.json) to our arguments.
        state: from the official state dict to ours.
    """

    config: Callable[[Mapping[str, Any]], dict[str, Any]] = dict
    state: Callable[[State], State] = _unchanged


def architecture(config: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of MAR, TransDiff and Drift-AR that shape the network."""
    return {
        _RENAMED_ARGUMENTS.get(key, key): value
        for key, value in config.items()
        if key not in _TRAINING_ARGUMENTS
    }


def with_feature_map(state: State) -> State:
    """Drift-AR's checkpoints may leave out phi, which is a copy of the block before the last."""
    if any(key.startswith("feature_encoder.") for key in state):
        return state
    blocks = {
        int(key.split(".")[1]) for key in state if re.match(r"encoder_blocks\.\d{1,4}\.", key)
    }
    source = f"encoder_blocks.{max(blocks, default=0) - 1}."
    copies = {
        f"feature_encoder.block.{key.removeprefix(source)}": value
        for key, value in state.items()
        if key.startswith(source)
    }
    return {**state, **copies}


def without_loss(state: State) -> State:
    """Autoencoders are trained together with the networks of their loss."""
    return {key: value for key, value in state.items() if not key.startswith("loss.")}
