"""Draft trees: walk, verification and commit (docs/ops/tree.md).

A tree sits in one program, one lane a node. Pointer doubling takes ceil(log2 N) gathers: after k of
them a lane knows its 2^k nearest ancestors.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import _checks
from .elementary import check_dtype, check_like
from .launch import launch, power_of_two
from .tuning import COMMIT_COLUMNS, TREE_COLUMNS, tree_warps


@triton.jit
def best_path(
    parents,  # [N], this sample's tree
    accept,  # [NODES] bool lanes
    length,  # [1], out
    path,  # [max_depth], out
    node,  # [1], out
    nodes,
    max_depth,
    NODES: tl.constexpr,
    ROUNDS: tl.constexpr,
):
    lane = tl.arange(0, NODES)
    parent = tl.load(parents + lane, mask=lane < nodes, other=-1).to(tl.int32)
    # A parent that is not an earlier node (only device tensors may hold one) kills its node.
    alive = (accept & (parent >= -1) & (parent < lane)).to(tl.int32)
    hop = tl.where((parent < lane) & (parent >= 0), parent, -1)
    levels = alive * 0 + 1
    for _ in tl.static_range(ROUNDS):
        target = tl.maximum(hop, 0)
        follows = hop >= 0
        alive = tl.where(follows, alive & tl.gather(alive, target, 0), alive)
        levels = tl.where(follows, levels + tl.gather(levels, target, 0), levels)
        hop = tl.where(follows, tl.gather(hop, target, 0), -1)
    fits = (alive != 0) & (lane < nodes) & (levels <= max_depth)
    # One key orders by depth first and by lowest index second.
    rank = tl.max(tl.where(fits, levels.to(tl.int64) * NODES + (NODES - 1 - lane), -1), 0)
    depth = tl.where(rank < 0, 0, rank // NODES)
    best = tl.where(rank < 0, -1, NODES - 1 - rank % NODES)
    tl.store(length, depth)
    tl.store(node, best)
    for first in range(0, max_depth, NODES):
        level = first + lane
        tl.store(path + level, level * 0 - 1, mask=(level >= depth) & (level < max_depth))
    current = best
    for step in range(0, depth):
        tl.store(path + depth - 1 - step, current)
        current = tl.load(parents + tl.maximum(current, 0))


@triton.jit(do_not_specialize=["nodes", "max_depth"])
def walk_kernel(
    parents,  # [trees, N] int64
    accept,  # [B, N] int8
    length,  # [B] int64
    path,  # [B, max_depth] int64
    node,  # [B] int64
    tree_stride,
    nodes,
    max_depth,
    NODES: tl.constexpr,
    ROUNDS: tl.constexpr,
):
    sample = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, NODES)
    accepted = tl.load(accept + sample * nodes + lane, mask=lane < nodes, other=0) != 0
    best_path(
        parents + sample * tree_stride,
        accepted,
        length + sample,
        path + sample * max_depth,
        node + sample,
        nodes,
        max_depth,
        NODES,
        ROUNDS,
    )


@triton.jit(do_not_specialize=["nodes", "max_depth"])
def verify_kernel(
    parents,  # [trees, N] int64
    draft,  # [B, N, width]
    target,  # [B, N, width]
    length,  # [B] int64
    path,  # [B, max_depth] int64
    node,  # [B] int64
    tree_stride,
    nodes,
    width,
    max_depth,
    tolerance,
    NODES: tl.constexpr,
    ROUNDS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    sample = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, NODES)
    row = (sample * nodes + lane) * width
    squared = tl.zeros([NODES], tl.float64)
    for first in range(0, width, COLUMNS):
        column = first + tl.arange(0, COLUMNS)
        inside = (lane < nodes)[:, None] & (column < width)[None, :]
        at = row[:, None] + column[None, :]
        proposed = tl.load(draft + at, mask=inside, other=0.0).to(tl.float32)
        wanted = tl.load(target + at, mask=inside, other=0.0).to(tl.float32)
        difference = (proposed - wanted).to(tl.float64)
        squared += tl.sum(difference * difference, 1)
    limit = tl.cast(tolerance, tl.float64)
    agrees = squared <= limit * limit  # false for NaN
    best_path(
        parents + sample * tree_stride,
        agrees,
        length + sample,
        path + sample * max_depth,
        node + sample,
        nodes,
        max_depth,
        NODES,
        ROUNDS,
    )


@triton.jit(do_not_specialize=["capacity", "max_depth"])
def commit_kernel(
    cache,  # [B, heads, capacity, width]
    key_lengths,  # [B] int64
    path,  # [B, max_depth] int64
    length,  # [B] int64
    heads,
    capacity,
    width,
    max_depth,
    batch_stride,
    head_stride,
    row_stride,
    column_stride,
    COLUMNS: tl.constexpr,
):
    sample = tl.program_id(0).to(tl.int64) // heads
    head = tl.program_id(0).to(tl.int64) % heads
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    base = cache + sample * batch_stride + head * head_stride + column.to(tl.int64) * column_stride
    prefix = tl.load(key_lengths + sample)
    steps = tl.minimum(tl.load(length + sample), max_depth)
    # Paths increase and path[step] >= step, so a row is read before anything is written over it;
    # every lane keeps to its own column.
    for step in range(0, steps):
        source = prefix + tl.load(path + sample * max_depth + step)
        target = prefix + step
        moves = (column < width) & (prefix >= 0) & (source > target) & (source < capacity)
        value = tl.load(base + source * row_stride, mask=moves)
        tl.store(base + target * row_stride, value, mask=moves)


def _check_parents(op: str, parents: Tensor, max_depth: int, nodes: Tensor) -> Tensor:
    """``parents`` int64, of as many nodes as ``nodes`` ``[B, N, ...]`` has."""
    _checks.tensor(op, "parents", parents, rank=2)
    _checks.integer(op, "parents", parents)
    _checks.integral(op, "max_depth", max_depth, minimum=0)
    batch = parents.shape[0] if parents.shape[0] == 1 else nodes.shape[0]
    _checks.shape(op, "parents", parents, (batch, nodes.shape[1]), "[1 | B, N]")
    _checks.same_device(op, parents=parents, nodes=nodes)
    return parents.to(torch.int64).contiguous()


def _verdict(batch: int, max_depth: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    length, node = (torch.empty(batch, dtype=torch.int64, device=device) for _ in range(2))
    path = torch.empty(batch, max_depth, dtype=torch.int64, device=device)
    return length, path, node


def _lanes(nodes: int) -> dict[str, int]:
    """One lane a node; at least one, so that an empty tree has a verdict."""
    lanes = power_of_two(nodes, at_least=16)
    return {
        "NODES": lanes,
        "ROUNDS": lanes.bit_length() - 1,
        "num_warps": tree_warps(lanes),
    }


def _tree_stride(parents: Tensor) -> int:
    return 0 if parents.shape[0] == 1 else parents.shape[1]


def walk_tree(parents: Tensor, accept: Tensor, max_depth: int) -> tuple[Tensor, Tensor, Tensor]:
    """See :func:`driftar_kernels.walk_tree`; parents int64 ``[1 | B, N]``, accept ``[B, N]``."""
    op = "walk_tree"
    _checks.tensor(op, "accept", accept, rank=2)
    batch, nodes = accept.shape
    check_like(op, "accept", accept, (batch, nodes), "[B, N]", accept, torch.bool)
    parents = _check_parents(op, parents, max_depth, accept)
    result = _verdict(batch, max_depth, accept.device)
    if batch:
        launch(
            walk_kernel,
            (batch,),
            parents,
            accept.contiguous().view(torch.int8),
            *result,
            _tree_stride(parents),
            nodes,
            max_depth,
            **_lanes(nodes),
        )
    return result


def verify_tree(
    parents: Tensor, draft: Tensor, target: Tensor, tolerance: float, max_depth: int
) -> tuple[Tensor, Tensor, Tensor]:
    """See :func:`driftar_kernels.verify_tree`; one launch."""
    op = "verify_tree"
    check_dtype(op, "draft", draft)
    _checks.tensor(op, "draft", draft, rank=3)
    batch, nodes, width = draft.shape
    check_like(op, "target", target, (batch, nodes, width), "[B, N, D]", draft)
    parents = _check_parents(op, parents, max_depth, draft)
    result = _verdict(batch, max_depth, draft.device)
    if batch:
        launch(
            verify_kernel,
            (batch,),
            parents,
            draft.contiguous(),
            target.contiguous(),
            *result,
            _tree_stride(parents),
            nodes,
            width,
            max_depth,
            tolerance,
            COLUMNS=TREE_COLUMNS,
            **_lanes(nodes),
        )
    return result


def commit_path(
    key_cache: Tensor, value_cache: Tensor, key_lengths: Tensor, path: Tensor, length: Tensor
) -> Tensor:
    """See :func:`driftar_kernels.commit_path`; paths that leave the cache move nothing."""
    op = "commit_path"
    _checks.tensor(op, "key_cache", key_cache, rank=4)
    _checks.tensor(op, "value_cache", value_cache, rank=4)
    _checks.tensor(op, "path", path, rank=2)
    batch, heads, capacity, _ = key_cache.shape
    expected = (batch, heads, capacity, value_cache.shape[3])
    _checks.shape(op, "value_cache", value_cache, expected, "[B, Hkv, Lmax, Dv]")
    _checks.shape(op, "path", path, (batch, path.shape[1]), "[B, max_depth]")
    for name, x in (("key_lengths", key_lengths), ("length", length)):
        _checks.shape(op, name, x, (batch,), "[B]")
    indices = {"key_lengths": key_lengths, "path": path, "length": length}
    for name, x in indices.items():
        _checks.integer(op, name, x)
    _checks.same_device(op, key_cache=key_cache, value_cache=value_cache, **indices)
    prefix, path, steps = (x.to(torch.int64).contiguous() for x in (key_lengths, path, length))
    for cache in (key_cache, value_cache):
        if cache.numel() == 0:
            continue
        width = cache.shape[3]
        launch(
            commit_kernel,
            (batch * heads, triton.cdiv(width, COMMIT_COLUMNS)),
            cache,
            prefix,
            path,
            steps,
            heads,
            capacity,
            width,
            path.shape[1],
            *cache.stride(),
            COLUMNS=COMMIT_COLUMNS,
        )
    return prefix + steps
