"""Transformer parts shared by the model families: attention, MLP, blocks, patches, time features.

Parameter names follow the official checkpoints (timm's block: ``norm1``, ``attn.qkv``, ``mlp.fc1``
...).
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

import driftar_kernels

from .kv_cache import LayerCache

LAYER_NORM_EPS = 1e-6
SINUSOID_PERIOD = 10000.0


def patchify(latents: Tensor, patch_size: int) -> Tensor:
    """Cut latents ``[B, C, H, W]`` into tokens ``[B, (H/p)(W/p), C p p]``.

    Tokens run row by row over the grid; inside a token the channel is slowest, then dy, then dx.

    Raises:
        ValueError: latents is not rank 4 or H or W is no multiple of the patch size.
    """
    if latents.dim() != 4:
        raise ValueError(f"latents must be [B, C, H, W], got shape {list(latents.shape)}")
    batch, channels, height, width = latents.shape
    p = patch_size
    if height % p or width % p:
        raise ValueError(f"latents of {height}x{width} must be divisible into {p}x{p} patches")
    grid = latents.reshape(batch, channels, height // p, p, width // p, p)
    length = (height // p) * (width // p)
    return grid.permute(0, 2, 4, 1, 3, 5).reshape(batch, length, channels * p * p)


def unpatchify(tokens: Tensor, patch_size: int) -> Tensor:
    """Put tokens ``[B, g g, C p p]`` of a square grid back into latents ``[B, C, g p, g p]``.

    Raises:
        ValueError: the number of tokens is no square or their width no multiple of p p.
    """
    batch, length, width = tokens.shape
    p, side = patch_size, math.isqrt(length)
    if side * side != length or width % (p * p):
        raise ValueError(
            f"tokens must be [B, g*g, C*{p}*{p}] of a square grid, got shape {list(tokens.shape)}"
        )
    channels = width // (p * p)
    grid = tokens.reshape(batch, side, side, channels, p, p)
    return grid.permute(0, 3, 1, 4, 2, 5).reshape(batch, channels, side * p, side * p)


def sinusoid(t: Tensor, width: int) -> Tensor:
    """Features ``[N, width]`` = [cos | sin] of t ``[N]`` at width/2 geometric frequencies, fp32."""
    half = width // 2
    exponent = torch.arange(half, dtype=torch.float32, device=t.device) / half
    angles = t[:, None].float() * torch.exp(-math.log(SINUSOID_PERIOD) * exponent)
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


def split_heads(x: Tensor, num_heads: int) -> Tensor:
    """``[B, L, D]`` to ``[B, heads, L, D / heads]``."""
    return x.unflatten(-1, (num_heads, -1)).transpose(1, 2)


def merge_heads(x: Tensor) -> Tensor:
    """``[B, heads, L, d]`` to ``[B, L, heads d]``."""
    return x.transpose(1, 2).flatten(2)


def check_heads(width: int, num_heads: int) -> None:
    """Raise ValueError unless the heads divide the width."""
    if num_heads < 1 or width % num_heads:
        raise ValueError(f"num_heads must divide the width {width}, got {num_heads}")


class Attention(nn.Module):
    """Multi-head self-attention with one fused projection (rows ordered q, k, v).

    Dropout acts on the output projection only: fused attention has no probabilities to drop.
    """

    def __init__(self, width: int, num_heads: int, dropout: float = 0.0) -> None:
        super().__init__()
        check_heads(width, num_heads)
        self.num_heads = num_heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.proj_drop = nn.Dropout(dropout)

    def forward(
        self,
        x: Tensor,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
        cache: LayerCache | None = None,
    ) -> Tensor:
        """x ``[B, L, D]``; ``attn_mask`` bool, True = visible, broadcasts to ``[B, H, L, L]``.

        With a cache, x also attends to the positions in it, and is appended to it.
        """
        return self._attend(x, attn_mask, is_causal, "none", 0, cache)[0]

    def with_entropy(
        self,
        x: Tensor,
        attn_mask: Tensor | None = None,
        *,
        is_causal: bool = False,
        entropy_from: int = 0,
    ) -> tuple[Tensor, Tensor]:
        """Output ``[B, L, D]`` and the entropy ``[B, L]`` of the head-averaged map (Eq. 4)."""
        out, entropy = self._attend(x, attn_mask, is_causal, "map", entropy_from)
        if entropy is None:
            raise RuntimeError("driftar_kernels.attention returned no entropy map")
        return out, entropy

    def _attend(
        self,
        x: Tensor,
        attn_mask: Tensor | None,
        is_causal: bool,
        entropy: str,
        entropy_from: int,
        cache: LayerCache | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        query, key, value = (split_heads(part, self.num_heads) for part in self.qkv(x).chunk(3, -1))
        if cache is not None:
            key, value = cache.extend(key, value)
        result = driftar_kernels.attention(
            query,
            key,
            value,
            attn_mask,
            is_causal=is_causal,
            entropy=entropy,
            entropy_from=entropy_from,
        )
        return self.proj_drop(self.proj(merge_heads(result.out))), result.entropy


class Mlp(nn.Module):
    """Linear, exact GELU, Linear."""

    def __init__(self, width: int, hidden: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(hidden, width)
        self.drop = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        return self.drop(self.fc2(self.drop(self.act(self.fc1(x)))))


class TransformerBlock(nn.Module):
    """Pre-norm block: ``x += attn(norm1(x)); x += mlp(norm2(x))``."""

    def __init__(
        self,
        width: int,
        num_heads: int,
        *,
        mlp_ratio: float = 4.0,
        dropout: float = 0.0,
        eps: float = LAYER_NORM_EPS,
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=eps)
        self.attn = Attention(width, num_heads, dropout)
        self.norm2 = nn.LayerNorm(width, eps=eps)
        self.mlp = Mlp(width, int(width * mlp_ratio), dropout)

    def forward(
        self,
        x: Tensor,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
        cache: LayerCache | None = None,
    ) -> Tensor:
        x = x + self.attn(self.norm1(x), attn_mask, is_causal, cache)
        return x + self.mlp(self.norm2(x))

    def with_entropy(
        self,
        x: Tensor,
        attn_mask: Tensor | None = None,
        *,
        is_causal: bool = False,
        entropy_from: int = 0,
    ) -> tuple[Tensor, Tensor]:
        """As :meth:`forward`, and the entropy map ``[B, L]`` of the attention."""
        out, entropy = self.attn.with_entropy(
            self.norm1(x), attn_mask, is_causal=is_causal, entropy_from=entropy_from
        )
        x = x + out
        return x + self.mlp(self.norm2(x)), entropy


def zero_linears(*linears: Any) -> None:
    """Zero weights and biases, so that a new branch or output starts as nothing."""
    for linear in linears:
        nn.init.zeros_(linear.weight)
        nn.init.zeros_(linear.bias)


def initialise_linears(module: nn.Module) -> None:
    """Xavier-uniform weights and zero biases for every linear, unit LayerNorms."""
    for child in module.modules():
        if isinstance(child, nn.Linear):
            nn.init.xavier_uniform_(child.weight)
            if child.bias is not None:
                nn.init.zeros_(child.bias)
        elif isinstance(child, nn.LayerNorm) and child.elementwise_affine:
            nn.init.ones_(child.weight)
            nn.init.zeros_(child.bias)
