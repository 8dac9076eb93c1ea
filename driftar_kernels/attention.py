"""Attention that also returns the entropy of every row.

Derivation and numerics: docs/ops/attention.md.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import _checks, _library, backends
from .reference import attention as reference
from .tree import DraftTree

ENTROPY_KINDS = ("head", "map", "none")


class AttentionOutput(NamedTuple):
    """Result of :func:`attention`; statistics in fp32 (fp64 for fp64 inputs).

    Attributes:
        out: ``[B, Hq, Lq, Dv]``, dtype of query.
        entropy: ``[B, Hq, Lq]`` ("head"), ``[B, Lq]`` ("map") or None ("none").
        lse: ``[B, Hq, Lq]``, natural log of the sum of exponentials of the visible scores.
        max_score: ``[B, Hq, Lq]``, largest visible score; carries no gradient.
    """

    out: Tensor
    entropy: Tensor | None
    lse: Tensor
    max_score: Tensor


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    *,
    is_causal: bool = False,
    query_offset: int | Tensor = 0,
    key_lengths: Tensor | None = None,
    scale: float | None = None,
    enable_gqa: bool = False,
    tree: DraftTree | None = None,
    entropy: str = "head",
    normalize: bool = True,
    entropy_from: int = 0,
) -> AttentionOutput:
    r"""Scaled dot-product attention with row entropies, in O(Lq + Lk) memory and with gradients.

    Scores are :math:`s_{ij} = scale\,\langle q_i, k_j\rangle`; a query attends to its visible keys
    V_i. The entropy (Eq. 4 of arXiv 2603.28049) is taken over E_i, the visible keys from
    ``entropy_from`` on, with the probabilities renormalised over E_i:

    .. math:: H_i = -\sum_{j \in E_i} p_{ij} \log p_{ij} \quad (/\log|E_i| \text{ if normalize})

    Args:
        query: ``[B, Hq, Lq, D]``, fp32, bf16, fp16 or fp64.
        key: ``[B, Hkv, Lk, D]``, dtype of query.
        value: ``[B, Hkv, Lk, Dv]``, dtype of query.
        attn_mask: broadcastable to ``[B, Hq, Lq, Lk]``. Bool: True is visible. Float: added to the
            scores, -inf is invisible; its gradient is not provided.
        is_causal: key j is visible to query i when ``j <= i + query_offset``.
        query_offset: int or int tensor ``[B]``. 0 is SDPA's upper-left alignment, ``Lk - Lq`` the
            lower-right one of a KV cache.
        key_lengths: int tensor ``[B]``: only the first ``key_lengths[b]`` keys are visible. With
            ``tree``: the length of the prefix, which the nodes' keys follow.
        scale: factor of the scores; 1/sqrt(D) by default.
        enable_gqa: allow Hkv to divide Hq; each key head then serves Hq / Hkv neighbouring query
            heads.
        tree: the queries are the nodes of this tree; each sees the prefix (``key_lengths``, or all
            but the last N keys), its ancestors and itself. Excludes ``is_causal`` and
            ``query_offset``.
        entropy: "head": of every row of every head. "map": of the head-averaged map, each head
            renormalised over E_i first (the published code also clamps every entry, masked ones
            included, at 1e-8, which adds up to 2e-7 per masked key; this does not). "none":
            skipped.
        normalize: divide by ``log |E_i|``, so that entropies lie in [0, 1].
        entropy_from: first key that counts for the entropy (skips class or buffer tokens).

    Returns:
        :class:`AttentionOutput`. All conditions on visibility combine by AND. A row that sees
        nothing gives out 0, entropy 0, lse and max_score -inf and zero gradients. A NaN or +inf
        among the visible scores of a row makes its out and entropy NaN, and no other row's.
        Gradients reach query, key and value from out, entropy and lse alike; second derivatives
        raise (the reference backend has them).

    Raises:
        TypeError: a dtype or type is not supported, or dtypes differ.
        ValueError: a shape, device or range is wrong.

    Under autocast the inputs are cast to the autocast dtype; statistics stay in fp32.
    """
    parents = None if tree is None else _tree_parents(tree, is_causal, query_offset)
    offsets, offset = (
        (query_offset, 0) if isinstance(query_offset, Tensor) else (None, query_offset)
    )
    result: AttentionOutput | None = None
    if (
        backends.calls_cpp()
        and isinstance(query, Tensor)
        and isinstance(key, Tensor)
        and query.dim() == key.dim() == 4
        and (enable_gqa or query.shape[1] == key.shape[1])
    ):
        result = _direct_forward(  # which checks the rest
            query,
            key,
            value,
            attn_mask,
            offsets,
            key_lengths,
            parents,
            offset,
            _default_scale(query) if scale is None else scale,
            is_causal,
            entropy,
            normalize,
            entropy_from,
        )
    if result is None:
        check_arguments(
            query, key, value, attn_mask, query_offset, key_lengths, parents, enable_gqa
        )
        _checks.choice("attention", "entropy", entropy, ENTROPY_KINDS)
        _checks.integral("attention", "entropy_from", entropy_from, minimum=0)
        if scale is not None:
            _checks.number("attention", "scale", scale)
        result = _forward(
            query,
            key,
            value,
            attn_mask,
            offsets,
            key_lengths,
            parents,
            offset,
            _default_scale(query) if scale is None else scale,
            is_causal,
            entropy,
            normalize,
            entropy_from,
        )
    return result._replace(entropy=None) if entropy == "none" else result


def _default_scale(query: Tensor) -> float:
    return 1.0 / math.sqrt(max(query.shape[-1], 1))


def _forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    query_offsets: Tensor | None,
    key_lengths: Tensor | None,
    parents: Tensor | None,
    query_offset: int,
    scale: float,
    is_causal: bool,
    entropy: str,
    normalize: bool,
    entropy_from: int,
) -> AttentionOutput:
    """Checked arguments on the backend that takes them."""
    dtype = _checks.autocast_dtype(query.device)
    if dtype is not None:
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    backend = backends.select("attention", query.device)
    if backend != "cpu":
        _check_lengths(key, key_lengths, parents)
    if backend == "reference":
        with _checks.without_autocast(query.device):
            return AttentionOutput(
                *reference.attention(
                    query,
                    key,
                    value,
                    attn_mask,
                    is_causal=is_causal,
                    query_offset=query_offset if query_offsets is None else query_offsets,
                    key_lengths=key_lengths,
                    parents=parents,
                    scale=scale,
                    entropy=entropy,
                    normalize=normalize,
                    entropy_from=entropy_from,
                )
            )
    out, row_entropy, lse, max_score, *_ = _library.operator("attention_forward", backend)(
        query,
        key,
        value,
        attn_mask,
        query_offsets,
        key_lengths,
        parents,
        query_offset,
        scale,
        is_causal,
        entropy,
        normalize,
        entropy_from,
    )
    return AttentionOutput(out, row_entropy, lse, max_score)


def _tree_parents(tree: DraftTree, is_causal: bool, query_offset: int | Tensor) -> Tensor:
    if not isinstance(tree, DraftTree):
        raise TypeError(f"attention: tree must be a DraftTree, got {type(tree).__name__}")
    if is_causal:
        raise ValueError("attention: is_causal must be False with tree; the tree orders its nodes")
    if isinstance(query_offset, Tensor) or query_offset != 0:
        raise ValueError("attention: query_offset must be 0 with tree; nodes follow the prefix")
    return tree.parents


def check_arguments(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    query_offset: int | Tensor,
    key_lengths: Tensor | None,
    parents: Tensor | None,
    enable_gqa: bool,
) -> None:
    """Everything that can be said without reading values; ``parents`` ``[1 | B, N]``."""
    op = "attention"
    for name, x in (("query", query), ("key", key), ("value", value)):
        _checks.tensor(op, name, x, rank=4)
    _checks.same_device(op, query=query, key=key, value=value)
    if _checks.autocast_dtype(query.device) is None:
        _checks.floating(op, query=query, key=key, value=value)
    batch, query_heads, query_length, width = query.shape
    _, key_heads, key_length, _ = key.shape
    _checks.shape(op, "key", key, (batch, key_heads, key_length, width), "[B, Hkv, Lk, D]")
    _checks.shape(
        op, "value", value, (batch, key_heads, key_length, value.shape[3]), "[B, Hkv, Lk, Dv]"
    )
    if query_heads != key_heads:
        if not enable_gqa:
            raise ValueError(
                f"{op}: key and value must have the {query_heads} heads of query, got {key_heads}; "
                "pass enable_gqa=True for grouped heads"
            )
        if key_heads == 0 or query_heads % key_heads != 0:
            raise ValueError(
                f"{op}: the heads of query must be a multiple of those of key, "
                f"got {query_heads} and {key_heads}"
            )
    if attn_mask is not None:
        _check_mask(attn_mask, (batch, query_heads, query_length, key_length), query.device)
    if isinstance(query_offset, Tensor):
        _check_per_sample("query_offset", query_offset, batch, query.device)
    else:
        _checks.integral(op, "query_offset", query_offset)
    if key_lengths is not None:
        _check_per_sample("key_lengths", key_lengths, batch, query.device)
    if parents is not None:
        nodes = parents.shape[1]
        if parents.shape[0] not in (1, batch):
            raise ValueError(f"{op}: tree must hold 1 or {batch} trees, got {parents.shape[0]}")
        if nodes != query_length:
            raise ValueError(
                f"{op}: tree must have one node per query, got {nodes} for {query_length}"
            )
        if key_length < nodes:
            raise ValueError(
                f"{op}: key must hold the {nodes} nodes of tree, got Lk = {key_length}"
            )
        _checks.same_device(op, query=query, tree=parents)


def _check_mask(mask: Tensor, full: tuple[int, ...], device: torch.device) -> None:
    op = "attention"
    _checks.tensor(op, "attn_mask", mask)
    if mask.dtype != torch.bool and not mask.dtype.is_floating_point:
        raise TypeError(f"{op}: attn_mask must be bool or floating point, got {mask.dtype}")
    if mask.device != device:
        raise ValueError(f"{op}: attn_mask must be on {device} like query, got {mask.device}")
    if mask.requires_grad:
        raise ValueError(f"{op}: attn_mask must not require grad; its gradient is not provided")
    sizes = tuple(mask.shape)
    fits = len(sizes) <= 4 and all(
        size in (1, whole) for size, whole in zip(reversed(sizes), reversed(full), strict=False)
    )
    if not fits:
        raise ValueError(
            f"{op}: attn_mask must broadcast to [B, Hq, Lq, Lk] = {list(full)}, got {list(sizes)}"
        )


def _check_per_sample(name: str, value: Tensor, batch: int, device: torch.device) -> None:
    _checks.tensor("attention", name, value)
    _checks.integer("attention", name, value)
    _checks.shape("attention", name, value, (batch,), "[B]")
    if value.device != device:
        raise ValueError(f"attention: {name} must be on {device} like query, got {value.device}")


def _check_lengths(key: Tensor, key_lengths: Tensor | None, parents: Tensor | None) -> None:
    """Range of key_lengths; the C++ kernels check it themselves."""
    if key_lengths is None or not _checks.readable(key_lengths) or key_lengths.numel() == 0:
        return
    limit = key.shape[2] - (0 if parents is None else parents.shape[1])
    low, high = int(key_lengths.min()), int(key_lengths.max())
    if low < 0 or high > limit:
        raise ValueError(f"attention: key_lengths must lie in [0, {limit}], got {low} to {high}")


def _forward_fake(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    query_offsets: Tensor | None,
    key_lengths: Tensor | None,
    parents: Tensor | None,
    query_offset: int,
    scale: float,
    is_causal: bool,
    entropy: str,
    normalize: bool,
    entropy_from: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    rows = tuple(query.shape[:3])
    dtype = reference.accumulation_dtype(query.dtype)
    statistic = (0,) if entropy == "none" else rows
    per_map = (rows[0], rows[2]) if entropy == "map" else statistic
    return (
        query.new_empty(*rows, value.shape[3]),
        query.new_empty(per_map, dtype=dtype),
        query.new_empty(rows, dtype=dtype),
        query.new_empty(rows, dtype=dtype),
        query.new_empty(statistic, dtype=dtype),
        query.new_empty(statistic, dtype=dtype),
        query.new_empty(per_map, dtype=dtype),
    )


def _backward_fake(
    grad_out: Tensor,
    grad_entropy: Tensor,
    grad_lse: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    query_offsets: Tensor | None,
    key_lengths: Tensor | None,
    parents: Tensor | None,
    out: Tensor,
    lse: Tensor,
    entropy_lse: Tensor,
    entropy_cross: Tensor,
    entropy_norm: Tensor,
    query_offset: int,
    scale: float,
    is_causal: bool,
    entropy: str,
    entropy_from: int,
) -> tuple[Tensor, Tensor, Tensor]:
    return tuple(x.new_empty(x.shape) for x in (query, key, value))  # type: ignore[return-value]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    query, key, value, attn_mask, offsets, lengths, parents, *settings = inputs
    out, _, lse, max_score, entropy_lse, entropy_cross, entropy_norm = output
    ctx.mark_non_differentiable(max_score, entropy_lse, entropy_cross, entropy_norm)
    saved = (query, key, value, attn_mask, offsets, lengths, parents)
    ctx.save_for_backward(*saved, out, lse, entropy_lse, entropy_cross, entropy_norm)
    ctx.settings = settings


def _backward(
    operator: str,
    ctx: Any,
    grad_out: Tensor,
    grad_entropy: Tensor,
    grad_lse: Tensor,
    *unused: Any,
) -> tuple[Tensor | None, ...]:
    offset, scale, is_causal, entropy, _, entropy_from = ctx.settings
    gradients = _library.native(operator)(
        grad_out,
        grad_entropy,
        grad_lse,
        *ctx.saved_tensors,
        offset,
        scale,
        is_causal,
        entropy,
        entropy_from,
    )
    return (*gradients, *(None,) * 10)


def _no_second_derivative(ctx: Any, *gradients: Tensor) -> None:
    raise NotImplementedError(
        "attention: second derivatives are not provided by this backend; "
        "use_backend('reference') computes them"
    )


_library.register_fake("attention_forward", _forward_fake)
_library.register_fake("attention_backward", _backward_fake)
# The native operators have their nodes in csrc/autograd/attention.cpp.
_library.register_autograd(
    "attention_forward", _backward, _setup_context, backward_op="attention_backward", native=False
)
_library.register_autograd("attention_backward", _no_second_derivative, native=False)

_direct_forward = _library.direct("attention_forward", AttentionOutput)
