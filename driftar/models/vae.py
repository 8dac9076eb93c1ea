"""The KL-16 autoencoder of MAR: images to latents of 16 channels at a sixteenth of the size."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

import driftar_kernels

from .arguments import constructor_arguments
from .diffusion import Noise
from .generation import noise_source

GROUP_NORM_EPS = 1e-6
# Bounds of the posterior's log variance, as published.
LOG_VARIANCE_RANGE = (-30.0, 20.0)


class Posterior(NamedTuple):
    """Diagonal Gaussian over latents, ``[B, C, h, w]`` each."""

    mean: Tensor
    std: Tensor

    def mode(self) -> Tensor:
        """The most likely latents."""
        return self.mean

    def sample(
        self, *, noise: Noise | None = None, generator: torch.Generator | None = None
    ) -> Tensor:
        """Latents drawn with ``noise(shape)`` or from ``generator``."""
        draw = noise_source(noise, generator, self.mean.device, self.mean.dtype)
        return self.mean + self.std * draw(tuple(self.mean.shape))


class ResidualBlock(nn.Module):
    """Norm, SiLU, convolution, twice, beside a shortcut."""

    def __init__(self, in_channels: int, out_channels: int, groups: int) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, in_channels, eps=GROUP_NORM_EPS)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.norm2 = nn.GroupNorm(groups, out_channels, eps=GROUP_NORM_EPS)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        if in_channels != out_channels:
            self.nin_shortcut = nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(functional.silu(self.norm1(x)))
        h = self.conv2(functional.silu(self.norm2(h)))
        return h + (self.nin_shortcut(x) if hasattr(self, "nin_shortcut") else x)


class SpatialAttention(nn.Module):
    """Single-head self-attention over the pixels, with a residual."""

    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(groups, channels, eps=GROUP_NORM_EPS)
        self.q = nn.Conv2d(channels, channels, 1)
        self.k = nn.Conv2d(channels, channels, 1)
        self.v = nn.Conv2d(channels, channels, 1)
        self.proj_out = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        query, key, value = (
            convolution(h).flatten(2).mT[:, None] for convolution in (self.q, self.k, self.v)
        )
        out = driftar_kernels.attention(query, key, value, entropy="none").out
        return x + self.proj_out(out[:, 0].mT.reshape(x.shape))


class Downsample(nn.Module):
    """Strided convolution, padded on the right and below."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(functional.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Every pixel doubled both ways, then a convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(functional.interpolate(x, scale_factor=2.0, mode="nearest"))


class Middle(nn.Module):
    """Two residual blocks around attention."""

    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        self.block_1 = ResidualBlock(channels, channels, groups)
        self.attn_1 = SpatialAttention(channels, groups)
        self.block_2 = ResidualBlock(channels, channels, groups)

    def forward(self, x: Tensor) -> Tensor:
        return self.block_2(self.attn_1(self.block_1(x)))


class Level(nn.Module):
    """Residual blocks at one resolution, each followed by attention where asked for."""

    def __init__(
        self, in_channels: int, out_channels: int, num_blocks: int, groups: int, attention: bool
    ) -> None:
        super().__init__()
        self.block = nn.ModuleList(
            ResidualBlock(in_channels if index == 0 else out_channels, out_channels, groups)
            for index in range(num_blocks)
        )
        count = num_blocks if attention else 0
        self.attn = nn.ModuleList(SpatialAttention(out_channels, groups) for _ in range(count))

    def forward(self, x: Tensor) -> Tensor:
        for index, block in enumerate(self.block):
            x = block(x)
            if len(self.attn):
                x = self.attn[index](x)
        return x


