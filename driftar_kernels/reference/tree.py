"""Draft trees in plain PyTorch: ancestor sets, the walk, Gaussian chain verification, cache
commit.
"""

from __future__ import annotations

import torch
from torch import Tensor

# A residual sample is abandoned after this many proposals; the emitted distribution then differs
# from the target's by at most 1 / (e * MAX_PROPOSALS) in total variation.
MAX_PROPOSALS = 1 << 20


def ancestor_matrix(parents: Tensor) -> Tensor:
    """``ancestors[b, i, j]``: node j is node i or one of its ancestors. parents ``[B, N]`` -> bool
    ``[B, N, N]``.

    Pointer doubling: after k rounds every node knows its 2^k nearest ancestors.
    """
    batch, nodes = parents.shape
    related = torch.eye(nodes, dtype=torch.bool, device=parents.device).repeat(batch, 1, 1)
    hop = parents.to(torch.int64)
    for _ in range(max(nodes - 1, 0).bit_length()):
        target = hop.clamp(0, max(nodes - 1, 0))
        reached = related.gather(1, target[..., None].expand(-1, -1, nodes)) & (hop >= 0)[..., None]
        related = related | reached
        hop = torch.where(hop >= 0, hop.gather(1, target), -1)
    return related


def walk_tree(parents: Tensor, accept: Tensor, max_depth: int) -> tuple[Tensor, Tensor, Tensor]:
    """Deepest node all of whose ancestors are accepted; ties go to the lowest index.

    parents ``[1 | B, N]``, accept bool ``[B, N]`` -> length ``[B]``, path ``[B, max_depth]``, node
    ``[B]``.
    """
    batch, nodes = accept.shape
    if nodes == 0:
        none = accept.new_full((batch,), -1, dtype=torch.int64)
        return none + 1, accept.new_full((batch, max_depth), -1, dtype=torch.int64), none
    related = ancestor_matrix(parents).expand(batch, nodes, nodes)
    alive = (accept[:, None, :] | ~related).all(-1)
    depth = related.sum(-1)  # levels: a root counts 1
    index = torch.arange(nodes, device=accept.device)
    # One key orders by depth first and by lowest index second.
    rank = torch.where(alive, depth * nodes + (nodes - 1 - index), -1)
    best = rank.argmax(-1)
    length = torch.where(alive.any(-1), depth.gather(1, best[:, None])[:, 0], 0)
    node = torch.where(length > 0, best, -1)
    # Ancestors of a node in index order are the path from the root: parents precede children.
    on_path = (
        related.gather(1, best[:, None, None].expand(-1, 1, nodes))[:, 0] & (length > 0)[:, None]
    )
    level = (depth - 1).clamp(max=max_depth - 1)
    path = accept.new_full((batch, max_depth + 1), -1, dtype=torch.int64)
    path.scatter_(1, torch.where(on_path, level, max_depth), index.expand(batch, nodes))
    return length, path[:, :max_depth].contiguous(), node


def agreement(draft: Tensor, target: Tensor, tolerance: float) -> Tensor:
    """``||draft - target||_2 <= tolerance`` per node, bool ``[B, N]``; NaN never agrees."""
    wide = torch.promote_types(draft.dtype, torch.float32)
    return (draft.to(wide) - target.to(wide)).norm(dim=-1) <= tolerance


def log_density_ratio(
    x: Tensor, target_mean: Tensor, target_std: Tensor, draft_mean: Tensor, draft_std: Tensor
) -> Tensor:
    """``log N(x; target) - log N(x; draft)`` for isotropic Gaussians, summed as differences per
    dimension.
    """
    draft_score = (x - draft_mean) / draft_std[..., None]
    target_score = (x - target_mean) / target_std[..., None]
    difference = 0.5 * (draft_score - target_score) * (draft_score + target_score)
    return difference.sum(-1) + x.shape[-1] * (draft_std.log() - target_std.log())


