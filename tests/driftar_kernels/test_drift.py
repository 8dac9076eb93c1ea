"""The drifting field and its loss against published numbers and the fp64 oracle."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from driftar_kernels import DriftField, drift, drift_field, drift_loss
from tests.helpers import oracle
from tests.helpers.drifting import check
from tests.helpers.inputs import drift_inputs, golden
from tests.helpers.interpreter import size
from tests.helpers.tolerance import assert_relative, largest_finite, max_error

# Published cases. The distances of the second group cancel in the published fp32 run, so these are
# compared with its fp64 rerun alone.
ORDINARY = (
    "01_generic",
    "02_no_negatives",
    "03_weights",
    "07_tiny_scale_1e-4",
    "08_large_scale_1e3",
    "09_S512",
    "10_custom_R",
    "11_drift_ar_shape",
    "12_zero_weights",
    "13_single_gen",
)
CANCELLING = (
    "04_far_clusters",
    "05_equilibrium_gen_eq_pos",
    "06_duplicates",
    "14_lattice_close",
)


def published(name: str) -> tuple[dict[str, Tensor], tuple[Tensor, ...], dict[str, Any]]:
    numbers = golden(f"A_drift_loss_{name}")
    keywords: dict[str, Any] = {
        "temperatures": numbers["R_list"].tolist(),
        "neg": numbers.get("neg"),
    }
    for which in ("gen", "pos", "neg"):
        if f"weight_{which}" in numbers:
            keywords[f"{which}_weight"] = numbers[f"weight_{which}"]
    return numbers, (numbers["gen"], numbers["pos"]), keywords


@pytest.mark.parametrize("name", ORDINARY + CANCELLING)
def test_oracle_is_the_published_formula(name: str) -> None:
    numbers, points, keywords = published(name)
    truth = oracle.drift(*points, **keywords)
    # The fp64 rerun takes distances from a Gram matrix: exact to 1e-6 even where it cancels.
    assert_relative(truth.force, numbers["force_total_f64"], 1e-6)
    assert_relative(truth.norms, numbers["loss_R_f64"], 1e-6)
    assert_relative(truth.scale, numbers["scale_f64"][0], 1e-9)
    assert_relative(truth.loss, numbers["loss_f64"], 1e-6)


@pytest.mark.parametrize("name", ORDINARY + CANCELLING)
def test_published_numbers(backend: str, name: str) -> None:
    """Force, scale, norms, loss and loss gradient of the published implementation."""
    numbers, points, keywords = published(name)
    field = drift_field(*points, **keywords)
    assert isinstance(field, DriftField)
    assert field.force.shape == points[0].shape and field.scale.shape == ()
    tolerance = 1e-5 if name in ORDINARY else 2e-4
    assert_relative(field.force, numbers["force_total_f64"], tolerance, "force")
    assert_relative(field.scale, numbers["scale_f64"][0], 1e-6, "scale")
    for norm, expected in zip(field.norms, numbers["loss_R_f64"], strict=True):
        assert_relative(norm, expected, 2 * tolerance, "norm")

    gen = points[0].clone().requires_grad_()
    loss = drift_loss(gen, points[1], **keywords, reduction="none")
    assert_relative(loss, numbers["loss_f64"], tolerance, "loss")
    (gradient,) = torch.autograd.grad(loss.sum(), gen)
    unit = max(float(numbers["scale_f64"]) / math.sqrt(gen.shape[2]), 1e-3)
    exact = -2 * numbers["force_total_f64"] / (unit * gen.shape[1] * gen.shape[2])
    assert_relative(gradient, exact, tolerance, "gradient")
    if name in ORDINARY:
        # The published fp32 run itself errs by up to 2e-5: that much is its own.
        (port,) = torch.autograd.grad(drift_loss(gen, points[1], **keywords), gen)
        for found, recorded, truth in (
            (gradient, numbers["grad_gen"], exact),
            (port * len(loss), numbers["torch_port_grad_gen"], exact),
            (loss, numbers["loss"], numbers["loss_f64"]),
        ):
            own = max_error(recorded, truth)
            assert max_error(found, recorded) <= own + 1e-5 * largest_finite(truth)


MOST = size(40, 12)  # test_drift_regimes.py crosses the blocks of every kernel


@given(
    batch=st.integers(1, 4),
    count=st.integers(1, MOST),
    positives=st.integers(1, MOST),
    negatives=st.integers(0, 20),
    channels=st.integers(1, 70),
    weighted=st.booleans(),
    temperatures=st.lists(st.sampled_from([0.02, 0.05, 0.2, 1.0, 7.0]), min_size=1, max_size=4),
    seed=st.integers(0, 1000),
)
def test_any_shape(
    backend: str,
    batch: int,
    count: int,
    positives: int,
    negatives: int,
    channels: int,
    weighted: bool,
    temperatures: list[float],
    seed: int,
) -> None:
    gen, pos, neg, keywords = drift_inputs(
        batch, count, positives, negatives, channels, weighted=weighted, seed=seed
    )
    check(gen, pos, neg, temperatures=temperatures, **keywords)


@pytest.mark.parametrize(
    ("batch", "count", "positives", "negatives", "channels"),
    [
        (size(300, 8), 4, 4, 2, 8),
        (size(20, 2), 64, 64, 16, 128),
        (1, size(130, 70), size(140, 80), size(65, 35), size(257, 130)),
        (2, 1, 1, 0, 1),
    ],
    ids=["many", "published", "large", "least"],
)
def test_regimes(
    backend: str, batch: int, count: int, positives: int, negatives: int, channels: int
) -> None:
    gen, pos, neg, _ = drift_inputs(batch, count, positives, negatives, channels)
    check(gen, pos, neg)


@pytest.mark.parametrize("limit", [0, drift.MAX_KEPT], ids=["recomputed", "kept"])
def test_one_large_problem(backend: str, monkeypatch: pytest.MonkeyPatch, limit: int) -> None:
    """Distances are kept between the passes, or computed again where they are too many."""
    monkeypatch.setattr(drift, "MAX_KEPT", limit)
    gen, pos, neg, keywords = drift_inputs(1, size(700, 100), size(800, 110), 50, 6, weighted=True)
    check(gen, pos, neg, temperatures=(0.2, 1.0), **keywords)


@pytest.mark.parametrize("offset", [1e3, 1e4])
@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_a_common_offset_changes_nothing(backend: str, offset: float, reduction: str) -> None:
    """Points are centred first: fp32 keeps 4 digits where a plain Gram distance has none."""
    gen, pos, neg, keywords = drift_inputs(3, 8, 9, 5, 32, weighted=True, offset=offset)
    check(gen, pos, neg, **keywords)
    truth = oracle.drift(gen, pos, neg, **keywords).loss
    found = drift_loss(gen, pos, neg, **keywords, reduction=reduction)
    assert_relative(found, truth if reduction == "none" else truth.mean(), 1e-4)


def test_offsets_that_differ_between_problems(backend: str) -> None:
    """Centring is per problem."""
    gen, pos, neg, _ = drift_inputs(3, 8, 9, 5, 32)
    shift = torch.tensor([-1e4, 0.0, 1e4])[:, None, None]
    assert neg is not None
    check(gen + shift, pos + shift, neg + shift)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_low_precision_is_computed_in_fp32(backend: str, dtype: torch.dtype) -> None:
    gen, pos, neg, _ = drift_inputs(dtype=dtype)
    check(gen, pos, neg)


def test_fp64(backend: str) -> None:
    gen, pos, neg, keywords = drift_inputs(weighted=True, dtype=torch.float64)
    keywords = {name: value.double() for name, value in keywords.items()}
    truth = oracle.drift(gen, pos, neg, **keywords)
    if backend != "reference":
        try:
            field = drift_field(gen, pos, neg, **keywords)
        except TypeError:
            return
    else:
        field = drift_field(gen, pos, neg, **keywords)
    for name in ("force", "scale", "norms"):
        assert getattr(field, name).dtype == torch.float64
        assert_relative(getattr(field, name), getattr(truth, name), 1e-11, name)


def test_autocast_computes_in_fp32_and_takes_mixed_inputs(backend: str) -> None:
    gen, pos = torch.randn(2, 6, 5), torch.randn(2, 7, 5)
    expected = drift_loss(gen.bfloat16().float(), pos)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        leaf = gen.bfloat16().requires_grad_()
        loss = drift_loss(leaf, pos)
    loss.backward()
    assert loss.dtype == torch.float32 and leaf.grad is not None
    torch.testing.assert_close(loss.detach(), expected)
