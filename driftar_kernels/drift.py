"""The multi-temperature drifting field of *Generative Modeling via Drifting* (arXiv 2602.04770).

Derivation, memory and numerics: docs/ops/drift.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import _checks, _library, backends
from .reference import drift as reference

NORMALIZATIONS = ("bilateral",)
TEMPERATURES = (0.02, 0.05, 0.2)
MAX_KEPT = 1 << 24  # elements of the N x M distances of all problems: 64 MB in fp32
MAX_KEPT_OF_SMALL = 1 << 26  # the same, of problems as small as these:
# Which problems are many and small: kSmallElements and kManyProblems of csrc/cpu/drift.h.
MAX_SMALL = 1 << 16  # elements of one problem's N x M distances
MIN_PROBLEMS = 16  # fewer problems are computed block by block, whatever their size


# gen, pos, neg
Weights = tuple[Tensor | None, Tensor | None, Tensor | None]


class DriftField(NamedTuple):
    """Result of :func:`drift_field`.

    Attributes:
        force: ``[B, N, S]``, in units of ``max(scale / sqrt(S), 1e-3)``; fp32 (fp64 for fp64
            inputs).
        scale: scalar, weighted mean distance over the whole batch.
        norms: ``[T]``, mean squared raw force of every temperature: the curve to watch in training.
    """

    force: Tensor
    scale: Tensor
    norms: Tensor


def drift_field(
    gen: Tensor,
    pos: Tensor,
    neg: Tensor | None = None,
    *,
    temperatures: Sequence[float] = TEMPERATURES,
    gen_weight: Tensor | None = None,
    pos_weight: Tensor | None = None,
    neg_weight: Tensor | None = None,
    normalization: str = "bilateral",
    group: torch.distributed.ProcessGroup | None = None,
) -> DriftField:
    """Force that moves generated samples towards data and away from each other.

    Equal to the published drift loss case by case, but for its distances: points are centred
    first, which is exact algebra, so the cancellation of the published Gram formula is not
    reproduced. Each generated sample is attracted by the positives and repelled by the other
    generated samples and the negatives, with weights exp(-distance / (temperature * scale))
    normalised over rows and columns (geometric mean of both softmaxes) and balanced so that the
    field is anti-symmetric. Every temperature is normalised to unit RMS over the batch; the forces
    are summed. No gradient flows.

    Args:
        gen: ``[B, N, S]``, generated samples; B independent problems. fp32, bf16, fp16 (computed in
            fp32) or fp64.
        pos: ``[B, P, S]``, data; P = 0 gives force 0.
        neg: ``[B, Q, S]``, further samples to be repelled by, or None.
        temperatures: at least one, finite and > 0, in units of ``scale``.
        gen_weight, pos_weight, neg_weight: ``[B, N]``, ``[B, P]``, ``[B, Q]``, finite and >= 0; 1
            by default.
        normalization: "bilateral", the published one.
        group: process group over which ``scale`` and the norms are all-reduced, so that
            data-parallel training equals one process on the whole batch.

    Returns:
        :class:`DriftField`.

    Raises:
        TypeError: a dtype is not supported, or dtypes differ.
        ValueError: a shape, device or value is wrong; B, N or S is 0.

    Under autocast 16-bit inputs are widened to fp32 first.
    """
    weights = (gen_weight, pos_weight, neg_weight)
    return _field("drift_field", gen, pos, neg, weights, temperatures, normalization, group)[0]


def drift_loss(
    gen: Tensor,
    pos: Tensor,
    neg: Tensor | None = None,
    *,
    temperatures: Sequence[float] = TEMPERATURES,
    gen_weight: Tensor | None = None,
    pos_weight: Tensor | None = None,
    neg_weight: Tensor | None = None,
    normalization: str = "bilateral",
    group: torch.distributed.ProcessGroup | None = None,
    reduction: str = "mean",
) -> Tensor:
    """Squared distance between ``gen / scale_inputs`` and its drifted, constant goal.

    The value is the mean squared force, flat by construction (each temperature has unit RMS): watch
    :attr:`DriftField.norms` instead. Its gradient, to ``gen`` only, is
    ``-2 force / (N S scale_inputs)`` up to the reduction, ``scale_inputs = max(scale / sqrt(S),
    1e-3)``.

    Args:
        reduction: "mean" over the B problems gives a scalar, "none" gives ``[B]``. All other
            arguments as in :func:`drift_field`.

    Returns:
        Scalar or ``[B]``, fp32 (fp64 for fp64 inputs).

    Raises:
        TypeError, ValueError: as :func:`drift_field`, or an unknown ``reduction``.
    """
    _checks.choice("drift_loss", "reduction", reduction, ("mean", "none"))
    weights = (gen_weight, pos_weight, neg_weight)
    field, loss = _field("drift_loss", gen, pos, neg, weights, temperatures, normalization, group)
    if loss is None:
        loss = torch.linalg.vector_norm(field.force, dim=(1, 2)).square() / field.force[0].numel()
    if _library.differentiates(gen):
        unit = reference.input_scale(field.scale, gen.shape[2])
        native = backends.select("drift_loss", gen.device) in ("cpu", "cuda")
        loss = _Loss.apply(gen, loss, field.force, unit, native)
    if reduction == "none":
        return loss
    return loss.mean() if gen.shape[0] > 1 else loss.squeeze(0)


class _Loss(torch.autograd.Function):
    """``mean_is ((gen - constant) / unit - force)^2`` of every problem, where gen = constant."""

    @staticmethod
    def forward(
        ctx: Any, gen: Tensor, loss: Tensor, force: Tensor, unit: Tensor, native: bool
    ) -> Tensor:
        ctx.native = native
        ctx.save_for_backward(gen, force, unit)
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor, None, None, None, None]:
        gen, force, unit = ctx.saved_tensors
        factor = grad_loss * (-2 / (unit * force[0].numel()))
        if torch.is_grad_enabled():  # zero, but for its derivative
            wide = gen.to(force.dtype)
            force = force - (wide - wide.detach()) / unit
        elif ctx.native:
            gradient = _library.native("drift_loss_gradient")(force, factor, gen.dtype)
            return gradient, None, None, None, None
        return (force * factor[:, None, None]).to(gen.dtype), None, None, None, None


def _field(
    op: str,
    gen: Tensor,
    pos: Tensor,
    neg: Tensor | None,
    weights: Weights,
    temperatures: Sequence[float],
    normalization: str,
    group: torch.distributed.ProcessGroup | None,
) -> tuple[DriftField, Tensor | None]:
    """The field and, where it comes with it, the mean squared force of every problem ``[B]``."""
    plain = group is None and normalization == "bilateral" and _unweighted(weights)
    if plain and backends.calls_cpp() and _ranks_fit(gen, pos, neg):
        _, keep = _plan(gen, pos, neg)
        results = _direct_field(gen, pos, neg, None, keep, temperatures)  # checks the rest
        if results is not None:
            force, scale, norms, loss = results
            return DriftField(force, scale, norms), loss
    values = _check(op, gen, pos, neg, weights, temperatures, normalization)
    gen, pos, *rest = _checks.widen_under_autocast(
        gen.device, gen.detach(), pos.detach(), *([] if neg is None else [neg.detach()])
    )
    neg = rest[0] if rest else None
    backend = backends.select(op, gen.device)
    many_small, keep = _plan(gen, pos, neg)
    if backend == "cpu" and group is None:
        weight = None if _unweighted(weights) else _stack_weights(gen, pos, neg, weights)
        force, scale, norms, loss = _library.native("drift_field")(
            gen, pos, neg, weight, keep, values
        )
        return DriftField(force, scale, norms), loss
    weight = _stack_weights(gen, pos, neg, weights)
    with torch.no_grad(), _checks.without_autocast(gen.device):
        if backend == "reference":
            _, sums = reference.drift_distances(gen, pos, neg, weight)
        else:
            distances, sums = _library.operator("drift_distances", backend)(
                gen, pos, neg, weight, keep
            )
        sums = _all_reduce(sums, group)
        scale = sums[0] / sums[1].clamp(min=torch.finfo(sums.dtype).tiny)
        points = (gen, pos, neg, weight)
        if backend in ("cpu", "cuda") and many_small:
            # A second look at the points costs less than the raw forces' way through memory.
            forces = (*points, distances, scale, values)
            squares, balances = _library.native("drift_squares")(*forces)
            norms = _norms(squares, gen, group)
            force, square = _library.native("drift_combined_force")(
                *forces, balances, _factors(norms)
            )
            return DriftField(force, scale, norms), square / force[0].numel()
        if backend == "reference":
            raw, squares = reference.drift_force(*points, scale, values)
        else:
            raw, squares = _library.operator("drift_force", backend)(
                *points, distances, scale, values
            )
        norms = _norms(squares, gen, group)
        force = torch.mv(raw.flatten(1).t(), _factors(norms)).view(gen.shape)
    return DriftField(force, scale, norms), None


def _unweighted(weights: Weights) -> bool:
    gen_weight, pos_weight, neg_weight = weights
    return gen_weight is None and pos_weight is None and neg_weight is None


def _ranks_fit(gen: Tensor, pos: Tensor, neg: Tensor | None) -> bool:
    return (
        isinstance(gen, Tensor)
        and isinstance(pos, Tensor)
        and gen.dim() == pos.dim() == 3
        and (neg is None or (isinstance(neg, Tensor) and neg.dim() == 3))
    )


def _plan(gen: Tensor, pos: Tensor, neg: Tensor | None) -> tuple[bool, bool]:
    """Whether the problems are many and small, and whether their distances are kept."""
    batch, count, _ = gen.shape
    pairs = count * (count + pos.shape[1] + (0 if neg is None else neg.shape[1]))
    many_small = batch >= MIN_PROBLEMS and pairs <= MAX_SMALL
    return many_small, batch * pairs <= (MAX_KEPT_OF_SMALL if many_small else MAX_KEPT)


def _check(
    op: str,
    gen: Tensor,
    pos: Tensor,
    neg: Tensor | None,
    weights: Weights,
    temperatures: Sequence[float],
    normalization: str,
) -> list[float]:
    _checks.tensor(op, "gen", gen, rank=3)
    batch, count, features = gen.shape
    for dimension, size in (("B", batch), ("N", count), ("S", features)):
        if size == 0:
            raise ValueError(
                f"{op}: gen must not be empty, got {dimension} = 0 in {list(gen.shape)}"
            )
    samples = {"gen": gen, "pos": pos} | ({} if neg is None else {"neg": neg})
    for name, x in samples.items():
        _checks.tensor(op, name, x, rank=3)
        _checks.shape(op, name, x, (batch, x.shape[1], features), f"[B, {name[0].upper()}, S]")
    _checks.same_device(op, **samples)
    if _checks.autocast_dtype(gen.device) is None:
        _checks.floating(op, **samples)
    for name, weight in zip(("gen", "pos", "neg"), weights, strict=True):
        if weight is None:
            continue
        label = f"{name}_weight"
        if name not in samples:
            raise ValueError(f"{op}: {label} must be None without {name}")
        _checks.tensor(op, label, weight)
        if not weight.dtype.is_floating_point:
            raise TypeError(f"{op}: {label} must be floating point, got {weight.dtype}")
        _checks.shape(
            op, label, weight, samples[name].shape[:2], f"{list(samples[name].shape[:2])}"
        )
        _checks.same_device(op, gen=gen, **{label: weight})
        if _checks.readable(weight) and not bool(((weight >= 0) & (weight < torch.inf)).all()):
            raise ValueError(f"{op}: {label} must be finite and >= 0")
    _checks.choice(op, "normalization", normalization, NORMALIZATIONS)
    if isinstance(temperatures, (str, Tensor)) or not isinstance(temperatures, Sequence):
        raise TypeError(
            f"{op}: temperatures must be a sequence of numbers, got {type(temperatures).__name__}"
        )
    if len(temperatures) == 0:
        raise ValueError(f"{op}: temperatures must hold at least one value")
    values = [float(_checks.number(op, "temperatures", value)) for value in temperatures]
    if min(values) <= 0:
        raise ValueError(f"{op}: temperatures must be > 0, got {min(values)}")
    return values


def _stack_weights(gen: Tensor, pos: Tensor, neg: Tensor | None, weights: Weights) -> Tensor:
    """Weights of all points ``[B, M]`` in the order gen, neg, pos."""
    dtype = torch.promote_types(gen.dtype, torch.float32)
    gen_weight, pos_weight, neg_weight = weights
    if _unweighted(weights):
        count = gen.shape[1] + pos.shape[1] + (0 if neg is None else neg.shape[1])
        return gen.new_ones(gen.shape[0], count, dtype=dtype)
    pairs = [(gen, gen_weight), (neg, neg_weight), (pos, pos_weight)]
    return torch.cat(
        [
            torch.ones(x.shape[:2], dtype=dtype, device=x.device)
            if w is None
            else w.detach().to(dtype)
            for x, w in pairs
            if x is not None
        ],
        dim=1,
    )


def _all_reduce(values: Tensor, group: torch.distributed.ProcessGroup | None) -> Tensor:
    if group is not None:
        torch.distributed.all_reduce(values, group=group)
    return values


def _norms(squares: Tensor, gen: Tensor, group: torch.distributed.ProcessGroup | None) -> Tensor:
    """Mean squared raw force of every temperature over the global batch."""
    if group is None:
        return squares / gen.numel()
    count = squares.new_full((1,), gen.numel())
    totals = _all_reduce(torch.cat([squares, count]), group)
    return totals[:-1] / totals[-1]


def _factors(norms: Tensor) -> Tensor:
    """What every temperature's raw force is multiplied by in the sum."""
    return norms.clamp(min=reference.MIN_MEAN_SQUARE).rsqrt()


