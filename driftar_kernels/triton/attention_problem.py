"""What the launchers of attention tell their kernels."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import _checks
from ..attention import ENTROPY_KINDS, check_arguments
from . import autotune
from .elementary import check_dtype
from .launch import launch, power_of_two, recording
from .structures import Hiding, Matrix, Units
from .tuning import Tile, attention_pass, attention_tiles, inner_chunk

MASKS = {None: 0, torch.bool: 1}  # anything else is added
FLOAT_MASK = 2
ENTROPIES = {"none": 0, "head": 1, "map": 2}
# What the best tile of a pass may depend on, besides the dtype and whether keys are many.
TUNED_BY = ("block_width", "block_value", "causal", "entropy", "separate", "precision")
LONG = 2048  # keys
SMALLEST_UNIT = 1e-20  # a smaller scale is none, and hidden scores must not become -inf * 0


@triton.jit(do_not_specialize=["nodes"])
def ancestor_kernel(parents, bits, nodes, words, LANES: tl.constexpr, WORDS: tl.constexpr):
    """Bit j of row i: node j is node i or one of its ancestors; 32 nodes a word."""
    tree = tl.program_id(0).to(tl.int64)
    lane = tl.program_id(1) * LANES + tl.arange(0, LANES)
    word = tl.arange(0, WORDS)
    current = tl.where(lane < nodes, lane, -1)
    row = tl.zeros([LANES, WORDS], tl.int32)
    while tl.max(current, 0) >= 0:
        here = (current >> 5)[:, None] == word[None, :]
        row = tl.where(here & (current >= 0)[:, None], row | (1 << (current & 31))[:, None], row)
        at = parents + tree * nodes + tl.maximum(current, 0)
        above = tl.load(at, mask=current >= 0, other=-1).to(tl.int32)
        current = tl.where(above < current, above, -1)  # parents precede their children
    at = bits + (tree * nodes + lane)[:, None] * words + word[None, :]
    tl.store(at, row, mask=(lane < nodes)[:, None] & (word < words)[None, :])


def pack_ancestors(parents: Tensor) -> Tensor:
    """int32 ``[trees, N, words]`` of :func:`ancestor_kernel`; parents int64 ``[trees, N]``."""
    trees, nodes = parents.shape
    words = triton.cdiv(nodes, 32)
    bits = torch.empty(trees, nodes, words, dtype=torch.int32, device=parents.device)
    if bits.numel():
        lanes = 16
        launch(
            ancestor_kernel,
            (trees, triton.cdiv(nodes, lanes)),
            parents.contiguous(),
            bits,
            nodes,
            words,
            LANES=lanes,
            WORDS=power_of_two(words),
        )
    return bits


def precision(query: Tensor) -> str:
    """How products of fp32 numbers are computed, as PyTorch's matmul precision says."""
    exact = query.dtype != torch.float32 or torch.get_float32_matmul_precision() == "highest"
    return "ieee" if exact else "tf32"


def padded(width: int) -> int:
    """A head dimension as a power of two that the matrix units take."""
    return power_of_two(width, at_least=16)


def matrix(x: Tensor) -> Matrix:
    """``[B, heads, rows, columns]`` in any layout."""
    return Matrix(x, *x.stride())


@lru_cache(maxsize=1024)
def _options(**values: Any) -> str:
    return json.dumps(values)


