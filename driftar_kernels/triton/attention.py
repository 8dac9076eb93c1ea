"""Launchers of attention with row entropy; kernels in attention_forward.py and
attention_backward.py, derivation in docs/ops/attention.md."""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .attention_backward import key_gradient_kernel, query_gradient_kernel
from .attention_forward import forward_kernel, map_kernel, merge_kernel
from .elementary import check_dtype
from .tuning import MAP, MERGE_ROWS, Tile, attention_tile, key_splits

MASKS = {None: 0, "bool": 1, "float": 2}
ENTROPIES = {"none": 0, "head": 1, "map": 2}
SMALLEST_UNIT = 1e-20  # a smaller scale is none, and hidden scores must not become -inf * 0
STATISTICS = 7


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
        ancestor_kernel[(trees, triton.cdiv(nodes, lanes))](
            parents.contiguous(),
            bits,
            nodes,
            words,
            LANES=lanes,
            WORDS=triton.next_power_of_2(words),
        )
    return bits


def precision(query: Tensor) -> str:
    """How products of fp32 numbers are computed, as PyTorch's matmul precision says."""
    exact = query.dtype != torch.float32 or torch.get_float32_matmul_precision() == "highest"
    return "ieee" if exact else "tf32"


class Problem:
    """What the forward and the backward kernels are told alike.

    Attributes:
        tensors: pointers and strides of the inputs, by the kernels' parameter names.
        numbers: sizes, offsets and units of the scores.
        options: compile-time switches.
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
        entropy_from: int,
    ) -> None:
        check_dtype("attention", "query", query)
        self.batch, self.heads, self.query_length, self.width = query.shape
        self.key_heads, self.key_length, self.value_width = *key.shape[1:3], value.shape[3]
        self.group = self.heads // self.key_heads if self.key_heads else 1
        self.rows = self.batch * self.heads * self.query_length
        self.entropy = entropy
        nodes = self.query_length if parents is not None else 0
        longest = self.key_length - nodes
        lowest = -self.query_length - 1
        if query_offsets is not None:
            query_offsets = query_offsets.clamp(lowest, self.key_length).to(torch.int32)
        if key_lengths is not None:
            key_lengths = key_lengths.clamp(0, longest).to(torch.int32)
        ancestors = None if parents is None else pack_ancestors(parents)
        mask, kind = self._mask(attn_mask)

        self.tensors: dict[str, Any] = {
            "query": query,
            "key": key,
            "mask": query if mask is None else mask,
            "query_offsets": query if query_offsets is None else query_offsets,
            "key_lengths": query if key_lengths is None else key_lengths,
            "ancestors": query if ancestors is None else ancestors,
        }
        for name, x in (("query", query), ("key", key), ("mask", mask)):
            self._add_strides(self.tensors, name, x)
        self.value: dict[str, Any] = {"value": value}
        self._add_strides(self.value, "value", value)
        words = 0 if ancestors is None else ancestors.shape[2]
        shared = parents is None or parents.shape[0] == 1
        unit = max(abs(scale), SMALLEST_UNIT)
        self.unit = 1.0 if kind == "float" else unit
        self.numbers: dict[str, Any] = {
            "tree_stride": 0 if shared else self.query_length * words,
            "words": words,
            "query_length": self.query_length,
            "key_length": self.key_length,
            "query_offset": min(max(query_offset, lowest), self.key_length),
            "entropy_from": min(entropy_from, self.key_length),
            "score_scale": unit,
            "unit": self.unit,
        }
        self.options: dict[str, Any] = {
            "GROUP": self.group,
            "WIDTH": self.width,
            "BLOCK_WIDTH": padded(self.width),
            "MASK": MASKS[kind],
            "LENGTHS": key_lengths is not None,
            "OFFSETS": query_offsets is not None,
            "CAUSAL": is_causal,
            "TREE": parents is not None,
            "NEGATIVE": scale < 0,
            "PRECISION": precision(query),
        }
        self.value_options: dict[str, Any] = {
            "VALUE_WIDTH": self.value_width,
            "BLOCK_VALUE": padded(self.value_width),
            "ENTROPY": ENTROPIES[entropy],
            "SEPARATE": entropy != "none" and entropy_from > 0,
        }

    def tile(self, name: str) -> Tile:
        """The tile of one of the passes."""
        masked = bool(self.options["MASK"]) or self.options["TREE"]
        crowded = masked or (self.entropy == "map" and name != "forward")
        packed = self.query_length * self.group
        dtype = self.tensors["query"].dtype
        return attention_tile(name, dtype, self.width, self.value_width, packed, crowded)

    def _mask(self, attn_mask: Tensor | None) -> tuple[Tensor | None, str | None]:
        """The mask expanded by strides of 0, and what kind it is."""
        if attn_mask is None:
            return None, None
        full = (self.batch, self.heads, self.query_length, self.key_length)
        if attn_mask.dtype == torch.bool:
            return attn_mask.view(torch.int8).expand(full), "bool"
        if attn_mask.dtype == torch.float64:
            attn_mask = attn_mask.float()
        return attn_mask.expand(full), "float"

    @staticmethod
    def _add_strides(target: dict[str, Any], name: str, x: Tensor | None) -> None:
        strides = (0, 0, 0, 0) if x is None else x.stride()
        for axis, stride in zip(("batch", "head", "row", "column"), strides, strict=True):
            target[f"{name}_{axis}"] = stride

    @property
    def empty(self) -> bool:
        """Whether there are no query rows."""
        return self.rows == 0


def padded(width: int) -> int:
    """A head dimension as a power of two that the matrix units take."""
    return max(16, triton.next_power_of_2(width))


Forward = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


def attention_forward(
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
) -> Forward:
    """See :func:`driftar_kernels.attention`. Also what the backward pass needs: log-sum-exp over E,
    ``sum_j q log pi`` and the factor of the normalised entropy."""
    problem = Problem(
        query, key, value, attn_mask, query_offsets, key_lengths, parents, query_offset, scale,
        is_causal, entropy, entropy_from,
    )  # fmt: skip
    rows = query.shape[:3]
    per_row = (0,) if entropy == "none" else rows
    per_entropy = (rows[0], rows[2]) if entropy == "map" else per_row

    def statistic(shape: tuple[int, ...]) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=query.device)

    out = query.new_empty(*rows, value.shape[3])
    row_entropy, norm = statistic(per_entropy), statistic(per_entropy)
    lse, max_score = statistic(rows), statistic(rows)
    entropy_lse, cross = statistic(per_row), statistic(per_row)
    if problem.empty:
        row_entropy.zero_(), norm.zero_()  # a map of no heads has entropy 0
        return out, row_entropy, lse, max_score, entropy_lse, cross, norm

    results = {
        "out": out,
        "entropy": row_entropy,
        "lse": lse,
        "max_score": max_score,
        "entropy_lse": entropy_lse,
        "entropy_cross": cross,
        "entropy_norm": norm,
    }
    _stream_keys(problem, results, normalize)
    if entropy == "map":
        map_kernel[(problem.batch * triton.cdiv(problem.query_length, MAP.rows),)](
            **problem.tensors,
            **problem.numbers,
            **problem.options,
            entropy=row_entropy,
            entropy_lse=entropy_lse,
            entropy_cross=cross,
            entropy_norm=norm,
            query_heads=problem.heads,
            HEADS=triton.next_power_of_2(problem.heads),
            ROWS=MAP.rows,
            COLUMNS=MAP.columns,
            NORMALIZE=normalize,
            num_warps=MAP.warps,
            num_stages=MAP.stages,
        )
    return out, row_entropy, lse, max_score, entropy_lse, cross, norm


def _stream_keys(problem: Problem, results: dict[str, Tensor], normalize: bool) -> None:
    """The pass over the keys, split where there are too few rows to fill the device."""
    query = problem.tensors["query"]
    packed = problem.query_length * problem.group
    tile = problem.tile("forward")
    programs = problem.batch * problem.key_heads * triton.cdiv(packed, tile.rows)
    splits, keys = key_splits(query.device, programs, packed, problem.key_length, tile.columns)
    partial_out = partial = query
    if splits > 1:
        partial_out = torch.empty(
            splits, problem.rows, problem.value_width, dtype=torch.float32, device=query.device
        )
        partial = torch.empty(
            splits, STATISTICS, problem.rows, dtype=torch.float32, device=query.device
        )
    exponent = problem.unit * math.log2(math.e)
    switches = {key: problem.value_options[key] for key in ("ENTROPY", "SEPARATE")}
    forward_kernel[(programs, splits)](
        **problem.tensors,
        **problem.value,
        **problem.numbers,
        **problem.options,
        **problem.value_options,
        **results,
        partial_out=partial_out,
        partial=partial,
        batch=problem.batch,
        key_heads=problem.key_heads,
        split=keys,
        exponent=exponent,
        ROWS=tile.rows,
        COLUMNS=tile.columns,
        NORMALIZE=normalize,
        SPLIT=splits > 1,
        num_warps=tile.warps,
        num_stages=tile.stages,
    )
    if splits > 1:
        merge_kernel[(triton.cdiv(problem.rows, MERGE_ROWS),)](
            **results,
            **switches,
            partial_out=partial_out,
            partial=partial,
            rows=problem.rows,
            splits=splits,
            unit=problem.unit,
            exponent=exponent,
            VALUE_WIDTH=problem.value_width,
            BLOCK_VALUE=padded(problem.value_width),
            ROWS=MERGE_ROWS,
            NORMALIZE=normalize,
        )


def attention_backward(
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
    """Gradients of query, key and value from those of out, entropy and lse."""
    problem = Problem(
        query, key, value, attn_mask, query_offsets, key_lengths, parents, query_offset, scale,
        is_causal, entropy, entropy_from,
    )  # fmt: skip
    grad_query, grad_key, grad_value = (x.new_empty(x.shape) for x in (query, key, value))
    if problem.empty or problem.key_length == 0:
        return grad_query.zero_(), grad_key.zero_(), grad_value.zero_()

    weight = grad_entropy
    if entropy != "none":
        weight = (grad_entropy * entropy_norm).contiguous()
    common: dict[str, Any] = {
        **problem.tensors,
        **problem.value,
        **problem.numbers,
        **problem.options,
        **problem.value_options,
        "lse": lse.contiguous(),
        "entropy_lse": entropy_lse.contiguous(),
        "entropy_cross": entropy_cross.contiguous(),
        "entropy_weight": weight,
        "grad_out": grad_out,
        "delta": torch.empty(query.shape[:3], dtype=torch.float32, device=query.device),
        "key_heads": problem.key_heads,
        "scale": scale,
    }
    Problem._add_strides(common, "grad", grad_out)
    packed = problem.query_length * problem.group
    problems = problem.batch * problem.key_heads
    tile = problem.tile("query_gradient")
    query_gradient_kernel[(problems * triton.cdiv(packed, tile.rows),)](
        **common,
        out=out.contiguous(),
        grad_lse=grad_lse.contiguous(),
        grad_query=grad_query,
        ROWS=tile.rows,
        COLUMNS=tile.columns,
        num_warps=tile.warps,
        num_stages=tile.stages,
    )
    tile = problem.tile("key_gradient")
    key_gradient_kernel[(problems * triton.cdiv(problem.key_length, tile.columns),)](
        **common,
        grad_key=grad_key,
        grad_value=grad_value,
        ROWS=tile.rows,
        COLUMNS=tile.columns,
        num_warps=tile.warps,
        num_stages=tile.stages,
    )
    return grad_query, grad_key, grad_value
