"""Correctness before speed: the operators against the fp64 oracle of the tests.

At the benchmarked inputs, and once at ragged sizes. Each function raises AssertionError.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

import driftar_kernels as dk
from tests.helpers import oracle
from tests.helpers.drifting import check as check_drift
from tests.helpers.inputs import Options, drift_inputs, normal, trainable
from tests.helpers.tolerance import (
    GRADIENT_FACTOR,
    VALUE_FACTOR,
    assert_close_to_truth,
    assert_relative,
)

from .peers import drift as drift_peer

# (L, D) of what no tile fits.
RAGGED = ((1, 8), (7, 40), (63, 72), (65, 80))
# Long forwards are compared on so many last rows: they see the most keys.
LAST_ROWS = 256
# Absolute error that is always granted.
FLOOR = 1e-5
# Largest relative error of the drift loss's gradient.
DRIFT_TOLERANCE = 2e-4


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    options: Options,
    *,
    truth_options: Options | None = None,
    gradient: bool = False,
) -> None:
    """``attention`` on the last sample and its last head, computed within the whole call.

    All heads of that sample for entropy="map"; its last rows alone where they are many and no
    gradient is asked for. ``truth_options``: the options as the oracle names them, if different.
    """
    heads = slice(None) if options.get("entropy") == "map" else slice(-1, None)
    kept = dict(options if truth_options is None else truth_options)
    inputs = trainable((query, key, value)) if gradient else (query, key, value)
    result = dk.attention(*inputs, **options)
    assert result.entropy is not None
    actual = [result.out, result.entropy]
    weights: list[Tensor] = []
    if gradient:
        weights = [torch.randn_like(x) for x in actual]
        actual += torch.autograd.grad(actual, inputs, weights)
    actual, weights, qkv = (
        [_part(x.detach(), heads) for x in group]
        for group in (actual, weights, (query, key, value))
    )
    hidden = query.shape[2] - LAST_ROWS
    if hidden > 0 and not gradient:
        actual = [actual[0][..., hidden:, :], actual[1][..., hidden:]]
        qkv[0] = qkv[0][:, :, hidden:]
        if kept.get("is_causal"):
            kept["query_offset"] = kept.get("query_offset", 0) + hidden
    truth, plain = (
        _attention_truth(qkv, kept, weights, dtype) for dtype in (torch.float64, query.dtype)
    )
    for index, name in enumerate(("out", "entropy", "grad_query", "grad_key", "grad_value")):
        if index < len(actual):
            assert_close_to_truth(
                actual[index],
                truth[index],
                plain[index],
                factor=VALUE_FACTOR if index < 2 else GRADIENT_FACTOR,
                floor=FLOOR,
                name=name,
            )


def attention_ragged(options: Options, dtype: torch.dtype, *, gradient: bool = False) -> None:
    """The same at sizes that fit no tile."""
    for length, width in RAGGED:
        query, key, value = (
            normal(2, 3, length, width, seed=seed, dtype=dtype) for seed in range(3)
        )
        attention(query, key, value, options, gradient=gradient)


def drift(gen: Tensor, pos: Tensor, neg: Tensor | None) -> None:
    """Gradient of ``drift_loss`` against the published formula in fp64, then ragged sizes."""
    gen = gen.detach().requires_grad_()
    (actual,) = torch.autograd.grad(dk.drift_loss(gen, pos, neg), gen)
    wide = gen.detach().double().requires_grad_()
    loss = drift_peer.drift_loss(wide, pos.double(), None if neg is None else neg.double())
    (truth,) = torch.autograd.grad(loss, wide)
    assert_relative(actual, truth, DRIFT_TOLERANCE, "gradient")
    for sizes in ((2, 1, 3, 0, 7), (3, 17, 9, 5, 65)):
        gen_, pos_, neg_, _ = drift_inputs(*sizes)
        check_drift(gen_, pos_, neg_)


def _part(x: Tensor, heads: slice) -> Tensor:
    return x[-1:, heads] if x.dim() > 2 else x[-1:]


def _attention_truth(
    qkv: list[Tensor], options: Mapping[str, Any], weights: list[Tensor], dtype: torch.dtype
) -> list[Tensor]:
    inputs = trainable(qkv, dtype)
    truth = oracle.attention(*inputs, **options, dtype=dtype)
    assert truth.entropy is not None
    values = [truth.out, truth.entropy]
    if not weights:
        return [x.detach() for x in values]
    gradients = torch.autograd.grad(values, inputs, [w.to(dtype) for w in weights])
    return [*(x.detach() for x in values), *gradients]
