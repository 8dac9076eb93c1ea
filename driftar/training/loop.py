"""The training loop: steps, progress, log, checkpoints, signals and exact resumption."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tqdm import tqdm

from driftar.files import write_json
from driftar.training.checkpoint import CheckpointError, CheckpointStore
from driftar.training.signals import StopRequested, StopSignals
from driftar.training.step_log import StepLog
from driftar.training.task import TrainingTask

__all__ = ["TrainingAborted", "TrainingTask", "run_training"]

_log = logging.getLogger(__name__)
_SHOWN_METRICS = ("loss", "grad_norm")
_FLUSH_EVERY = 100


class TrainingAborted(RuntimeError):
    """Too many steps in a row met a non-finite loss or gradient."""


@dataclass
class _Progress:
    """The loop's own state: what it stores beside the task's."""

    skipped: int = 0
    skipped_in_row: int = 0
    recent: list[dict[str, Any]] = field(default_factory=list)


def run_training(
    task: TrainingTask,
    checkpoints: CheckpointStore,
    *,
    save_every: int,
    log_path: Path | str,
    progress: bool = True,
    stop: StopSignals | None = None,
    max_skips_in_row: int = 20,
    keep_going_when_save_fails: bool = False,
) -> int:
    """Train `task` to its end and return the number of steps done; continue where a run stopped.

    Every step's scalars go to `log_path` as JSON lines. A checkpoint is saved each `save_every`
    steps, at the end, and when a signal asks to stop (SIGTERM, SIGINT, SIGUSR1): the current step
    is finished, its state saved and StopRequested raised. With all randomness in the task's
    generators (or the global ones) a resumed run is bitwise equal to an uninterrupted one on the
    CPU. `stop`: handlers already installed by the caller; by default the loop installs its own.
    `keep_going_when_save_fails`: a checkpoint that cannot be written (full disk) before the end is
    logged as an error instead of raised.

    Raises ValueError for save_every or max_skips_in_row below 1, CheckpointError when the directory
    is locked by another trainer or holds another model's or only damaged checkpoints, and
    TrainingAborted after max_skips_in_row skipped steps in a row (the last scalars are then in
    ``aborted.json`` beside the log; the last checkpoint precedes the trouble or lies within it).
    """
    for name, value in (("save_every", save_every), ("max_skips_in_row", max_skips_in_row)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    if stop is None:
        with StopSignals() as own:
            return run_training(
                task,
                checkpoints,
                save_every=save_every,
                log_path=log_path,
                progress=progress,
                stop=own,
                max_skips_in_row=max_skips_in_row,
                keep_going_when_save_fails=keep_going_when_save_fails,
            )
    with checkpoints.lock():
        checkpoints.clean_stale()
        restored = checkpoints.restore_newest(task)
        start, state = 0, _Progress()
        if restored is not None:
            start, stored = restored
            state.skipped = int(stored.get("skipped", 0))
            state.skipped_in_row = int(stored.get("skipped_in_row", 0))
            _log.info("%s: continuing after step %d", task.name, start)
        stop.poll()

        def save(step: int) -> None:
            log.flush()
            try:
                checkpoints.save(task, step, _as_dict(state))
            except CheckpointError:
                if not keep_going_when_save_fails or step == task.num_steps:
                    raise
                _log.exception("training goes on without this checkpoint")

        with (
            StepLog(log_path, start) as log,
            tqdm(
                total=task.num_steps,
                initial=start,
                desc=task.name,
                unit="step",
                disable=not progress,
            ) as bar,
        ):
            for step in range(start, task.num_steps):
                metrics = task.step(step)
                log.write(step, metrics)
                _watch(task, state, step, metrics, max_skips_in_row, log)
                done = step + 1
                _show(bar, metrics, state)
                if stop.requested is not None:
                    save(done)
                    raise StopRequested(stop.requested)
                if done % save_every == 0 or done == task.num_steps:
                    save(done)
                elif done % _FLUSH_EVERY == 0:
                    log.flush()
    return task.num_steps


def _as_dict(state: _Progress) -> dict[str, Any]:
    return {"skipped": state.skipped, "skipped_in_row": state.skipped_in_row}


def _watch(
    task: TrainingTask,
    state: _Progress,
    step: int,
    metrics: Mapping[str, float],
    limit: int,
    log: StepLog,
) -> None:
    if not metrics.get("skipped"):
        state.skipped_in_row = 0
        state.recent.clear()
        return
    state.skipped += 1
    state.skipped_in_row += 1
    state.recent.append({"step": step, **{name: str(value) for name, value in metrics.items()}})
    _log.warning("%s: step %d was skipped, its loss or gradient is not finite", task.name, step)
    if state.skipped_in_row >= limit:
        log.flush()
        dump = log.path.with_name("aborted.json")
        write_json(dump, {"task": task.name, "step": step, "skipped_steps": state.recent})
        raise TrainingAborted(
            f"{task.name}: {state.skipped_in_row} steps in a row up to step {step} had a "
            f"non-finite loss or gradient; their metrics are in {dump}. "
            "Lower the learning rate or check the data."
        )


def _show(bar: Any, metrics: Mapping[str, float], state: _Progress) -> None:
    if bar.disable:
        bar.update()
        return
    shown = {name: f"{metrics[name]:.3g}" for name in _SHOWN_METRICS if name in metrics}
    if state.skipped:
        shown["skipped"] = str(state.skipped)
    bar.set_postfix(shown, refresh=False)
    bar.update()
