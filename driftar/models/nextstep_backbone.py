"""The causal transformer of NextStep-1: text ids and image patches to hidden states."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn

from .causal_layers import CausalAttention, CausalLayer, GatedMlp, RMSNorm
from .kv_cache import KVCache
from .layers import patchify
from .nextstep_config import NextStepConfig, config_from_checkpoint
from .rotary import RotaryEmbedding, position_table

TABLE_SIDE = 32  # of the fixed position table, whatever the size of the image
CONSTANTS = ("gen_pos_embed", "rotary_emb.inv_freq")  # computed here, stored by some checkpoints


class NextStepBackbone(nn.Module):
    """Decoder-only transformer over prompt ids and projected image patches.

    Rotary positions are plain column indices: left padding counts.

    Args:
        config: the fields of :class:`NextStepConfig`, which are those of a checkpoint's
            config.json; :meth:`config_of` reads one.

    Attributes:
        gen_pos_embed: fixed 2D positions ``[1, 1024, H]`` of a 32x32 grid.
    """

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
        p, channels = self.settings.latent_patch_size, self.settings.latent_channels
        grid = tokens.unflatten(1, (rows, columns)).unflatten(3, (channels, p, p))
        return grid.permute(0, 3, 1, 4, 2, 5).flatten(4, 5).flatten(2, 3)

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

    def new_cache(self, batch: int, max_length: int) -> KVCache:
        """An empty cache for ``batch`` sequences of up to ``max_length`` positions.

        Raises:
            ValueError: longer than the context, ``max_position_embeddings``.
        """
        self._check_context(max_length)
        return KVCache(len(self.layers), batch, max_length)

    def hidden(
        self,
        inputs_embeds: Tensor,
        attention_mask: Tensor | None = None,
        cache: KVCache | None = None,
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
        cache: KVCache | None = None,
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
            seen = None if cache is None else cache.layer(index)
            x, entropy = layer(x, rotation, mask, seen, kind)
            if entropy is not None:
                entropies[wanted[index]] = entropy
        if cache is not None:
            cache.advance(length)
        return self.norm(x), entropies

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
        self, embeds: Tensor, attention_mask: Tensor | None, cache: KVCache | None
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


def _drop_constants(module: nn.Module, state: dict[str, Any], prefix: str, *unused: Any) -> None:
    for name in CONSTANTS:
        state.pop(prefix + name, None)
