"""Layers of a Llama-like causal transformer; parameter names as in its checkpoints."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import driftar_kernels

from .kv_cache import LayerCache
from .layers import merge_heads
from .rotary import Rotation, rotate


class RMSNorm(nn.Module):
    """``weight * x / sqrt(mean(x^2) + eps)``, the quotient in fp32."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        normalised = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return self.weight * normalised.to(x.dtype)


class CausalAttention(nn.Module):
    """Grouped-query causal self-attention with rotary positions.

    Args:
        width: model width H.
        num_heads, num_key_value_heads, head_width: query heads, key heads and width of a head.
        bias, out_bias: whether q, k, v and the output projection have biases.
    """

    def __init__(
        self,
        width: int,
        num_heads: int,
        num_key_value_heads: int,
        head_width: int,
        *,
        bias: bool,
        out_bias: bool,
    ) -> None:
        super().__init__()
        self.head_width = head_width
        self.q_proj = nn.Linear(width, num_heads * head_width, bias=bias)
        self.k_proj = nn.Linear(width, num_key_value_heads * head_width, bias=bias)
        self.v_proj = nn.Linear(width, num_key_value_heads * head_width, bias=bias)
        self.o_proj = nn.Linear(num_heads * head_width, width, bias=out_bias)

    def forward(
        self,
        x: Tensor,
        rotation: Rotation,
        attn_mask: Tensor | None,
        cache: LayerCache | None,
        entropy: str,
    ) -> tuple[Tensor, Tensor | None]:
        """Output ``[B, L, H]`` and, with ``entropy="map"``, its entropy ``[B, L]``.

        Args:
            x: ``[B, L, H]``.
            rotation: of the positions of x.
            attn_mask: bool, broadcasts to ``[B, heads, L, past + L]``, True = visible.
            cache: where the keys and values of earlier positions are, and those of x go.
        """
        query, key, value = (
            projection(x).unflatten(-1, (-1, self.head_width)).transpose(1, 2)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        query, key = rotate(query, rotation), rotate(key, rotation)
        past = 0
        if cache is not None:
            past = cache.length
            key, value = cache.extend(key, value)
        result = driftar_kernels.attention(
            query,
            key,
            value,
            attn_mask,
            is_causal=True,
            query_offset=past,
            enable_gqa=True,
            entropy=entropy,
        )
        return self.o_proj(merge_heads(result.out)), result.entropy


class GatedMlp(nn.Module):
    """``down(silu(gate(x)) * up(x))``."""

    def __init__(self, width: int, hidden: int, bias: bool) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(width, hidden, bias=bias)
        self.up_proj = nn.Linear(width, hidden, bias=bias)
        self.down_proj = nn.Linear(hidden, width, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class CausalLayer(nn.Module):
    """Pre-norm layer: ``x += attn(norm(x)); x += mlp(norm(x))``."""

    def __init__(
        self, attention: CausalAttention, mlp: GatedMlp, *, width: int, eps: float
    ) -> None:
        super().__init__()
        self.self_attn = attention
        self.mlp = mlp
        self.input_layernorm = RMSNorm(width, eps)
        self.post_attention_layernorm = RMSNorm(width, eps)

    def forward(
        self,
        x: Tensor,
        rotation: Rotation,
        attn_mask: Tensor | None,
        cache: LayerCache | None,
        entropy: str,
    ) -> tuple[Tensor, Tensor | None]:
        """As :meth:`CausalAttention.forward`."""
        out, row_entropy = self.self_attn(
            self.input_layernorm(x), rotation, attn_mask, cache, entropy
        )
        x = x + out
        return x + self.mlp(self.post_attention_layernorm(x)), row_entropy