def _distances_fake(
    gen: Tensor, pos: Tensor, neg: Tensor | None, weight: Tensor, keep: bool
) -> tuple[Tensor, Tensor]:
    dtype = torch.promote_types(gen.dtype, torch.float32)
    shape = (gen.shape[0] if keep else 0, gen.shape[1], weight.shape[1])
    return gen.new_empty(shape, dtype=dtype), gen.new_empty(2, dtype=dtype)


def _field_fake(
    gen: Tensor,
    pos: Tensor,
    neg: Tensor | None,
    weight: Tensor | None,
    keep: bool,
    temperatures: Sequence[float],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dtype = torch.promote_types(gen.dtype, torch.float32)
    return (
        gen.new_empty(gen.shape, dtype=dtype),
        gen.new_empty((), dtype=dtype),
        gen.new_empty(len(temperatures), dtype=dtype),
        gen.new_empty(gen.shape[0], dtype=dtype),
    )


def _force_fake(
    gen: Tensor,
    pos: Tensor,
    neg: Tensor | None,
    weight: Tensor,
    distances: Tensor,
    scale: Tensor,
    temperatures: Sequence[float],
) -> tuple[Tensor, Tensor]:
    dtype = torch.promote_types(gen.dtype, torch.float32)
    count = len(temperatures)
    return gen.new_empty(count, *gen.shape, dtype=dtype), gen.new_empty(count, dtype=dtype)


def _squares_fake(
    gen: Tensor,
    pos: Tensor,
    neg: Tensor | None,
    weight: Tensor,
    distances: Tensor,
    scale: Tensor,
    temperatures: Sequence[float],
) -> tuple[Tensor, Tensor]:
    count = len(temperatures)
    balances = weight.new_empty(gen.shape[0], count, 3 * gen.shape[1] + weight.shape[1])
    return weight.new_empty(count), balances


def _combined_force_fake(
    gen: Tensor,
    pos: Tensor,
    neg: Tensor | None,
    weight: Tensor,
    distances: Tensor,
    scale: Tensor,
    temperatures: Sequence[float],
    balances: Tensor,
    factors: Tensor,
) -> tuple[Tensor, Tensor]:
    return weight.new_empty(gen.shape), weight.new_empty(gen.shape[0])


def _loss_gradient_fake(force: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    return force.new_empty(force.shape, dtype=dtype)


_library.register_fake("drift_field", _field_fake, twin=False)
_library.register_fake("drift_distances", _distances_fake)
_library.register_fake("drift_force", _force_fake)
_library.register_fake("drift_squares", _squares_fake, twin=False)
_library.register_fake("drift_combined_force", _combined_force_fake, twin=False)
_library.register_fake("drift_loss_gradient", _loss_gradient_fake, twin=False)

_direct_field = _library.direct("drift_field")
