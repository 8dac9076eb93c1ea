"""Keys and values of the positions a causal model has already seen."""

from __future__ import annotations

import torch
from torch import Tensor


class StaticKVCache:
    """Cache of all layers, allocated once and filled from the left.

    Args:
        num_layers, batch, num_heads, max_length, width: layers, B, key heads, Lmax and d.
        device, dtype: of the entries.

    Attributes:
        length: positions filled; every pass through the model advances it.
        keys, values: ``[layers, B, heads, Lmax, d]``; entries from ``length`` on are undefined.
    """

    def __init__(
        self,
        num_layers: int,
        batch: int,
        num_heads: int,
        max_length: int,
        width: int,
        *,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        shape = (num_layers, batch, num_heads, max_length, width)
        self.keys = torch.empty(shape, device=device, dtype=dtype)
        self.values = torch.empty(shape, device=device, dtype=dtype)
        self.length = 0

    @property
    def max_length(self) -> int:
        """Positions there is room for."""
        return self.keys.shape[3]

    def append(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Store ``[B, heads, L, d]`` behind what is there; views of all ``length + L`` of a layer.

        ``length`` itself moves by :meth:`advance`, once every layer has stored its part.
        """
        end = self.length + key.shape[2]
        self.keys[layer, :, :, self.length : end] = key
        self.values[layer, :, :, self.length : end] = value
        return self.keys[layer, :, :, :end], self.values[layer, :, :, :end]

    def advance(self, count: int) -> None:
        """Count the positions that every layer has stored."""
        self.length += count

    def check_room(self, batch: int, count: int) -> None:
        """ValueError unless ``count`` further positions of ``batch`` rows fit."""
        if batch != self.keys.shape[1]:
            raise ValueError(f"cache holds {self.keys.shape[1]} rows, got a batch of {batch}")
        if self.length + count > self.max_length:
            raise ValueError(
                f"cache of {self.max_length} positions, {self.length} filled, has no room for "
                f"{count} more"
            )
