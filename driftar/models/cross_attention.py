"""Blocks that attend to a context, modulated from outside: TransDiff's and Drift-AR's decoders."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import driftar_kernels

from .layers import LAYER_NORM_EPS, Attention, Mlp, check_heads, merge_heads, split_heads

MODULATIONS = 6  # shift, scale and gate of self-attention, then of the MLP

KeyValue = tuple[Tensor, Tensor]


class CrossAttention(nn.Module):
    """Multi-head attention of x to a context, with separate biased projections."""

    def __init__(self, width: int, num_heads: int, dropout: float = 0.0) -> None:
        super().__init__()
        check_heads(width, num_heads)
        self.num_heads = num_heads
        self.wq = nn.Linear(width, width)
        self.wk = nn.Linear(width, width)
        self.wv = nn.Linear(width, width)
        self.proj = nn.Linear(width, width)
        self.proj_drop = nn.Dropout(dropout)

    def keys_values(self, context: Tensor) -> KeyValue:
        """Keys and values ``[B, heads, M, d]`` of a context ``[B, M, D]``."""
        heads = self.num_heads
        return split_heads(self.wk(context), heads), split_heads(self.wv(context), heads)

    def forward(self, x: Tensor, memory: KeyValue) -> Tensor:
        """x ``[B, L, D]``; memory of :meth:`keys_values`."""
        query = split_heads(self.wq(x), self.num_heads)
        out = driftar_kernels.attention(query, *memory, entropy="none").out
        return self.proj_drop(self.proj(merge_heads(out)))


class CrossAttentionBlock(nn.Module):
    """Modulated self-attention, plain cross-attention to the context, modulated MLP.

    With (shift_a, scale_a, gate_a, shift_m, scale_m, gate_m) = table + modulation::

        x += gate_a * attn1(norm1(x) * (1 + scale_a) + shift_a)
        x += attn2(norm2(x), context)
        x += gate_m * mlp(norm3(x) * (1 + scale_m) + shift_m)
    """

    def __init__(
        self, width: int, num_heads: int, *, mlp_ratio: float = 4.0, dropout: float = 0.0
    ) -> None:
        super().__init__()
        self.scale_shift_table = nn.Parameter(torch.randn(1, MODULATIONS, width) / width**0.5)
        self.norm1 = nn.LayerNorm(width, eps=LAYER_NORM_EPS)
        self.attn1 = Attention(width, num_heads, dropout)
        self.norm2 = nn.LayerNorm(width, eps=LAYER_NORM_EPS)
        self.attn2 = CrossAttention(width, num_heads, dropout)
        self.norm3 = nn.LayerNorm(width, eps=LAYER_NORM_EPS)
        self.mlp = Mlp(width, int(width * mlp_ratio), dropout)

    def forward(self, x: Tensor, memory: KeyValue, modulation: Tensor) -> Tensor:
        """x ``[B, L, D]``, modulation ``[B, 6, D]``, memory: ``attn2.keys_values(context)``."""
        rows = (self.scale_shift_table + modulation).chunk(MODULATIONS, dim=1)
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = rows
        x = x + gate_a * self.attn1(self.norm1(x) * (1 + scale_a) + shift_a)
        x = x + self.attn2(self.norm2(x), memory)
        return x + gate_m * self.mlp(self.norm3(x) * (1 + scale_m) + shift_m)
