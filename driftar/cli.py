"""The command line: ``driftar train | sample | report``, each on one output directory."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file

from driftar.data import known_datasets
from driftar.experiment import METHODS, STAGES, Experiment, check_seed, stored_config
from driftar.files import write_atomically, write_json
from driftar.settings import (
    add_flags,
    apply_overrides,
    flags_of,
    from_mapping,
    read_yaml,
)
from driftar.training.config import ExperimentConfig
from driftar.training.loop import TrainingAborted
from driftar.training.manifest import CheckpointError
from driftar.training.signals import StopRequested, StopSignals

__all__ = ["main"]

_BAD_INPUT = 2
_EXAMPLES = """\
examples:
  driftar train --output runs/a                  train the baseline, then Drift-AR on it
  driftar sample --output runs/a --classes 3,7   draw threes and sevens with both
  driftar report --output runs/a                 metrics, latency, figures, table
  driftar report runs/a runs/b runs/c --output runs/all    one table of several seeds

exit codes: 0 done, 1 training diverged, 2 bad input or checkpoint, 130 or 143 stopped by a signal
"""
_TRAIN_EXAMPLES = """\
examples:
  driftar train --output runs/a --seed 1
  driftar train --output runs/a                          continue it after a kill: same command
  driftar train --output runs/b --config small.yaml --mar.num_steps 500
  driftar train --output runs/c --fresh --drift.temperatures 0.2,0.5

A YAML file nests as the flags do:
  seed: 1
  mar: {num_steps: 500}
  drift: {temperatures: [0.2, 0.5]}
"""
_SAMPLE_EXAMPLES = """\
examples:
  driftar sample --output runs/a
  driftar sample --output runs/a --decoder drift --classes 0,1,2 --per-class 16 --seed 5

writes samples/<method>.png (a row for each class) and samples/<method>.safetensors with images
[N, C, H, W] in [-1, 1], labels [N] and, for Drift-AR, entropy [N, L]
"""
_REPORT_EXAMPLES = """\
examples:
  driftar report --output runs/a                         judge one trained run
  driftar report runs/a runs/b runs/c --output runs/all  merge reports made before

writes report.json, samples_*.png, entropy.png and losses.png (one run) or summary.json (several)
"""
_DECODERS = {"diffusion": ("mar",), "drift": ("drift_ar",), "both": tuple(METHODS)}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return the exit code of the process."""
    options = _build_parser().parse_args(arguments)
    logging.basicConfig(
        level=logging.DEBUG if options.debug else logging.INFO, format="%(message)s"
    )
    logging.getLogger("matplotlib").setLevel(logging.WARNING)
    logging.captureWarnings(True)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    try:
        with StopSignals() as stop:
            options.command(options, stop)
    except StopRequested as stopped:
        print(f"driftar: {stopped}; the same command continues", file=sys.stderr)
        return stopped.exit_code
    except TrainingAborted as error:
        print(f"driftar: error: {error}", file=sys.stderr)
        return 1
    except (CheckpointError, ValueError, ImportError, OSError) as error:
        if options.debug:
            raise
        print(f"driftar: error: {' '.join(str(error).split())}", file=sys.stderr)
        return _BAD_INPUT
    return 0


def _train(options: argparse.Namespace, stop: StopSignals) -> None:
    base = None if options.fresh else stored_config(options.output)
    if options.config is not None:
        base = from_mapping(ExperimentConfig, read_yaml(options.config))
    config = apply_overrides(base or ExperimentConfig(), flags_of(options))
    Experiment(options.output, config).train(
        STAGES if options.stage == "all" else (options.stage,),
        save_every=options.save_every,
        fresh=options.fresh,
        change_config=options.change_config,
        progress=options.progress,
        stop=stop,
    )


def _sample(options: argparse.Namespace, stop: StopSignals) -> None:
    from driftar.figures import draw_class_grid

    experiment = Experiment.open(options.output)
    seed = experiment.config.seed if options.seed is None else options.seed
    check_seed(seed)
    known = experiment.load_data().train.num_classes
    classes = options.classes if options.classes is not None else list(range(known))
    for label in classes:
        if not 0 <= label < known:
            raise ValueError(f"--classes must lie in [0, {known}), got {label}")
    labels = torch.tensor(classes).repeat_interleave(options.per_class)
    directory = options.output / "samples"
    for stage in _DECODERS[options.decoder]:
        samples = experiment.sample(
            stage, labels, seed=seed, progress=options.progress, poll=stop.poll
        )
        directory.mkdir(exist_ok=True)
        tensors = {"images": samples.images.contiguous(), "labels": samples.labels.contiguous()}
        if samples.entropy is not None:
            tensors["entropy"] = samples.entropy.contiguous()
        picture = directory / f"{stage}.png"
        write_atomically(
            picture.with_suffix(".safetensors"),
            lambda path, tensors=tensors: save_file(tensors, path),  # type: ignore[misc]
        )
        draw_class_grid(picture, samples.images, labels, METHODS[stage])
        print(f"{len(labels)} images of {METHODS[stage]}: {picture}")


