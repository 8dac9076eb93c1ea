"""What the attention kernels share: rows, visibility, one tile of scores.

A program's rows are query positions times the query heads of one key head, position-major: row r is
position r // group of head r % group. Keys are then read once per group, and grouped heads add up
their key gradients without atomics. The kernels of "map" take one head at a time (group 1).

Scores are kept in raw units: `raw = sign(scale) <q, k>`, so that the largest raw score is the
largest score, or natural ones where a float mask is added; `unit` is the natural size of one. The
maximum is subtracted before scaling, so that exp2(0) is exact however large the scores are.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .attention_arguments import BOOL_MASK, FLOAT_MASK, NO_MASK
from .elementary import dot
from .structures import structure


@triton.jit
def run_time_sizes(key_heads, queries, keys, offset, entropy_from):
    """Sizes, as tensors also where a compiler takes a size of 1 for a constant."""
    return structure("Sizes")(
        tl.cast(key_heads, tl.int32),
        tl.cast(queries, tl.int32),
        tl.cast(keys, tl.int32),
        tl.cast(offset, tl.int32),
        tl.cast(entropy_from, tl.int32),
    )


@triton.jit
def fp32_units(score, natural, exponent):
    """Units; compilers pass fp64, to which a tile of fp32 would be promoted."""
    return structure("Units")(
        tl.cast(score, tl.float32), tl.cast(natural, tl.float32), tl.cast(exponent, tl.float32)
    )


@triton.jit
def visible_keys(index, hiding, sizes, OPTIONS: tl.constexpr):
    """(length, end, offset) of a Sample, which the caller makes of them and the index: what comes
    out of a call that is given tensors must not reach the address of a store, or compilers take
    these tensors for written."""
    length = sizes.keys
    if OPTIONS.lengths:
        length = tl.load(hiding.key_lengths + index)
    elif OPTIONS.tree:
        length = sizes.keys - sizes.queries
    offset = sizes.offset
    if OPTIONS.offsets:
        offset = tl.load(hiding.query_offsets + index)
    end = length
    if OPTIONS.tree:
        end = length + sizes.queries
    return length, end, offset


@triton.jit
def locate_rows(row, first_head, index, sizes, GROUP: tl.constexpr, OPTIONS: tl.constexpr):
    """Packed rows of the heads from ``first_head`` on, in the problem ``index``."""
    there = row < sizes.queries * GROUP
    position = row // GROUP
    head = (first_head + row % GROUP).to(tl.int64)
    at = (index * sizes.key_heads * OPTIONS.group + head) * sizes.queries + position
    return structure("Rows")(position, head, there, at)


@triton.jit
def row_bounds(rows, sample, OPTIONS: tl.constexpr):
    """The first key that each row cannot see by its position, which never decreases along them."""
    bound = rows.position * 0 + sample.length
    if OPTIONS.causal:
        bound = tl.minimum(bound, tl.maximum(rows.position + sample.offset + 1, 0))
    if OPTIONS.tree:
        bound = bound + rows.position + 1
    return tl.where(rows.there, bound, 0)


@triton.jit
def seen_by_all(first_position, sample, OPTIONS: tl.constexpr):
    """Keys before this one are visible to every position from ``first_position`` on, unless a mask
    hides them."""
    end = sample.length
    if OPTIONS.causal:
        end = tl.minimum(end, tl.maximum(first_position + sample.offset + 1, 0))
    return end


@triton.jit
def rows_that_see(start, sample, sizes, GROUP: tl.constexpr, OPTIONS: tl.constexpr):
    """Packed rows [begin, full) may see some of a tile's keys from ``start`` on, and [full, end)
    all of them."""
    rows = sizes.queries * GROUP
    begin = 0
    full = 0
    if OPTIONS.causal:
        begin = tl.minimum(tl.maximum(start - sample.offset, 0), sizes.queries) * GROUP
        last = start + OPTIONS.columns - 1
        full = tl.minimum(tl.maximum(last - sample.offset, 0), sizes.queries) * GROUP
    if OPTIONS.tree:
        begin = tl.minimum(tl.maximum(start - sample.length, 0), sizes.queries) * GROUP
    begin = tl.where(start < sample.end, begin // OPTIONS.rows * OPTIONS.rows, rows)
    whole = start + OPTIONS.columns <= sample.length
    full = tl.where(whole, tl.cdiv(full, OPTIONS.rows) * OPTIONS.rows, rows)
    return begin, tl.minimum(tl.maximum(begin, full), rows), rows


@triton.jit
def row_pointers(matrix, sample, head, row):
    start = sample * matrix.batch + tl.cast(head, tl.int64) * matrix.head
    return matrix.data + start + row.to(tl.int64) * matrix.row


@triton.jit
def load_tile(at, there, stride, first, WIDTH: tl.constexpr, COUNT: tl.constexpr):
    """Columns [first, first + COUNT) of rows: [R, COUNT]; zeros where not ``there`` and beyond
    WIDTH."""
    column = first + tl.arange(0, COUNT)
    inside = there[:, None]
    if WIDTH % COUNT != 0 or WIDTH == 0:
        inside = inside & (column < WIDTH)[None, :]
    return tl.load(at[:, None] + column.to(tl.int64)[None, :] * stride, mask=inside, other=0.0)


@triton.jit
def load_block(matrix, sample, head, row, there, OF_VALUES: tl.constexpr, OPTIONS: tl.constexpr):
    """Vectors as wide as values, or as queries and keys."""
    at = row_pointers(matrix, sample, head, row)
    tile = there
    if OPTIONS.chunk == 0:
        if OF_VALUES:
            tile = load_tile(at, there, matrix.column, 0, OPTIONS.value_width, OPTIONS.block_value)
        else:
            tile = load_tile(at, there, matrix.column, 0, OPTIONS.width, OPTIONS.block_width)
    return structure("Block")(at, there, matrix.column, tile)


@triton.jit
def whole(block, WIDTH: tl.constexpr, PADDED: tl.constexpr, CHUNK: tl.constexpr):
    """All of a block's vectors, [R, PADDED]."""
    tile = block.tile
    if CHUNK != 0:
        tile = load_tile(block.at, block.there, block.column, 0, WIDTH, PADDED)
    return tile


