"""``torch.compile(fullgraph=True)``, autocast and gradients in compiled code."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from driftar_kernels import (
    DraftTree,
    attention,
    drift_field,
    drift_loss,
    entropy_prior,
    use_backend,
    verify_chain,
    verify_tree,
    walk_tree,
)
from tests.helpers.inputs import (
    CASES,
    QKV,
    AttentionCase,
    chain,
    drift_inputs,
    generator,
    run_attention,
    trainable,
)
from tests.helpers.interpreter import size
from tests.helpers.recording import native_operators
from tests.helpers.tolerance import assert_bitwise


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def assert_same(left: Any, right: Any) -> None:
    for a, b in zip(left, right, strict=True):
        if a is None:
            assert b is None
        else:
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def with_gradients(
    function: Callable[..., Any], leaves: QKV, keywords: dict[str, Any]
) -> list[Tensor]:
    leaves = trainable(leaves)
    result = function(*leaves, **keywords)
    loss = result.out.square().sum() + result.lse.nan_to_num(neginf=0).sum()
    if result.entropy is not None:
        loss = loss + result.entropy.sum()
    return [*result, *torch.autograd.grad(loss, leaves)]


@pytest.mark.parametrize("entropy", ["head", "map", "none"])
@pytest.mark.parametrize(
    "name", ["plain", "causal_tensor_offset", "lengths", "mask_float_b11k", "gqa"]
)
def test_attention(backend: str, name: str, entropy: str) -> None:
    case = CASES[name]
    keywords = {**case.keywords(), "entropy": entropy}
    compiled = torch.compile(attention, fullgraph=True, backend="aot_eager")
    assert_same(
        with_gradients(compiled, case.qkv(), keywords),
        with_gradients(attention, case.qkv(), keywords),
    )


def test_tree_attention(backend: str) -> None:
    case = CASES["tree_lengths"]
    keywords = case.keywords()
    keywords["tree"] = DraftTree(keywords.pop("parents"))
    compiled = torch.compile(attention, fullgraph=True, backend="aot_eager")
    assert_same(
        with_gradients(compiled, case.qkv(), keywords),
        with_gradients(attention, case.qkv(), keywords),
    )


def test_trees_and_chains(backend: str) -> None:
    tree = DraftTree([-1, 0, 0, 1])

    def step(accept: Tensor, draft: Tensor, target: Tensor) -> tuple[Tensor, ...]:
        return (*walk_tree(tree, accept), *verify_tree(tree, draft, target, tolerance=0.5))

    inputs = torch.rand(3, 4) < 0.8, torch.randn(3, 4, 5) * 0.1, torch.zeros(3, 4, 5)
    assert_same(torch.compile(step, fullgraph=True, backend="aot_eager")(*inputs), step(*inputs))
    compiled = torch.compile(verify_chain, fullgraph=True, backend="aot_eager")
    verdict = compiled(*chain([0.0] * 2, [1.0] * 2, [0.0] * 3, [1.0] * 3, dim=3, batch=8))
    assert verdict.length.tolist() == [2] * 8
    assert verdict.next_sample.shape == (8, 3)


def test_drift(backend: str) -> None:
    gen, pos, neg, keywords = drift_inputs(weighted=True)
    compiled = torch.compile(drift_field, fullgraph=True, backend="aot_eager")
    assert_same(compiled(gen, pos, neg, **keywords), drift_field(gen, pos, neg, **keywords))

    def gradient(function: Callable[..., Tensor]) -> list[Tensor]:
        leaf = gen.clone().requires_grad_()
        loss = function(leaf, pos, neg, **keywords)
        return [loss.detach(), *torch.autograd.grad(loss, leaf)]

    assert_same(
        gradient(torch.compile(drift_loss, fullgraph=True, backend="aot_eager")),
        gradient(drift_loss),
    )


def test_prior(backend: str) -> None:
    inputs = torch.randn(3, 4, 5), torch.rand(3, 4), torch.randn(3, 4, 5)

    def gradients(function: Callable[..., Tensor]) -> list[Tensor]:
        leaves = [t.clone().requires_grad_() for t in inputs]
        sample = function(*leaves)
        return [sample.detach(), *torch.autograd.grad(sample.square().sum(), leaves)]

    assert_same(
        gradients(torch.compile(entropy_prior, fullgraph=True, backend="aot_eager")),
        gradients(entropy_prior),
    )


def test_no_recompilation_per_length(backend: str) -> None:
    """Growing caches and batches run in the graph that was compiled for dynamic shapes."""
    counter = CompileCounterWithBackend("aot_eager")

    def step(query: Tensor, key: Tensor, value: Tensor, offset: Tensor) -> Tensor:
        result = attention(query, key, value, is_causal=True, query_offset=offset)
        assert result.entropy is not None
        return result.out.sum(-1) + result.entropy

    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend=counter)
    for queries, keys in ((5, 9), (6, 17), (7, 33), (12, 70), (20, 131)):
        query, key, value = AttentionCase(queries=queries, keys=keys).qkv(seed=keys)
        offset = torch.tensor([keys - queries, 3])
        assert_same([compiled(query, key, value, offset)], [step(query, key, value, offset)])
    assert counter.frame_count == 1


def test_changed_choice_retraces(backend: str) -> None:
    """One compiled function follows use_backend from call to call."""
    counter = CompileCounterWithBackend("aot_eager")
    query, key, value = AttentionCase().qkv()
    compiled = torch.compile(attention, fullgraph=True, backend=counter)
    names = list(dict.fromkeys([backend, "reference"]))
    for name in names * 2:
        with use_backend(name):
            assert_same(compiled(query, key, value), attention(query, key, value))
    assert counter.frame_count == len(names)


def test_numbers_as_arguments_under_dynamic_compilation(backend: str) -> None:
    """Floats that the compiler turns into symbols pass the checks."""

    def step(scale: float, tau: float, tolerance: float, hot: float) -> tuple[Tensor, ...]:
        query = torch.linspace(-1, 1, 24).reshape(1, 1, 3, 8)
        points = torch.linspace(-1, 1, 24).reshape(1, 3, 8)
        tree = DraftTree([-1, 0, 1])
        return (
            attention(query, query, query, scale=scale).out,
            entropy_prior(points, points[..., 0], points, tau=tau),
            verify_tree(tree, points, points + 0.1, tolerance=tolerance).length,
            drift_field(points, points + 0.1, temperatures=(0.1, hot)).force,
        )

    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend="aot_eager")
    for numbers in ((0.3, 2.0, 0.5, 0.2), (0.4, -1.0, 0.01, 0.5), (0.5, 3.0, 0.7, 0.9)):
        assert_same(compiled(*numbers), step(*numbers))


def test_no_recompilation_of_drift_per_size(backend: str) -> None:
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(drift_field, fullgraph=True, dynamic=True, backend=counter)
    for count in (5, 8, 13, 29, 31, 40)[: size(6, 4)]:
        gen, pos, neg, _ = drift_inputs(3, count, count + 2, 4)
        assert_same(compiled(gen, pos, neg), drift_field(gen, pos, neg))
    assert counter.frame_count <= 2  # one re-trace when two sizes stop being equal


def graph_operators(function: Callable[[], Any]) -> set[str]:
    """Names of the package's operators in the graphs that ``function`` compiles to."""
    found: set[str] = set()

    def spy(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        found.update(
            str(n.target) for n in graph.graph.nodes if str(n.target).startswith("driftar.")
        )
        return graph.forward

    torch.compile(function, fullgraph=True, backend=spy)()
    return found


def test_backend_choice_inside_compiled_code(backend: str) -> None:
    """A choice outside the compiled function and one inside it both hold."""
    query, key, value = AttentionCase().qkv()

    def outside() -> Tensor:
        return attention(query, key, value).out

    def inside() -> Tensor:
        with use_backend("reference"):
            return attention(query, key, value).out

    def nested() -> Tensor:
        with use_backend("reference"), use_backend(backend):
            return attention(query, key, value).out

    native = backend != "reference"
    assert bool(graph_operators(outside)) == native
    with use_backend("reference"):
        assert not graph_operators(outside)
    assert bool(graph_operators(outside)) == native
    assert not graph_operators(inside)
    assert bool(graph_operators(nested)) == native
    assert bool(native_operators(outside)) == native, "a compiled context leaked its choice"


@pytest.mark.slow
def test_inductor(backend: str) -> None:
    case = CASES["causal"]
    keywords = case.keywords()
    compiled = torch.compile(attention, fullgraph=True)
    assert_same(
        with_gradients(compiled, case.qkv(), keywords),
        with_gradients(attention, case.qkv(), keywords),
    )


# -- autocast ---------------------------------------------------------------------


@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_autocast_attention(backend: str, low: torch.dtype) -> None:
    """The same as casting the inputs by hand; statistics stay fp32, gradients arrive in fp32."""
    qkv = AttentionCase(queries=9, dim=16).qkv()
    leaves = trainable(qkv)
    with torch.autocast("cpu", dtype=low):
        result = attention(*leaves, is_causal=True)
    assert result.entropy is not None
    assert result.out.dtype == low
    assert result.entropy.dtype == result.lse.dtype == result.max_score.dtype == torch.float32
    by_hand = attention(*(t.to(low) for t in qkv), is_causal=True)
    assert_bitwise(result, by_hand)
    gradients = torch.autograd.grad(result.out.float().sum() + result.entropy.sum(), leaves)
    assert all(g.dtype == torch.float32 for g in gradients)


def test_autocast_mends_mixed_dtypes(backend: str) -> None:
    query, key, value = AttentionCase().qkv()
    mixed = query.bfloat16(), key, value.bfloat16()
    with pytest.raises(TypeError, match=r"(?=.*query)(?=.*key)(?=.*value)"):
        attention(*mixed)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        result = attention(*mixed)
    assert torch.equal(result.out, attention(mixed[0], key.bfloat16(), mixed[2]).out)


def test_autocast_with_a_float_mask(backend: str) -> None:
    case = CASES["mask_float_11qk"]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        result = run_attention(*case.qkv(), case.keywords())
    expected = run_attention(*case.qkv(dtype=torch.bfloat16), case.keywords())
    torch.testing.assert_close(result.out, expected.out, rtol=0.02, atol=0.02)


def test_autocast_prior_and_chain(backend: str) -> None:
    """Standard deviations and verdicts do not lose precision under autocast."""
    entropy = torch.rand(5)
    inputs = chain([0.0], [1.0], [0.5, 0.0], [1.0, 1.0], dim=3, batch=64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        sample = entropy_prior(torch.zeros(5, 2), entropy, torch.ones(5, 2))
        verdict = verify_chain(*inputs, generator=generator(1))
    plain = verify_chain(*inputs, generator=generator(1))
    torch.testing.assert_close(
        sample.float(),
        entropy_prior(torch.zeros(5, 2), entropy, torch.ones(5, 2)),
        rtol=1e-2,
        atol=0,
    )
    assert_bitwise(verdict, plain)
