"""Kernels of the entropy of the head-averaged map, pi = mean over heads of softmax over E.

A program owns all heads of a tile: the average is computed once and every head reads it. Formulas:
docs/ops/attention.md.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .attention_arguments import LOG2E, Sizes
from .attention_forward import support_norm
from .attention_gradient import (
    load_row_gradients,
    score_gradient,
    store_delta,
    without_nan,
)
from .attention_tile import (
    inner_products,
    load_block,
    load_lse,
    load_sample,
    locate_rows,
    of_rows,
    rows_that_see,
    score_tile,
    whole,
)
from .elementary import dot, narrow


@triton.jit
def head_scores(
    head,
    query,
    key,
    position,
    column,
    sample,
    hiding,
    sizes,
    units,
    TRANSPOSED: tl.constexpr,
    OPTIONS: tl.constexpr,
):
    """(rows, queries, keys, scores) of one head's tile."""
    rows = locate_rows(position, head, sample, hiding, sizes, 1, OPTIONS)
    queries = load_block(
        query, sample.index, head, position, rows.there, OPTIONS.width, OPTIONS.block_width,
        OPTIONS.chunk,
    )  # fmt: skip
    keys = load_block(
        key, sample.index, head // OPTIONS.group, column, column < sample.end, OPTIONS.width,
        OPTIONS.block_width, OPTIONS.chunk,
    )  # fmt: skip
    scores = score_tile(
        queries, keys, rows, column, sample, hiding, units, True, TRANSPOSED, OPTIONS
    )
    return rows, queries, keys, scores


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
        rows, _, _, scores = head_scores(
            head, query, key, position, column, sample, hiding, sizes, units, TRANSPOSED, OPTIONS
        )
        lse = load_lse(entropy_lse + rows.at, rows.there)
        average += tl.exp2((scores * units.natural - of_rows(lse, TRANSPOSED)) * LOG2E)
    # Below the smallest normal number the share of the entropy is below rounding.
    average = tl.maximum(average / heads, 1e-37, propagate_nan=tl.PropagateNan.ALL)
    return tl.log(average)


