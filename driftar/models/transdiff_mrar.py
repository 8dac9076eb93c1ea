"""TransDiff with multi-reference autoregression: four images in turn, each seeing those before."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import rectified_flow
from .condition_encoder import latent_side
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
from .kv_cache import KVCache
from .layers import patchify
from .stack import block_causal_mask, run_blocks
from .transdiff import FlowModel, check_draws

GROUPS = 4  # images of one class: each is a reference of the following ones


class TransDiffMRAR(FlowModel):
    """TransDiff-MRAR with official parameter names.

    The encoder's sequence is a buffer and four groups of (h/p)(w/p) tokens: learned mask tokens,
    then three images. A group sees the buffer, the groups before it and itself.

    Args:
        patch_size: latent cells per encoder token along a side; the decoder's patches are single
            cells.
        options: the other arguments of :class:`TransDiff`, without ``seq_len``.

    Raises:
        ValueError: sizes that do not fit each other.
    """

    name: str = "transdiff_mrar"

    def __init__(
        self,
        *,
        img_size: int = 256,
        vae_stride: int = 16,
        patch_size: int = 2,
        **options: Any,
    ) -> None:
        group = latent_side(img_size, vae_stride, patch_size) ** 2
        super().__init__(
            seq_len=GROUPS * group,
            mask_tokens=group,
            img_size=img_size,
            vae_stride=vae_stride,
            patch_size=patch_size,
            **options,
        )
        self.group, self.patch_size = group, patch_size

    def group_tokens(self, latents: Tensor) -> Tensor:
        """Latents ``[B, C, h, w]`` to the encoder tokens of one group, ``[B, L / 4, C p p]``."""
        return patchify(latents, self.patch_size)

    def features(self, tokens: Tensor, condition: Tensor) -> Tensor:
        """Encoder outputs of a prefix of groups; position embeddings are added by the caller.

        Args:
            tokens: ``[B, i L / 4, C p p]`` of i = 1..4 groups; the first group is not looked at.
            condition: ``[B, D]``.

        Returns:
            ``[B, i L / 4, D]``; row by row independent of later groups.

        Raises:
            ValueError: a shape is wrong.
        """
        return self.features_with_entropies(tokens, condition, ())[0]

    def features_with_entropies(
        self, tokens: Tensor, condition: Tensor, entropy_layers: Sequence[int]
    ) -> tuple[Tensor, list[Tensor]]:
        """As :meth:`features`, and entropy maps ``[B, i L / 4]`` of blocks, in the same pass.

        Args:
            entropy_layers: indices of the blocks; negative ones count from the end.
        """
        channels = self.z_proj.in_features
        batch, length = condition.shape[0], tokens.shape[1]
        if tokens.shape[0] != batch or tokens.dim() != 3 or tokens.shape[2] != channels:
            raise ValueError(
                f"tokens must be [{batch}, n, {channels}], got shape {list(tokens.shape)}"
            )
        if not 0 < length <= self.seq_len or length % self.group:
            raise ValueError(
                f"tokens must hold 1 to {GROUPS} groups of {self.group}, got {length} tokens"
            )
        references = self.z_proj(tokens[:, self.group :].to(self.z_proj.weight.dtype))
        content = torch.cat([self.mask_token.expand(batch, -1, -1), references], dim=1)
        x, entropies = run_blocks(
            self.encoder_blocks,
            self._encoder_input(condition, content),
            attn_mask=block_causal_mask(self.buffer_size, length, self.group, tokens.device),
            entropy_layers=entropy_layers,
            entropy_from=self.buffer_size,
        )
        return self._encoder_output(x), entropies

    def loss(self, latents: Tensor, condition: Tensor, tau: Tensor, noise: Tensor) -> Tensor:
        """Mean squared velocity error of four images, each in the context of those before it.

        Args:
            latents: ``[B, 4, C, h, w]``, images of one class per row.
            condition: ``[B, D]``.
            tau: ``[4, B]``, whole times in 0..999.
            noise: ``[4, B, L, C]``.

        Raises:
            ValueError: a shape is wrong.
        """
        if latents.dim() != 5 or latents.shape[1] != GROUPS:
            raise ValueError(
                f"latents must be [B, {GROUPS}, C, h, w], got shape {list(latents.shape)}"
            )
        images = latents.unbind(1)
        targets = [self.patchify(image) for image in images]
        check_draws(tau, noise, targets[0])
        if tau.shape[0] != GROUPS:
            raise ValueError(f"tau must be [{GROUPS}, B], got shape {list(tau.shape)}")
        # The first group is overwritten by the mask tokens, so any image can hold its place.
        tokens = torch.cat([self.group_tokens(image) for image in (images[0], *images[:-1])], dim=1)
        z = self.features(tokens, condition) + self.diffusion_pos_embed_learned
        losses = []
        for index, target in enumerate(targets):
            net = self._velocity_of(z[:, : (index + 1) * self.group])
            losses.append(rectified_flow.velocity_loss(net, target, tau[index], noise[index]))
        return torch.stack(losses).mean()

    @torch.no_grad()
    def generate_with_stats(
        self,
        class_labels: Tensor,
        *,
        num_steps: int = 100,
        cfg: float | Sequence[float] = 1.0,
        scale_mean: float = 1.0,
        scale_noise: float = 1.0,
        noise: Noise | None = None,
        generator: torch.Generator | None = None,
    ) -> Generation:
        """Sample four images in turn and return the last; 4 ``num_steps`` decoder evaluations.

        Keys and values of a group are kept, since no later group changes them: every group is
        encoded once.

        Args:
            class_labels: int ``[B]``, -1 = unconditional.
            num_steps: steps of the sampler for each image.
            cfg: guidance weight, or one for each of the four images; 1 is unguided.
            scale_mean, scale_noise: factors of drift and noise in every step but the last.
            noise: ``noise(shape) -> Tensor``, asked for ``[B, L, C]`` once for the start of all
                images and once per step but the last of each; replaces ``generator``.
            generator: source of randomness; torch's default one if None.

        Returns:
            :class:`Generation` without entropy.

        Raises:
            TypeError, ValueError: an argument of a wrong type, shape or range.
        """
        check_count("num_steps", num_steps)
        weights = _guidance_weights(cfg)
        check_finite("scale_mean", scale_mean)
        check_finite("scale_noise", scale_noise)
        condition = self.condition(class_labels)
        watch, stats = Stopwatch(condition.device), GenerationStats()
        batch = condition.shape[0]
        if any(weight != 1.0 for weight in weights):
            condition = torch.cat([condition, self.fake_latent.expand(batch, -1)])
        draw = noise_source(noise, generator, condition.device, sampling_dtype(condition.dtype))
        start = draw((batch, self.image_tokens, self.token_channels))
        cache = self._new_cache(len(condition))
        z = condition.new_zeros(condition.shape[0], 0, self.width)
        tokens = start
        for index, weight in enumerate(weights):
            reference = self.unpatchify(tokens.to(z.dtype)) if index else None
            z = torch.cat([z, self._encode_next(reference, condition, z.shape[1], cache)], dim=1)
            stats.ar_seconds += watch.lap()
            guided = weight != 1.0
            tokens = rectified_flow.sample(
                self._velocity_of(z if guided else z[:batch]),
                start,
                draw,
                num_steps=num_steps,
                guidance=weight if guided else None,
                scale_mean=scale_mean,
                scale_noise=scale_noise,
            )
            stats.decoder_seconds += watch.lap()
            stats.decoder_nfe += num_steps
        stats.total_seconds = stats.ar_seconds + stats.decoder_seconds
        return Generation(self.unpatchify(tokens.to(z.dtype)), None, stats)

    generate = latents_of(generate_with_stats)

    def _new_cache(self, batch: int) -> KVCache:
        return KVCache(len(self.encoder_blocks), batch, self.buffer_size + GROUPS * self.group)

    def _encode_next(
        self, latents: Tensor | None, condition: Tensor, done: int, cache: KVCache
    ) -> Tensor:
        """Context rows ``[B, L / 4, D]`` of the group after ``done`` ones, with positions.

        The first group has no image (None) and is encoded together with the buffer; a later one
        holds the image ``[b, C, h, w]``, for both halves of a guided batch.
        """
        following = slice(done, done + self.group)
        attn_mask = None
        if latents is None:
            x = self._encoder_input(condition, self.mask_token)
            attn_mask = block_causal_mask(self.buffer_size, self.group, self.group, x.device)
        else:
            tokens = self.group_tokens(latents)
            tokens = tokens.repeat(condition.shape[0] // max(tokens.shape[0], 1), 1, 1)
            positions = self.encoder_pos_embed_learned[:, self.buffer_size :][:, following]
            x = self.z_proj_ln(self.z_proj(tokens) + positions)
        blocks: Any = self.encoder_blocks
        for index, block in enumerate(blocks):
            x = block(x, attn_mask, cache=cache.layer(index))
        cache.advance(x.shape[1])
        return (
            self.encoder_norm(x[:, -self.group :]) + self.diffusion_pos_embed_learned[:, following]
        )


def _guidance_weights(cfg: float | Sequence[float]) -> list[float]:
    values: list[Any] = list(cfg) if isinstance(cfg, Sequence) else [cfg] * GROUPS
    if len(values) != GROUPS:
        raise ValueError(f"cfg must be a number or {GROUPS} of them, got {len(values)}")
    return [check_finite("cfg", value) for value in values]
