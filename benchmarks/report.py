"""Tables and plots from a benchmark run: ``python -m benchmarks.report --help``."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import machine, plots, record
from .cases import TITLES
from .record import Record

DEFAULT_INPUT = Path("build/benchmarks.json")
RESULTS = Path("benchmarks/results")
_EPILOG = f"""\
Measure first, with nothing else running, then report:

  pytest benchmarks/ --benchmark-json={DEFAULT_INPUT}
  python -m benchmarks.report

`make bench` does both. The directory receives report.md, the plots and benchmarks.json, a copy of
the input without the single samples, from which the report can be made again.
"""


@dataclass(frozen=True)
class Run:
    """One benchmark run, as read from its JSON."""

    date: str
    machine: Mapping[str, Any]
    records: Sequence[Record]
    source: Mapping[str, Any]


def read_run(path: Path) -> Run:
    """The records of a pytest-benchmark JSON; ValueError with the path and the reason otherwise."""
    try:
        source = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ValueError(
            f"{path} does not exist; measure with: pytest benchmarks/ --benchmark-json={path}"
        ) from error
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    try:
        entries = [entry["extra_info"]["record"] for entry in source["benchmarks"]]
        described = source["machine_info"]["driftar"]
        date = source["datetime"]
        records = [record.from_json(entry) for entry in entries]
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is not the JSON of `pytest benchmarks/`: {error!r}") from error
    if not records:
        raise ValueError(f"{path} holds no measurement")
    return Run(date, described, records, source)


def to_markdown(run: Run, images: Iterable[Path] = ()) -> str:
    """The report: machine, targets, one table per group."""
    info = run.machine
    lines = [
        "# Benchmarks",
        "",
        f"{info['cpu']}, {info['cores']} cores, {info['threads']} threads, "
        f"{info['instruction_set']}; {info['system']}.",
        f"driftar {info['driftar']} ({info['compiler']}), PyTorch {info['torch']}, "
        f"Python {info['python']}; {run.date}.",
        "",
        "Medians of interleaved rounds in one process; a ratio is ours divided by the peer's: less",
        "is better. Every case was checked against an fp64 oracle before it was timed. The method:",
        "[docs/benchmarks.md](../../../docs/benchmarks.md).",
        "",
        *_summary(run.records),
    ]
    lines += [f"![{image.stem.replace('_', ' ')}]({image.name})\n" for image in images]
    for group, title in TITLES.items():
        members = [entry for entry in run.records if entry.group == group]
        if members:
            lines += [f"## {title}", "", *_table(members), ""]
    return "\n".join(lines)


def write_report(run: Run, directory: Path) -> list[Path]:
    """Write the table, the plots and the reduced JSON; returns what was written."""
    directory.mkdir(parents=True, exist_ok=True)
    images = plots.draw_all(run.records, directory)
    report, data = directory / "report.md", directory / "benchmarks.json"
    report.write_text(to_markdown(run, images), encoding="utf-8")
    data.write_text(json.dumps(_without_samples(run.source), indent=1) + "\n", encoding="utf-8")
    return [report, data, *images]


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.report",
        description="Write a Markdown table and plots from the JSON of `pytest benchmarks/`.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "json",
        nargs="?",
        type=Path,
        default=DEFAULT_INPUT,
        help="what `pytest benchmarks/ --benchmark-json=...` wrote (default: %(default)s)",
    )
    parser.add_argument(
        "--output",
        type=Path,
        help=f"directory to write (default: {RESULTS}/<machine of the measurement>)",
    )
    options = parser.parse_args(arguments)
    try:
        run = read_run(options.json)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    directory = options.output or RESULTS / machine.directory_name(run.machine)
    for path in write_report(run, directory):
        print(path)
    return 0


def _summary(records: Sequence[Record]) -> list[str]:
    rows = [["group", "cases", "targets met"]]
    for group, title in TITLES.items():
        members = [entry for entry in records if entry.group == group]
        verdicts = [entry.met(target) for entry in members for target in entry.targets]
        if members:
            met = f"{verdicts.count(True)} of {len(verdicts)}" if verdicts else "-"
            rows.append([title, str(len(members)), met])
    return [*markdown_table(rows), ""]


def _table(records: Sequence[Record]) -> list[str]:
    peers = list(
        dict.fromkeys(name for entry in records for name in (*entry.ratios(), *entry.unavailable))
    )
    targets, floors = (any(e.targets for e in records), any(e.floor for e in records))
    header = ["case", "ours", *(f"/ {name}" for name in peers)]
    header += ["target", "met"] * targets + ["/ floor"] * floors
    rows = [header]
    for entry in records:
        ratios = entry.ratios()
        row = [entry.label, record.format_figure(entry.ours, entry.unit)]
        row += [record.format_ratio(ratios[p]) if p in ratios else "-" for p in peers]
        if targets:
            row.append("; ".join(record.format_target(t, entry.unit) for t in entry.targets))
            row.append("; ".join(_verdict(entry.met(t)) for t in entry.targets))
        if floors:
            row.append(f"{entry.ours / entry.floor:.2f}x" if entry.floor else "-")
        rows.append(row)
    return [*markdown_table(rows), *_absences(records)]


def _verdict(met: bool | None) -> str:
    return "-" if met is None else "yes" if met else "**no**"


def _absences(records: Sequence[Record]) -> list[str]:
    reasons: dict[tuple[str, str], int] = {}
    for entry in records:
        for item in entry.unavailable.items():
            reasons[item] = reasons.get(item, 0) + 1
    return [
        f"\n{name} did not run in {count} of {len(records)} cases: {reason}"
        for (name, reason), count in reasons.items()
    ]


def markdown_table(rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a table whose first row is the header."""
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return [lines[0], "|" + "---|" * len(rows[0]), *lines[1:]]


def _without_samples(source: Mapping[str, Any]) -> dict[str, Any]:
    kept = ("group", "name", "extra_info")
    entries = [{name: entry[name] for name in kept} for entry in source["benchmarks"]]
    info = {"driftar": source["machine_info"]["driftar"]}
    return {"datetime": source["datetime"], "machine_info": info, "benchmarks": entries}


if __name__ == "__main__":
    sys.exit(main())
