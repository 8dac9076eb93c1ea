"""Kernels of the entropy of the head-averaged map, pi = mean over heads of softmax over E.

A program owns all heads of a tile: the average is computed once and every head reads it. Formulas:
docs/ops/attention.md.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .attention_arguments import LOG2E, read_options
from .attention_forward import support_norm
from .attention_gradient import (
    load_row_gradients,
    score_gradient,
    store_delta,
    without_nan,
)
from .attention_tile import (
    fp32_units,
    inner_products,
    load_block,
    load_lse,
    locate_rows,
    of_rows,
    row_bounds,
    rows_that_see,
    run_time_sizes,
    score_tile,
    visible_keys,
    whole,
)
from .elementary import dot, narrow
from .structures import structure


@triton.jit
def head_scores(
    head,
    rows,  # of this head
    query,
    key,
    column,
    sample,
    hiding,
    units,
    TRANSPOSED: tl.constexpr,
    OPTIONS: tl.constexpr,
):
    """(queries, keys, scores) of one head's tile."""
    queries = load_block(query, sample.index, head, rows.position, rows.there, False, OPTIONS)
    keys = load_block(
        key, sample.index, head // OPTIONS.group, column, column < sample.end, False, OPTIONS
    )
    scores = score_tile(
        queries, keys, rows, column, sample, hiding, units, True, TRANSPOSED, OPTIONS
    )
    return queries, keys, scores


@triton.jit
def average_logarithm(
    query,
    key,
    entropy_lse,  # [B, Hq, Lq]
    position,
    column,
    sample,
    hiding,
    sizes,
    units,
    TRANSPOSED: tl.constexpr,
    OPTIONS: tl.constexpr,
):
    """log pi: [R, C], or [C, R] transposed."""
    heads = sizes.key_heads * OPTIONS.group
    if TRANSPOSED:
        average = tl.zeros([OPTIONS.columns, OPTIONS.rows], tl.float32)
    else:
        average = tl.zeros([OPTIONS.rows, OPTIONS.columns], tl.float32)
    for head in range(0, heads):
        rows = locate_rows(position, head, sample.index, sizes, 1, OPTIONS)
        _, _, scores = head_scores(
            head, rows, query, key, column, sample, hiding, units, TRANSPOSED, OPTIONS
        )
        lse = load_lse(entropy_lse + rows.at, rows.there)
        average += tl.exp2((scores * units.natural - of_rows(lse, TRANSPOSED)) * LOG2E)
    # Below the smallest normal number the share of the entropy is below rounding.
    average = tl.maximum(average / heads, 1e-37, propagate_nan=tl.PropagateNan.ALL)
    return tl.log(average)


