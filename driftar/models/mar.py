"""MAR (arXiv 2406.11838): masked autoregression with a per-token diffusion head."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from . import diffusion
from .generation import (
    CFG_SCHEDULES,
    Generation,
    GenerationStats,
    Stopwatch,
    check_count,
    check_finite,
    latents_of,
    noise_source,
    sampling_dtype,
)
from .head import AdaLNHead
from .mar_backbone import MARBackbone


class MAR(MARBackbone):
    """MAR with its diffusion head; parameter names and shapes are the official checkpoints'.

    Args:
        diffloss_d, diffloss_w: residual blocks and width of the head.
        clip_denoised: bound on the sampler's predicted clean tokens, for pixels of a known range;
            None as published for latents.
        backbone: arguments of :class:`MARBackbone`.
    """

    name: str = "mar"

    def __init__(
        self,
        *,
        diffloss_d: int = 3,
        diffloss_w: int = 1024,
        clip_denoised: float | None = None,
        **backbone: Any,
    ) -> None:
        super().__init__(**backbone)
        self.config |= {
            "diffloss_d": diffloss_d,
            "diffloss_w": diffloss_w,
            "clip_denoised": clip_denoised,
        }
        self.clip_denoised = clip_denoised
        self.diffloss = nn.ModuleDict(
            {
                "net": AdaLNHead(
                    self.token_channels,
                    2 * self.token_channels,
                    self.width,
                    diffloss_w,
                    diffloss_d,
                )
            }
        )
        self._training_schedule = diffusion.DiffusionSchedule.build()

    def head(self, x: Tensor, t: Tensor, z: Tensor) -> Tensor:
        """Noise and variance ``[N, 2 C]`` of tokens ``[N, C]`` at training steps t ``[N]``."""
        return self.diffloss["net"](x, t, z)

    def loss(
        self, tokens: Tensor, mask: Tensor, condition: Tensor, t: Tensor, noise: Tensor
    ) -> Tensor:
        """Diffusion loss, mean over the masked positions (taken row by row, M in all).

        Args:
            tokens, mask, condition: as :meth:`encode`.
            t: int64 ``[R, M]`` in 0..999: every masked token is used R times.
            noise: ``[R, M, C]``.

        Raises:
            ValueError: a shape is wrong or nothing is masked.
        """
        masked = mask.bool()
        count = int(masked.sum())
        if count == 0:
            raise ValueError("mask must mask at least one position")
        if (
            t.dim() != 2
            or t.shape[1] != count
            or tuple(noise.shape) != (*t.shape, tokens.shape[-1])
        ):
            raise ValueError(
                f"t must be [R, {count}] and noise [R, {count}, {tokens.shape[-1]}], "
                f"got {list(t.shape)} and {list(noise.shape)}"
            )
        z = self.features(tokens, mask, condition)[masked].repeat(t.shape[0], 1)
        target = tokens[masked].repeat(t.shape[0], 1)
        squared, variational = diffusion.training_losses(
            self._training_schedule,
            lambda x, steps: self.head(x, steps, z),
            target,
            t.flatten(),
            noise.flatten(0, 1),
        )
        return (squared + variational).mean()

    @torch.no_grad()
    def generate_with_stats(
        self,
        class_labels: Tensor,
        *,
        num_iter: int = 64,
        cfg: float = 1.0,
        cfg_schedule: str = "linear",
        temperature: float = 1.0,
        num_sampling_steps: str = "100",
        orders: Tensor | None = None,
        noise: diffusion.Noise | None = None,
        generator: torch.Generator | None = None,
    ) -> Generation:
        """Sample images by revealing tokens in a random order, each through the diffusion sampler.

        Args:
            class_labels: int ``[B]``, -1 = unconditional.
            num_iter: autoregressive steps.
            cfg: guidance weight; 1 is unguided.
            cfg_schedule: "linear" grows the weight with the share of revealed tokens; "constant".
            temperature: factor of the sampler's noise.
            num_sampling_steps: kept diffusion steps, see :func:`diffusion.space_timesteps`.
            orders: int ``[B, L]``, a permutation per image; positions are revealed from its end.
                Drawn from ``generator`` by default.
            noise: ``noise(shape) -> Tensor``, replaces the draws from ``generator``.
            generator: source of randomness; torch's default one if None.

        Returns:
            :class:`Generation` without entropy.

        Raises:
            TypeError, ValueError: an argument of a wrong type, shape or range.
        """
        check_count("num_iter", num_iter)
        check_finite("cfg", cfg)
        if check_finite("temperature", temperature) < 0:
            raise ValueError(f"temperature must be >= 0, got {temperature}")
        if cfg_schedule not in CFG_SCHEDULES:
            raise ValueError(f"cfg_schedule must be one of {CFG_SCHEDULES}, got {cfg_schedule!r}")
        schedule = diffusion.DiffusionSchedule.build(num_sampling_steps)
        device, dtype = self.fake_latent.device, sampling_dtype(self.fake_latent.dtype)
        watch, stats = Stopwatch(device), GenerationStats()
        condition = self.condition(class_labels)
        batch, length = condition.shape[0], self.seq_len
        if cfg != 1.0:
            condition = torch.cat([condition, self.fake_latent.expand(batch, -1)])
        orders = self._orders(orders, batch, generator).to(device)
        draw = noise_source(noise, generator, device, dtype)
        tokens = torch.zeros(batch, length, self.token_channels, device=device, dtype=dtype)
        mask = torch.ones(batch, length, device=device, dtype=torch.bool)
        masked = length
        for step in range(num_iter):
            branches = 1 if cfg == 1.0 else 2
            z = self.features(tokens.repeat(branches, 1, 1), mask.repeat(branches, 1), condition)
            stats.ar_seconds += watch.lap()
            last = step == num_iter - 1
            planned = math.floor(length * math.cos(math.pi / 2 * (step + 1) / num_iter))
            remaining = max(1, min(masked - 1, planned))
            still_masked = torch.zeros_like(mask).scatter_(1, orders[:, :remaining], True)
            chosen = mask if last else mask & ~still_masked
            weight = 1 + (cfg - 1) * (length - remaining) / length
            rows = batch * (masked if last else masked - remaining)
            sampled = diffusion.sample(
                schedule,
                partial(self.head, z=z[chosen.repeat(branches, 1)]),
                draw,
                rows=rows,
                channels=self.token_channels,
                guidance=None
                if cfg == 1.0
                else (weight if cfg_schedule == "linear" else float(cfg)),
                temperature=temperature,
                clip=self.clip_denoised,
            )
            tokens = tokens.masked_scatter(chosen[..., None], sampled)
            mask, masked = still_masked, remaining
            stats.decoder_nfe += len(schedule) if rows else 0
            stats.decoder_seconds += watch.lap()
        stats.total_seconds = stats.ar_seconds + stats.decoder_seconds
        latents = self.unpatchify(tokens).to(self.fake_latent.dtype)
        return Generation(latents, None, stats)

    generate = latents_of(generate_with_stats)

    def _orders(
        self, orders: Tensor | None, batch: int, generator: torch.Generator | None
    ) -> Tensor:
        if orders is None:
            source = "cpu" if generator is None else generator.device
            return torch.rand(batch, self.seq_len, generator=generator, device=source).argsort(1)
        if tuple(orders.shape) != (batch, self.seq_len):
            raise ValueError(
                f"orders must be [{batch}, {self.seq_len}], got shape {list(orders.shape)}"
            )
        expected = torch.arange(self.seq_len, device=orders.device)
        if bool((orders.sort(1).values != expected).any()):
            raise ValueError("orders must hold a permutation of the positions in every row")
        return orders.long()
