"""Attention with row entropy, written out: the whole Lq x Lk map, one line per formula."""

from __future__ import annotations

import torch
from torch import Tensor

from .tree import ancestor_matrix


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """Statistics are kept in fp32, or in fp64 for fp64 inputs."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def visible_keys(
    batch: int,
    query_length: int,
    key_length: int,
    device: torch.device,
    *,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    query_offset: int | Tensor = 0,
    key_lengths: Tensor | None = None,
    parents: Tensor | None = None,
) -> Tensor:
    """Which keys each query sees: bool ``[B | 1, Hq | 1, Lq, Lk]``, the sets V_i of the contract.

    All conditions combine by AND. ``parents`` (``[B | 1, N]``) is a draft tree: the queries are its
    nodes, the keys are a fully visible prefix followed by the nodes' own keys.
    """
    rows = torch.arange(query_length, device=device)[:, None]
    columns = torch.arange(key_length, device=device)[None, :]
    visible = torch.ones(1, 1, query_length, key_length, dtype=torch.bool, device=device)

    def per_sample(values: Tensor) -> Tensor:
        return values.to(device=device, dtype=torch.int64).reshape(-1, 1, 1, 1)

    if is_causal:
        offset = per_sample(query_offset) if isinstance(query_offset, Tensor) else query_offset
        visible = visible & (columns <= rows + offset)
    if parents is not None:
        nodes = parents.shape[-1]
        if key_lengths is None:
            prefix = torch.full((1, 1, 1, 1), key_length - nodes, device=device)
        else:
            prefix = per_sample(key_lengths)
        node = columns - prefix  # [B | 1, 1, 1, Lk]: which node owns this key
        if nodes == 0:
            return visible & (node < 0)
        related = ancestor_matrix(parents)[:, None]  # [B | 1, 1, N, N]
        count = max(related.shape[0], node.shape[0])
        index = node.clamp(0, nodes - 1).expand(count, 1, nodes, key_length)
        is_ancestor = related.expand(count, 1, nodes, nodes).gather(-1, index)
        visible = visible & ((node < 0) | (is_ancestor & (node < nodes)))
    elif key_lengths is not None:
        visible = visible & (columns < per_sample(key_lengths))
    if attn_mask is not None:
        allowed = attn_mask if attn_mask.dtype == torch.bool else attn_mask != -torch.inf
        visible = visible & allowed[(None,) * (4 - allowed.dim())]
    return visible


def _softmax_statistics(scores: Tensor, member: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Largest score m, exp(s - m), l = sum exp(s - m) and t = sum exp(s - m)(s - m) over
    ``member``.

    Rows without members give m = -inf and zeros; gradients through them are zero, never NaN.
    """
    maximum = scores.masked_fill(~member, -torch.inf).amax(-1, keepdim=True).detach()
    shifted = torch.where(member, scores - maximum.masked_fill(maximum == -torch.inf, 0.0), 0.0)
    exponential = torch.where(member, shifted.exp(), 0.0)
    return maximum, exponential, exponential.sum(-1), (exponential * shifted).sum(-1)


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
    scale: float = 1.0,
    entropy: str = "head",
    normalize: bool = True,
    entropy_from: int = 0,
) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
    """``softmax(scale q k^T) v`` with the entropy, log-sum-exp and largest score of every row.

    Shapes: query ``[B, Hq, Lq, D]``, key ``[B, Hkv, Lk, D]``, value ``[B, Hkv, Lk, Dv]``; returns
    out ``[B, Hq, Lq, Dv]``, entropy ``[B, Hq, Lq]`` ("head"), ``[B, Lq]`` ("map") or None, lse and
    max_score ``[B, Hq, Lq]``. With E_i the visible keys from ``entropy_from`` on::

        H_i = log l_i - t_i / l_i,   m = max s,  l = sum exp(s - m),  t = sum exp(s - m)(s - m)
    """
    batch, query_heads, query_length, _ = query.shape
    key_heads, key_length = key.shape[1:3]
    dtype = accumulation_dtype(query.dtype)
    visible = visible_keys(
        batch,
        query_length,
        key_length,
        query.device,
        attn_mask=attn_mask,
        is_causal=is_causal,
        query_offset=query_offset,
        key_lengths=key_lengths,
        parents=parents,
    )
    if key_length == 0:  # one key that nobody sees keeps every reduction and gradient defined
        key, value = (torch.nn.functional.pad(x, (0, 0, 0, 1)) for x in (key, value))
        visible = visible.new_zeros(*visible.shape[:3], 1)
        attn_mask, key_length = None, 1
    visible = visible.expand(batch, query_heads, query_length, key_length)

    # Keys that no query sees are cleared, so that NaN stored there stays there (0 * NaN is NaN).
    group = query_heads // key_heads if key_heads else 1
    key, value = (x.to(dtype).repeat_interleave(group, 1) for x in (key, value))
    seen = visible.any(-2)[..., None]
    key, value = torch.where(seen, key, 0.0), torch.where(seen, value, 0.0)

    scores = scale * (query.to(dtype) @ key.transpose(-1, -2))
    if attn_mask is not None and attn_mask.dtype != torch.bool:
        scores = scores + attn_mask.to(dtype).masked_fill(attn_mask == -torch.inf, 0.0)

    maximum, exponential, total, _ = _softmax_statistics(scores, visible)
    occupied = maximum.squeeze(-1) != -torch.inf
    safe_total = torch.where(occupied, total, 1.0)
    out = (exponential / safe_total[..., None]) @ value
    lse = torch.where(occupied, maximum.squeeze(-1) + safe_total.log(), -torch.inf)

    row_entropy = None
    if entropy != "none":
        member = visible & (torch.arange(key_length, device=query.device) >= entropy_from)
        row_entropy = _entropy(scores, member, entropy, normalize)
    return out.to(query.dtype), row_entropy, lse, maximum.squeeze(-1)


def _entropy(scores: Tensor, member: Tensor, kind: str, normalize: bool) -> Tensor:
    _, exponential, total, moment = _softmax_statistics(scores, member)
    count = member.sum(-1)  # |E_i|, [B, Hq, Lq]
    safe_total = torch.where(count > 0, total, 1.0)
    if kind == "head":
        entropy = safe_total.log() - moment / safe_total
    else:  # "map": the entropy of the head-averaged map
        average = (exponential / safe_total[..., None]).mean(1)
        logarithm = torch.where(average == 0, 1.0, average).log()
        entropy = -(average * logarithm).sum(-1)
        count = count.amax(1) if count.shape[1] else count.new_zeros(entropy.shape)
    entropy = torch.where(count > 1, entropy, 0.0)
    # A NaN logit makes its row NaN even where there is nothing to choose between.
    entropy = entropy + torch.where(
        torch.isnan(total if kind == "head" else total.sum(1)), torch.nan, 0.0
    )
    if normalize:
        entropy = entropy / count.clamp(min=2).to(entropy.dtype).log()
    return entropy
