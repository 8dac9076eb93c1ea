"""Labelled image data sets in the form the training tasks and the metrics take them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["DatasetSplits", "ImageDataset", "known_datasets", "load_dataset"]


@dataclass(frozen=True)
class ImageDataset:
    """Images of one split, all in memory.

    images: float32 ``[N, C, H, W]`` in ``[-1, 1]``; labels: int64 ``[N]`` in ``[0, num_classes)``.
    Raises TypeError for another dtype and ValueError for shapes, values or labels out of range.
    """

    name: str
    images: Tensor
    labels: Tensor
    num_classes: int

    def __post_init__(self) -> None:
        if self.images.dtype != torch.float32:
            raise TypeError(f"images must be float32, got {self.images.dtype}")
        if self.labels.dtype != torch.int64:
            raise TypeError(f"labels must be int64, got {self.labels.dtype}")
        if self.images.dim() != 4 or self.images.numel() == 0:
            raise ValueError(
                f"images must be a non-empty [N, C, H, W], got shape {tuple(self.images.shape)}"
            )
        if self.labels.shape != self.images.shape[:1]:
            raise ValueError(
                f"labels must have shape {tuple(self.images.shape[:1])}, one for each image, "
                f"got {tuple(self.labels.shape)}"
            )
        if self.num_classes < 1:
            raise ValueError(f"num_classes must be at least 1, got {self.num_classes}")
        low, high = int(self.labels.min()), int(self.labels.max())
        if low < 0 or high >= self.num_classes:
            raise ValueError(f"labels must lie in [0, {self.num_classes}), got {low} to {high}")
        # The comparison is false for NaN, so that NaN is refused as well.
        if not bool((self.images.abs() <= 1).all()):
            raise ValueError("images must lie in [-1, 1] and be finite")

    def __len__(self) -> int:
        return int(self.labels.numel())

    def of_class(self, label: int) -> Tensor:
        """The images of one class, float32 ``[n, C, H, W]``; ValueError for an unknown class."""
        if not 0 <= label < self.num_classes:
            raise ValueError(f"label must lie in [0, {self.num_classes}), got {label}")
        return self.images[self.labels == label]


@dataclass(frozen=True)
class DatasetSplits:
    """A training split and a held-out test split; the latter is never trained on."""

    train: ImageDataset
    test: ImageDataset


def _load_digits() -> DatasetSplits:
    from driftar.data.digits import load_digits

    return load_digits()


_LOADERS: dict[str, Callable[[], DatasetSplits]] = {"digits": _load_digits}


def known_datasets() -> tuple[str, ...]:
    """The names that `load_dataset` takes."""
    return tuple(sorted(_LOADERS))


def load_dataset(name: str) -> DatasetSplits:
    """Load a data set by name; the split is fixed and independent of any training seed.

    Raises ValueError for an unknown name (the known ones are listed) and ImportError, in one line,
    when the package that holds the data is missing.
    """
    if name not in _LOADERS:
        raise ValueError(f"dataset must be one of {', '.join(known_datasets())}; got {name!r}")
    return _LOADERS[name]()
