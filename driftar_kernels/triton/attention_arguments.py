"""Compile-time options of the attention kernels."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import triton
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


@dataclass(frozen=True)
class Options:
    """What a kernel is compiled for; every field a ``tl.constexpr``.

    Launches pass them as text, which compilers can put into the code that they generate.

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


@triton.constexpr_function
def read_options(text):
    """The options that a launch passes as JSON."""
    from driftar_kernels.triton import attention_arguments

    return attention_arguments.parsed(text)


@lru_cache(maxsize=1024)
def parsed(text: str) -> Options:
    """:func:`read_options` of one text once: the interpreter asks in every program."""
    return Options(**{name: tl.constexpr(value) for name, value in json.loads(text).items()})
