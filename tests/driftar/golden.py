"""Published numbers: tensors computed by the official implementations, with their metadata."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

FOLDER = Path(__file__).parent.parent / "golden"


def tensors(name: str) -> dict[str, Tensor]:
    """All tensors of a golden file."""
    return load_file(FOLDER / f"{name}.safetensors")


def metadata(name: str, key: str) -> dict[str, Any]:
    """One JSON entry of a golden file's metadata."""
    with safe_open(FOLDER / f"{name}.safetensors", "pt") as file:
        result: dict[str, Any] = json.loads(file.metadata()[key])
    return result


def parameters(name: str) -> dict[str, tuple[int, ...]]:
    """Names and shapes of an official model."""
    lines = (FOLDER / "param_lists" / f"{name}.txt").read_text().splitlines()
    rows = [line.split("\t") for line in lines if line and not line.startswith("#")]
    return {row[0]: tuple(int(size) for size in row[1].split("x")) for row in rows}


def below(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The entries of a state dict under a prefix, without it."""
    return {key[len(prefix) :]: value for key, value in state.items() if key.startswith(prefix)}


def assert_near(actual: Tensor, expected: Tensor, tolerance: float) -> None:
    """Largest difference at most ``tolerance`` of the largest expected entry; never with NaN."""
    assert actual.shape == expected.shape
    error = float((actual - expected).abs().max() / expected.abs().max())
    assert error <= tolerance, f"error {error:.2e} of the maximum, allowed {tolerance:.0e}"
    assert bool(torch.isfinite(actual).all())
