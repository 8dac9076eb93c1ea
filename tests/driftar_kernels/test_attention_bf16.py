"""bf16 attention where instructions multiply bf16.

AVX512-BF16 multiplies everything, AMX tiles blocks of more than 4 queries. The cases hold on any
instruction set; `make test-amx` runs them on AMX, with the emulator of tests/amx_emulator where the
processor has none.
"""

from __future__ import annotations

import ctypes
import math
import mmap
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from driftar_kernels import attention, use_backend
from tests.driftar_kernels.test_attention import check
from tests.helpers.inputs import (
    LAYOUTS,
    AttentionCase,
    Options,
    attention_truth,
    bool_mask,
    float_mask,
    in_layout,
    random_parents,
    run_attention,
    trainable,
)
from tests.helpers.tolerance import assert_bitwise, assert_close_to_truth

EMULATED = "amx_emulator" in os.environ.get("LD_PRELOAD", "")
on_emulator = pytest.mark.skipif(
    not EMULATED, reason="asks the emulator: make test-amx on a processor without AMX"
)

CASE = AttentionCase(batch=2, heads=2, kv_heads=2, queries=37, keys=70, dim=24, value_dim=17)
CASES: dict[str, AttentionCase] = {
    "plain": CASE,
    "scale": replace(CASE, options=lambda c, s: {"scale": -0.4}),
    "causal": replace(CASE, queries=70, options=lambda c, s: {"is_causal": True}),
    "causal_offsets": replace(
        CASE, options=lambda c, s: {"is_causal": True, "query_offset": torch.tensor([-9, 33])}
    ),
    "lengths": replace(
        CASE, batch=4, options=lambda c, s: {"key_lengths": torch.tensor([0, 1, 70, 33])}
    ),
    "gqa": replace(CASE, heads=6, kv_heads=2, queries=12),
    "gqa_blocks_of_heads": replace(CASE, heads=3, kv_heads=1, queries=33),
    "bool_mask": replace(CASE, options=lambda c, s: {"attn_mask": bool_mask(37, 70, seed=s)}),
    "float_mask": replace(
        CASE, options=lambda c, s: {"attn_mask": float_mask(2, 1, 37, 70, seed=s)}
    ),
    "tree": replace(
        CASE,
        options=lambda c, s: {
            "parents": random_parents(37, batch=2, seed=s),
            "key_lengths": torch.tensor([33, 7]),
        },
    ),
    "several_blocks": replace(
        CASE,
        batch=1,
        heads=1,
        kv_heads=1,
        queries=530,
        keys=700,
        options=lambda c, s: {"is_causal": True, "query_offset": 170, "entropy_from": 37},
    ),
    "everything": replace(
        CASE,
        batch=3,
        heads=4,
        options=lambda c, s: {
            "attn_mask": float_mask(3, 1, 37, 70, seed=s),
            "is_causal": True,
            "query_offset": torch.tensor([26, 0, -4]),
            "key_lengths": torch.tensor([70, 20, 64]),
            "entropy_from": 5,
        },
    ),
}


@pytest.fixture(autouse=True)
def chosen_backend() -> Iterator[None]:
    with use_backend("cpu"):
        yield


