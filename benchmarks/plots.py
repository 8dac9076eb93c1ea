"""The plots of a report: time and memory against length, distance to the floor."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from .cases import MEGABYTE, OURS, TITLES
from .record import Record

_COLOURS = ("#0b5394", "#d9822b", "#7a7a7a", "#4a9a6a", "#a05195", "#b03a2e")
_DPI = 150


def draw_all(records: Sequence[Record], directory: Path) -> list[Path]:
    """Draw what the records allow; returns the files."""
    drawn = []
    for name, group, label, unit in (
        ("time_against_length", "attention-length", "milliseconds", 1e-3),
        ("memory_against_length", "memory-length", "megabytes", MEGABYTE),
    ):
        members = [entry for entry in records if entry.group == group]
        if members:
            drawn.append(directory / f"{name}.png")
            _against_length(members, label, unit, drawn[-1])
    members = [e for e in records if e.floor and e.unit == "s" and e.group != "attention-length"]
    if members:
        drawn.append(directory / "distance_to_floor.png")
        _distances(members, drawn[-1])
    return drawn


def draw_stages(bars: Mapping[str, Mapping[str, float]], stages: Sequence[str], path: Path) -> None:
    """Stacked horizontal bars of seconds per stage, one bar per entry, each of its own length.

    Bars are scaled to their model's slower variant, so that short and long ones can be compared;
    the total stands behind each.
    """
    figure, axes = plt.subplots(figsize=(8, 0.5 * len(bars) + 1.2), layout="constrained")
    longest: dict[str, float] = {}
    for label, parts in bars.items():
        model = label.partition("\n")[0]
        longest[model] = max(longest.get(model, 0.0), sum(parts.values()))
    for y, (label, parts) in enumerate(bars.items()):
        scale, left = longest[label.partition("\n")[0]], 0.0
        for stage, colour in zip(stages, _COLOURS, strict=False):
            width = 100 * parts[stage] / scale
            name = stage if y == 0 else None
            axes.barh(y, width, left=left, color=colour, height=0.7, label=name)
            left += width
        axes.text(left + 1, y, f"{sum(parts.values()):.3g} s", va="center", fontsize=8)
    axes.set_yticks(range(len(bars)), list(bars), fontsize=7)
    axes.set_ylim(len(bars) - 0.5, -0.5)
    axes.set_xlim(0, 115)
    axes.set_xlabel("% of the slower variant's time for one image")
    figure.legend(fontsize=8, frameon=False, ncols=len(stages), loc="outside upper center")
    _save(figure, path)


def _against_length(records: Sequence[Record], label: str, unit: float, path: Path) -> None:
    """One panel per dtype, one line per competitor, both axes logarithmic."""
    dtypes = list(dict.fromkeys(entry.dtype for entry in records))
    figure, axes = plt.subplots(
        1, len(dtypes), figsize=(5.2 * len(dtypes), 3.8), layout="constrained", squeeze=False
    )
    for place, dtype in zip(axes[0], dtypes, strict=True):
        members = sorted((e for e in records if e.dtype == dtype), key=lambda e: e.sizes["L"])
        names = list(dict.fromkeys(name for entry in members for name in entry.figures))
        names.sort(key=lambda name: name != OURS)
        for name, colour in zip(names, _COLOURS, strict=False):
            points = [
                (e.sizes["L"], e.figures[name] / unit)
                for e in members
                if e.figures.get(name, 0) > 0
            ]
            width = 2.4 if name == OURS else 1.4
            place.plot(*zip(*points, strict=True), "o-", ms=4, lw=width, color=colour, label=name)
        floors = [(e.sizes["L"], e.floor / unit) for e in members if e.floor]
        if floors:
            place.plot(*zip(*floors, strict=True), "k:", lw=1, label="floor")
        place.set_xscale("log", base=2)
        place.set_yscale("log")
        place.xaxis.set_major_locator(FixedLocator([e.sizes["L"] for e in members]))
        place.xaxis.set_minor_locator(NullLocator())
        place.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        place.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        title = TITLES[members[0].group].removesuffix(", by length")
        place.set_title(f"{title}\n{_fixed(members)}, {dtype}", fontsize=9)
        place.set(xlabel="length L", ylabel=label)
        place.grid(alpha=0.25)
        place.legend(fontsize=8, frameon=False)
    _save(figure, path)


def _distances(records: Sequence[Record], path: Path) -> None:
    """Time divided by the floor: a row per group and dtype, a dot per case; the peer of the first
    target below ours.
    """
    rows = list(dict.fromkeys((entry.group, entry.dtype) for entry in records))
    rows.sort(key=lambda row: list(TITLES).index(row[0]))
    figure, axes = plt.subplots(figsize=(9, 0.42 * len(rows) + 1.2), layout="constrained")
    labels = []
    for y, row in enumerate(rows):
        members = [entry for entry in records if (entry.group, entry.dtype) == row]
        peer = members[0].targets[0].peer if members[0].targets else None
        _dots(axes, y - 0.15, _distances_of(members, OURS), _COLOURS[0], filled=True)
        _dots(axes, y + 0.15, _distances_of(members, peer), _COLOURS[1], filled=False)
        labels.append(f"{TITLES[row[0]]}, {row[1]}\nagainst {peer}")
    axes.axvline(1, color="black", linewidth=1, linestyle=":")
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.set_yticks(range(len(rows)), labels, fontsize=7)
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.grid(alpha=0.25, axis="x")
    axes.set_xlabel("time / floor; 1 = the matrix products or the memory traffic alone")
    axes.set_title("Distance to the floor: driftar (filled), peer (open), one dot per case")
    axes.title.set_fontsize(9)
    _save(figure, path)


def _dots(axes: Any, y: float, values: Sequence[float], colour: str, *, filled: bool) -> None:
    face = colour if filled else "none"
    axes.plot(values, [y] * len(values), "o", ms=5, mfc=face, mec=colour, alpha=0.8)


def _distances_of(records: Sequence[Record], name: str | None) -> list[float]:
    return [e.figures[name] / e.floor for e in records if e.floor and name in e.figures]


def _fixed(records: Sequence[Record]) -> str:
    """The sizes that all records share."""
    first = records[0].sizes
    shared = {n: s for n, s in first.items() if all(e.sizes[n] == s for e in records) and n != "L"}
    return " ".join(f"{name}={size}" for name, size in shared.items())


def _save(figure: Any, path: Path) -> None:
    figure.savefig(path, dpi=_DPI)
    plt.close(figure)
