"""Values of :func:`driftar_kernels.attention` against the materialised oracle."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from driftar_kernels import AttentionOutput, attention
from tests.helpers.inputs import (
    CASES,
    AttentionCase,
    Options,
    attention_truth,
    bool_mask,
    float_mask,
    golden,
    normal,
    random_parents,
    run_attention,
)
from tests.helpers.interpreter import size
from tests.helpers.tolerance import assert_close_to_truth, half_ulp, largest_finite, max_error

EPS = 2.0**-23
BUFFERED = (
    ("B_entropy_buffered_00_B2H4b8N24D16", 8),
    ("B_entropy_buffered_01_B1H2b4N64D32", 4),
    ("B_entropy_buffered_02_B2H4b64N64D16", 64),
)
CAUSAL = (
    "B_entropy_causal_00_B1H2N16D16",
    "B_entropy_causal_01_B2H4N64D32",
    "B_entropy_causal_02_B2H4N64D32",
    "B_entropy_causal_03_B1H1N2D8",
    "B_entropy_causal_04_B2H3N33D16",
)


def check(
    query: Tensor, key: Tensor, value: Tensor, keywords: Options, **more: Any
) -> AttentionOutput:
    """Every output against the oracle under the rules of the error budget; returns the result."""
    result = run_attention(query, key, value, keywords, **more)
    truth = attention_truth(query, key, value, keywords, **more)
    plain = attention_truth(query, key, value, keywords, **more, dtype=query.dtype)

    assert result.out.dtype == query.dtype
    visible_value = 4e-6 * largest_finite(value) if query.dtype == torch.float32 else 0.0
    assert_close_to_truth(result.out, truth.out, plain.out, floor=visible_value, name="out")

    # Statistics are fp32 whatever the inputs: bounds in fp32 units of the scores' size.
    size = 1 + largest_finite(truth.max_score) + largest_finite(truth.lse)
    for name, bound in (("lse", 8 * EPS * size), ("max_score", 8 * EPS * size)):
        found = getattr(result, name)
        assert found.dtype == torch.float32
        assert_close_to_truth(found, getattr(truth, name), floor=bound, name=name)
    if truth.entropy is None:
        assert result.entropy is None
        return result
    assert result.entropy is not None and result.entropy.dtype == torch.float32
    limit = (
        1.0
        if more.get("normalize", keywords.get("normalize", True))
        else math.log(key.shape[2] or 1)
    )
    assert_close_to_truth(
        result.entropy, truth.entropy, floor=6 * EPS * size * max(1.0, limit), name="entropy"
    )
    assert bool((result.entropy >= 0).all())
    return result


@pytest.mark.parametrize("name", list(CASES))
def test_case(backend: str, dtype: torch.dtype, name: str) -> None:
    case = CASES[name]
    check(*case.qkv(dtype=dtype), case.keywords())


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("entropy", ["head", "map", "none"])
@pytest.mark.parametrize("name", ["plain", "entropy_from", "mqa", "tree_lengths", "everything"])
def test_entropy_kinds(backend: str, name: str, entropy: str, normalize: bool) -> None:
    case = CASES[name]
    check(*case.qkv(seed=5), case.keywords(), entropy=entropy, normalize=normalize)


@pytest.mark.parametrize("dim", [1, 8, 40, 72, 80, 96, 128, 192, 256])
def test_head_dimensions(backend: str, dtype: torch.dtype, dim: int) -> None:
    case = AttentionCase(batch=1, heads=2, kv_heads=2, queries=17, keys=33, dim=dim, value_dim=dim)
    check(*case.qkv(seed=dim, dtype=dtype), {"is_causal": True, "query_offset": 16})


@pytest.mark.parametrize("keys", [0, 1, 7, 63, 64, 65, 129])
@pytest.mark.parametrize("queries", [0, 1, 7, 63, 65])
def test_lengths(backend: str, queries: int, keys: int) -> None:
    case = AttentionCase(batch=1, heads=2, kv_heads=1, queries=queries, keys=keys, value_dim=12)
    inputs = case.qkv(seed=queries + keys)
    for keywords in ({}, {"is_causal": True}, {"entropy": "map"}):
        check(*inputs, {**case.keywords(), **keywords})


@pytest.mark.parametrize("entropy", ["head", "map"])
def test_long_rows(backend: str, dtype: torch.dtype, entropy: str) -> None:
    length = size(1000, 200)
    case = AttentionCase(
        batch=1, heads=2, kv_heads=2, queries=length, keys=length, dim=40, value_dim=40
    )
    check(*case.qkv(seed=1, dtype=dtype), {"is_causal": True}, entropy=entropy)


@pytest.mark.parametrize("keys", [1024, 1025, 1400])
def test_map_of_short_and_long_rows(backend: str, keys: int) -> None:
    """Longer rows of all heads do not stay in a cache and take a pass of their own."""
    keys = size(keys, keys // 8)
    case = AttentionCase(batch=1, heads=6, kv_heads=2, queries=21, keys=keys, dim=8, value_dim=8)
    hidden = {"is_causal": True, "query_offset": keys - 30, "entropy_from": keys // 2}
    check(*case.qkv(seed=2), {**case.keywords(), **hidden}, entropy="map")


@pytest.mark.parametrize("entropy", ["head", "map", "none"])
@pytest.mark.parametrize(
    ("shape", "value_dim"),
    [((0, 2, 3, 8), 8), ((2, 0, 3, 8), 8), ((2, 2, 0, 8), 8), ((2, 2, 3, 8), 0)],
    ids=["batch", "heads", "queries", "value_dim"],
)
def test_empty(backend: str, shape: tuple[int, ...], value_dim: int, entropy: str) -> None:
    batch, heads, queries, dim = shape
    query, key = torch.randn(shape), torch.randn(batch, heads, 5, dim)
    result = attention(query, key, torch.randn(batch, heads, 5, value_dim), entropy=entropy)
    assert result.out.shape == (batch, heads, queries, value_dim)
    assert result.lse.shape == result.max_score.shape == (batch, heads, queries)
    if entropy != "none":
        assert result.entropy is not None
        expected = (batch, queries) if entropy == "map" else (batch, heads, queries)
        assert result.entropy.shape == expected
        assert not result.entropy.isnan().any()


def test_no_keys_gives_the_empty_row(backend: str, dtype: torch.dtype) -> None:
    result = attention(
        torch.randn(2, 2, 3, 8, dtype=dtype),
        torch.randn(2, 2, 0, 8, dtype=dtype),
        torch.randn(2, 2, 0, 8, dtype=dtype),
    )
    assert result.entropy is not None
    assert torch.equal(result.out, torch.zeros(2, 2, 3, 8, dtype=dtype))
    assert torch.equal(result.entropy, torch.zeros(2, 2, 3))
    assert bool((result.lse == -math.inf).all()) and bool((result.max_score == -math.inf).all())


@st.composite
def cases(draw: st.DrawFn) -> tuple[AttentionCase, Options]:
    """Any combination of options that the contract allows."""
    kv_heads = draw(st.integers(1, 2))
    queries, keys = draw(st.integers(1, 40)), draw(st.integers(1, 70))
    tree = draw(st.booleans())
    if tree:
        keys = queries + draw(st.integers(0, 30))
    case = AttentionCase(
        batch=draw(st.integers(1, 3)),
        heads=kv_heads * draw(st.integers(1, 3)),
        kv_heads=kv_heads,
        queries=queries,
        keys=keys,
        dim=draw(st.sampled_from([1, 4, 24, 40])),
        value_dim=draw(st.sampled_from([1, 8, 33])),
    )
    seed = draw(st.integers(0, 10_000))
    keywords = case.keywords()
    length = st.integers(0, keys - queries if tree else keys)
    if draw(st.booleans()):
        keywords["key_lengths"] = torch.tensor([draw(length) for _ in range(case.batch)])
    if tree:
        batch = case.batch if draw(st.booleans()) else None
        keywords["parents"] = random_parents(queries, batch=batch, seed=seed)
    elif draw(st.booleans()):
        keywords["is_causal"] = True
        offset = st.integers(-5, keys)
        keywords["query_offset"] = (
            draw(offset)
            if draw(st.booleans())
            else torch.tensor([draw(offset) for _ in range(case.batch)])
        )
    kind = draw(st.sampled_from(["none", "bool", "float"]))
    if kind != "none":
        shape = [draw(st.sampled_from([1, n])) for n in (case.batch, 1, queries, keys)]
        keywords["attn_mask"] = (bool_mask if kind == "bool" else float_mask)(*shape, seed=seed)
    keywords["entropy"] = draw(st.sampled_from(["head", "map", "none"]))
    keywords["normalize"] = draw(st.booleans())
    keywords["entropy_from"] = draw(st.integers(0, 5))
    return case, keywords


@given(drawn=cases(), low=st.booleans())
def test_any_combination(backend: str, drawn: tuple[AttentionCase, Options], low: bool) -> None:
    case, keywords = drawn
    check(*case.qkv(dtype=torch.bfloat16 if low else torch.float32), keywords)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_no_worse_than_twice_sdpa(backend: str, dtype: torch.dtype) -> None:
    """The tight gate, PyTorch's own math kernel: catches 16-bit accumulation."""
    case = AttentionCase(batch=1, queries=257, keys=257, dim=72, value_dim=72)
    query, key, value = case.qkv(seed=3, dtype=dtype)
    truth = attention_truth(query, key, value, {}).out
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        plain = F.scaled_dot_product_attention(query, key, value)
    error = max_error(attention(query, key, value).out, truth)
    assert error <= 2 * max_error(plain, truth) + half_ulp(largest_finite(truth), dtype)


