"""The encoder that TransDiff and Drift-AR share: a class to a sequence of conditions."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .generation import class_condition
from .layers import LAYER_NORM_EPS, TransformerBlock, initialise_linears


def latent_side(img_size: int, vae_stride: int, patch_size: int) -> int:
    """Patches along a side of the latents; ValueError where they do not divide the image."""
    if patch_size < 1 or img_size < 1 or img_size % (vae_stride * patch_size):
        raise ValueError(
            "img_size must be a multiple of vae_stride * patch_size = "
            f"{vae_stride * patch_size}, got {img_size}"
        )
    return img_size // (vae_stride * patch_size)


class ConditionEncoder(nn.Module):
    """Transformer over a buffer of condition vectors and mask tokens; official parameter names.

    Args:
        seq_len: positions L behind the buffer.
        mask_tokens: learned tokens that fill positions: 1 for all, or one each.
        in_channels: width of the tokens that known positions hold.
        width, num_blocks, num_heads, mlp_ratio: the blocks.
        class_num: number of classes.
        buffer_size: leading positions that carry the condition.
        dropout: rate in the blocks' projections and MLPs, in training only.
    """

    def __init__(
        self,
        *,
        seq_len: int,
        mask_tokens: int,
        in_channels: int,
        width: int,
        num_blocks: int,
        num_heads: int,
        mlp_ratio: float,
        class_num: int,
        buffer_size: int,
        dropout: float,
    ) -> None:
        super().__init__()
        self.seq_len, self.buffer_size = seq_len, buffer_size
        self.width, self.num_classes = width, class_num
        self.class_emb = nn.Embedding(class_num, width)
        self.fake_latent = nn.Parameter(torch.zeros(1, width))
        self.mask_token = nn.Parameter(torch.zeros(1, mask_tokens, width))
        self.z_proj = nn.Linear(in_channels, width)
        self.z_proj_ln = nn.LayerNorm(width, eps=LAYER_NORM_EPS)
        self.encoder_pos_embed_learned = nn.Parameter(torch.zeros(1, buffer_size + seq_len, width))
        self.encoder_blocks = nn.ModuleList(
            TransformerBlock(width, num_heads, mlp_ratio=mlp_ratio, dropout=dropout)
            for _ in range(num_blocks)
        )
        self.encoder_norm = nn.LayerNorm(width, eps=LAYER_NORM_EPS)
        self.diffusion_pos_embed_learned = nn.Parameter(torch.zeros(1, seq_len, width))
        initialise_linears(self)
        for parameter in (
            self.class_emb.weight,
            self.fake_latent,
            self.mask_token,
            self.encoder_pos_embed_learned,
            self.diffusion_pos_embed_learned,
        ):
            nn.init.normal_(parameter, std=0.02)

    def condition(self, class_labels: Tensor) -> Tensor:
        """Condition vectors ``[B, D]`` of int labels ``[B]``; -1 is unconditional.

        Raises:
            TypeError, ValueError: labels of a wrong dtype, shape or range.
        """
        return class_condition(class_labels, self.class_emb, self.fake_latent)

    def _encoder_input(self, condition: Tensor, content: Tensor) -> Tensor:
        """Buffer of conditions ``[B, D]``, then content ``[B or 1, n, D]``, with positions."""
        if condition.dim() != 2 or condition.shape[1] != self.width:
            raise ValueError(
                f"condition must be [B, {self.width}], got shape {list(condition.shape)}"
            )
        batch = condition.shape[0]
        buffer = condition[:, None].expand(-1, self.buffer_size, -1)
        x = torch.cat([buffer, content.expand(batch, -1, -1)], dim=1)
        return self.z_proj_ln(x + self.encoder_pos_embed_learned[:, : x.shape[1]])

    def _blank_input(self, condition: Tensor) -> Tensor:
        """Encoder input in which every position holds the mask token."""
        return self._encoder_input(condition, self.mask_token.expand(-1, self.seq_len, -1))

    def _encoder_output(self, x: Tensor) -> Tensor:
        """Last block's output to conditions of the positions, ``[B, n, D]``, buffer cut."""
        return self.encoder_norm(x)[:, self.buffer_size :]
