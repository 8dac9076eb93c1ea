"""The metrics of a report: how far samples are from held-out real images of the same classes."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from driftar.data import DatasetSplits, ImageDataset
from driftar.evaluation.classifier import SmallClassifier
from driftar.evaluation.frechet import frechet_distance

__all__ = [
    "ClassMetrics",
    "SampleMetrics",
    "evaluate_real",
    "evaluate_samples",
    "within_class_variance",
]


@dataclass(frozen=True)
class ClassMetrics:
    """One class: number of samples, their accuracy, their pixel variance over the real one."""

    label: int
    count: int
    accuracy: float
    variance_ratio: float


@dataclass(frozen=True)
class SampleMetrics:
    """count: samples judged; frechet_distance: to the held-out images; conditional_accuracy: share
    that the classifier gives their own class; variance_ratio: mean over the classes of the
    within-class pixel variance divided by that of the real training images (1: as varied as real
    images, near 0: collapsed); per_class: the last two, class by class."""

    count: int
    frechet_distance: float
    conditional_accuracy: float
    variance_ratio: float
    per_class: tuple[ClassMetrics, ...]

    def as_dict(self) -> dict[str, Any]:
        """The same numbers as plain JSON-able values."""
        return asdict(self) | {"per_class": [asdict(entry) for entry in self.per_class]}


def within_class_variance(images: Tensor) -> float:
    """Unbiased variance of every pixel over the images ``[n >= 2, C, H, W]``, mean over pixels."""
    if images.dim() != 4 or images.shape[0] < 2:
        raise ValueError(
            f"images must be [n, C, H, W] with n >= 2 to have a variance, got {tuple(images.shape)}"
        )
    return float(images.double().var(dim=0).mean())


def evaluate_samples(
    images: Tensor, labels: Tensor, splits: DatasetSplits, classifier: SmallClassifier
) -> SampleMetrics:
    """Judge generated images against real ones.

    images: float32 ``[N, C, H, W]``, values beyond [-1, 1] are clamped as on display; labels: int64
    ``[N]``, the classes asked for. At least two samples for every class that occurs.
    Raises TypeError / ValueError for another dtype, a shape that differs from the data set's,
    labels out of range, non-finite images or a class with a single sample.
    """
    real = splits.train
    if images.shape[1:] != real.images.shape[1:]:
        raise ValueError(
            f"images must be [N, {', '.join(map(str, real.images.shape[1:]))}] as the data set, "
            f"got {tuple(images.shape)}"
        )
    if not bool(images.isfinite().all()):
        raise ValueError("images must be finite")
    samples = ImageDataset("samples", images.clamp(-1, 1), labels, real.num_classes)
    predicted = classifier.predict(samples.images)
    return _judge(
        samples,
        predicted,
        frechet_distance(
            classifier.features(samples.images), classifier.features(splits.test.images)
        ),
        real,
    )


def evaluate_real(splits: DatasetSplits, classifier: SmallClassifier) -> SampleMetrics:
    """The sanity row: what real images score on the same metrics.

    Frechet distance of the training split to the held-out split; accuracy and variance (over the
    training split's) of the held-out images, which the classifier has never seen.
    """
    distance = frechet_distance(
        classifier.features(splits.train.images), classifier.features(splits.test.images)
    )
    predicted = classifier.predict(splits.test.images)
    return _judge(splits.test, predicted, distance, splits.train)


def _judge(
    samples: ImageDataset, predicted: Tensor, distance: float, real: ImageDataset
) -> SampleMetrics:
    correct = predicted == samples.labels
    rows = []
    for label in torch.unique(samples.labels).tolist():
        chosen = samples.labels == label
        count = int(chosen.sum())
        if count < 2:
            raise ValueError(
                f"labels must name every class at least twice, class {label} has {count} sample"
            )
        rows.append(
            ClassMetrics(
                label=label,
                count=count,
                accuracy=float(correct[chosen].double().mean()),
                variance_ratio=within_class_variance(samples.images[chosen])
                / within_class_variance(real.of_class(label)),
            )
        )
    return SampleMetrics(
        count=len(samples),
        frechet_distance=distance,
        conditional_accuracy=float(correct.double().mean()),
        variance_ratio=sum(row.variance_ratio for row in rows) / len(rows),
        per_class=tuple(rows),
    )
