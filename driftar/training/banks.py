"""Ring buffers of feature vectors, one per class, from which the drift loss draws its samples."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class ClassBank(nn.Module):
    """The latest ``capacity`` vectors of every class, in buffers so that checkpoints hold them.

    Args:
        num_classes: classes; 1 makes a class-free ring.
        capacity: vectors kept per class.
        width: length S of a vector.

    Raises:
        ValueError: an argument is below 1.
    """

    samples: Tensor  # [classes, capacity, S] float32
    counts: Tensor  # [classes] int64, filled slots
    pointers: Tensor  # [classes] int64, next slot to write

    def __init__(self, num_classes: int, capacity: int, width: int) -> None:
        super().__init__()
        for name, value in (
            ("num_classes", num_classes),
            ("capacity", capacity),
            ("width", width),
        ):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        self.register_buffer("samples", torch.zeros(num_classes, capacity, width))
        self.register_buffer("counts", torch.zeros(num_classes, dtype=torch.long))
        self.register_buffer("pointers", torch.zeros(num_classes, dtype=torch.long))

    @torch.no_grad()
    def push(self, vectors: Tensor, labels: Tensor) -> None:
        """Store vectors ``[N, S]`` under int labels ``[N]``, the oldest to go first; -1 is skipped.

        Raises:
            ValueError: a shape is wrong, a label is out of range, or a vector is not finite.
        """
        classes, capacity, width = self.samples.shape
        if vectors.dim() != 2 or vectors.shape[1] != width:
            raise ValueError(f"vectors must be [N, {width}], got shape {list(vectors.shape)}")
        if labels.shape != vectors.shape[:1]:
            raise ValueError(f"labels must be [{len(vectors)}], got shape {list(labels.shape)}")
        if labels.numel():
            low, high = int(labels.min()), int(labels.max())
            if low < -1 or high >= classes:
                raise ValueError(f"labels must lie in -1..{classes - 1}, got {low}..{high}")
        if not bool(vectors.isfinite().all()):
            raise ValueError("vectors must be finite")
        for label in labels[labels >= 0].unique().tolist():
            new = vectors[labels == label]
            # Of more than a ring's worth only the last survive, but the pointer moves past all.
            start = int(self.pointers[label]) + max(0, len(new) - capacity)
            kept = new[-capacity:]
            slots = (start + torch.arange(len(kept), device=kept.device)) % capacity
            self.samples[label, slots] = kept.to(self.samples.dtype)
            self.pointers[label] = (self.pointers[label] + len(new)) % capacity
            self.counts[label] = (self.counts[label] + len(new)).clamp(max=capacity)

    def draw(self, labels: Tensor, count: int, generator: torch.Generator) -> Tensor:
        """Random stored vectors ``[N, count, S]`` of classes ``[N]``; -1 draws from all classes.

        Without replacement where enough are stored, with replacement otherwise.

        Raises:
            ValueError: a label out of range, or a class without any vector.
        """
        classes, capacity, _ = self.samples.shape
        rows = []
        for label in labels.tolist():
            if not -1 <= label < classes:
                raise ValueError(f"labels must lie in -1..{classes - 1}, got {label}")
            stored = torch.arange(capacity, device=self.counts.device) < self.counts[:, None]
            if label >= 0:
                stored = stored & (torch.arange(classes, device=stored.device) == label)[:, None]
            slots = stored.flatten().nonzero().flatten()
            if len(slots) == 0:
                raise ValueError(f"the bank holds no sample of class {label}")
            if len(slots) >= count:
                picked = torch.randperm(len(slots), generator=generator)[:count]
            else:
                picked = torch.randint(len(slots), (count,), generator=generator)
            rows.append(slots[picked.to(slots.device)])
        return self.samples.flatten(0, 1)[torch.stack(rows)]
