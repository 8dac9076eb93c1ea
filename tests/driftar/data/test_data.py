"""Data sets: the digits' split, and images and labels that are refused."""

from __future__ import annotations

import sys

import pytest
import torch

from driftar.data import ImageDataset, known_datasets, load_dataset


def test_the_digits_are_split_by_class_without_overlap() -> None:
    splits = load_dataset("digits")
    train, test = splits.train, splits.test
    assert len(train) + len(test) == 1797
    assert train.images.shape[1:] == (1, 8, 8)
    assert train.images.dtype == torch.float32
    assert float(train.images.min()) == -1 and float(train.images.max()) == 1
    for label in range(10):
        held_out, kept = len(test.of_class(label)), len(train.of_class(label))
        assert abs(held_out / (held_out + kept) - 0.25) < 0.005
    # Some digits occur twice in the source; the counts still tell that every image is in one split.
    assert torch.cat([train.images, test.images]).double().sum() == pytest.approx(
        561718 / 8 - 1797 * 64
    )


def test_the_split_ignores_the_global_seeds() -> None:
    torch.manual_seed(1)
    first = load_dataset("digits").test
    torch.manual_seed(2)
    assert torch.equal(load_dataset("digits").test.images, first.images)


def test_an_unknown_name_lists_the_known_ones() -> None:
    assert "digits" in known_datasets()
    with pytest.raises(ValueError, match=r"digits.*'mnist'"):
        load_dataset("mnist")


def test_missing_scikit_learn_is_one_clear_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(ImportError, match="pip install scikit-learn"):
        load_dataset("digits")


IMAGES, LABELS = torch.zeros(3, 1, 4, 4), torch.tensor([0, 1, 1])


@pytest.mark.parametrize(
    ("images", "labels", "classes", "error", "name"),
    [
        (IMAGES.double(), LABELS, 2, TypeError, "images"),
        (IMAGES, LABELS.int(), 2, TypeError, "labels"),
        (IMAGES[0], LABELS, 2, ValueError, "images"),
        (IMAGES[:0], LABELS[:0], 2, ValueError, "images"),
        (IMAGES, LABELS[:2], 2, ValueError, "labels"),
        (IMAGES, LABELS, 1, ValueError, "labels"),
        (IMAGES, LABELS - 1, 2, ValueError, "labels"),
        (IMAGES, LABELS, 0, ValueError, "num_classes"),
        (IMAGES + 1.5, LABELS, 2, ValueError, "images"),
        (IMAGES * float("nan"), LABELS, 2, ValueError, "images"),
    ],
)
def test_bad_images_and_labels_are_refused(
    images: torch.Tensor, labels: torch.Tensor, classes: int, error: type[Exception], name: str
) -> None:
    with pytest.raises(error, match=name):
        ImageDataset("x", images, labels, classes)


def test_of_class_refuses_an_unknown_class() -> None:
    with pytest.raises(ValueError, match="label"):
        ImageDataset("x", IMAGES, LABELS, 2).of_class(2)
