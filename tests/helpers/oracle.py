"""Naive, materialised oracles written from the formulas; they share no code with the package.

Everything is plain PyTorch that stores every intermediate. Run in fp64 it is the truth; run in the
dtype of a kernel it is "the same formula in plain PyTorch", the yardstick of ``tolerance``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class AttentionTruth(NamedTuple):
    """As ``AttentionOutput``; ``support`` counts the keys that a row's entropy runs over."""

    out: Tensor
    entropy: Tensor | None
    lse: Tensor
    max_score: Tensor
    support: Tensor


def ancestor_lists(parents: Sequence[int]) -> list[list[int]]:
    """For every node the ids from its root down to itself."""
    paths: list[list[int]] = []
    for node, parent in enumerate(parents):
        paths.append(([] if parent == -1 else paths[parent]) + [node])
    return paths


def visible_keys(
    batch: int,
    queries: int,
    keys: int,
    *,
    is_causal: bool = False,
    query_offset: int | Tensor = 0,
    key_lengths: Tensor | None = None,
    parents: Tensor | None = None,
) -> Tensor:
    """bool ``[B, Lq, Lk]``: what position alone (causality, lengths, tree) lets each query see."""
    visible = torch.zeros(batch, queries, keys, dtype=torch.bool)
    for b in range(batch):
        if parents is not None:
            prefix = keys - queries if key_lengths is None else int(key_lengths[b])
            tree = parents if parents.dim() == 1 else parents[min(b, len(parents) - 1)]
            for node, path in enumerate(ancestor_lists(tree.tolist())):
                visible[b, node, :prefix] = True
                visible[b, node, [prefix + ancestor for ancestor in path]] = True
            continue
        length = keys if key_lengths is None else int(key_lengths[b])
        offset = int(query_offset[b]) if isinstance(query_offset, Tensor) else query_offset
        for i in range(queries):
            end = min(length, i + offset + 1) if is_causal else length
            visible[b, i, : max(end, 0)] = True
    return visible


