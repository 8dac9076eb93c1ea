"""NextStep-1 (arXiv 2508.10711): a language model whose image tokens come from a flow head."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from . import flow
from .causal_layers import CausalAttention, CausalLayer, GatedMlp, RMSNorm
from .diffusion import Noise
from .generation import (
    CFG_SCHEDULES,
    Generation,
    GenerationStats,
    Stopwatch,
    check_count,
    check_finite,
    noise_source,
)
from .head import AdaLNHead
from .kv_cache import StaticKVCache
from .layers import patchify
from .nextstep_config import NextStepConfig, config_from_checkpoint
from .rotary import RotaryEmbedding, position_table

TABLE_SIDE = 32  # of the fixed position table, whatever the size of the image
TOKEN_NORM_EPS = 1e-6
LAST_STEP_SIZE = 0.04
CONSTANTS = ("gen_pos_embed", "rotary_emb.inv_freq")  # computed here, stored by some checkpoints


class NextStep(nn.Module):
    """NextStep-1: prompt tokens in, image tokens out, one by one.

    Parameter names and shapes are the official checkpoints'. Rotary positions are plain column
    indices: left padding counts.

    Args:
        config: the fields of :class:`NextStepConfig`, which are those of a checkpoint's
            config.json; :meth:`config_of` reads one.
    """

    name: str = "nextstep_1"
    gen_pos_embed: Tensor

    def __init__(self, **config: Any) -> None:
        super().__init__()
        self.settings = settings = NextStepConfig(**config)
        self.config: dict[str, Any] = asdict(settings)
        self.width, self.token_channels = settings.hidden_size, settings.token_channels
        self.seq_len = (settings.latent_size // settings.latent_patch_size) ** 2
        width = settings.hidden_size
        self.embed_tokens = nn.Embedding(settings.vocab_size, width, settings.pad_token_id)
        self.layers = nn.ModuleList(
            self._layer(settings) for _ in range(settings.num_hidden_layers)
        )
        self.norm = RMSNorm(width, settings.rms_norm_eps)
        self.rotary_emb = RotaryEmbedding(settings.head_width, settings.rope_theta)
        self.lm_head = nn.Linear(width, settings.vocab_size, bias=False)
        self.image_in_projector = nn.Linear(self.token_channels, width)
        self.image_out_projector = nn.Linear(width, width)
        self._initialise()
        if settings.tie_word_embeddings:
            self.lm_head.weight = self.embed_tokens.weight
        self.image_head = nn.ModuleDict(
            {
                "net": AdaLNHead(
                    self.token_channels,
                    self.token_channels,
                    width,
                    settings.fm_head_dim,
                    settings.fm_head_layers,
                )
            }
        )
        self.register_buffer("gen_pos_embed", position_table(width, TABLE_SIDE)[None], False)
        self.register_load_state_dict_pre_hook(_drop_constants)

    @staticmethod
    def _layer(settings: NextStepConfig) -> CausalLayer:
        out_bias = settings.o_attention_bias
        attention = CausalAttention(
            settings.hidden_size,
            settings.num_attention_heads,
            settings.key_value_heads,
            settings.head_width,
            bias=settings.attention_bias,
            out_bias=settings.attention_bias if out_bias is None else out_bias,
        )
        mlp = GatedMlp(settings.hidden_size, settings.intermediate_size, settings.mlp_bias)
        return CausalLayer(attention, mlp, width=settings.hidden_size, eps=settings.rms_norm_eps)

    def _initialise(self) -> None:
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=self.settings.initializer_range)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)
        if self.settings.pad_token_id is not None:
            with torch.no_grad():
                self.embed_tokens.weight[self.settings.pad_token_id].zero_()

    @staticmethod
    def config_of(stored: Mapping[str, Any]) -> dict[str, Any]:
        """Constructor arguments from a checkpoint's config.json; ValueError if unsupported."""
        return config_from_checkpoint(stored)

    @staticmethod
    def parameters_of(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """An official state dict without the constants that some checkpoints store."""
        return {name: value for name, value in state.items() if name not in CONSTANTS}

    def patchify(self, latents: Tensor) -> Tensor:
        """Latents ``[B, c, h, w]`` to tokens ``[B, L, c p p]``."""
        return patchify(latents, self.settings.latent_patch_size)

    def unpatchify(self, tokens: Tensor, grid_size: tuple[int, int] | None = None) -> Tensor:
        """Tokens ``[B, gh gw, c p p]`` to latents ``[B, c, gh p, gw p]``; a square grid if None."""
        rows, columns = grid_size or (math.isqrt(tokens.shape[1]),) * 2
        if tokens.shape[1:] != (rows * columns, self.token_channels):
            raise ValueError(
                f"tokens must be [B, {rows} * {columns}, {self.token_channels}], "
                f"got shape {list(tokens.shape)}"
            )
        p = self.settings.latent_patch_size
        grid = tokens.reshape(len(tokens), rows, columns, -1, p, p).permute(0, 3, 1, 4, 2, 5)
        return grid.reshape(len(tokens), -1, rows * p, columns * p)

    def embed(self, input_ids: Tensor, latents: Tensor | None = None) -> Tensor:
        """Input embeddings ``[B, L, H]``.

        Args:
            input_ids: int ``[B, L]``.
            latents: ``[N, c, h, w]``, the images whose patches take the image placeholders' places
                in order.

        Raises:
            TypeError, ValueError: ids of a wrong dtype, shape or range, or not as many
                placeholders as patches.
        """
        self._check_ids(input_ids)
        embeds = self.embed_tokens(input_ids)
        if latents is None:
            return embeds
        patches = self.image_in_projector(self.patchify(latents)).flatten(0, 1)
        places = self._placeholders(input_ids)
        if int(places.sum()) != len(patches):
            raise ValueError(
                f"input_ids must hold one image placeholder per patch of latents, {len(patches)}, "
                f"got {int(places.sum())}"
            )
        return embeds.masked_scatter(places[..., None], patches.to(embeds.dtype))

    def new_cache(self, batch: int, max_length: int) -> StaticKVCache:
        """An empty cache for ``batch`` sequences of up to ``max_length`` positions.

        Raises:
            ValueError: longer than the context, ``max_position_embeddings``.
        """
        self._check_context(max_length)
        weight = self.embed_tokens.weight
        return StaticKVCache(
            len(self.layers),
            batch,
            self.settings.key_value_heads,
            max_length,
            self.settings.head_width,
            device=weight.device,
            dtype=weight.dtype,
        )

    def hidden(
        self,
        inputs_embeds: Tensor,
        attention_mask: Tensor | None = None,
        cache: StaticKVCache | None = None,
    ) -> Tensor:
        """Hidden states ``[B, L, H]`` after the final norm.

        Args:
            inputs_embeds: ``[B, L, H]``, the positions after those in the cache.
            attention_mask: ``[B, past + L]``, 1 = visible, 0 = padding; combines with causality.
                Rows that see nothing (padding on the left) are undefined but finite.
            cache: earlier positions; those of the inputs are added.

        Raises:
            ValueError: a shape does not fit, or the cache or the context is too short.
        """
        return self.hidden_with_entropy(inputs_embeds, attention_mask, cache)[0]

    def hidden_with_entropy(
        self,
        inputs_embeds: Tensor,
        attention_mask: Tensor | None = None,
        cache: StaticKVCache | None = None,
        *,
        layers: Iterable[int] = (),
    ) -> tuple[Tensor, dict[int, Tensor]]:
        """As :meth:`hidden`, and the entropy map ``[B, L]`` of each of ``layers``, in one pass.

        Entropies are those of the head-averaged attention map (Eq. 4 of arXiv 2603.28049),
        normalised to [0, 1], under the indices that were asked for; negative ones count from the
        last layer.
        """
        length = self._check_inputs(inputs_embeds, attention_mask, cache)
        wanted = {self._layer_index(index): index for index in layers}
        rotation = self.rotary_emb(0 if cache is None else cache.length, length)
        mask = None if attention_mask is None else attention_mask.bool()[:, None, None, :]
        x, entropies = inputs_embeds, {}
        for index, layer in enumerate(self.layers):
            kind = "map" if index in wanted else "none"
            x, entropy = layer(x, rotation, mask, cache, index, kind)
            if entropy is not None:
                entropies[wanted[index]] = entropy
        if cache is not None:
            cache.advance(length)
        return self.norm(x), entropies

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

    def generate(self, input_ids: Tensor, **options: Any) -> Tensor:
        """Latents ``[B, c, h, w]``; arguments as :meth:`generate_with_stats`."""
        return self.generate_with_stats(input_ids, **options).latents

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
            attention_mask: ``[B, L]``, 0 = padding, which is not predicted.

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
        text = ~image if attention_mask is None else ~image & attention_mask[:, 1:].bool()
        conditions = self.image_out_projector(states[image]).repeat(t.shape[0], 1)
        image_loss = flow.flow_matching_loss(
            lambda x, time: self.velocity(x, time, conditions),
            target.to(states.dtype).repeat(t.shape[0], 1),
            t.flatten(),
            noise.to(states.dtype).flatten(0, 1),
        )
        text_loss = F.cross_entropy(self.lm_head(states[text]).float(), following[text])
        weights = self.settings
        return weights.im_loss_weight * image_loss + weights.lm_loss_weight * text_loss

    def _placeholders(self, ids: Tensor) -> Tensor:
        placeholder = self.settings.image_placeholder_id
        if placeholder is None:
            raise ValueError("image_placeholder_id must be configured for images in the input")
        return torch.eq(ids, placeholder)

    def _layer_index(self, index: int) -> int:
        count = len(self.layers)
        if not -count <= index < count:
            raise ValueError(f"layers must lie in [{-count}, {count}), got {index}")
        return index % count

    def _check_ids(self, input_ids: Tensor) -> None:
        if not isinstance(input_ids, Tensor) or input_ids.dtype not in (torch.int64, torch.int32):
            got = getattr(input_ids, "dtype", type(input_ids).__name__)
            raise TypeError(f"input_ids must be an integer tensor, got {got}")
        if input_ids.dim() != 2:
            raise ValueError(f"input_ids must be [B, L], got shape {list(input_ids.shape)}")
        if input_ids.numel():
            low, high = int(input_ids.min()), int(input_ids.max())
            if low < 0 or high >= self.settings.vocab_size:
                raise ValueError(
                    f"input_ids must lie in [0, {self.settings.vocab_size}), got {low} to {high}"
                )

    def _check_inputs(
        self, embeds: Tensor, attention_mask: Tensor | None, cache: StaticKVCache | None
    ) -> int:
        if embeds.dim() != 3 or embeds.shape[2] != self.width:
            raise ValueError(
                f"inputs_embeds must be [B, L, {self.width}], got shape {list(embeds.shape)}"
            )
        batch, length = embeds.shape[:2]
        past = 0 if cache is None else cache.length
        self._check_context(past + length)
        if cache is not None:
            cache.check_room(batch, length)
        if attention_mask is not None and tuple(attention_mask.shape) != (batch, past + length):
            raise ValueError(
                f"attention_mask must be [{batch}, {past + length}], "
                f"got shape {list(attention_mask.shape)}"
            )
        return length

    def _check_context(self, length: int) -> None:
        limit = self.settings.max_position_embeddings
        if length > limit:
            raise ValueError(
                f"prompt and image of {length} positions exceed the context of {limit}: shorten "
                "the prompt"
            )

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


def _drop_constants(module: nn.Module, state: dict[str, Any], prefix: str, *unused: Any) -> None:
    for name in CONSTANTS:
        state.pop(prefix + name, None)