class Problem:
    """What the forward and the backward kernels are told alike.

    Attributes:
        query, key, value: as the kernels take them.
        rows: number of query rows, B Hq Lq.
        packed: rows of one key head.
        hiding, units: as the kernels take them.
        sizes: the kernels' parameters of these names.
    """

    def __init__(
        self,
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
    ) -> None:
        if parents is not None:
            _checks.tensor("attention", "parents", parents, rank=2)
            _checks.integer("attention", "parents", parents)
            if is_causal:
                raise ValueError("attention: is_causal must be False with tree")
        check_arguments(
            query, key, value, attn_mask, query_offset if query_offsets is None else query_offsets,
            key_lengths, parents, enable_gqa=True,
        )  # fmt: skip
        _checks.floating("attention", query=query, key=key, value=value)
        check_dtype("attention", "query", query)
        _checks.choice("attention", "entropy", entropy, ENTROPY_KINDS)
        _checks.integral("attention", "entropy_from", entropy_from, minimum=0)
        self.batch, self.heads, self.query_length, self.width = query.shape
        self.key_heads, self.key_length, self.value_width = *key.shape[1:3], value.shape[3]
        self.group = int(self.heads // self.key_heads) if self.key_heads else 1
        self.rows = self.batch * self.heads * self.query_length
        self.packed = self.query_length * self.group
        self.device, self.dtype, self.entropy = query.device, query.dtype, entropy
        self.widest = max(self.width, self.value_width)
        self.query, self.key, self.value = matrix(query), matrix(key), matrix(value)

        longest = self.key_length - (0 if parents is None else self.query_length)
        lowest = -self.query_length - 1
        if query_offsets is not None:
            query_offsets = query_offsets.clamp(lowest, self.key_length).to(torch.int32)
        if key_lengths is not None:
            key_lengths = key_lengths.clamp(0, longest).to(torch.int32)
        ancestors = None if parents is None else pack_ancestors(parents)
        words = 0 if ancestors is None else ancestors.shape[2]
        shared = parents is None or parents.shape[0] == 1
        self.hiding = Hiding(
            Matrix(None, 0, 0, 0, 0) if attn_mask is None else matrix(self._expanded(attn_mask)),
            query_offsets,
            key_lengths,
            ancestors,
            0 if shared else self.query_length * words,
            words,
        )
        mask_kind = MASKS.get(None if attn_mask is None else attn_mask.dtype, FLOAT_MASK)
        unit = max(abs(scale), SMALLEST_UNIT)
        natural = 1.0 if mask_kind == FLOAT_MASK else unit
        self.units = Units(unit, natural, natural * math.log2(math.e))
        self.sizes: dict[str, int] = {
            "key_heads": self.key_heads,
            "query_length": self.query_length,
            "key_length": self.key_length,
            "query_offset": min(max(query_offset, lowest), self.key_length),
            "entropy_from": min(entropy_from, self.key_length),
        }
        rounding = precision(query)
        self._fields: dict[str, Any] = {
            "group": self.group,
            "width": int(self.width),
            "value_width": int(self.value_width),
            "block_width": padded(self.width),
            "block_value": padded(self.value_width),
            "chunk": inner_chunk(query.dtype, rounding, self.widest),
            "mask": mask_kind,
            "lengths": key_lengths is not None,
            "offsets": query_offsets is not None,
            "causal": is_causal,
            "tree": parents is not None,
            "entropy": ENTROPIES[entropy],
            "separate": entropy != "none" and entropy_from > 0,
            "normalize": normalize,
            "negative": scale < 0,
            "precision": rounding,
        }

    def options(self, tile: Tile) -> str:
        """The Options, as text, of a kernel that runs in such tiles."""
        return _options(**self._fields, rows=tile.rows, columns=tile.columns)

    def run(self, name: str, launch: Callable[[Tile], None]) -> None:
        """Launch a pass ("forward", "query_gradient", "key_gradient") in its tile."""
        name = attention_pass(name, self.packed)
        crowded = self._fields["mask"] != 0 or self._fields["tree"]
        tiles = attention_tiles(name, self.dtype, self._fields["precision"], self.widest, crowded)
        fields = tuple(self._fields[field] for field in TUNED_BY)
        shape_class = (name, self.dtype, self.key_length > LONG, *fields)
        autotune.run(self.device, shape_class, tiles, launch, recording(ancestor_kernel))

    def _expanded(self, attn_mask: Tensor) -> Tensor:
        """The mask in full shape, by strides of 0."""
        if attn_mask.dtype == torch.bool:
            attn_mask = attn_mask.view(torch.int8)
        elif attn_mask.dtype == torch.float64:
            attn_mask = attn_mask.float()
        return attn_mask.expand(self.batch, self.heads, self.query_length, self.key_length)
