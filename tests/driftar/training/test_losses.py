from __future__ import annotations

import pytest
import torch

import driftar_kernels
from driftar.training import losses
from tests.driftar import golden


def test_regression_and_entropy_losses_match_published_numbers() -> None:
    numbers = golden.tensors("F_driftar_forward")
    regression = losses.draft_regression_loss(numbers["draft_on_zAR"], numbers["z_AR"])
    golden.assert_near(regression, numbers["reg_loss_on_zAR"], 1e-5)
    golden.assert_near(losses.entropy_loss(numbers["entropy_map"]), numbers["entropy_loss"], 1e-5)


def test_regression_trains_the_draft_alone() -> None:
    z = torch.randn(2, 5, 3, requires_grad=True)
    prediction = torch.randn(2, 5, 3, requires_grad=True)
    losses.draft_regression_loss(prediction, z).backward()
    assert z.grad is None
    assert prediction.grad is not None
    assert float(prediction.grad[:, -1].abs().max()) == 0


def test_first_row_has_no_entropy_to_gain() -> None:
    entropy = torch.rand(2, 6)
    changed = entropy.clone()
    changed[:, 0] = 1
    assert torch.equal(losses.entropy_loss(entropy), losses.entropy_loss(changed))


@pytest.mark.parametrize(
    ("kind", "shape"),
    [
        ("tokens", (2, 3, 20)),
        ("flattened", (2, 3, 35)),
        ("location", (10, 3, 7)),
        ("pooled", (2, 3, 7)),
        ("positions", (2, 15, 7)),
    ],
)
def test_groups_have_their_shapes(kind: str, shape: tuple[int, ...]) -> None:
    group = losses.drift_group(kind, torch.randn(2, 3, 5, 4), torch.randn(2, 3, 5, 7))
    assert group.shape == shape


def test_a_location_group_holds_different_images_at_one_place() -> None:
    features = torch.randn(2, 3, 5, 7)
    group = losses.drift_group("location", torch.empty(2, 3, 5, 0), features)
    assert torch.equal(group[5 + 2], features[1, :, 2])


def test_unknown_group_is_named() -> None:
    with pytest.raises(ValueError, match="drift group"):
        losses.drift_group("channels", torch.zeros(1, 1, 1, 1), torch.zeros(1, 1, 1, 1))


def test_objective_sums_the_kinds_and_reports_their_norms() -> None:
    gen = torch.randn(2, 6, 5, 4, requires_grad=True), torch.randn(2, 6, 5, 7, requires_grad=True)
    pos = torch.randn(2, 9, 5, 4), torch.randn(2, 9, 5, 7)
    total, norms = losses.drift_objective(
        ("tokens", "pooled"), gen, pos, None, (0.2, 0.5), with_norms=True
    )
    parts = [
        driftar_kernels.drift_loss(g, p, temperatures=(0.2, 0.5))
        for g, p in (
            (gen[0].flatten(2), pos[0].flatten(2)),
            (gen[1].mean(2), pos[1].mean(2)),
        )
    ]
    torch.testing.assert_close(total, torch.stack(parts).sum())
    assert {kind: values.shape for kind, values in norms.items()} == {
        "tokens": (2,),
        "pooled": (2,),
    }
    total.backward()
    assert gen[0].grad is not None and gen[1].grad is not None


def test_positions_of_one_image_are_repelled_by_no_other_image() -> None:
    """The published grouping: one generated image per problem, every real position a positive."""
    gen, pos = torch.randn(2, 3, 5, 7, requires_grad=True), torch.randn(2, 4, 5, 7)
    neg = torch.randn(2, 2, 5, 7)
    empty = torch.empty(2, 3, 5, 0)
    total, _ = losses.drift_objective(
        ("positions",), (empty, gen), (empty, pos), (empty, neg), [0.3]
    )
    expected = driftar_kernels.drift_loss(
        gen.flatten(0, 1),
        pos.flatten(1, 2).repeat_interleave(3, 0),
        neg.flatten(1, 2).repeat_interleave(3, 0),
        temperatures=[0.3],
    )
    torch.testing.assert_close(total, expected)


def test_within_class_variance_ignores_differences_between_classes() -> None:
    images = torch.randn(3, 1, 1, 4, 4).expand(3, 6, 1, 4, 4)
    assert float(losses.within_class_variance(images)) == 0
    noise = torch.randn(3, 4000, 1, 2, 2)
    assert float(losses.within_class_variance(noise)) == pytest.approx(1, abs=0.05)
