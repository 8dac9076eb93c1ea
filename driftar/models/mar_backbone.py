"""The masked autoencoder of MAR (arXiv 2406.11838): known tokens to a condition per position."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .generation import class_condition
from .layers import LAYER_NORM_EPS, TransformerBlock, initialise_linears, patchify, unpatchify
from .stack import block_causal_mask, run_blocks


class MARBackbone(nn.Module):
    """Masked autoencoder of MAR: encoder over the known tokens, decoder over all positions.

    Args:
        img_size: image height and width in pixels.
        vae_stride: pixels per latent cell (1 models pixels directly).
        patch_size: latent cells per token along a side.
        vae_embed_dim: latent channels.
        encoder_embed_dim, encoder_depth, encoder_num_heads: the encoder.
        decoder_embed_dim, decoder_depth, decoder_num_heads: the decoder; equal width.
        mlp_ratio: hidden width of the blocks' MLPs in units of the width.
        class_num: number of classes.
        buffer_size: leading positions that carry the condition.
        dropout: rate in the blocks' projections and MLPs, in training only.
        latent_scale: what latents were multiplied by before modelling (0.2325 for KL-16); kept for
            pipelines.

    Raises:
        ValueError: sizes that do not fit each other.
    """

    patch_size: int
    buffer_size: int
    num_classes: int
    seq_len: int
    token_channels: int
    width: int

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
        mlp_ratio: float = 4.0,
        class_num: int = 1000,
        buffer_size: int = 64,
        dropout: float = 0.1,
        latent_scale: float = 0.2325,
    ) -> None:
        super().__init__()
        if img_size % (vae_stride * patch_size):
            raise ValueError(
                "img_size must be a multiple of vae_stride * patch_size = "
                f"{vae_stride * patch_size}, got {img_size}"
            )
        if encoder_embed_dim != decoder_embed_dim:
            raise ValueError(
                "decoder_embed_dim must equal encoder_embed_dim "
                f"{encoder_embed_dim}, got {decoder_embed_dim}"
            )
        self.config: dict[str, Any] = {
            "img_size": img_size,
            "vae_stride": vae_stride,
            "patch_size": patch_size,
            "vae_embed_dim": vae_embed_dim,
            "encoder_embed_dim": encoder_embed_dim,
            "encoder_depth": encoder_depth,
            "encoder_num_heads": encoder_num_heads,
            "decoder_embed_dim": decoder_embed_dim,
            "decoder_depth": decoder_depth,
            "decoder_num_heads": decoder_num_heads,
            "mlp_ratio": mlp_ratio,
            "class_num": class_num,
            "buffer_size": buffer_size,
            "dropout": dropout,
            "latent_scale": latent_scale,
        }
        width = encoder_embed_dim
        self.patch_size, self.buffer_size, self.num_classes = patch_size, buffer_size, class_num
        self.seq_len = (img_size // vae_stride // patch_size) ** 2
        self.token_channels = vae_embed_dim * patch_size**2
        self.width = width

        self.class_emb = nn.Embedding(class_num, width)
        self.fake_latent = nn.Parameter(torch.zeros(1, width))
        self.z_proj = nn.Linear(self.token_channels, width)
        self.z_proj_ln = nn.LayerNorm(width, eps=LAYER_NORM_EPS)
        total = buffer_size + self.seq_len
        self.encoder_pos_embed_learned = nn.Parameter(torch.zeros(1, total, width))
        self.encoder_blocks = nn.ModuleList(
            TransformerBlock(width, encoder_num_heads, mlp_ratio=mlp_ratio, dropout=dropout)
            for _ in range(encoder_depth)
        )
        self.encoder_norm = nn.LayerNorm(width, eps=LAYER_NORM_EPS)
        self.decoder_embed = nn.Linear(width, width)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, width))
        self.decoder_pos_embed_learned = nn.Parameter(torch.zeros(1, total, width))
        self.decoder_blocks = nn.ModuleList(
            TransformerBlock(width, decoder_num_heads, mlp_ratio=mlp_ratio, dropout=dropout)
            for _ in range(decoder_depth)
        )
        self.decoder_norm = nn.LayerNorm(width, eps=LAYER_NORM_EPS)
        self.diffusion_pos_embed_learned = nn.Parameter(torch.zeros(1, self.seq_len, width))
        self._initialise()

    def _initialise(self) -> None:
        initialise_linears(self)
        nn.init.normal_(self.class_emb.weight, std=0.02)
        for parameter in (
            self.fake_latent,
            self.mask_token,
            self.encoder_pos_embed_learned,
            self.decoder_pos_embed_learned,
            self.diffusion_pos_embed_learned,
        ):
            nn.init.normal_(parameter, std=0.02)

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

    def condition(self, class_labels: Tensor) -> Tensor:
        """Condition vectors ``[B, D]`` of labels ``[B]``; -1 is unconditional.

        Raises:
            TypeError, ValueError: labels of a wrong dtype, shape or range.
        """
        return class_condition(class_labels, self.class_emb, self.fake_latent)

    def encode(self, tokens: Tensor, mask: Tensor, condition: Tensor) -> Tensor:
        """Encoder outputs ``[B, buffer + unmasked, D]``.

        Args:
            tokens: ``[B, L, C]``; values at masked positions are not looked at.
            mask: ``[B, L]``, nonzero = masked; every row masks equally many positions.
            condition: ``[B, D]``.

        Raises:
            ValueError: a shape is wrong, or rows mask different numbers of positions.
        """
        known = ~self._check_mask(tokens, mask, condition)
        batch = tokens.shape[0]
        buffer = condition[:, None].expand(-1, self.buffer_size, -1)
        x = self.z_proj(tokens.to(self.z_proj.weight.dtype))
        x = torch.cat([buffer, x], dim=1) + self.encoder_pos_embed_learned
        x = self.z_proj_ln(x)
        count = int(known.sum()) // max(batch, 1)
        content = x[:, self.buffer_size :][known].reshape(batch, count, self.width)
        x = torch.cat([x[:, : self.buffer_size], content], dim=1)
        return self.encoder_norm(run_blocks(self.encoder_blocks, x)[0])

    def decoder_input(self, encoded: Tensor, mask: Tensor) -> Tensor:
        """Encoder outputs in place among mask tokens, with positions: ``[B, buffer + L, D]``."""
        x = self.decoder_embed(encoded)
        batch = x.shape[0]
        known = mask.new_zeros(batch, self.buffer_size, dtype=torch.bool)
        known = torch.cat([~known, ~mask.bool()], dim=1)
        filled = self.mask_token.to(x.dtype).expand(batch, known.shape[1], -1)
        filled = filled.masked_scatter(known[..., None], x)
        return filled + self.decoder_pos_embed_learned

    def decoder_output(self, x: Tensor) -> Tensor:
        """Conditions z ``[B, L, D]`` from the last block's output."""
        return self.decoder_norm(x)[:, self.buffer_size :] + self.diffusion_pos_embed_learned

    def features(self, tokens: Tensor, mask: Tensor, condition: Tensor) -> Tensor:
        """Condition z ``[B, L, D]`` of every position; arguments as :meth:`encode`."""
        return self.features_with_entropies(tokens, mask, condition, ())[0]

    def features_with_entropies(
        self, tokens: Tensor, mask: Tensor, condition: Tensor, entropy_layers: Sequence[int]
    ) -> tuple[Tensor, list[Tensor]]:
        """As :meth:`features`, and entropy maps ``[B, L]`` of decoder blocks, in the same pass.

        Args:
            entropy_layers: indices of the blocks; negative ones count from the end.
        """
        x, entropies = run_blocks(
            self.decoder_blocks,
            self.decoder_input(self.encode(tokens, mask, condition), mask),
            entropy_layers=entropy_layers,
            entropy_from=self.buffer_size,
        )
        return self.decoder_output(x), entropies

    @property
    def penultimate_block(self) -> TransformerBlock:
        """The block before the last: where Drift-AR takes its entropy and its feature map."""
        block: Any = self.decoder_blocks[self._penultimate]
        return block

    @property
    def _penultimate(self) -> int:
        if len(self.decoder_blocks) < 2:
            raise ValueError("decoder_depth must be at least 2 for a penultimate block, got 1")
        return len(self.decoder_blocks) - 2

    @property
    def draft_source(self) -> tuple[list[TransformerBlock], nn.LayerNorm]:
        """Blocks and norm that a draft model of z starts from."""
        blocks: list[Any] = list(self.decoder_blocks)
        return blocks, self.decoder_norm

    def entropy_features(self, condition: Tensor) -> tuple[Tensor, Tensor]:
        """One pass with everything masked, as Drift-AR takes its features.

        In the penultimate block the buffer sees the buffer only, and a position sees the buffer,
        itself and the positions before it; the entropy is that of its attention to positions.

        Args:
            condition: ``[B, D]``.

        Returns:
            z ``[B, L, D]`` and the normalised entropy of the head-averaged map ``[B, L]`` (Eq. 4),
            in [0, 1].
        """
        if condition.dim() != 2 or condition.shape[1] != self.width:
            raise ValueError(
                f"condition must be [B, {self.width}], got shape {list(condition.shape)}"
            )
        # The encoder sees the buffer only: nothing here depends on the content of a mask.
        buffer = condition[:, None].expand(-1, self.buffer_size, -1)
        x = self.z_proj_ln(buffer + self.encoder_pos_embed_learned[:, : self.buffer_size])
        x = self.decoder_embed(self.encoder_norm(run_blocks(self.encoder_blocks, x)[0]))
        masked = self.mask_token.to(x.dtype).expand(x.shape[0], self.seq_len, -1)
        layer = self._penultimate
        x, (entropy,) = run_blocks(
            self.decoder_blocks,
            torch.cat([x, masked], dim=1) + self.decoder_pos_embed_learned,
            layer_masks={
                layer: block_causal_mask(self.buffer_size, self.seq_len, 1, condition.device)
            },
            entropy_layers=(layer,),
            entropy_from=self.buffer_size,
        )
        return self.decoder_output(x), entropy

    def _check_mask(self, tokens: Tensor, mask: Tensor, condition: Tensor) -> Tensor:
        batch = tokens.shape[0]
        expected = {
            "tokens": (tokens, (batch, self.seq_len, self.token_channels)),
            "mask": (mask, (batch, self.seq_len)),
            "condition": (condition, (batch, self.width)),
        }
        for name, (value, shape) in expected.items():
            if tuple(value.shape) != shape:
                raise ValueError(f"{name} must be {list(shape)}, got shape {list(value.shape)}")
        masked = mask.bool()
        counts = masked.sum(1)
        if batch and bool((counts != counts[0]).any()):
            raise ValueError("mask must mask the same number of positions in every row")
        return masked
