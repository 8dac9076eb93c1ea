"""Merges what programs that shared the keys of a row have seen (decoding)."""

from __future__ import annotations

import triton
import triton.language as tl

from .attention_arguments import FAR_BELOW, read_options
from .attention_forward import STATISTICS, nothing_seen, store_rows
from .attention_tile import fp32_units
from .structures import structure


@triton.jit
def merged(partial, count, at, there, splits, exponent, ROWS: tl.constexpr):
    """Statistics of all splits, merged in order."""
    state = nothing_seen(ROWS)
    for slot in range(0, splits):
        source = partial + slot * STATISTICS * count + at
        their_maximum = tl.load(source, mask=there, other=float("-inf"))
        their_total = tl.load(source + count, mask=there, other=0.0)
        their_moment = tl.load(source + 2 * count, mask=there, other=0.0)
        maximum = tl.maximum(state.maximum, their_maximum)
        shift = tl.where(maximum == float("-inf"), 0.0, maximum)
        drop = tl.maximum(state.maximum - shift, FAR_BELOW)
        their_drop = tl.maximum(their_maximum - shift, FAR_BELOW)
        factor = tl.exp2(drop * exponent)
        their_factor = tl.exp2(their_drop * exponent)
        moment = factor * (state.moment + drop * state.total)
        moment += their_factor * (their_moment + their_drop * their_total)
        total = factor * state.total + their_factor * their_total
        state = structure("Statistics")(maximum, total, moment)
    return state


@triton.jit(do_not_specialize=["count", "splits"])
def merge_kernel(
    out, entropy, lse, max_score, entropy_lse, entropy_cross, entropy_norm,  # Results
    partial_out,  # [splits, B, Hq, Lq, Dv] fp32
    partial,  # [splits, STATISTICS, B, Hq, Lq] fp32
    score_unit, natural_unit, exponent_unit,
    count,  # B Hq Lq
    splits,
    ROWS: tl.constexpr,
    option_text: tl.constexpr,
):  # fmt: skip
    OPTIONS: tl.constexpr = read_options(option_text)
    units = fp32_units(score_unit, natural_unit, exponent_unit)
    results = structure("Results")(
        out, entropy, lse, max_score, entropy_lse, entropy_cross, entropy_norm
    )
    at = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    there = at < count
    count = tl.cast(count, tl.int64)
    visible = merged(partial, count, at, there, splits, units.exponent, ROWS)
    members = visible
    if OPTIONS.separate:
        members = merged(partial + 4 * count, count, at, there, splits, units.exponent, ROWS)
    column = tl.arange(0, OPTIONS.block_value)
    inside = there[:, None] & (column < OPTIONS.value_width)[None, :]
    shift = tl.where(visible.maximum == float("-inf"), 0.0, visible.maximum)
    support = tl.zeros([ROWS], tl.float32)
    total = tl.zeros([ROWS, OPTIONS.block_value], tl.float32)
    for slot in range(0, splits):
        source = partial + slot * STATISTICS * count + at
        drop = tl.load(source, mask=there, other=float("-inf")) - shift
        support += tl.load(source + 3 * count, mask=there, other=0.0)
        weight = tl.exp2(tl.maximum(drop, FAR_BELOW) * units.exponent)
        part = ((slot * count + at) * OPTIONS.value_width)[:, None] + column[None, :]
        total += weight[:, None] * tl.load(partial_out + part, mask=inside, other=0.0)
    state = structure("State")(visible, members, support.to(tl.int32), total)
    store_rows(at, there, state, results, units, OPTIONS)
