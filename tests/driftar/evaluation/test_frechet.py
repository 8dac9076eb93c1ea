"""Frechet distance against closed forms and SciPy's matrix square root."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.linalg
import torch

from driftar.evaluation import frechet_distance


def features(seed: int, count: int, size: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(size, size, generator=generator)
    return torch.randn(count, size, generator=generator) @ mixing + seed


def test_it_equals_the_formula_with_a_general_matrix_root() -> None:
    a, b = features(1, 200, 6), features(2, 300, 6)
    x, y = a.double().numpy(), b.double().numpy()
    cov_x, cov_y = np.cov(x.T), np.cov(y.T)
    root = scipy.linalg.sqrtm(cov_x @ cov_y).real
    expected = ((x.mean(0) - y.mean(0)) ** 2).sum() + np.trace(cov_x + cov_y - 2 * root)
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-8)
    assert frechet_distance(b, a) == pytest.approx(expected, rel=1e-8)


def test_one_dimension_is_the_difference_of_means_and_deviations() -> None:
    a = torch.tensor([[0.0], [2.0]])
    b = torch.tensor([[5.0], [11.0]])
    deviation_a, deviation_b = 2**0.5, 18**0.5
    assert frechet_distance(a, b) == pytest.approx(49 + (deviation_a - deviation_b) ** 2)


def test_singular_covariances_and_equal_sets_are_exact() -> None:
    few = features(3, 5, 40)
    assert frechet_distance(few, few) == pytest.approx(0, abs=1e-4)
    assert frechet_distance(few, few + 3) == pytest.approx(9 * 40, rel=1e-6)
    constant = torch.ones(4, 3)
    assert frechet_distance(constant, constant) == 0


GOOD = torch.randn(4, 3)


@pytest.mark.parametrize(
    ("a", "b", "error", "name"),
    [
        (GOOD.long(), GOOD, TypeError, "features_a"),
        (GOOD, GOOD[0], ValueError, "features_b"),
        (GOOD[:1], GOOD, ValueError, "features_a"),
        (GOOD[:, :0], GOOD, ValueError, "features_a"),
        (GOOD, GOOD[:, :2], ValueError, "features_b"),
        (GOOD, GOOD / 0, ValueError, "features_b"),
    ],
)
def test_bad_features_are_refused(
    a: torch.Tensor, b: torch.Tensor, error: type[Exception], name: str
) -> None:
    with pytest.raises(error, match=name):
        frechet_distance(a, b)
