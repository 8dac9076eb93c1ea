"""Interleaved latency measurement, and the machine it was made on."""

from __future__ import annotations

import os
import platform
import statistics
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from tqdm import tqdm

__all__ = ["Latency", "Timing", "describe_machine", "measure_interleaved"]


class Timing(Protocol):
    """What a ``generate_with_stats`` call reports about its cost."""

    decoder_nfe: int
    ar_seconds: float
    decoder_seconds: float
    total_seconds: float


@dataclass(frozen=True)
class Latency:
    """Medians over the repeats, in milliseconds for each image of the batch."""

    decoder_nfe: int
    ar_ms: float
    decoder_ms: float
    total_ms: float

    def as_dict(self) -> dict[str, Any]:
        """The same numbers as a JSON-able dictionary."""
        return asdict(self)


def measure_interleaved(
    methods: Mapping[str, Callable[[], Timing]],
    *,
    batch: int,
    repeats: int = 7,
    warmup: int = 1,
    progress: bool = True,
    poll: Callable[[], None] | None = None,
) -> dict[str, Latency]:
    """Time every method in turn, round after round, so that a slow phase of the machine hits all.

    methods: by name, a call that generates one batch of `batch` images and returns its cost.
    The first `warmup` rounds are not counted. Raises ValueError for batch or repeats below 1 or a
    negative warmup.
    """
    for name, value, least in (("batch", batch, 1), ("repeats", repeats, 1), ("warmup", warmup, 0)):
        if value < least:
            raise ValueError(f"{name} must be at least {least}, got {value}")
    timings: dict[str, list[Timing]] = {name: [] for name in methods}
    rounds = tqdm(range(warmup + repeats), desc="latency", unit="round", disable=not progress)
    for number in rounds:
        for name, generate in methods.items():
            if poll is not None:
                poll()
            timing = generate()
            if number >= warmup:
                timings[name].append(timing)
    return {
        name: Latency(
            decoder_nfe=rows[0].decoder_nfe,
            ar_ms=_median_ms([row.ar_seconds for row in rows], batch),
            decoder_ms=_median_ms([row.decoder_seconds for row in rows], batch),
            total_ms=_median_ms([row.total_seconds for row in rows], batch),
        )
        for name, rows in timings.items()
    }


def describe_machine() -> dict[str, Any]:
    """Processor, cores usable by this process, threads and versions, for a report."""
    return {
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def _median_ms(seconds: list[float], batch: int) -> float:
    return statistics.median(seconds) * 1000 / batch


def _cpu_model() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