def verify_chain(
    draft: Tensor,
    draft_mean: Tensor,
    draft_std: Tensor,
    target_mean: Tensor,
    target_std: Tensor,
    seed: Tensor,
) -> tuple[Tensor, Tensor]:
    """Lossless speculative sampling along a chain of isotropic Gaussians.

    draft, draft_mean ``[B, K, D]``, draft_std ``[B, K]``, target_mean ``[B, K+1, D]``, target_std
    ``[B, K+1]``, seed int64 ``[1]`` -> length ``[B]`` and next_sample ``[B, D]``. Position k passes
    when u < min(1, p/q); the first one that does not is replaced by a sample of the residual (p -
    q)+, reached by proposing x ~ p and keeping it with probability 1 - min(1, q/p).
    """
    batch, count, width = draft.shape
    dtype = torch.float64
    draft, draft_mean, draft_std = (x.to(dtype) for x in (draft, draft_mean, draft_std))
    mean, std = target_mean.to(dtype), target_std.to(dtype)
    generator = torch.Generator(device=draft.device).manual_seed(int(seed[0]) & (2**63 - 1))

    def uniform(*shape: int) -> Tensor:
        return torch.rand(shape, dtype=dtype, device=draft.device, generator=generator)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=dtype, device=draft.device, generator=generator)

    chain_mean, chain_std = mean[:, :count], std[:, :count]
    finite = (
        draft.isfinite().all(-1) & draft_mean.isfinite().all(-1) & chain_mean.isfinite().all(-1)
    )
    spread = (
        finite & draft_std.isfinite() & chain_std.isfinite() & (draft_std > 0) & (chain_std > 0)
    )
    ratio = (
        log_density_ratio(draft, chain_mean, chain_std, draft_mean, draft_std).clamp(max=0.0).exp()
    )
    same_point = (draft == chain_mean).all(-1) & (draft_mean == chain_mean).all(-1)
    same_point = finite & same_point & (draft_std == 0) & (chain_std == 0)
    accepted = torch.where(spread, uniform(batch, count) < ratio, same_point)
    length = accepted.to(torch.int64).cumprod(1).sum(1)

    row = torch.arange(batch, device=draft.device)
    p_mean, p_std = mean[row, length], std[row, length]
    sample = p_mean + p_std[:, None] * normal(batch, width)
    # The residual differs from p only where a proper pair of densities was rejected.
    pending = torch.zeros(batch, dtype=torch.bool, device=draft.device)
    if count:
        position = length.clamp(max=count - 1)
        q_mean, q_std = draft_mean[row, position], draft_std[row, position]
        pending = (length < count) & spread[row, position]
        for _ in range(MAX_PROPOSALS):
            keep = -torch.expm1(-log_density_ratio(sample, p_mean, p_std, q_mean, q_std))
            pending = pending & ~(uniform(batch) < keep)
            if not bool(pending.any()):
                break
            proposal = p_mean + p_std[:, None] * normal(batch, width)
            sample = torch.where(pending[:, None], proposal, sample)
    return length, sample.to(torch.promote_types(target_mean.dtype, torch.float32))


def commit_path(
    key_cache: Tensor, value_cache: Tensor, key_lengths: Tensor, path: Tensor, length: Tensor
) -> Tensor:
    """Move the rows of the nodes in ``path`` to directly behind the prefix, in place; new lengths
    ``[B]``.
    """
    batch, _, capacity, _ = key_cache.shape
    level = torch.arange(path.shape[1], device=path.device)
    taken = (level < length[:, None]) & (path >= 0)
    prefix = key_lengths.to(torch.int64)[:, None]
    # source[b, r]: the row that ends at r. The spare last column takes the levels that move
    # nothing.
    source = torch.arange(capacity + 1, device=path.device).repeat(batch, 1)
    source.scatter_(1, torch.where(taken, prefix + level, capacity), prefix + path)
    source = source[:, None, :capacity, None].clamp(0, max(capacity - 1, 0))
    for cache in (key_cache, value_cache):
        cache.copy_(cache.gather(2, source.expand(cache.shape)))
    return key_lengths.to(torch.int64) + length