def _softmax(scores: Tensor, members: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Probabilities over ``members``, their logs, maximum, log-sum-exp; empty: 0, 0, -inf, -inf."""
    largest = scores.masked_fill(~members, -math.inf)
    largest = (
        largest.amax(-1) if scores.shape[-1] else scores.new_full(scores.shape[:-1], -math.inf)
    )
    shift = torch.where(largest == -math.inf, 0.0, largest).detach()
    shifted = torch.where(members, scores - shift[..., None], 0.0)
    exponential = torch.where(members, shifted.exp(), 0.0)
    total = exponential.sum(-1)
    some = members.any(-1)
    log_total = torch.where(some, total, 1.0).log()
    probability = exponential / torch.where(some, total, 1.0)[..., None]
    log_probability = torch.where(members, shifted - log_total[..., None], 0.0)
    return probability, log_probability, largest, torch.where(some, shift + log_total, -math.inf)


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    *,
    is_causal: bool = False,
    query_offset: int | Tensor = 0,
    key_lengths: Tensor | None = None,
    parents: Tensor | None = None,
    scale: float | None = None,
    enable_gqa: bool = False,
    entropy: str = "head",
    normalize: bool = True,
    entropy_from: int = 0,
    dtype: torch.dtype = torch.float64,
) -> AttentionTruth:
    """Attention with row entropies by the book, every step in ``dtype``; differentiable."""
    batch, heads, queries, dim = query.shape
    keys = key.shape[2]
    query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    if enable_gqa:
        key = key.repeat_interleave(heads // key.shape[1], dim=1)
        value = value.repeat_interleave(heads // value.shape[1], dim=1)
    position = visible_keys(
        batch,
        queries,
        keys,
        is_causal=is_causal,
        query_offset=query_offset,
        key_lengths=key_lengths,
        parents=parents,
    )
    visible = position[:, None].expand(batch, heads, queries, keys)
    scores = (query @ key.transpose(-1, -2)) * (1 / math.sqrt(dim) if scale is None else scale)
    if attn_mask is not None:
        if attn_mask.dtype == torch.bool:
            visible = visible & attn_mask
        else:
            visible = visible & (attn_mask != -math.inf)
            scores = scores + torch.where(attn_mask == -math.inf, 0.0, attn_mask).to(dtype)
    scores = torch.where(visible, scores, 0.0)  # what an invisible key holds has no effect
    reachable = position.any(1)[:, None, :, None]
    probability, _, largest, lse = _softmax(scores, visible)
    out = probability @ torch.where(reachable, value, 0.0)

    members = visible & (torch.arange(keys) >= entropy_from)
    support = members.sum(-1)
    result: Tensor | None = None
    if entropy != "none":
        chance, log_chance, _, _ = _softmax(scores, members)
        if entropy == "head":
            result = -(chance * log_chance).sum(-1)
        else:
            average, support = chance.mean(1), support.amax(1)
            positive = torch.where(average == 0, 1.0, average)
            result = -(average * positive.log()).sum(-1)
        if normalize:
            result = result / support.clamp(min=2).to(dtype).log()
        result = torch.where(support > 1, result, 0.0)
    return AttentionTruth(out, result, lse, largest.detach(), support)


class DriftTruth(NamedTuple):
    """As ``DriftField``, with the loss ``[B]`` and ``scale_inputs``, the unit of the force."""

    force: Tensor
    scale: Tensor
    norms: Tensor
    loss: Tensor
    scale_inputs: Tensor


def drift(
    gen: Tensor,
    pos: Tensor,
    neg: Tensor | None = None,
    *,
    temperatures: Sequence[float] = (0.02, 0.05, 0.2),
    gen_weight: Tensor | None = None,
    pos_weight: Tensor | None = None,
    neg_weight: Tensor | None = None,
    dtype: torch.dtype = torch.float64,
) -> DriftTruth:
    """The published bilateral drifting field; distances from differences, so nothing cancels."""
    batch, count, channels = gen.shape
    gen, pos = gen.to(dtype), pos.to(dtype)
    neg = gen.new_zeros(batch, 0, channels) if neg is None else neg.to(dtype)

    def weights(given: Tensor | None, points: Tensor) -> Tensor:
        return gen.new_ones(points.shape[:2]) if given is None else given.to(dtype)

    target = torch.cat([gen, neg, pos], 1)
    weight = torch.cat(
        [weights(gen_weight, gen), weights(neg_weight, neg), weights(pos_weight, pos)], 1
    )
    difference = gen[:, :, None] - target[:, None]
    distance = difference.square().sum(-1).clamp(min=1e-8).sqrt()
    scale = (distance * weight[:, None]).mean() / weight.mean()
    unit = (scale / math.sqrt(channels)).clamp(min=1e-3)
    kernel = distance / scale.clamp(min=1e-3)
    kernel[:, :, :count] += 100 * torch.eye(count, dtype=dtype)

    attracted_from = count + neg.shape[1]
    force = torch.zeros_like(gen)
    norms = []
    for temperature in temperatures:
        logits = -kernel / temperature
        affinity = (logits.softmax(2) * logits.softmax(1)).clamp(min=1e-6).sqrt() * weight[:, None]
        repelling, attracting = affinity[:, :, :attracted_from], affinity[:, :, attracted_from:]
        coefficient = torch.cat(
            [
                -repelling * attracting.sum(-1, keepdim=True),
                attracting * repelling.sum(-1, keepdim=True),
            ],
            -1,
        )
        raw = -(coefficient[..., None] * difference).sum(2) / unit
        norm = raw.square().mean()
        norms.append(norm)
        force += raw / norm.clamp(min=1e-8).sqrt()
    return DriftTruth(force, scale, torch.stack(norms), force.square().mean((1, 2)), unit)


def walk(parents: Sequence[int], accept: Sequence[bool]) -> list[int]:
    """Ids of the longest path on which every node is accepted; the lowest last id among equals."""
    best: list[int] = []
    for path in ancestor_lists(parents):
        if all(accept[node] for node in path) and len(path) > len(best):
            best = path
    return best


def sigma(
    entropy: Tensor, *, sigma_max: float = 0.5, tau: float = 2.0, entropy_max: float = 1.0
) -> Tensor:
    """Eq. 6 in fp64."""
    clamped = entropy.double().clamp(0, entropy_max)
    value = sigma_max * torch.expm1(clamped / tau) / math.expm1(entropy_max / tau)
    return value.clamp(0, sigma_max)
