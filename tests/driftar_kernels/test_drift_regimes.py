"""One large problem and many small ones run through different passes: both equal the oracle."""

from __future__ import annotations

from collections.abc import Iterator
from unittest import mock

import pytest
import torch
from torch import Tensor

from driftar_kernels import drift, drift_field, drift_loss
from tests.helpers import oracle
from tests.helpers.drifting import check
from tests.helpers.inputs import drift_inputs, normal
from tests.helpers.interpreter import size
from tests.helpers.tolerance import assert_bitwise, assert_relative

MANY = size(drift.MIN_PROBLEMS, 2)
# Block by block, and problem by problem.
BATCHES = pytest.mark.parametrize("batch", [1, MANY], ids=["blocks", "problems"])


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@BATCHES
@pytest.mark.parametrize("channels", [1, 8, 40, size(129, 65), size(300, 130)])
@pytest.mark.parametrize("count", [1, 7, size(63, 31), size(65, 33)])
def test_ragged_sizes(backend: str, batch: int, count: int, channels: int) -> None:
    gen, pos, neg, keywords = drift_inputs(batch, count, 33, 5, channels, weighted=True)
    check(gen, pos, neg, **keywords)


@BATCHES
@pytest.mark.parametrize("limit", [0, 1 << 26], ids=["recomputed", "kept"])
def test_kept_and_recomputed_distances(
    backend: str, monkeypatch: pytest.MonkeyPatch, batch: int, limit: int
) -> None:
    monkeypatch.setattr(drift, "MAX_KEPT", limit)
    monkeypatch.setattr(drift, "MAX_KEPT_OF_SMALL", limit)
    gen, pos, neg, keywords = drift_inputs(batch, 40, 50, 7, size(200, 70), weighted=True)
    check(gen, pos, neg, **keywords)


def outliers(batch: int, distance: float) -> tuple[Tensor, Tensor, Tensor]:
    """Tight clouds, and in each part one point far from everything."""
    gen, pos, neg = (normal(batch, n, 6, seed=n) * 0.01 for n in (70, 50, 20))
    for step, part in enumerate((gen, pos, neg), 1):
        part[:, 3, step] = distance
    return gen, pos, neg


@BATCHES
@pytest.mark.parametrize("distance", [0.1, 10.0, 1000.0])
def test_rows_and_columns_far_from_the_others(backend: str, batch: int, distance: float) -> None:
    """A row or column of which every exponential vanishes beside the nearest pair's."""
    check(*outliers(batch, distance), temperatures=(0.001, 0.02, 0.2))


@BATCHES
@pytest.mark.parametrize("unit", [1e-6, 1e6])
def test_sizes_far_from_one(backend: str, batch: int, unit: float) -> None:
    """Below 1e-3 the published floors of scale and unit rule."""
    gen, pos, neg, _ = drift_inputs(batch, 20, 30, 4, 12)
    assert neg is not None
    check(gen * unit, pos * unit, neg * unit)


@BATCHES
def test_close_pairs_far_from_the_mean(backend: str, batch: int) -> None:
    """Two tight clouds: a distance within one is lost in the product, not in the difference."""
    gen, pos, neg, _ = drift_inputs(batch, 20, 30, 4, 40)
    assert neg is not None
    points = [x * 1e-2 for x in (gen, pos, neg)]
    for x in points:
        x[:, ::2] += 3.0
    check(points[0], points[1], points[2], temperatures=(0.05, 0.5))


@BATCHES
@pytest.mark.parametrize("count", [1, 40])
def test_all_points_equal(backend: str, batch: int, count: int) -> None:
    same = torch.full((batch, count, 20), 0.1)
    field = drift_field(same, same, same)
    assert all(bool(t.isfinite().all()) for t in field)
    assert float(field.force.abs().max()) < 1e-3


@pytest.mark.parametrize("noise", [1.0, 0.1, 1e-3])
def test_forces_that_nearly_cancel(backend: str, noise: float) -> None:
    """Many features and few points: norms come from inner products unless these cancel."""
    gen, _, neg, _ = drift_inputs(MANY, 24, 24, 5, size(700, 70))
    assert neg is not None
    pos = gen + noise * normal(*gen.shape, seed=9)
    for weight in (1.0, 0.0):
        check(gen, pos, neg, neg_weight=torch.full(neg.shape[:2], weight))


@BATCHES
@pytest.mark.parametrize("channels", [12, size(300, 130)])
def test_pass_by_pass(backend: str, batch: int, channels: int) -> None:
    """A process group has sums to exchange between the passes, which are one operator without."""
    gen, pos, neg, keywords = drift_inputs(batch, 40, 50, 7, channels, weighted=True)
    whole = drift_field(gen, pos, neg, **keywords)
    with mock.patch.object(torch.distributed, "all_reduce"):
        passes = drift_field(gen, pos, neg, **keywords, group=mock.sentinel.group)
    for name, ours, other in zip(whole._fields, whole, passes, strict=True):
        assert_relative(ours, other, 1e-4, name)


@BATCHES
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes(backend: str, batch: int, dtype: torch.dtype) -> None:
    gen, pos, neg, _ = drift_inputs(batch, 20, 30, 4, 70, dtype=dtype)
    try:
        force = drift_field(gen, pos, neg).force
    except TypeError:
        assert backend in ("triton", "cuda") and dtype == torch.float64
        return
    assert_relative(force, oracle.drift(gen, pos, neg).force, 1e-4)


@BATCHES
def test_empty_positives_and_temperatures_alike(backend: str, batch: int) -> None:
    gen, pos, _, _ = drift_inputs(batch, 20, 30, 0, 12)
    assert not drift_field(gen, pos[:, :0]).force.any()
    check(gen, pos, None, temperatures=(0.1, 0.1))


@pytest.mark.parametrize("backend", ["cpu"], indirect=True)
@BATCHES
@pytest.mark.parametrize("count", [90, 200])
def test_threads_do_not_change_a_bit(backend: str, threads: None, batch: int, count: int) -> None:
    gen, pos, neg, keywords = drift_inputs(batch, count, 100, 9, 50, weighted=True)
    results = []
    for number in (1, 2, 3):
        torch.set_num_threads(number)
        results.append(drift_field(gen, pos, neg, **keywords))
    assert_bitwise(results[0], results[1])
    assert_bitwise(results[0], results[2])


@BATCHES
def test_bf16_gradient_has_its_dtype(backend: str, batch: int) -> None:
    gen, pos, neg, _ = drift_inputs(batch, 9, 8, 3, 12, dtype=torch.bfloat16)
    leaf = gen.requires_grad_()
    (gradient,) = torch.autograd.grad(drift_loss(leaf, pos, neg), leaf)
    assert gradient.dtype == torch.bfloat16 and bool(gradient.any())
