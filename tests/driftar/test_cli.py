"""The command line on a tiny experiment: exit codes, resumption, refusals, reproducibility."""

from __future__ import annotations

import functools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import driftar
from driftar.cli import main
from driftar.evaluation import train_classifier
from driftar.training.checkpoint import CheckpointStore

TINY = """
mar: {num_steps: 6, warmup_steps: 2, batch_size: 8}
drift: {num_steps: 5, generated_per_class: 4, positives_per_class: 4, positive_bank: 8,
        warmup_steps: 2}
sampling: {num_iter: 2, num_sampling_steps: "3", samples_per_class: 3}
"""
pytestmark = pytest.mark.filterwarnings("ignore:.*the classes collapse:RuntimeWarning")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("config") / "tiny.yaml"
    path.write_text(TINY)
    return path


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, tiny: Path) -> Path:
    directory = tmp_path_factory.mktemp("runs") / "a"
    assert main(["train", "--output", str(directory), "--config", str(tiny), "--no-progress"]) == 0
    return directory


def weights(directory: Path) -> list[bytes]:
    return [path.read_bytes() for path in sorted(directory.glob("*/model/*.safetensors"))]


def test_the_same_seed_gives_the_same_models(trained: Path, tiny: Path, tmp_path: Path) -> None:
    common = ["--config", str(tiny), "--no-progress"]
    torch.manual_seed(123)
    assert main(["train", "--output", str(tmp_path / "b"), *common]) == 0
    assert len(weights(trained)) == 2
    assert weights(tmp_path / "b") == weights(trained)
    assert main(["train", "--output", str(tmp_path / "c"), "--seed", "1", *common]) == 0
    assert weights(tmp_path / "c")[0] != weights(trained)[0]


def test_drift_ar_is_not_continued_on_another_baseline(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "copy"
    shutil.copytree(trained, output)
    common = ["train", "--output", str(output), "--no-progress", "--change-config"]
    assert main([*common, "--stage", "mar", "--mar.num_steps", "8"]) == 0
    before = weights(output)
    assert main([*common, "--stage", "drift_ar"]) == 2
    assert "another baseline" in capsys.readouterr().err
    assert weights(output) == before


def test_a_terminated_run_continues_to_the_same_models(
    trained: Path, tiny: Path, tmp_path: Path
) -> None:
    output = tmp_path / "run"
    command = [sys.executable, "-m", "driftar", "train", "--output", str(output), "--no-progress"]
    root = Path(driftar.__file__).parents[1]
    # A long baseline first, so that the signal arrives within it.
    long = [*command, "--config", str(tiny), "--mar.num_steps", "100000", "--stage", "mar"]
    with subprocess.Popen(long, cwd=root, stderr=subprocess.PIPE, text=True) as run:
        log = output / "mar" / "log.jsonl"
        deadline = time.monotonic() + 60
        while run.poll() is None and not log.exists() and time.monotonic() < deadline:
            time.sleep(0.02)
        run.send_signal(signal.SIGTERM)
        _, errors = run.communicate(timeout=60)
    assert run.returncode == 143, errors
    assert "stopped by SIGTERM" in errors and "Traceback" not in errors
    (step,) = CheckpointStore(output / "mar").steps()
    assert len(log.read_text().splitlines()) == step
    assert not (output / "mar" / "model").exists()
    # The same command continues; with the changed length it ends after two steps more.
    more = ["train", "--output", str(output), "--stage", "mar", "--no-progress", "--change-config"]
    assert main([*more, "--mar.num_steps", str(step + 2)]) == 0
    assert len(log.read_text().splitlines()) == step + 2


def test_other_settings_are_refused_unless_asked(
    trained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = (trained / "config.json").read_text()
    command = ["train", "--output", str(trained), "--no-progress"]
    assert main([*command, "--drift.num_steps", "9"]) == 2
    error = capsys.readouterr().err
    assert "drift.num_steps: 5 -> 9" in error and error.count("\n") == 1
    assert (trained / "config.json").read_text() == before
    assert main(command) == 0


def test_sampling_reproduces_by_seed_and_writes_what_it_says(trained: Path) -> None:
    command = ["sample", "--output", str(trained), "--classes", "0,7", "--per-class", "2"]
    results = []
    for seed in ("4", "4", "5"):
        assert main([*command, "--seed", seed, "--no-progress"]) == 0
        results.append(load_file(trained / "samples" / "drift_ar.safetensors"))
    assert results[0]["images"].shape == (4, 1, 8, 8)
    assert results[0]["labels"].tolist() == [0, 0, 7, 7]
    assert results[0]["entropy"].shape == (4, 16)
    assert torch.equal(results[0]["images"], results[1]["images"])
    assert not torch.equal(results[0]["images"], results[2]["images"])
    names = sorted(os.listdir(trained / "samples"))
    assert names == ["drift_ar.png", "drift_ar.safetensors", "mar.png", "mar.safetensors"]


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--classes", "0,10"], "--classes must lie in [0, 10), got 10"),
        (["--classes=-1"], "--classes must lie in"),
        (["--seed=-1"], "seed must lie in"),
        (["--seed", str(2**64)], "seed must lie in"),
    ],
)
def test_bad_sampling_options_are_one_line(
    trained: Path, arguments: list[str], text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["sample", "--output", str(trained), *arguments]) == 2
    error = capsys.readouterr().err
    assert text in error and error.count("\n") == 1


