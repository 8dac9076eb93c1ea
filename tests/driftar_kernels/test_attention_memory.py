"""Layout, memory and repeatability of :func:`driftar_kernels.attention`."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from driftar_kernels import AttentionOutput, attention, use_backend
from tests.helpers.inputs import (
    CASES,
    HEADS,
    LAYOUTS,
    AttentionCase,
    far_rows,
    in_layout,
    run_attention,
    trainable,
)
from tests.helpers.interpreter import INTERPRETED, size
from tests.helpers.tolerance import assert_bitwise


def entropy_of(result: AttentionOutput) -> Tensor:
    assert result.entropy is not None
    return result.entropy


def results_of_layouts(name: str, dtype: torch.dtype, how: str) -> list[list[Tensor | None]]:
    """Results and gradients of contiguous inputs, and of the same ones in another layout."""
    case = CASES[name]
    inputs = case.qkv(dtype=dtype)
    results: list[list[Tensor | None]] = []
    for tensors in (inputs, [in_layout(t, how) for t in inputs]):
        leaves = trainable(tensors)
        result = run_attention(*leaves, case.keywords())
        loss = (result.out.float() ** 2).sum() + entropy_of(result).sum()
        results.append([*result, *torch.autograd.grad(loss, leaves)])
    return results


@pytest.mark.parametrize("how", LAYOUTS)
@pytest.mark.parametrize("name", ["causal", "everything", "tree_lengths"])
def test_layout_does_not_change_a_bit(
    native_backend: str, dtype: torch.dtype, name: str, how: str
) -> None:
    assert_bitwise(*results_of_layouts(name, dtype, how))


@pytest.mark.parametrize("how", LAYOUTS)
def test_layout_hardly_changes_the_reference(dtype: torch.dtype, how: str) -> None:
    """Matrix libraries choose their way by layout and alignment, so its bits are theirs."""
    tolerance = 8 * torch.finfo(dtype).eps
    with use_backend("reference"):
        for left, right in zip(*results_of_layouts("everything", dtype, how), strict=True):
            torch.testing.assert_close(left, right, rtol=tolerance, atol=tolerance)


def test_expanded_inputs_and_masks(backend: str) -> None:
    query, key, value = AttentionCase(batch=1, heads=1, kv_heads=1).qkv()
    mask = torch.rand(7, 1) < 2
    query, key, value = (t.expand(3, 2, -1, -1) for t in (query, key, value))
    result = attention(query, key, value, mask.expand(3, 2, 7, 9))
    assert_bitwise(result, attention(query.contiguous(), key.contiguous(), value.contiguous()))


@pytest.mark.parametrize("name", ["everything", "tree_mask", "lengths"])
def test_inputs_are_not_modified(backend: str, name: str) -> None:
    case = CASES[name]
    leaves = trainable(case.qkv())
    keywords = case.keywords()
    tensors = [*leaves] + [v for v in keywords.values() if isinstance(v, Tensor)]
    copies = [t.detach().clone() for t in tensors]
    versions = [t._version for t in tensors]
    result = run_attention(*leaves, keywords)
    (result.out.sum() + entropy_of(result).sum()).backward()
    assert_bitwise(tensors, copies)
    assert versions == [t._version for t in tensors]


@pytest.mark.parametrize("threads", [1] if INTERPRETED else [1, 2])
def test_repeats_are_bitwise_equal(backend: str, threads: int) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        queries, keys = size(100, 40), size(150, 70)
        case = AttentionCase(batch=1, heads=4, kv_heads=2, queries=queries, keys=keys, dim=40)
        leaves = trainable(case.qkv())
        results = []
        for _ in range(size(20, 3)):
            result = attention(
                *leaves, is_causal=True, query_offset=keys - queries, enable_gqa=True
            )
            loss = result.out.square().sum() + entropy_of(result).sum() + result.lse.sum()
            results.append((*result, *torch.autograd.grad(loss, leaves)))
            assert_bitwise(results[0], results[-1])
    finally:
        torch.set_num_threads(before)


def test_batch_of_one_equals_the_slice(backend: str) -> None:
    query, key, value = AttentionCase(batch=3, queries=70, keys=90, dim=24).qkv()
    whole = attention(query, key, value, is_causal=True, query_offset=20)
    one = attention(query[1:2], key[1:2], value[1:2], is_causal=True, query_offset=20)
    for left, right in zip(whole, one, strict=True):
        assert left is not None and right is not None
        torch.testing.assert_close(left[1:2], right, rtol=1e-6, atol=1e-6)


def test_offsets_beyond_32_bits(backend: str) -> None:
    """Three rows 2^30 + 64 elements apart: the last starts beyond 2^31 elements."""
    inputs = AttentionCase(batch=1, heads=1, kv_heads=1, queries=3, keys=3, dim=8).qkv()
    results = []
    for tensors in (inputs, [far_rows(t, 2**30 + 64) for t in inputs]):
        leaves = trainable(tensors)
        result = attention(*leaves, is_causal=True)
        loss = result.out.square().sum() + entropy_of(result).sum()
        results.append((*result, *torch.autograd.grad(loss, leaves)))
    assert_bitwise(*results)


def test_memory_behind_the_tensors_is_never_read(backend: str, dtype: torch.dtype) -> None:
    """Keys and values are views of a longer, poisoned buffer; D is padded with NaN as well."""
    case = AttentionCase(queries=5, keys=21, dim=13, value_dim=11)
    query, key, value = case.qkv(dtype=dtype)
    clean = attention(query, key, value)

    def embedded(source: Tensor) -> Tensor:
        big = torch.full((2, HEADS, 64, 32), math.nan, dtype=dtype)
        big[:, :, : source.shape[2], : source.shape[3]] = source
        return big[:, :, : source.shape[2], : source.shape[3]]

    result = attention(embedded(query), embedded(key), embedded(value))
    assert_bitwise(clean, result)
