"""Named tuples that attention kernels work with.

Compilers that take a kernel into their own code copy the functions and constants that it uses, but
no classes: kernels get these by name, from :func:`structure`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton


@triton.constexpr_function
def structure(name):
    """The class of that name in this file."""
    from driftar_kernels.triton import structures

    return getattr(structures, name)


class Matrix(NamedTuple):
    """``[B, heads, rows, columns]``: its memory and strides."""

    data: Any
    batch: Any
    head: Any
    row: Any
    column: Any


class Hiding(NamedTuple):
    """Tensors that hide keys from queries; None where nothing of the kind does."""

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


class Results(NamedTuple):
    """What the forward pass writes, ``[B, Hq, Lq, (Dv)]``."""

    out: Any
    entropy: Any
    lse: Any
    max_score: Any
    entropy_lse: Any  # log-sum-exp over the entropy's keys
    entropy_cross: Any  # sum_j q_j log pi_j
    entropy_norm: Any  # factor of the normalised entropy


class Saved(NamedTuple):
    """Per row, from the forward pass and the gradients of its results: ``[B, Hq, Lq]``."""

    lse: Any
    entropy_lse: Any
    entropy_cross: Any
    entropy_weight: Any  # grad_entropy entropy_norm; [B, Lq] for "map"
    delta: Any  # <grad_out, out> - grad_lse; the query kernel writes it


class Sample(NamedTuple):
    """One problem of the batch: keys before ``length`` are visible unless something hides them, a
    tree's own lie between it and ``end``."""

    index: Any
    length: Any
    end: Any
    offset: Any


class Rows(NamedTuple):
    """The queries' side of a tile; every field ``[R]``."""

    position: Any
    head: Any
    there: Any
    at: Any  # index in [B, Hq, Lq]


class Block(NamedTuple):
    """Vectors ``[R, width]``, to be multiplied."""

    at: Any  # [R] pointers
    there: Any  # [R]
    column: Any  # stride
    tile: Any  # the vectors; ``there`` where products load them chunk by chunk


class Statistics(NamedTuple):
    """Of rows, each field ``[R]``: m, l = sum e and t = sum e (s - m) with
    e = exp2(exponent (s - m))."""

    maximum: Any
    total: Any
    moment: Any


class State(NamedTuple):
    """What a block of rows has seen so far."""

    visible: Any  # Statistics
    members: Any  # Statistics of the entropy's keys, where they differ
    support: Any  # [R] number of the entropy's keys
    out: Any  # [R, BLOCK_VALUE] values weighted with e


class RowGradients(NamedTuple):
    """As ``Saved``, of a block of rows."""

    lse: Any
    delta: Any
    entropy_lse: Any
    cross: Any
    weight: Any
