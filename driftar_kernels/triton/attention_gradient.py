"""What the backward kernels of attention share: gradients of a tile of scores.

Formulas: docs/ops/attention.md.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .attention_arguments import FAR_BELOW, LOG2E, MAP_ENTROPY, NO_ENTROPY, NO_MASK
from .attention_tile import load_lse, load_tile, of_keys, of_rows, whole
from .elementary import is_finite, narrow
from .structures import structure


@triton.jit
def store_delta(gradients, out, grad_lse, rows, saved, OPTIONS: tl.constexpr):
    """Computes delta of rows whose Block of grad_out is given, and keeps it for the key kernel."""
    upstream = whole(gradients, OPTIONS.value_width, OPTIONS.block_value, OPTIONS.chunk)
    at = out + rows.at * OPTIONS.value_width
    outputs = load_tile(at, rows.there, 1, 0, OPTIONS.value_width, OPTIONS.block_value)
    delta = tl.sum(upstream.to(tl.float32) * outputs.to(tl.float32), 1)
    delta -= tl.load(grad_lse + rows.at, mask=rows.there, other=0.0)
    tl.store(saved.delta + rows.at, delta, mask=rows.there)
    return delta


@triton.jit
def load_row_gradients(saved, delta, rows, sample, sizes, OPTIONS: tl.constexpr):
    lse = load_lse(saved.lse + rows.at, rows.there)
    entropy_lse, cross, weight = lse, lse, lse
    if OPTIONS.entropy != NO_ENTROPY:
        entropy_lse = load_lse(saved.entropy_lse + rows.at, rows.there)
        cross = tl.load(saved.entropy_cross + rows.at, mask=rows.there, other=0.0)
        if OPTIONS.entropy == MAP_ENTROPY:
            at = saved.entropy_weight + sample.index * sizes.queries + rows.position
            weight = tl.load(at, mask=rows.there, other=0.0) / (sizes.key_heads * OPTIONS.group)
        else:
            weight = tl.load(saved.entropy_weight + rows.at, mask=rows.there, other=0.0)
    return structure("RowGradients")(lse, delta, entropy_lse, cross, weight)


@triton.jit
def score_gradient(
    scores,
    grad_probability,  # <grad_out, v>
    logarithm,  # log pi of the head-averaged map; anything elsewhere
    column,  # [C]
    row_gradients,
    sizes,
    units,
    CHECKED: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    OPTIONS: tl.constexpr,
):
    """Probabilities p and dS = p (<grad_out, v> - delta) - w q (log pi - c) of a tile."""
    natural = scores * units.natural
    below = natural - of_rows(row_gradients.lse, TRANSPOSED)
    probability = tl.exp2(below * LOG2E)
    gradient = probability * (grad_probability - of_rows(row_gradients.delta, TRANSPOSED))
    if OPTIONS.entropy != NO_ENTROPY:
        share = probability
        member = of_keys(column >= sizes.entropy_from, TRANSPOSED)
        if OPTIONS.separate or OPTIONS.entropy == MAP_ENTROPY:
            entropy_lse = of_rows(row_gradients.entropy_lse, TRANSPOSED)
            below = tl.where(member, natural - entropy_lse, float("-inf"))
            share = tl.exp2(below * LOG2E)
        if OPTIONS.entropy != MAP_ENTROPY:
            # 0 * -inf would be NaN where a probability underflows.
            logarithm = tl.maximum(below, FAR_BELOW, propagate_nan=tl.PropagateNan.ALL)
        above = logarithm - of_rows(row_gradients.cross, TRANSPOSED)
        entropic = of_rows(row_gradients.weight, TRANSPOSED) * share * above
        if OPTIONS.entropy == MAP_ENTROPY:  # the average may overflow where it does not count
            entropic = tl.where(member, entropic, 0.0)
        gradient -= entropic
    if CHECKED or OPTIONS.mask != NO_MASK:  # rather than multiplied: what is hidden may be NaN
        probability = tl.where(scores == float("-inf"), 0.0, probability)
        gradient = tl.where(scores == float("-inf"), 0.0, gradient)
    return probability, gradient


@triton.jit
def without_nan(x, CHECKED: tl.constexpr, OPTIONS: tl.constexpr):
    """The vectors that multiply a tile of gradients. These are 0 where hidden, and 0 times NaN
    would be NaN; where NaN is seen the gradients are NaN already."""
    if CHECKED or OPTIONS.mask != NO_MASK:
        x = tl.where(is_finite(x), x, tl.zeros_like(x))
    return x


@triton.jit
def store_tile(base, at, there, tile, WIDTH: tl.constexpr, PADDED: tl.constexpr):
    """Rows ``at`` of a contiguous matrix."""
    column = tl.arange(0, PADDED)
    inside = there[:, None] & (column < WIDTH)[None, :]
    tile = narrow(tile, base.dtype.element_ty)
    tl.store(base + (at * WIDTH)[:, None] + column[None, :], tile, mask=inside)
