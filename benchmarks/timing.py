"""Interleaved timing: every competitor runs once per round, so that a drifting machine hits all
alike.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

Competitors = dict[str, Callable[[], object]]


def interleaved_medians(competitors: Competitors, *, seconds: float = 1.0) -> dict[str, float]:
    """Median seconds per call of each competitor.

    Args:
        competitors: name -> call. Each is warmed up twice.
        seconds: rough length of the measurement; at least 5 rounds are made.
    """
    for call in competitors.values():
        call()
        call()
    samples: dict[str, list[float]] = {name: [] for name in competitors}
    deadline = time.perf_counter() + seconds
    rounds = 0
    while rounds < 5 or time.perf_counter() < deadline:
        for name, call in competitors.items():
            start = time.perf_counter()
            call()
            samples[name].append(time.perf_counter() - start)
        rounds += 1
    return {name: statistics.median(times) for name, times in samples.items()}
