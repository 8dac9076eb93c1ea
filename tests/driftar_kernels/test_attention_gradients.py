"""Gradients of :func:`driftar_kernels.attention` through out, entropy and lse."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from driftar_kernels import attention, use_backend
from tests.helpers.inputs import (
    CASES,
    QKV,
    AttentionCase,
    Options,
    attention_truth,
    normal,
    run_attention,
    trainable,
)
from tests.helpers.interpreter import size
from tests.helpers.tolerance import (
    GRADIENT_FACTOR,
    assert_bitwise,
    assert_close_to_truth,
    max_error,
)

Gradients = tuple[Tensor, ...]


def upstream(results: tuple[Tensor | None, ...], seed: int = 90) -> list[Tensor]:
    """Random gradients of out, entropy and lse, in fp64."""
    return [
        normal(*r.shape, seed=seed + i, dtype=torch.float64)
        for i, r in enumerate(results)
        if r is not None
    ]


def gradients_of(
    results: tuple[Tensor | None, ...], leaves: tuple[Tensor, ...], grads: list[Tensor]
) -> Gradients:
    present = [r for r in results if r is not None]
    return torch.autograd.grad(
        present, leaves, [g.to(r.dtype) for g, r in zip(grads, present, strict=True)]
    )


def largest_terms(qkv: QKV, scale: float | None, grad_out: Tensor) -> tuple[float, float, float]:
    """Sizes of the terms that the gradients of query, key and value sum."""
    query, key, value = (t.detach() for t in qkv)
    if not (grad_out.numel() and value.numel()):
        return 0.0, 0.0, 0.0
    values = value.repeat_interleave(query.shape[1] // value.shape[1], 1)
    score_gradient = float((grad_out @ values.transpose(-1, -2)).abs().max())
    score_gradient *= abs(scale) if scale is not None else query.shape[-1] ** -0.5
    return (
        score_gradient * float(key.abs().max()),
        score_gradient * float(query.abs().max()),
        float(grad_out.abs().max()),
    )


def check_gradients(qkv: QKV, keywords: Options, **more: Any) -> None:
    """All three gradients against fp64, allowed 3x the error of plain PyTorch at the same dtype."""
    dtype = qkv[0].dtype

    mine, exact, low = trainable(qkv), trainable(qkv, torch.float64), trainable(qkv)
    result = run_attention(*mine, keywords, **more)
    grads = upstream((result.out, result.entropy, result.lse))
    found = gradients_of((result.out, result.entropy, result.lse), mine, grads)
    truth = attention_truth(*exact, keywords, **more)
    expected = gradients_of((truth.out, truth.entropy, truth.lse), exact, grads)
    plain = attention_truth(*low, keywords, **more, dtype=dtype)
    formula = gradients_of((plain.out, plain.entropy, plain.lse), low, grads)
    terms = largest_terms(exact, keywords.get("scale"), grads[0])
    for name, gradient, right, usual, term in zip(
        ("query", "key", "value"), found, expected, formula, terms, strict=True
    ):
        assert gradient.dtype == dtype
        # A few fp32 roundings of the largest term of the sums, which may cancel in the result.
        floor = 8 * torch.finfo(torch.float32).eps * max(1.0, term)
        assert_close_to_truth(
            gradient, right, usual, factor=GRADIENT_FACTOR, floor=floor, name=f"grad of {name}"
        )


@pytest.mark.parametrize("name", list(CASES))
def test_case(backend: str, dtype: torch.dtype, name: str) -> None:
    case = CASES[name]
    check_gradients(case.qkv(dtype=dtype), case.keywords())


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("entropy", ["map", "none"])
@pytest.mark.parametrize("name", ["plain", "entropy_from", "mqa", "tree_lengths", "everything"])
def test_entropy_kinds(backend: str, name: str, entropy: str, normalize: bool) -> None:
    case = CASES[name]
    check_gradients(case.qkv(seed=5), case.keywords(), entropy=entropy, normalize=normalize)


@pytest.mark.parametrize("dim", [1, 40, 72, 128, 256])
@pytest.mark.parametrize("length", [1, 63, 65])
def test_shapes(backend: str, dim: int, length: int) -> None:
    case = AttentionCase(
        batch=1, heads=2, kv_heads=1, queries=length, keys=length + 1, dim=dim, value_dim=dim
    )
    check_gradients(case.qkv(seed=dim), {**case.keywords(), "is_causal": True})


def test_low_precision_gradients_are_accumulated_wide(backend: str) -> None:
    """bf16 key gradients sum 500 rows: their error stays near one rounding of the result."""
    case = AttentionCase(batch=1, heads=1, kv_heads=1, queries=500, keys=20, dim=16, value_dim=16)
    qkv = case.qkv(dtype=torch.bfloat16)
    query, key, value = trainable(qkv)
    exact = trainable(qkv, torch.float64)
    result = attention(query, key, value)
    truth = attention_truth(*exact, {})
    ones = [torch.ones_like(truth.out), torch.ones_like(truth.lse)]
    found = gradients_of((result.out, result.lse), (query, key, value), ones)
    expected = gradients_of((truth.out, truth.lse), exact, ones)
    for gradient, right in zip(found, expected, strict=True):
        assert max_error(gradient, right) <= 2.0**-6 * float(right.abs().max())


@pytest.mark.parametrize("wanted", ["out", "entropy", "lse"])
@pytest.mark.parametrize("entropy", ["head", "map"])
def test_each_output_alone(backend: str, wanted: str, entropy: str) -> None:
    case = CASES["everything"]
    mine = trainable(case.qkv())
    exact = trainable(mine, torch.float64)
    result = getattr(run_attention(*mine, case.keywords(), entropy=entropy), wanted)
    truth = getattr(attention_truth(*exact, case.keywords(), entropy=entropy), wanted)
    grads = upstream((truth,))
    used = 3 if wanted == "out" else 2
    found = gradients_of((result,), mine[:used], grads)
    expected = gradients_of((truth,), exact[:used], grads)
    for gradient, right in zip(found, expected, strict=True):
        assert max_error(gradient, right) <= 2e-5 * max(1.0, float(right.abs().max()))
    if wanted != "out":
        (value_gradient,) = torch.autograd.grad(
            run_attention(*mine, case.keywords(), entropy=entropy)
            ._asdict()[wanted]
            .nan_to_num(neginf=0)
            .sum(),
            mine[2],
            allow_unused=True,
        )
        assert value_gradient is None or not value_gradient.any()


def test_lse_gradient_is_the_softmax(backend: str) -> None:
    query, key, value = trainable(AttentionCase(batch=1, heads=1, kv_heads=1).qkv())
    result = attention(query, key, value, scale=1.0)
    (gradient,) = torch.autograd.grad(result.lse.sum(), query)
    chance = (query @ key.transpose(-1, -2)).softmax(-1)
    torch.testing.assert_close(gradient, chance @ key)
    torch.testing.assert_close(result.lse, (query @ key.transpose(-1, -2)).logsumexp(-1))


def test_max_score_has_no_gradient(backend: str) -> None:
    query, key, value = trainable(AttentionCase().qkv())
    assert not attention(query, key, value).max_score.requires_grad


def test_uniform_and_single_rows_have_no_entropy_gradient(backend: str) -> None:
    """The entropy is stationary at equal scores, and constant where |E_i| <= 1."""
    key = normal(1, 1, 6, 4, seed=1).requires_grad_()
    value = normal(1, 1, 6, 4, seed=2)
    query = torch.zeros(1, 1, 6, 4, requires_grad=True)
    found = attention(query, key, value).entropy
    assert found is not None
    for gradient in torch.autograd.grad(found.sum(), (query, key)):
        assert float(gradient.abs().max()) < 1e-6
    query = normal(1, 1, 6, 4, seed=3).requires_grad_()
    found = attention(query, key, value, torch.eye(6, dtype=torch.bool)).entropy
    assert found is not None
    for gradient in torch.autograd.grad(found.sum(), (query, key)):
        assert not gradient.any()


@pytest.mark.parametrize("entropy", ["head", "map"])
def test_sharp_rows_have_finite_gradients(backend: str, entropy: str) -> None:
    """Probabilities that underflow to 0 contribute 0, not 0 * log 0."""
    leaves = trainable(AttentionCase(queries=32, keys=64).qkv(gain=1e3))
    result = attention(*leaves, entropy=entropy)
    assert result.entropy is not None
    for gradient in torch.autograd.grad(result.entropy.sum() + result.out.sum(), leaves):
        assert bool(gradient.isfinite().all())


@pytest.mark.parametrize("entropy", ["head", "map"])
@pytest.mark.parametrize(
    "name",
    [
        "plain",
        "causal",
        "gqa",
        "lengths",
        "mask_bool_bhqk",
        "mask_float_11qk",
        "tree_lengths",
        "entropy_from",
    ],
)
def test_gradcheck(name: str, entropy: str) -> None:
    """fp64 finite differences through out, entropy and lse jointly (reference)."""
    case = CASES[name]
    keywords = case.keywords()
    leaves = trainable(case.qkv(dtype=torch.float64))

    def outputs(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
        result = run_attention(query, key, value, keywords, entropy=entropy)
        assert result.entropy is not None
        finite = torch.where(result.lse.isfinite(), result.lse, 0.0)
        return result.out, result.entropy, finite

    with use_backend("reference"):
        assert torch.autograd.gradcheck(outputs, leaves, fast_mode=True)


@pytest.mark.parametrize("output", ["out", "entropy", "lse"])
def test_expanded_upstream_gradient(backend: str, dtype: torch.dtype, output: str) -> None:
    """`.sum().backward()` hands over a gradient of stride 0."""
    leaves = trainable(AttentionCase(queries=65, keys=70).qkv(dtype=dtype))
    used = leaves if output == "out" else leaves[:2]
    summed = torch.autograd.grad(getattr(attention(*leaves), output).sum(), used)
    result = getattr(attention(*leaves), output)
    dense = torch.autograd.grad(result, used, torch.ones_like(result))
    assert_bitwise(summed, dense)


def test_only_the_needed_gradients(backend: str) -> None:
    query, key, value = AttentionCase().qkv()
    full = trainable((query, key, value))
    expected = torch.autograd.grad(attention(*full).out.sum(), full)
    for index in range(3):
        some = [query, key, value]
        some[index] = some[index].clone().requires_grad_()
        (found,) = torch.autograd.grad(attention(*some).out.sum(), some[index])
        torch.testing.assert_close(found, expected[index])
    assert not attention(query, key, value).out.requires_grad


def test_two_backward_passes_agree(backend: str) -> None:
    leaves = trainable(AttentionCase().qkv())
    result = attention(*leaves)
    assert result.entropy is not None
    loss = result.out.square().sum() + result.entropy.sum()
    first = torch.autograd.grad(loss, leaves, retain_graph=True)
    second = torch.autograd.grad(loss, leaves)
    assert_bitwise(first, second)


@pytest.mark.parametrize("output", ["out", "entropy", "lse"])
def test_double_backward_is_right_or_raises(backend: str, output: str) -> None:
    """A gradient penalty is never silently zero."""
    qkv = AttentionCase(batch=1, heads=1, kv_heads=1).qkv()

    def penalty(result: Tensor, query: Tensor) -> Tensor:
        (gradient,) = torch.autograd.grad(result.square().sum(), query, create_graph=True)
        return torch.autograd.grad(gradient.square().sum(), query)[0]

    query = qkv[0].clone().requires_grad_()
    exact = qkv[0].double().requires_grad_()
    truth = getattr(attention_truth(exact, *qkv[1:], {}), output)
    try:
        found = penalty(getattr(attention(query, *qkv[1:]), output), query)
    except RuntimeError:
        return
    expected = penalty(truth, exact)
    assert max_error(found, expected) <= 1e-4 * float(expected.abs().max())


def test_gradient_descent_raises_entropy(backend: str) -> None:
    """The gradient does what it is for: following it drives the entropy to its maximum."""
    heads = size(4, 1)
    query, key, value = trainable(AttentionCase(batch=1, heads=heads, kv_heads=heads).qkv(gain=3.0))
    optimizer = torch.optim.Adam([query, key], lr=0.2)
    start = attention(query, key, value).entropy
    assert start is not None and float(start.detach().mean()) < 0.7
    for _ in range(size(150, 60)):
        optimizer.zero_grad()
        found = attention(query, key, value).entropy
        assert found is not None
        (-found.mean()).backward()
        optimizer.step()
    end = attention(query, key, value).entropy
    assert end is not None and float(end.detach().mean()) > 0.99
