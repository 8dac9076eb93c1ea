"""The loop: exact resumption, the log, skipped steps, signals."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest

from driftar.training.checkpoint import CheckpointError, CheckpointStore
from driftar.training.loop import TrainingAborted, run_training
from driftar.training.signals import StopRequested
from driftar.training.step_log import StepLog, read_step_log
from tests.driftar.training.fake_task import FakeTask, fingerprint, seed_everything


def train(task: FakeTask, directory: Path, **options: Any) -> int:
    settings = {"save_every": 5, "log_path": directory / "log.jsonl", "progress": False}
    return run_training(task, CheckpointStore(directory, keep=10), **{**settings, **options})


def interrupt_at(step: int, number: int = signal.SIGTERM) -> Any:
    return lambda current: os.kill(os.getpid(), number) if current == step else None


@pytest.fixture
def uninterrupted(tmp_path: Path) -> list[Any]:
    task = FakeTask()
    seed_everything()
    assert train(task, tmp_path / "whole") == 12
    return fingerprint(task)


@pytest.mark.parametrize("stop_step", [0, 4, 7, 11])
def test_a_resumed_run_is_bitwise_the_uninterrupted_one(
    tmp_path: Path, uninterrupted: list[Any], stop_step: int
) -> None:
    seed_everything()
    with pytest.raises(StopRequested) as stopped:
        train(FakeTask(signal_at=interrupt_at(stop_step)), tmp_path / "parts")
    assert stopped.value.exit_code == 143
    seed_everything(99)
    resumed = FakeTask()
    assert train(resumed, tmp_path / "parts") == 12
    assert fingerprint(resumed) == uninterrupted
    whole = read_step_log(tmp_path / "whole" / "log.jsonl")
    assert read_step_log(tmp_path / "parts" / "log.jsonl") == whole
    assert [record["step"] for record in whole] == list(range(12))


def test_a_crash_between_checkpoints_repeats_the_lost_steps(
    tmp_path: Path, uninterrupted: list[Any]
) -> None:
    def crash(step: int) -> None:
        if step == 8:
            raise RuntimeError("power cut")

    seed_everything()
    with pytest.raises(RuntimeError, match="power cut"):
        train(FakeTask(signal_at=crash), tmp_path / "parts")
    # Steps 5 to 7 were logged but not saved; they must appear once in the end.
    resumed = FakeTask()
    train(resumed, tmp_path / "parts")
    assert fingerprint(resumed) == uninterrupted
    steps = [record["step"] for record in read_step_log(tmp_path / "parts" / "log.jsonl")]
    assert steps == list(range(12))


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGUSR1, 138)])
def test_signals_save_and_give_the_shell_exit_code(
    tmp_path: Path, number: signal.Signals, code: int
) -> None:
    before = signal.getsignal(number)
    with pytest.raises(StopRequested) as stopped:
        train(FakeTask(signal_at=interrupt_at(2, number)), tmp_path)
    assert stopped.value.exit_code == code
    assert CheckpointStore(tmp_path).steps() == [3]
    assert signal.getsignal(number) is before


def test_a_finished_run_does_nothing_more(tmp_path: Path) -> None:
    train(FakeTask(), tmp_path)

    def fail(step: int) -> None:
        raise RuntimeError(f"step {step} ran again")

    assert train(FakeTask(signal_at=fail), tmp_path) == 12


def test_skipped_steps_abort_only_in_a_row(tmp_path: Path) -> None:
    assert train(FakeTask(bad_steps=(1, 2, 4, 5)), tmp_path / "a", max_skips_in_row=3) == 12
    assert read_step_log(tmp_path / "a" / "log.jsonl")[1] == {"step": 1, "skipped": 1, "loss": None}
    with pytest.raises(TrainingAborted, match="3 steps in a row up to step 7"):
        train(FakeTask(bad_steps=(5, 6, 7, 8)), tmp_path / "b", max_skips_in_row=3)
    dump = json.loads((tmp_path / "b" / "aborted.json").read_text())
    assert [entry["step"] for entry in dump["skipped_steps"]] == [5, 6, 7]
    assert CheckpointStore(tmp_path / "b").steps() == [5]


def test_the_count_of_skips_in_a_row_survives_a_resumption(tmp_path: Path) -> None:
    bad = (3, 4, 5, 6)
    with pytest.raises(StopRequested):
        train(FakeTask(bad_steps=bad, signal_at=interrupt_at(4)), tmp_path)
    with pytest.raises(TrainingAborted, match="up to step 5"):
        train(FakeTask(bad_steps=bad), tmp_path, max_skips_in_row=3)


def test_a_failed_save_ends_the_run_or_not_by_option(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full_disk(path: Path, tensors: object) -> None:
        if "step_00000005" in str(path):
            raise OSError(28, "No space left on device")
        real(path, tensors)

    import driftar.training.checkpoint as module

    real: Any = module.write_tensors
    monkeypatch.setattr(module, "write_tensors", full_disk)
    with pytest.raises(CheckpointError, match=r"No space left.*needs \d+ bytes, \d+ free"):
        train(FakeTask(), tmp_path / "a")
    assert train(FakeTask(), tmp_path / "b", keep_going_when_save_fails=True) == 12
    assert CheckpointStore(tmp_path / "b").steps() == [10, 12]
    assert not list((tmp_path / "b").glob("*.tmp-*"))


def test_the_log_drops_a_torn_line_and_keeps_lines_it_cannot_write(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "log.jsonl"
    path.write_text('{"step": 0, "loss": 1.0}\n{"step": 1, "lo')
    with StepLog(path, 1) as log:
        log.write(1, {"loss": 2.0})
        with monkeypatch.context() as patch:
            patch.setattr("os.fsync", _no_space)
            log.flush()
        assert "keeping its lines in memory" in caplog.text
        assert [record["step"] for record in read_step_log(path)] == [0]
        log.write(2, {"loss": float("inf")})
    assert read_step_log(path) == [
        {"step": 0, "loss": 1.0},
        {"step": 1, "loss": 2.0},
        {"step": 2, "loss": None},
    ]


def _no_space(descriptor: int) -> None:
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize("option", ["save_every", "max_skips_in_row"])
def test_counts_below_one_are_refused(tmp_path: Path, option: str) -> None:
    with pytest.raises(ValueError, match=option):
        train(FakeTask(), tmp_path, **{option: 0})