def inputs(case: AttentionCase, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    return case.qkv(seed=seed, dtype=torch.bfloat16)


def emulator() -> ctypes.CDLL:
    library = ctypes.CDLL(None)
    for name in ("amx_emulator_products", "amx_emulator_configured_threads"):
        getattr(library, name).restype = ctypes.c_int64
    return library


@pytest.mark.parametrize("entropy", ["head", "map", "none"])
@pytest.mark.parametrize("name", list(CASES))
def test_case(name: str, entropy: str) -> None:
    case = CASES[name]
    check(*inputs(case), case.keywords(), entropy=entropy)


@pytest.mark.parametrize("keys", [1, 15, 16, 17, 31, 32, 33, 64, 65, 257])
@pytest.mark.parametrize("queries", [32, 33, 47, 48, 49, 65])
def test_lengths(queries: int, keys: int) -> None:
    case = replace(CASE, batch=1, heads=1, kv_heads=1, queries=queries, keys=keys)
    for keywords in ({}, {"is_causal": True, "query_offset": keys - queries}):
        check(*inputs(case, seed=keys), dict(keywords))


@pytest.mark.parametrize("keys", [1, 2, 31, 33, 127, 128, 129, 300])
@pytest.mark.parametrize("queries", [1, 2, 3, 4, 5, 7, 8, 9, 15])
def test_few_queries(queries: int, keys: int) -> None:
    """Up to eight rows take keys and values as they lie."""
    for dim, value_dim in ((64, 64), (24, 17), (128, 160), (33, 48)):
        case = replace(CASE, batch=1, queries=queries, keys=keys, dim=dim, value_dim=value_dim)
        check(*inputs(case, seed=keys), {})
        check(*inputs(case, seed=keys), {"is_causal": True, "query_offset": keys - queries})


@pytest.mark.parametrize("queries", [1, 3, 70])
@pytest.mark.parametrize("dim", [1, 8, 16, 31, 32, 33, 40, 64, 72, 80, 96, 128, 192, 256])
def test_head_dimensions(dim: int, queries: int) -> None:
    case = replace(CASE, batch=1, dim=dim, value_dim=dim, queries=queries)
    check(*inputs(case, seed=dim), {"is_causal": True, "query_offset": 33})


@pytest.mark.parametrize("entropy_from", [0, 1, 31, 32, 33, 50, 69, 70, 200])
def test_entropy_sets(entropy_from: int) -> None:
    """Panels begin anew where the entropy set does."""
    for entropy in ("head", "map"):
        keywords: Options = {"entropy_from": entropy_from, "entropy": entropy}
        check(*inputs(CASE), keywords)
        check(*inputs(CASE), {**keywords, "is_causal": True, "query_offset": 20})


@pytest.mark.parametrize("keys", [1024, 1025])
def test_map_in_one_pass_and_in_two(keys: int) -> None:
    case = replace(CASE, batch=1, heads=4, keys=keys)
    check(*inputs(case), {"enable_gqa": True, "entropy_from": 37}, entropy="map")


@st.composite
def combinations(draw: st.DrawFn) -> tuple[AttentionCase, Options]:
    kv_heads, queries = draw(st.integers(1, 2)), draw(st.integers(1, 80))
    tree = draw(st.booleans())
    keys = queries + draw(st.integers(0, 40)) if tree else draw(st.integers(1, 120))
    case = AttentionCase(
        batch=draw(st.integers(1, 2)),
        heads=kv_heads * draw(st.integers(1, 2)),
        kv_heads=kv_heads,
        queries=queries,
        keys=keys,
        dim=draw(st.sampled_from([1, 24, 64])),
        value_dim=draw(st.sampled_from([1, 33, 64])),
    )
    seed = draw(st.integers(0, 10_000))
    keywords = case.keywords()
    if draw(st.booleans()):
        most = keys - queries if tree else keys
        keywords["key_lengths"] = torch.tensor(
            [draw(st.integers(0, most)) for _ in range(case.batch)]
        )
    if tree:
        keywords["parents"] = random_parents(queries, seed=seed)
    elif draw(st.booleans()):
        keywords.update(is_causal=True, query_offset=draw(st.integers(-5, keys)))
    if draw(st.booleans()):
        keywords["attn_mask"] = bool_mask(case.batch, 1, queries, keys, seed=seed)
    keywords["entropy"] = draw(st.sampled_from(["head", "map", "none"]))
    keywords["entropy_from"] = draw(st.integers(0, 40))
    return case, keywords


@given(drawn=combinations())
def test_any_combination(drawn: tuple[AttentionCase, Options]) -> None:
    case, keywords = drawn
    check(*inputs(case), keywords)


def check_gradients(case: AttentionCase, keywords: Options) -> None:
    query, key, value = inputs(case)
    weights = torch.linspace(-1, 1, case.value_dim)

    def gradients(dtype: torch.dtype | None) -> tuple[Tensor, ...]:
        leaves = trainable((query, key, value), dtype)
        if dtype is None:
            result = run_attention(*leaves, keywords)
        else:
            result = attention_truth(*leaves, keywords, dtype=dtype)  # type: ignore[assignment]
        assert result.entropy is not None
        loss = (result.out * weights.to(result.out.dtype)).sum() + result.entropy.sum()
        return torch.autograd.grad(loss, leaves)

    for found, truth, plain in zip(
        gradients(None), gradients(torch.float64), gradients(torch.bfloat16), strict=True
    ):
        assert_close_to_truth(found, truth, plain, factor=3, name="gradient")


@pytest.mark.parametrize("entropy", ["head", "map"])
@pytest.mark.parametrize("name", list(CASES))
def test_gradients(name: str, entropy: str) -> None:
    """What the forward pass keeps is what the backward pass expects."""
    check_gradients(CASES[name], {**CASES[name].keywords(), "entropy": entropy})


@pytest.mark.parametrize("queries, keys", [(2, 3), (1, 70), (3, 129), (65, 131), (130, 127)])
@pytest.mark.parametrize("dim", [1, 31, 33, 64, 80])
def test_gradients_of_shapes(dim: int, queries: int, keys: int) -> None:
    case = replace(CASE, batch=1, queries=queries, keys=keys, dim=dim, value_dim=dim + 7)
    check_gradients(case, {"is_causal": True, "query_offset": keys - queries})


@pytest.mark.parametrize("poison", [math.nan, math.inf])
@pytest.mark.parametrize("entropy_from", [0, 33])
@pytest.mark.parametrize("position", [40, 63, 64])
def test_poison_reaches_no_row_that_does_not_see_it(
    position: int, entropy_from: int, poison: float
) -> None:
    query, key, value = inputs(replace(CASE, queries=70))
    keywords: Options = {"is_causal": True, "entropy_from": entropy_from}
    clean = attention(query, key, value, **keywords)
    poisoned_key, poisoned_value = key.clone(), value.clone()
    poisoned_key[:, :, position] = poison
    poisoned_value[:, :, position] = poison
    for k, v in ((poisoned_key, value), (key, poisoned_value)):
        result = attention(query, k, v, **keywords)
        before = [x[:, :, :position] for x in result if x is not None]
        torch.testing.assert_close(
            before, [x[:, :, :position] for x in clean if x is not None], rtol=1e-2, atol=1e-2
        )
        assert not result.out[:, :, position:].isfinite().all()


@pytest.mark.parametrize("which", ["key", "value", "query", "grad_out"])
def test_poison_reaches_no_gradient_that_does_not_see_it(which: str) -> None:
    """Blocks that hold it beside hidden scores are summed up without it."""
    case = replace(CASE, batch=1, queries=300, keys=300)
    position = 150
    weights = case.qkv(seed=1)[0][..., : case.value_dim].to(torch.bfloat16)

    def gradients(poison: float) -> list[Tensor]:
        tensors = dict(zip(("query", "key", "value"), inputs(case), strict=True))
        tensors["grad_out"] = weights.clone()
        tensors[which][:, :, position] *= poison
        leaves = trainable((tensors["query"], tensors["key"], tensors["value"]))
        result = attention(*leaves, is_causal=True)
        return list(torch.autograd.grad(result.out, leaves, tensors["grad_out"]))

    clean, found = gradients(1.0), gradients(math.nan)
    # Queries before a key do not see it, and keys behind a query are not seen by it.
    blind = slice(0, position) if which in ("key", "value") else slice(position + 1, None)
    first, last = (0, 1) if which in ("key", "value") else (1, 3)
    for before, after in zip(clean[first:last], found[first:last], strict=True):
        torch.testing.assert_close(before[:, :, blind], after[:, :, blind], rtol=1e-2, atol=1e-2)
    assert not all(x.isfinite().all() for x in found)


def test_nan_behind_the_lengths_changes_no_bit() -> None:
    query, key, value = inputs(CASE)
    lengths = torch.tensor([33, 50])
    clean = attention(query, key, value, key_lengths=lengths)
    for b, length in enumerate(lengths.tolist()):
        key[b, :, length:], value[b, :, length:] = math.nan, math.nan
    assert_bitwise(attention(query, key, value, key_lengths=lengths), clean)


@pytest.mark.parametrize("how", LAYOUTS)
@pytest.mark.parametrize("name", ["causal", "gqa", "everything"])
def test_layout_does_not_change_a_bit(name: str, how: str) -> None:
    case = CASES[name]
    tensors = inputs(case)
    other = [in_layout(t, how) for t in tensors]
    assert_bitwise(run_attention(*tensors, case.keywords()), run_attention(*other, case.keywords()))


@pytest.mark.parametrize("queries", [1, 3, 40])
def test_rows_an_odd_number_apart_change_no_bit(queries: int) -> None:
    """Such rows hold no pairs that could be read in place."""
    tensors = inputs(replace(CASE, queries=queries, dim=64, value_dim=64))
    other = [torch.cat((t, t[..., :1]), -1)[..., :64] for t in tensors]
    assert all(t.stride(-2) % 2 == 1 for t in other)
    assert_bitwise(attention(*tensors), attention(*other))


PROT_NONE = 0  # of sys/mman.h


def before_unmapped_memory(source: Tensor) -> Tensor:
    """The same numbers, whose last one ends where memory that must not be touched begins."""
    pages = -(-source.nbytes // mmap.PAGESIZE) * mmap.PAGESIZE
    memory = mmap.mmap(-1, pages + mmap.PAGESIZE)
    end = ctypes.addressof(ctypes.c_char.from_buffer(memory, pages))
    assert ctypes.CDLL(None).mprotect(ctypes.c_void_p(end), mmap.PAGESIZE, PROT_NONE) == 0
    view = torch.frombuffer(
        memory, dtype=source.dtype, count=source.numel(), offset=pages - source.nbytes
    )
    return view.view(source.shape).copy_(source)


@pytest.mark.skipif(sys.platform != "linux", reason="asks the C library for pages")
@pytest.mark.parametrize("queries, keys", [(1, 33), (5, 129), (20, 47), (67, 65)])
@pytest.mark.parametrize("dim", [1, 31, 40, 64])
def test_nothing_is_read_behind_the_end(dim: int, queries: int, keys: int) -> None:
    case = replace(CASE, queries=queries, keys=keys, dim=dim, value_dim=dim)
    tensors = inputs(case)
    results = []
    for leaves in (tensors, [before_unmapped_memory(t) for t in tensors]):
        leaves = trainable(leaves) if leaves is tensors else [t.requires_grad_() for t in leaves]
        result = attention(*leaves)
        assert result.entropy is not None
        gradient = before_unmapped_memory(torch.ones_like(result.out))
        outputs = (result.out, result.entropy)
        grads = torch.autograd.grad(outputs, leaves, (gradient, torch.ones_like(result.entropy)))
        results.append((*result, *grads))
    assert_bitwise(*results)


def test_one_visible_key_is_exact() -> None:
    query, key, value = inputs(replace(CASE, keys=1))
    result = attention(query, key, value)
    assert torch.equal(result.out, value.expand_as(result.out))
    assert result.entropy is not None and not result.entropy.any()


@on_emulator
def test_tiles_multiply_many_queries_and_are_given_back() -> None:
    def products(queries: int, dtype: torch.dtype) -> int:
        before = emulator().amx_emulator_products()
        attention(*replace(CASE, queries=queries).qkv(dtype=dtype))
        assert emulator().amx_emulator_configured_threads() == 0
        return int(emulator().amx_emulator_products() - before)

    # Tiles of 16 queries: by 5 of keys and 1 of features, and by 2 of features and 3 of 32 keys.
    for queries in (5, 32):
        tiles = -(-queries // 16)
        assert products(queries, torch.bfloat16) == 2 * 2 * tiles * (5 * 1 + 2 * 3)
    assert products(4, torch.bfloat16) == 0
    assert products(32, torch.float32) == products(32, torch.float16) == 0


@on_emulator
def test_the_emulator_refuses_what_a_processor_would() -> None:
    code = "import ctypes; ctypes.CDLL(None).amx_emulator_use_tiles_without_configuration()"
    import_first = "from driftar_kernels import _library\n"  # choosing AMX installs the emulator
    done = subprocess.run(
        [sys.executable, "-c", import_first + code], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 3 and "not configured" in done.stderr
