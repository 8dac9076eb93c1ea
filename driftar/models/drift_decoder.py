"""The one-step decoder of Drift-AR: cross-attention blocks modulated by the attention entropy."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .cross_attention import MODULATIONS, CrossAttentionBlock
from .layers import LAYER_NORM_EPS, initialise_linears, zero_linears


class EntropyAdaLN(nn.Module):
    """Modulation from the entropy map: one for the image from its mean, one per position."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.global_mlp = nn.Sequential(
            nn.Linear(1, width), nn.SiLU(), nn.Linear(width, MODULATIONS * width)
        )
        self.spatial_mlp = nn.Sequential(
            nn.Linear(1, width), nn.SiLU(), nn.Linear(width, 2 * width)
        )

    def forward(self, entropy: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """entropy ``[B, L]`` to image modulation ``[B, 6, D]``, scale and shift ``[B, L, D]``."""
        first: Any = self.global_mlp[0]
        entropy = entropy.to(first.weight.dtype)
        image = self.global_mlp(entropy.mean(1, keepdim=True)).unflatten(1, (MODULATIONS, -1))
        scale, shift = self.spatial_mlp(entropy[..., None]).chunk(2, dim=-1)
        return image, scale, shift


class FinalLayer(nn.Module):
    """LayerNorm and output projection."""

    def __init__(self, width: int, out_channels: int) -> None:
        super().__init__()
        self.norm_final = nn.LayerNorm(width, eps=LAYER_NORM_EPS)
        self.linear = nn.Linear(width, out_channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.norm_final(x))


class DriftDecoderNet(nn.Module):
    """Network of :class:`DriftDecoder`; no time input, since it is evaluated once."""

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
        self.input_proj = nn.Linear(token_channels, width)
        self.cond_embed = nn.Linear(context_width, width)
        self.pos_embed = nn.Parameter(torch.zeros(1, seq_len, width))
        self.level_embed = nn.Parameter(torch.zeros(1, MODULATIONS, width))
        self.entropy_adaln = EntropyAdaLN(width)
        self.res_blocks = nn.ModuleList(
            CrossAttentionBlock(width, num_heads, mlp_ratio=mlp_ratio, dropout=dropout)
            for _ in range(depth)
        )
        self.final_layer = FinalLayer(width, token_channels)
        self._initialise()

    def _initialise(self) -> None:
        initialise_linears(self)
        nn.init.normal_(self.pos_embed, std=0.02)
        nn.init.normal_(self.level_embed, std=0.02)
        # At first the entropy changes nothing and the output is 0.
        adaln = self.entropy_adaln
        zero_linears(adaln.global_mlp[2], adaln.spatial_mlp[2], self.final_layer.linear)

    def forward(self, x0: Tensor, z: Tensor, entropy: Tensor | None) -> Tensor:
        h = self.input_proj(x0) + self.pos_embed
        context = self.cond_embed(z)
        modulation = self.level_embed.expand(x0.shape[0], -1, -1)
        if entropy is not None:
            image, scale, shift = self.entropy_adaln(entropy)
            modulation = modulation + image
            h = h * (1 + scale) + shift
        blocks: Any = self.res_blocks
        for block in blocks:
            h = block(h, block.attn2.keys_values(context), modulation)
        return self.final_layer(h)


class DriftDecoder(nn.Module):
    """Tokens from a prior sample, the features and their entropy, in one evaluation.

    Args:
        seq_len: tokens L of an image.
        token_channels: width C of a token.
        context_width: width of the features z.
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
        mlp_ratio: float = 4.0,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.net = DriftDecoderNet(
            seq_len=seq_len,
            token_channels=token_channels,
            context_width=context_width,
            width=width,
            num_heads=num_heads,
            depth=depth,
            mlp_ratio=mlp_ratio,
            dropout=dropout,
        )

    def forward(self, x0: Tensor, z: Tensor, entropy: Tensor | None = None) -> Tensor:
        """x0 ``[B, L, C]``, z ``[B, M, D]`` and entropy ``[B, L]`` to tokens ``[B, L, C]``.

        Without entropy (None) nothing is modulated by it.

        Raises:
            ValueError: a shape is wrong.
        """
        net = self.net
        length, channels = net.pos_embed.shape[1], net.input_proj.in_features
        if x0.dim() != 3 or tuple(x0.shape[1:]) != (length, channels):
            raise ValueError(f"x0 must be [B, {length}, {channels}], got shape {list(x0.shape)}")
        width = net.cond_embed.in_features
        if z.dim() != 3 or z.shape[0] != x0.shape[0] or z.shape[2] != width:
            raise ValueError(f"z must be [{x0.shape[0]}, M, {width}], got shape {list(z.shape)}")
        if entropy is not None and entropy.shape != x0.shape[:2]:
            raise ValueError(
                f"entropy must be {list(x0.shape[:2])}, got shape {list(entropy.shape)}"
            )
        return self.net(x0, z, entropy)