def _report(options: argparse.Namespace, stop: StopSignals) -> None:
    from driftar.report import (
        build_report,
        format_report,
        format_summary,
        merge_reports,
        read_report,
    )

    if options.runs:
        summary = merge_reports([read_report(run) for run in options.runs])
        options.output.mkdir(parents=True, exist_ok=True)
        write_json(options.output / "summary.json", summary)
        print(format_summary(summary))
        return
    report = build_report(
        Experiment.open(options.output),
        latency_batch=options.latency_batch,
        latency_repeats=options.latency_repeats,
        progress=options.progress,
        poll=stop.poll,
    )
    print(format_report(report))


def _build_parser() -> argparse.ArgumentParser:
    from driftar_kernels import __version__

    parser = argparse.ArgumentParser(
        prog="driftar",
        description="Train, sample and judge Drift-AR beside its multi-step baseline.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"driftar {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    train = _add_command(
        commands, "train", "train both methods, or one, on a data set", _TRAIN_EXAMPLES
    )
    train.add_argument("--config", type=Path, metavar="FILE", help="settings in a YAML file")
    train.add_argument(
        "--stage", choices=("all", *STAGES), default="all", help="what to train (default: all)"
    )
    train.add_argument(
        "--save-every", type=_count, default=200, metavar="N", help="steps between checkpoints"
    )
    train.add_argument(
        "--fresh", action="store_true", help="discard the run that the directory holds"
    )
    train.add_argument(
        "--change-config", action="store_true", help="continue the run under other settings"
    )
    add_flags(train, ExperimentConfig)
    train.epilog = f"{_TRAIN_EXAMPLES}\ndata sets: {', '.join(known_datasets())}\n"
    train.set_defaults(command=_train)

    sample = _add_command(commands, "sample", "generate images of a trained run", _SAMPLE_EXAMPLES)
    sample.add_argument(
        "--classes", type=_labels, metavar="K,K,...", help="class labels (default: all)"
    )
    sample.add_argument(
        "--per-class", type=_count, default=8, metavar="N", help="images for each (default: 8)"
    )
    sample.add_argument(
        "--decoder", choices=sorted(_DECODERS), default="both", help="method (default: both)"
    )
    sample.add_argument("--seed", type=int, help="of the noise (default: the run's)")
    sample.set_defaults(command=_sample)

    report = _add_command(
        commands, "report", "judge a trained run, or merge several reports", _REPORT_EXAMPLES
    )
    report.add_argument(
        "runs", nargs="*", type=Path, metavar="RUN", help="reports to merge into --output"
    )
    report.add_argument(
        "--latency-batch",
        type=_count,
        default=100,
        metavar="N",
        help="images a call (default: 100)",
    )
    report.add_argument(
        "--latency-repeats", type=_count, default=5, metavar="N", help="timed rounds (default: 5)"
    )
    report.set_defaults(command=_report)
    return parser


def _add_command(
    commands: argparse._SubParsersAction[argparse.ArgumentParser],
    name: str,
    text: str,
    examples: str,
) -> argparse.ArgumentParser:
    parser = commands.add_parser(
        name,
        help=text,
        description=text[0].upper() + text[1:] + ".",
        epilog=examples,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--output", type=Path, required=True, metavar="DIR", help="directory of the run"
    )
    parser.add_argument("--threads", type=_count, metavar="N", help="CPU threads of PyTorch")
    parser.add_argument(
        "--no-progress", dest="progress", action="store_false", help="no progress bars"
    )
    parser.add_argument("--debug", action="store_true", help="tracebacks and debug messages")
    return parser


def _count(text: str) -> int:
    try:
        value = int(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number") from error
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


def _labels(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError as error:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a list of whole numbers such as 0,1,2"
        ) from error
