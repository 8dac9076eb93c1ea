"""TransDiff: one encoder pass gives a context, from which a rectified flow makes the image."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from . import rectified_flow
from .arguments import constructor_arguments
from .condition_encoder import ConditionEncoder, latent_side
from .diffusion import Noise
from .generation import (
    Generation,
    GenerationStats,
    Stopwatch,
    check_count,
    check_finite,
    latents_of,
    noise_source,
    sampling_dtype,
)
from .layers import patchify, unpatchify
from .stack import run_blocks
from .velocity_net import VelocityNet


class FlowModel(ConditionEncoder):
    """What TransDiff and its multi-reference variant share: the encoder and the velocity network.

    ``config`` holds the constructor's arguments.
    """

    token_channels: int
    image_tokens: int

    def __init__(
        self,
        *,
        seq_len: int,
        mask_tokens: int,
        img_size: int = 256,
        vae_stride: int = 16,
        patch_size: int = 1,
        vae_embed_dim: int = 16,
        encoder_embed_dim: int = 1024,
        encoder_depth: int = 16,
        encoder_num_heads: int = 16,
        decoder_embed_dim: int = 1024,
        decoder_depth: int = 16,
        decoder_num_heads: int = 16,
        mlp_ratio: float = 4.0,
        class_num: int = 1000,
        buffer_size: int = 64,
        dropout: float = 0.1,
        latent_scale: float = 0.2325,
    ) -> None:
        config = constructor_arguments(locals(), without=("seq_len", "mask_tokens"))
        image_tokens = latent_side(img_size, vae_stride, 1) ** 2
        super().__init__(
            seq_len=seq_len,
            mask_tokens=mask_tokens,
            in_channels=vae_embed_dim * patch_size**2,
            width=encoder_embed_dim,
            num_blocks=2 * encoder_depth,
            num_heads=encoder_num_heads,
            mlp_ratio=mlp_ratio,
            class_num=class_num,
            buffer_size=buffer_size,
            dropout=dropout,
        )
        self.config = config
        self.token_channels, self.image_tokens = vae_embed_dim, image_tokens
        self.diffdecoder = nn.ModuleDict(
            {
                "net": VelocityNet(
                    seq_len=image_tokens,
                    token_channels=vae_embed_dim,
                    context_width=encoder_embed_dim,
                    width=decoder_embed_dim,
                    num_heads=decoder_num_heads,
                    depth=decoder_depth,
                    mlp_ratio=mlp_ratio,
                    dropout=dropout,
                )
            }
        )

    def patchify(self, latents: Tensor) -> Tensor:
        """Latents ``[B, C, h, w]`` to image tokens ``[B, L, C]``; ValueError if they do not fit."""
        tokens = patchify(latents, 1)
        if tokens.shape[1:] != (self.image_tokens, self.token_channels):
            raise ValueError(
                f"latents must give tokens [B, {self.image_tokens}, {self.token_channels}], "
                f"got {list(tokens.shape)} from {list(latents.shape)}"
            )
        return tokens

    def unpatchify(self, tokens: Tensor) -> Tensor:
        """Image tokens ``[B, L, C]`` to latents ``[B, C, h, w]``."""
        return unpatchify(tokens, 1)

    def velocity(self, x: Tensor, z: Tensor, tau: Tensor) -> Tensor:
        """Velocity ``[B, L, C]`` of image tokens.

        Args:
            x: ``[B, L, C]``.
            z: context ``[B, M, D]``.
            tau: time ``[B]`` in 0..1000, 1000 is noise; fractions are allowed.

        Raises:
            ValueError: a shape is wrong.
        """
        batch = x.shape[0]
        if tuple(x.shape[1:]) != (self.image_tokens, self.token_channels):
            raise ValueError(
                f"x must be [B, {self.image_tokens}, {self.token_channels}], "
                f"got shape {list(x.shape)}"
            )
        if z.dim() != 3 or z.shape[0] != batch or z.shape[2] != self.width:
            raise ValueError(f"z must be [{batch}, M, {self.width}], got shape {list(z.shape)}")
        if tuple(tau.shape) != (batch,):
            raise ValueError(f"tau must be [{batch}], got shape {list(tau.shape)}")
        return self._net(x, self._net.remember(z), tau)

    @property
    def _net(self) -> VelocityNet:
        net: Any = self.diffdecoder["net"]
        return net

    def _velocity_of(self, context: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
        """Velocity for one context, projected once, in the sampler's dtype."""
        net, memory = self._net, self._net.remember(context)
        return lambda x, tau: net(x, memory, tau).to(x.dtype)


