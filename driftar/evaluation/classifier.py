"""A small convolutional classifier of the real images: the judge of the samples."""

from __future__ import annotations

import logging
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from driftar.data import DatasetSplits, ImageDataset

__all__ = ["SmallClassifier", "train_classifier"]

_log = logging.getLogger(__name__)
_EVALUATION_BATCH = 512


class SmallClassifier(nn.Module):
    """Two convolutions and two linear layers; the penultimate layer gives the features."""

    name = "small_classifier"

    def __init__(self, image_channels: int, num_classes: int, feature_dim: int = 64) -> None:
        super().__init__()
        for label, value in (
            ("image_channels", image_channels),
            ("num_classes", num_classes),
            ("feature_dim", feature_dim),
        ):
            if value < 1:
                raise ValueError(f"{label} must be at least 1, got {value}")
        self.config = {
            "image_channels": image_channels,
            "num_classes": num_classes,
            "feature_dim": feature_dim,
        }
        self.trunk = nn.Sequential(
            nn.Conv2d(image_channels, 32, 3, padding=1),
            nn.GELU(),
            nn.Conv2d(32, 48, 3, stride=2, padding=1),
            nn.GELU(),
            nn.AdaptiveAvgPool2d(4),
            nn.Flatten(),
            nn.Linear(48 * 16, feature_dim),
            nn.GELU(),
        )
        self.classify = nn.Linear(feature_dim, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """images: float32 ``[N, C, H, W]`` in [-1, 1] -> class scores, float32 ``[N, K]``."""
        logits: Tensor = self.classify(self.trunk(images))
        return logits

    @torch.no_grad()
    def features(self, images: Tensor) -> Tensor:
        """images: float32 ``[N, C, H, W]`` -> features, float32 ``[N, feature_dim]``."""
        return self._in_batches(self.trunk, images)

    @torch.no_grad()
    def predict(self, images: Tensor) -> Tensor:
        """images: float32 ``[N, C, H, W]`` -> class labels, int64 ``[N]``."""
        return self._in_batches(self, images).argmax(1)

    def accuracy(self, dataset: ImageDataset) -> float:
        """Share of the images of `dataset` that are given their own label."""
        return float((self.predict(dataset.images) == dataset.labels).double().mean())

    def _in_batches(self, layer: Callable[[Tensor], Tensor], images: Tensor) -> Tensor:
        channels = self.config["image_channels"]
        if images.dim() != 4 or images.shape[0] == 0 or images.shape[1] != channels:
            raise ValueError(
                f"images must be a non-empty [N, {channels}, H, W], got {tuple(images.shape)}"
            )
        return torch.cat([layer(chunk) for chunk in images.split(_EVALUATION_BATCH)])


def train_classifier(
    splits: DatasetSplits,
    *,
    seed: int = 0,
    epochs: int = 30,
    batch_size: int = 64,
    learning_rate: float = 3e-3,
    progress: bool = True,
    poll: Callable[[], None] | None = None,
) -> SmallClassifier:
    """Train a `SmallClassifier` on the training split, in seconds for 8x8 images.

    Shifts of one pixel augment the data; the learning rate follows one cosine. Neither reads nor
    moves PyTorch's global random state on the CPU, so the same seed gives the same classifier.
    `poll` is called before every batch and may raise to stop.
    Raises ValueError for epochs, batch_size or learning_rate out of range.
    """
    for label, value in (("epochs", epochs), ("batch_size", batch_size)):
        if value < 1:
            raise ValueError(f"{label} must be at least 1, got {value}")
    if not 0 < learning_rate < float("inf"):
        raise ValueError(f"learning_rate must be positive and finite, got {learning_rate}")
    train = splits.train
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = SmallClassifier(train.images.shape[1], train.num_classes)
    generator = torch.Generator().manual_seed(seed)
    steps = epochs * -(-len(train) // batch_size)
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    with tqdm(total=steps, desc="classifier", unit="step", disable=not progress) as bar:
        for _ in range(epochs):
            order = torch.randperm(len(train), generator=generator)
            for chosen in order.split(batch_size):
                if poll is not None:
                    poll()
                images = _shift(train.images[chosen], generator)
                loss = F.cross_entropy(model(images), train.labels[chosen], label_smoothing=0.05)
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                optimizer.step()
                schedule.step()
                bar.update()
            bar.set_postfix(loss=f"{loss.item():.3f}")
    model.eval().requires_grad_(False)
    _log.info("classifier: accuracy %.4f on held-out images", model.accuracy(splits.test))
    return model


def _shift(images: Tensor, generator: torch.Generator) -> Tensor:
    """Move every image by -1, 0 or 1 pixel in both directions; background fills the border."""
    count, channels, height, width = images.shape
    padded = F.pad(images, (1, 1, 1, 1), value=-1.0)
    offsets = torch.randint(0, 3, (2, count, 1, 1), generator=generator)
    rows = offsets[0] + torch.arange(height).view(1, height, 1)
    columns = offsets[1] + torch.arange(width).view(1, 1, width)
    flat = (rows * (width + 2) + columns).view(count, 1, -1).expand(-1, channels, -1)
    return padded.flatten(2).gather(2, flat).view(count, channels, height, width)
