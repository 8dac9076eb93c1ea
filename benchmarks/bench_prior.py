"""The entropy-parameterised prior against eager PyTorch."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import driftar_kernels as dk
from tests.helpers import oracle
from tests.helpers.tolerance import assert_close_to_truth

from . import cases, floors
from .cases import Case
from .peers import prior as peers
from .timing import Call, Contest, RunContest


def contest(case: Case) -> Contest:
    """One sample of the prior; with gradients of mean and entropy where the case says so."""
    length, width = case["L"], case["C"]
    gradient = case.name != "forward"
    mean = torch.randn(length, width, requires_grad=gradient)
    entropy = torch.rand(length, requires_grad=gradient)
    noise, weight = torch.randn(length, width), torch.randn(length, width)

    def call(function: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Call:
        if not gradient:
            return lambda: function(mean, entropy, noise)
        return lambda: torch.autograd.grad(function(mean, entropy, noise), (mean, entropy), weight)

    def check() -> None:
        for rows in (slice(None), slice(0, 63)):
            m, e, n = (x[rows].detach() for x in (mean, entropy, noise))
            truth = m.double() + oracle.sigma(e)[:, None] * n.double()
            found, plain = dk.entropy_prior(m, e, n), peers.entropy_prior(m, e, n)
            assert_close_to_truth(found, truth, plain, name="sample")
        if gradient:
            leaf = entropy.detach().double().requires_grad_()
            wide = peers.entropy_prior(mean.detach().double(), leaf, noise.double())
            (truth,) = torch.autograd.grad(wide, leaf, weight.double())
            (plain,) = torch.autograd.grad(
                peers.entropy_prior(mean, entropy, noise), entropy, weight
            )
            (found,) = torch.autograd.grad(dk.entropy_prior(mean, entropy, noise), entropy, weight)
            assert_close_to_truth(found, truth, plain, factor=3, name="gradient of entropy")

    # Forward reads two and writes one; backward reads the gradient and the noise.
    passes = 5 if gradient else 3
    return Contest(
        check=check,
        ours=call(dk.entropy_prior),
        peers={cases.EAGER: call(peers.entropy_prior)},
        floor=floors.read_seconds(passes * mean.numel() * mean.element_size()),
    )


@pytest.mark.parametrize("case", cases.of("entropy-prior"), ids=str)
def bench_entropy_prior(case: Case, race: RunContest) -> None:
    race(case, contest(case))
