"""What every model's ``generate`` shares: results, statistics, noise sources, checks."""

from __future__ import annotations

import inspect
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from typing import NamedTuple, ParamSpec

import torch
from torch import Tensor, nn

from .diffusion import Noise

CFG_SCHEDULES = ("linear", "constant")
P = ParamSpec("P")


@dataclass
class GenerationStats:
    """Cost of one ``generate`` call.

    Attributes:
        decoder_nfe: evaluations of the decoder network in sequence (guidance branches run side by
            side).
        ar_seconds: wall time in the autoregressive network.
        decoder_seconds: wall time in the decoder: diffusion head, or prior and one-step decoder.
        total_seconds: wall time of the whole call.
    """

    decoder_nfe: int = 0
    ar_seconds: float = 0.0
    decoder_seconds: float = 0.0
    total_seconds: float = 0.0


class Generation(NamedTuple):
    """Result of ``generate_with_stats``.

    Attributes:
        latents: ``[B, C, h, w]``, in the units the model was trained on.
        entropy: normalised attention entropy ``[B, L]``, or None for models without one.
        stats: cost of the call.
    """

    latents: Tensor
    entropy: Tensor | None
    stats: GenerationStats


def latents_of(generate_with_stats: Callable[P, Generation]) -> Callable[P, Tensor]:
    """A model's method ``generate``: ``generate_with_stats`` without entropy and statistics."""

    @wraps(generate_with_stats)
    def generate(*args: P.args, **kwargs: P.kwargs) -> Tensor:
        return generate_with_stats(*args, **kwargs).latents

    signature = inspect.signature(generate_with_stats)
    generate.__signature__ = signature.replace(return_annotation="Tensor")  # type: ignore[attr-defined]
    generate.__name__ = "generate"
    generate.__qualname__ = generate.__qualname__.replace("generate_with_stats", "generate")
    generate.__doc__ = "The latents that :meth:`generate_with_stats` makes, and nothing else."
    return generate


class Stopwatch:
    """Wall time between calls, complete with respect to the device's queue."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._last = self._now()

    def _now(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter()

    def lap(self) -> float:
        """Seconds since the last call (or construction)."""
        now = self._now()
        elapsed, self._last = now - self._last, now
        return elapsed


def sampling_dtype(dtype: torch.dtype) -> torch.dtype:
    """What a sampler of a model of this dtype computes in: at least fp32."""
    return torch.promote_types(dtype, torch.float32)


def noise_source(
    noise: Noise | None, generator: torch.Generator | None, device: torch.device, dtype: torch.dtype
) -> Noise:
    """``noise`` itself, its draws checked, or standard normal draws from ``generator``.

    Raises:
        ValueError: (when called) a draw does not have the shape asked for.
    """

    def draw(shape: tuple[int, ...]) -> Tensor:
        if noise is None:
            # Drawn where the generator lives, so that a CPU seed gives the same image on any
            # device.
            source = device if generator is None else generator.device
            return torch.randn(shape, generator=generator, device=source, dtype=dtype).to(device)
        value = noise(shape)
        if tuple(value.shape) != shape:
            raise ValueError(f"noise{shape} returned shape {list(value.shape)}")
        return value.to(device=device, dtype=dtype)

    return draw


def check_labels(class_labels: Tensor, num_classes: int) -> Tensor:
    """The labels as int64.

    Raises:
        TypeError: not an integer tensor.
        ValueError: not ``[B]``, or outside -1 (unconditional) .. num_classes - 1.
    """
    if not isinstance(class_labels, Tensor):
        raise TypeError(f"class_labels must be a tensor, got {type(class_labels).__name__}")
    if class_labels.dtype.is_floating_point or class_labels.dtype in (torch.bool, torch.complex64):
        raise TypeError(f"class_labels must have an integer dtype, got {class_labels.dtype}")
    if class_labels.dim() != 1:
        raise ValueError(f"class_labels must be [B], got shape {list(class_labels.shape)}")
    if class_labels.numel():
        low, high = int(class_labels.min()), int(class_labels.max())
        if low < -1 or high >= num_classes:
            raise ValueError(
                f"class_labels must lie in -1..{num_classes - 1} (-1 = unconditional), "
                f"got {low}..{high}"
            )
    return class_labels.long()


def class_condition(class_labels: Tensor, embedding: nn.Embedding, unconditional: Tensor) -> Tensor:
    """Condition vectors ``[B, D]`` of labels ``[B]``; -1 is unconditional (``[1, D]``).

    Raises:
        TypeError, ValueError: labels of a wrong dtype, shape or range.
    """
    labels = check_labels(class_labels, embedding.num_embeddings).to(unconditional.device)
    embedded = embedding(labels.clamp(min=0))
    return torch.where((labels < 0)[:, None], unconditional, embedded)


def check_finite(name: str, value: float) -> float:
    """The value as a float; ValueError unless it is a finite number."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise ValueError(f"{name} must be a finite number, got {value!r}")
    return float(value)


def check_count(name: str, value: int) -> int:
    """The value; ValueError unless it is an integer of at least 1."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name} must be an integer of at least 1, got {value!r}")
    return value
