"""Forward kernel of attention: keys stream past a block of rows, which keeps online statistics.

Formulas: docs/ops/attention.md.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .attention_arguments import (
    FAR_BELOW,
    HEAD_ENTROPY,
    LOG2E,
    NO_ENTROPY,
    NO_MASK,
    read_options,
)
from .attention_tile import (
    fp32_units,
    load_block,
    load_tile,
    locate_rows,
    row_bounds,
    row_pointers,
    run_time_sizes,
    score_tile,
    seen_by_all,
    visible_keys,
)
from .elementary import dot, narrow
from .structures import structure

STATISTICS = tl.constexpr(7)  # numbers that a split leaves per row


@triton.jit
def nothing_seen(ROWS: tl.constexpr):
    return structure("Statistics")(
        tl.full([ROWS], float("-inf"), tl.float32),
        tl.zeros([ROWS], tl.float32),
        tl.zeros([ROWS], tl.float32),
    )


@triton.jit
def raise_statistics(before, scores, exponent):
    """Absorbs a tile [R, C] of scores. Returns the statistics, the tile of e and the factor by
    which sums weighted with earlier e must shrink.

    A row's maximum stays -inf until it sees a key; NaN scores reach the sums, not the maximum.
    """
    maximum = tl.maximum(before.maximum, tl.max(scores, 1))
    shift = tl.where(maximum == float("-inf"), 0.0, maximum)
    drop = before.maximum - shift
    drop = tl.where(before.maximum == float("-inf"), 0.0, tl.maximum(drop, FAR_BELOW))
    factor = tl.exp2(drop * exponent)
    below = tl.maximum(scores - shift[:, None], FAR_BELOW, propagate_nan=tl.PropagateNan.ALL)
    exponential = tl.exp2(below * exponent)
    moment = factor * (before.moment + drop * before.total) + tl.sum(exponential * below, 1)
    total = factor * before.total + tl.sum(exponential, 1)
    return structure("Statistics")(maximum, total, moment), exponential, factor


@triton.jit
def absorb_keys(
    first,
    last,
    state,
    queries,
    rows,
    key,
    value,
    key_head,
    sample,
    hiding,
    sizes,
    units,
    CHECKED: tl.constexpr,
    OPTIONS: tl.constexpr,
):
    """Streams the keys [first, last) past the rows of a program."""
    for start in range(first, last, OPTIONS.columns):
        column = start + tl.arange(0, OPTIONS.columns)
        there = column < sample.end
        keys = load_block(key, sample.index, key_head, column, there, False, OPTIONS)
        scores = score_tile(
            queries, keys, rows, column, sample, hiding, units, CHECKED, False, OPTIONS
        )
        support, members = state.support, state.members
        counted = (column >= sizes.entropy_from)[None, :]
        if OPTIONS.entropy != NO_ENTROPY and (CHECKED or OPTIONS.mask != NO_MASK):
            support += tl.sum((counted & (scores != float("-inf"))).to(tl.int32), 1)
        elif OPTIONS.entropy != NO_ENTROPY:
            beyond = start + OPTIONS.columns - sizes.entropy_from
            support += tl.minimum(tl.maximum(beyond, 0), OPTIONS.columns)
        if OPTIONS.separate:
            members, _, _ = raise_statistics(
                members, tl.where(counted, scores, float("-inf")), units.exponent
            )
        visible, exponential, factor = raise_statistics(state.visible, scores, units.exponent)
        at = row_pointers(value, sample.index, key_head, column)
        values = load_tile(at, there, value.column, 0, OPTIONS.value_width, OPTIONS.block_value)
        out = dot(
            narrow(exponential, values.dtype), values, state.out * factor[:, None],
            OPTIONS.precision,
        )  # fmt: skip
        state = structure("State")(visible, members, support, out)
    return state


@triton.jit
def log_sum_exp(statistics, unit):
    """Natural log-sum-exp; -inf for a row that saw nothing."""
    total = statistics.total
    seen = total != 0.0
    logarithm = tl.log(tl.where(seen, total, 1.0))
    return tl.where(seen, statistics.maximum * unit + logarithm, float("-inf"))


@triton.jit
def support_norm(support, NORMALIZE: tl.constexpr):
    """1 / log |E|, or 1 without normalisation; 0 where there is nothing to choose between."""
    norm = (support > 1).to(tl.float32)
    if NORMALIZE:
        norm = norm / tl.log(tl.maximum(support, 2).to(tl.float32))
    return norm


@triton.jit
def store_rows(at, there, state, results, units, OPTIONS: tl.constexpr):
    """Writes what is known of finished rows; ``at`` are their indices in [B, Hq, Lq]."""
    visible = state.visible
    total = visible.total
    column = tl.arange(0, OPTIONS.block_value)
    inside = there[:, None] & (column < OPTIONS.value_width)[None, :]
    out = narrow(
        state.out / tl.where(total == 0.0, 1.0, total)[:, None], results.out.dtype.element_ty
    )
    tl.store(results.out + (at * OPTIONS.value_width)[:, None] + column[None, :], out, mask=inside)
    largest = tl.where(total == total, visible.maximum * units.natural, total)  # NaN where a score
    tl.store(results.max_score + at, tl.where(total == 0.0, float("-inf"), largest), mask=there)
    tl.store(results.lse + at, log_sum_exp(visible, units.natural), mask=there)
    if OPTIONS.entropy != NO_ENTROPY:
        members = visible
        if OPTIONS.separate:
            members = state.members
        tl.store(results.entropy_lse + at, log_sum_exp(members, units.natural), mask=there)
        if OPTIONS.entropy == HEAD_ENTROPY:
            seen = tl.where(members.total == 0.0, 1.0, members.total)
            entropy = tl.log(seen) - units.exponent / LOG2E * members.moment / seen
            norm = support_norm(state.support, OPTIONS.normalize)
            tl.store(results.entropy + at, entropy * norm, mask=there)
            tl.store(results.entropy_norm + at, norm, mask=there)
            tl.store(results.entropy_cross + at, -entropy, mask=there)
        else:  # for the second pass, which needs the largest support over the heads
            tl.store(results.entropy_cross + at, state.support.to(tl.float32), mask=there)


@triton.jit(
    do_not_specialize=[
        "batch",
        "query_length",
        "key_length",
        "query_offset",
        "entropy_from",
        "split",
    ]
)
def forward_kernel(
    query, q_batch, q_head, q_row, q_column,  # Matrix [B, Hq, Lq, D]
    key, k_batch, k_head, k_row, k_column,  # Matrix [B, Hkv, Lk, D]
    value, v_batch, v_head, v_row, v_column,  # Matrix [B, Hkv, Lk, Dv]
    mask, m_batch, m_head, m_row, m_column,  # Matrix [B, Hq, Lq, Lk]
    query_offsets, key_lengths, ancestors, tree_stride, words,  # the rest of Hiding
    score_unit, natural_unit, exponent_unit,
    out, entropy, lse, max_score, entropy_lse, entropy_cross, entropy_norm,  # Results
    partial_out,  # [splits, B, Hq, Lq, Dv] fp32
    partial,  # [splits, STATISTICS, B, Hq, Lq] fp32
    batch,
    split,  # keys per split
    key_heads, query_length, key_length, query_offset, entropy_from,
    SPLIT: tl.constexpr,
    option_text: tl.constexpr,
):  # fmt: skip
    OPTIONS: tl.constexpr = read_options(option_text)
    query = structure("Matrix")(query, q_batch, q_head, q_row, q_column)
    key = structure("Matrix")(key, k_batch, k_head, k_row, k_column)
    value = structure("Matrix")(value, v_batch, v_head, v_row, v_column)
    mask = structure("Matrix")(mask, m_batch, m_head, m_row, m_column)
    hiding = structure("Hiding")(mask, query_offsets, key_lengths, ancestors, tree_stride, words)
    units = fp32_units(score_unit, natural_unit, exponent_unit)
    sizes = run_time_sizes(key_heads, query_length, key_length, query_offset, entropy_from)
    results = structure("Results")(
        out, entropy, lse, max_score, entropy_lse, entropy_cross, entropy_norm
    )
    blocks = tl.cdiv(query_length * OPTIONS.group, OPTIONS.rows)
    task = tl.program_id(0)
    block = task % blocks
    if OPTIONS.causal:  # the longest first
        block = blocks - 1 - block
    key_head = task // blocks % key_heads
    index = (task // blocks // key_heads).to(tl.int64)
    sample = structure("Sample")(index, *visible_keys(index, hiding, sizes, OPTIONS))
    first_row = block * OPTIONS.rows
    rows = locate_rows(
        first_row + tl.arange(0, OPTIONS.rows), key_head * OPTIONS.group, index, sizes,
        OPTIONS.group, OPTIONS,
    )  # fmt: skip
    queries = load_block(query, index, rows.head, rows.position, rows.there, False, OPTIONS)
    first = 0
    end = tl.max(row_bounds(rows, sample, OPTIONS), 0)
    if SPLIT:
        first = tl.program_id(1) * split
        end = tl.minimum(end, first + split)
    full = tl.minimum(seen_by_all(first_row // OPTIONS.group, sample, OPTIONS), end)
    full = tl.maximum(first, full // OPTIONS.columns * OPTIONS.columns)

    state = structure("State")(
        nothing_seen(OPTIONS.rows),
        nothing_seen(OPTIONS.rows),
        tl.zeros([OPTIONS.rows], tl.int32),
        tl.zeros([OPTIONS.rows, OPTIONS.block_value], tl.float32),
    )
    state = absorb_keys(
        first, full, state, queries, rows, key, value, key_head, sample, hiding, sizes, units,
        False, OPTIONS,
    )  # fmt: skip
    state = absorb_keys(
        full, end, state, queries, rows, key, value, key_head, sample, hiding, sizes, units, True,
        OPTIONS,
    )  # fmt: skip
    if SPLIT:
        store_partial(rows, state, partial_out, partial, batch, sizes, OPTIONS)
    else:
        store_rows(rows.at, rows.there, state, results, units, OPTIONS)


@triton.jit
def store_partial(rows, state, partial_out, partial, batch, sizes, OPTIONS: tl.constexpr):
    """Leaves the state of a split for attention_merge.py."""
    count = tl.cast(batch, tl.int64) * sizes.key_heads * OPTIONS.group * sizes.queries
    slot = tl.program_id(1).to(tl.int64)
    there = rows.there
    column = tl.arange(0, OPTIONS.block_value)
    inside = there[:, None] & (column < OPTIONS.value_width)[None, :]
    at = ((slot * count + rows.at) * OPTIONS.value_width)[:, None] + column[None, :]
    tl.store(partial_out + at, state.out, mask=inside)
    partial += slot * STATISTICS * count + rows.at
    tl.store(partial, state.visible.maximum, mask=there)
    tl.store(partial + count, state.visible.total, mask=there)
    tl.store(partial + 2 * count, state.visible.moment, mask=there)
    tl.store(partial + 3 * count, state.support.to(tl.float32), mask=there)
    if OPTIONS.separate:
        tl.store(partial + 4 * count, state.members.maximum, mask=there)
        tl.store(partial + 5 * count, state.members.total, mask=there)
        tl.store(partial + 6 * count, state.members.moment, mask=there)