@pytest.mark.parametrize("name", ["plain", "causal", "mask_bool_bhqk", "mask_float_11qk", "gqa"])
def test_agrees_with_sdpa(backend: str, name: str) -> None:
    case = CASES[name]
    query, key, value = case.qkv()
    keywords = case.keywords()
    keywords.pop("query_offset", None)
    expected = F.scaled_dot_product_attention(query, key, value, **keywords)
    torch.testing.assert_close(attention(query, key, value, **keywords).out, expected)


def test_fp64(backend: str) -> None:
    """fp64 is computed exactly (statistics in fp64) or refused with TypeError."""
    case = CASES["everything"]
    query, key, value = case.qkv(dtype=torch.float64)
    truth = attention_truth(query, key, value, case.keywords())
    if backend == "reference":
        result = run_attention(query, key, value, case.keywords())
    else:
        try:
            result = run_attention(query, key, value, case.keywords())
        except TypeError as error:
            assert "query" in str(error)
            return
    for name in ("out", "entropy", "lse", "max_score"):
        found = getattr(result, name)
        assert found.dtype == torch.float64
        assert max_error(found, getattr(truth, name), name) < 1e-13


def padding_correction(entropy: Tensor) -> Tensor:
    """What the published clamp at 1e-8 adds to a causal row for every masked column."""
    rows = torch.arange(1, entropy.shape[-1] + 1, dtype=torch.float64)
    added = (entropy.shape[-1] - rows) * -1e-8 * math.log(1e-8)
    return torch.where(rows > 1, added / rows.clamp(min=2).log(), 0.0)


