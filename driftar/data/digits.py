"""The 1,797 handwritten 8x8 digits that ship inside scikit-learn (no download)."""

from __future__ import annotations

import numpy as np
import torch

from driftar.data import DatasetSplits, ImageDataset

_TEST_FRACTION = 0.25
# Fixed for ever: figures of different runs and seeds are comparable only on the same split.
_SPLIT_SEED = 1797
_LARGEST_VALUE = 16.0


def load_digits() -> DatasetSplits:
    """Stratified split, a quarter of every class held out; images ``[N, 1, 8, 8]`` in [-1, 1].

    Raises ImportError when scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits as sklearn_digits
    except ImportError as error:
        raise ImportError(
            "the digits data set needs scikit-learn: pip install scikit-learn"
        ) from error
    bunch = sklearn_digits()
    pixels = np.asarray(bunch.images, dtype=np.float32) / np.float32(_LARGEST_VALUE / 2) - 1
    targets = np.asarray(bunch.target, dtype=np.int64)
    images = torch.from_numpy(pixels).unsqueeze(1)
    labels = torch.from_numpy(targets)

    held_out = _stratified_test_indices(targets)
    is_test = torch.zeros(len(targets), dtype=torch.bool)
    is_test[torch.from_numpy(held_out)] = True
    num_classes = int(targets.max()) + 1
    return DatasetSplits(
        train=ImageDataset("digits", images[~is_test], labels[~is_test], num_classes),
        test=ImageDataset("digits", images[is_test], labels[is_test], num_classes),
    )


def _stratified_test_indices(targets: np.ndarray) -> np.ndarray:
    # RandomState's streams are frozen by NumPy, those of default_rng may change between versions.
    random = np.random.RandomState(_SPLIT_SEED)
    chosen = []
    for label in np.unique(targets):
        members = np.flatnonzero(targets == label)
        count = round(len(members) * _TEST_FRACTION)
        chosen.append(random.permutation(members)[:count])
    return np.sort(np.concatenate(chosen))
