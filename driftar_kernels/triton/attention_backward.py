"""Backward kernels of attention: one for the queries, one for keys and values; no atomics.

Scores are computed again from the saved log-sum-exps. Formulas: docs/ops/attention.md. Entropy of
the head-averaged map: attention_map.py.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .attention_arguments import read_options
from .attention_gradient import (
    load_row_gradients,
    score_gradient,
    store_delta,
    store_tile,
    without_nan,
)
from .attention_tile import (
    fp32_units,
    inner_products,
    load_block,
    locate_rows,
    row_bounds,
    rows_that_see,
    run_time_sizes,
    score_tile,
    seen_by_all,
    visible_keys,
    whole,
)
from .elementary import dot, narrow
from .structures import structure


@triton.jit
def accumulate_queries(
    first,
    last,
    grad_query,  # [R, BLOCK_WIDTH]
    queries,
    gradients,  # Block of grad_out
    rows,
    row_gradients,
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
    """Adds what the keys [first, last) contribute to dS K."""
    for start in range(first, last, OPTIONS.columns):
        column = start + tl.arange(0, OPTIONS.columns)
        there = column < sample.end
        keys = load_block(key, sample.index, key_head, column, there, False, OPTIONS)
        values = load_block(value, sample.index, key_head, column, there, True, OPTIONS)
        scores = score_tile(
            queries, keys, rows, column, sample, hiding, units, CHECKED, False, OPTIONS
        )
        grad_probability = inner_products(
            gradients, values, OPTIONS.value_width, OPTIONS.chunk, OPTIONS.precision
        )
        _, gradient = score_gradient(
            scores, grad_probability, scores, column, row_gradients, sizes, units, CHECKED, False,
            OPTIONS,
        )  # fmt: skip
        tile = whole(keys, OPTIONS.width, OPTIONS.block_width, OPTIONS.chunk)
        tile = without_nan(tile, CHECKED, OPTIONS)
        grad_query = dot(narrow(gradient, tile.dtype), tile, grad_query, OPTIONS.precision)
    return grad_query


@triton.jit(do_not_specialize=["query_length", "key_length", "query_offset", "entropy_from"])
def query_gradient_kernel(
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
    grad_query,  # [B, Hq, Lq, D], out
    key_heads, query_length, key_length, query_offset, entropy_from,
    scale,
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
    end = tl.max(row_bounds(rows, sample, OPTIONS), 0)
    full = tl.minimum(seen_by_all(first_row // OPTIONS.group, sample, OPTIONS), end)
    full = full // OPTIONS.columns * OPTIONS.columns
    queries = load_block(query, sample.index, rows.head, rows.position, rows.there, False, OPTIONS)
    gradients = load_block(
        grad_out, sample.index, rows.head, rows.position, rows.there, True, OPTIONS
    )
    delta = store_delta(gradients, out, grad_lse, rows, saved, OPTIONS)
    row_gradients = load_row_gradients(saved, delta, rows, sample, sizes, OPTIONS)

    acc = tl.zeros([OPTIONS.rows, OPTIONS.block_width], tl.float32)
    acc = accumulate_queries(
        0, full, acc, queries, gradients, rows, row_gradients, key, value, key_head, sample,
        hiding, sizes, units, False, OPTIONS,
    )  # fmt: skip
    acc = accumulate_queries(
        full, end, acc, queries, gradients, rows, row_gradients, key, value, key_head, sample,
        hiding, sizes, units, True, OPTIONS,
    )  # fmt: skip
    # Products carry the sign of the scale.
    store_tile(
        grad_query,
        rows.at,
        rows.there,
        acc * tl.cast(scale, tl.float32),
        OPTIONS.width,
        OPTIONS.block_width,
    )


@triton.jit
def accumulate_keys(
    first,
    last,
    grad_keys,  # [C, BLOCK_WIDTH]
    grad_values,  # [C, BLOCK_VALUE]
    keys,
    values,
    column,
    query,
    grad_out,
    saved,
    key_head,
    sample,
    hiding,
    sizes,
    units,
    CHECKED: tl.constexpr,
    OPTIONS: tl.constexpr,
):
    """Adds what the packed rows [first, last) contribute to dS^T Q and p^T grad_out."""
    for start in range(first, last, OPTIONS.rows):
        rows = locate_rows(
            start + tl.arange(0, OPTIONS.rows), key_head * OPTIONS.group, sample.index, sizes,
            OPTIONS.group, OPTIONS,
        )  # fmt: skip
        queries = load_block(
            query, sample.index, rows.head, rows.position, rows.there, False, OPTIONS
        )
        gradients = load_block(
            grad_out, sample.index, rows.head, rows.position, rows.there, True, OPTIONS
        )
        scores = score_tile(
            queries, keys, rows, column, sample, hiding, units, CHECKED, True, OPTIONS
        )
        grad_probability = inner_products(
            values, gradients, OPTIONS.value_width, OPTIONS.chunk, OPTIONS.precision
        )
        delta = tl.load(saved.delta + rows.at, mask=rows.there, other=0.0)
        row_gradients = load_row_gradients(saved, delta, rows, sample, sizes, OPTIONS)
        probability, gradient = score_gradient(
            scores, grad_probability, scores, column, row_gradients, sizes, units, CHECKED, True,
            OPTIONS,
        )  # fmt: skip
        tile = whole(gradients, OPTIONS.value_width, OPTIONS.block_value, OPTIONS.chunk)
        grad_values = dot(narrow(probability, tile.dtype), tile, grad_values, OPTIONS.precision)
        tile = whole(queries, OPTIONS.width, OPTIONS.block_width, OPTIONS.chunk)
        tile = without_nan(tile, CHECKED, OPTIONS)
        grad_keys = dot(narrow(gradient, tile.dtype), tile, grad_keys, OPTIONS.precision)
    return grad_keys, grad_values


@triton.jit(do_not_specialize=["query_length", "key_length", "query_offset", "entropy_from"])
def key_gradient_kernel(
    query, q_batch, q_head, q_row, q_column,  # Matrix [B, Hq, Lq, D]
    key, k_batch, k_head, k_row, k_column,  # Matrix [B, Hkv, Lk, D]
    value, v_batch, v_head, v_row, v_column,  # Matrix [B, Hkv, Lk, Dv]
    grad_out, g_batch, g_head, g_row, g_column,  # Matrix [B, Hq, Lq, Dv]
    mask, m_batch, m_head, m_row, m_column,  # Matrix [B, Hq, Lq, Lk]
    query_offsets, key_lengths, ancestors, tree_stride, words,  # the rest of Hiding
    score_unit, natural_unit, exponent_unit,
    lse, entropy_lse, entropy_cross, entropy_weight, delta,  # Saved
    grad_key,  # [B, Hkv, Lk, D], out
    grad_value,  # [B, Hkv, Lk, Dv], out
    key_heads, query_length, key_length, query_offset, entropy_from,
    scale,
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
    task = tl.program_id(0)
    start = task % blocks * OPTIONS.columns
    key_head = task // blocks % key_heads
    index = (task // blocks // key_heads).to(tl.int64)
    sample = structure("Sample")(index, *visible_keys(index, hiding, sizes, OPTIONS))
    column = start + tl.arange(0, OPTIONS.columns)
    there = column < sample.end
    keys = load_block(key, sample.index, key_head, column, there, False, OPTIONS)
    values = load_block(value, sample.index, key_head, column, there, True, OPTIONS)

    begin, full, end = rows_that_see(start, sample, sizes, OPTIONS.group, OPTIONS)
    grad_keys = tl.zeros([OPTIONS.columns, OPTIONS.block_width], tl.float32)
    grad_values = tl.zeros([OPTIONS.columns, OPTIONS.block_value], tl.float32)
    grad_keys, grad_values = accumulate_keys(
        begin, full, grad_keys, grad_values, keys, values, column, query, grad_out, saved,
        key_head, sample, hiding, sizes, units, True, OPTIONS,
    )  # fmt: skip
    grad_keys, grad_values = accumulate_keys(
        full, end, grad_keys, grad_values, keys, values, column, query, grad_out, saved,
        key_head, sample, hiding, sizes, units, False, OPTIONS,
    )  # fmt: skip
    at = (index * key_heads + key_head) * key_length + column
    there = column < key_length
    store_tile(
        grad_key,
        at,
        there,
        grad_keys * tl.cast(scale, tl.float32),
        OPTIONS.width,
        OPTIONS.block_width,
    )
    store_tile(grad_value, at, there, grad_values, OPTIONS.value_width, OPTIONS.block_value)
