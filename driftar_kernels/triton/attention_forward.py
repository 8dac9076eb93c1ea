"""Forward kernels of attention: the streaming pass, the merge of its splits, the head-averaged map.

Formulas: docs/ops/attention.md.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .attention_tile import (
    FAR_BELOW,
    HEAD_ENTROPY,
    LOG2E,
    NO_ENTROPY,
    NO_MASK,
    average_logarithm,
    key_bound,
    load_lse,
    load_packed,
    load_rows,
    log_sum_exp,
    raise_statistics,
    score_tile,
    signed,
)
from .elementary import dot, narrow

STATISTICS = tl.constexpr(7)  # numbers that a split leaves per row


@triton.jit
def absorb_keys(
    first,
    last,
    maximum,
    total,
    moment,
    out,
    member_maximum,
    member_total,
    member_moment,
    support,
    queries,
    key,
    value,
    bound,
    mask_rows,
    ancestor_rows,
    key_end,
    length,
    entropy_from,
    key_row,
    key_column,
    value_row,
    value_column,
    mask_column,
    score_scale,
    exponent,
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
    PRECISION: tl.constexpr,
):
    """Streams the keys [first, last) past the rows of a program."""
    for start in range(first, last, COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        there = column < key_end
        keys = load_rows(key, column, there, key_row, key_column, WIDTH, BLOCK_WIDTH)
        scores = score_tile(
            queries, keys, column[None, :], bound[:, None], mask_rows[:, None], mask_column,
            ancestor_rows[:, None], length, score_scale, MASK, TREE, CHECKED, PRECISION,
        )  # fmt: skip
        if ENTROPY != NO_ENTROPY and (CHECKED or MASK != NO_MASK):
            counted = (scores != float("-inf")) & (column >= entropy_from)[None, :]
            support += tl.sum(counted.to(tl.int32), 1)
        elif ENTROPY != NO_ENTROPY:
            support += tl.minimum(tl.maximum(start + COLUMNS - entropy_from, 0), COLUMNS)
        if SEPARATE:
            member_maximum, member_total, member_moment, _, _ = raise_statistics(
                member_maximum,
                member_total,
                member_moment,
                tl.where((column >= entropy_from)[None, :], scores, float("-inf")),
                exponent,
            )
        maximum, total, moment, exponential, factor = raise_statistics(
            maximum, total, moment, scores, exponent
        )
        values = load_rows(value, column, there, value_row, value_column, VALUE_WIDTH, BLOCK_VALUE)
        out = dot(narrow(exponential, values.dtype), values, out * factor[:, None], PRECISION)
    return (
        maximum,
        total,
        moment,
        out,
        member_maximum,
        member_total,
        member_moment,
        support,
    )


@triton.jit
def store_rows(
    at,  # [R] indices of the rows among [B, Hq, Lq]
    there,
    maximum,
    total,
    moment,
    member_maximum,
    member_total,
    member_moment,
    support,
    entropy,
    lse,
    max_score,
    entropy_lse,
    entropy_cross,
    entropy_norm,
    unit,
    exponent,
    ENTROPY: tl.constexpr,
    SEPARATE: tl.constexpr,
    NORMALIZE: tl.constexpr,
):
    """Writes the statistics of finished rows."""
    largest = tl.where(total == total, maximum * unit, total)  # NaN where a score is
    tl.store(max_score + at, tl.where(total == 0.0, float("-inf"), largest), mask=there)
    tl.store(lse + at, log_sum_exp(maximum, total, unit), mask=there)
    if ENTROPY != NO_ENTROPY:
        if SEPARATE:
            maximum, total, moment = member_maximum, member_total, member_moment
        tl.store(entropy_lse + at, log_sum_exp(maximum, total, unit), mask=there)
        if ENTROPY == HEAD_ENTROPY:
            seen = tl.where(total == 0.0, 1.0, total)
            natural = exponent / LOG2E
            row_entropy = tl.log(seen) - natural * moment / seen
            norm = support_norm(support, NORMALIZE)
            tl.store(entropy + at, row_entropy * norm, mask=there)
            tl.store(entropy_norm + at, norm, mask=there)
            tl.store(entropy_cross + at, -row_entropy, mask=there)
        else:  # for the second pass, which needs the largest support over the heads
            tl.store(entropy_cross + at, support.to(tl.float32), mask=there)


@triton.jit
def support_norm(support, NORMALIZE: tl.constexpr):
    """1 / log |E|, or 1 without normalisation; 0 where there is nothing to choose between."""
    norm = (support > 1).to(tl.float32)
    if NORMALIZE:
        norm = norm / tl.log(tl.maximum(support, 2).to(tl.float32))
    return norm


@triton.jit(
    do_not_specialize=["query_length", "key_length", "query_offset", "entropy_from", "split"]
)
def forward_kernel(
    query,  # [B, Hq, Lq, WIDTH]
    key,  # [B, Hkv, Lk, WIDTH]
    value,  # [B, Hkv, Lk, VALUE_WIDTH]
    mask,  # [B, Hq, Lq, Lk]
    query_offsets,  # [B] int32
    key_lengths,  # [B] int32
    ancestors,  # [trees, Lq, words] int32
    out,  # [B, Hq, Lq, VALUE_WIDTH]
    entropy,  # [B, Hq, Lq]
    lse,  # [B, Hq, Lq]
    max_score,  # [B, Hq, Lq]
    entropy_lse,  # [B, Hq, Lq]
    entropy_cross,  # [B, Hq, Lq]
    entropy_norm,  # [B, Hq, Lq]
    partial_out,  # [splits, B, Hq, Lq, VALUE_WIDTH] fp32
    partial,  # [splits, STATISTICS, B, Hq, Lq] fp32
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
    tree_stride,
    words,
    batch,
    key_heads,
    query_length,
    key_length,
    query_offset,
    entropy_from,
    split,  # keys per split
    score_scale,
    unit,
    exponent,
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
    NORMALIZE: tl.constexpr,
    SPLIT: tl.constexpr,
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

    row = block * ROWS + tl.arange(0, ROWS)
    there = row < query_length * GROUP
    position = row // GROUP
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
    full_end = length  # up to here every row sees every key by its position
    if CAUSAL:
        full_end = tl.minimum(length, tl.maximum(block * ROWS // GROUP + offset + 1, 0))
    end = tl.max(bound, 0)

    query += sample * query_batch + first_head * query_head
    key += sample * key_batch + key_index.to(tl.int64) * key_head
    value += sample * value_batch + key_index.to(tl.int64) * value_head
    head_of_row = (first_head + row % GROUP).to(tl.int64)
    mask_rows = (
        mask + sample * mask_batch + head_of_row * mask_head + position.to(tl.int64) * mask_row
    )
    ancestor_rows = ancestors + sample * tree_stride + position * words
    queries = load_packed(
        query, row, there, query_head, query_row, query_column, GROUP, WIDTH, BLOCK_WIDTH
    )
    queries = signed(queries, NEGATIVE)

    first = 0
    if SPLIT:
        first = tl.program_id(1) * split
        end = tl.minimum(end, first + split)
    full_end = tl.maximum(first, tl.minimum(full_end, end) // COLUMNS * COLUMNS)

    maximum = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    moment = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, BLOCK_VALUE], tl.float32)
    member_maximum, member_total, member_moment = maximum, total, moment
    support = tl.zeros([ROWS], tl.int32)
    (
        maximum, total, moment, acc, member_maximum, member_total, member_moment, support,
    ) = absorb_keys(
        first, full_end, maximum, total, moment, acc, member_maximum, member_total,
        member_moment, support, queries, key, value, bound, mask_rows, ancestor_rows, key_end,
        length, entropy_from, key_row, key_column, value_row, value_column, mask_column,
        score_scale, exponent, WIDTH, VALUE_WIDTH, BLOCK_WIDTH, BLOCK_VALUE, COLUMNS, MASK, TREE,
        ENTROPY, SEPARATE, False, PRECISION,
    )  # fmt: skip
    (
        maximum, total, moment, acc, member_maximum, member_total, member_moment, support,
    ) = absorb_keys(
        full_end, end, maximum, total, moment, acc, member_maximum, member_total,
        member_moment, support, queries, key, value, bound, mask_rows, ancestor_rows, key_end,
        length, entropy_from, key_row, key_column, value_row, value_column, mask_column,
        score_scale, exponent, WIDTH, VALUE_WIDTH, BLOCK_WIDTH, BLOCK_VALUE, COLUMNS, MASK, TREE,
        ENTROPY, SEPARATE, True, PRECISION,
    )  # fmt: skip

    at = (sample * key_heads * GROUP + head_of_row) * query_length + position
    column = tl.arange(0, BLOCK_VALUE)
    inside = there[:, None] & (column < VALUE_WIDTH)[None, :]
    if SPLIT:
        rows = batch.to(tl.int64) * key_heads * GROUP * query_length
        slot = tl.program_id(1).to(tl.int64)
        target = partial_out + ((slot * rows + at) * VALUE_WIDTH)[:, None] + column[None, :]
        tl.store(target, acc, mask=inside)
        partial += slot * STATISTICS * rows + at
        tl.store(partial, maximum, mask=there)
        tl.store(partial + rows, total, mask=there)
        tl.store(partial + 2 * rows, moment, mask=there)
        tl.store(partial + 3 * rows, support.to(tl.float32), mask=there)
        if SEPARATE:
            tl.store(partial + 4 * rows, member_maximum, mask=there)
            tl.store(partial + 5 * rows, member_total, mask=there)
            tl.store(partial + 6 * rows, member_moment, mask=there)
    else:
        acc = acc / tl.where(total == 0.0, 1.0, total)[:, None]
        acc = narrow(acc, out.dtype.element_ty)
        tl.store(out + (at * VALUE_WIDTH)[:, None] + column[None, :], acc, mask=inside)
        store_rows(
            at, there, maximum, total, moment, member_maximum, member_total, member_moment,
            support, entropy, lse, max_score, entropy_lse, entropy_cross, entropy_norm, unit,
            exponent, ENTROPY, SEPARATE, NORMALIZE,
        )  # fmt: skip


@triton.jit
def merge_triple(partial, rows, at, there, splits, exponent):
    """(m, l, t) of all splits, merged in order."""
    maximum = tl.full(at.shape, float("-inf"), tl.float32)
    total = tl.zeros(at.shape, tl.float32)
    moment = tl.zeros(at.shape, tl.float32)
    for slot in range(0, splits):
        source = partial + slot * STATISTICS * rows + at
        their_maximum = tl.load(source, mask=there, other=float("-inf"))
        their_total = tl.load(source + rows, mask=there, other=0.0)
        their_moment = tl.load(source + 2 * rows, mask=there, other=0.0)
        higher = tl.maximum(maximum, their_maximum)
        shift = tl.where(higher == float("-inf"), 0.0, higher)
        drop = tl.maximum(maximum - shift, FAR_BELOW)
        their_drop = tl.maximum(their_maximum - shift, FAR_BELOW)
        factor = tl.exp2(drop * exponent)
        their_factor = tl.exp2(their_drop * exponent)
        moment = factor * (moment + drop * total) + their_factor * (
            their_moment + their_drop * their_total
        )
        total = factor * total + their_factor * their_total
        maximum = higher
    return maximum, total, moment


@triton.jit(do_not_specialize=["rows", "splits"])
def merge_kernel(
    out,  # [rows, VALUE_WIDTH]
    entropy,  # [rows]; rows is B Hq Lq
    lse,
    max_score,
    entropy_lse,
    entropy_cross,
    entropy_norm,
    partial_out,  # [splits, rows, VALUE_WIDTH] fp32
    partial,  # [splits, STATISTICS, rows] fp32
    rows,
    splits,
    unit,
    exponent,
    VALUE_WIDTH: tl.constexpr,
    BLOCK_VALUE: tl.constexpr,
    ROWS: tl.constexpr,
    ENTROPY: tl.constexpr,
    SEPARATE: tl.constexpr,
    NORMALIZE: tl.constexpr,
):
    at = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    there = at < rows
    rows = tl.cast(rows, tl.int64)
    maximum, total, moment = merge_triple(partial, rows, at, there, splits, exponent)
    member_maximum, member_total, member_moment = maximum, total, moment
    if SEPARATE:
        member_maximum, member_total, member_moment = merge_triple(
            partial + 4 * rows, rows, at, there, splits, exponent
        )
    column = tl.arange(0, BLOCK_VALUE)
    inside = there[:, None] & (column < VALUE_WIDTH)[None, :]
    shift = tl.where(maximum == float("-inf"), 0.0, maximum)
    support = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, BLOCK_VALUE], tl.float32)
    for slot in range(0, splits):
        source = partial + slot * STATISTICS * rows + at
        drop = tl.load(source, mask=there, other=float("-inf")) - shift
        support += tl.load(source + 3 * rows, mask=there, other=0.0)
        weight = tl.exp2(tl.maximum(drop, FAR_BELOW) * exponent)
        part = partial_out + ((slot * rows + at) * VALUE_WIDTH)[:, None] + column[None, :]
        acc += weight[:, None] * tl.load(part, mask=inside, other=0.0)
    acc = acc / tl.where(total == 0.0, 1.0, total)[:, None]
    acc = narrow(acc, out.dtype.element_ty)
    tl.store(out + (at * VALUE_WIDTH)[:, None] + column[None, :], acc, mask=inside)
    store_rows(
        at, there, maximum, total, moment, member_maximum, member_total, member_moment,
        support.to(tl.int32), entropy, lse, max_score, entropy_lse, entropy_cross, entropy_norm,
        unit, exponent, ENTROPY, SEPARATE, NORMALIZE,
    )  # fmt: skip


@triton.jit(do_not_specialize=["query_length", "key_length", "query_offset", "entropy_from"])
def map_kernel(
    query,  # [B, Hq, Lq, WIDTH]
    key,  # [B, Hkv, Lk, WIDTH]
    mask,  # [B, Hq, Lq, Lk]
    query_offsets,  # [B] int32
    key_lengths,  # [B] int32
    ancestors,  # [trees, Lq, words] int32
    entropy,  # [B, Lq]
    entropy_lse,  # [B, Hq, Lq]
    entropy_cross,  # [B, Hq, Lq], in: |E| of every head, out: sum_j q_hj log pi_j
    entropy_norm,  # [B, Lq]
    query_batch,
    query_head,
    query_row,
    query_column,
    key_batch,
    key_head,
    key_row,
    key_column,
    mask_batch,
    mask_head,
    mask_row,
    mask_column,
    tree_stride,
    words,
    query_heads,
    query_length,
    key_length,
    query_offset,
    entropy_from,
    score_scale,
    unit,
    GROUP: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
    HEADS: tl.constexpr,  # query_heads, padded
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    MASK: tl.constexpr,
    LENGTHS: tl.constexpr,
    OFFSETS: tl.constexpr,
    CAUSAL: tl.constexpr,
    TREE: tl.constexpr,
    NORMALIZE: tl.constexpr,
    NEGATIVE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    blocks = tl.cdiv(query_length, ROWS)
    sample = (tl.program_id(0) // blocks).to(tl.int64)
    position = tl.program_id(0) % blocks * ROWS + tl.arange(0, ROWS)
    there = position < query_length
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
    query += sample * query_batch
    key += sample * key_batch
    mask += sample * mask_batch
    ancestors += sample * tree_stride
    entropy_lse += sample * query_heads * query_length
    entropy_cross += sample * query_heads * query_length

    head = tl.arange(0, HEADS)
    at = head[:, None] * query_length + position[None, :]
    inside = (head < query_heads)[:, None] & there[None, :]
    support = tl.max(tl.load(entropy_cross + at, mask=inside, other=0.0), 0)
    cross = tl.zeros([HEADS, ROWS], tl.float32)
    for start in range(entropy_from // COLUMNS * COLUMNS, tl.max(bound, 0), COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        logarithm = average_logarithm(
            query, key, mask, ancestors, entropy_lse, position, bound, column, key_end, length,
            query_length, query_heads, query_head, query_row, query_column, key_head, key_row,
            key_column, mask_head, mask_row, mask_column, words, score_scale, unit, GROUP,
            WIDTH, BLOCK_WIDTH, MASK, TREE, True, False, NEGATIVE, PRECISION,
        )  # fmt: skip
        for h in range(0, query_heads):
            keys = load_rows(
                key + tl.cast(h // GROUP, tl.int64) * key_head, column, column < key_end, key_row,
                key_column, WIDTH, BLOCK_WIDTH,
            )  # fmt: skip
            queries = load_rows(
                query + tl.cast(h, tl.int64) * query_head, position, there, query_row, query_column,
                WIDTH, BLOCK_WIDTH,
            )  # fmt: skip
            queries = signed(queries, NEGATIVE)
            mask_rows = mask + tl.cast(h, tl.int64) * mask_head + position.to(tl.int64) * mask_row
            scores = score_tile(
                queries, keys, column[None, :], bound[:, None], mask_rows[:, None], mask_column,
                (ancestors + position * words)[:, None], length, score_scale, MASK, TREE, True,
                PRECISION,
            )  # fmt: skip
            h_lse = load_lse(entropy_lse + h * query_length + position, there)
            share = tl.exp2((scores * unit - h_lse[:, None]) * LOG2E) * logarithm
            share = tl.where((column >= entropy_from)[None, :], share, 0.0)
            cross += tl.where((head == h)[:, None], tl.sum(share, 1)[None, :], 0.0)
    tl.store(entropy_cross + at, cross, mask=inside)
    total = -tl.sum(cross, 0) / query_heads
    total = tl.where(total < 0.0, 0.0, total)
    norm = support_norm(support, NORMALIZE)
    tl.store(entropy + sample * query_length + position, total * norm, mask=there)
    tl.store(entropy_norm + sample * query_length + position, norm, mask=there)
