"""Kernels of the drifting field (docs/ops/drift.md): centring and distances.

The points of a problem are its generated samples, its negatives and its positives, in this order.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .elementary import dot

MIN_DISTANCE = tl.constexpr(1e-4)
# Squared distances below this share of the squared norms lose too much to cancellation.
CLOSE_SHARE = tl.constexpr(0.1)


@triton.jit
def load_part(source, row, count, feature, features, batch, row_stride, column_stride):
    """Rows of one kind of samples, zeros outside."""
    inside = ((row >= 0) & (row < count))[:, None] & (feature < features)[None, :]
    at = row.to(tl.int64)[:, None] * row_stride + feature.to(tl.int64)[None, :] * column_stride
    return tl.load(source + batch + at, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def load_points(
    gen, neg, pos, point, feature, sample, generated, negatives, positives, features,
    gen_batch, gen_row, gen_column, neg_batch, neg_row, neg_column, pos_batch, pos_row, pos_column,
):  # fmt: skip
    """fp32 points [R, F]; each row comes from one of the three parts."""
    return (
        load_part(
            gen, point, generated, feature, features, sample * gen_batch, gen_row, gen_column
        )
        + load_part(
            neg, point - generated, negatives, feature, features, sample * neg_batch, neg_row,
            neg_column,
        )
        + load_part(
            pos, point - generated - negatives, positives, feature, features, sample * pos_batch,
            pos_row, pos_column,
        )
    )  # fmt: skip


@triton.jit(do_not_specialize=["generated", "negatives", "positives"])
def mean_kernel(
    gen,  # [B, N, S]
    neg,  # [B, Q, S]
    pos,  # [B, P, S]
    mean,  # [B, S] fp32, out
    generated,
    negatives,
    positives,
    features,
    gen_batch,
    gen_row,
    gen_column,
    neg_batch,
    neg_row,
    neg_column,
    pos_batch,
    pos_row,
    pos_column,
    POINTS: tl.constexpr,
    FEATURES: tl.constexpr,
):
    blocks = tl.cdiv(features, FEATURES)
    sample = (tl.program_id(0) // blocks).to(tl.int64)
    feature = tl.program_id(0) % blocks * FEATURES + tl.arange(0, FEATURES)
    points = generated + negatives + positives
    total = tl.zeros([FEATURES], tl.float32)
    for first in range(0, points, POINTS):
        x = load_points(
            gen, neg, pos, first + tl.arange(0, POINTS), feature, sample, generated, negatives,
            positives, features, gen_batch, gen_row, gen_column, neg_batch, neg_row, neg_column,
            pos_batch, pos_row, pos_column,
        )  # fmt: skip
        total += tl.sum(x, 0)
    tl.store(mean + sample * features + feature, total / points, mask=feature < features)


@triton.jit(do_not_specialize=["generated", "negatives", "positives"])
def centre_kernel(
    gen,  # [B, N, S]
    neg,  # [B, Q, S]
    pos,  # [B, P, S]
    mean,  # [B, S] fp32
    centred,  # [B, M, S] fp32, out
    norms,  # [B, M] fp32, squared, out
    generated,
    negatives,
    positives,
    features,
    gen_batch,
    gen_row,
    gen_column,
    neg_batch,
    neg_row,
    neg_column,
    pos_batch,
    pos_row,
    pos_column,
    POINTS: tl.constexpr,
    FEATURES: tl.constexpr,
):
    points = generated + negatives + positives
    blocks = tl.cdiv(points, POINTS)
    sample = (tl.program_id(0) // blocks).to(tl.int64)
    point = tl.program_id(0) % blocks * POINTS + tl.arange(0, POINTS)
    at = sample * points + point
    norm = tl.zeros([POINTS], tl.float32)
    for first in range(0, features, FEATURES):
        feature = first + tl.arange(0, FEATURES)
        x = load_points(
            gen, neg, pos, point, feature, sample, generated, negatives, positives, features,
            gen_batch, gen_row, gen_column, neg_batch, neg_row, neg_column, pos_batch, pos_row,
            pos_column,
        )  # fmt: skip
        centre = tl.load(mean + sample * features + feature, mask=feature < features, other=0.0)
        x -= centre[None, :]
        inside = (point < points)[:, None] & (feature < features)[None, :]
        norm += tl.sum(tl.where(inside, x * x, 0.0), 1)
        tl.store(centred + (at * features)[:, None] + feature[None, :], x, mask=inside)
    tl.store(norms + at, norm, mask=point < points)


@triton.jit(do_not_specialize=["points", "first_row", "rows"])
def distance_kernel(
    centred,  # [B, M, S]
    norms,  # [B, M]
    weight,  # [B, M]
    distances,  # [B, rows, M], out: rows [first_row, first_row + rows)
    partial,  # [programs], out: sums of weighted distances
    points,
    features,
    first_row,
    rows,
    STORE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    FEATURES: tl.constexpr,
    PRECISION: tl.constexpr,
):
    row_blocks = tl.cdiv(rows, ROWS)
    column_blocks = tl.cdiv(points, COLUMNS)
    task = tl.program_id(0)
    local = task % row_blocks * ROWS + tl.arange(0, ROWS)
    column = task // row_blocks % column_blocks * COLUMNS + tl.arange(0, COLUMNS)
    sample = (task // row_blocks // column_blocks).to(tl.int64)
    row = first_row + local
    in_rows = local < rows
    in_columns = column < points
    from_row = centred + ((sample * points + row) * features)[:, None]
    from_column = centred + ((sample * points + column) * features)[:, None]
    product = tl.zeros([ROWS, COLUMNS], tl.float32)
    for first in range(0, features, FEATURES):
        feature = first + tl.arange(0, FEATURES)
        there = (feature < features)[None, :]
        a = tl.load(from_row + feature[None, :], mask=in_rows[:, None] & there, other=0.0)
        b = tl.load(from_column + feature[None, :], mask=in_columns[:, None] & there, other=0.0)
        product = dot(a, tl.trans(b), product, PRECISION)
    row_norm = tl.load(norms + sample * points + row, mask=in_rows, other=0.0)
    column_norm = tl.load(norms + sample * points + column, mask=in_columns, other=0.0)
    both = row_norm[:, None] + column_norm[None, :]
    squared = both - 2.0 * product
    inside = in_rows[:, None] & in_columns[None, :]
    itself = row[:, None] == column[None, :]
    close = inside & (itself == 0) & (squared < both * CLOSE_SHARE)
    if tl.max(tl.max(close.to(tl.int32), 1), 0) > 0:
        exact = tl.zeros([ROWS, COLUMNS], tl.float32)
        row_at = centred + (sample * points + row) * features
        column_at = centred + (sample * points + column) * features
        for feature in range(0, features):
            a = tl.load(row_at + feature, mask=in_rows, other=0.0)
            b = tl.load(column_at + feature, mask=in_columns, other=0.0)
            difference = a[:, None] - b[None, :]
            exact += difference * difference
        squared = tl.where(close, exact, squared)
    squared = tl.where(itself & (squared < both * CLOSE_SHARE), 0.0, squared)
    # Comparisons are written so that NaN stays.
    distance = tl.sqrt(tl.where(squared < 0.0, 0.0, squared))
    distance = tl.where(distance < MIN_DISTANCE, MIN_DISTANCE, distance)
    if STORE:
        at = ((sample * rows + local) * points)[:, None] + column[None, :]
        tl.store(distances + at, distance, mask=inside)
    column_weight = tl.load(weight + sample * points + column, mask=in_columns, other=0.0)
    weighted = tl.where(inside, distance * column_weight[None, :], 0.0)
    tl.store(partial + task, tl.sum(tl.sum(weighted, 1), 0))
