"""Races: interleaving, absent peers, and that a wrong operator gets no figure."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from benchmarks.cases import OURS
from benchmarks.memory import in_fresh_process
from benchmarks.timing import Contest, Race

ROOT = Path(__file__).resolve().parent.parent.parent


def nothing() -> None:
    pass


def test_competitors_take_turns() -> None:
    order: list[str] = []

    def logged(name: str) -> None:
        order.append(name)
        time.sleep(2e-3)

    race = Race(
        Contest(
            check=nothing,
            ours=lambda: logged("ours"),
            peers={"peer": lambda: logged("peer")},
            before=lambda: order.append("before"),
        ),
        seconds=0,
        min_rounds=3,
    )
    order.clear()
    for _ in range(race.rounds):
        race.run_peers()
        race.run_ours()
    assert order == ["peer", "before", "ours"] * 3


def test_medians_are_per_call() -> None:
    race = Race(
        Contest(check=nothing, ours=nothing, peers={"slow": lambda: time.sleep(3e-3)}),
        seconds=0.03,
    )
    for _ in range(race.rounds):
        race.run_peers()
        race.run_ours()
    medians = race.medians()
    assert medians[OURS] < 1e-4 and 3e-3 <= medians["slow"] < 0.1


def test_a_peer_that_cannot_run_is_named() -> None:
    def absent() -> None:
        raise NotImplementedError("not on this machine\nsecond line")

    race = Race(Contest(check=nothing, ours=nothing, peers={"absent": absent}), seconds=0)
    race.run_peers()
    race.run_ours()
    assert race.unavailable == {"absent": "NotImplementedError: not on this machine"}
    assert set(race.medians()) == {OURS}


def test_our_own_failure_is_not_swallowed() -> None:
    def broken() -> None:
        raise RuntimeError("broken")

    with pytest.raises(RuntimeError, match="broken"):
        Race(Contest(check=nothing, ours=broken))


BENCHMARK = """
import pytest
from benchmarks.cases import Case
from benchmarks.timing import Contest

@pytest.mark.parametrize("right", [True, False])
def test_it(right, race):
    def check():
        assert right, "the numbers are wrong"
    race(Case("overhead", {}, name=f"right {right}"), Contest(check, lambda: None))
"""


def test_a_red_check_prints_no_figure(tmp_path: Path) -> None:
    (tmp_path / "test_it.py").write_text(BENCHMARK)
    (tmp_path / "conftest.py").write_text("from benchmarks.conftest import keep, race\n")
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "--benchmark-max-time=0.001", "--benchmark-json=run.json"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert "1 failed, 1 passed" in result.stdout
    assert "right True, fp32: " in result.stdout and "right False, fp32: " not in result.stdout
    text = (tmp_path / "run.json").read_text()
    assert "right True" in text and "right False" not in text


@pytest.mark.slow
def test_memory_beyond_inputs_and_outputs_is_what_a_call_allocates() -> None:
    """Materialised attention holds several L x L maps; the fused operator none."""
    sizes = {"B": 1, "H": 2, "L": 1024, "D": 64}
    square = 2 * 1024 * 1024 * 4
    assert in_fresh_process("attention", sizes, torch.float32, "materialised map") > 2 * square
    assert in_fresh_process("attention", sizes, torch.float32) < square