@triton.jit(do_not_specialize=["query_length", "key_length", "query_offset", "entropy_from"])
def map_kernel(
    query,  # Matrix [B, Hq, Lq, D]
    key,  # Matrix [B, Hkv, Lk, D]
    hiding,
    units,
    results,  # entropy_cross holds |E| of every head
    key_heads,
    query_length,
    key_length,
    query_offset,
    entropy_from,
    HEADS: tl.constexpr,  # padded
    OPTIONS: tl.constexpr,
):
    """Second pass of the forward: entropies, their norm, and sum_j q_hj log pi_j of every head."""
    sizes = Sizes(key_heads, query_length, key_length, query_offset, entropy_from)
    heads = key_heads * OPTIONS.group
    blocks = tl.cdiv(query_length, OPTIONS.rows)
    sample = load_sample((tl.program_id(0) // blocks).to(tl.int64), hiding, sizes, OPTIONS)
    position = tl.program_id(0) % blocks * OPTIONS.rows + tl.arange(0, OPTIONS.rows)
    rows = locate_rows(position, 0, sample, hiding, sizes, 1, OPTIONS)

    head = tl.arange(0, HEADS)
    at = rows.at[None, :] + head[:, None] * query_length
    inside = (head < heads)[:, None] & rows.there[None, :]
    support = tl.max(tl.load(results.entropy_cross + at, mask=inside, other=0.0), 0)
    cross = tl.zeros([HEADS, OPTIONS.rows], tl.float32)
    first = entropy_from // OPTIONS.columns * OPTIONS.columns
    for start in range(first, tl.max(rows.bound, 0), OPTIONS.columns):
        column = start + tl.arange(0, OPTIONS.columns)
        logarithm = average_logarithm(
            query, key, results.entropy_lse, position, column, sample, hiding, sizes, units, False,
            OPTIONS,
        )  # fmt: skip
        for h in range(0, heads):
            of_head, _, _, scores = head_scores(
                h, query, key, position, column, sample, hiding, sizes, units, False, OPTIONS
            )
            lse = load_lse(results.entropy_lse + of_head.at, of_head.there)
            share = tl.exp2((scores * units.natural - lse[:, None]) * LOG2E) * logarithm
            share = tl.where((column >= entropy_from)[None, :], share, 0.0)
            cross += tl.where((head == h)[:, None], tl.sum(share, 1)[None, :], 0.0)
    tl.store(results.entropy_cross + at, cross, mask=inside)
    entropy = -tl.sum(cross, 0) / heads
    entropy = tl.where(entropy < 0.0, 0.0, entropy)
    norm = support_norm(support, OPTIONS.normalize)
    at = sample.index * query_length + position
    tl.store(results.entropy + at, entropy * norm, mask=rows.there)
    tl.store(results.entropy_norm + at, norm, mask=rows.there)


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
    query,  # Matrix [B, Hq, Lq, D]
    key,  # Matrix [B, Hkv, Lk, D]
    value,  # Matrix [B, Hkv, Lk, Dv]
    grad_out,  # Matrix [B, Hq, Lq, Dv]
    hiding,
    units,
    saved,
    out,  # [B, Hq, Lq, Dv]
    grad_lse,  # [B, Hq, Lq]
    grad_query,  # [B, Hq, Lq, D] fp32 zeros; out: the gradient without the size of the scale
    key_heads,
    query_length,
    key_length,
    query_offset,
    entropy_from,
    OPTIONS: tl.constexpr,
):
    sizes = Sizes(key_heads, query_length, key_length, query_offset, entropy_from)
    heads = key_heads * OPTIONS.group
    blocks = tl.cdiv(query_length, OPTIONS.rows)
    sample = load_sample((tl.program_id(0) // blocks).to(tl.int64), hiding, sizes, OPTIONS)
    position = tl.program_id(0) % blocks * OPTIONS.rows + tl.arange(0, OPTIONS.rows)
    for head in range(0, heads):
        rows = locate_rows(position, head, sample, hiding, sizes, 1, OPTIONS)
        gradients = load_block(
            grad_out, sample.index, head, position, rows.there, OPTIONS.value_width,
            OPTIONS.block_value, OPTIONS.chunk,
        )  # fmt: skip
        store_delta(gradients, out, grad_lse, rows, saved, OPTIONS)
    tl.debug_barrier()
    bound = locate_rows(position, 0, sample, hiding, sizes, 1, OPTIONS).bound
    for start in range(0, tl.max(bound, 0), OPTIONS.columns):
        column = start + tl.arange(0, OPTIONS.columns)
        logarithm = average_logarithm(
            query, key, saved.entropy_lse, position, column, sample, hiding, sizes, units, False,
            OPTIONS,
        )  # fmt: skip
        for head in range(0, heads):
            rows, _, keys, scores = head_scores(
                head, query, key, position, column, sample, hiding, sizes, units, False, OPTIONS
            )
            gradients = load_block(
                grad_out, sample.index, head, position, rows.there, OPTIONS.value_width,
                OPTIONS.block_value, OPTIONS.chunk,
            )  # fmt: skip
            values = load_block(
                value, sample.index, head // OPTIONS.group, column, keys.there,
                OPTIONS.value_width, OPTIONS.block_value, OPTIONS.chunk,
            )  # fmt: skip
            grad_probability = inner_products(
                gradients, values, OPTIONS.value_width, OPTIONS.chunk, OPTIONS.precision
            )
            delta = tl.load(saved.delta + rows.at, mask=rows.there, other=0.0)
            row_gradients = load_row_gradients(saved, delta, rows, sample, sizes, OPTIONS)
            _, gradient = score_gradient(
                scores, grad_probability, logarithm, column, row_gradients, sizes, units, True,
                False, OPTIONS,
            )  # fmt: skip
            tile = whole(keys, OPTIONS.width, OPTIONS.block_width, OPTIONS.chunk)
            tile = without_nan(tile, True, OPTIONS)
            add_product(grad_query, rows.at, rows.there, gradient, tile, OPTIONS.width, OPTIONS)


@triton.jit(do_not_specialize=["query_length", "key_length", "query_offset", "entropy_from"])
def map_key_gradient_kernel(
    query,  # Matrix [B, Hq, Lq, D]
    key,  # Matrix [B, Hkv, Lk, D]
    value,  # Matrix [B, Hkv, Lk, Dv]
    grad_out,  # Matrix [B, Hq, Lq, Dv]
    hiding,
    units,
    saved,
    grad_key,  # [B, Hkv, Lk, D] fp32 zeros; out: the gradient without the size of the scale
    grad_value,  # [B, Hkv, Lk, Dv] fp32 zeros, out
    key_heads,
    query_length,
    key_length,
    query_offset,
    entropy_from,
    OPTIONS: tl.constexpr,
):
    sizes = Sizes(key_heads, query_length, key_length, query_offset, entropy_from)
    blocks = tl.cdiv(key_length, OPTIONS.columns)
    start = tl.program_id(0) % blocks * OPTIONS.columns
    sample = load_sample((tl.program_id(0) // blocks).to(tl.int64), hiding, sizes, OPTIONS)
    column = start + tl.arange(0, OPTIONS.columns)
    begin, _, end = rows_that_see(start, sample, sizes, 1, OPTIONS)
    for first in range(begin, end, OPTIONS.rows):
        position = first + tl.arange(0, OPTIONS.rows)
        logarithm = average_logarithm(
            query, key, saved.entropy_lse, position, column, sample, hiding, sizes, units, True,
            OPTIONS,
        )  # fmt: skip
        for head in range(0, key_heads * OPTIONS.group):
            rows, queries, keys, scores = head_scores(
                head, query, key, position, column, sample, hiding, sizes, units, True, OPTIONS
            )
            gradients = load_block(
                grad_out, sample.index, head, position, rows.there, OPTIONS.value_width,
                OPTIONS.block_value, OPTIONS.chunk,
            )  # fmt: skip
            key_head = head // OPTIONS.group
            values = load_block(
                value, sample.index, key_head, column, keys.there, OPTIONS.value_width,
                OPTIONS.block_value, OPTIONS.chunk,
            )  # fmt: skip
            grad_probability = inner_products(
                values, gradients, OPTIONS.value_width, OPTIONS.chunk, OPTIONS.precision
            )
            delta = tl.load(saved.delta + rows.at, mask=rows.there, other=0.0)
            row_gradients = load_row_gradients(saved, delta, rows, sample, sizes, OPTIONS)
            probability, gradient = score_gradient(
                scores, grad_probability, logarithm, column, row_gradients, sizes, units, True,
                True, OPTIONS,
            )  # fmt: skip
            at = (sample.index * key_heads + key_head) * key_length + column
            tile = whole(gradients, OPTIONS.value_width, OPTIONS.block_value, OPTIONS.chunk)
            add_product(grad_value, at, keys.there, probability, tile, OPTIONS.value_width, OPTIONS)
            tile = whole(queries, OPTIONS.width, OPTIONS.block_width, OPTIONS.chunk)
            tile = without_nan(tile, True, OPTIONS)
            add_product(grad_key, at, keys.there, gradient, tile, OPTIONS.width, OPTIONS)