class Encoder(nn.Module):
    """Images to the moments of their latents before ``quant_conv``."""

    def __init__(
        self,
        channels: Sequence[int],
        num_blocks: int,
        groups: int,
        out_channels: int,
        attention: Sequence[int],
    ) -> None:
        super().__init__()
        self.conv_in = nn.Conv2d(3, channels[0], 3, padding=1)
        self.down = nn.ModuleList()
        width = channels[0]
        for index, following in enumerate(channels):
            level = Level(width, following, num_blocks, groups, index in attention)
            if index < len(channels) - 1:
                level.downsample = Downsample(following)
            self.down.append(level)
            width = following
        self.mid = Middle(width, groups)
        self.norm_out = nn.GroupNorm(groups, width, eps=GROUP_NORM_EPS)
        self.conv_out = nn.Conv2d(width, out_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv_in(x)
        levels: Any = self.down
        for level in levels:
            h = level(h)
            if hasattr(level, "downsample"):
                h = level.downsample(h)
        return self.conv_out(functional.silu(self.norm_out(self.mid(h))))


class Decoder(nn.Module):
    """Latents after ``post_quant_conv`` to images; ``up`` is indexed as the encoder's ``down``."""

    def __init__(
        self,
        channels: Sequence[int],
        num_blocks: int,
        groups: int,
        in_channels: int,
        attention: Sequence[int],
    ) -> None:
        super().__init__()
        width = channels[-1]
        self.conv_in = nn.Conv2d(in_channels, width, 3, padding=1)
        self.mid = Middle(width, groups)
        levels = []
        for index in reversed(range(len(channels))):
            level = Level(width, channels[index], num_blocks + 1, groups, index in attention)
            width = channels[index]
            if index > 0:
                level.upsample = Upsample(width)
            levels.append(level)
        self.up = nn.ModuleList(reversed(levels))
        self.norm_out = nn.GroupNorm(groups, width, eps=GROUP_NORM_EPS)
        self.conv_out = nn.Conv2d(width, 3, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        h = self.mid(self.conv_in(z))
        levels: Any = self.up
        for level in reversed(levels):
            h = level(h)
            if hasattr(level, "upsample"):
                h = level.upsample(h)
        return self.conv_out(functional.silu(self.norm_out(h)))


class AutoencoderKL(nn.Module):
    """Convolutional variational autoencoder with official parameter names.

    Models work on its latents times their ``latent_scale`` (0.2325 for KL-16), which is not applied
    here.

    Args:
        embed_dim: latent channels.
        ch: channels of the first level.
        ch_mult: channels of the levels in units of ``ch``; every level but the first halves the
            resolution.
        num_res_blocks: residual blocks of an encoder level; a decoder level has one more.
        encoder_attention, decoder_attention: levels whose blocks are followed by attention.
        groups: of the normalisations.

    Raises:
        ValueError: channels that the groups do not divide, or a level that does not exist.
    """

    name: str = "autoencoder_kl"

    def __init__(
        self,
        *,
        embed_dim: int = 16,
        ch: int = 128,
        ch_mult: Sequence[int] = (1, 1, 2, 2, 4),
        num_res_blocks: int = 2,
        encoder_attention: Sequence[int] = (4,),
        decoder_attention: Sequence[int] = (),
        groups: int = 32,
    ) -> None:
        config = constructor_arguments(locals())
        super().__init__()
        self.config: dict[str, Any] = {
            key: list(value) if isinstance(value, Sequence) else value
            for key, value in config.items()
        }
        channels = [ch * factor for factor in ch_mult]
        if not channels or any(count < 1 or count % groups for count in channels):
            raise ValueError(f"ch times ch_mult must be multiples of {groups}, got {channels}")
        for level in (*encoder_attention, *decoder_attention):
            if not 0 <= level < len(channels):
                raise ValueError(
                    f"attention levels must lie in 0..{len(channels) - 1}, got {level}"
                )
        self.stride, self.latent_channels = 2 ** (len(channels) - 1), embed_dim
        sizes = channels, num_res_blocks, groups
        self.encoder = Encoder(*sizes, 2 * embed_dim, encoder_attention)
        self.decoder = Decoder(*sizes, embed_dim, decoder_attention)
        self.quant_conv = nn.Conv2d(2 * embed_dim, 2 * embed_dim, 1)
        self.post_quant_conv = nn.Conv2d(embed_dim, embed_dim, 1)

    def encode(self, images: Tensor) -> Posterior:
        """Posterior of latents ``[B, C, h, w]`` of images ``[B, 3, H, W]`` in [-1, 1].

        Raises:
            ValueError: H or W is no multiple of the stride, or the shape is wrong.
        """
        if images.dim() != 4 or images.shape[1] != 3:
            raise ValueError(f"images must be [B, 3, H, W], got shape {list(images.shape)}")
        if images.shape[2] % self.stride or images.shape[3] % self.stride:
            raise ValueError(
                f"images must have sides that are multiples of {self.stride}, "
                f"got {images.shape[2]}x{images.shape[3]}"
            )
        mean, log_variance = self.quant_conv(self.encoder(images)).chunk(2, dim=1)
        return Posterior(mean, (0.5 * log_variance.clamp(*LOG_VARIANCE_RANGE)).exp())

    def decode(self, latents: Tensor) -> Tensor:
        """Images ``[B, 3, H, W]``, about in [-1, 1], of latents ``[B, C, h, w]``.

        Raises:
            ValueError: the shape is wrong.
        """
        if latents.dim() != 4 or latents.shape[1] != self.latent_channels:
            raise ValueError(
                f"latents must be [B, {self.latent_channels}, h, w], "
                f"got shape {list(latents.shape)}"
            )
        return self.decoder(self.post_quant_conv(latents))
