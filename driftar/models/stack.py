"""Stacks of transformer blocks: masks, and entropies of chosen layers at no extra pass."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn


def block_causal_mask(buffer: int, length: int, group: int, device: torch.device) -> Tensor:
    """Visibility, bool ``[buffer + length, buffer + length]``, of a buffer and groups after it.

    A position sees the buffer, the groups before its own, and all of its own group; the buffer sees
    itself. Groups of one position give plain causality behind a buffer.
    """
    position = torch.arange(buffer + length, device=device) - buffer
    index = (position.div(group, rounding_mode="floor") + 1).clamp(min=0)
    return index[:, None] >= index


def run_blocks(
    blocks: nn.ModuleList,
    x: Tensor,
    *,
    attn_mask: Tensor | None = None,
    layer_masks: Mapping[int, Tensor] | None = None,
    is_causal: bool = False,
    entropy_layers: Sequence[int] = (),
    entropy_from: int = 0,
) -> tuple[Tensor, list[Tensor]]:
    """Run x ``[B, L, D]`` through blocks, taking entropies of some of them on the way.

    Args:
        blocks: :class:`TransformerBlock`s.
        attn_mask, is_causal: of every block.
        layer_masks: masks of single blocks, by their index from the front.
        entropy_layers: blocks whose entropy is wanted; negative ones count from the end.
        entropy_from: first key that counts in the entropies.

    Returns:
        The output and, in the order of ``entropy_layers``, normalised entropies of the
        head-averaged maps, ``[B, L - entropy_from]`` each, of the rows from ``entropy_from`` on.

    Raises:
        ValueError: a layer that does not exist.
    """
    depth = len(blocks)
    for layer in entropy_layers:
        if not -depth <= layer < depth:
            raise ValueError(f"entropy_layers must lie in {-depth}..{depth - 1}, got {layer}")
    wanted = {layer % depth for layer in entropy_layers}
    found: dict[int, Tensor] = {}
    stack: Any = blocks
    for index, block in enumerate(stack):
        mask = attn_mask if layer_masks is None else layer_masks.get(index, attn_mask)
        if index in wanted:
            x, rows = block.with_entropy(x, mask, is_causal=is_causal, entropy_from=entropy_from)
            found[index] = rows[:, entropy_from:].clamp(0, 1)
        else:
            x = block(x, mask, is_causal)
    return x, [found[layer % depth] for layer in entropy_layers]
