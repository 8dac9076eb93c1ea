"""The report of an experiment: metrics and cost of both methods, figures, one table.

``report.json`` is the record; the printed table and the merged table of several runs are made from
it alone.
"""

from __future__ import annotations

import datetime
import json
import logging
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from driftar.evaluation import evaluate_real, evaluate_samples, train_classifier
from driftar.experiment import METHODS, Experiment, Samples, generation_call
from driftar.figures import draw_class_grid, draw_entropy, draw_losses
from driftar.files import write_json
from driftar.latency import describe_machine, measure_interleaved
from driftar.settings import to_mapping
from driftar.training.step_log import read_step_log

__all__ = ["build_report", "format_report", "format_summary", "merge_reports", "read_report"]

_log = logging.getLogger(__name__)
_FORMAT = "driftar-report"
_GRID_COLUMNS = 10
# One judge for every run: distances of different seeds are comparable only in the same features.
_CLASSIFIER_SEED = 0

# Label, place in a method's record, format; the last three also exist for the real images.
_ROWS: tuple[tuple[str, tuple[str, ...], str], ...] = (
    ("decoder evaluations (NFE)", ("latency", "decoder_nfe"), "{:.0f}"),
    ("decoder ms / image", ("latency", "decoder_ms"), "{:.3f}"),
    ("AR ms / image", ("latency", "ar_ms"), "{:.3f}"),
    ("whole pipeline ms / image", ("latency", "total_ms"), "{:.3f}"),
    ("decoder speed-up", ("speedup", "decoder"), "{:.1f}x"),
    ("whole pipeline speed-up", ("speedup", "total"), "{:.1f}x"),
    ("Frechet distance", ("metrics", "frechet_distance"), "{:.2f}"),
    ("conditional accuracy", ("metrics", "conditional_accuracy"), "{:.4f}"),
    ("within-class variance / real", ("metrics", "variance_ratio"), "{:.3f}"),
)


def build_report(
    experiment: Experiment,
    *,
    latency_batch: int = 100,
    latency_repeats: int = 5,
    progress: bool = True,
    poll: Callable[[], None] | None = None,
) -> dict[str, Any]:
    """Judge both trained methods and write ``report.json`` and the figures into the directory.

    The same classes are asked of both; both are timed in turn on the same batch and threads. The
    training sets of both and the classifier's are the same; distances are to held-out images.
    """
    config, directory = experiment.config, experiment.directory
    models = {stage: experiment.load_model(stage) for stage in METHODS}
    splits = experiment.load_data()
    classifier = train_classifier(splits, seed=_CLASSIFIER_SEED, progress=progress, poll=poll)

    labels = torch.arange(splits.train.num_classes).repeat(config.sampling.samples_per_class)
    samples = {
        stage: experiment.sample(stage, labels, seed=config.seed, progress=progress, poll=poll)
        for stage in METHODS
    }
    metrics = {
        stage: evaluate_samples(entry.images, entry.labels, splits, classifier)
        for stage, entry in samples.items()
    }
    batch = torch.arange(latency_batch) % splits.train.num_classes
    generator = torch.Generator().manual_seed(config.seed)
    calls = {
        stage: _timed(generation_call(model, stage, config.sampling), batch, generator)
        for stage, model in models.items()
    }
    latency = measure_interleaved(
        calls, batch=latency_batch, repeats=latency_repeats, progress=progress, poll=poll
    )
    baseline = latency["mar"]
    report: dict[str, Any] = {
        "format": _FORMAT,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "seed": config.seed,
        "config": to_mapping(config),
        "machine": describe_machine(),
        "latency": {"batch": latency_batch, "repeats": latency_repeats, "statistic": "median"},
        "classifier": {
            "seed": _CLASSIFIER_SEED,
            "test_accuracy": classifier.accuracy(splits.test),
        },
        "methods": {
            stage: {
                "title": METHODS[stage],
                "latency": latency[stage].as_dict(),
                "speedup": {
                    "decoder": baseline.decoder_ms / latency[stage].decoder_ms,
                    "total": baseline.total_ms / latency[stage].total_ms,
                },
                "metrics": metrics[stage].as_dict(),
            }
            for stage in METHODS
        },
        "real": {
            "title": "real images",
            "metrics": evaluate_real(splits, classifier).as_dict(),
        },
    }
    _draw(experiment, samples, splits.test.images, splits.test.labels)
    write_json(directory / "report.json", report)
    _log.info("report written to %s", directory / "report.json")
    return report


def read_report(path: Path | str) -> dict[str, Any]:
    """The report of a run, from its directory or its JSON file; ValueError if it is none."""
    path = Path(path)
    path = path / "report.json" if path.is_dir() else path
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read as a report: {error}") from error
    if not isinstance(report, dict) or report.get("format") != _FORMAT:
        raise ValueError(f"{path} is not a report of driftar")
    return report


