"""Drift loss, forward and backward, against the published formula."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import driftar_kernels as dk

from . import cases, checks, floors
from .cases import Case
from .peers import drift as peers
from .timing import Call, Contest, RunContest


def contest(case: Case) -> Contest:
    """Loss and its gradient."""
    batch, count, features = case["B"], case["N"], case["S"]
    gen = torch.randn(batch, count, features, requires_grad=True)
    pos = torch.randn(batch, case["P"], features) + 0.5
    neg = torch.randn(batch, case["Q"], features) - 0.5 if case["Q"] else None

    def call(loss: Callable[[Tensor, Tensor, Tensor | None], Tensor]) -> Call:
        return lambda: torch.autograd.grad(loss(gen, pos, neg), gen)

    # One product for the distances, one per temperature for the forces.
    products = 1 + len(peers.TEMPERATURES)
    points = count + case["P"] + case["Q"]
    return Contest(
        check=lambda: checks.drift(gen, pos, neg),
        ours=call(dk.drift_loss),
        peers={
            cases.EAGER: call(peers.drift_loss),
            cases.COMPILED: call(torch.compile(peers.drift_loss)),
        },
        floor=floors.gemm_seconds(products * 2 * batch * count * points * features),
    )


@pytest.mark.parametrize("case", cases.of("drift-loss"), ids=str)
def bench_drift_loss(case: Case, race: RunContest) -> None:
    race(case, contest(case))
