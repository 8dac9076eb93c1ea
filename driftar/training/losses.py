"""Losses of Drift-AR and the groups in which the drift is measured."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

import driftar_kernels

if TYPE_CHECKING:
    from driftar.models.drift_stage import DriftStage

# What a sample of a drift group is; see :func:`drift_group`.
DRIFT_GROUPS = ("tokens", "flattened", "location", "pooled", "positions")


def draft_regression_loss(prediction: Tensor, z: Tensor) -> Tensor:
    """Smooth-L1 of the draft's row r to the detached feature at r + 1, ``[B, L, D]`` (Eq. 3)."""
    return functional.smooth_l1_loss(prediction[:, :-1], z.detach()[:, 1:])


def entropy_loss(entropy: Tensor) -> Tensor:
    """Negative entropy of the map ``[B, L]`` summed over all rows but the first, over L (Eq. 5)."""
    return -entropy[:, 1:].sum(1).mean() / entropy.shape[1]


class DriftARLosses(NamedTuple):
    """Scalars of one step: drift, draft regression (Eq. 3) and entropy (Eq. 5)."""

    drift: Tensor
    draft: Tensor
    entropy: Tensor

    def total(self, alpha: float) -> Tensor:
        """``alpha (draft + entropy) + (1 - alpha) drift``."""
        return alpha * (self.draft + self.entropy) + (1 - alpha) * self.drift


def drift_ar_losses(
    model: DriftStage,
    condition: Tensor,
    noise: Tensor,
    positives: Tensor,
    negatives: Tensor | None = None,
    *,
    temperatures: Sequence[float] = (0.02, 0.05, 0.2),
    detach: bool = False,
) -> DriftARLosses:
    """Losses of Drift-AR as its published code computes them.

    The positions of a generated image are the samples of one drift problem in the space of phi.

    Args:
        model: a Drift-AR.
        condition: ``[B, D]``.
        noise: ``[B, L, C]``.
        positives, negatives: features of phi ``[B, n, D]`` that attract and repel.
        temperatures: of the drifting field.
        detach: Phase II: nothing reaches the AR model through its features and their entropy.
    """
    z, entropy = model.features(condition)
    draft = draft_regression_loss(model.draft(z.detach()), z)
    spread = entropy_loss(entropy)
    if detach:
        z, entropy = z.detach(), entropy.detach()
    features = model.phi(model.decode(model.prior(z, entropy, noise), z, entropy))
    drift = driftar_kernels.drift_loss(features, positives, negatives, temperatures=temperatures)
    return DriftARLosses(drift, draft, spread)


def drift_group(kind: str, tokens: Tensor, features: Tensor) -> Tensor:
    """Arrange images as the problems of the drift loss.

    Args:
        kind: "tokens": an image's tokens as one vector; "flattened": its features as one vector;
            "location": a problem per location, the images' features there; "pooled": its mean
            feature. In these four the samples of a problem are different images of one class, as in
            *Generative Modeling via Drifting*. "positions": the positions of images are the
            samples, as in the published Drift-AR code.
        tokens: ``[K, N, L, C]``: N images of each of K classes.
        features: ``[K, N, L, D]``, phi of them.

    Returns:
        ``[B, samples, S]``.

    Raises:
        ValueError: an unknown kind.
    """
    if kind == "tokens":
        return tokens.flatten(2)
    if kind == "flattened":
        return features.flatten(2)
    if kind == "location":
        return features.transpose(1, 2).flatten(0, 1)
    if kind == "pooled":
        return features.mean(2)
    if kind == "positions":
        return features.flatten(1, 2)
    raise ValueError(f"drift group must be one of {DRIFT_GROUPS}, got {kind!r}")


def drift_objective(
    kinds: Sequence[str],
    gen: tuple[Tensor, Tensor],
    pos: tuple[Tensor, Tensor],
    neg: tuple[Tensor, Tensor] | None,
    temperatures: Sequence[float],
    *,
    with_norms: bool = False,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Drift loss (Eq. 8) summed over kinds of groups.

    Args:
        kinds: of :data:`DRIFT_GROUPS`.
        gen, pos, neg: tokens ``[K, N, L, C]`` and features ``[K, N, L, D]`` of generated, real and
            further repelling images; N may differ. Gradients reach ``gen``.
        temperatures: of the drifting field.
        with_norms: also compute the norms, at the price of a second field per kind.

    Returns:
        The scalar loss and, with norms, the mean squared raw forces ``[T]`` per kind: the curves
        that show progress, since the loss itself is normalised.
    """
    total = gen[0].new_zeros(())
    norms = {}
    for kind in kinds:
        generated = drift_group(kind, *gen)
        real = drift_group(kind, *pos)
        other = None if neg is None else drift_group(kind, *neg)
        if kind == "positions":
            # One problem per generated image: its class's other images must not repel its
            # positions.
            images, length = gen[1].shape[1:3]
            generated = generated.unflatten(1, (images, length)).flatten(0, 1)
            real = real.repeat_interleave(images, 0)
            other = None if other is None else other.repeat_interleave(images, 0)
        if with_norms:
            norms[kind] = driftar_kernels.drift_field(
                generated, real, other, temperatures=temperatures
            ).norms
        total = total + driftar_kernels.drift_loss(
            generated, real, other, temperatures=temperatures
        )
    return total, norms


def within_class_variance(images: Tensor) -> Tensor:
    """Mean pixel variance among images of a class, ``[K, N, ...]`` to a scalar; N at least 2."""
    return images.flatten(2).var(1).mean()


def all_finite(values: Sequence[Tensor]) -> bool:
    """Whether no tensor holds a NaN or an infinity."""
    return all(bool(torch.isfinite(value).all()) for value in values)
