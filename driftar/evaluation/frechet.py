"""Frechet distance between two sets of feature vectors."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["frechet_distance"]


def frechet_distance(features_a: Tensor, features_b: Tensor) -> float:
    """Squared Frechet (2-Wasserstein) distance between Gaussians fitted to two sets of features.

    ``|mu_a - mu_b|^2 + tr(C_a + C_b - 2 (C_a^1/2 C_b C_a^1/2)^1/2)`` with unbiased covariances
    (Heusel et al., arXiv 1706.08500, Eq. 6), computed in fp64. The trace of the product's square
    root is taken through symmetric eigenvalues, so that singular covariances (fewer samples than
    dimensions, dead features) are exact instead of an ill-conditioned general square root. Like
    every such estimate it is biased upwards for few samples: compare only at equal sizes.

    features_a: floating ``[N, D]``; features_b: floating ``[M, D]``; N, M >= 2.
    Raises TypeError for integer features and ValueError for shapes that do not fit or non-finite
    features.
    """
    mean_a, covariance_a = _moments(features_a, "features_a")
    mean_b, covariance_b = _moments(features_b, "features_b")
    if mean_a.shape != mean_b.shape:
        raise ValueError(
            f"features_b must have as many columns as features_a ({mean_a.numel()}), "
            f"got {mean_b.numel()}"
        )
    root_a = _symmetric_root(covariance_a)
    product = root_a @ covariance_b @ root_a
    eigenvalues = torch.linalg.eigvalsh((product + product.mT) / 2)
    trace_of_root = eigenvalues.clamp_min(0).sqrt().sum()
    distance = (
        (mean_a - mean_b).square().sum()
        + covariance_a.trace()
        + covariance_b.trace()
        - 2 * trace_of_root
    )
    # Rounding may leave -1e-15 for identical sets; a distance is never negative.
    return max(float(distance), 0.0)


def _moments(features: Tensor, name: str) -> tuple[Tensor, Tensor]:
    if not features.is_floating_point():
        raise TypeError(f"{name} must be floating point, got {features.dtype}")
    if features.dim() != 2 or features.shape[0] < 2 or features.shape[1] < 1:
        raise ValueError(
            f"{name} must be [N, D] with at least 2 rows and 1 column, "
            f"got shape {tuple(features.shape)}"
        )
    values = features.detach().to(dtype=torch.float64, device="cpu")
    if not bool(values.isfinite().all()):
        raise ValueError(f"{name} must be finite")
    mean = values.mean(0)
    centred = values - mean
    return mean, centred.mT @ centred / (values.shape[0] - 1)


def _symmetric_root(matrix: Tensor) -> Tensor:
    eigenvalues, vectors = torch.linalg.eigh(matrix)
    return (vectors * eigenvalues.clamp_min(0).sqrt()) @ vectors.mT
