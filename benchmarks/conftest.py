"""One fixture: times an operator beside its peers and prints the ratios and the distance to the
floor.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from .timing import Competitors, interleaved_medians


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def race(benchmark: Any, capsys: pytest.CaptureFixture[str]) -> Callable[..., None]:
    """``race(ours, peers, floor_seconds)``: interleaved medians in ``extra_info``, ours in the
    table.

    Call it after the correctness check, so that a wrong kernel never gets a figure.
    """

    def run(ours: Callable[[], object], peers: Competitors, floor: float) -> None:
        medians = interleaved_medians({"driftar": ours, **peers})
        own = medians["driftar"]
        benchmark.extra_info["floor_s"] = floor
        benchmark.extra_info["median_s"] = medians
        parts = [
            f"{own / median:.2f}x of {name}"
            for name, median in medians.items()
            if name != "driftar"
        ]
        parts.append(f"{own / floor:.1f}x its floor")
        with capsys.disabled():
            print(f"\n  {benchmark.name}: {own * 1e3:.2f} ms, " + ", ".join(parts))
        benchmark.pedantic(ours, rounds=5, warmup_rounds=1)

    return run
