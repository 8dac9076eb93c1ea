"""Arguments of the attention kernels: matrices, what hides keys, units, compile-time options."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
# In place of -inf once a maximum is subtracted: its exponential is 0, and so is 0 times it.
FAR_BELOW = tl.constexpr(-1.0e30)
NO_MASK = tl.constexpr(0)
BOOL_MASK = tl.constexpr(1)
FLOAT_MASK = tl.constexpr(2)
NO_ENTROPY = tl.constexpr(0)
HEAD_ENTROPY = tl.constexpr(1)
MAP_ENTROPY = tl.constexpr(2)


@dataclass(frozen=True, eq=False)
class Options:
    """What a kernel is compiled for; every field a ``tl.constexpr``.

    Every launch looks its kernel up by these, so they are compared by identity; the compiler, which
    keeps kernels on disk, goes by their text.

    Attributes:
        group: query heads per key head.
        width, value_width: head dimensions; block_width, block_value: padded.
        chunk: how much of a head dimension an inner product takes at a time; 0: all.
        rows, columns: of a tile.
        mask: NO_MASK, BOOL_MASK or FLOAT_MASK.
        lengths, offsets: whether these are tensors.
        entropy: NO_ENTROPY, HEAD_ENTROPY or MAP_ENTROPY.
        separate: whether the entropy leaves out keys that the softmax takes.
        negative: whether the scale is.
        precision: of products of fp32 numbers.
    """

    group: Any
    width: Any
    value_width: Any
    block_width: Any
    block_value: Any
    chunk: Any
    rows: Any
    columns: Any
    mask: Any
    lengths: Any
    offsets: Any
    causal: Any
    tree: Any
    entropy: Any
    separate: Any
    normalize: Any
    negative: Any
    precision: Any


class Matrix(NamedTuple):
    """``[B, heads, rows, columns]``: its memory and strides."""

    data: Any
    batch: Any
    head: Any
    row: Any
    column: Any


class Hiding(NamedTuple):
    """Tensors that hide keys from queries."""

    mask: Any  # Matrix [B, Hq, Lq, Lk]
    query_offsets: Any  # [B] int32
    key_lengths: Any  # [B] int32
    ancestors: Any  # [trees, Lq, words] int32
    tree_stride: Any
    words: Any


class Units(NamedTuple):
    """``score``: of a product, before a float mask is added; ``natural``: of what is exponentiated;
    ``exponent``: natural log2 e."""

    score: Any
    natural: Any
    exponent: Any


class Sizes(NamedTuple):
    """Of the whole problem; run-time numbers, so that nothing is compiled per length."""

    key_heads: Any
    queries: Any
    keys: Any
    offset: Any
    entropy_from: Any
