"""The fixtures that check, time, record and print a case."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import pytest
import torch

from . import machine, record
from .cases import Case
from .record import Record
from .timing import Contest, Race, RunContest

Keep = Callable[..., None]


@pytest.fixture(autouse=True)
def _fresh_process_state() -> Iterator[None]:
    """Same seed and threads for every case, and no compiled code of earlier ones."""
    threads = torch.get_num_threads()
    torch.manual_seed(0)
    torch.compiler.reset()
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def keep(benchmark: Any, capsys: pytest.CaptureFixture[str]) -> Keep:
    """``keep(case, figures, ...)``: puts a case's record into the JSON and prints it."""

    def run(case: Case, figures: Mapping[str, float], **more: Any) -> None:
        entry = record.from_case(case, figures, **more)
        benchmark.group = case.group
        benchmark.extra_info["record"] = entry.to_json()
        with capsys.disabled():
            print("\n  " + _line(entry))

    return run


@pytest.fixture
def race(benchmark: Any, keep: Keep, request: pytest.FixtureRequest) -> RunContest:
    """``race(case, contest)``: check, then interleaved medians of all competitors.

    A wrong operator raises in its check and gets no figure. The length of the measurement follows
    ``--benchmark-max-time`` and ``--benchmark-min-rounds``; ``--benchmark-disable`` leaves the
    check alone.
    """

    def run(case: Case, contest: Contest) -> None:
        contest.check()
        if benchmark.disabled:
            benchmark.pedantic(contest.ours)
            return
        option = request.config.getoption
        timed = Race(
            contest,
            seconds=float(option("benchmark_max_time")),
            min_rounds=option("benchmark_min_rounds"),
        )
        benchmark.pedantic(timed.run_ours, setup=timed.run_peers, rounds=timed.rounds)
        keep(case, timed.medians(), unavailable=timed.unavailable, floor=contest.floor)

    return run


def pytest_benchmark_update_machine_info(
    config: pytest.Config, machine_info: dict[str, Any]
) -> None:
    machine_info["driftar"] = machine.describe()


def _line(entry: Record) -> str:
    parts = [f"{entry.group}: {entry.label}: {record.format_figure(entry.ours, entry.unit)}"]
    parts += [f"{record.format_ratio(x)} of {name}" for name, x in entry.ratios().items()]
    if entry.floor:
        parts.append(f"{entry.ours / entry.floor:.2f}x the floor")
    parts += [
        f"{'met' if entry.met(target) else 'MISSED'}: {record.format_target(target, entry.unit)}"
        for target in entry.targets
        if entry.met(target) is not None
    ]
    parts += [f"{name} did not run ({why})" for name, why in entry.unavailable.items()]
    return "; ".join(parts)
