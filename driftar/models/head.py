"""The residual MLP with adaptive LayerNorm that predicts one token's noise from its condition."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from .layers import LAYER_NORM_EPS, initialise_linears, sinusoid, zero_linears

TIME_FEATURES = 256


class TimeEmbedding(nn.Module):
    """Sinusoidal features of a time, then Linear, SiLU, Linear."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Linear(TIME_FEATURES, width), nn.SiLU(), nn.Linear(width, width)
        )

    def forward(self, t: Tensor) -> Tensor:
        """t ``[N]`` in the units of training (0..999 for diffusion) to ``[N, W]``."""
        first: Any = self.mlp[0]
        return self.mlp(sinusoid(t, TIME_FEATURES).to(first.weight.dtype))


class ResidualBlock(nn.Module):
    """``h += gate * mlp(norm(h) * (1 + scale) + shift)``, modulated by y."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.in_ln = nn.LayerNorm(width, eps=LAYER_NORM_EPS)
        self.mlp = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 3 * width))

    def forward(self, h: Tensor, y: Tensor) -> Tensor:
        shift, scale, gate = self.adaLN_modulation(y).chunk(3, dim=-1)
        return h + gate * self.mlp(self.in_ln(h) * (1 + scale) + shift)


class FinalLayer(nn.Module):
    """Modulated LayerNorm without affine parameters, then the output projection."""

    def __init__(self, width: int, out_channels: int) -> None:
        super().__init__()
        self.norm_final = nn.LayerNorm(width, elementwise_affine=False, eps=LAYER_NORM_EPS)
        self.linear = nn.Linear(width, out_channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))

    def forward(self, h: Tensor, y: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation(y).chunk(2, dim=-1)
        return self.linear(self.norm_final(h) * (1 + scale) + shift)


class AdaLNHead(nn.Module):
    """Per-token network of the diffusion and flow heads.

    Args:
        in_channels: width C of a token.
        out_channels: width of the prediction (2 C with a learned variance).
        condition_width: width of the condition z.
        width: hidden width W.
        depth: number of residual blocks.
    """

    def __init__(
        self, in_channels: int, out_channels: int, condition_width: int, width: int, depth: int
    ) -> None:
        super().__init__()
        self.time_embed = TimeEmbedding(width)
        self.cond_embed = nn.Linear(condition_width, width)
        self.input_proj = nn.Linear(in_channels, width)
        self.res_blocks = nn.ModuleList(ResidualBlock(width) for _ in range(depth))
        self.final_layer = FinalLayer(width, out_channels)
        self._initialise()

    def _initialise(self) -> None:
        initialise_linears(self)
        for layer in self.time_embed.mlp:
            if isinstance(layer, nn.Linear):
                nn.init.normal_(layer.weight, std=0.02)
        # Every block starts as the identity and the prediction as 0.
        modulated: list[Any] = [*self.res_blocks, self.final_layer]
        zero_linears(*(block.adaLN_modulation[1] for block in modulated), self.final_layer.linear)

    def forward(self, x: Tensor, t: Tensor, z: Tensor) -> Tensor:
        """x ``[N, C]``, t ``[N]``, z ``[N, D]`` to ``[N, out_channels]``."""
        h = self.input_proj(x.to(self.input_proj.weight.dtype))
        y = self.time_embed(t) + self.cond_embed(z)
        for block in self.res_blocks:
            h = block(h, y)
        return self.final_layer(h, y)
