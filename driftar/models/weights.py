"""Weights from files that others wrote: nothing in them is trusted, and nothing in them is run.

torch.save archives are read with ``weights_only=True`` and safetensors hold no code at all.
"""

from __future__ import annotations

import argparse
import json
import os
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

TORCH_SUFFIXES = (".pth", ".pt", ".bin", ".ckpt")
INDEX_SUFFIX = ".safetensors.index.json"
# Where a training checkpoint keeps its weights, the averaged ones first.
ENTRIES = ("model_ema", "model", "state_dict")
# An index is some hundred kilobytes; the cap keeps a foreign file from filling the memory.
MAX_JSON_BYTES = 64 << 20


class WeightsError(ValueError):
    """Weights that cannot be read or do not fit: where they came from and why."""

    def __init__(self, source: object, cause: str) -> None:
        super().__init__(f"{source}: {cause}")
        self.source = str(source)
        self.cause = cause


def read_weights(source: str | os.PathLike[str] | Mapping[str, Any]) -> dict[str, Tensor]:
    """The tensors of a checkpoint by name, on the CPU.

    Args:
        source: a state dict or a checkpoint that holds one, or the path of a .pth, .pt, .bin or
            .ckpt file, of a safetensors file, of the index of a sharded one, or of a directory
            with exactly one of these. Of a training checkpoint the averaged weights ("model_ema")
            are taken where it has them, else "model" or "state_dict".

    Raises:
        WeightsError: missing, truncated, corrupt or hostile files, and entries that are no tensors.
    """
    if isinstance(source, Mapping):
        return _tensors("state_dict", source)
    path = Path(source)
    try:
        found = _weights_file(path) if path.is_dir() else path
        if found.name.endswith(INDEX_SUFFIX):
            return _read_shards(found)
        if found.suffix == ".safetensors":
            return _read_safetensors(found)
        if found.suffix in TORCH_SUFFIXES:
            return _read_torch(found)
    except OSError as error:
        raise WeightsError(path, f"cannot be read: {error.strerror or error}") from error
    known = ", ".join((*TORCH_SUFFIXES, ".safetensors", INDEX_SUFFIX))
    raise WeightsError(path, f"is of no known kind of weights; known are {known} and directories")


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object; WeightsError for anything else."""
    try:
        if path.stat().st_size > MAX_JSON_BYTES:
            raise WeightsError(path, f"is larger than {MAX_JSON_BYTES} bytes")
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise WeightsError(path, f"cannot be read: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        if isinstance(error, WeightsError):
            raise
        raise WeightsError(path, f"is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise WeightsError(path, "is not a JSON object")
    return value


def _weights_file(directory: Path) -> Path:
    names = sorted(entry.name for entry in directory.iterdir() if entry.is_file())
    for suffixes in ((INDEX_SUFFIX,), (".safetensors",), TORCH_SUFFIXES):
        matching = [name for name in names if name.endswith(suffixes)]
        if len(matching) > 1:
            raise WeightsError(directory, f"holds several weights, name one: {', '.join(matching)}")
        if matching:
            return directory / matching[0]
    raise WeightsError(directory, "holds no weights")


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        tensors: dict[str, Tensor] = load_file(path)
    except (SafetensorError, ValueError) as error:
        raise WeightsError(path, f"is not a readable safetensors file: {error}") from error
    return tensors


def _read_shards(index: Path) -> dict[str, Tensor]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise WeightsError(index, "has no weight_map")
    for name in weight_map.values():
        if not isinstance(name, str) or Path(name).name != name or name in ("", ".", ".."):
            raise WeightsError(index, f"names the shard {name!r}, which is not a plain file name")
    tensors: dict[str, Tensor] = {}
    for name in dict.fromkeys(weight_map.values()):
        shard = _read_safetensors(index.parent / name)
        promised = {key for key, file in weight_map.items() if file == name}
        if promised != shard.keys():
            raise WeightsError(
                index.parent / name,
                "holds other tensors than its index says: "
                f"{', '.join(sorted(promised ^ shard.keys()))}",
            )
        tensors |= shard
    return tensors


def _read_torch(path: Path) -> dict[str, Tensor]:
    size = path.stat().st_size
    if not zipfile.is_zipfile(path):
        raise WeightsError(
            path, "is no archive of torch.save: truncated, corrupt, or older than PyTorch 1.6"
        )
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
        # torch.save stores its members as they are: a compressed one could unpack to any size.
        stored = all(member.compress_type == zipfile.ZIP_STORED for member in members)
        if not stored or sum(member.file_size for member in members) > size:
            raise WeightsError(path, "is no archive of torch.save: it has compressed members")
        # Training checkpoints keep their command line, a plain record of strings and numbers.
        with torch.serialization.safe_globals([argparse.Namespace]):
            value = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (OSError, WeightsError):
        raise
    except Exception as error:  # whatever a broken or hostile file makes the reader raise
        reason = str(error).strip().splitlines()
        raise WeightsError(
            path,
            "is corrupt, or holds objects other than tensors and plain containers: "
            f"{reason[0] if reason else type(error).__name__}",
        ) from error
    if not isinstance(value, Mapping):
        raise WeightsError(path, f"holds a {type(value).__name__}, not a state dict")
    return _tensors(path, value)


def _tensors(source: object, value: Mapping[Any, Any]) -> dict[str, Tensor]:
    """The state dict in a checkpoint, or the checkpoint itself where it is one."""
    for entry in ENTRIES:
        if isinstance(value.get(entry), Mapping) and value[entry]:
            value = value[entry]
            break
    foreign = [
        f"{key!r} ({type(tensor).__name__})"
        for key, tensor in value.items()
        if not isinstance(key, str) or not _is_plain(tensor)
    ]
    if foreign:
        raise WeightsError(source, f"holds entries that are no plain tensors: {', '.join(foreign)}")
    return dict(value)


def _is_plain(value: Any) -> bool:
    return (
        isinstance(value, Tensor)
        and value.layout is torch.strided
        and not value.is_quantized
        and value.device.type != "meta"
    )