def merge_reports(reports: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Mean, least and largest value of every figure over several runs' reports.

    Raises ValueError for no reports, for two of the same seed, or for runs whose settings differ
    otherwise: their mean would describe no experiment.
    """
    if not reports:
        raise ValueError("reports must name at least one run")
    seeds = [report["seed"] for report in reports]
    if len(set(seeds)) != len(seeds):
        raise ValueError(f"reports must have different seeds, got {seeds}")
    settings = [{**report["config"], "seed": None} for report in reports]
    if any(entry != settings[0] for entry in settings):
        raise ValueError("reports must come from runs with the same settings (but for the seed)")
    columns = {**{stage: ("methods", stage) for stage in METHODS}, "real": ("real",)}
    merged: dict[str, Any] = {}
    for name, place in columns.items():
        records = [_at(report, place) for report in reports]
        merged[name] = {"title": records[0]["title"]}
        for label, path, _ in _ROWS:
            values = [_at(record, path) for record in records]
            if None not in values:
                merged[name][label] = {
                    "mean": statistics.fmean(values),
                    "min": min(values),
                    "max": max(values),
                }
    ratios = [
        _at(report, ("methods", "drift_ar", "metrics", "frechet_distance"))
        / _at(report, ("methods", "mar", "metrics", "frechet_distance"))
        for report in reports
    ]
    return {
        "format": "driftar-summary",
        "seeds": seeds,
        "machines": [report["machine"] for report in reports],
        "dates": [report["date"] for report in reports],
        "config": settings[0],
        "frechet_ratio": {
            "mean": statistics.fmean(ratios),
            "min": min(ratios),
            "max": max(ratios),
        },
        "columns": merged,
    }


def format_report(report: Mapping[str, Any]) -> str:
    """The table of one run, as text."""
    columns = [report["real"], *report["methods"].values()]
    rows = [["", *(column["title"] for column in columns)]]
    for label, path, form in _ROWS:
        values = (_at(column, path) for column in columns)
        rows.append([label, *("-" if value is None else form.format(value) for value in values)])
    machine = report["machine"]
    return "\n".join(
        [
            _table(rows),
            "",
            "Real images: Frechet distance of the training to the held-out images; accuracy and",
            "variance of the held-out images. Speed-ups are over the multi-step baseline.",
            f"Latency: median of {report['latency']['repeats']} interleaved rounds, batch "
            f"{report['latency']['batch']}, {machine['threads']} threads on {machine['cpu']} "
            f"({machine['cores']} cores), PyTorch {machine['torch']}.",
            f"Data set {report['config']['dataset']}, seed {report['seed']}, {report['date']}.",
        ]
    )


def format_summary(summary: Mapping[str, Any]) -> str:
    """The table of several runs: ``mean (least to largest)``."""
    columns = [summary["columns"][name] for name in ("real", *METHODS)]
    rows = [["", *(column["title"] for column in columns)]]
    for label, _, form in _ROWS:
        rows.append([label, *(_spread(column.get(label), form) for column in columns)])
    rows.append(
        ["Frechet distance / baseline's", "-", "-", _spread(summary["frechet_ratio"], "{:.2f}")]
    )
    seeds = ", ".join(str(seed) for seed in summary["seeds"])
    return f"{_table(rows)}\n\nMean (least to largest) over the seeds {seeds}."


def _timed(
    call: Callable[[Tensor, torch.Generator], Any], labels: Tensor, generator: torch.Generator
) -> Callable[[], Any]:
    return lambda: call(labels, generator).stats


def _draw(
    experiment: Experiment, samples: Mapping[str, Samples], real: Tensor, real_labels: Tensor
) -> None:
    directory, config = experiment.directory, experiment.config
    for stage, entry in samples.items():
        chosen = first_of_each_class(entry.labels, _GRID_COLUMNS)
        path = directory / f"samples_{stage}.png"
        draw_class_grid(path, entry.images[chosen], entry.labels[chosen], METHODS[stage])
    chosen = first_of_each_class(real_labels, _GRID_COLUMNS)
    path = directory / "samples_real.png"
    draw_class_grid(path, real[chosen], real_labels[chosen], "held-out real images")
    drift = samples["drift_ar"]
    if drift.entropy is not None:
        chosen = first_of_each_class(drift.labels, 1)[:_GRID_COLUMNS]
        draw_entropy(
            directory / "entropy.png",
            drift.images[chosen],
            drift.labels[chosen],
            drift.entropy[chosen],
        )
    draw_losses(
        directory / "losses.png",
        read_step_log(experiment.log_path("mar")),
        read_step_log(experiment.log_path("drift_ar")),
        math.ceil(config.drift.freeze_fraction * config.drift.num_steps),
    )


def first_of_each_class(labels: Tensor, count: int) -> Tensor:
    """Indices, int64, of the first `count` items of every class in `labels`, class by class."""
    members = [torch.nonzero(labels == label).flatten()[:count] for label in labels.unique()]
    return torch.cat(members)


def _at(record: Any, path: tuple[str, ...]) -> Any:
    for key in path:
        if not isinstance(record, Mapping) or key not in record:
            return None
        record = record[key]
    return record


def _spread(values: Mapping[str, float] | None, form: str) -> str:
    if values is None:
        return "-"
    mean, low, high = (form.format(values[key]) for key in ("mean", "min", "max"))
    return f"{mean} ({low} to {high})"


def _table(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [row[0].ljust(widths[0])]
        cells += [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        lines.append("  ".join(cells).rstrip())
    lines.insert(1, "-" * (sum(widths) + 2 * (len(widths) - 1)))
    return "\n".join(lines)
