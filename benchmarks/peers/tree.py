"""Verification of draft trees and chains, and cache commit, without the operators."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

Verdict = tuple[Tensor, Tensor, Tensor]


def walk_tensors(
    parents: Tensor, draft: Tensor, target: Tensor, tolerance: float, levels: int
) -> Verdict:
    """The walk in PyTorch: acceptance of all nodes at once, then node by node on the tensors.

    parents ``[N]``, draft and target ``[B, N, D]`` -> length ``[B]``, path ``[B, levels]``, node
    ``[B]``.
    """
    accept = (draft - target).norm(dim=-1) <= tolerance
    return _walk(parents, accept, levels)


def walk_lists(
    parents: Sequence[int], draft: Tensor, target: Tensor, tolerance: float, levels: int
) -> Verdict:
    """The same with everything the walk reads copied to Python lists first."""
    accept = (draft - target).norm(dim=-1) <= tolerance
    return _walk(parents, accept.tolist(), levels)


def _walk(
    parents: Tensor | Sequence[int], accept: Tensor | list[list[bool]], levels: int
) -> Verdict:
    lengths, paths, nodes = [], [], []
    for accepted in accept:
        level: list[int] = []
        best, length = -1, 0
        for node, parent in enumerate(parents):
            lives = accepted[node] and (parent < 0 or level[parent] > 0)
            level.append((1 if parent < 0 else level[parent] + 1) if lives else 0)
            if level[node] > length:
                best, length = node, level[node]
        path, node = [-1] * levels, best
        for step in reversed(range(length)):
            path[step], node = node, int(parents[node])
        lengths.append(length)
        paths.append(path)
        nodes.append(best)
    return torch.tensor(lengths), torch.tensor(paths), torch.tensor(nodes)


def chain(
    draft: Tensor, draft_mean: Tensor, draft_std: Tensor, target_mean: Tensor, target_std: Tensor
) -> tuple[Tensor, Tensor]:
    """Lossless speculative sampling of Gaussians, vectorised over the batch; the residual by
    rejection from the target.
    """
    batch, count, width = draft.shape
    row = torch.arange(batch)

    def log_ratio(x: Tensor, p: tuple[Tensor, Tensor], q: tuple[Tensor, Tensor]) -> Tensor:
        from_q = (x - q[0]) / q[1][..., None]
        from_p = (x - p[0]) / p[1][..., None]
        difference = (from_q - from_p) * (from_q + from_p)
        return 0.5 * difference.sum(-1) + width * (q[1].log() - p[1].log())

    target = (target_mean[:, :count], target_std[:, :count])
    ratio = log_ratio(draft, target, (draft_mean, draft_std))
    accept = torch.rand(batch, count) < ratio.clamp(max=0).exp()
    length = accept.cumprod(1).sum(1)
    p = target_mean[row, length], target_std[row, length]
    sample = torch.addcmul(p[0], p[1][:, None], torch.randn(batch, width))
    position = length.clamp(max=count - 1)
    q = draft_mean[row, position], draft_std[row, position]
    pending = length < count
    while bool(pending.any()):
        keep = -torch.expm1(-log_ratio(sample, p, q))
        pending = pending & (torch.rand(batch) >= keep)
        proposal = torch.addcmul(p[0], p[1][:, None], torch.randn(batch, width))
        sample = torch.where(pending[:, None], proposal, sample)
    return length, sample


def commit_gathering(
    caches: Sequence[Tensor], key_lengths: Tensor, path: Tensor, length: Tensor
) -> Tensor:
    """Accepted rows of the whole batch gathered, then scattered behind the prefixes."""
    level = torch.arange(path.shape[1])
    target = key_lengths[:, None] + level
    # Levels beyond the accepted path move onto themselves.
    source = torch.where(level < length[:, None], key_lengths[:, None] + path, target)
    for cache in caches:
        shape = (-1, cache.shape[1], -1, cache.shape[3])
        rows = cache.gather(2, source[:, None, :, None].expand(shape))
        cache.scatter_(2, target[:, None, :, None].expand(shape), rows)
    return key_lengths + length


def commit_per_sample(
    caches: Sequence[Tensor], key_lengths: Tensor, path: Tensor, length: Tensor
) -> Tensor:
    """Accepted rows of one sample after the other copied behind its prefix."""
    for b, (prefix, steps) in enumerate(zip(key_lengths.tolist(), length.tolist(), strict=True)):
        rows = prefix + path[b, :steps]
        for cache in caches:
            cache[b, :, prefix : prefix + steps] = cache[b].index_select(1, rows)
    return key_lengths + length