@triton.jit(do_not_specialize=["query_length", "key_length", "query_offset", "entropy_from"])
def map_kernel(
    query, q_batch, q_head, q_row, q_column,  # Matrix [B, Hq, Lq, D]
    key, k_batch, k_head, k_row, k_column,  # Matrix [B, Hkv, Lk, D]
    mask, m_batch, m_head, m_row, m_column,  # Matrix [B, Hq, Lq, Lk]
    query_offsets, key_lengths, ancestors, tree_stride, words,  # the rest of Hiding
    score_unit, natural_unit, exponent_unit,
    entropy,  # [B, Lq], out
    entropy_lse,  # [B, Hq, Lq]
    entropy_cross,  # [B, Hq, Lq], |E| of every head; out: sum_j q_hj log pi_j
    entropy_norm,  # [B, Lq], out
    key_heads, query_length, key_length, query_offset, entropy_from,
    HEADS: tl.constexpr,  # padded
    option_text: tl.constexpr,
):  # fmt: skip
    """Second pass of the forward: entropies, their norm, and sum_j q_hj log pi_j of every head."""
    OPTIONS: tl.constexpr = read_options(option_text)
    query = structure("Matrix")(query, q_batch, q_head, q_row, q_column)
    key = structure("Matrix")(key, k_batch, k_head, k_row, k_column)
    mask = structure("Matrix")(mask, m_batch, m_head, m_row, m_column)
    hiding = structure("Hiding")(mask, query_offsets, key_lengths, ancestors, tree_stride, words)
    units = fp32_units(score_unit, natural_unit, exponent_unit)
    sizes = run_time_sizes(key_heads, query_length, key_length, query_offset, entropy_from)
    heads = key_heads * OPTIONS.group
    blocks = tl.cdiv(query_length, OPTIONS.rows)
    index = (tl.program_id(0) // blocks).to(tl.int64)
    sample = structure("Sample")(index, *visible_keys(index, hiding, sizes, OPTIONS))
    position = tl.program_id(0) % blocks * OPTIONS.rows + tl.arange(0, OPTIONS.rows)
    rows = locate_rows(position, 0, index, sizes, 1, OPTIONS)

    head = tl.arange(0, HEADS)
    at = rows.at[None, :] + head[:, None] * query_length
    inside = (head < heads)[:, None] & rows.there[None, :]
    support = tl.max(tl.load(entropy_cross + at, mask=inside, other=0.0), 0)
    cross = tl.zeros([HEADS, OPTIONS.rows], tl.float32)
    first = entropy_from // OPTIONS.columns * OPTIONS.columns
    for start in range(first, tl.max(row_bounds(rows, sample, OPTIONS), 0), OPTIONS.columns):
        column = start + tl.arange(0, OPTIONS.columns)
        logarithm = average_logarithm(
            query, key, entropy_lse, position, column, sample, hiding, sizes, units, False,
            OPTIONS,
        )  # fmt: skip
        for h in range(0, heads):
            of_head = locate_rows(position, h, index, sizes, 1, OPTIONS)
            _, _, scores = head_scores(
                h, of_head, query, key, column, sample, hiding, units, False, OPTIONS
            )
            lse = load_lse(entropy_lse + of_head.at, of_head.there)
            share = tl.exp2((scores * units.natural - lse[:, None]) * LOG2E) * logarithm
            share = tl.where((column >= entropy_from)[None, :], share, 0.0)
            cross += tl.where((head == h)[:, None], tl.sum(share, 1)[None, :], 0.0)
    tl.store(entropy_cross + at, cross, mask=inside)
    average = -tl.sum(cross, 0) / heads
    average = tl.where(average < 0.0, 0.0, average)
    norm = support_norm(support, OPTIONS.normalize)
    at = index * query_length + position
    tl.store(entropy + at, average * norm, mask=rows.there)
    tl.store(entropy_norm + at, norm, mask=rows.there)


@triton.jit
def add_product(base, at, there, left, right, WIDTH: tl.constexpr, OPTIONS: tl.constexpr):
    """Adds left right to rows ``at`` of a contiguous fp32 matrix that this program alone writes."""
    column = tl.arange(0, right.shape[1])
    inside = there[:, None] & (column < WIDTH)[None, :]
    target = base + (at * WIDTH)[:, None] + column[None, :]
    acc = tl.load(target, mask=inside, other=0.0)
    tl.store(target, dot(narrow(left, right.dtype), right, acc, OPTIONS.precision), mask=inside)
    tl.debug_barrier()  # other threads may read these rows next


@triton.jit(do_not_specialize=["query_length", "key_length", "query_offset", "entropy_from"])
def map_query_gradient_kernel(
    query, q_batch, q_head, q_row, q_column,  # Matrix [B, Hq, Lq, D]
    key, k_batch, k_head, k_row, k_column,  # Matrix [B, Hkv, Lk, D]
    value, v_batch, v_head, v_row, v_column,  # Matrix [B, Hkv, Lk, Dv]
    grad_out, g_batch, g_head, g_row, g_column,  # Matrix [B, Hq, Lq, Dv]
    mask, m_batch, m_head, m_row, m_column,  # Matrix [B, Hq, Lq, Lk]
    query_offsets, key_lengths, ancestors, tree_stride, words,  # the rest of Hiding
    score_unit, natural_unit, exponent_unit,
    lse, entropy_lse, entropy_cross, entropy_weight, delta,  # Saved
    out,  # [B, Hq, Lq, Dv]
    grad_lse,  # [B, Hq, Lq]
    grad_query,  # [B, Hq, Lq, D] fp32 zeros; out: the gradient without the size of the scale
    key_heads, query_length, key_length, query_offset, entropy_from,
    option_text: tl.constexpr,
):  # fmt: skip
    OPTIONS: tl.constexpr = read_options(option_text)
    query = structure("Matrix")(query, q_batch, q_head, q_row, q_column)
    key = structure("Matrix")(key, k_batch, k_head, k_row, k_column)
    value = structure("Matrix")(value, v_batch, v_head, v_row, v_column)
    grad_out = structure("Matrix")(grad_out, g_batch, g_head, g_row, g_column)
    mask = structure("Matrix")(mask, m_batch, m_head, m_row, m_column)
    hiding = structure("Hiding")(mask, query_offsets, key_lengths, ancestors, tree_stride, words)
    units = fp32_units(score_unit, natural_unit, exponent_unit)
    saved = structure("Saved")(lse, entropy_lse, entropy_cross, entropy_weight, delta)
    sizes = run_time_sizes(key_heads, query_length, key_length, query_offset, entropy_from)
    heads = key_heads * OPTIONS.group
    blocks = tl.cdiv(query_length, OPTIONS.rows)
    index = (tl.program_id(0) // blocks).to(tl.int64)
    sample = structure("Sample")(index, *visible_keys(index, hiding, sizes, OPTIONS))
    position = tl.program_id(0) % blocks * OPTIONS.rows + tl.arange(0, OPTIONS.rows)
    for head in range(0, heads):
        rows = locate_rows(position, head, index, sizes, 1, OPTIONS)
        gradients = load_block(grad_out, sample.index, head, position, rows.there, True, OPTIONS)
        store_delta(gradients, out, grad_lse, rows, saved, OPTIONS)
    tl.debug_barrier()
    bound = row_bounds(locate_rows(position, 0, index, sizes, 1, OPTIONS), sample, OPTIONS)
    for start in range(0, tl.max(bound, 0), OPTIONS.columns):
        column = start + tl.arange(0, OPTIONS.columns)
        logarithm = average_logarithm(
            query, key, saved.entropy_lse, position, column, sample, hiding, sizes, units, False,
            OPTIONS,
        )  # fmt: skip
        for head in range(0, heads):
            rows = locate_rows(position, head, index, sizes, 1, OPTIONS)
            _, keys, scores = head_scores(
                head, rows, query, key, column, sample, hiding, units, False, OPTIONS
            )
            gradients = load_block(
                grad_out, sample.index, head, position, rows.there, True, OPTIONS
            )
            values = load_block(
                value, sample.index, head // OPTIONS.group, column, keys.there, True, OPTIONS
            )
            grad_probability = inner_products(
                gradients, values, OPTIONS.value_width, OPTIONS.chunk, OPTIONS.precision
            )
            dot_product = tl.load(saved.delta + rows.at, mask=rows.there, other=0.0)
            row_gradients = load_row_gradients(saved, dot_product, rows, sample, sizes, OPTIONS)
            _, gradient = score_gradient(
                scores, grad_probability, logarithm, column, row_gradients, sizes, units, True,
                False, OPTIONS,
            )  # fmt: skip
            tile = whole(keys, OPTIONS.width, OPTIONS.block_width, OPTIONS.chunk)
            tile = without_nan(tile, True, OPTIONS)
            add_product(grad_query, rows.at, rows.there, gradient, tile, OPTIONS.width, OPTIONS)


@triton.jit(do_not_specialize=["query_length", "key_length", "query_offset", "entropy_from"])
def map_key_gradient_kernel(
    query, q_batch, q_head, q_row, q_column,  # Matrix [B, Hq, Lq, D]
    key, k_batch, k_head, k_row, k_column,  # Matrix [B, Hkv, Lk, D]
    value, v_batch, v_head, v_row, v_column,  # Matrix [B, Hkv, Lk, Dv]
    grad_out, g_batch, g_head, g_row, g_column,  # Matrix [B, Hq, Lq, Dv]
    mask, m_batch, m_head, m_row, m_column,  # Matrix [B, Hq, Lq, Lk]
    query_offsets, key_lengths, ancestors, tree_stride, words,  # the rest of Hiding
    score_unit, natural_unit, exponent_unit,
    lse, entropy_lse, entropy_cross, entropy_weight, delta,  # Saved
    grad_key,  # [B, Hkv, Lk, D] fp32 zeros; out: the gradient without the size of the scale
    grad_value,  # [B, Hkv, Lk, Dv] fp32 zeros, out
    key_heads, query_length, key_length, query_offset, entropy_from,
    option_text: tl.constexpr,
):  # fmt: skip
    OPTIONS: tl.constexpr = read_options(option_text)
    query = structure("Matrix")(query, q_batch, q_head, q_row, q_column)
    key = structure("Matrix")(key, k_batch, k_head, k_row, k_column)
    value = structure("Matrix")(value, v_batch, v_head, v_row, v_column)
    grad_out = structure("Matrix")(grad_out, g_batch, g_head, g_row, g_column)
    mask = structure("Matrix")(mask, m_batch, m_head, m_row, m_column)
    hiding = structure("Hiding")(mask, query_offsets, key_lengths, ancestors, tree_stride, words)
    units = fp32_units(score_unit, natural_unit, exponent_unit)
    saved = structure("Saved")(lse, entropy_lse, entropy_cross, entropy_weight, delta)
    sizes = run_time_sizes(key_heads, query_length, key_length, query_offset, entropy_from)
    blocks = tl.cdiv(key_length, OPTIONS.columns)
    start = tl.program_id(0) % blocks * OPTIONS.columns
    index = (tl.program_id(0) // blocks).to(tl.int64)
    sample = structure("Sample")(index, *visible_keys(index, hiding, sizes, OPTIONS))
    column = start + tl.arange(0, OPTIONS.columns)
    begin, _, end = rows_that_see(start, sample, sizes, 1, OPTIONS)
    for first in range(begin, end, OPTIONS.rows):
        position = first + tl.arange(0, OPTIONS.rows)
        logarithm = average_logarithm(
            query, key, saved.entropy_lse, position, column, sample, hiding, sizes, units, True,
            OPTIONS,
        )  # fmt: skip
        for head in range(0, key_heads * OPTIONS.group):
            rows = locate_rows(position, head, index, sizes, 1, OPTIONS)
            queries, keys, scores = head_scores(
                head, rows, query, key, column, sample, hiding, units, True, OPTIONS
            )
            gradients = load_block(
                grad_out, sample.index, head, position, rows.there, True, OPTIONS
            )
            key_head = head // OPTIONS.group
            values = load_block(value, sample.index, key_head, column, keys.there, True, OPTIONS)
            grad_probability = inner_products(
                values, gradients, OPTIONS.value_width, OPTIONS.chunk, OPTIONS.precision
            )
            dot_product = tl.load(saved.delta + rows.at, mask=rows.there, other=0.0)
            row_gradients = load_row_gradients(saved, dot_product, rows, sample, sizes, OPTIONS)
            probability, gradient = score_gradient(
                scores, grad_probability, logarithm, column, row_gradients, sizes, units, True,
                True, OPTIONS,
            )  # fmt: skip
            at = (index * key_heads + key_head) * key_length + column
            tile = whole(gradients, OPTIONS.value_width, OPTIONS.block_value, OPTIONS.chunk)
            add_product(grad_value, at, keys.there, probability, tile, OPTIONS.value_width, OPTIONS)
            tile = whole(queries, OPTIONS.width, OPTIONS.block_width, OPTIONS.chunk)
            tile = without_nan(tile, True, OPTIONS)
            add_product(grad_key, at, keys.there, gradient, tile, OPTIONS.width, OPTIONS)