def test_a_damaged_model_is_one_line(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = ["--output", str(tmp_path)]
    train = ["train", *base, "--config", str(tiny), "--stage", "mar", "--no-progress"]
    assert main(train) == 0
    (path,) = (tmp_path / "mar" / "model").glob("*.safetensors")
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    capsys.readouterr()
    assert main(["sample", *base, "--decoder", "diffusion", "--no-progress"]) == 2
    error = capsys.readouterr().err
    assert "SHA-256" in error and str(path) in error and error.count("\n") == 1
    assert main(["sample", *base, "--decoder", "drift", "--no-progress"]) == 2
    assert "train the stage drift_ar" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ("mar: {nonsense: 1}", "unknown setting nonsense of MARTrainingConfig"),
        ("mar: {num_steps: many}", "num_steps must be int, got 'many'"),
        ("seed: 1.5", "seed must be int"),
        ("dataset: mnist", "dataset must be one of digits"),
        ("drift: {learning_rate: .nan}", "learning_rate must be finite"),
        ("[1, 2]", "must hold a mapping"),
        ("a: [", "cannot be read"),
    ],
)
def test_bad_config_files_are_one_line(
    tmp_path: Path, content: str, text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(content)
    output = tmp_path / "run"
    assert main(["train", "--output", str(output), "--config", str(path)]) == 2
    error = capsys.readouterr().err
    assert text in error and error.count("\n") == 1
    assert not output.exists()


@pytest.mark.parametrize(
    "arguments",
    [[], ["train"], ["train", "--output", "x", "--mar.num_steps", "many"], ["sample", "--bad"]],
)
def test_usage_errors_exit_with_two(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2


def test_help_teaches_every_setting(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["train", "--help"])
    assert stopped.value.code == 0
    text = capsys.readouterr().out
    for part in ("examples:", "--mar.num_steps", "--drift.temperatures", "data sets: digits"):
        assert part in text


def test_report_and_summary(
    trained: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # A shorter training of the judge: this test is about the files and tables, not the figures.
    quick = functools.partial(train_classifier, epochs=3)
    monkeypatch.setattr("driftar.report.train_classifier", quick)
    latency = ["--latency-batch", "4", "--latency-repeats", "1", "--no-progress"]
    assert main(["report", "--output", str(trained), *latency]) == 0
    assert "Frechet distance" in capsys.readouterr().out
    for name in ("samples_mar", "samples_drift_ar", "samples_real", "entropy", "losses"):
        assert (trained / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    report = json.loads((trained / "report.json").read_text())
    assert report["methods"]["drift_ar"]["latency"]["decoder_nfe"] == 1
    assert report["methods"]["mar"]["latency"]["decoder_nfe"] == 2 * 3
    assert report["real"]["metrics"]["conditional_accuracy"] > 0.8

    other = tmp_path / "other.json"
    report["seed"] = 1
    other.write_text(json.dumps(report))
    merged = ["report", str(trained), str(other), "--output", str(tmp_path / "all")]
    assert main(merged) == 0
    assert "over the seeds 0, 1" in capsys.readouterr().out
    assert main(["report", str(trained), str(trained), "--output", str(tmp_path)]) == 2
    assert "different seeds" in capsys.readouterr().err
    assert main(["report", str(tmp_path / "none"), "--output", str(tmp_path)]) == 2
    assert main(["report", "--output", str(tmp_path / "none")]) == 2
    assert "holds no experiment" in capsys.readouterr().err
