"""Draft trees for speculative decoding of continuous tokens: walk, verification and cache commit.

Nothing here knows a model. Layout and sampling algebra: docs/ops/tree.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from . import _checks, _library, backends
from .reference import tree as reference


class TreeVerdict(NamedTuple):
    """What of a draft tree survives.

    Attributes:
        length: int64 ``[B]``, number of nodes on the accepted path.
        path: int64 ``[B, max_depth]``, their ids from the root, -1 padded.
        node: int64 ``[B]``, the deepest one, -1 if none.
    """

    length: Tensor
    path: Tensor
    node: Tensor


class ChainVerdict(NamedTuple):
    """What of a draft chain survives.

    Attributes:
        length: int64 ``[B]``, number of accepted positions, 0 to K.
        next_sample: ``[B, D]``, the vector that follows them, fp32 or wider.
    """

    length: Tensor
    next_sample: Tensor


class DraftTree:
    """N draft nodes per sample, each a child of an earlier node or of the prefix.

    Args:
        parents: int tensor ``[N]`` or ``[B, N]`` (or nested lists): index of the parent, which must
            be smaller than the node's own, or -1 for a child of the prefix.

    Attributes:
        parents: int64 ``[B, N]`` (``[1, N]`` for ``[N]`` input, shared by the batch).
        num_nodes: N.
        max_depth: number of levels; N where finding it out would cost a synchronisation.

    Raises:
        ValueError: wrong rank, or a parent that is out of range or not earlier than its node (where
            the values can be read without a synchronisation; elsewhere such nodes and their
            descendants are rejected by every walk).
        TypeError: not an integer tensor.
    """

    def __init__(self, parents: Tensor | Sequence[int] | Sequence[Sequence[int]]) -> None:
        if not isinstance(parents, Tensor):
            parents = _tensor_from(parents)
        _checks.integer("DraftTree", "parents", parents)
        if parents.dim() not in (1, 2):
            raise ValueError(
                f"DraftTree: parents must have shape [N] or [B, N], got {list(parents.shape)}"
            )
        parents = parents.to(
            torch.int64, copy=True
        )  # later writes to the input do not reach the tree
        self.parents = parents if parents.dim() == 2 else parents[None]
        self.num_nodes: int = self.parents.shape[1]
        self.max_depth: int = self.num_nodes
        self._ancestors: Tensor | None = None
        if _checks.readable(self.parents):
            self._validate()
            self.max_depth = int(self.depth.max()) + 1 if self.parents.numel() else 0

    def _validate(self) -> None:
        own = torch.arange(self.num_nodes)
        bad = ((self.parents < -1) | (self.parents >= own)).nonzero()
        if len(bad):
            batch, node = bad[0].tolist()
            raise ValueError(
                "DraftTree: parents must be -1 or an earlier node, got "
                f"{int(self.parents[batch, node])} for node {node} of tree {batch}"
            )

    @property
    def ancestors(self) -> Tensor:
        """bool ``[B, N, N]``: entry (i, j) says that node j is node i or one of its ancestors."""
        if self._ancestors is None:
            self._ancestors = reference.ancestor_matrix(self.parents)
        return self._ancestors

    @property
    def depth(self) -> Tensor:
        """int64 ``[B, N]``: distance from the root level; a root has depth 0 (positions for
        RoPE).
        """
        return self.ancestors.sum(-1) - 1

    def to(self, device: torch.device | str) -> DraftTree:
        """The same tree on another device; a validated tree stays validated."""
        moved = object.__new__(DraftTree)
        moved.parents = self.parents.to(device)
        moved.num_nodes, moved.max_depth, moved._ancestors = self.num_nodes, self.max_depth, None
        return moved

    def __repr__(self) -> str:
        trees, nodes = self.parents.shape
        return (
            f"DraftTree({trees} x {nodes} nodes, max_depth={self.max_depth}, {self.parents.device})"
        )


def _tensor_from(parents: object) -> Tensor:
    try:
        values = torch.tensor(parents)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(
            f"DraftTree: parents must be an integer tensor or lists: {error}"
        ) from error
    return values.to(torch.int64) if values.numel() == 0 else values


def _check_tree(
    op: str, tree: DraftTree, batch: int, nodes: int, device: torch.device, other: str
) -> None:
    if not isinstance(tree, DraftTree):
        raise TypeError(f"{op}: tree must be a DraftTree, got {type(tree).__name__}")
    if tree.num_nodes != nodes:
        raise ValueError(f"{op}: {other} must have {tree.num_nodes} nodes like tree, got {nodes}")
    if tree.parents.shape[0] not in (1, batch):
        raise ValueError(f"{op}: tree must hold 1 or {batch} trees, got {tree.parents.shape[0]}")
    if tree.parents.device != device:
        raise ValueError(f"{op}: tree is on {tree.parents.device}, {other} on {device}")


def walk_tree(tree: DraftTree, accept: Tensor) -> TreeVerdict:
    """Longest accepted path through a draft tree, for any acceptance test.

    A node lives when it and all its ancestors are accepted; the verdict is the deepest living node,
    the one of lowest index among equals.

    Args:
        tree: N nodes.
        accept: bool ``[B, N]``.

    Returns:
        :class:`TreeVerdict`, on the device of ``accept``.

    Raises:
        TypeError, ValueError: ``accept`` is not bool, or its shape or device do not fit ``tree``.
    """
    if backends.calls_cpp() and isinstance(tree, DraftTree):
        verdict: TreeVerdict | None = _direct_walk(tree.parents, accept, tree.max_depth)
        if verdict is not None:
            return verdict
    _checks.tensor("walk_tree", "accept", accept, rank=2)
    if accept.dtype != torch.bool:
        raise TypeError(f"walk_tree: accept must be bool, got {accept.dtype}")
    _check_tree("walk_tree", tree, accept.shape[0], accept.shape[1], accept.device, "accept")
    backend = backends.select("walk_tree", accept.device)
    if backend == "reference":
        return TreeVerdict(*reference.walk_tree(tree.parents, accept, tree.max_depth))
    return TreeVerdict(
        *_library.operator("walk_tree", backend)(tree.parents, accept, tree.max_depth)
    )


def verify_tree(tree: DraftTree, draft: Tensor, target: Tensor, *, tolerance: float) -> TreeVerdict:
    """Longest path of draft nodes that the target agrees with.

    Node i agrees when ``||draft_i - target_i||_2 <= tolerance``; NaN never agrees.

    Args:
        tree: N nodes.
        draft: ``[B, N, D]``, the proposed tokens.
        target: ``[B, N, D]``, the target's tokens at the same nodes, dtype of draft.
        tolerance: finite, >= 0, in the units of the tokens.

    Returns:
        :class:`TreeVerdict`.

    Raises:
        TypeError, ValueError: an argument of the wrong dtype, shape, device or range.
    """
    op = "verify_tree"
    if backends.calls_cpp() and isinstance(tree, DraftTree):
        verdict: TreeVerdict | None = _direct_verify(
            tree.parents, draft, target, tolerance, tree.max_depth
        )
        if verdict is not None:
            return verdict
    _checks.tensor(op, "draft", draft, rank=3)
    _checks.tensor(op, "target", target)
    _checks.same_device(op, draft=draft, target=target)
    _checks.floating(op, draft=draft, target=target)
    _check_tree(op, tree, draft.shape[0], draft.shape[1], draft.device, "draft")
    _checks.shape(op, "target", target, draft.shape, "[B, N, D]")
    if _checks.number(op, "tolerance", tolerance) < 0:
        raise ValueError(f"{op}: tolerance must be >= 0, got {tolerance}")
    backend = backends.select(op, draft.device)
    if backend == "reference":
        accept = reference.agreement(draft, target, tolerance)
        return TreeVerdict(*reference.walk_tree(tree.parents, accept, tree.max_depth))
    return TreeVerdict(
        *_library.operator(op, backend)(
            tree.parents, draft, target, float(tolerance), tree.max_depth
        )
    )


def verify_chain(
    draft: Tensor,
    draft_mean: Tensor,
    draft_std: Tensor,
    target_mean: Tensor,
    target_std: Tensor,
    *,
    generator: torch.Generator | None = None,
) -> ChainVerdict:
    """Lossless speculative sampling along a chain of isotropic Gaussians (the prior of Eq. 7).

    Position k is accepted with probability ``min(1, p_k / q_k)``, p the target's and q the draft's
    density; the first rejected one is replaced by a sample of the residual ``(p - q)+``, and K
    acceptances are followed by a sample of the (K+1)-th target. The emitted vectors are distributed
    as the target's.
    A standard deviation of 0 is a point mass: it is accepted only where draft and target are the
        same
    point mass, otherwise the target's own sample is emitted. Non-finite data rejects its position.

    Args:
        draft: ``[B, K, D]``, drawn from N(draft_mean, draft_std^2 I).
        draft_mean: ``[B, K, D]``.
        draft_std: ``[B, K]``, >= 0.
        target_mean: ``[B, K+1, D]``.
        target_std: ``[B, K+1]``, >= 0.
        generator: source of the one seed that this call consumes.

    Returns:
        :class:`ChainVerdict`. Residual sampling stops after 2^20 proposals, which changes the
        emitted distribution by less than 4e-7 in total variation.

    Raises:
        TypeError: a dtype is not supported.
        ValueError: shapes do not fit, or (on the CPU) a standard deviation is negative, NaN or
            infinite.
    """
    op = "verify_chain"
    seed = None
    if backends.calls_cpp() and isinstance(draft, Tensor):
        seed = _draw_seed(draft.device, generator)
        verdict: ChainVerdict | None = _direct_chain(
            draft, draft_mean, draft_std, target_mean, target_std, seed
        )
        if verdict is not None:
            return verdict
    _checks.tensor(op, "draft", draft, rank=3)
    batch, count, width = draft.shape
    tensors = {
        "draft": draft,
        "draft_mean": draft_mean,
        "draft_std": draft_std,
        "target_mean": target_mean,
        "target_std": target_std,
    }
    for name, x in tensors.items():
        _checks.tensor(op, name, x)
    _checks.same_device(op, **tensors)
    _checks.floating(op, **tensors)
    _checks.shape(op, "draft_mean", draft_mean, (batch, count, width), "[B, K, D]")
    _checks.shape(op, "draft_std", draft_std, (batch, count), "[B, K]")
    _checks.shape(op, "target_mean", target_mean, (batch, count + 1, width), "[B, K+1, D]")
    _checks.shape(op, "target_std", target_std, (batch, count + 1), "[B, K+1]")
    backend = backends.select(op, draft.device)
    name = "verify_chain_reference" if backend == "reference" else op
    if backend != "cpu":
        _check_std(draft_std=draft_std, target_std=target_std)
    if seed is None:
        seed = _draw_seed(draft.device, generator)
    return ChainVerdict(
        *_library.operator(name, backend)(
            draft, draft_mean, draft_std, target_mean, target_std, seed
        )
    )


def _draw_seed(device: torch.device, generator: torch.Generator | None) -> Tensor:
    return torch.randint(2**63 - 1, (1,), dtype=torch.int64, device=device, generator=generator)


def commit_path(
    key_cache: Tensor, value_cache: Tensor, key_lengths: Tensor, verdict: TreeVerdict
) -> Tensor:
    """Keep the accepted nodes' cache rows: move them, in place, to directly behind the prefix.

    Args:
        key_cache: ``[B, Hkv, Lmax, D]``; node i of sample b lies in row ``key_lengths[b] + i``.
        value_cache: ``[B, Hkv, Lmax, Dv]``, laid out alike.
        key_lengths: int ``[B]``, lengths of the prefixes.
        verdict: from :func:`walk_tree` or :func:`verify_tree`.

    Returns:
        The new lengths, ``key_lengths + verdict.length``, int64 ``[B]``. Rows behind them are
        unspecified.

    Raises:
        TypeError, ValueError: an argument of the wrong dtype, shape or device, or (on the CPU) a
            path that leaves the cache.
    """
    op = "commit_path"
    if not isinstance(verdict, TreeVerdict):
        raise TypeError(f"{op}: verdict must be a TreeVerdict, got {type(verdict).__name__}")
    lengths = None
    if backends.calls_cpp():
        # checks everything
        lengths = _direct_commit(key_cache, value_cache, key_lengths, verdict.path, verdict.length)
    if lengths is None:
        lengths = _commit(key_cache, value_cache, key_lengths, verdict)
    if not torch.compiler.is_compiling():
        # Autograd must see the write; compiled code is functionalised and needs no counter.
        torch.autograd.graph.increment_version((key_cache, value_cache))
    return lengths


def _commit(
    key_cache: Tensor, value_cache: Tensor, key_lengths: Tensor, verdict: TreeVerdict
) -> Tensor:
    """Arguments of any kind, on the backend that takes them."""
    op = "commit_path"
    _checks.tensor(op, "key_cache", key_cache, rank=4)
    _checks.tensor(op, "value_cache", value_cache, rank=4)
    _checks.floating(op, key_cache=key_cache, value_cache=value_cache)
    _checks.tensor(op, "key_lengths", key_lengths)
    _checks.integer(op, "key_lengths", key_lengths)
    path, length = verdict.path, verdict.length
    _checks.same_device(
        op, key_cache=key_cache, value_cache=value_cache, key_lengths=key_lengths, verdict=path
    )
    batch, heads, capacity, _ = key_cache.shape
    expected = (batch, heads, capacity, value_cache.shape[3])
    _checks.shape(op, "value_cache", value_cache, expected, "[B, Hkv, Lmax, Dv]")
    _checks.shape(op, "key_lengths", key_lengths, (batch,), "[B]")
    _checks.shape(op, "verdict.length", length, (batch,), "[B]")
    _checks.shape(op, "verdict.path", path, (batch, path.shape[-1]), "[B, max_depth]")
    for name, cache in (("key_cache", key_cache), ("value_cache", value_cache)):
        if cache.requires_grad:
            raise ValueError(f"{op}: {name} must not require grad; it is changed in place")
    backend = backends.select(op, key_cache.device)
    if backend != "cpu":
        _check_path(capacity, key_lengths, path, length)
    if backend == "reference":
        return reference.commit_path(key_cache, value_cache, key_lengths, path, length)
    result: Tensor = _library.operator(op, backend)(
        key_cache, value_cache, key_lengths, path, length
    )
    if not torch.compiler.is_compiling():
        # Autograd must see the write; compiled code is functionalised and needs no counter.
        torch.autograd.graph.increment_version((key_cache, value_cache))
    return result


def _check_std(**tensors: Tensor) -> None:
    """Standard deviations must be finite and >= 0; the C++ kernels check it themselves."""
    for name, std in tensors.items():
        if _checks.readable(std) and not bool(((std >= 0) & (std < torch.inf)).all()):
            raise ValueError(f"verify_chain: {name} must be finite and >= 0")


def _check_path(capacity: int, key_lengths: Tensor, path: Tensor, length: Tensor) -> None:
    """A path must stay inside the cache; the C++ kernels check it themselves."""
    if not _checks.readable(path) or path.numel() == 0:
        return
    level = torch.arange(path.shape[1])
    taken = level < length[:, None]
    row = key_lengths[:, None] + path
    bad = taken & ((path < level) | (row >= capacity) | (key_lengths[:, None] < 0))
    if bool(bad.any()) or bool((length > path.shape[1]).any()) or bool((length < 0).any()):
        raise ValueError(
            "commit_path: verdict and key_lengths must name rows inside the cache of "
            f"{capacity} rows"
        )


def _walk_fake(parents: Tensor, accept: Tensor, max_depth: int) -> tuple[Tensor, Tensor, Tensor]:
    batch = accept.shape[0]
    return (
        accept.new_empty(batch, dtype=torch.int64),
        accept.new_empty(batch, max_depth, dtype=torch.int64),
        accept.new_empty(batch, dtype=torch.int64),
    )


def _verify_fake(
    parents: Tensor, draft: Tensor, target: Tensor, tolerance: float, max_depth: int
) -> tuple[Tensor, Tensor, Tensor]:
    return _walk_fake(parents, draft, max_depth)


def _chain_fake(
    draft: Tensor,
    draft_mean: Tensor,
    draft_std: Tensor,
    target_mean: Tensor,
    target_std: Tensor,
    seed: Tensor,
) -> tuple[Tensor, Tensor]:
    batch, _, width = draft.shape
    dtype = torch.promote_types(draft.dtype, torch.float32)
    return draft.new_empty(batch, dtype=torch.int64), draft.new_empty(batch, width, dtype=dtype)


def _commit_fake(
    key_cache: Tensor, value_cache: Tensor, key_lengths: Tensor, path: Tensor, length: Tensor
) -> Tensor:
    return torch.empty_like(key_lengths, dtype=torch.int64)


_library.register_fake("walk_tree", _walk_fake)
_library.register_fake("verify_tree", _verify_fake)
_library.register_fake("verify_chain", _chain_fake)
_library.register_fake("commit_path", _commit_fake, mutates=("key_cache", "value_cache"))
# Rejection loops of data-dependent length cannot be traced, so the reference is an operator as
# well.
_library.define_reference("verify_chain_reference", reference.verify_chain, _chain_fake)

_direct_walk = _library.direct("walk_tree", TreeVerdict)
_direct_verify = _library.direct("verify_tree", TreeVerdict)
_direct_chain = _library.direct("verify_chain", ChainVerdict)
_direct_commit = _library.direct("commit_path")