@triton.jit
def inner_products(a, b, WIDTH: tl.constexpr, CHUNK: tl.constexpr, PRECISION: tl.constexpr):
    """a b^T. Products without matrix units hold their operands in registers: by chunks they fit."""
    if CHUNK == 0:
        result = dot(a.tile, tl.trans(b.tile), None, PRECISION)
    else:
        result = tl.zeros([a.there.shape[0], b.there.shape[0]], tl.float32)
        for first in range(0, WIDTH, CHUNK):
            left = load_tile(a.at, a.there, a.column, first, WIDTH, CHUNK)
            right = load_tile(b.at, b.there, b.column, first, WIDTH, CHUNK)
            result = dot(left, tl.trans(right), result, PRECISION)
    return result


@triton.jit
def score_tile(
    queries,  # Block
    keys,  # Block
    rows,
    column,  # [C]
    sample,
    hiding,
    units,
    CHECKED: tl.constexpr,  # whether some query may not see some key by its position
    TRANSPOSED: tl.constexpr,  # [C, R] rather than [R, C]
    OPTIONS: tl.constexpr,
):
    """Scores, -inf where hidden. Hidden ones are selected to -inf, never added to, so that NaN in a
    hidden key has no effect."""
    first, second = queries, keys
    if TRANSPOSED:
        first, second = keys, queries
    scores = inner_products(first, second, OPTIONS.width, OPTIONS.chunk, OPTIONS.precision)
    if OPTIONS.negative:
        scores = -scores
    if CHECKED or OPTIONS.mask != NO_MASK:
        key = of_keys(column, TRANSPOSED)
        visible = key < of_rows(row_bounds(rows, sample, OPTIONS), TRANSPOSED)
        if OPTIONS.tree and CHECKED:
            node = key - sample.length
            at = hiding.ancestors + sample.index * hiding.tree_stride + rows.position * hiding.words
            word = of_rows(at, TRANSPOSED) + (node >> 5)
            word = tl.load(word, mask=visible & (node >= 0), other=0)
            visible = visible & ((node < 0) | (((word >> (node & 31)) & 1) != 0))
        if OPTIONS.mask != NO_MASK:
            at = row_pointers(hiding.mask, sample.index, rows.head, rows.position)
            at = of_rows(at, TRANSPOSED) + key.to(tl.int64) * hiding.mask.column
        if OPTIONS.mask == BOOL_MASK:
            visible = visible & (tl.load(at, mask=visible, other=0) != 0)
        if OPTIONS.mask == FLOAT_MASK:
            bias = tl.load(at, mask=visible, other=float("-inf")).to(tl.float32)
            visible = visible & (bias != float("-inf"))
            scores = scores * units.score + bias
        scores = tl.where(visible, scores, float("-inf"))
    return scores


@triton.jit
def of_rows(x, TRANSPOSED: tl.constexpr):
    """One number per query, beside a tile."""
    return tl.expand_dims(x, 0 if TRANSPOSED else 1)


@triton.jit
def of_keys(x, TRANSPOSED: tl.constexpr):
    """One number per key, beside a tile."""
    return tl.expand_dims(x, 1 if TRANSPOSED else 0)


@triton.jit
def load_lse(at, there):
    """Log-sum-exps with +inf for rows that see nothing, so that exp(s - lse) is 0 there."""
    lse = tl.load(at, mask=there, other=float("-inf"))
    return tl.where(lse == float("-inf"), float("inf"), lse)
