"""The error rule must be able to fail."""

from __future__ import annotations

import math

import pytest
import torch

from tests.helpers.tolerance import (
    assert_bitwise,
    assert_close_to_truth,
    assert_relative,
    half_ulp,
    largest_finite,
    max_error,
)

TRUTH = torch.tensor([0.0, 1.0, -2.0, 4.0], dtype=torch.float64)


def test_exact_result_passes() -> None:
    assert_close_to_truth(TRUTH.float(), TRUTH)


def test_half_ulp_is_granted_and_no_more() -> None:
    ulp = torch.finfo(torch.float32).eps * 4
    assert half_ulp(4.0, torch.float32) == ulp / 2
    assert_close_to_truth(TRUTH.float(), TRUTH + ulp / 2)
    with pytest.raises(AssertionError, match="error"):
        assert_close_to_truth(TRUTH.float(), TRUTH + ulp)


@pytest.mark.parametrize("factor", [2.0, 3.0])
def test_error_is_measured_in_units_of_plain_pytorch(factor: float) -> None:
    plain = TRUTH.float() + 1e-3
    assert_close_to_truth(TRUTH.float() + factor * 0.99e-3, TRUTH, plain, factor=factor)
    with pytest.raises(AssertionError, match="granted"):
        assert_close_to_truth(TRUTH.float() + factor * 1.01e-3, TRUTH, plain, factor=factor)


def test_one_wrong_element_is_seen() -> None:
    wrong = TRUTH.float().clone()
    wrong[0] = 1e-3
    with pytest.raises(AssertionError):
        assert_close_to_truth(wrong, TRUTH, TRUTH.float())


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_non_finite_must_coincide(value: float) -> None:
    spoiled = TRUTH.clone()
    spoiled[1] = value
    with pytest.raises(AssertionError, match="wrong places"):
        max_error(spoiled, TRUTH)
    with pytest.raises(AssertionError, match="wrong places"):
        max_error(TRUTH, spoiled)
    assert max_error(spoiled, spoiled) == 0.0


def test_infinities_of_opposite_sign_differ() -> None:
    with pytest.raises(AssertionError, match="wrong places"):
        max_error(torch.tensor([math.inf]), torch.tensor([-math.inf]))


def test_shape_must_agree() -> None:
    with pytest.raises(AssertionError, match="shape"):
        max_error(TRUTH[None], TRUTH)


def test_nan_in_plain_pytorch_widens_nothing() -> None:
    plain = TRUTH.float().clone()
    plain[3] = math.nan
    with pytest.raises(AssertionError):
        assert_close_to_truth(TRUTH.float() + 1e-3, TRUTH, plain)


def test_floor_is_absolute() -> None:
    assert_close_to_truth(TRUTH.float() + 1e-3, TRUTH, floor=1.01e-3)
    with pytest.raises(AssertionError):
        assert_close_to_truth(TRUTH.float() + 1e-3, TRUTH, floor=0.99e-3)


def test_relative_rule() -> None:
    assert_relative(TRUTH + 3.9e-5, TRUTH, 1e-5)
    with pytest.raises(AssertionError, match="allowed"):
        assert_relative(TRUTH + 4.1e-5, TRUTH, 1e-5)


def test_empty_tensors() -> None:
    empty = torch.empty(0, 3)
    assert largest_finite(empty) == 0.0
    assert max_error(empty, empty) == 0.0


def test_bitwise_rule() -> None:
    assert_bitwise([TRUTH, None], [TRUTH.clone(), None])
    for other in (TRUTH.float(), TRUTH * (1 + 2**-52), TRUTH[None], None):
        with pytest.raises(AssertionError, match="item 0"):
            assert_bitwise([TRUTH], [other])
    with pytest.raises(ValueError, match="shorter"):
        assert_bitwise([TRUTH], [])
