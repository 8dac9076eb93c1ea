"""Launchers of the drifting field; algebra in docs/ops/drift.md."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Any

import torch
import triton
from torch import Tensor

from .. import _checks
from .drift_force_kernels import column_kernel, force_kernel, normaliser_kernel
from .drift_kernels import centre_kernel, distance_kernel, mean_kernel
from .elementary import check_dtype, check_like
from .launch import launch, recording
from .tuning import (
    DRIFT_CENTRE,
    DRIFT_DISTANCE,
    DRIFT_FEATURES,
    DRIFT_FORCE,
    DRIFT_NORMALISER,
    DRIFT_PRECISION,
    PANEL_ELEMENTS,
)


class Problem:
    """The points of B problems, centred: exact algebra that keeps close distances accurate.

    Attributes:
        centred: fp32 ``[B, M, S]``, in the order gen, neg, pos.
        norms: fp32 ``[B, M]``, squared.
    """

    def __init__(self, gen: Tensor, pos: Tensor, neg: Tensor | None, weight: Tensor) -> None:
        op = "drift_field"
        check_dtype(op, "gen", gen)
        _checks.tensor(op, "gen", gen, rank=3)
        if gen.numel() == 0:
            raise ValueError(f"{op}: gen must not be empty, got shape {list(gen.shape)}")
        self.batch, self.generated, self.features = gen.shape
        for name, x in (("pos", pos), ("neg", neg)):
            if x is not None:
                _checks.tensor(op, name, x, rank=3)
                expected = (self.batch, x.shape[1], self.features)
                check_like(op, name, x, expected, "[B, points, S]", gen)
        points = self.generated + pos.shape[1] + (0 if neg is None else neg.shape[1])
        check_like(op, "weight", weight, (self.batch, points), "[B, M]", gen, torch.float32)
        self.positives, self.points = pos.shape[1], weight.shape[1]
        self.weight = weight.contiguous()
        self.centred = self.statistic(self.batch, self.points, self.features)
        self.norms = self.statistic(self.batch, self.points)
        mean = self.statistic(self.batch, self.features)
        parts = {"gen": gen, "neg": pos[:, :0] if neg is None else neg, "pos": pos}
        strides = {
            f"{name}_{axis}": stride
            for name, x in parts.items()
            for axis, stride in zip(("batch", "row", "column"), x.stride(), strict=True)
        }
        common: dict[str, Any] = {
            **parts,
            **strides,
            "mean": mean,
            "generated": self.generated,
            "negatives": self.points - self.generated - self.positives,
            "positives": self.positives,
            "features": self.features,
            "POINTS": DRIFT_CENTRE.rows,
            "FEATURES": DRIFT_CENTRE.columns,
        }
        feature_blocks = triton.cdiv(self.features, DRIFT_CENTRE.columns)
        launch(mean_kernel, (self.batch * feature_blocks,), **common)
        point_blocks = triton.cdiv(self.points, DRIFT_CENTRE.rows)
        launch(
            centre_kernel,
            (self.batch * point_blocks,),
            **common,
            centred=self.centred,
            norms=self.norms,
        )

    def statistic(self, *shape: int) -> Tensor:
        """Uninitialised fp32 memory beside the points."""
        return torch.empty(shape, dtype=torch.float32, device=self.weight.device)

    def panels(self) -> Iterator[tuple[int, int]]:
        """(first row, rows) of the panels whose distances are kept at a time."""
        step = DRIFT_NORMALISER.rows
        height = max(PANEL_ELEMENTS // (self.batch * self.points) // step, 1) * step
        for first in range(0, self.generated, height):
            yield first, min(height, self.generated - first)

    def distances(self, first: int, rows: int, target: Tensor | None) -> Tensor:
        """Fill ``target`` [B, rows, M], where there is one; partial sums of weighted distances."""
        tile = DRIFT_DISTANCE
        programs = (
            self.batch * triton.cdiv(rows, tile.rows) * triton.cdiv(self.points, tile.columns)
        )
        partial = self.statistic(programs)
        launch(
            distance_kernel,
            (programs,),
            self.centred,
            self.norms,
            self.weight,
            partial if target is None else target,
            partial,
            self.points,
            self.features,
            first,
            rows,
            STORE=target is not None,
            ROWS=tile.rows,
            COLUMNS=tile.columns,
            FEATURES=DRIFT_FEATURES,
            PRECISION=DRIFT_PRECISION,
            num_warps=tile.warps,
            num_stages=tile.stages,
        )
        return partial


def drift_distances(
    gen: Tensor, pos: Tensor, neg: Tensor | None, weight: Tensor, keep: bool
) -> tuple[Tensor, Tensor]:
    """Distances ``[B, N, M]`` if they are to be kept, and the two sums of the scale."""
    problem = Problem(gen, pos, neg, weight)
    kept = problem.statistic(problem.batch if keep else 0, problem.generated, problem.points)
    partial = problem.distances(0, problem.generated, kept if keep else None)
    total = partial.sum(dtype=torch.float64) / problem.generated
    sums = torch.stack([total, weight.sum(dtype=torch.float64)])
    return kept, sums.to(torch.float32)


def _inverse(temperatures: tuple[float, ...], device: torch.device) -> Tensor:
    """1 / R on the device."""
    return torch.tensor([1.0 / value for value in temperatures], device=device)


_kept_inverse = lru_cache(maxsize=64)(_inverse)  # copied there once


def drift_force(
    gen: Tensor,
    pos: Tensor,
    neg: Tensor | None,
    weight: Tensor,
    distances: Tensor,
    scale: Tensor,
    temperatures: Sequence[float],
) -> tuple[Tensor, Tensor]:
    """Raw force of each temperature ``[T, B, N, S]`` and its sum of squares ``[T]``."""
    op = "drift_force"
    problem = Problem(gen, pos, neg, weight)
    check_like(op, "scale", scale, (), "[]", gen, torch.float32)
    if distances.numel():
        expected = (problem.batch, problem.generated, problem.points)
        check_like(op, "distances", distances, expected, "[B, N, M]", gen, torch.float32)
    if not temperatures or min(temperatures) <= 0:
        raise ValueError(f"{op}: temperatures must be > 0, got {list(temperatures)}")
    count = len(temperatures)
    # A recorded tensor belongs to its graph.
    inverse_of = _inverse if recording(normaliser_kernel) else _kept_inverse
    inverse = inverse_of(tuple(temperatures), gen.device)
    if distances.numel():
        panels = [(0, problem.generated)]
        scratch = distances.contiguous()
    else:
        panels = list(problem.panels())
        scratch = problem.statistic(problem.batch * panels[0][1] * problem.points)
    tiles = triton.cdiv(problem.generated, DRIFT_NORMALISER.rows)
    row_lse = problem.statistic(problem.batch, count, problem.generated)
    column_lse = problem.statistic(problem.batch, count, problem.points)
    column_least = problem.statistic(problem.batch, tiles, problem.points)
    column_sum = problem.statistic(problem.batch, tiles, count, problem.points)
    padded = triton.next_power_of_2(count)

    for first, rows in panels:
        if not distances.numel():
            problem.distances(first, rows, scratch)
        launch(
            normaliser_kernel,
            (problem.batch * triton.cdiv(rows, DRIFT_NORMALISER.rows),),
            scratch,
            scale,
            inverse,
            row_lse,
            column_least,
            column_sum,
            count,
            problem.points,
            problem.generated,
            first,
            rows,
            tiles,
            TEMPERATURES=padded,
            ROWS=DRIFT_NORMALISER.rows,
            COLUMNS=DRIFT_NORMALISER.columns,
            num_warps=DRIFT_NORMALISER.warps,
        )
    block = DRIFT_NORMALISER.columns
    launch(
        column_kernel,
        (problem.batch * triton.cdiv(problem.points, block),),
        column_least,
        column_sum,
        inverse,
        column_lse,
        count,
        problem.points,
        tiles,
        TEMPERATURES=padded,
        COLUMNS=block,
    )
    force = problem.statistic(count, problem.batch, problem.generated, problem.features)
    squares = torch.zeros(count, dtype=torch.float64, device=gen.device)
    tile = DRIFT_FORCE
    for first, rows in panels:
        if len(panels) > 1:
            problem.distances(first, rows, scratch)
        programs = (
            problem.batch
            * triton.cdiv(rows, tile.rows)
            * triton.cdiv(problem.features, DRIFT_FEATURES)
        )
        partial = problem.statistic(count, programs)
        launch(
            force_kernel,
            (programs, count),
            problem.centred,
            problem.weight,
            scratch,
            scale,
            inverse,
            row_lse,
            column_lse,
            force,
            partial,
            count,
            problem.batch,
            problem.points,
            problem.positives,
            problem.generated,
            problem.features,
            first,
            rows,
            math.sqrt(problem.features),
            ROWS=tile.rows,
            COLUMNS=tile.columns,
            FEATURES=DRIFT_FEATURES,
            PRECISION=DRIFT_PRECISION,
            num_warps=tile.warps,
            num_stages=tile.stages,
        )
        squares += partial.sum(1, dtype=torch.float64)
    return force, squares.to(torch.float32)
