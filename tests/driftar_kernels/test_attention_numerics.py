"""Corners of the arithmetic: masked rows, NaN, infinities, sharp and flat rows."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from driftar_kernels import AttentionOutput, DraftTree, attention
from tests.driftar_kernels.test_attention import check
from tests.helpers.inputs import (
    HEADS,
    AttentionCase,
    attention_truth,
    normal,
    trainable,
)
from tests.helpers.interpreter import size
from tests.helpers.tolerance import assert_bitwise, max_error


def entropy_of(result: AttentionOutput) -> Tensor:
    assert result.entropy is not None
    return result.entropy


@pytest.mark.parametrize("entropy", ["head", "map"])
@pytest.mark.parametrize("how", ["bool", "float", "lengths", "causal", "every"])
def test_rows_that_see_nothing(backend: str, dtype: torch.dtype, how: str, entropy: str) -> None:
    """out 0, entropy 0, lse and max -inf, gradients exactly 0; the other rows are unharmed."""
    query, key, value = trainable(AttentionCase(queries=9).qkv(dtype=dtype))
    blind = torch.zeros(2, 9, dtype=torch.bool)
    keywords: dict[str, object] = {}
    if how in ("bool", "float"):
        blind[0, 2], blind[1, 0], blind[1, 8] = True, True, True
        mask = ~blind[:, None, :, None].expand(2, 1, 9, 9)
        keywords["attn_mask"] = mask if how == "bool" else torch.zeros(()).where(mask, -math.inf)
    elif how == "lengths":
        blind[1] = True
        keywords["key_lengths"] = torch.tensor([5, 0])
    elif how == "causal":
        blind[:, :4] = True
        keywords.update(is_causal=True, query_offset=-4)
    else:
        blind[:] = True
        keywords["attn_mask"] = torch.zeros(9, 9, dtype=torch.bool)
    result = attention(query, key, value, entropy=entropy, **keywords)  # type: ignore[arg-type]
    rows = blind[:, None].expand(2, HEADS, 9)
    found = entropy_of(result)
    assert not result.out[rows].any() and not result.out.isnan().any()
    assert not found[blind if entropy == "map" else rows].any() and not found.isnan().any()
    for statistic in (result.lse, result.max_score):
        assert torch.equal(statistic == -math.inf, rows)
        assert not statistic.isnan().any()
    gradients = torch.autograd.grad(
        (result.out, found, result.lse),
        (query, key, value),
        (torch.ones_like(result.out), torch.ones_like(found), torch.ones_like(result.lse)),
    )
    assert not gradients[0][rows].any()
    assert all(not g.isnan().any() for g in gradients)
    if how == "every":
        assert all(not g.any() for g in gradients)


def test_first_tiles_masked_and_later_scores_very_negative(backend: str) -> None:
    """Rows whose visible scores all lie below -1000 after several hidden tiles."""
    query, key, value = AttentionCase(queries=5, keys=400, dim=16).qkv()
    mask = (torch.arange(400) >= 333).expand(5, 400)
    bias = torch.where(mask, -5000.0, -math.inf)
    result = attention(query, key, value, bias)
    truth = attention_truth(query, key, value, {"attn_mask": bias})
    assert max_error(result.out, truth.out) < 5e-3  # a score near -5000 has an ulp of 5e-4
    assert max_error(result.lse, truth.lse) < 2e-3
    hidden = attention(query, key, value, mask)
    plain = attention(query, key[:, :, 333:], value[:, :, 333:])
    torch.testing.assert_close(hidden.out, plain.out)
    torch.testing.assert_close(hidden.entropy, plain.entropy)


def test_nan_in_one_query_row(backend: str, dtype: torch.dtype) -> None:
    query, key, value = AttentionCase(queries=70, keys=70).qkv(dtype=dtype)
    clean = attention(query, key, value)
    query[0, 1, 3, 2] = math.nan
    result = attention(query, key, value)
    rows = torch.zeros(2, HEADS, 70, dtype=torch.bool)
    rows[0, 1, 3] = True
    assert torch.equal(result.out.isnan().any(-1), rows) and torch.equal(
        result.out.isnan().all(-1), rows
    )
    assert torch.equal(entropy_of(result).isnan(), rows)
    assert torch.equal(result.out[~rows], clean.out[~rows])
    assert torch.equal(entropy_of(result)[~rows], entropy_of(clean)[~rows])


@pytest.mark.parametrize("poison", [math.nan, math.inf])
@pytest.mark.parametrize("key_index", [0, 5, 69])
def test_non_finite_key_reaches_exactly_the_rows_that_see_it(
    backend: str, poison: float, key_index: int
) -> None:
    query, key, value = AttentionCase(queries=70, keys=70).qkv()
    query[..., 0] = query[..., 0].abs() + 0.1  # an infinite key then scores +inf everywhere
    clean = attention(query, key, value, is_causal=True)
    key[1, -1, key_index, 0] = poison
    result = attention(query, key, value, is_causal=True)
    rows = torch.zeros(2, HEADS, 70, dtype=torch.bool)
    rows[1, -1, key_index:] = True
    assert torch.equal(result.out.isnan().all(-1), rows) and torch.equal(
        result.out.isnan().any(-1), rows
    )
    found = entropy_of(result).isnan()
    if key_index == 0:  # its only visible key: |E_i| = 1 and NaN are both defensible
        found[1, -1, 0] = True
    assert torch.equal(found, rows)
    assert torch.equal(result.out[~rows], clean.out[~rows])


def test_infinite_query_scale_or_mask(backend: str) -> None:
    query, key, value = AttentionCase().qkv()
    bias = torch.zeros(7, 9)
    bias[2, 4] = math.inf
    bias[5, 1] = math.nan
    result = attention(query, key, value, bias)
    rows = torch.zeros(2, HEADS, 7, dtype=torch.bool)
    rows[:, :, [2, 5]] = True
    assert torch.equal(result.out.isnan().all(-1), rows)
    assert torch.equal(entropy_of(result).isnan(), rows)


def test_nan_in_a_visible_value_shows(backend: str) -> None:
    query, key, value = AttentionCase(queries=9).qkv()
    value[0, 0, 4, 1] = math.nan
    result = attention(query, key, value, is_causal=True)
    assert bool(result.out[0, 0, 4:, 1].isnan().all())
    assert not result.out[1].isnan().any() and not result.out[0, 1:].isnan().any()
    assert not entropy_of(result).isnan().any()


def test_nan_behind_lengths_has_no_effect(backend: str, dtype: torch.dtype) -> None:
    query, key, value = AttentionCase(queries=40, keys=130).qkv(dtype=dtype)
    lengths = torch.tensor([67, 3])
    clean = attention(query, key, value, key_lengths=lengths)
    for b, length in enumerate(lengths.tolist()):
        key[b, :, length:] = math.nan
        value[b, :, length:] = math.nan
    query, key, value = leaves = trainable((query, key, value))
    result = attention(query, key, value, key_lengths=lengths)
    assert_bitwise(clean, result)
    gradients = torch.autograd.grad(result.out.sum() + entropy_of(result).sum(), leaves)
    assert not gradients[0].isnan().any()
    for b, length in enumerate(lengths.tolist()):
        for gradient in gradients[1:]:
            assert not gradient[b, :, :length].isnan().any()
            assert not gradient[b, :, length:].any()


def test_nan_in_a_masked_key_has_no_effect(backend: str) -> None:
    query, key, value = AttentionCase(queries=40, keys=130).qkv()
    mask = torch.arange(130) % 3 != 1
    clean = attention(query, key, value, mask)
    key[:, :, ~mask] = math.nan
    assert_bitwise(clean, attention(query, key, value, mask))


@pytest.mark.parametrize("entropy", ["head", "map"])
@pytest.mark.parametrize("how", ["bool", "float", "causal", "tree"])
def test_nan_in_a_hidden_key_does_not_reach_gradients(
    native_backend: str, how: str, entropy: str
) -> None:
    """Queries that do not see the key keep every bit, though others of their tile see it. (The
    reference backend multiplies it by a gradient of 0.)"""
    query, key, value = AttentionCase(queries=6, keys=6, dim=16).qkv()
    keywords: dict[str, object] = {"entropy": entropy}
    sees = torch.ones(6, 6, dtype=torch.bool).tril()
    if how == "tree":
        keywords["tree"] = DraftTree([-1, 0, 1, 1, -1, 4])
        sees[2, 0], sees[3, 2], sees[4:, :4] = True, False, False
    elif how == "causal":
        keywords["is_causal"] = True
    else:
        keywords["attn_mask"] = sees if how == "bool" else torch.zeros(()).where(sees, -math.inf)
    poisoned = 3

    def gradients(bad: float) -> tuple[Tensor, ...]:
        leaves = trainable((query, key, value))
        with torch.no_grad():
            leaves[1][:, :, poisoned] *= bad
        result = attention(*leaves, **keywords)  # type: ignore[arg-type]
        rows = ~sees[:, poisoned]
        total = result.out[:, :, rows].sum() + result.lse[:, :, rows].sum()
        return torch.autograd.grad(total + entropy_of(result)[..., rows].sum(), leaves)

    blind = ~sees[:, poisoned]
    clean, found = gradients(1.0), gradients(math.nan)
    assert_bitwise([clean[0][:, :, blind]], [found[0][:, :, blind]])


@pytest.mark.parametrize("which", ["query", "key"])
def test_nan_reaches_no_gradient_that_does_not_meet_it(
    native_backend: str, dtype: torch.dtype, which: str
) -> None:
    """Nor keys behind a query that is NaN, though blocks of both meet."""
    length, poisoned = size(300, 40), size(150, 21)
    case = AttentionCase(batch=1, queries=length, keys=length, dim=24, value_dim=17)
    weights = normal(1, case.heads, length, 17, seed=3, dtype=dtype)

    def gradients(poison: float) -> list[Tensor]:
        query, key, value = case.qkv(dtype=dtype)
        (query if which == "query" else key)[:, :, poisoned] *= poison
        leaves = trainable((query, key, value))
        result = attention(*leaves, is_causal=True, enable_gqa=True)
        return list(torch.autograd.grad(result.out, leaves, weights))

    clean, found = gradients(1.0), gradients(math.nan)
    # Queries before a key do not see it, and keys behind a query are not seen by it.
    is_key = which == "key"
    rows = slice(0, poisoned) if is_key else slice(poisoned + 1, None)
    for before, after in list(zip(clean, found, strict=True))[slice(1) if is_key else slice(1, 3)]:
        torch.testing.assert_close(before[:, :, rows], after[:, :, rows], rtol=1e-2, atol=1e-2)
    assert not all(x.isfinite().all() for x in found)


def test_nan_outside_the_tree_has_no_effect(backend: str) -> None:
    tree = DraftTree([-1, 0, -1, 2])
    query, key, value = AttentionCase(batch=1, queries=4, keys=12).qkv()
    clean = attention(query, key, value, tree=tree, key_lengths=torch.tensor([5]))
    key[:, :, 9:], value[:, :, 9:] = math.nan, math.nan
    result = attention(query, key, value, tree=tree, key_lengths=torch.tensor([5]))
    assert_bitwise(clean, result)


@pytest.mark.parametrize("magnitude", [1e3, 1e4])
def test_large_scores(backend: str, magnitude: float) -> None:
    query, key, value = AttentionCase(queries=64, keys=64, dim=16).qkv(gain=magnitude)
    result = attention(query, key, value)
    truth = attention_truth(query, key, value, {})
    ulp = 2.0**-23 * float(truth.max_score.abs().max())
    found = entropy_of(result)
    assert not result.out.isnan().any() and bool((found >= 0).all())
    assert bool((found <= 1 + 1e-6).all())
    assert max_error(result.max_score, truth.max_score) <= 8 * ulp
    assert max_error(result.lse, truth.lse) <= 8 * ulp
    assert max_error(result.out, truth.out) <= 16 * ulp * float(value.abs().max())
    assert max_error(found, truth.entropy) <= 16 * ulp  # type: ignore[arg-type]


@pytest.mark.parametrize("entropy", ["head", "map"])
@pytest.mark.parametrize("slope", [-0.1, 0.003, 0.05, 3.0])
def test_maxima_that_climb_along_the_keys(
    backend: str, dtype: torch.dtype, slope: float, entropy: str
) -> None:
    """What was summed with an earlier maximum follows a later one, whether far above it or not."""
    keys = size(700, 200)
    case = AttentionCase(batch=1, heads=2, kv_heads=2, queries=size(40, 20), keys=keys, dim=16)
    query, key, value = case.qkv(dtype=dtype)
    query[..., 0], key[..., 0] = 4.0, slope * torch.arange(keys)
    check(query, key, value, {"scale": 0.25}, entropy=entropy)


@pytest.mark.parametrize("count", [1, 2, 65, size(4096, 1000)])
def test_equal_scores_have_full_entropy(backend: str, dtype: torch.dtype, count: int) -> None:
    query = torch.zeros(1, 1, 2, 8, dtype=dtype)
    key, value = (normal(1, 1, count, 8, seed=s, dtype=dtype) for s in (1, 2))
    plain = entropy_of(attention(query, key, value, normalize=False))
    ratio = entropy_of(attention(query, key, value))
    torch.testing.assert_close(plain, torch.full((1, 1, 2), math.log(count)), rtol=2e-6, atol=0)
    assert bool((plain <= math.log(count) * (1 + 1e-6)).all())
    torch.testing.assert_close(ratio, torch.full((1, 1, 2), float(count > 1)), rtol=2e-6, atol=0)


@pytest.mark.parametrize("entropy", ["head", "map"])
def test_one_hot_rows_have_no_entropy(backend: str, entropy: str) -> None:
    eye = torch.eye(64).reshape(1, 1, 64, 64)
    value = normal(1, 1, 64, 8, seed=0)
    result = attention(eye * 800, eye, value, entropy=entropy, normalize=False)
    assert max_error(entropy_of(result), torch.zeros_like(entropy_of(result))) < 1e-5
    assert max_error(result.out, value) < 1e-5


def test_sharp_long_rows_stay_within_bounds(backend: str) -> None:
    """0 <= H <= log n over thousands of keys for gains from flat to one-hot."""
    keys = size(4096, 300)
    for gain in (0.01, 1.0, 10.0, 100.0):
        case = AttentionCase(batch=1, heads=2, kv_heads=2, queries=size(32, 16), keys=keys, dim=32)
        query, key, value = case.qkv(seed=7, gain=gain)
        for entropy in ("head", "map"):
            found = entropy_of(attention(query, key, value, entropy=entropy, normalize=False))
            assert bool((found >= 0).all())
            assert bool((found <= math.log(keys) * (1 + 1e-6)).all())


@pytest.mark.parametrize("entropy", ["head", "map"])
def test_one_visible_key_is_exact(backend: str, dtype: torch.dtype, entropy: str) -> None:
    query, key, value = AttentionCase(queries=9).qkv(dtype=dtype, gain=30.0)
    result = attention(query, key, value, torch.eye(9, dtype=torch.bool), entropy=entropy)
    assert torch.equal(result.out, value)
    assert not entropy_of(result).any()


def test_finite_extremes_in_a_mask_are_values(backend: str) -> None:
    """finfo.min is a number: a row that holds nothing else still attends (uniformly)."""
    lowest = torch.finfo(torch.float32).min
    query, key = torch.zeros(1, 1, 2, 4), torch.zeros(1, 1, 5, 4)
    value = normal(1, 1, 5, 4, seed=0)
    bias = torch.full((2, 5), lowest)
    bias[1, 3] = 0.0
    result = attention(query, key, value, bias)
    torch.testing.assert_close(result.out[0, 0, 0], value[0, 0].mean(0))
    torch.testing.assert_close(result.out[0, 0, 1], value[0, 0, 3])
    torch.testing.assert_close(entropy_of(result), torch.tensor([[[1.0, 0.0]]]))
