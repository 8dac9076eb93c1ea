"""Sample metrics: real images score well, collapse and wrong classes are seen."""

from __future__ import annotations

import pytest
import torch

from driftar.data import DatasetSplits, load_dataset
from driftar.evaluation import SmallClassifier, evaluate_real, evaluate_samples, train_classifier


@pytest.fixture(scope="module")
def splits() -> DatasetSplits:
    return load_dataset("digits")


@pytest.fixture(scope="module")
def classifier(splits: DatasetSplits) -> SmallClassifier:
    return train_classifier(splits, epochs=4, progress=False)


def test_real_images_set_the_scale(splits: DatasetSplits, classifier: SmallClassifier) -> None:
    real = evaluate_real(splits, classifier)
    assert real.count == len(splits.test)
    assert real.conditional_accuracy > 0.9
    assert real.variance_ratio == pytest.approx(1, abs=0.1)
    same = evaluate_samples(splits.test.images, splits.test.labels, splits, classifier)
    assert same.frechet_distance == pytest.approx(0, abs=1e-6)
    assert same.conditional_accuracy == real.conditional_accuracy


def test_collapse_and_wrong_classes_are_seen(
    splits: DatasetSplits, classifier: SmallClassifier
) -> None:
    means = torch.stack([splits.train.of_class(label).mean(0) for label in range(10)])
    labels = torch.arange(10).repeat(6)
    collapsed = evaluate_samples(means.repeat(6, 1, 1, 1), labels, splits, classifier)
    assert collapsed.conditional_accuracy > 0.8
    assert collapsed.variance_ratio < 1e-6
    assert collapsed.frechet_distance > evaluate_real(splits, classifier).frechet_distance
    wrong = evaluate_samples(splits.test.images, (splits.test.labels + 1) % 10, splits, classifier)
    assert wrong.conditional_accuracy < 0.1


def test_the_breakdown_adds_up(splits: DatasetSplits, classifier: SmallClassifier) -> None:
    chosen = splits.test.labels < 4
    result = evaluate_samples(
        splits.test.images[chosen], splits.test.labels[chosen], splits, classifier
    )
    assert [row.label for row in result.per_class] == [0, 1, 2, 3]
    assert sum(row.count for row in result.per_class) == result.count == int(chosen.sum())
    weighted = sum(row.accuracy * row.count for row in result.per_class) / result.count
    assert weighted == pytest.approx(result.conditional_accuracy)
    ratios = [row.variance_ratio for row in result.per_class]
    assert sum(ratios) / 4 == pytest.approx(result.variance_ratio)
    assert result.as_dict()["per_class"][1]["label"] == 1


@pytest.mark.parametrize(
    ("images", "labels", "name"),
    [
        (torch.zeros(4, 3, 8, 8), torch.tensor([0, 0, 1, 1]), "images"),
        (torch.full((4, 1, 8, 8), torch.nan), torch.tensor([0, 0, 1, 1]), "images"),
        (torch.zeros(4, 1, 8, 8), torch.tensor([0, 0, 0, 10]), "labels"),
        (torch.zeros(4, 1, 8, 8), torch.tensor([0, 0, 0, 1]), "class 1"),
    ],
)
def test_bad_samples_are_refused(
    splits: DatasetSplits,
    classifier: SmallClassifier,
    images: torch.Tensor,
    labels: torch.Tensor,
    name: str,
) -> None:
    with pytest.raises(ValueError, match=name):
        evaluate_samples(images, labels, splits, classifier)
