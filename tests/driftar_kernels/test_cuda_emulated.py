"""The emulator itself, and what only the CUDA backend has; every operator test runs its kernels.

The emulator must report the faults that a GPU would punish, or its silence would say nothing.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

import driftar_kernels as dk
from tests.helpers.drifting import check
from tests.helpers.emulator import EMULATED, library
from tests.helpers.inputs import chain, drift_inputs, generator, normal, random_parents
from tests.helpers.targets import require_backend
from tests.helpers.tolerance import assert_bitwise, assert_relative

if not EMULATED:
    pytest.skip("DRIFTAR_CUDA_EMULATED=1 tests the CUDA kernels", allow_module_level=True)

ORDERS = {"forward": 0, "reverse": 1, "shuffled": 2}
# What the emulator says, or None where a wrong result is what shows.
FAULTS = {
    "missing_barrier": None,
    "missing_second_barrier": None,
    "missed_barrier": "deadlock",
    "divergent_barrier": "divergent barrier",
    "divergent_shuffle": "deadlock",
    "out_of_shared_memory": "out of bounds",
    "missing_copy_wait": None,
}


@pytest.fixture(autouse=True)
def chosen() -> Iterator[None]:
    require_backend("cuda")
    with dk.use_backend("cuda"):
        yield
    library().driftar_emulator_order(ORDERS["shuffled"])


def pointer(x: Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(x.data_ptr())


@pytest.mark.parametrize("order", ORDERS.values(), ids=ORDERS)
@pytest.mark.parametrize("name", FAULTS)
def test_planted_faults_show(name: str, order: int) -> None:
    library().driftar_emulator_order(order)
    expected = (torch.arange(64.0) + 1) % 64

    def run(faulty: bool) -> tuple[bytes | None, Tensor]:
        out = torch.full((64,), torch.nan)
        message = library().driftar_emulator_run(name.encode(), faulty, pointer(out))
        return message, out

    message, out = run(False)
    assert message is None and torch.equal(out, expected)
    message, out = run(True)
    wanted = FAULTS[name]
    if wanted is None:
        assert message is None and not torch.equal(out, expected)
    else:
        assert message is not None and wanted in message.decode()


@pytest.mark.parametrize("kind", ["bf16", "fp16", "tf32", "ldmatrix"])
def test_products_by_fragments(kind: str) -> None:
    number, inner = {"bf16": (0, 16), "fp16": (1, 16), "tf32": (2, 8), "ldmatrix": (3, 16)}[kind]
    a, b = normal(16, inner, seed=1), normal(inner, 8, seed=2)
    c = torch.full((16, 8), torch.nan)
    assert library().driftar_emulator_multiply(number, pointer(a), pointer(b), pointer(c)) is None

    def rounded(x: Tensor) -> Tensor:
        if kind == "tf32":
            bits = x.view(torch.int32)
            return ((bits + 0x1000) & ~0x1FFF).view(torch.float32).double()
        return x.to(torch.bfloat16 if kind == "bf16" else torch.float16).double()

    torch.testing.assert_close(c.double(), rounded(a) @ rounded(b), rtol=0, atol=1e-5)


def test_leaving_a_tensor_is_a_fault() -> None:
    out = torch.full((60,), torch.nan)  # the kernel writes 64
    message = library().driftar_emulator_run(b"missing_barrier", False, pointer(out))
    assert message is not None and b"out of bounds" in message


def test_results_do_not_depend_on_the_order_of_threads() -> None:
    tree = dk.DraftTree(random_parents(70, batch=3, seed=1))
    draft, target = normal(3, 70, 9, seed=2), normal(3, 70, 9, seed=3)
    inputs = chain([0.0, 0.2], [1.0, 0.8], [0.7, 0.0, 1.0], [0.9, 1.0, 0.5], dim=5, batch=50)
    entropy, mean = torch.rand(30), normal(30, 7, seed=4)
    gen, pos, neg, weights = drift_inputs(2, 70, 30, 5, 40, weighted=True)
    results = []
    for order in ORDERS.values():
        library().driftar_emulator_order(order)
        results.append(
            [
                *dk.verify_tree(tree, draft, target, tolerance=4.0),
                *dk.verify_chain(*inputs, generator=generator(3)),
                dk.entropy_prior(mean, entropy, mean),
                *dk.drift_field(gen, pos, neg, **weights),
            ]
        )
    assert_bitwise(results[0], results[1])
    assert_bitwise(results[0], results[2])


def test_chains_draw_the_numbers_of_the_reference_stream() -> None:
    """One seed, one verdict, whatever the batch is cut into."""
    inputs = chain([0.0, 0.2], [1.0, 0.8], [0.7, 0.0, 1.0], [0.9, 1.0, 0.5], dim=5, batch=50)
    whole = dk.verify_chain(*inputs, generator=generator(3))
    start = dk.verify_chain(*(x[:7] for x in inputs), generator=generator(3))
    assert_bitwise([whole.length[:7], whole.next_sample[:7]], start)


def test_panels_of_distances_equal_all_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Distances that are computed again for every pass, a tile of rows at a time."""
    gen, pos, neg, weights = drift_inputs(2, 140, 30, 5, 12, weighted=True)
    whole = dk.drift_field(gen, pos, neg, **weights)
    monkeypatch.setattr(dk.drift, "MAX_KEPT", 0)
    panels = dk.drift_field(gen, pos, neg, **weights)
    for left, right in zip(whole, panels, strict=True):
        assert_relative(left, right.double(), 1e-6)


