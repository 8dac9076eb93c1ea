"""NextStep-1 (arXiv 2508.10711): a language model whose image tokens come from a flow head."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from . import flow
from .diffusion import Noise
from .generation import (
    CFG_SCHEDULES,
    Generation,
    GenerationStats,
    Stopwatch,
    check_count,
    check_finite,
    latents_of,
    noise_source,
)
from .head import AdaLNHead
from .nextstep_backbone import NextStepBackbone

TOKEN_NORM_EPS = 1e-6
LAST_STEP_SIZE = 0.04


class NextStep(NextStepBackbone):
    """NextStep-1: prompt tokens in, image tokens out, one by one.

    Parameter names and shapes are the official checkpoints'.

    Args:
        config: arguments of :class:`NextStepBackbone`.
    """

    name: str = "nextstep_1"

    def __init__(self, **config: Any) -> None:
        super().__init__(**config)
        self.image_head = nn.ModuleDict(
            {
                "net": AdaLNHead(
                    self.token_channels,
                    self.token_channels,
                    self.width,
                    self.settings.fm_head_dim,
                    self.settings.fm_head_layers,
                )
            }
        )

    def velocity(self, x: Tensor, t: Tensor, c: Tensor) -> Tensor:
        """The flow head: velocity ``[N, C]`` of tokens x ``[N, C]`` at times t ``[N]`` in [0, 1].

        Args:
            c: conditions ``[N, H]``: outputs of ``image_out_projector``.
        """
        return self.image_head["net"](x, t, c)

    @torch.no_grad()
    def sample_token(
        self,
        c: Tensor,
        *,
        cfg: float = 1.0,
        cfg_img: float = 1.0,
        num_steps: int = 20,
        shift: float = 1.0,
        noise_repeat: int = 1,
        last_step_size: float = LAST_STEP_SIZE,
        noise: Noise | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """One token ``[B, C]`` per row, by Euler-Maruyama steps of the guided flow.

        Args:
            c: ``[branches * B, H]``, outputs of ``image_out_projector``. One branch; with cfg > 1
                two, [conditional; unconditional]; with cfg_img > 1 as well three, [conditional;
                image only; unconditional].
            cfg, cfg_img: guidance weights of text and image, 1 = none.
            num_steps: evaluations of the flow head, at least 2.
            shift: above 1 spends more steps near the noise.
            noise_repeat: distinct noises per draw; they are tiled over the B rows, so that 1 gives
                every row the same noise, as published.
            last_step_size: length of the last, noiseless step.
            noise: ``noise(shape) -> Tensor``, asked ``num_steps`` times for ``[noise_repeat, C]``.
            generator: source of randomness; torch's default one if None.

        Raises:
            ValueError: an option out of range, or c or ``noise_repeat`` does not fit the batch.
        """
        self._check_sampling(cfg, cfg_img, num_steps, shift, noise_repeat)
        if not 0 < check_finite("last_step_size", last_step_size) < 1:
            raise ValueError(f"last_step_size must lie in (0, 1), got {last_step_size}")
        branches = flow.guidance_branches(cfg, cfg_img)
        if c.dim() != 2 or c.shape[1] != self.width or c.shape[0] % branches:
            raise ValueError(
                f"c must be [{branches} * B, {self.width}] for {branches} guidance branches, "
                f"got shape {list(c.shape)}"
            )
        rows = c.shape[0] // branches
        if rows % noise_repeat:
            raise ValueError(f"noise_repeat must divide the batch {rows}, got {noise_repeat}")
        sampled = flow.sample(
            lambda x, t: self.velocity(x.to(c.dtype), t, c),
            noise_source(noise, generator, c.device, torch.float32),
            rows=rows,
            channels=self.token_channels,
            noise_repeat=noise_repeat,
            cfg=cfg,
            cfg_img=cfg_img,
            num_steps=num_steps,
            shift=shift,
            last_step_size=last_step_size,
        )
        return sampled.to(c.dtype)

    @torch.no_grad()
    def generate_with_stats(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        *,
        latents: Tensor | None = None,
        grid_size: tuple[int, int] | None = None,
        cfg: float = 1.0,
        cfg_img: float = 1.0,
        cfg_schedule: str = "constant",
        num_steps: int = 20,
        shift: float = 1.0,
        num_images_per_caption: int = 1,
        use_norm: bool = False,
        entropy_layer: int | None = None,
        noise: Noise | None = None,
        generator: torch.Generator | None = None,
        progress: Callable[[], None] | None = None,
    ) -> Generation:
        """Sample images after prompts: one prefill, then a cached step per token, row by row.

        Args:
            input_ids: int ``[branches * B, P]``, left-padded prompts that end with the id ``boi``,
                the guidance branches along the batch as in :meth:`sample_token`.
            attention_mask: ``[branches * B, P]``, 0 = padding.
            latents: images that the prompts' placeholders stand for, see :meth:`embed`.
            grid_size: rows and columns of tokens; the square of ``latent_size`` if None.
            cfg, cfg_img: guidance weights of at least 1; cfg_img needs cfg > 1.
            cfg_schedule: "constant", or "linear": from the full weights at the first token towards
                1 at the last.
            num_steps, shift: see :meth:`sample_token`.
            num_images_per_caption: consecutive rows of one caption; they get distinct noises, which
                all captions share.
            use_norm: normalise every token over its channels (LayerNorm without parameters).
            entropy_layer: layer whose attention entropy is returned, at no extra pass.
            noise: replaces ``generator``; asked as in :meth:`sample_token`, token after token.
            generator: source of randomness; torch's default one if None.
            progress: called after every token.

        Returns:
            :class:`Generation`; its entropy ``[B, n]`` is that of the row that predicted each
            token, in the conditional branch.

        Raises:
            TypeError, ValueError: an argument of a wrong type, shape or range; prompt and image
                longer than the context.
        """
        self._check_sampling(cfg, cfg_img, num_steps, shift, num_images_per_caption)
        if cfg < 1 or cfg_img < 1 or (cfg_img > 1 and cfg == 1):
            raise ValueError(
                f"cfg and cfg_img must be at least 1, and cfg_img > 1 needs cfg > 1; "
                f"got {cfg} and {cfg_img}"
            )
        if cfg_schedule not in CFG_SCHEDULES:
            raise ValueError(f"cfg_schedule must be one of {CFG_SCHEDULES}, got {cfg_schedule!r}")
        grid_size = self._check_grid(grid_size)
        num_tokens = grid_size[0] * grid_size[1]
        embeds = self.embed(input_ids, latents)
        total, prompt = input_ids.shape
        branches = flow.guidance_branches(cfg, cfg_img)
        if total % branches:
            raise ValueError(
                f"input_ids must hold {branches} guidance branches of equal size, got {total} rows"
            )
        layers = () if entropy_layer is None else (entropy_layer,)
        # The last token is never an input.
        cache = self.new_cache(total, prompt + num_tokens - 1)
        mask = self._extended_mask(attention_mask, total, prompt, num_tokens - 1)
        draw = noise_source(noise, generator, embeds.device, torch.float32)
        watch, stats = Stopwatch(embeds.device), GenerationStats()
        tokens: list[Tensor] = []
        entropies: list[Tensor] = []
        for index in range(num_tokens):
            seen = None if mask is None else mask[:, : prompt + index]
            states, entropy = self.hidden_with_entropy(embeds, seen, cache, layers=layers)
            c = states[:, -1]
            if self.settings.use_gen_pos_embed:
                c = c + self.gen_pos_embed[:, index]
            entropies += [rows[: total // branches, -1] for rows in entropy.values()]
            stats.ar_seconds += watch.lap()
            share = (num_tokens - index) / num_tokens if cfg_schedule == "linear" else 1.0
            token = self.sample_token(
                self.image_out_projector(c),
                cfg=1 + (cfg - 1) * share,
                cfg_img=1 + (cfg_img - 1) * share,
                num_steps=num_steps,
                shift=shift,
                noise_repeat=num_images_per_caption,
                noise=draw,
            )
            if use_norm:
                token = F.layer_norm(token, token.shape[1:], eps=TOKEN_NORM_EPS)
            tokens.append(token)
            embeds = self.image_in_projector(token).repeat(branches, 1)[:, None]
            stats.decoder_nfe += num_steps
            stats.decoder_seconds += watch.lap()
            if progress is not None:
                progress()
        stats.total_seconds = stats.ar_seconds + stats.decoder_seconds
        images = self.unpatchify(torch.stack(tokens, 1), grid_size)
        return Generation(images, torch.stack(entropies, 1) if entropies else None, stats)

    generate = latents_of(generate_with_stats)

    def loss(
        self,
        input_ids: Tensor,
        latents: Tensor,
        t: Tensor,
        noise: Tensor,
        *,
        attention_mask: Tensor | None = None,
    ) -> Tensor:
        """Training loss: ``im_loss_weight`` * flow matching + ``lm_loss_weight`` * cross entropy.

        The hidden state before an image placeholder predicts its patch, through the projection
        that generation applies (the published training code leaves it out); the one before any
        other token predicts its id.

        Args:
            input_ids: int ``[B, L]`` with a placeholder for every patch.
            latents: images ``[N, c, h, w]`` with M patches in all.
            t: ``[R, M]`` in (0, 1), published as the sigmoid of a standard normal: every patch is
                used R times.
            noise: ``[R, M, C]``, standard normal.
            attention_mask: ``[B, L]``, 0 = padding, which neither predicts nor is predicted.

        Raises:
            TypeError, ValueError: an argument of a wrong type, shape or range.
        """
        target = self.patchify(latents).flatten(0, 1)
        count = len(target)
        if (
            t.dim() != 2
            or t.shape[1] != count
            or tuple(noise.shape) != (*t.shape, self.token_channels)
        ):
            raise ValueError(
                f"t must be [R, {count}] and noise [R, {count}, {self.token_channels}], "
                f"got {list(t.shape)} and {list(noise.shape)}"
            )
        states = self.hidden(self.embed(input_ids, latents), attention_mask)[:, :-1]
        following = input_ids[:, 1:]
        image = self._placeholders(following)
        if int(image.sum()) != count:
            raise ValueError("input_ids must not begin with an image placeholder")
        text = ~image
        if attention_mask is not None:
            real = attention_mask.bool()
            text = text & real[:, 1:] & real[:, :-1]
        conditions = self.image_out_projector(states[image]).repeat(t.shape[0], 1)
        image_loss = flow.flow_matching_loss(
            lambda x, time: self.velocity(x, time, conditions),
            target.to(states.dtype).repeat(t.shape[0], 1),
            t.flatten(),
            noise.to(states.dtype).flatten(0, 1),
        )
        logits = self.lm_head(states[text]).float()
        text_loss = F.cross_entropy(logits, following[text], reduction="sum")
        text_loss = text_loss / max(len(logits), 1)
        weights = self.settings
        return weights.im_loss_weight * image_loss + weights.lm_loss_weight * text_loss

    def _check_grid(self, grid_size: tuple[int, int] | None) -> tuple[int, int]:
        side = math.isqrt(self.seq_len)
        rows, columns = (side, side) if grid_size is None else grid_size
        count = check_count("grid_size", rows) * check_count("grid_size", columns)
        if self.settings.use_gen_pos_embed and count > self.gen_pos_embed.shape[1]:
            raise ValueError(
                f"grid_size must give at most {self.gen_pos_embed.shape[1]} tokens, the positions "
                f"of the table that use_gen_pos_embed adds; got {rows}x{columns}"
            )
        return rows, columns

    @staticmethod
    def _check_sampling(
        cfg: float, cfg_img: float, num_steps: int, shift: float, noise_repeat: int
    ) -> None:
        check_finite("cfg", cfg)
        check_finite("cfg_img", cfg_img)
        if check_finite("shift", shift) <= 0:
            raise ValueError(f"shift must be > 0, got {shift}")
        if check_count("num_steps", num_steps) < 2:
            raise ValueError(f"num_steps must be at least 2, got {num_steps}")
        check_count("noise_repeat", noise_repeat)

    @staticmethod
    def _extended_mask(
        attention_mask: Tensor | None, rows: int, prompt: int, further: int
    ) -> Tensor | None:
        if attention_mask is None:
            return None
        if tuple(attention_mask.shape) != (rows, prompt):
            raise ValueError(
                f"attention_mask must be [{rows}, {prompt}] as input_ids, "
                f"got shape {list(attention_mask.shape)}"
            )
        seen = attention_mask.bool()
        return torch.cat([seen, seen.new_ones(rows, further)], dim=1)
