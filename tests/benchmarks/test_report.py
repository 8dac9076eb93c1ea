"""The benchmark report: figures, targets, plots and errors, from made-up measurements."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import cases, record
from benchmarks.cases import OURS, Case, Target
from benchmarks.machine import describe, directory_name
from benchmarks.report import main, read_run

FORWARD = cases.of("attention-forward")[0]


def entry(case: Case, figures: dict[str, float], **more: Any) -> dict[str, Any]:
    """As pytest-benchmark writes it, single samples included."""
    return {
        "group": case.group,
        "name": str(case),
        "stats": {"data": [1.0, 2.0]},
        "extra_info": {"record": record.from_case(case, figures, **more).to_json()},
    }


def write(path: Path, entries: list[dict[str, Any]]) -> Path:
    source = {
        "machine_info": {"node": "secret", "driftar": describe()},
        "datetime": "2026-01-02T03:04:05",
        "benchmarks": entries,
    }
    path.write_text(json.dumps(source))
    return path


@pytest.fixture
def measured(tmp_path: Path) -> Path:
    entries = [
        entry(
            FORWARD,
            {OURS: 8e-3, cases.SDPA: 10e-3, cases.SDPA_TWICE: 12e-3},
            unavailable={cases.FLEX_TWICE: "NotImplementedError: no lse"},
            floor=4e-3,
        )
    ]
    for group in ("attention-length", "memory-length"):
        scale = 1e-6 if group == "attention-length" else 1e3
        entries += [
            entry(case, {OURS: scale * case["L"], cases.SDPA: 2 * scale * case["L"]})
            for case in cases.of(group)
        ]
    return write(tmp_path / "run.json", entries)


def test_the_table_carries_figures_ratios_and_verdicts(measured: Path, tmp_path: Path) -> None:
    assert main([str(measured), "--output", str(tmp_path / "out")]) == 0
    text = (tmp_path / "out/report.md").read_text()
    row = next(line for line in text.splitlines() if line.startswith(f"| {FORWARD.label} |"))
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells[1:5] == ["8 ms", "0.80x", "0.67x", "-"]
    assert cells[5].startswith("0.85x of SDPA without entropy")
    assert cells[6:] == ["yes; **no**; -", "2.00x"]
    assert "FlexAttention twice did not run in 1 of 1 cases: NotImplementedError: no lse" in text
    assert "| 1 of 3 |" in text
    assert describe()["cpu"] in text and "2026-01-02" in text


def test_plots_are_drawn_and_linked(measured: Path, tmp_path: Path) -> None:
    main([str(measured), "--output", str(tmp_path / "out")])
    text = (tmp_path / "out/report.md").read_text()
    for name in ("time_against_length", "memory_against_length", "distance_to_floor"):
        image = tmp_path / "out" / f"{name}.png"
        assert image.read_bytes().startswith(b"\x89PNG") and image.stat().st_size > 10_000
        assert f"({name}.png)" in text


def test_the_kept_data_makes_the_same_report(measured: Path, tmp_path: Path) -> None:
    main([str(measured), "--output", str(tmp_path / "a")])
    kept = tmp_path / "a/benchmarks.json"
    assert "secret" not in kept.read_text() and '"data"' not in kept.read_text()
    main([str(kept), "--output", str(tmp_path / "b")])
    assert (tmp_path / "a/report.md").read_text() == (tmp_path / "b/report.md").read_text()


def test_a_partial_run_draws_what_it_can(tmp_path: Path) -> None:
    source = write(tmp_path / "run.json", [entry(cases.of("memory")[0], {OURS: 3e6})])
    assert main([str(source), "--output", str(tmp_path / "out")]) == 0
    assert not list((tmp_path / "out").glob("*.png"))
    assert "| 3 MB | 64 MB | yes |" in (tmp_path / "out/report.md").read_text()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "does not exist; measure with: pytest benchmarks/"),
        ("{", "cannot be read"),
        ("[]", "is not the JSON"),
        ('{"machine_info": {}, "datetime": "", "benchmarks": []}', "is not the JSON"),
        (
            '{"machine_info": {"driftar": {}}, "datetime": "", "benchmarks": []}',
            "holds no measurement",
        ),
    ],
)
def test_unusable_input_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: str | None, message: str
) -> None:
    path = tmp_path / "run.json"
    if content is not None:
        path.write_text(content)
    assert main([str(path), "--output", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert message in error and str(path) in error
    assert not (tmp_path / "out").exists()


def test_a_record_without_our_figure_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "run.json", [entry(FORWARD, {cases.SDPA: 1.0})])
    with pytest.raises(ValueError, match="no figure of driftar"):
        read_run(path)


@pytest.mark.parametrize(
    ("target", "ours", "met"),
    [
        (Target(0.5, "peer"), 1.0, True),
        (Target(0.5, "peer"), 1.01, False),
        (Target(1.0, "peer", "excess"), 3.0, True),
        (Target(1.0, "peer", "excess"), 3.1, False),
        (Target(1.0, kind="absolute"), 1.0, True),
        (Target(1.0, kind="absolute"), 1.1, False),
        (Target(1.0, "absent"), 0.1, None),
    ],
)
def test_targets(target: Target, ours: float, met: bool | None) -> None:
    case = Case("overhead", {}, targets=(target,))
    assert record.from_case(case, {OURS: ours, "peer": 2.0}).met(target) is met


@pytest.mark.parametrize(
    ("value", "unit", "text"),
    [(1.5, "s", "1.5 s"), (0.0123, "s", "12.3 ms"), (15e-6, "s", "15 us"), (64e6, "B", "64 MB")],
)
def test_figures_are_readable(value: float, unit: str, text: str) -> None:
    assert record.format_figure(value, unit) == text


def test_the_table_of_cases_is_consistent() -> None:
    names = [(case.group, str(case)) for case in cases.CASES]
    assert len(set(names)) == len(names)
    assert {case.group for case in cases.CASES} == set(cases.TITLES)
    assert all(case.dtype in (torch.float32, torch.bfloat16) for case in cases.CASES)


def test_machine_names_make_plain_directories() -> None:
    machine = {"cpu": "Intel(R) Xeon(R) @ 2.0GHz", "cores": 2, "instruction_set": "avx512"}
    assert directory_name(machine) == "intel-xeon-2-0ghz-2-cores-avx512"
