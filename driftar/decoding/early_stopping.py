"""When drafting is no longer worth it: thresholds on the draft's entropy, as published."""

from __future__ import annotations

import math

from torch import Tensor

# tau_global = 0.3 mean - 0.1 standard deviation of the target's entropies.
_MEAN_WEIGHT, _DEVIATION_WEIGHT = 0.3, 0.1


class EntropyTracker:
    """Running statistics of the target's entropies and the two thresholds made of them.

    ``tau_global`` follows the mean and variance of everything seen, ``tau_context`` an exponential
    average of the batches' means that starts at ``tau_global / gamma``.

    Args:
        gamma: factor of the average in ``tau_context``, > 0.
        decay: of the average, in [0, 1).

    Attributes:
        mean, variance, count: of the entropies seen; the variance combines the unbiased ones of
            the batches as if they were populations.

    Raises:
        ValueError: gamma or decay out of range.
    """

    def __init__(self, gamma: float = 0.8, decay: float = 0.9) -> None:
        if not (math.isfinite(gamma) and gamma > 0):
            raise ValueError(f"gamma must be finite and > 0, got {gamma}")
        if not 0 <= decay < 1:
            raise ValueError(f"decay must lie in [0, 1), got {decay}")
        self.gamma, self.decay = gamma, decay
        self.mean = self.variance = self.average = 0.0
        self.count = 0

    def update(self, entropy: Tensor) -> None:
        """Take in a batch of entropies of any shape, at least two of them.

        Raises:
            ValueError: fewer than two entropies.
        """
        count = entropy.numel()
        if count < 2:
            raise ValueError(f"entropy must hold at least 2 values, got {count}")
        values = entropy.detach().float()
        mean, variance = float(values.mean()), float(values.var())
        total = self.count + count
        difference = mean - self.mean
        self.variance = (
            self.count * self.variance
            + count * variance
            + difference**2 * self.count * count / total
        ) / total
        self.mean += difference * count / total
        if self.count == 0:
            self.average = self.tau_global / self.gamma
        else:
            self.average = self.decay * self.average + (1 - self.decay) * mean
        self.count = total

    @property
    def tau_global(self) -> float:
        """Threshold from all entropies seen."""
        return _MEAN_WEIGHT * self.mean - _DEVIATION_WEIGHT * math.sqrt(self.variance)

    @property
    def tau_context(self) -> float:
        """Threshold from the recent batches."""
        return self.gamma * self.average

    def stops(self, draft_entropy: float) -> bool:
        """Whether a draft of this mean entropy is confident enough to end drafting."""
        return draft_entropy < min(self.tau_context, self.tau_global)
