"""The classifier: it learns, reproduces, and refuses bad input."""

from __future__ import annotations

import pytest
import torch

from driftar.data import load_dataset
from driftar.evaluation import SmallClassifier, train_classifier


def test_it_learns_the_digits_and_reproduces_by_seed_alone() -> None:
    splits = load_dataset("digits")
    first = train_classifier(splits, epochs=5, progress=False)
    assert first.accuracy(splits.test) > 0.9
    assert first.features(splits.test.images).shape == (len(splits.test), 64)
    torch.manual_seed(77)
    state = torch.get_rng_state()
    second = train_classifier(splits, epochs=5, progress=False)
    assert torch.equal(torch.get_rng_state(), state)
    for one, other in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(one, other)
        assert not one.requires_grad


def test_training_can_be_stopped_between_batches() -> None:
    def stop() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_classifier(load_dataset("digits"), progress=False, poll=stop)


@pytest.mark.parametrize(
    "option", [{"epochs": 0}, {"batch_size": 0}, {"learning_rate": float("nan")}]
)
def test_settings_out_of_range_are_named(option: dict[str, float]) -> None:
    (name,) = option
    with pytest.raises(ValueError, match=name):
        train_classifier(load_dataset("digits"), **option)  # type: ignore[arg-type]


def test_images_of_another_shape_are_refused() -> None:
    model = SmallClassifier(1, 3)
    for images in (torch.zeros(2, 3, 8, 8), torch.zeros(0, 1, 8, 8), torch.zeros(1, 8, 8)):
        with pytest.raises(ValueError, match="images"):
            model.predict(images)
    with pytest.raises(ValueError, match="feature_dim"):
        SmallClassifier(1, 3, 0)
