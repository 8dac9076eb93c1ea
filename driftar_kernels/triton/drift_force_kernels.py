"""Kernels of the drifting field (docs/ops/drift.md): normalisers and forces of kept distances.

Distances of a panel of rows lie in memory while all temperatures use them; nothing of their size
is stored per temperature.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .elementary import dot

MIN_SCALE = tl.constexpr(1e-3)
MIN_AFFINITY = tl.constexpr(1e-3)
SELF_DISTANCE = tl.constexpr(100.0)


@triton.jit
def load_scaled(distances, sample, local, row, column, rows, points, scale_source):
    """D = d / scale, 100 more between a sample and itself; +inf outside."""
    inside = (local < rows)[:, None] & (column < points)[None, :]
    at = ((sample * rows + local) * points)[:, None] + column[None, :]
    distance = tl.load(distances + at, mask=inside, other=float("inf"))
    scale = tl.load(scale_source)
    scale = tl.where(scale < MIN_SCALE, MIN_SCALE, scale)
    return distance / scale + tl.where(row[:, None] == column[None, :], SELF_DISTANCE, 0.0)


@triton.jit(do_not_specialize=["points", "generated", "first_row", "rows", "tiles"])
def normaliser_kernel(
    distances,  # [B, rows, M]: rows [first_row, first_row + rows)
    scale,  # scalar
    inverse,  # [T] inverse temperatures
    row_lse,  # [B, T, N], out
    column_least,  # [B, tiles, M], out: least D of each tile of rows
    column_sum,  # [B, tiles, T, M], out: sum of exp((least - D) / R)
    temperatures,
    points,
    generated,
    first_row,
    rows,
    tiles,
    TEMPERATURES: tl.constexpr,  # padded
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    row_blocks = tl.cdiv(rows, ROWS)
    block = tl.program_id(0) % row_blocks
    sample = (tl.program_id(0) // row_blocks).to(tl.int64)
    local = block * ROWS + tl.arange(0, ROWS)
    row = first_row + local
    slot = sample * tiles + first_row // ROWS + block
    index = tl.arange(0, TEMPERATURES)
    rates = tl.load(inverse + index, mask=index < temperatures, other=1.0)
    least = tl.full([ROWS], float("inf"), tl.float32)
    total = tl.zeros([TEMPERATURES, ROWS], tl.float32)
    for first in range(0, points, COLUMNS):
        column = first + tl.arange(0, COLUMNS)
        scaled = load_scaled(distances, sample, local, row, column, rows, points, scale)
        lower = tl.minimum(least, tl.min(scaled, 1))
        lower_shift = tl.where(lower == float("inf"), 0.0, lower)
        total *= tl.exp((lower_shift - least)[None, :] * rates[:, None])
        least = lower
        column_lower = tl.min(scaled, 0)
        column_shift = tl.where(column_lower == float("inf"), 0.0, column_lower)
        in_columns = column < points
        tl.store(column_least + slot * points + column, column_lower, mask=in_columns)
        for t in range(0, temperatures):
            rate = tl.load(inverse + t)
            row_part = tl.sum(tl.exp((lower_shift[:, None] - scaled) * rate), 1)
            total += tl.where((index == t)[:, None], row_part[None, :], 0.0)
            column_part = tl.sum(tl.exp((column_shift[None, :] - scaled) * rate), 0)
            target = column_sum + (slot * temperatures + t) * points + column
            tl.store(target, column_part, mask=in_columns)
    lse = tl.log(total) - least[None, :] * rates[:, None]
    at = (sample * temperatures + index)[:, None] * generated + row[None, :]
    inside = (index < temperatures)[:, None] & (local < rows)[None, :]
    tl.store(row_lse + at, lse, mask=inside)


@triton.jit(do_not_specialize=["points", "tiles"])
def column_kernel(
    column_least,  # [B, tiles, M]
    column_sum,  # [B, tiles, T, M]
    inverse,  # [T]
    column_lse,  # [B, T, M], out
    temperatures,
    points,
    tiles,
    TEMPERATURES: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Merges the tiles in order."""
    blocks = tl.cdiv(points, COLUMNS)
    column = tl.program_id(0) % blocks * COLUMNS + tl.arange(0, COLUMNS)
    sample = (tl.program_id(0) // blocks).to(tl.int64)
    in_columns = column < points
    index = tl.arange(0, TEMPERATURES)
    there = (index < temperatures)[:, None] & in_columns[None, :]
    rates = tl.load(inverse + index, mask=index < temperatures, other=1.0)[:, None]
    least = tl.full([COLUMNS], float("inf"), tl.float32)
    for tile in range(0, tiles):
        at = column_least + (sample * tiles + tile) * points + column
        least = tl.minimum(least, tl.load(at, mask=in_columns, other=0.0))
    total = tl.zeros([TEMPERATURES, COLUMNS], tl.float32)
    for tile in range(0, tiles):
        slot = sample * tiles + tile
        lower = tl.load(column_least + slot * points + column, mask=in_columns, other=0.0)
        at = (slot * temperatures + index)[:, None] * points + column[None, :]
        part = tl.load(column_sum + at, mask=there, other=1.0)
        total += part * tl.exp((least - lower)[None, :] * rates)
    lse = tl.log(total) - least[None, :] * rates
    at = (sample * temperatures + index)[:, None] * points + column[None, :]
    tl.store(column_lse + at, lse, mask=there)


@triton.jit
def weighted_points(
    first,
    last,
    centred,
    weight,
    distances,
    column_lse,
    scale,
    half_row,
    rate,
    sample,
    local,
    row,
    rows,
    points,
    features,
    feature,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    FEATURES: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """sum_j a_ij y_j and sum_j a_ij over the points [first, last)."""
    acc = tl.zeros([ROWS, FEATURES], tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    for start in range(first, last, COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        inside = column < last
        scaled = load_scaled(distances, sample, local, row, column, rows, points, scale)
        column_half = 0.5 * tl.load(column_lse + column, mask=inside, other=0.0)
        affinity = tl.exp(-scaled * rate - half_row[:, None] - column_half[None, :])
        affinity = tl.where(affinity < MIN_AFFINITY, MIN_AFFINITY, affinity)
        push = tl.load(weight + sample * points + column, mask=inside, other=0.0)
        affinity = tl.where(inside[None, :], affinity * push[None, :], 0.0)
        total += tl.sum(affinity, 1)
        at = ((sample * points + column) * features)[:, None] + feature[None, :]
        there = inside[:, None] & (feature < features)[None, :]
        y = tl.load(centred + at, mask=there, other=0.0)
        acc = dot(affinity, y, acc, PRECISION)
    return acc, total


@triton.jit(do_not_specialize=["batch", "points", "positives", "generated", "first_row", "rows"])
def force_kernel(
    centred,  # [B, M, S]
    weight,  # [B, M]
    distances,  # [B, rows, M]: rows [first_row, first_row + rows)
    scale,  # scalar
    inverse,  # [T]
    row_lse,  # [B, T, N]
    column_lse,  # [B, T, M]
    force,  # [T, B, N, S], out
    partial,  # [T, programs], out: sums of squares
    temperatures,
    batch,
    points,
    positives,
    generated,
    features,
    first_row,
    rows,
    root,  # sqrt(S)
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    FEATURES: tl.constexpr,
    PRECISION: tl.constexpr,
):
    row_blocks = tl.cdiv(rows, ROWS)
    feature_blocks = tl.cdiv(features, FEATURES)
    task = tl.program_id(0)
    t = tl.program_id(1)
    feature = task % feature_blocks * FEATURES + tl.arange(0, FEATURES)
    local = task // feature_blocks % row_blocks * ROWS + tl.arange(0, ROWS)
    sample = (task // feature_blocks // row_blocks).to(tl.int64)
    row = first_row + local
    in_rows = local < rows
    rate = tl.load(inverse + t)
    half_row = 0.5 * tl.load(
        row_lse + (sample * temperatures + t) * generated + row, mask=in_rows, other=0.0
    )
    column_lse += (sample * temperatures + t) * points
    repelling, repulsion = weighted_points(
        0, points - positives, centred, weight, distances, column_lse, scale, half_row, rate,
        sample, local, row, rows, points, features, feature, ROWS, COLUMNS, FEATURES, PRECISION,
    )  # fmt: skip
    attracting, attraction = weighted_points(
        points - positives, points, centred, weight, distances, column_lse, scale, half_row, rate,
        sample, local, row, rows, points, features, feature, ROWS, COLUMNS, FEATURES, PRECISION,
    )  # fmt: skip
    unit = tl.load(scale) / tl.cast(root, tl.float32)
    unit = tl.where(unit < MIN_SCALE, MIN_SCALE, unit)
    raw = (repulsion[:, None] * attracting - attraction[:, None] * repelling) / unit
    inside = in_rows[:, None] & (feature < features)[None, :]
    at = (((t * batch + sample) * generated + row) * features)[:, None] + feature[None, :]
    tl.store(force + at, raw, mask=inside)
    raw = tl.where(inside, raw, 0.0)
    tl.store(partial + t * tl.num_programs(0) + task, tl.sum(tl.sum(raw * raw, 1), 0))
