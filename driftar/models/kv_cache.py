"""Keys and values of the positions a causal model has already seen."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


class KVCache:
    """Cache of all layers, with room for ``max_length`` positions, filled from the left.

    Attributes:
        batch, max_length: sequences, and positions of each that there is room for.
        length: positions filled; every pass through the model advances it.
    """

    def __init__(self, num_layers: int, batch: int, max_length: int) -> None:
        self.batch = batch
        self.max_length = max_length
        self.length = 0
        self._rooms: list[tuple[Tensor, Tensor] | None] = [None] * num_layers

    def layer(self, index: int) -> LayerCache:
        """What the attention of a layer works on."""
        return LayerCache(self, index)

    def extend(self, index: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """As :meth:`LayerCache.extend`. ``length`` moves by :meth:`advance`, once every layer has
        stored its part.
        """
        room = self._rooms[index]
        if room is None:  # now dtype, device and heads are known
            batch, heads, _, width = key.shape
            room = (
                key.new_empty(batch, heads, self.max_length, width),
                value.new_empty(batch, heads, self.max_length, value.shape[3]),
            )
            self._rooms[index] = room
        end = self.length + key.shape[2]
        for seen, new in zip(room, (key, value), strict=True):
            seen[:, :, self.length : end] = new
        return room[0][:, :, :end], room[1][:, :, :end]

    def seen(self, index: int) -> tuple[Tensor, Tensor]:
        """What a layer has stored, ``[B, heads, length, d]`` each; KeyError if nothing."""
        room = self._rooms[index]
        if room is None:
            raise KeyError(f"layer {index} has stored nothing")
        return room[0][:, :, : self.length], room[1][:, :, : self.length]

    def advance(self, count: int) -> None:
        """Count the positions that every layer has stored."""
        self.length += count

    def check_room(self, batch: int, count: int) -> None:
        """ValueError unless ``count`` further positions of ``batch`` rows fit."""
        if batch != self.batch:
            raise ValueError(f"cache holds {self.batch} rows, got a batch of {batch}")
        if self.length + count > self.max_length:
            raise ValueError(
                f"cache of {self.max_length} positions, {self.length} filled, has no room for "
                f"{count} more"
            )


@dataclass(frozen=True)
class LayerCache:
    """One layer's part of a :class:`KVCache`."""

    cache: KVCache
    index: int

    @property
    def length(self) -> int:
        """Positions seen before this pass."""
        return self.cache.length

    def extend(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Store ``[B, heads, n, d]`` each; views of all ``length + n`` positions."""
        return self.cache.extend(self.index, key, value)
