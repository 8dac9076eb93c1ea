"""Merging reports, tables, the latency measurement and the figures' checks."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from driftar.figures import draw_class_grid, draw_entropy, draw_losses
from driftar.latency import measure_interleaved
from driftar.report import first_of_each_class, format_report, format_summary, merge_reports


def report(seed: int, distance: float) -> dict[str, Any]:
    metrics = {"frechet_distance": 4.0, "conditional_accuracy": 0.5, "variance_ratio": 0.9}
    latency = {"decoder_nfe": 1, "decoder_ms": 1.0, "ar_ms": 2.0, "total_ms": 3.0}
    method = {
        "title": "method",
        "latency": latency,
        "speedup": {"decoder": 1.0, "total": 1.0},
        "metrics": metrics,
    }
    drift = copy.deepcopy(method)
    drift["metrics"]["frechet_distance"] = distance  # type: ignore[index]
    return {
        "seed": seed,
        "date": "2026-01-01T00:00:00+00:00",
        "config": {"seed": seed, "dataset": "digits"},
        "machine": {"cpu": "cpu", "cores": 2, "threads": 2, "torch": "2"},
        "latency": {"batch": 4, "repeats": 3},
        "methods": {"mar": method, "drift_ar": drift},
        "real": {"title": "real", "metrics": metrics},
    }


def test_merged_values_are_mean_least_and_largest() -> None:
    summary = merge_reports([report(0, 2.0), report(1, 3.0), report(2, 7.0)])
    values = summary["columns"]["drift_ar"]["Frechet distance"]
    assert values == {"mean": 4.0, "min": 2.0, "max": 7.0}
    assert summary["frechet_ratio"] == {"mean": 1.0, "min": 0.5, "max": 1.75}
    assert "decoder ms / image" not in summary["columns"]["real"]
    text = format_summary(summary)
    assert "4.00 (2.00 to 7.00)" in text and "seeds 0, 1, 2" in text


def test_a_figure_of_zero_is_merged_like_any_other() -> None:
    collapsed = report(0, 2.0)
    collapsed["methods"]["drift_ar"]["metrics"]["variance_ratio"] = 0.0
    summary = merge_reports([collapsed, report(1, 3.0)])
    label = "within-class variance / real"
    assert summary["columns"]["drift_ar"][label] == {"mean": 0.45, "min": 0.0, "max": 0.9}


def test_reports_that_do_not_belong_together_are_refused() -> None:
    other = report(1, 2.0)
    other["config"]["dataset"] = "faces"
    with pytest.raises(ValueError, match="same settings"):
        merge_reports([report(0, 2.0), other])
    with pytest.raises(ValueError, match="different seeds"):
        merge_reports([report(0, 2.0), report(0, 2.0)])
    with pytest.raises(ValueError, match="at least one"):
        merge_reports([])


def test_the_table_shows_a_dash_where_real_images_have_no_figure() -> None:
    lines = format_report(report(0, 2.0)).splitlines()
    assert lines[2].split()[-3:] == ["-", "1", "1"]
    assert len({len(line) for line in lines[:2]}) == 1


@dataclass
class Cost:
    decoder_nfe: int = 3
    ar_seconds: float = 0.1
    decoder_seconds: float = 0.2
    total_seconds: float = 0.3


def test_methods_are_timed_in_turn_and_the_median_is_taken() -> None:
    calls: list[str] = []
    totals = {"a": iter([9.0, 1.0, 5.0, 2.0]), "b": iter([9.0, 4.0, 4.0, 4.0])}

    def method(name: str) -> Any:
        def call() -> Cost:
            calls.append(name)
            return Cost(total_seconds=next(totals[name]))

        return call

    result = measure_interleaved(
        {"a": method("a"), "b": method("b")}, batch=4, repeats=3, warmup=1, progress=False
    )
    assert calls == ["a", "b"] * 4
    assert result["a"].total_ms == 500.0 and result["b"].total_ms == 1000.0
    assert result["a"].decoder_nfe == 3 and result["a"].ar_ms == pytest.approx(25)
    for option in ({"batch": 0}, {"repeats": 0}, {"warmup": -1}):
        with pytest.raises(ValueError, match=next(iter(option))):
            measure_interleaved({}, **{"batch": 1, **option})  # type: ignore[arg-type]


def test_first_of_each_class() -> None:
    labels = torch.tensor([1, 0, 1, 1, 0])
    assert first_of_each_class(labels, 2).tolist() == [1, 4, 0, 2]


def test_figures_take_rgb_uneven_classes_and_empty_logs(tmp_path: Path) -> None:
    labels = torch.tensor([0, 0, 2])
    draw_class_grid(tmp_path / "a.png", torch.zeros(3, 3, 5, 7), labels, "title")
    draw_losses(tmp_path / "b.png", [], [{"step": 0, "loss": None}], None)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.png", "b.png"]


def test_figures_refuse_what_they_cannot_show(tmp_path: Path) -> None:
    labels = torch.tensor([0])
    for images in (
        torch.zeros(1, 2, 4, 4),
        torch.zeros(1, 4, 4),
        torch.full((1, 1, 4, 4), torch.nan),
    ):
        with pytest.raises(ValueError, match="images"):
            draw_class_grid(tmp_path / "a.png", images, labels, "")
    with pytest.raises(ValueError, match="square"):
        draw_entropy(tmp_path / "a.png", torch.zeros(1, 1, 4, 4), labels, torch.zeros(1, 5))
    assert not list(tmp_path.iterdir())