class TransDiff(FlowModel):
    """TransDiff with official parameter names: a class to a context to an image.

    Args:
        img_size: image height and width in pixels.
        vae_stride: pixels per latent cell (1 models pixels directly).
        patch_size: 1.
        vae_embed_dim: latent channels.
        encoder_embed_dim, encoder_depth, encoder_num_heads: the encoder, of 2 depth blocks.
        decoder_embed_dim, decoder_depth, decoder_num_heads: the velocity network.
        mlp_ratio: hidden width of the blocks' MLPs in units of the width.
        class_num: number of classes.
        buffer_size: leading positions that carry the condition.
        seq_len: length of the context; 256 at every image size as published.
        dropout: rate in the blocks' projections and MLPs, in training only.
        latent_scale: what latents were multiplied by before modelling; kept for pipelines.

    Raises:
        ValueError: sizes that do not fit each other.
    """

    name: str = "transdiff"

    def __init__(self, *, seq_len: int = 256, patch_size: int = 1, **options: Any) -> None:
        if patch_size != 1:
            raise ValueError(f"patch_size must be 1, got {patch_size}")
        super().__init__(seq_len=seq_len, mask_tokens=1, patch_size=patch_size, **options)
        self.config["seq_len"] = seq_len

    def features(self, condition: Tensor) -> Tensor:
        """Context z ``[B, seq_len, D]`` of conditions ``[B, D]``."""
        return self.features_with_entropies(condition, ())[0]

    def features_with_entropies(
        self, condition: Tensor, entropy_layers: Sequence[int]
    ) -> tuple[Tensor, list[Tensor]]:
        """As :meth:`features`, and entropy maps ``[B, seq_len]`` of blocks, in the same pass.

        Args:
            entropy_layers: indices of the blocks; negative ones count from the end.
        """
        x, entropies = run_blocks(
            self.encoder_blocks,
            self._blank_input(condition),
            entropy_layers=entropy_layers,
            entropy_from=self.buffer_size,
        )
        return self._encoder_output(x) + self.diffusion_pos_embed_learned, entropies

    def loss(self, latents: Tensor, condition: Tensor, tau: Tensor, noise: Tensor) -> Tensor:
        """Mean squared velocity error.

        Args:
            latents: ``[B, C, h, w]``.
            condition: ``[B, D]``.
            tau: ``[R, B]``, whole times in 0..999: every image is used R times.
            noise: ``[R, B, L, C]``.

        Raises:
            ValueError: a shape is wrong.
        """
        target = self.patchify(latents)
        check_draws(tau, noise, target)
        repeats = tau.shape[0]
        z = self.features(condition).repeat(repeats, 1, 1)
        return rectified_flow.velocity_loss(
            lambda x, times: self.velocity(x, z, times),
            target.repeat(repeats, 1, 1),
            tau.flatten(),
            noise.flatten(0, 1),
        )

    @torch.no_grad()
    def generate_with_stats(
        self,
        class_labels: Tensor,
        *,
        num_steps: int = 100,
        cfg: float = 1.0,
        scale_mean: float = 1.0,
        scale_noise: float = 1.0,
        noise: Noise | None = None,
        generator: torch.Generator | None = None,
    ) -> Generation:
        """Sample images with one encoder pass and ``num_steps`` evaluations of the decoder.

        Args:
            class_labels: int ``[B]``, -1 = unconditional.
            num_steps: steps of the sampler.
            cfg: guidance weight; 1 is unguided.
            scale_mean, scale_noise: factors of drift and noise in every step but the last.
            noise: ``noise(shape) -> Tensor``, asked for ``[B, L, C]`` at the start and once per
                step but the last; replaces ``generator``.
            generator: source of randomness; torch's default one if None.

        Returns:
            :class:`Generation` without entropy.

        Raises:
            TypeError, ValueError: an argument of a wrong type, shape or range.
        """
        check_count("num_steps", num_steps)
        guidance = None if check_finite("cfg", cfg) == 1.0 else float(cfg)
        condition = self.condition(class_labels)
        watch, stats = Stopwatch(condition.device), GenerationStats()
        batch = condition.shape[0]
        if guidance is not None:
            condition = torch.cat([condition, self.fake_latent.expand(batch, -1)])
        context = self.features(condition)
        stats.ar_seconds = watch.lap()
        draw = noise_source(noise, generator, context.device, sampling_dtype(context.dtype))
        tokens = rectified_flow.sample(
            self._velocity_of(context),
            draw((batch, self.image_tokens, self.token_channels)),
            draw,
            num_steps=num_steps,
            guidance=guidance,
            scale_mean=check_finite("scale_mean", scale_mean),
            scale_noise=check_finite("scale_noise", scale_noise),
        )
        latents = self.unpatchify(tokens.to(context.dtype))
        stats.decoder_nfe, stats.decoder_seconds = num_steps, watch.lap()
        stats.total_seconds = stats.ar_seconds + stats.decoder_seconds
        return Generation(latents, None, stats)

    generate = latents_of(generate_with_stats)


def check_draws(tau: Tensor, noise: Tensor, target: Tensor) -> None:
    """ValueError unless tau is ``[R, B]`` and noise ``[R, B, L, C]`` for tokens ``[B, L, C]``."""
    batch = target.shape[0]
    if tau.dim() != 2 or tau.shape[1] != batch:
        raise ValueError(f"tau must be [R, {batch}], got shape {list(tau.shape)}")
    expected = (*tau.shape, *target.shape[1:])
    if tuple(noise.shape) != expected:
        raise ValueError(f"noise must be {list(expected)}, got shape {list(noise.shape)}")
