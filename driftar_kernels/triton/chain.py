"""Lossless verification of a chain of Gaussians (docs/ops/tree.md).

A lane holds a chain. Its random numbers are those of csrc/common/philox.h: number n of stream b is
a function of (seed, b, n), so the verdicts are those of the C++ kernels.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import _checks
from ..reference.tree import MAX_PROPOSALS
from .elementary import check_like, cosine_of_turns, expm1, is_finite
from .launch import launch
from .tuning import chain_tile


@triton.jit
def uniform(seed, stream, index):
    """In [0, 1), 53 bits; every call of the C++ stream takes half a Philox block."""
    block = index // 2
    stream = stream + index * 0
    w0, w1, w2, w3 = tl.philox(
        seed,
        (block & 0xFFFFFFFF).to(tl.uint32),
        (block >> 32).to(tl.uint32),
        (stream & 0xFFFFFFFF).to(tl.uint32),
        (stream >> 32).to(tl.uint32),
    )
    second = index % 2 == 1
    high = tl.where(second, w2, w0).to(tl.uint64)
    low = tl.where(second, w3, w1).to(tl.uint64)
    return (((high << 32) | low) >> 11).to(tl.float64) * 1.1102230246251565e-16  # 2^-53


@triton.jit
def normal(seed, stream, index):
    """Standard normal by Box and Muller, from numbers ``index`` and ``index + 1``."""
    radius = tl.sqrt(-2.0 * tl.log(1.0 - uniform(seed, stream, index)))
    return radius * cosine_of_turns(uniform(seed, stream, index + 1))


@triton.jit
def chi_squared(seed, stream, index, wanted, freedom):
    """By Marsaglia and Tsang (2000), for more than one degree of freedom; lanes that are not
    ``wanted`` draw nothing. Returns the sample and the advanced index."""
    d = 0.5 * tl.cast(freedom, tl.float64) - 1.0 / 3.0
    c = 1.0 / tl.sqrt(9.0 * d)
    sample = tl.zeros_like(index).to(tl.float64)
    searching = wanted
    while tl.max(searching.to(tl.int32), 0) > 0:
        x = normal(seed, stream, index)
        root = 1.0 + c * x
        positive = root > 0.0
        v = tl.where(positive, root * root * root, 1.0)
        bound = 0.5 * x * x + d - d * v + d * tl.log(v)
        found = searching & positive & (tl.log(1.0 - uniform(seed, stream, index + 2)) < bound)
        sample = tl.where(found, 2.0 * d * v, sample)
        index += tl.where(searching, tl.where(positive, 3, 2), 0)
        searching = searching & (found == 0)
    return sample, index


@triton.jit(do_not_specialize=["batch", "count"])
def chain_kernel(
    draft,  # [B, K, width]
    draft_mean,  # [B, K, width]
    draft_std,  # [B, K]
    target_mean,  # [B, K + 1, width]
    target_std,  # [B, K + 1]
    seed_source,  # [1] int64
    length,  # [B] int64, out
    next_sample,  # [B, width], out
    batch,
    count,
    width,
    FREEDOM: tl.constexpr,  # min(width - 1, 2)
    PROPOSALS: tl.constexpr,
    CHAINS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    chain = tl.program_id(0).to(tl.int64) * CHAINS + tl.arange(0, CHAINS)
    lane = tl.arange(0, COLUMNS)
    there = chain < batch
    seed = tl.load(seed_source)

    # Which positions are accepted, up to the first one that is not.
    accepting = there
    kept = chain * 0
    proper = chain < 0  # the rejected pair has two densities
    for position in range(0, count):
        at_q = chain * count + position
        at_p = at_q + chain
        q_std = tl.load(draft_std + at_q, mask=there, other=1.0).to(tl.float64)
        p_std = tl.load(target_std + at_p, mask=there, other=1.0).to(tl.float64)
        spread = (p_std > 0.0) & (q_std > 0.0)
        p_unit = tl.where(spread, p_std, 1.0)
        q_unit = tl.where(spread, q_std, 1.0)
        twice = chain.to(tl.float64) * 0.0
        spoiled = (chain * 0).to(tl.int32)
        differing = spoiled
        for first in range(0, width, COLUMNS):
            column = first + lane
            inside = there[:, None] & (column < width)[None, :]
            q_at = at_q[:, None] * width + column[None, :]
            p_at = at_p[:, None] * width + column[None, :]
            x = tl.load(draft + q_at, mask=inside, other=0.0).to(tl.float64)
            q_mean = tl.load(draft_mean + q_at, mask=inside, other=0.0).to(tl.float64)
            p_mean = tl.load(target_mean + p_at, mask=inside, other=0.0).to(tl.float64)
            from_q = (x - q_mean) / q_unit[:, None]
            from_p = (x - p_mean) / p_unit[:, None]
            twice += tl.sum((from_q - from_p) * (from_q + from_p), 1)
            finite = is_finite(x) & is_finite(q_mean) & is_finite(p_mean)
            spoiled += tl.sum((finite == 0).to(tl.int32), 1)
            differing += tl.sum(((x != p_mean) | (q_mean != p_mean)).to(tl.int32), 1)
        usable = (spoiled == 0) & is_finite(p_std) & is_finite(q_std)
        usable = usable & (p_std >= 0.0) & (q_std >= 0.0)
        ratio = 0.5 * twice + width * (tl.log(q_unit) - tl.log(p_unit))
        # Strictly less: a ratio that underflows to 0 is never accepted, nor is NaN.
        likely = uniform(seed, chain, chain * 0 + position) < tl.exp(
            tl.where(ratio > 0.0, 0.0, ratio)
        )
        same_point = (p_std == 0.0) & (q_std == 0.0) & (differing == 0)
        accepts = usable & tl.where(spread, likely, same_point)
        proper = proper | (accepting & (accepts == 0) & usable & spread)
        accepting = accepting & accepts
        kept += accepting.to(tl.int64)
    tl.store(length + chain, kept, mask=there)

    # The sample follows the target at `kept`, or where `proper` its residual over the draft:
    # propose x = mean_p + std_p (a e + z), e along mean_p - mean_q and z orthogonal to it; the
    # ratio of the densities depends on a and |z|^2 alone.
    at_p = chain * (count + 1) + kept
    at_q = chain * count + tl.minimum(kept, count - 1)
    p_std = tl.load(target_std + at_p, mask=there, other=1.0).to(tl.float64)
    q_std = tl.load(draft_std + at_q, mask=proper, other=1.0).to(tl.float64)
    squared = chain.to(tl.float64) * 0.0
    for first in range(0, width, COLUMNS):
        column = first + lane
        inside = proper[:, None] & (column < width)[None, :]
        p_mean = tl.load(
            target_mean + at_p[:, None] * width + column[None, :], mask=inside, other=0.0
        )
        q_mean = tl.load(
            draft_mean + at_q[:, None] * width + column[None, :], mask=inside, other=0.0
        )
        difference = p_mean.to(tl.float64) - q_mean.to(tl.float64)
        squared += tl.sum(difference * difference, 1)
    distance = tl.sqrt(squared)
    ratio_std = tl.where(proper, p_std, 1.0) / q_std
    constant = width * (tl.log(q_std) - tl.log(tl.where(proper, p_std, 1.0)))

    index = tl.minimum(kept + 1, count)
    along = squared * 0.0
    across = along
    pending = proper
    proposals = 0
    while (tl.max(pending.to(tl.int32), 0) > 0) & (proposals < PROPOSALS):
        along = tl.where(pending, normal(seed, chain, index), along)
        index += tl.where(pending, 2, 0)
        if FREEDOM == 1:
            side = normal(seed, chain, index)
            across = tl.where(pending, side * side, across)
            index += tl.where(pending, 2, 0)
        if FREEDOM > 1:
            drawn, index = chi_squared(seed, chain, index, pending, width - 1)
            across = tl.where(pending, drawn, across)
        shifted = distance / q_std + ratio_std * along
        ratio = (
            0.5
            * (
                (shifted - along) * (shifted + along)
                + (ratio_std - 1.0) * (ratio_std + 1.0) * across
            )
            + constant
        )
        keeps = uniform(seed, chain, index) < -expm1(-ratio)
        index += tl.where(pending, 1, 0)
        pending = pending & (keeps == 0)
        proposals += 1

    component = along * 0.0
    total = component
    for first in range(0, width, COLUMNS):
        column = (first + lane).to(tl.int64)
        inside = there[:, None] & (column < width)[None, :]
        e = direction(target_mean, draft_mean, at_p, at_q, column, width, proper, distance)
        z = normal(seed, chain[:, None], index[:, None] + 2 * column[None, :])
        z = tl.where(inside, z, 0.0)
        component += tl.sum(z * e, 1)
        total += tl.sum(z * z, 1)
    remaining = total - component * component
    stretch = tl.where((across > 0.0) & (remaining > 0.0), across / remaining, 0.0)
    stretch = tl.sqrt(stretch)
    for first in range(0, width, COLUMNS):
        column = (first + lane).to(tl.int64)
        inside = there[:, None] & (column < width)[None, :]
        e = direction(target_mean, draft_mean, at_p, at_q, column, width, proper, distance)
        z = normal(seed, chain[:, None], index[:, None] + 2 * column[None, :])
        residual = along[:, None] * e + stretch[:, None] * (z - component[:, None] * e)
        centre = tl.load(
            target_mean + at_p[:, None] * width + column[None, :], mask=inside, other=0.0
        )
        sample = centre.to(tl.float64) + p_std[:, None] * tl.where(proper[:, None], residual, z)
        tl.store(next_sample + chain[:, None] * width + column[None, :], sample, mask=inside)


@triton.jit
def direction(target_mean, draft_mean, at_p, at_q, column, width, proper, distance):
    """Unit vector from the draft's mean to the target's, the first axis where they coincide;
    columns beyond the width hold 0."""
    inside = proper[:, None] & (column < width)[None, :]
    p_mean = tl.load(target_mean + at_p[:, None] * width + column[None, :], mask=inside, other=0.0)
    q_mean = tl.load(draft_mean + at_q[:, None] * width + column[None, :], mask=inside, other=0.0)
    apart = (distance > 0.0)[:, None]
    unit = tl.where(distance > 0.0, distance, 1.0)[:, None]
    axis = (column == 0)[None, :].to(tl.float64)
    difference = (p_mean.to(tl.float64) - q_mean.to(tl.float64)) / unit
    return tl.where(apart, difference, axis)


def verify_chain(
    draft: Tensor,
    draft_mean: Tensor,
    draft_std: Tensor,
    target_mean: Tensor,
    target_std: Tensor,
    seed: Tensor,
) -> tuple[Tensor, Tensor]:
    """See :func:`driftar_kernels.verify_chain`; seed int64 ``[1]``. Computes in fp64."""
    op = "verify_chain"
    _checks.tensor(op, "draft", draft, rank=3)
    batch, count, width = draft.shape
    check_like(op, "draft_mean", draft_mean, (batch, count, width), "[B, K, D]", draft)
    check_like(op, "draft_std", draft_std, (batch, count), "[B, K]", draft)
    check_like(op, "target_mean", target_mean, (batch, count + 1, width), "[B, K + 1, D]", draft)
    check_like(op, "target_std", target_std, (batch, count + 1), "[B, K + 1]", draft)
    check_like(op, "seed", seed, (1,), "[1]", draft, torch.int64)
    length = torch.empty(batch, dtype=torch.int64, device=draft.device)
    dtype = torch.promote_types(draft.dtype, torch.float32)
    sample = torch.empty(batch, width, dtype=dtype, device=draft.device)
    if batch:
        tile = chain_tile(batch, width)
        inputs = (draft, draft_mean, draft_std, target_mean, target_std)
        launch(
            chain_kernel,
            (triton.cdiv(batch, tile.rows),),
            *(x.contiguous() for x in inputs),
            seed,
            length,
            sample,
            batch,
            count,
            width,
            FREEDOM=min(width - 1, 2),
            PROPOSALS=MAX_PROPOSALS,
            CHAINS=tile.rows,
            COLUMNS=tile.columns,
            num_warps=tile.warps,
        )
    return length, sample
