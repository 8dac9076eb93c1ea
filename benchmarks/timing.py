"""Interleaved timing: every competitor runs once per round, so that a drifting machine hits all
alike.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from .cases import OURS, Case

Call = Callable[[], object]

# Shorter calls are repeated within a sample until it lasts this long (seconds).
SHORTEST_SAMPLE = 2e-4


@dataclass(frozen=True)
class Contest:
    """What one case measures.

    Attributes:
        check: raises unless the operator is right; runs before any timing.
        ours: the operator.
        peers: name -> call.
        floor: seconds that the arithmetic or the memory traffic alone would take.
        before: runs, untimed, before every timed call of ours.
    """

    check: Callable[[], None]
    ours: Call
    peers: Mapping[str, Call] = field(default_factory=dict)
    floor: float | None = None
    before: Call | None = None


RunContest = Callable[[Case, Contest], None]


class Race:
    """Times a contest round by round.

    Args:
        contest: its peers are warmed up here; one that raises RuntimeError is left out and its
            reason kept in ``unavailable``.
        seconds: rough length of the measurement.
        min_rounds: made at least.
    """

    def __init__(self, contest: Contest, *, seconds: float = 1.0, min_rounds: int = 5) -> None:
        self.unavailable: dict[str, str] = {}
        self._before = contest.before
        self._calls = {OURS: contest.ours, **contest.peers}
        estimates: dict[str, float] = {}
        for name, call in list(self._calls.items()):
            try:
                call()
            except RuntimeError as error:
                if name == OURS:
                    raise
                self.unavailable[name] = f"{type(error).__name__}: {_first_line(error)}"
                del self._calls[name]
                continue
            estimates[name] = _seconds(call, 1)
        self._repeats = {
            name: math.ceil(SHORTEST_SAMPLE / max(estimate, 1e-7))
            for name, estimate in estimates.items()
        }
        if self._before is not None:
            self._repeats[OURS] = 1
        round_seconds = sum(estimates[name] * self._repeats[name] for name in estimates)
        self.rounds = max(min_rounds, min(1000, int(seconds / round_seconds)))
        self.samples: dict[str, list[float]] = {name: [] for name in self._calls}

    def run_peers(self) -> None:
        """The part of a round before ours."""
        for name in self._calls:
            if name != OURS:
                self._sample(name)
        if self._before is not None:
            self._before()

    def run_ours(self) -> None:
        """The rest of a round."""
        self._sample(OURS)

    def medians(self) -> dict[str, float]:
        """Median seconds per call of each competitor."""
        return {name: statistics.median(times) for name, times in self.samples.items()}

    def _sample(self, name: str) -> None:
        self.samples[name].append(_seconds(self._calls[name], self._repeats[name]))


def _seconds(call: Call, repeats: int) -> float:
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    return (time.perf_counter() - start) / repeats


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), "no message")
