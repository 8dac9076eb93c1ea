"""Properties of the drifting field and its loss: gradients, symmetry, corners, layout."""

from __future__ import annotations

import math

import pytest
import torch

from driftar_kernels import drift_field, drift_loss
from tests.helpers import oracle
from tests.helpers.drifting import check
from tests.helpers.inputs import LAYOUTS, Options, drift_inputs, far_rows, in_layout, normal
from tests.helpers.interpreter import size
from tests.helpers.tolerance import assert_bitwise, assert_relative


def test_gradient_reaches_gen_alone(backend: str) -> None:
    gen, pos, neg, keywords = drift_inputs(weighted=True)
    assert neg is not None
    leaves = [t.requires_grad_() for t in (gen, pos, neg)]
    field = drift_field(*leaves, **keywords)
    assert not any(t.requires_grad for t in field)
    gradient, *others = torch.autograd.grad(
        drift_loss(*leaves, **keywords), leaves, allow_unused=True
    )
    assert all(g is None or not g.any() for g in others)
    unit = max(float(field.scale) / math.sqrt(gen.shape[2]), 1e-3)
    expected = -2 * field.force / (gen.numel() * unit)
    torch.testing.assert_close(gradient, expected, rtol=2e-6, atol=0)


def test_loss_is_the_mean_squared_force(backend: str) -> None:
    gen, pos, neg, keywords = drift_inputs(weighted=True)
    force = drift_field(gen, pos, neg, **keywords).force
    each = drift_loss(gen, pos, neg, **keywords, reduction="none")
    torch.testing.assert_close(each, force.square().mean((1, 2)), rtol=1e-5, atol=0)
    whole = drift_loss(gen, pos, neg, **keywords)
    assert whole.shape == ()
    torch.testing.assert_close(whole, each.mean(), rtol=1e-6, atol=0)


def test_upstream_gradient_scales(backend: str) -> None:
    gen, pos, neg, _ = drift_inputs()
    leaf = gen.clone().requires_grad_()
    loss = drift_loss(leaf, pos, neg, reduction="none")
    weight = torch.tensor([2.0, -3.0])
    (found,) = torch.autograd.grad(loss, leaf, weight, retain_graph=True)
    (ones,) = torch.autograd.grad(loss, leaf, torch.ones(2))
    torch.testing.assert_close(found, ones * weight[:, None, None])


def test_no_second_derivative_is_lost_silently(backend: str) -> None:
    """The loss is |gen/u - goal|^2 with a constant goal: its Hessian is 2/(N S u^2) I, never 0."""
    gen, pos, neg, _ = drift_inputs()
    leaf = gen.clone().requires_grad_()
    try:
        (first,) = torch.autograd.grad(
            drift_loss(leaf, pos, neg, reduction="none").sum(), leaf, create_graph=True
        )
        direction = normal(*gen.shape, seed=5)
        (second,) = torch.autograd.grad((first * direction).sum(), leaf)
    except RuntimeError:
        return
    unit = float(oracle.drift(gen, pos, neg).scale_inputs)
    expected = 2 * direction / (gen.shape[1] * gen.shape[2] * unit**2)
    torch.testing.assert_close(second, expected, rtol=1e-4, atol=0)


def test_zero_negative_weights_equal_no_negatives_in_direction(backend: str) -> None:
    """Weights multiply affinities after the softmax; a zero weight removes the sample's push."""
    gen, pos, neg, _ = drift_inputs()
    check(gen, pos, neg, neg_weight=torch.zeros(2, 4))
    check(gen, pos, neg, gen_weight=torch.zeros(2, 6))


@pytest.mark.parametrize("how", ["none", "weights"])
@pytest.mark.parametrize("negatives", [0, 4])
def test_no_positives_give_no_force(backend: str, how: str, negatives: int) -> None:
    gen, pos, neg, _ = drift_inputs(negatives=negatives)
    keywords: Options = {"pos_weight": torch.zeros(2, 8)} if how == "weights" else {}
    pos = pos[:, :0] if how == "none" else pos
    leaf = gen.clone().requires_grad_()
    field = drift_field(leaf, pos, neg, **keywords)
    assert torch.equal(field.force, torch.zeros_like(gen))
    assert torch.equal(field.norms, torch.zeros(3))
    loss = drift_loss(leaf, pos, neg, **keywords)
    assert float(loss.detach()) == 0.0
    (gradient,) = torch.autograd.grad(loss, leaf)
    assert not gradient.any() and not gradient.isnan().any()


def test_no_negatives_and_empty_negatives_are_one(backend: str) -> None:
    gen, pos, neg, _ = drift_inputs()
    assert neg is not None
    assert_bitwise(drift_field(gen, pos), drift_field(gen, pos, neg[:, :0]))


def test_single_sample_without_negatives(backend: str) -> None:
    """N = 1, Q = 0: only the masked self pair repels, through the clip alone."""
    gen, pos, _, _ = drift_inputs(batch=3, count=1, negatives=0)
    check(gen, pos, None)