@pytest.mark.parametrize("name", CAUSAL)
def test_published_causal_entropy(backend: str, name: str) -> None:
    numbers = golden(name)
    for entropy, wanted in (("map", "entropy"), ("head", "entropy_headwise_mean_contrast")):
        result = attention(
            numbers["q"], numbers["k"], numbers["v"], is_causal=True, entropy=entropy
        )
        assert result.entropy is not None
        found = result.entropy if entropy == "map" else result.entropy.mean(1)
        expected = numbers[wanted].double()
        published = (found + padding_correction(found)).clamp(0, 1)
        torch.testing.assert_close(published, expected, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(result.out, numbers["out"], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", CAUSAL)
def test_mask_and_causal_flag_are_one(backend: str, name: str) -> None:
    numbers = golden(name)
    flag = attention(numbers["q"], numbers["k"], numbers["v"], is_causal=True, entropy="map")
    mask = attention(numbers["q"], numbers["k"], numbers["v"], numbers["mask"], entropy="map")
    for left, right in zip(flag, mask, strict=True):
        torch.testing.assert_close(left, right, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("name", "buffer"), BUFFERED)
def test_published_buffered_entropy(backend: str, name: str, buffer: int) -> None:
    numbers = golden(name)
    length = numbers["q"].shape[2]
    row, column = torch.arange(length)[:, None], torch.arange(length)
    mask = torch.where(row < buffer, column < buffer, column <= row)
    if "mask" in numbers:
        assert torch.equal(mask, numbers["mask"][0, 0] == 0)
    result = attention(
        numbers["q"], numbers["k"], numbers["v"], mask, entropy="map", entropy_from=buffer
    )
    assert result.entropy is not None
    assert not result.entropy[:, :buffer].any()
    found = result.entropy[:, buffer:]
    published = (found + padding_correction(found)).clamp(0, 1)
    torch.testing.assert_close(published, numbers["entropy"].double(), rtol=1e-5, atol=1e-5)


def test_head_entropy_is_below_map_entropy(backend: str) -> None:
    query, key, value = CASES["plain"].qkv()
    head = attention(query, key, value, entropy="head").entropy
    whole = attention(query, key, value, entropy="map").entropy
    assert head is not None and whole is not None
    assert bool((head.mean(1) <= whole + 1e-6).all())


def test_map_support_is_the_largest_over_heads(backend: str) -> None:
    """Heads that see 2, 4 and 8 keys: the entropy of the average is divided by log 8."""
    mask = torch.arange(8) < torch.tensor([2, 4, 8])[None, :, None, None]
    query, key = torch.zeros(1, 3, 1, 4), torch.zeros(1, 3, 8, 4)
    result = attention(query, key, normal(1, 3, 8, 4, seed=0), mask, entropy="map")
    average = torch.tensor([1 / 2, 1 / 2, 0, 0, 0, 0, 0, 0]) + torch.tensor([1 / 4] * 4 + [0] * 4)
    average = (average + torch.full((8,), 1 / 8)) / 3
    expected = -(average * average.log()).sum() / math.log(8)
    assert result.entropy is not None
    torch.testing.assert_close(result.entropy, expected.reshape(1, 1))
