"""Drift-AR as published (arXiv 2603.28049), on TransDiff's encoder."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from .arguments import constructor_arguments
from .condition_encoder import ConditionEncoder, latent_side
from .drift_stage import DriftStage
from .layers import LAYER_NORM_EPS, TransformerBlock, patchify, unpatchify
from .stack import block_causal_mask, run_blocks


class DriftAR(ConditionEncoder, DriftStage):
    """Drift-AR with official parameter names: a class to features with their entropy to an image.

    Every encoder block but the one before the last has full attention. In that one the buffer sees
    the buffer only, and a position sees the buffer, itself and the positions before it; its
    attention to positions gives the entropy.

    Args:
        img_size: image height and width in pixels.
        vae_stride: pixels per latent cell (1 models pixels directly).
        patch_size: latent cells per token along a side.
        vae_embed_dim: latent channels.
        encoder_embed_dim, encoder_depth, encoder_num_heads: the encoder, of 2 depth blocks.
        decoder_embed_dim, decoder_depth, decoder_num_heads: the one-step decoder.
        draft_depth: blocks of the draft model, which has the encoder's width and heads.
        mlp_ratio: hidden width of the blocks' MLPs in units of the width.
        class_num: number of classes.
        buffer_size: leading positions that carry the condition.
        dropout: rate in the blocks' projections and MLPs, in training only.
        draft_eps: LayerNorm eps of the draft model.
        sigma_max, tau_sigma: the prior (Eq. 6).
        latent_scale: what latents were multiplied by before modelling; kept for pipelines.

    Raises:
        ValueError: sizes that do not fit each other.
    """

    name: str = "drift_ar"

    def __init__(
        self,
        *,
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
        draft_depth: int = 6,
        mlp_ratio: float = 4.0,
        class_num: int = 1000,
        buffer_size: int = 64,
        dropout: float = 0.1,
        draft_eps: float = LAYER_NORM_EPS,
        sigma_max: float = 0.5,
        tau_sigma: float = 2.0,
        latent_scale: float = 0.2325,
    ) -> None:
        config = constructor_arguments(locals())
        if encoder_depth < 1:
            raise ValueError(f"encoder_depth must be at least 1, got {encoder_depth}")
        channels = vae_embed_dim * patch_size**2
        super().__init__(
            seq_len=latent_side(img_size, vae_stride, patch_size) ** 2,
            mask_tokens=1,
            in_channels=channels,
            width=encoder_embed_dim,
            num_blocks=2 * encoder_depth,
            num_heads=encoder_num_heads,
            mlp_ratio=mlp_ratio,
            class_num=class_num,
            buffer_size=buffer_size,
            dropout=dropout,
        )
        self.config = config
        self.patch_size, self.token_channels = patch_size, channels
        self._build_stage(
            width=encoder_embed_dim,
            drift_width=decoder_embed_dim,
            drift_depth=decoder_depth,
            drift_num_heads=decoder_num_heads,
            draft_depth=draft_depth,
            draft_num_heads=encoder_num_heads,
            mlp_ratio=mlp_ratio,
            dropout=dropout,
            draft_eps=draft_eps,
            sigma_max=sigma_max,
            tau_sigma=tau_sigma,
        )

    def features(self, condition: Tensor) -> tuple[Tensor, Tensor]:
        """One AR pass.

        Args:
            condition: ``[B, D]``.

        Returns:
            z ``[B, L, D]`` and the normalised entropy of the head-averaged map ``[B, L]`` (Eq. 4),
            in [0, 1].
        """
        z, (entropy,) = self.features_with_entropies(condition, (-2,))
        return z, entropy

    def features_with_entropies(
        self, condition: Tensor, entropy_layers: Sequence[int]
    ) -> tuple[Tensor, list[Tensor]]:
        """z ``[B, L, D]`` and entropy maps ``[B, L]`` of chosen blocks, in the same pass.

        Args:
            entropy_layers: indices of the blocks, negative ones from the end; -2 gives Eq. 4, the
                other blocks' attention is not causal.
        """
        x, entropies = run_blocks(
            self.encoder_blocks,
            self._blank_input(condition),
            layer_masks={
                len(self.encoder_blocks) - 2: block_causal_mask(
                    self.buffer_size, self.seq_len, 1, condition.device
                )
            },
            entropy_layers=entropy_layers,
            entropy_from=self.buffer_size,
        )
        return self._encoder_output(x) + self.diffusion_pos_embed_learned, entropies

    def patchify(self, latents: Tensor) -> Tensor:
        """Latents ``[B, C, h, w]`` to tokens ``[B, L, C p p]``; ValueError when they do not fit."""
        tokens = patchify(latents, self.patch_size)
        if tokens.shape[1:] != (self.seq_len, self.token_channels):
            raise ValueError(
                f"latents must give tokens [B, {self.seq_len}, {self.token_channels}], "
                f"got {list(tokens.shape)} from {list(latents.shape)}"
            )
        return tokens

    def unpatchify(self, tokens: Tensor) -> Tensor:
        """Tokens ``[B, L, C p p]`` to latents ``[B, C, h, w]``."""
        return unpatchify(tokens, self.patch_size)

    @property
    def penultimate_block(self) -> TransformerBlock:
        """The encoder's block before the last."""
        block: Any = self.encoder_blocks[-2]
        return block

    @property
    def draft_source(self) -> tuple[list[TransformerBlock], nn.LayerNorm]:
        """The encoder's blocks and norm."""
        blocks: list[Any] = list(self.encoder_blocks)
        return blocks, self.encoder_norm
