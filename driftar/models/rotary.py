"""Positions: rotary embedding of queries and keys, and the fixed 2D table of image positions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

TABLE_PERIOD = 10000.0

Rotation = tuple[Tensor, Tensor]  # cosines and sines, fp32 [L, d / 2]


class RotaryEmbedding(nn.Module):
    """Rotary position embedding (arXiv 2104.09864), halves rotated as in Llama.

    Args:
        width: head width d, even.
        theta: base of the frequencies ``theta^(-2 i / d)``.
    """

    inv_freq: Tensor

    def __init__(self, width: int, theta: float) -> None:
        super().__init__()
        if width % 2:
            raise ValueError(f"head_dim must be even, got {width}")
        self.width, self.theta = width, theta
        self.register_buffer("inv_freq", self._frequencies(None), persistent=False)

    def _frequencies(self, device: torch.device | None) -> Tensor:
        exponent = torch.arange(0, self.width, 2, dtype=torch.float32, device=device) / self.width
        return 1.0 / self.theta**exponent

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        # A cast model keeps fp32 frequencies: bf16 ones put position 1000 off by whole turns.
        super()._apply(fn, recurse)
        self.inv_freq = self._frequencies(self.inv_freq.device)
        return self

    def forward(self, start: int, length: int) -> Rotation:
        """Cosines and sines ``[length, d / 2]`` of the positions from ``start`` on."""
        positions = torch.arange(start, start + length, device=self.inv_freq.device)
        angles = positions[:, None].float() * self.inv_freq
        return angles.cos(), angles.sin()


def rotate(x: Tensor, rotation: Rotation) -> Tensor:
    """``(x1, x2) -> (x1 cos - x2 sin, x2 cos + x1 sin)`` of x ``[..., L, d]``, in fp32."""
    cos, sin = rotation
    first, second = x.float().chunk(2, dim=-1)
    rotated = torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)
    return rotated.to(x.dtype)


def position_table(width: int, side: int) -> Tensor:
    """Sine and cosine features ``[side * side, width]`` of a square grid, row by row, fp32.

    The first half of the channels encodes the column, the second the row; each half is
    [sin | cos] at width / 4 frequencies.

    Raises:
        ValueError: the width is no multiple of 4.
    """
    if width % 4:
        raise ValueError(f"width must be a multiple of 4 for 2D positions, got {width}")
    exponent = torch.arange(width // 4, dtype=torch.float64) / (width // 4)
    frequencies = TABLE_PERIOD**-exponent
    angles = torch.arange(side, dtype=torch.float64)[:, None] * frequencies
    line = torch.cat([angles.sin(), angles.cos()], dim=1).float()
    columns, rows = line.repeat(side, 1), line.repeat_interleave(side, dim=0)
    return torch.cat([columns, rows], dim=1)
