"""What the attention kernels share: rows, visibility, one tile of scores, online statistics.

A program's rows are query positions times the query heads of one key head, position-major: row r is
position r // GROUP of head r % GROUP. Keys are then read once per group, and grouped heads add up
their key gradients without atomics.

Scores are kept in raw units: `raw = sign(scale) <q, k>`, so that the largest raw score is the
largest score, or natural ones where a float mask is added; `unit` is the natural size of one. The
maximum is subtracted before scaling, so that exp2(0) is exact however large the scores are.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .elementary import dot, narrow

LOG2E = tl.constexpr(1.4426950408889634)
# In place of -inf once a maximum is subtracted: its exponential is 0, and so is 0 times it.
FAR_BELOW = tl.constexpr(-1.0e30)
NO_MASK = tl.constexpr(0)
BOOL_MASK = tl.constexpr(1)
FLOAT_MASK = tl.constexpr(2)
NO_ENTROPY = tl.constexpr(0)
HEAD_ENTROPY = tl.constexpr(1)
MAP_ENTROPY = tl.constexpr(2)


@triton.jit
def load_rows(
    base, row, there, row_stride, column_stride, WIDTH: tl.constexpr, BLOCK: tl.constexpr
):
    """Rows [R, BLOCK] of a matrix; zeros where not ``there`` and in the columns that pad."""
    column = tl.arange(0, BLOCK)
    at = (
        base + row.to(tl.int64)[:, None] * row_stride + column.to(tl.int64)[None, :] * column_stride
    )
    inside = there[:, None]
    if WIDTH != BLOCK:
        inside = inside & (column < WIDTH)[None, :]
    return tl.load(at, mask=inside, other=0.0)


@triton.jit
def load_packed(
    base,  # [GROUP heads, Lq, WIDTH]
    row,  # [R] packed rows
    there,
    head_stride,
    row_stride,
    column_stride,
    GROUP: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """As :func:`load_rows` for packed rows."""
    column = tl.arange(0, BLOCK)
    start = (row // GROUP).to(tl.int64) * row_stride + (row % GROUP).to(tl.int64) * head_stride
    at = base + start[:, None] + column.to(tl.int64)[None, :] * column_stride
    inside = there[:, None]
    if WIDTH != BLOCK:
        inside = inside & (column < WIDTH)[None, :]
    return tl.load(at, mask=inside, other=0.0)


@triton.jit
def signed(queries, NEGATIVE: tl.constexpr):
    """Queries with the sign of the scale."""
    if NEGATIVE:
        queries = narrow(-queries.to(tl.float32), queries.dtype)
    return queries


@triton.jit
def key_bound(position, there, length, offset, CAUSAL: tl.constexpr, TREE: tl.constexpr):
    """First key that each query position cannot see, whatever else hides keys before it; 0 where
    not ``there``. It never decreases along the positions."""
    bound = position * 0 + length
    if CAUSAL:
        bound = tl.minimum(bound, tl.maximum(position + offset + 1, 0))
    if TREE:
        bound = bound + position + 1
    return tl.where(there, bound, 0)


@triton.jit
def score_tile(
    a,
    b,
    column,  # key indices, along the keys' axis of the tile
    bound,  # of key_bound, along the queries' axis
    mask_rows,  # pointers to the queries' rows of the mask, likewise
    mask_column,
    ancestor_rows,  # pointers to the queries' rows of ancestor words, likewise
    length,
    score_scale,
    MASK: tl.constexpr,
    TREE: tl.constexpr,
    CHECKED: tl.constexpr,  # whether some query may not see some key by its position
    PRECISION: tl.constexpr,
):
    """Scores a b^T, -inf where hidden. (a, b) is (queries, keys) or (keys, queries); hidden scores
    are selected to -inf, never added to, so that NaN in a hidden key has no effect."""
    scores = dot(a, tl.trans(b), None, PRECISION)
    if CHECKED or MASK != NO_MASK:
        visible = column < bound
        if TREE and CHECKED:
            node = column - length
            word = tl.load(ancestor_rows + (node >> 5), mask=visible & (node >= 0), other=0)
            visible = visible & ((node < 0) | (((word >> (node & 31)) & 1) != 0))
        if MASK == BOOL_MASK:
            at = mask_rows + column.to(tl.int64) * mask_column
            visible = visible & (tl.load(at, mask=visible, other=0) != 0)
        if MASK == FLOAT_MASK:
            at = mask_rows + column.to(tl.int64) * mask_column
            bias = tl.load(at, mask=visible, other=float("-inf")).to(tl.float32)
            visible = visible & (bias != float("-inf"))
            scores = scores * score_scale + bias
        scores = tl.where(visible, scores, float("-inf"))
    return scores


@triton.jit
def raise_statistics(maximum, total, moment, scores, exponent):
    """Absorbs a tile [R, C] of scores into the rows' maximum m, l = sum e, t = sum e (s - m) with
    e = exp2(exponent (s - m)). Returns them, the tile of e and the factor by which sums weighted
    with earlier e must shrink.

    A row's maximum stays -inf until it sees a key; NaN scores reach the sums, not the maximum.
    """
    higher = tl.maximum(maximum, tl.max(scores, 1))
    shift = tl.where(higher == float("-inf"), 0.0, higher)
    drop = tl.where(maximum == float("-inf"), 0.0, tl.maximum(maximum - shift, FAR_BELOW))
    factor = tl.exp2(drop * exponent)
    below = tl.maximum(scores - shift[:, None], FAR_BELOW, propagate_nan=tl.PropagateNan.ALL)
    exponential = tl.exp2(below * exponent)
    moment = factor * (moment + drop * total) + tl.sum(exponential * below, 1)
    total = factor * total + tl.sum(exponential, 1)
    return higher, total, moment, exponential, factor


@triton.jit
def log_sum_exp(maximum, total, unit):
    """Natural log-sum-exp; -inf for a row that saw nothing."""
    seen = total != 0.0
    return tl.where(seen, maximum * unit + tl.log(tl.where(seen, total, 1.0)), float("-inf"))


@triton.jit
def average_logarithm(
    query,  # [Hq, Lq, WIDTH] of this sample
    key,  # [Hkv, Lk, WIDTH]
    mask,  # [Hq, Lq, Lk]
    ancestors,  # [Lq, words]
    entropy_lse,  # [Hq, Lq]
    position,  # [R] query positions
    bound,  # [R]
    column,  # [C] keys
    key_end,
    length,
    query_length,
    query_heads,
    query_head,
    query_row,
    query_column,
    key_head,
    key_row,
    key_column,
    mask_head,
    mask_row,
    mask_column,
    words,
    score_scale,
    unit,
    GROUP: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
    MASK: tl.constexpr,
    TREE: tl.constexpr,
    CHECKED: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    NEGATIVE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Logarithm of the head-averaged tile of exp(s - entropy_lse): [R, C], or [C, R] transposed."""
    there = position < query_length
    average = (position * 0.0)[:, None] + (column * 0.0)[None, :]
    if TRANSPOSED:
        average = tl.trans(average)
    for head in range(0, query_heads):
        keys = load_rows(
            key + tl.cast(head // GROUP, tl.int64) * key_head, column, column < key_end, key_row,
            key_column, WIDTH, BLOCK_WIDTH,
        )  # fmt: skip
        queries = load_rows(
            query + tl.cast(head, tl.int64) * query_head, position, there, query_row, query_column,
            WIDTH, BLOCK_WIDTH,
        )  # fmt: skip
        queries = signed(queries, NEGATIVE)
        lse = load_lse(entropy_lse + head * query_length + position, there)
        mask_rows = mask + tl.cast(head, tl.int64) * mask_head + position.to(tl.int64) * mask_row
        ancestor_rows = ancestors + position * words
        if TRANSPOSED:
            scores = score_tile(
                keys, queries, column[:, None], bound[None, :], mask_rows[None, :], mask_column,
                ancestor_rows[None, :], length, score_scale, MASK, TREE, CHECKED, PRECISION,
            )  # fmt: skip
            average += tl.exp2((scores * unit - lse[None, :]) * LOG2E)
        else:
            scores = score_tile(
                queries, keys, column[None, :], bound[:, None], mask_rows[:, None], mask_column,
                ancestor_rows[:, None], length, score_scale, MASK, TREE, CHECKED, PRECISION,
            )  # fmt: skip
            average += tl.exp2((scores * unit - lse[:, None]) * LOG2E)
    # Below the smallest normal number the share of the entropy is below rounding.
    average = tl.maximum(average / query_heads, 1e-37, propagate_nan=tl.PropagateNan.ALL)
    return tl.log(average)


@triton.jit
def load_lse(at, there):
    """Log-sum-exps with +inf for rows that see nothing, so that exp(s - lse) is 0 there."""
    lse = tl.load(at, mask=there, other=float("-inf"))
    return tl.where(lse == float("-inf"), float("inf"), lse)
