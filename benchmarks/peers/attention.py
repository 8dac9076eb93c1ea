"""Ways to attention with row entropies that PyTorch offers."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import (
    AuxRequest,
    BlockMask,
    create_block_mask,
    flex_attention,
)

# The published code clamps probabilities here before the logarithm.
SMALLEST_PROBABILITY = 1e-8


def sdpa(query: Tensor, key: Tensor, value: Tensor, *, is_causal: bool) -> Tensor:
    """PyTorch's own attention, without entropy."""
    return F.scaled_dot_product_attention(query, key, value, is_causal=is_causal)


def sdpa_twice(
    query: Tensor, key: Tensor, value: Tensor, *, is_causal: bool
) -> tuple[Tensor, Tensor]:
    """Entropy = lse - E[score], the mean score from attention over the keys themselves."""
    flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    out, lse = flash(query, key, value, 0.0, is_causal)
    mean_key = F.scaled_dot_product_attention(query, key, key, is_causal=is_causal)
    mean_score = (query * mean_key).sum(-1, dtype=torch.float32) * query.shape[-1] ** -0.5
    return out, lse - mean_score


def materialised(
    query: Tensor, key: Tensor, value: Tensor, *, is_causal: bool
) -> tuple[Tensor, Tensor]:
    """The published way: the whole softmax map, then p log p, per head."""
    p = _map(query, key, is_causal)
    entropy = -(p * p.clamp(min=SMALLEST_PROBABILITY).log()).sum(-1)
    return p @ value, entropy


def materialised_average(
    query: Tensor, key: Tensor, value: Tensor, *, is_causal: bool
) -> tuple[Tensor, Tensor]:
    """The published way for one entropy per position: of the map averaged over the heads."""
    p = _map(query, key, is_causal)
    mean = p.mean(1)
    return p @ value, -(mean * mean.clamp(min=SMALLEST_PROBABILITY).log()).sum(-1)


def flex(length: int) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """Compiled causal FlexAttention, without entropy."""
    compiled = torch.compile(flex_attention)

    def call(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        out: Tensor = compiled(query, key, value, block_mask=_causal_blocks(length))
        return out

    return call


def flex_twice(length: int) -> Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Compiled causal FlexAttention with its log-sum-exp, and again over the keys."""
    compiled: Callable[..., Any] = torch.compile(flex_attention)

    def call(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        mask = _causal_blocks(length)
        out, extra = compiled(query, key, value, block_mask=mask, return_aux=AuxRequest(lse=True))
        mean_key = compiled(query, key, key, block_mask=mask)
        mean_score = (query * mean_key).sum(-1, dtype=torch.float32) * query.shape[-1] ** -0.5
        return out, extra.lse - mean_score

    return call


def sdpa_masked(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
    """PyTorch's own attention with a float mask and grouped heads."""
    grouped = query.shape[1] != key.shape[1]
    return F.scaled_dot_product_attention(query, key, value, mask, enable_gqa=grouped)


def _map(query: Tensor, key: Tensor, is_causal: bool) -> Tensor:
    scores = query @ key.transpose(-1, -2) * query.shape[-1] ** -0.5
    if is_causal:
        hidden = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
        scores = scores.masked_fill(hidden, -torch.inf)
    return scores.softmax(-1)


@functools.cache
def _causal_blocks(length: int) -> BlockMask:
    return create_block_mask(_causal, None, None, length, length, device="cpu")


def _causal(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
    return query >= key
