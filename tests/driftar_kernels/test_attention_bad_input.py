"""Every bad argument of :func:`driftar_kernels.attention` is refused by name, before any work."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from driftar_kernels import DraftTree, attention

B, H, Q, K, D = 2, 4, 3, 5, 8


def good() -> dict[str, Any]:
    return {
        "query": torch.randn(B, H, Q, D),
        "key": torch.randn(B, H, K, D),
        "value": torch.randn(B, H, K, D),
    }


VALUE_ERRORS: dict[str, tuple[dict[str, Any], str]] = {
    "query_rank": ({"query": torch.randn(H, Q, D)}, "query"),
    "key_rank": ({"key": torch.randn(B, H, K)}, "key"),
    "value_rank": ({"value": torch.randn(1, B, H, K, D)}, "value"),
    "key_batch": ({"key": torch.randn(B + 1, H, K, D)}, "key"),
    "value_batch": ({"value": torch.randn(1, H, K, D)}, "value"),
    "key_dim": ({"key": torch.randn(B, H, K, D + 1)}, "key"),
    "value_length": ({"value": torch.randn(B, H, K + 1, D)}, "value"),
    "value_heads": ({"value": torch.randn(B, H // 2, K, D)}, "value"),
    "gqa_off": (
        {"key": torch.randn(B, 2, K, D), "value": torch.randn(B, 2, K, D)},
        "enable_gqa",
    ),
    "gqa_indivisible": (
        {"key": torch.randn(B, 3, K, D), "value": torch.randn(B, 3, K, D), "enable_gqa": True},
        "key",
    ),
    "key_device": ({"key": torch.empty(B, H, K, D, device="meta")}, "key"),
    "value_device": ({"value": torch.empty(B, H, K, D, device="meta")}, "value"),
    "mask_device": ({"attn_mask": torch.ones(Q, K, dtype=torch.bool, device="meta")}, "attn_mask"),
    "mask_shape": ({"attn_mask": torch.ones(Q, K + 1, dtype=torch.bool)}, "attn_mask"),
    "mask_batch": ({"attn_mask": torch.ones(3, 1, Q, K, dtype=torch.bool)}, "attn_mask"),
    "mask_rank": ({"attn_mask": torch.ones(1, B, H, Q, K, dtype=torch.bool)}, "attn_mask"),
    "mask_grad": ({"attn_mask": torch.zeros(Q, K, requires_grad=True)}, "attn_mask"),
    "offset_shape": (
        {"is_causal": True, "query_offset": torch.zeros(B + 1, dtype=torch.int64)},
        "query_offset",
    ),
    "offset_rank": (
        {"is_causal": True, "query_offset": torch.zeros(B, 1, dtype=torch.int64)},
        "query_offset",
    ),
    "offset_device": (
        {"is_causal": True, "query_offset": torch.zeros(B, dtype=torch.int64, device="meta")},
        "query_offset",
    ),
    "lengths_shape": ({"key_lengths": torch.ones(B + 1, dtype=torch.int64)}, "key_lengths"),
    "lengths_scalar": ({"key_lengths": torch.tensor(3)}, "key_lengths"),
    "lengths_negative": ({"key_lengths": torch.tensor([3, -1])}, "key_lengths"),
    "lengths_beyond": ({"key_lengths": torch.tensor([K + 1, 2])}, "key_lengths"),
    "lengths_device": (
        {"key_lengths": torch.ones(B, dtype=torch.int64, device="meta")},
        "key_lengths",
    ),
    "scale_nan": ({"scale": math.nan}, "scale"),
    "scale_infinite": ({"scale": math.inf}, "scale"),
    "entropy_name": ({"entropy": "row"}, "entropy"),
    "entropy_from_negative": ({"entropy_from": -1}, "entropy_from"),
    "tree_nodes": ({"tree": DraftTree([-1, 0])}, "tree"),
    "tree_batch": ({"tree": DraftTree([[-1, 0, 1]] * 3)}, "tree"),
    "tree_device": ({"tree": DraftTree(torch.tensor([-1, 0, 1])).to("meta")}, "tree"),
    "tree_causal": ({"tree": DraftTree([-1, 0, 1]), "is_causal": True}, "is_causal"),
    "tree_offset": ({"tree": DraftTree([-1, 0, 1]), "query_offset": 1}, "query_offset"),
    "tree_prefix_beyond": (
        {"tree": DraftTree([-1, 0, 1]), "key_lengths": torch.tensor([2, 3])},
        "key_lengths",
    ),
    "tree_prefix_negative": (
        {"tree": DraftTree([-1, 0, 1]), "key_lengths": torch.tensor([2, -1])},
        "key_lengths",
    ),
    "tree_without_room": (
        {
            "tree": DraftTree([-1, 0, 1]),
            "key": torch.randn(B, H, 2, D),
            "value": torch.randn(B, H, 2, D),
        },
        "key",
    ),
}

TYPE_ERRORS: dict[str, tuple[dict[str, Any], str]] = {
    "query_list": ({"query": [[0.0]]}, "query"),
    "query_int": ({name: torch.ones(B, H, Q, D, dtype=torch.int64) for name in good()}, "query"),
    "query_complex": (
        {name: torch.ones(B, H, Q, D, dtype=torch.complex64) for name in good()},
        "query",
    ),
    "key_dtype": ({"key": torch.randn(B, H, K, D).bfloat16()}, "key"),
    "value_dtype": ({"value": torch.randn(B, H, K, D).double()}, "value"),
    "mask_int": ({"attn_mask": torch.ones(Q, K, dtype=torch.int64)}, "attn_mask"),
    "mask_list": ({"attn_mask": [[True]]}, "attn_mask"),
    "offset_float": ({"is_causal": True, "query_offset": torch.zeros(B)}, "query_offset"),
    "offset_python_float": ({"is_causal": True, "query_offset": 1.5}, "query_offset"),
    "lengths_float": ({"key_lengths": torch.ones(B)}, "key_lengths"),
    "lengths_bool": ({"key_lengths": torch.ones(B, dtype=torch.bool)}, "key_lengths"),
    "lengths_list": ({"key_lengths": [1, 2]}, "key_lengths"),
    "scale_text": ({"scale": "1"}, "scale"),
    "entropy_from_float": ({"entropy_from": 1.0}, "entropy_from"),
    "tree_parents": ({"tree": torch.tensor([-1, 0, 1])}, "tree"),
}


@pytest.mark.parametrize("name", list(VALUE_ERRORS))
def test_value_error(backend: str, name: str) -> None:
    change, argument = VALUE_ERRORS[name]
    with pytest.raises(ValueError, match=argument):
        attention(**{**good(), **change})


@pytest.mark.parametrize("name", list(TYPE_ERRORS))
def test_type_error(backend: str, name: str) -> None:
    change, argument = TYPE_ERRORS[name]
    with pytest.raises(TypeError, match=argument):
        attention(**{**good(), **change})


def test_message_says_what_was_and_what_should_be(backend: str) -> None:
    with pytest.raises(ValueError, match=r"attention.*key_lengths.*6") as caught:
        attention(**good(), key_lengths=torch.tensor([6, 2]))
    assert "5" in str(caught.value)


@pytest.mark.parametrize("rows", [0, 1])
def test_bad_lengths_are_refused_for_empty_queries_too(backend: str, rows: int) -> None:
    with pytest.raises(ValueError, match="key_lengths"):
        attention(
            torch.randn(B, H, rows, D),
            torch.randn(B, H, K, D),
            torch.randn(B, H, K, D),
            key_lengths=torch.tensor([9, 9]),
        )
