"""State as safetensors and JSON: nested values, random number generators, tensor files.

Nothing here is pickled, so that loading a checkpoint can never run code.
"""

from __future__ import annotations

import os
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from driftar.training.manifest import CheckpointError

__all__ = [
    "capture_random_state",
    "decode_tree",
    "encode_tree",
    "read_tensors",
    "restore_random_state",
    "tensor_differences",
    "write_tensors",
]


def encode_tree(value: Any, prefix: str, tensors: dict[str, Tensor]) -> Any:
    """Turn nested dicts, lists, tuples, tensors and scalars into JSON; tensors go to `tensors`.

    Keys of dicts may be strings or integers. Finite floats survive exactly, others as strings.
    Raises TypeError, naming the place, for anything else.
    """
    if isinstance(value, Tensor):
        tensors[prefix] = value
        return {"tensor": prefix}
    # bool is an int and numpy floats are floats: plain types only, so that they return unchanged.
    if value is None or type(value) in (bool, int, str):
        return value
    if type(value) is float:
        return {"float": value.hex()}
    if isinstance(value, Mapping):
        items = []
        for key, entry in value.items():
            if type(key) not in (str, int):
                raise TypeError(f"{prefix}: keys must be str or int, got {type(key).__name__}")
            items.append([key, encode_tree(entry, f"{prefix}.{key}", tensors)])
        return {"dict": items}
    if isinstance(value, list | tuple):
        entries = [encode_tree(entry, f"{prefix}.{i}", tensors) for i, entry in enumerate(value)]
        return {"list": entries} if isinstance(value, list) else {"tuple": entries}
    raise TypeError(f"{prefix}: cannot store a {type(value).__name__} in a checkpoint")


def decode_tree(code: Any, tensors: Mapping[str, Tensor]) -> Any:
    """The inverse of `encode_tree`; ValueError or KeyError for a code it did not write."""
    if code is None or isinstance(code, bool | int | str):
        return code
    if isinstance(code, dict) and len(code) == 1:
        ((kind, body),) = code.items()
        if kind == "tensor":
            return tensors[body]
        if kind == "float":
            return float.fromhex(body)
        if kind == "dict":
            return {key: decode_tree(entry, tensors) for key, entry in body}
        if kind in ("list", "tuple"):
            entries = [decode_tree(entry, tensors) for entry in body]
            return entries if kind == "list" else tuple(entries)
    raise ValueError(f"unknown entry {str(code)[:80]!r} in stored state")


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write a safetensors file; tensors that share memory are each stored in full."""
    # Clones: safetensors refuses views that share memory, and tied weights do.
    plain = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    save_file(plain, path)
    # safetensors creates its files 0600; a checkpoint should have the usual mode.
    umask = os.umask(0)
    os.umask(umask)
    path.chmod(0o666 & ~umask)


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Read a safetensors file; CheckpointError for a damaged or foreign one."""
    try:
        tensors: dict[str, Tensor] = load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(path, f"is not a readable safetensors file: {error}") from error
    return tensors


def tensor_differences(expected: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> list[str]:
    """How two state dicts differ, a line for each key: missing, unexpected, shape or dtype."""
    lines = [f"{key} is missing" for key in expected if key not in found]
    lines += [f"{key} is unexpected" for key in found if key not in expected]
    for key, want in expected.items():
        have = found.get(key)
        if have is None:
            continue
        if have.shape != want.shape:
            lines.append(f"{key} has shape {tuple(have.shape)}, expected {tuple(want.shape)}")
        elif have.dtype != want.dtype:
            lines.append(f"{key} has dtype {have.dtype}, expected {want.dtype}")
    return lines


def capture_random_state() -> dict[str, Any]:
    """The global generators of Python, NumPy and PyTorch (CPU and every CUDA device)."""
    version, words, gauss = random.getstate()
    # legacy=True: the five values that set_state takes, as a tuple.
    name, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    return {
        "python": [version, list(words), gauss],
        "numpy": [
            str(name),
            np.asarray(keys).tolist(),
            int(position),
            int(has_gauss),
            float(cached),
        ],
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def restore_random_state(state: Mapping[str, Any]) -> None:
    """Put back what `capture_random_state` returned."""
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    name, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((name, np.array(keys, dtype=np.uint32), position, has_gauss, cached))
    torch.set_rng_state(state["torch"])
    if torch.cuda.is_available() and len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["cuda"])
