"""Every bad argument of the drift operators is refused by name."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from driftar_kernels import drift_field, drift_loss

B, N, P, Q, S = 2, 3, 4, 5, 6


def good() -> dict[str, Any]:
    return {
        "gen": torch.randn(B, N, S),
        "pos": torch.randn(B, P, S),
        "neg": torch.randn(B, Q, S),
    }


def weight(number: int, value: float) -> torch.Tensor:
    result = torch.ones(B, number)
    result[1, 0] = value
    return result


VALUE_ERRORS: dict[str, tuple[dict[str, Any], str]] = {
    "gen_rank": ({"gen": torch.randn(N, S)}, "gen"),
    "pos_rank": ({"pos": torch.randn(B, P, S, 1)}, "pos"),
    "neg_rank": ({"neg": torch.randn(S)}, "neg"),
    "pos_batch": ({"pos": torch.randn(1, P, S)}, "pos"),
    "neg_batch": ({"neg": torch.randn(B + 1, Q, S)}, "neg"),
    "pos_channels": ({"pos": torch.randn(B, P, S + 1)}, "pos"),
    "neg_channels": ({"neg": torch.randn(B, Q, 1)}, "neg"),
    "empty_batch": (
        {"gen": torch.randn(0, N, S), "pos": torch.randn(0, P, S), "neg": torch.randn(0, Q, S)},
        "gen",
    ),
    "empty_gen": ({"gen": torch.randn(B, 0, S)}, "gen"),
    "empty_channels": (
        {"gen": torch.randn(B, N, 0), "pos": torch.randn(B, P, 0), "neg": torch.randn(B, Q, 0)},
        "gen",
    ),
    "pos_device": ({"pos": torch.empty(B, P, S, device="meta")}, "pos"),
    "neg_device": ({"neg": torch.empty(B, Q, S, device="meta")}, "neg"),
    "weight_device": ({"gen_weight": torch.empty(B, N, device="meta")}, "gen_weight"),
    "gen_weight_shape": ({"gen_weight": torch.ones(B, P)}, "gen_weight"),
    "pos_weight_shape": ({"pos_weight": torch.ones(P)}, "pos_weight"),
    "neg_weight_shape": ({"neg_weight": torch.ones(B, Q, 1)}, "neg_weight"),
    "neg_weight_alone": ({"neg": None, "neg_weight": torch.ones(B, Q)}, "neg_weight"),
    "gen_weight_negative": ({"gen_weight": weight(N, -0.1)}, "gen_weight"),
    "pos_weight_nan": ({"pos_weight": weight(P, math.nan)}, "pos_weight"),
    "neg_weight_infinite": ({"neg_weight": weight(Q, math.inf)}, "neg_weight"),
    "temperatures_empty": ({"temperatures": ()}, "temperatures"),
    "temperatures_nan": ({"temperatures": (0.1, math.nan)}, "temperatures"),
    "temperatures_zero": ({"temperatures": (0.0,)}, "temperatures"),
    "temperatures_negative": ({"temperatures": (0.2, -0.1)}, "temperatures"),
    "temperatures_infinite": ({"temperatures": (math.inf,)}, "temperatures"),
    "normalization": ({"normalization": "columnwise"}, "normalization"),
}

TYPE_ERRORS: dict[str, tuple[dict[str, Any], str]] = {
    "gen_list": ({"gen": [[[0.0]]]}, "gen"),
    "gen_int": ({"gen": torch.ones(B, N, S, dtype=torch.int64)}, "gen"),
    "pos_dtype": ({"pos": torch.randn(B, P, S).double()}, "pos"),
    "neg_dtype": ({"neg": torch.randn(B, Q, S).bfloat16()}, "neg"),
    "weight_list": ({"pos_weight": [1.0]}, "pos_weight"),
    "weight_bool": ({"pos_weight": torch.ones(B, P, dtype=torch.bool)}, "pos_weight"),
    "temperatures_text": ({"temperatures": ("hot",)}, "temperatures"),
    "temperatures_none": ({"temperatures": None}, "temperatures"),
}


@pytest.mark.parametrize("function", [drift_field, drift_loss])
@pytest.mark.parametrize("name", list(VALUE_ERRORS))
def test_value_error(backend: str, name: str, function: Any) -> None:
    change, argument = VALUE_ERRORS[name]
    with pytest.raises(ValueError, match=argument):
        function(**{**good(), **change})


@pytest.mark.parametrize("function", [drift_field, drift_loss])
@pytest.mark.parametrize("name", list(TYPE_ERRORS))
def test_type_error(backend: str, name: str, function: Any) -> None:
    change, argument = TYPE_ERRORS[name]
    with pytest.raises(TypeError, match=argument):
        function(**{**good(), **change})


@pytest.mark.parametrize("reduction", ["sum", "", None])
def test_unknown_reduction(backend: str, reduction: Any) -> None:
    with pytest.raises((ValueError, TypeError), match="reduction"):
        drift_loss(**good(), reduction=reduction)
