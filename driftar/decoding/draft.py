"""The draft model of Drift-AR: a shallow causal transformer over the target's features."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from driftar.models.layers import LAYER_NORM_EPS, TransformerBlock, initialise_linears


class DraftModel(nn.Module):
    """Causal blocks, LayerNorm and a projection; output row r predicts the feature at r + 1.

    Args:
        width: feature width D.
        num_heads: attention heads.
        depth: number of blocks.
        mlp_ratio: hidden width of the MLPs in units of D.
        dropout: rate in training.
        eps: of the LayerNorms. (The published training script ends up with 1e-5 in ``norm`` by
            re-creating it with PyTorch's default.)

    Raises:
        ValueError: depth < 1.
    """

    def __init__(
        self,
        width: int,
        num_heads: int,
        depth: int,
        *,
        mlp_ratio: float = 4.0,
        dropout: float = 0.0,
        eps: float = LAYER_NORM_EPS,
    ) -> None:
        super().__init__()
        if depth < 1:
            raise ValueError(f"draft depth must be at least 1, got {depth}")
        self.blocks = nn.ModuleList(
            TransformerBlock(width, num_heads, mlp_ratio=mlp_ratio, dropout=dropout, eps=eps)
            for _ in range(depth)
        )
        self.norm = nn.LayerNorm(width, eps=eps)
        self.out_proj = nn.Linear(width, width)
        initialise_linears(self)

    def copy_from(self, blocks: Sequence[TransformerBlock], norm: nn.LayerNorm) -> None:
        """Start from the target's first blocks and norm; the output projection stays as it is.

        Raises:
            ValueError: the target has fewer blocks than the draft.
        """
        if len(blocks) < len(self.blocks):
            raise ValueError(
                f"blocks must hold at least the draft's {len(self.blocks)}, got {len(blocks)}"
            )
        for own, source in zip(self.blocks, blocks, strict=False):
            own.load_state_dict(source.state_dict())
        self.norm.load_state_dict(norm.state_dict())

    def forward(self, z: Tensor) -> Tensor:
        """Features ``[B, L, D]`` to predictions of the next one, ``[B, L, D]``."""
        for block in self.blocks:
            z = block(z, is_causal=True)
        return self.out_proj(self.norm(z))

    def with_entropy(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """As :meth:`forward`, and the entropy map ``[B, L]`` of the last block's attention."""
        for block in self.blocks[:-1]:
            z = block(z, is_causal=True)
        last: Any = self.blocks[-1]
        z, entropy = last.with_entropy(z, is_causal=True)
        return self.out_proj(self.norm(z)), entropy
