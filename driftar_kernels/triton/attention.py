"""Launchers of attention with row entropy; derivation in docs/ops/attention.md."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import triton
from torch import Tensor

from .. import _checks
from .attention_backward import key_gradient_kernel, query_gradient_kernel
from .attention_forward import STATISTICS, forward_kernel
from .attention_map import map_kernel, map_key_gradient_kernel, map_query_gradient_kernel
from .attention_merge import merge_kernel
from .attention_problem import Problem, matrix
from .launch import launch, power_of_two
from .structures import Results, Saved
from .tuning import MAP, MAP_GRADIENT, MERGE_ROWS, Tile, key_splits

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
        is_causal, entropy, normalize, entropy_from,
    )  # fmt: skip
    rows = query.shape[:3]
    per_row = (0,) if entropy == "none" else rows
    per_entropy = (rows[0], rows[2]) if entropy == "map" else per_row

    def statistic(shape: tuple[int, ...]) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=query.device)

    results = Results(
        out=query.new_empty(*rows, value.shape[3]),
        entropy=statistic(per_entropy),
        lse=statistic(rows),
        max_score=statistic(rows),
        entropy_lse=statistic(per_row),
        entropy_cross=statistic(per_row),
        entropy_norm=statistic(per_entropy),
    )
    if problem.rows == 0:
        results.entropy.zero_(), results.entropy_norm.zero_()  # a map of no heads has entropy 0
        return tuple(results)
    problem.run("forward", partial(_stream_keys, problem, results))
    if entropy == "map":
        launch(
            map_kernel,
            (problem.batch * triton.cdiv(problem.query_length, MAP.rows),),
            problem.query,
            problem.key,
            problem.hiding,
            problem.units,
            results.entropy,
            results.entropy_lse,
            results.entropy_cross,
            results.entropy_norm,
            **problem.sizes,
            HEADS=power_of_two(problem.heads),
            option_text=problem.options(MAP),
            num_warps=MAP.warps,
            num_stages=MAP.stages,
        )
    return tuple(results)


def _stream_keys(problem: Problem, results: Results, tile: Tile) -> None:
    """The pass over the keys, split where there are too few rows to fill the device."""
    options = problem.options(tile)
    programs = problem.batch * problem.key_heads * triton.cdiv(problem.packed, tile.rows)
    splits, keys = key_splits(
        problem.device, programs, problem.packed, problem.key_length, tile.columns
    )
    partial_out = statistics = None
    if splits > 1:
        partial_out = results.lse.new_empty(splits, problem.rows, problem.value_width)
        statistics = results.lse.new_empty(splits, STATISTICS.value, problem.rows)
    launch(
        forward_kernel,
        (programs, splits),
        problem.query,
        problem.key,
        problem.value,
        problem.hiding,
        problem.units,
        results,
        partial_out,
        statistics,
        problem.batch,
        **problem.sizes,
        split=keys,
        SPLIT=splits > 1,
        option_text=options,
        num_warps=tile.warps,
        num_stages=tile.stages,
    )
    if splits > 1:
        launch(
            merge_kernel,
            (triton.cdiv(problem.rows, MERGE_ROWS),),
            results,
            partial_out,
            statistics,
            problem.units,
            problem.rows,
            splits,
            ROWS=MERGE_ROWS,
            option_text=options,
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
        is_causal, entropy, True, entropy_from,
    )  # fmt: skip
    per_row = {"lse": lse, "grad_lse": grad_lse}
    per_entropy: dict[str, Tensor] = {}
    if entropy != "none":
        per_row.update(entropy_lse=entropy_lse, entropy_cross=entropy_cross)
        per_entropy.update(grad_entropy=grad_entropy, entropy_norm=entropy_norm)
    _check_statistics(problem, grad_out, out, per_row, per_entropy)
    if problem.rows == 0 or problem.key_length == 0:
        return query.new_zeros(query.shape), key.new_zeros(key.shape), value.new_zeros(value.shape)
    weight = grad_entropy
    if entropy != "none":
        weight = (grad_entropy * entropy_norm).contiguous()
    saved = Saved(
        lse=lse.contiguous(),
        entropy_lse=entropy_lse.contiguous(),
        entropy_cross=entropy_cross.contiguous(),
        entropy_weight=weight,
        delta=torch.empty(query.shape[:3], dtype=torch.float32, device=query.device),
    )
    common = (
        problem.query, problem.key, problem.value, matrix(grad_out), problem.hiding, problem.units,
        saved,
    )  # fmt: skip
    row_inputs = (out.contiguous(), grad_lse.contiguous())
    run = _map_gradients if entropy == "map" else _gradients
    return run(problem, common, row_inputs, (query, key, value), scale)


def _gradients(
    problem: Problem,
    common: tuple[Any, ...],
    row_inputs: tuple[Tensor, Tensor],
    inputs: tuple[Tensor, Tensor, Tensor],
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """One kernel for the queries' gradient, which also leaves delta, and one for the keys'."""
    grad_query, grad_key, grad_value = (x.new_empty(x.shape) for x in inputs)
    problems = problem.batch * problem.key_heads

    def of_queries(tile: Tile) -> None:
        launch(
            query_gradient_kernel,
            (problems * triton.cdiv(problem.packed, tile.rows),),
            *common,
            *row_inputs,
            grad_query,
            **problem.sizes,
            scale=scale,
            option_text=problem.options(tile),
            num_warps=tile.warps,
            num_stages=tile.stages,
        )

    def of_keys(tile: Tile) -> None:
        launch(
            key_gradient_kernel,
            (problems * triton.cdiv(problem.key_length, tile.columns),),
            *common,
            grad_key,
            grad_value,
            **problem.sizes,
            scale=scale,
            option_text=problem.options(tile),
            num_warps=tile.warps,
            num_stages=tile.stages,
        )

    problem.run("query_gradient", of_queries)
    problem.run("key_gradient", of_keys)
    return grad_query, grad_key, grad_value


def _map_gradients(
    problem: Problem,
    common: tuple[Any, ...],
    row_inputs: tuple[Tensor, Tensor],
    inputs: tuple[Tensor, Tensor, Tensor],
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """All heads of a tile in one program, whose gradients add up in memory."""
    sums = tuple(torch.zeros(x.shape, dtype=torch.float32, device=x.device) for x in inputs)
    tile = MAP_GRADIENT
    settings: dict[str, Any] = {
        **problem.sizes,
        "option_text": problem.options(tile),
        "num_warps": tile.warps,
        "num_stages": tile.stages,
    }
    launch(
        map_query_gradient_kernel,
        (problem.batch * triton.cdiv(problem.query_length, tile.rows),),
        *common,
        *row_inputs,
        sums[0],
        **settings,
    )
    launch(
        map_key_gradient_kernel,
        (problem.batch * triton.cdiv(problem.key_length, tile.columns),),
        *common,
        *sums[1:],
        **settings,
    )
    for scaled in sums[:2]:
        scaled.mul_(scale)
    grad_query, grad_key, grad_value = (x.to(problem.dtype) for x in sums)
    return grad_query, grad_key, grad_value


def _check_statistics(
    problem: Problem,
    grad_out: Tensor,
    out: Tensor,
    per_row: dict[str, Tensor],
    per_entropy: dict[str, Tensor],
) -> None:
    """What the forward pass returned and its gradients: kernels read as much as they expect."""
    op = "attention_backward"
    rows = (problem.batch, problem.heads, problem.query_length)
    for name, x in (("grad_out", grad_out), ("out", out)):
        _checks.shape(op, name, x, (*rows, problem.value_width), "[B, Hq, Lq, Dv]")
        if x.dtype != problem.dtype:
            raise TypeError(f"{op}: {name} must be {problem.dtype} like query, got {x.dtype}")
    for name, x in per_row.items():
        _checks.shape(op, name, x, rows, "[B, Hq, Lq]")
    for name, x in per_entropy.items():
        if problem.entropy == "map":
            _checks.shape(op, name, x, (rows[0], rows[2]), "[B, Lq]")
        else:
            _checks.shape(op, name, x, rows, "[B, Hq, Lq]")
    statistics = {**per_row, **per_entropy}
    for name, x in statistics.items():
        if x.dtype != torch.float32:
            raise TypeError(f"{op}: {name} must be fp32, got {x.dtype}")
    _checks.same_device(op, query=problem.query.data, grad_out=grad_out, out=out, **statistics)
