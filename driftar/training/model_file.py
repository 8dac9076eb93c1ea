"""A trained model on its own: weights, name and configuration in one small directory.

`save_model` and `load_model` are what sampling and publishing use; a training run's complete state
is the business of `driftar.training.checkpoint`.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch import nn

from driftar.files import fsync_directory, sha256_file
from driftar.training.checkpoint import describe_module, raise_differences
from driftar.training.manifest import CheckpointError, read_manifest, write_manifest
from driftar.training.state_codec import read_tensors, tensor_differences, write_tensors

__all__ = ["load_model", "save_model"]

_KIND = "model"


def save_model(path: Path | str, model: nn.Module, **notes: Any) -> None:
    """Write `model` (with a registered `name` and a JSON-able `config`) to the directory `path`.

    The weights' file is named after its own hash and the manifest is replaced last, in one
    rename: a directory that held a model holds the old one or the new one at every moment.
    notes: further JSON-able manifest entries (step, seed, ...). Raises TypeError for a model
    without name or config, CheckpointError if it cannot be written.
    """
    directory = Path(path)
    description = describe_module(model)
    if description["name"] is None or description["config"] is None:
        raise TypeError(
            f"model must have a name (str) and a config (dict) to be rebuilt from, "
            f"{description['class']} has not"
        )
    temporary = directory / f".weights.tmp-{os.getpid()}"
    try:
        directory.mkdir(parents=True, exist_ok=True)
        write_tensors(temporary, model.state_dict())
        weights = f"weights-{sha256_file(temporary)[:16]}.safetensors"
        os.replace(temporary, directory / weights)
        write_manifest(directory, _KIND, [weights], {"model": description, "notes": notes})
        fsync_directory(directory)
        for old in directory.glob("weights-*.safetensors"):
            if old.name != weights:
                old.unlink()
        for old in directory.glob(".weights.tmp-*"):
            old.unlink()
    except (OSError, SafetensorError) as error:
        temporary.unlink(missing_ok=True)
        raise CheckpointError(directory, f"cannot be written: {error}") from error


def load_model(path: Path | str) -> nn.Module:
    """Rebuild the model in the directory `path` through `driftar.build_model`, in eval mode.

    Raises CheckpointError for a damaged or foreign directory, an unknown model name or a
    configuration that does not build, and ArchitectureError, with the first ten differing keys,
    when weights and configuration do not fit each other (names, shapes or dtypes).
    """
    import driftar

    directory = Path(path)
    manifest = read_manifest(directory, _KIND)
    description = manifest.get("model")
    if not isinstance(description, dict) or not isinstance(description.get("config"), dict):
        raise CheckpointError(directory, "its manifest does not describe a model")
    if len(manifest["files"]) != 1:
        raise CheckpointError(directory, "its manifest must list exactly one file of weights")
    (weights,) = manifest["files"]
    tensors = read_tensors(directory / weights)
    try:
        model: nn.Module = driftar.build_model(description["name"], **description["config"])
    except (TypeError, ValueError) as error:
        raise CheckpointError(directory, f"its model cannot be built: {error}") from error
    raise_differences(directory, tensor_differences(model.state_dict(), tensors))
    model.load_state_dict(tensors, strict=True)
    return model.eval()
