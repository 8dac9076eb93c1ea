"""TransDiff's decoder: a transformer that predicts an image's velocity from a context."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .cross_attention import MODULATIONS, CrossAttentionBlock, KeyValue
from .layers import LAYER_NORM_EPS, initialise_linears, sinusoid, zero_linears

TIME_FEATURES = 256


class TimestepMlp(nn.Module):
    """Sinusoidal features of a time, then Linear, SiLU, Linear."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(TIME_FEATURES, width)
        self.linear_2 = nn.Linear(width, width)

    def forward(self, tau: Tensor) -> Tensor:
        features = sinusoid(tau, TIME_FEATURES).to(self.linear_1.weight.dtype)
        return self.linear_2(nn.functional.silu(self.linear_1(features)))


class TimeModulation(nn.Module):
    """Embedding of a time and the modulation that it gives to the blocks."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.time_embedder = TimestepMlp(width)
        self.time_proj = nn.Linear(width, MODULATIONS * width)

    def forward(self, tau: Tensor) -> tuple[Tensor, Tensor]:
        """tau ``[B]`` to the embedding ``[B, D]`` and the modulation ``[B, 6, D]``."""
        embedding = self.time_embedder(tau)
        modulation = self.time_proj(nn.functional.silu(embedding))
        return embedding, modulation.unflatten(1, (MODULATIONS, -1))


class FinalLayer(nn.Module):
    """LayerNorm without affine parameters, modulated by table plus time, and output projection."""

    def __init__(self, width: int, out_channels: int) -> None:
        super().__init__()
        self.norm_final = nn.LayerNorm(width, elementwise_affine=False, eps=LAYER_NORM_EPS)
        self.linear = nn.Linear(width, out_channels)
        self.scale_shift_table = nn.Parameter(torch.randn(1, 2, width) / width**0.5)

    def forward(self, h: Tensor, embedding: Tensor) -> Tensor:
        shift, scale = (self.scale_shift_table + embedding[:, None]).chunk(2, dim=1)
        return self.linear(self.norm_final(h) * (1 + scale) + shift)


class VelocityNet(nn.Module):
    """Velocity of all tokens of an image at a time, given a context.

    Args:
        seq_len: tokens L of an image.
        token_channels: width C of a token.
        context_width: width of the context.
        width, num_heads, depth, mlp_ratio: the network.
        dropout: rate in training.
    """

    def __init__(
        self,
        *,
        seq_len: int,
        token_channels: int,
        context_width: int,
        width: int,
        num_heads: int,
        depth: int,
        mlp_ratio: float,
        dropout: float,
    ) -> None:
        super().__init__()
        self.time_embed = TimeModulation(width)
        self.cond_embed = nn.Linear(context_width, width)
        self.input_proj = nn.Linear(token_channels, width)
        self.diffusion_pos_embed_learned = nn.Parameter(torch.zeros(1, seq_len, width))
        self.res_blocks = nn.ModuleList(
            CrossAttentionBlock(width, num_heads, mlp_ratio=mlp_ratio, dropout=dropout)
            for _ in range(depth)
        )
        self.final_layer = FinalLayer(width, token_channels)
        self._initialise()

    def _initialise(self) -> None:
        initialise_linears(self)
        nn.init.normal_(self.diffusion_pos_embed_learned, std=0.02)
        for linear in (
            self.time_embed.time_embedder.linear_1,
            self.time_embed.time_embedder.linear_2,
        ):
            nn.init.normal_(linear.weight, std=0.02)
        zero_linears(self.final_layer.linear)

    def remember(self, context: Tensor) -> list[KeyValue]:
        """Keys and values of a context ``[B, M, D]`` in every block: the same at every time."""
        embedded = self.cond_embed(context)
        blocks: Any = self.res_blocks
        return [block.attn2.keys_values(embedded) for block in blocks]

    def forward(self, x: Tensor, memory: list[KeyValue], tau: Tensor) -> Tensor:
        """x ``[B, L, C]``, memory of :meth:`remember`, tau ``[B]`` in 0..1000; ``[B, L, C]``."""
        h = self.input_proj(x.to(self.input_proj.weight.dtype)) + self.diffusion_pos_embed_learned
        embedding, modulation = self.time_embed(tau)
        blocks: Any = self.res_blocks
        for block, known in zip(blocks, memory, strict=True):
            h = block(h, known, modulation)
        return self.final_layer(h, embedding)
