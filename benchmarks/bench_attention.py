"""Attention with entropy: training and image shapes, the head-averaged map, decoding, length."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import pytest
import torch
from torch import Tensor

import driftar_kernels as dk
from tests.helpers.inputs import QKV, Options, random_parents
from tests.helpers.oracle import visible_keys

from . import cases, checks, floors
from .cases import Case
from .peers import attention as peers
from .timing import Call, Contest, RunContest

# The first keys of a buffered image model, which do not count for the entropy.
BUFFER = 64


def inputs(case: Case) -> QKV:
    """query, key and value ``[B, H, L, D]``."""
    query, key, value = (
        torch.randn(case["B"], case["H"], case["L"], case["D"]).to(case.dtype) for _ in range(3)
    )
    return query, key, value


def with_gradient(
    function: Callable[[Tensor, Tensor, Tensor], Sequence[Tensor | None]], qkv: QKV
) -> Call:
    """Forward, and backward from dense random gradients of everything it returns."""
    leaves = tuple(x.detach().clone().requires_grad_() for x in qkv)
    weights: list[Tensor] = []

    def call() -> None:
        values = [x for x in function(*leaves) if x is not None]
        if not weights:
            weights.extend(torch.randn_like(x) for x in values)
        torch.autograd.grad(values, leaves, weights)

    return call


def ours(
    query: Tensor, key: Tensor, value: Tensor, options: Options
) -> tuple[Tensor, Tensor | None]:
    """Output and entropy."""
    result = dk.attention(query, key, value, **options)
    return result.out, result.entropy


def product_flops(case: Case, products: int, *, causal: bool) -> float:
    """Of matrix products over all (query, key) pairs, half of them when causal."""
    pairs = case["B"] * case["H"] * case["L"] ** 2
    return products * 2 * pairs * case["D"] / (2 if causal else 1)


def forward(case: Case) -> Contest:
    """Causal forward."""
    qkv, options = inputs(case), {"is_causal": True}
    length = case["L"]
    compiled = torch.compile(peers.materialised)
    return Contest(
        check=lambda: _check(qkv, options),
        ours=lambda: ours(*qkv, options),
        peers={
            cases.SDPA: lambda: peers.sdpa(*qkv, is_causal=True),
            cases.SDPA_TWICE: lambda: peers.sdpa_twice(*qkv, is_causal=True),
            cases.MATERIALISED: lambda: peers.materialised(*qkv, is_causal=True),
            cases.COMPILED_MAP: lambda: compiled(*qkv, is_causal=True),
            cases.FLEX: partial(peers.flex(length), *qkv),
            cases.FLEX_TWICE: partial(peers.flex_twice(length), *qkv),
        },
        floor=floors.gemm_seconds(product_flops(case, 2, causal=True), case.dtype),
    )


def forward_backward(case: Case) -> Contest:
    """Causal forward and backward through output and entropy."""
    qkv, options = inputs(case), {"is_causal": True}
    compiled = torch.compile(peers.materialised)
    return Contest(
        check=lambda: _check(qkv, options, gradient=True),
        ours=with_gradient(partial(ours, options=options), qkv),
        peers={
            cases.SDPA: with_gradient(lambda *x: (peers.sdpa(*x, is_causal=True),), qkv),
            cases.MATERIALISED: with_gradient(partial(peers.materialised, is_causal=True), qkv),
            cases.COMPILED_MAP: with_gradient(partial(compiled, is_causal=True), qkv),
        },
        # Two products forward; backward recomputes the scores and forms four gradients' products.
        floor=floors.gemm_seconds(product_flops(case, 7, causal=True), case.dtype),
    )


def image(case: Case) -> Contest:
    """All keys visible, entropy without the buffer."""
    qkv, options = inputs(case), {"entropy_from": BUFFER}
    return Contest(
        check=lambda: _check(qkv, options),
        ours=lambda: ours(*qkv, options),
        peers={cases.SDPA: lambda: peers.sdpa(*qkv, is_causal=False)},
        floor=floors.gemm_seconds(product_flops(case, 2, causal=False), case.dtype),
    )


def head_average(case: Case) -> Contest:
    """Entropy of the head-averaged map, forward or forward and backward."""
    qkv, causal = inputs(case), case.name.endswith("causal")
    options: Options = {"entropy": "map", "is_causal": causal}
    compiled = torch.compile(peers.materialised_average)
    gradient = "backward" in case.name

    def call(function: Callable[..., Sequence[Tensor | None]]) -> Call:
        return with_gradient(function, qkv) if gradient else partial(function, *qkv)

    return Contest(
        check=lambda: _check(qkv, options, gradient=gradient),
        ours=call(partial(ours, options=options)),
        peers={
            cases.MATERIALISED: call(partial(peers.materialised_average, is_causal=causal)),
            cases.COMPILED_MAP: call(partial(compiled, is_causal=causal)),
        },
        floor=floors.gemm_seconds(
            product_flops(case, 7 if gradient else 2, causal=causal), case.dtype
        ),
    )


def decode(case: Case) -> Contest:
    """New tokens on a cache: one, a causal block, or a draft tree."""
    queries, keys, width = case["Lq"], case["Lk"], case["D"]
    query = torch.randn(1, case["Hq"], queries, width).to(case.dtype)
    key, value = (torch.randn(1, case["Hkv"], keys, width).to(case.dtype) for _ in range(2))
    options: Options = {}
    truth: Options = {}
    mask = None
    if queries == 64:
        parents = random_parents(queries, seed=0, depth=8)
        options["tree"], truth["parents"] = dk.DraftTree(parents), parents
    elif queries > 1:
        truth = {"is_causal": True, "query_offset": keys - queries}
        options |= truth
    options["enable_gqa"] = case["Hq"] != case["Hkv"]
    if truth:
        visible = visible_keys(1, queries, keys, **truth)[:, None]
        mask = torch.zeros(visible.shape).masked_fill(~visible, -torch.inf).to(case.dtype)
    return Contest(
        check=lambda: checks.attention(query, key, value, options, truth_options=truth),
        ours=lambda: ours(query, key, value, options),
        peers={cases.SDPA_MASK: lambda: peers.sdpa_masked(query, key, value, mask)},
        floor=max(
            floors.read_seconds(2 * key.numel() * key.element_size()),
            floors.gemm_seconds(2 * 2 * query.numel() * keys, case.dtype),
        ),
    )


def length(case: Case) -> Contest:
    """Causal forward, for the curve of time against length."""
    contest = forward(case)
    shown = (cases.SDPA, cases.SDPA_TWICE, cases.MATERIALISED)
    return Contest(
        contest.check, contest.ours, {name: contest.peers[name] for name in shown}, contest.floor
    )


def _check(qkv: QKV, options: Options, *, gradient: bool = False) -> None:
    checks.attention(*qkv, options, gradient=gradient)
    checks.attention_ragged(options, qkv[0].dtype, gradient=gradient)


@pytest.mark.parametrize("case", cases.of("attention-forward"), ids=str)
def bench_forward(case: Case, race: RunContest) -> None:
    race(case, forward(case))


@pytest.mark.parametrize("case", cases.of("attention-forward-backward"), ids=str)
def bench_forward_backward(case: Case, race: RunContest) -> None:
    race(case, forward_backward(case))


@pytest.mark.parametrize("case", cases.of("attention-image"), ids=str)
def bench_image(case: Case, race: RunContest) -> None:
    race(case, image(case))


@pytest.mark.parametrize("case", cases.of("attention-map"), ids=str)
def bench_head_average(case: Case, race: RunContest) -> None:
    race(case, head_average(case))


@pytest.mark.parametrize("case", cases.of("attention-decode"), ids=str)
def bench_decode(case: Case, race: RunContest) -> None:
    race(case, decode(case))


@pytest.mark.parametrize("case", cases.of("attention-length"), ids=str)
def bench_length(case: Case, race: RunContest) -> None:
    race(case, length(case))
