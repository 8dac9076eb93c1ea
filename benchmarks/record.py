"""What a measurement leaves in pytest-benchmark's JSON, and how it compares with its targets."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from .cases import MEGABYTE, OURS, Case, Target


@dataclass(frozen=True)
class Record:
    """One case with its figures.

    Attributes:
        group, label, sizes, dtype, unit, targets: of the case; ``dtype`` by its short name.
        figures: competitor -> figure in ``unit``; :data:`OURS` among them.
        unavailable: competitor -> why it did not run.
        floor: lower bound of any implementation, in ``unit``.
    """

    group: str
    label: str
    sizes: dict[str, int]
    dtype: str
    unit: Literal["s", "B"]
    targets: tuple[Target, ...]
    figures: dict[str, float]
    unavailable: dict[str, str]
    floor: float | None = None

    @property
    def ours(self) -> float:
        return self.figures[OURS]

    def ratios(self) -> dict[str, float]:
        """Ours divided by each peer's figure."""
        return {
            name: self.ours / value
            for name, value in self.figures.items()
            if name != OURS and value > 0
        }

    def met(self, target: Target) -> bool | None:
        """Whether a target is reached; None when its peer did not run."""
        if target.peer is None:
            return self.ours <= target.limit
        if target.peer not in self.figures:
            return None
        reference = self.figures[target.peer]
        if target.kind == "excess":
            return self.ours - reference <= target.limit
        return self.ours <= target.limit * reference

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def from_case(
    case: Case,
    figures: Mapping[str, float],
    *,
    unavailable: Mapping[str, str] | None = None,
    floor: float | None = None,
) -> Record:
    return Record(
        group=case.group,
        label=case.label,
        sizes=dict(case.sizes),
        dtype=case.dtype_name,
        unit=case.unit,
        targets=case.targets,
        figures=dict(figures),
        unavailable=dict(unavailable or {}),
        floor=floor,
    )


def from_json(value: Mapping[str, Any]) -> Record:
    """Inverse of :meth:`Record.to_json`; ValueError for anything else."""
    names = {field.name for field in dataclasses.fields(Record)}
    if set(value) != names:
        raise ValueError(f"not a benchmark record, its fields are {sorted(value)}")
    targets = tuple(Target(**target) for target in value["targets"])
    record = Record(**{**value, "targets": targets})
    if OURS not in record.figures:
        raise ValueError(f"the record of {record.label} holds no figure of {OURS}")
    return record


def format_figure(value: float, unit: str) -> str:
    """Three significant digits with a readable unit."""
    if unit == "B":
        return f"{value / MEGABYTE:.3g} MB"
    for scale, name in ((1.0, "s"), (1e-3, "ms")):
        if abs(value) >= scale:
            return f"{value / scale:.3g} {name}"
    return f"{value * 1e6:.3g} us"


def format_target(target: Target, unit: str) -> str:
    """As in ``0.85x of SDPA``."""
    if target.kind == "ratio":
        return f"{format_ratio(target.limit)} of {target.peer}"
    figure = format_figure(target.limit, unit)
    return figure if target.peer is None else f"{target.peer} + {figure}"


def format_ratio(value: float) -> str:
    """Two decimals, more where the ratio is small."""
    return f"{value:.2f}x" if value >= 0.1 else f"{value:.3f}x"