def test_the_field_is_antisymmetric(backend: str) -> None:
    """Attraction and repulsion balance: swapping data and negatives turns the force round.

    The self pair would repel through its clip (1e-3); the sample's weight 0 removes it.
    """
    gen, pos, neg, _ = drift_inputs(batch=4, count=1, positives=5, negatives=5)
    assert neg is not None
    weight = torch.zeros(4, 1)
    forward = drift_field(gen, pos, neg, gen_weight=weight)
    backward = drift_field(gen, neg, pos, gen_weight=weight)
    torch.testing.assert_close(forward.force, -backward.force, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(forward.norms, backward.norms, rtol=1e-4, atol=0)


def test_the_field_vanishes_when_data_and_negatives_coincide(backend: str) -> None:
    """Attraction and repulsion by the same points cancel (the self pair weighted 0)."""
    gen, pos, _, _ = drift_inputs(batch=2, count=3)
    field = drift_field(gen, pos, pos.clone(), gen_weight=torch.zeros(2, 3))
    assert float(field.norms.max()) < 1e-9


def test_scale_and_norms_run_over_the_whole_batch(backend: str) -> None:
    gen, pos, neg, _ = drift_inputs(batch=2)
    gen = gen * torch.tensor([1.0, 10.0])[:, None, None]
    check(gen, pos, neg)
    whole, alone = (
        drift_field(gen, pos, neg),
        drift_field(gen[:1], pos[:1], neg[:1] if neg is not None else None),
    )
    assert abs(float(whole.scale) - float(alone.scale)) > 0.1


def test_order_of_samples_does_not_matter(backend: str) -> None:
    gen, pos, neg, _ = drift_inputs(batch=2, count=40, positives=50, negatives=20)
    order = torch.randperm(40)
    plain = drift_field(gen, pos, neg)
    shuffled = drift_field(gen[:, order], pos.flip(1), neg.flip(1) if neg is not None else None)
    assert_relative(shuffled.force, plain.force[:, order], 2e-5)


def test_points_at_a_distance_of_zero(backend: str) -> None:
    """All points equal: finite force, no NaN."""
    same = torch.ones(2, 4, 8)
    field = drift_field(same, same, same)
    assert all(bool(t.isfinite().all()) for t in field)
    assert float(field.force.abs().max()) == 0.0


@pytest.mark.parametrize("poisoned", ["gen", "pos", "neg"])
def test_nan_points_show(backend: str, poisoned: str) -> None:
    """One NaN point spoils the global scale, hence everything: no plausible numbers."""
    gen, pos, neg, _ = drift_inputs()
    assert neg is not None
    {"gen": gen, "pos": pos, "neg": neg}[poisoned][0, 1, 2] = math.nan
    field = drift_field(gen, pos, neg)
    assert math.isnan(float(field.scale)) and bool(field.force.isnan().all())


def test_layout_does_not_change_a_bit(backend: str) -> None:
    gen, pos, neg, keywords = drift_inputs(weighted=True, channels=33)
    assert neg is not None
    plain = drift_field(gen, pos, neg, **keywords)

    for layout in LAYOUTS:
        points = (in_layout(t, layout) for t in (gen, pos, neg))
        weights: Options = {name: in_layout(value, layout) for name, value in keywords.items()}
        assert_bitwise(plain, drift_field(*points, **weights))
    wide = pos[:1].expand(2, -1, -1)
    expanded, dense = drift_field(gen, wide, neg), drift_field(gen, wide.contiguous(), neg)
    assert torch.equal(expanded.force, dense.force)


def test_inputs_are_not_modified_and_repeats_are_bitwise_equal(backend: str) -> None:
    gen, pos, neg, keywords = drift_inputs(size(20, 2), 33, 40, 10, 24, weighted=True)
    assert neg is not None
    tensors = [gen, pos, neg, *keywords.values()]
    copies = [t.clone() for t in tensors]
    first = drift_field(gen, pos, neg, **keywords)
    for _ in range(size(10, 2)):
        assert_bitwise(first, drift_field(gen, pos, neg, **keywords))
    assert_bitwise(tensors, copies)
    assert not any(t._version for t in tensors[:3])


def test_autocast_computes_in_fp32(backend: str) -> None:
    gen, pos, neg, _ = drift_inputs()
    expected = drift_field(gen, pos, neg)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = drift_field(gen, pos, neg)
        loss = drift_loss(gen, pos, neg)
    assert found.force.dtype == loss.dtype == torch.float32
    for left, right in zip(found, expected, strict=True):
        torch.testing.assert_close(left, right, rtol=1e-6, atol=1e-6)


def test_following_the_field_reaches_the_data(backend: str) -> None:
    """Gradient descent on the loss moves samples onto the data's distribution."""
    gen = (normal(1, size(48, 16), 2, seed=0) * 0.3 - 3).requires_grad_()
    pos = normal(1, size(64, 24), 2, seed=1) * torch.tensor([1.0, 0.5]) + 2
    optimizer = torch.optim.SGD([gen], lr=10.0)
    for _ in range(size(120, 40)):
        optimizer.zero_grad()
        drift_loss(gen, pos, temperatures=(0.3,)).backward()
        optimizer.step()
    points = gen.detach()[0]
    assert float((points.mean(0) - pos[0].mean(0)).norm()) < 0.5


def test_offsets_beyond_32_bits(backend: str) -> None:
    """Rows 2^30 + 64 elements apart: the last starts beyond 2^31 elements."""
    gen, pos, _, _ = drift_inputs(batch=1, count=3, positives=3, negatives=0, channels=8)
    expected = drift_field(gen, pos)
    found = drift_field(far_rows(gen, 2**30 + 64), far_rows(pos, 2**30 + 64))
    assert_bitwise(found, expected)