@pytest.mark.parametrize("batch", [1, 2], ids=["panels", "blocks"])
def test_small_problems_by_panels_and_by_blocks(
    monkeypatch: pytest.MonkeyPatch, batch: int
) -> None:
    """Of so few multiprocessors two problems are many."""
    monkeypatch.setattr(dk.drift, "MIN_PROBLEMS", 1)
    gen, pos, neg, weights = drift_inputs(batch, 40, 50, 7, 70, weighted=True)
    check(gen, pos, neg, **weights)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_points_as_they_lie_in_memory(dtype: torch.dtype) -> None:
    """Rows that are copied 16 bytes at a time, and rows that are not."""
    gen, pos, neg, _ = drift_inputs(16, 9, 8, 3, 48, dtype=dtype)
    whole = dk.drift_field(gen, pos, neg)
    for apart in (lambda x: x.mT.contiguous().mT, lambda x: torch.cat([x, x], 2)[..., :48]):
        moved = dk.drift_field(apart(gen), apart(pos), apart(neg))
        assert_bitwise(list(whole), list(moved))
    shifted = torch.empty(gen.numel() + 1, dtype=dtype)[1:].view(gen.shape).copy_(gen)
    assert_bitwise(list(whole), list(dk.drift_field(shifted, pos, neg)))


def test_trees_have_a_largest_size() -> None:
    parents = torch.full((4097,), -1)
    with pytest.raises(NotImplementedError, match="4096"):
        dk.walk_tree(dk.DraftTree(parents), torch.ones(1, 4097, dtype=torch.bool))


@pytest.mark.parametrize("width", [5, 6, 8, 16])
def test_caches_of_two_widths(width: int) -> None:
    """One launch where both caches move in the same units, two otherwise."""
    keys, values = (normal(2, 3, 12, d, seed=d).bfloat16() for d in (width, 8))
    expected = [x.clone() for x in (keys, values)]
    verdict = dk.TreeVerdict(
        torch.tensor([3, 2]), torch.tensor([[1, 2, 5], [0, 4, -1]]), torch.tensor([5, 4])
    )
    lengths = dk.commit_path(keys, values, torch.tensor([4, 6]), verdict)
    assert lengths.tolist() == [7, 8]
    for moved, cache in zip((keys, values), expected, strict=True):
        assert torch.equal(moved[0, :, 4:7], cache[0, :, [5, 6, 9]])
        assert torch.equal(moved[1, :, 6:8], cache[1, :, [6, 10]])
        assert torch.equal(moved[:, :, :4], cache[:, :, :4])
