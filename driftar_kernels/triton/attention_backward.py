"""Backward kernels of attention: one for the queries, one for keys and values; no atomics.

Scores are computed again from the saved log-sum-exps. Formulas: docs/ops/attention.md.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .attention_tile import (
    FAR_BELOW,
    HEAD_ENTROPY,
    LOG2E,
    MAP_ENTROPY,
    NO_ENTROPY,
    NO_MASK,
    average_logarithm,
    key_bound,
    load_lse,
    load_packed,
    load_rows,
    score_tile,
    signed,
)
from .elementary import dot, narrow


@triton.jit
def score_gradient(
    scores,
    grad_probability,  # <grad_out, v>
    logarithm,  # of the head-averaged map; anything elsewhere
    column,  # this and the rest broadcast to the tile
    lse,
    delta,
    weight,
    entropy_lse,
    cross,
    entropy_from,
    unit,
    ENTROPY: tl.constexpr,
    SEPARATE: tl.constexpr,
    SELECT: tl.constexpr,  # whether scores may be hidden
):
    """Probabilities p and dS = p (<grad_out, v> - delta) - w q (log pi - c) of a tile."""
    below = scores * unit - lse
    probability = tl.exp2(below * LOG2E)
    gradient = probability * (grad_probability - delta)
    if ENTROPY != NO_ENTROPY:
        share = probability
        if SEPARATE or ENTROPY == MAP_ENTROPY:
            below = tl.where(column >= entropy_from, scores * unit - entropy_lse, float("-inf"))
            share = tl.exp2(below * LOG2E)
        if ENTROPY == HEAD_ENTROPY:
            # 0 * -inf would be NaN where a probability underflows.
            logarithm = tl.maximum(below, FAR_BELOW, propagate_nan=tl.PropagateNan.ALL)
        entropic = weight * share * (logarithm - cross)
        if ENTROPY == MAP_ENTROPY:  # the average may overflow where it does not count
            entropic = tl.where(column >= entropy_from, entropic, 0.0)
        gradient -= entropic
    if SELECT:  # rather than multiplied: the value of a hidden key may be NaN
        gradient = tl.where(scores == float("-inf"), 0.0, gradient)
    return probability, gradient


@triton.jit
def accumulate_queries(
    first,
    last,
    grad_query,
    queries,
    grad_out,
    lse,
    delta,
    weight,
    row_entropy_lse,
    cross,
    query,
    key,
    value,
    mask,
    ancestors,
    entropy_lse,
    position,
    bound,
    key_index,
    mask_rows,
    key_end,
    length,
    query_length,
    query_heads,
    entropy_from,
    query_head,
    query_row,
    query_column,
    key_head,
    key_row,
    key_column,
    value_row,
    value_column,
    mask_head,
    mask_row,
    mask_column,
    words,
    score_scale,
    unit,
    GROUP: tl.constexpr,
    WIDTH: tl.constexpr,
    VALUE_WIDTH: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
    BLOCK_VALUE: tl.constexpr,
    COLUMNS: tl.constexpr,
    MASK: tl.constexpr,
    TREE: tl.constexpr,
    ENTROPY: tl.constexpr,
    SEPARATE: tl.constexpr,
    CHECKED: tl.constexpr,
    NEGATIVE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Adds what the keys [first, last) contribute to dS K."""
    ancestor_rows = ancestors + position * words
    own_key = key + tl.cast(key_index, tl.int64) * key_head
    for start in range(first, last, COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        there = column < key_end
        keys = load_rows(own_key, column, there, key_row, key_column, WIDTH, BLOCK_WIDTH)
        values = load_rows(value, column, there, value_row, value_column, VALUE_WIDTH, BLOCK_VALUE)
        scores = score_tile(
            queries, keys, column[None, :], bound[:, None], mask_rows[:, None], mask_column,
            ancestor_rows[:, None], length, score_scale, MASK, TREE, CHECKED, PRECISION,
        )  # fmt: skip
        grad_probability = dot(grad_out, tl.trans(values), None, PRECISION)
        logarithm = scores
        if ENTROPY == MAP_ENTROPY:
            logarithm = average_logarithm(
                query, key, mask, ancestors, entropy_lse, position, bound, column, key_end, length,
                query_length, query_heads, query_head, query_row, query_column, key_head, key_row,
                key_column, mask_head, mask_row, mask_column, words, score_scale, unit,
                GROUP, WIDTH, BLOCK_WIDTH, MASK, TREE, CHECKED, False, NEGATIVE, PRECISION,
            )  # fmt: skip
        _, gradient = score_gradient(
            scores, grad_probability, logarithm, column[None, :], lse[:, None], delta[:, None],
            weight[:, None], row_entropy_lse[:, None], cross[:, None], entropy_from, unit,
            ENTROPY, SEPARATE, CHECKED or MASK != NO_MASK,
        )  # fmt: skip
        grad_query = dot(narrow(gradient, keys.dtype), keys, grad_query, PRECISION)
    return grad_query


@triton.jit(do_not_specialize=["query_length", "key_length", "query_offset", "entropy_from"])
def query_gradient_kernel(
    query,  # [B, Hq, Lq, WIDTH]
    key,  # [B, Hkv, Lk, WIDTH]
    value,  # [B, Hkv, Lk, VALUE_WIDTH]
    mask,  # [B, Hq, Lq, Lk]
    query_offsets,  # [B] int32
    key_lengths,  # [B] int32
    ancestors,  # [trees, Lq, words] int32
    out,  # [B, Hq, Lq, VALUE_WIDTH]
    lse,  # [B, Hq, Lq]
    entropy_lse,  # [B, Hq, Lq]
    entropy_cross,  # [B, Hq, Lq]
    grad_out,  # [B, Hq, Lq, VALUE_WIDTH]
    grad_lse,  # [B, Hq, Lq]
    entropy_weight,  # [B, Hq, Lq] ("head") or [B, Lq] ("map"): grad_entropy entropy_norm
    delta,  # [B, Hq, Lq], out: <grad_out, out> - grad_lse
    grad_query,  # [B, Hq, Lq, WIDTH], out
    query_batch,
    query_head,
    query_row,
    query_column,
    key_batch,
    key_head,
    key_row,
    key_column,
    value_batch,
    value_head,
    value_row,
    value_column,
    mask_batch,
    mask_head,
    mask_row,
    mask_column,
    grad_batch,
    grad_head,
    grad_row,
    grad_column,
    tree_stride,
    words,
    key_heads,
    query_length,
    key_length,
    query_offset,
    entropy_from,
    score_scale,
    unit,
    scale,
    GROUP: tl.constexpr,
    WIDTH: tl.constexpr,
    VALUE_WIDTH: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
    BLOCK_VALUE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    MASK: tl.constexpr,
    LENGTHS: tl.constexpr,
    OFFSETS: tl.constexpr,
    CAUSAL: tl.constexpr,
    TREE: tl.constexpr,
    ENTROPY: tl.constexpr,
    SEPARATE: tl.constexpr,
    NEGATIVE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    blocks = tl.cdiv(query_length * GROUP, ROWS)
    task = tl.program_id(0)
    block = task % blocks
    if CAUSAL:  # the longest first
        block = blocks - 1 - block
    key_index = (task // blocks) % key_heads
    sample = (task // blocks // key_heads).to(tl.int64)
    first_head = key_index.to(tl.int64) * GROUP
    query_heads = key_heads * GROUP

    row = block * ROWS + tl.arange(0, ROWS)
    there = row < query_length * GROUP
    position = row // GROUP
    head_of_row = (first_head + row % GROUP).to(tl.int64)
    at = (sample * query_heads + head_of_row) * query_length + position
    length = key_length
    if LENGTHS:
        length = tl.load(key_lengths + sample)
    elif TREE:
        length = key_length - query_length
    offset = query_offset
    if OFFSETS:
        offset = tl.load(query_offsets + sample)
    key_end = length
    if TREE:
        key_end = length + query_length
    bound = key_bound(position, there, length, offset, CAUSAL, TREE)
    full_end = length
    if CAUSAL:
        full_end = tl.minimum(length, tl.maximum(block * ROWS // GROUP + offset + 1, 0))
    end = tl.max(bound, 0)
    full_end = tl.minimum(full_end, end) // COLUMNS * COLUMNS

    query += sample * query_batch
    key += sample * key_batch
    value += sample * value_batch + key_index.to(tl.int64) * value_head
    mask += sample * mask_batch
    mask_rows = mask + head_of_row * mask_head + position.to(tl.int64) * mask_row
    ancestors += sample * tree_stride
    queries = load_packed(
        query + first_head * query_head, row, there, query_head, query_row, query_column, GROUP,
        WIDTH, BLOCK_WIDTH,
    )  # fmt: skip
    queries = signed(queries, NEGATIVE)
    gradients = load_packed(
        grad_out + sample * grad_batch + first_head * grad_head, row, there, grad_head, grad_row,
        grad_column, GROUP, VALUE_WIDTH, BLOCK_VALUE,
    )  # fmt: skip
    outputs = load_rows(out, at, there, VALUE_WIDTH, 1, VALUE_WIDTH, BLOCK_VALUE)
    row_delta = tl.sum(gradients.to(tl.float32) * outputs.to(tl.float32), 1)
    row_delta -= tl.load(grad_lse + at, mask=there, other=0.0)
    tl.store(delta + at, row_delta, mask=there)

    row_lse = load_lse(lse + at, there)
    row_entropy_lse, weight, cross = row_lse, row_lse, row_lse
    if ENTROPY != NO_ENTROPY:
        row_entropy_lse = load_lse(entropy_lse + at, there)
        cross = tl.load(entropy_cross + at, mask=there, other=0.0)
        if ENTROPY == MAP_ENTROPY:
            weight_at = sample * query_length + position
            weight = tl.load(entropy_weight + weight_at, mask=there, other=0.0) / query_heads
        else:
            weight = tl.load(entropy_weight + at, mask=there, other=0.0)
        entropy_lse += sample * query_heads * query_length

    acc = tl.zeros([ROWS, BLOCK_WIDTH], tl.float32)
    acc = accumulate_queries(
        0, full_end, acc, queries, gradients, row_lse, row_delta, weight, row_entropy_lse, cross,
        query, key, value, mask, ancestors, entropy_lse, position, bound, key_index, mask_rows,
        key_end, length, query_length, query_heads, entropy_from, query_head, query_row,
        query_column, key_head, key_row, key_column, value_row, value_column, mask_head, mask_row,
        mask_column, words, score_scale, unit, GROUP, WIDTH, VALUE_WIDTH, BLOCK_WIDTH,
        BLOCK_VALUE, COLUMNS, MASK, TREE, ENTROPY, SEPARATE, False, NEGATIVE, PRECISION,
    )  # fmt: skip
    acc = accumulate_queries(
        full_end, end, acc, queries, gradients, row_lse, row_delta, weight, row_entropy_lse, cross,
        query, key, value, mask, ancestors, entropy_lse, position, bound, key_index, mask_rows,
        key_end, length, query_length, query_heads, entropy_from, query_head, query_row,
        query_column, key_head, key_row, key_column, value_row, value_column, mask_head, mask_row,
        mask_column, words, score_scale, unit, GROUP, WIDTH, VALUE_WIDTH, BLOCK_WIDTH,
        BLOCK_VALUE, COLUMNS, MASK, TREE, ENTROPY, SEPARATE, True, NEGATIVE, PRECISION,
    )  # fmt: skip
    column = tl.arange(0, BLOCK_WIDTH)
    inside = there[:, None] & (column < WIDTH)[None, :]
    acc = narrow(acc * scale, query.dtype.element_ty)
    tl.store(grad_query + (at * WIDTH)[:, None] + column[None, :], acc, mask=inside)


@triton.jit
def accumulate_keys(
    first,
    last,
    grad_keys,
    grad_values,
    keys,
    values,
    column,
    query,
    key,
    mask,
    ancestors,
    grad_out,
    lse,
    delta,
    entropy_weight,
    entropy_lse,
    entropy_cross,
    first_head,
    key_end,
    length,
    offset,
    query_length,
    query_heads,
    entropy_from,
    query_head,
    query_row,
    query_column,
    key_head,
    key_row,
    key_column,
    mask_head,
    mask_row,
    mask_column,
    grad_head,
    grad_row,
    grad_column,
    words,
    score_scale,
    unit,
    GROUP: tl.constexpr,
    WIDTH: tl.constexpr,
    VALUE_WIDTH: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
    BLOCK_VALUE: tl.constexpr,
    ROWS: tl.constexpr,
    MASK: tl.constexpr,
    CAUSAL: tl.constexpr,
    TREE: tl.constexpr,
    ENTROPY: tl.constexpr,
    SEPARATE: tl.constexpr,
    CHECKED: tl.constexpr,
    NEGATIVE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Adds what the packed rows [first, last) contribute to dS^T Q and p^T grad_out."""
    for start in range(first, last, ROWS):
        row = start + tl.arange(0, ROWS)
        there = row < query_length * GROUP
        position = row // GROUP
        head_of_row = (first_head + row % GROUP).to(tl.int64)
        at = head_of_row * query_length + position
        bound = key_bound(position, there, length, offset, CAUSAL, TREE)
        queries = load_packed(
            query + first_head * query_head, row, there, query_head, query_row, query_column,
            GROUP, WIDTH, BLOCK_WIDTH,
        )  # fmt: skip
        queries = signed(queries, NEGATIVE)
        gradients = load_packed(
            grad_out + first_head * grad_head, row, there, grad_head, grad_row, grad_column, GROUP,
            VALUE_WIDTH, BLOCK_VALUE,
        )  # fmt: skip
        mask_rows = mask + head_of_row * mask_head + position.to(tl.int64) * mask_row
        ancestor_rows = ancestors + position * words
        scores = score_tile(
            keys, queries, column[:, None], bound[None, :], mask_rows[None, :], mask_column,
            ancestor_rows[None, :], length, score_scale, MASK, TREE, CHECKED, PRECISION,
        )  # fmt: skip
        grad_probability = dot(values, tl.trans(gradients), None, PRECISION)
        row_lse = load_lse(lse + at, there)
        row_delta = tl.load(delta + at, mask=there, other=0.0)
        row_entropy_lse, weight, cross = row_lse, row_lse, row_lse
        logarithm = scores
        if ENTROPY != NO_ENTROPY:
            row_entropy_lse = load_lse(entropy_lse + at, there)
            cross = tl.load(entropy_cross + at, mask=there, other=0.0)
            if ENTROPY == MAP_ENTROPY:
                weight = tl.load(entropy_weight + position, mask=there, other=0.0) / query_heads
                logarithm = average_logarithm(
                    query, key, mask, ancestors, entropy_lse, position, bound, column, key_end,
                    length, query_length, query_heads, query_head, query_row, query_column,
                    key_head, key_row, key_column, mask_head, mask_row, mask_column, words,
                    score_scale, unit, GROUP, WIDTH, BLOCK_WIDTH, MASK, TREE, CHECKED, True,
                    NEGATIVE, PRECISION,
                )  # fmt: skip
            else:
                weight = tl.load(entropy_weight + at, mask=there, other=0.0)
        probability, gradient = score_gradient(
            scores, grad_probability, logarithm, column[:, None], row_lse[None, :],
            row_delta[None, :], weight[None, :], row_entropy_lse[None, :], cross[None, :],
            entropy_from, unit, ENTROPY, SEPARATE, CHECKED or MASK != NO_MASK,
        )  # fmt: skip
        grad_values = dot(narrow(probability, gradients.dtype), gradients, grad_values, PRECISION)
        grad_keys = dot(narrow(gradient, queries.dtype), queries, grad_keys, PRECISION)
    return grad_keys, grad_values


@triton.jit(do_not_specialize=["query_length", "key_length", "query_offset", "entropy_from"])
def key_gradient_kernel(
    query,  # [B, Hq, Lq, WIDTH]
    key,  # [B, Hkv, Lk, WIDTH]
    value,  # [B, Hkv, Lk, VALUE_WIDTH]
    mask,  # [B, Hq, Lq, Lk]
    query_offsets,  # [B] int32
    key_lengths,  # [B] int32
    ancestors,  # [trees, Lq, words] int32
    lse,  # [B, Hq, Lq]
    entropy_lse,  # [B, Hq, Lq]
    entropy_cross,  # [B, Hq, Lq]
    grad_out,  # [B, Hq, Lq, VALUE_WIDTH]
    entropy_weight,  # [B, Hq, Lq] ("head") or [B, Lq] ("map")
    delta,  # [B, Hq, Lq]
    grad_key,  # [B, Hkv, Lk, WIDTH], out
    grad_value,  # [B, Hkv, Lk, VALUE_WIDTH], out
    query_batch,
    query_head,
    query_row,
    query_column,
    key_batch,
    key_head,
    key_row,
    key_column,
    value_batch,
    value_head,
    value_row,
    value_column,
    mask_batch,
    mask_head,
    mask_row,
    mask_column,
    grad_batch,
    grad_head,
    grad_row,
    grad_column,
    tree_stride,
    words,
    key_heads,
    query_length,
    key_length,
    query_offset,
    entropy_from,
    score_scale,
    unit,
    scale,
    GROUP: tl.constexpr,
    WIDTH: tl.constexpr,
    VALUE_WIDTH: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
    BLOCK_VALUE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    MASK: tl.constexpr,
    LENGTHS: tl.constexpr,
    OFFSETS: tl.constexpr,
    CAUSAL: tl.constexpr,
    TREE: tl.constexpr,
    ENTROPY: tl.constexpr,
    SEPARATE: tl.constexpr,
    NEGATIVE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    blocks = tl.cdiv(key_length, COLUMNS)
    task = tl.program_id(0)
    start = task % blocks * COLUMNS
    key_index = (task // blocks) % key_heads
    sample = (task // blocks // key_heads).to(tl.int64)
    first_head = key_index.to(tl.int64) * GROUP
    query_heads = key_heads * GROUP
    length = key_length
    if LENGTHS:
        length = tl.load(key_lengths + sample)
    elif TREE:
        length = key_length - query_length
    offset = query_offset
    if OFFSETS:
        offset = tl.load(query_offsets + sample)
    key_end = length
    if TREE:
        key_end = length + query_length

    # Rows [begin, full) see some of these keys, rows [full, rows) all of them.
    rows = query_length * GROUP
    begin = 0
    full = 0
    if CAUSAL:
        begin = tl.minimum(tl.maximum(start - offset, 0), query_length) * GROUP
        full = tl.minimum(tl.maximum(start + COLUMNS - 1 - offset, 0), query_length) * GROUP
    if TREE:
        begin = tl.minimum(tl.maximum(start - length, 0), query_length) * GROUP
    begin = tl.where(start < key_end, begin // ROWS * ROWS, rows)
    full = tl.where(start + COLUMNS <= length, tl.cdiv(full, ROWS) * ROWS, rows)
    full = tl.maximum(begin, full)

    query += sample * query_batch
    key += sample * key_batch
    value += sample * value_batch + key_index.to(tl.int64) * value_head
    mask += sample * mask_batch
    ancestors += sample * tree_stride
    grad_out += sample * grad_batch
    first_row = sample * query_heads * query_length
    lse += first_row
    delta += first_row
    if ENTROPY != NO_ENTROPY:
        entropy_lse += first_row
        entropy_cross += first_row
        entropy_weight += sample * query_length if ENTROPY == MAP_ENTROPY else first_row
    column = start + tl.arange(0, COLUMNS)
    there = column < key_end
    keys = load_rows(
        key + key_index.to(tl.int64) * key_head, column, there, key_row, key_column, WIDTH,
        BLOCK_WIDTH,
    )  # fmt: skip
    values = load_rows(value, column, there, value_row, value_column, VALUE_WIDTH, BLOCK_VALUE)

    grad_keys = tl.zeros([COLUMNS, BLOCK_WIDTH], tl.float32)
    grad_values = tl.zeros([COLUMNS, BLOCK_VALUE], tl.float32)
    grad_keys, grad_values = accumulate_keys(
        begin, tl.minimum(full, rows), grad_keys, grad_values, keys, values, column, query, key,
        mask, ancestors, grad_out, lse, delta, entropy_weight, entropy_lse, entropy_cross,
        first_head, key_end, length, offset, query_length, query_heads, entropy_from, query_head,
        query_row, query_column, key_head, key_row, key_column, mask_head, mask_row, mask_column,
        grad_head, grad_row, grad_column, words, score_scale, unit, GROUP, WIDTH,
        VALUE_WIDTH, BLOCK_WIDTH, BLOCK_VALUE, ROWS, MASK, CAUSAL, TREE, ENTROPY, SEPARATE, True,
        NEGATIVE, PRECISION,
    )  # fmt: skip
    grad_keys, grad_values = accumulate_keys(
        full, rows, grad_keys, grad_values, keys, values, column, query, key, mask, ancestors,
        grad_out, lse, delta, entropy_weight, entropy_lse, entropy_cross, first_head, key_end,
        length, offset, query_length, query_heads, entropy_from, query_head, query_row,
        query_column, key_head, key_row, key_column, mask_head, mask_row, mask_column, grad_head,
        grad_row, grad_column, words, score_scale, unit, GROUP, WIDTH, VALUE_WIDTH,
        BLOCK_WIDTH, BLOCK_VALUE, ROWS, MASK, CAUSAL, TREE, ENTROPY, SEPARATE, False, NEGATIVE,
        PRECISION,
    )  # fmt: skip

    at = (sample * key_heads + key_index) * key_length + column
    stored = column < key_length
    lane = tl.arange(0, BLOCK_WIDTH)
    inside = stored[:, None] & (lane < WIDTH)[None, :]
    # The queries carry the sign of the scale.
    grad_keys = narrow(grad_keys * tl.abs(scale), keys.dtype)
    tl.store(grad_key + (at * WIDTH)[:, None] + lane[None, :], grad_keys, mask=inside)
    lane = tl.arange(0, BLOCK_VALUE)
    inside = stored[:, None] & (lane < VALUE_WIDTH)[None, :]
    grad_values = narrow(grad_values, values.dtype)
    tl.store(grad_value + (at * VALUE_WIDTH)[:, None] + lane[None, :], grad_values, mask=inside)
