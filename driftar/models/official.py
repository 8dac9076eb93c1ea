"""Models with their official weights, loaded strictly, with every mismatch in one error."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .registry import FAMILIES, build_model, find_family
from .weights import WeightsError, read_json, read_weights

Shapes = dict[str, tuple[int, ...]]


def load_official(
    name: str,
    path_or_state_dict: str | os.PathLike[str] | Mapping[str, Any],
    config: Mapping[str, Any] | None = None,
) -> Any:
    """A model with its official weights; nothing is downloaded.

    Args:
        name: a published size ("mar_base") or a bare family ("mar") with ``config``.
        path_or_state_dict: see :func:`driftar.models.weights.read_weights`; averaged weights are
            taken where the file has them.
        config: constructor arguments under their official names; those of a size are overridden.
            For a bare family, the config.json beside the weights by default.

    Returns:
        The model in fp32 and evaluation mode.

    Raises:
        TypeError: config is no mapping.
        ValueError: an unknown name, arguments that build no model, weights that cannot be read
            (:class:`WeightsError`), or weights that do not fit: every missing, unexpected and
            wrongly shaped or typed key is listed.
    """
    family, options = find_family(name)
    if config is not None and not isinstance(config, Mapping):
        raise TypeError(f"config must be a mapping, got {type(config).__name__}")
    official = family.official
    if official is None:
        raise ValueError(f"name must be of a family with official checkpoints, got {name!r}")
    source: object = path_or_state_dict
    if isinstance(path_or_state_dict, Mapping):
        source = "state_dict"
    elif config is None and name in FAMILIES:
        config = _config_beside(Path(path_or_state_dict))
    if config is None and not options:
        raise ValueError(f"config must be given with the bare family {name!r}")
    options |= official.config(config or {})
    expected = _shapes(name, options)
    weights = read_weights(path_or_state_dict)
    state = official.state(weights)
    problems = _problems(state, expected)
    if problems:
        lines = [f"does not fit {name}{_resemblance(weights, name)}:", *problems]
        raise WeightsError(source, "\n  ".join(lines))
    model = build_model(name, **options)
    model.load_state_dict(state, strict=True)
    return model.eval()


def _config_beside(path: Path) -> dict[str, Any] | None:
    file = (path if path.is_dir() else path.parent) / "config.json"
    return read_json(file) if file.is_file() else None


def _shapes(name: str, options: Mapping[str, Any]) -> Shapes:
    """Names and shapes of the model's state, without allocating it."""
    try:
        with torch.device("meta"):
            model = build_model(name, **options)
    except (TypeError, ValueError) as error:
        raise ValueError(f"config builds no {name}: {error}") from error
    return {key: tuple(value.shape) for key, value in model.state_dict().items()}


def _problems(state: Mapping[str, Tensor], expected: Shapes) -> list[str]:
    problems = [
        f"missing: {key} {list(shape)}" for key, shape in expected.items() if key not in state
    ]
    for key, tensor in state.items():
        if key not in expected:
            problems.append(f"unexpected: {key} {list(tensor.shape)}")
        elif tuple(tensor.shape) != expected[key]:
            problems.append(f"shape: {key} is {list(tensor.shape)}, not {list(expected[key])}")
        elif not tensor.dtype.is_floating_point:
            problems.append(f"dtype: {key} is {tensor.dtype}, not floating point")
    return problems


def _resemblance(weights: dict[str, Tensor], name: str) -> str:
    """The size whose names and shapes these are, as a remark."""
    for family in FAMILIES.values():
        if family.official is None:
            continue
        for size, options in family.sizes.items():
            state = family.official.state(weights)
            if size != name and not _problems(state, _shapes(size, options)):
                return f" but looks like {size}"
    return ""
