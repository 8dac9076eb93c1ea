"""The one-command record of a GPU backend, end to end on Triton's interpreter or the emulator."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import driftar_kernels as dk
from benchmarks import gpu_record
from benchmarks.gpu_checks import CHECKS
from tests.helpers.targets import BACKEND_DEVICES

ROOT = Path(__file__).resolve().parents[2]
KERNELS = {
    "triton": {f"driftar_kernels/triton/{name}.py" for name in ("attention_forward", "tree")},
    "cuda": {"csrc/cuda/attention_forward.cu", "csrc/cuda/ptx.cuh", "csrc/common/philox.h"},
}
# Their names select them with the backend's other tests.
BACKENDS = pytest.mark.parametrize("name", [name for name in KERNELS if name in BACKEND_DEVICES])

if not KERNELS.keys() & BACKEND_DEVICES:
    pytest.skip("TRITON_INTERPRET=1 and DRIFTAR_CUDA_EMULATED=1 run it", allow_module_level=True)


@BACKENDS
def test_record_on_the_cpu(name: str, tmp_path: Path) -> None:
    """Tests, checks, all benchmarks, and a record that says what ran."""
    target = gpu_record.TARGETS[name]
    output = tmp_path / "record.json"
    environment = {k: v for k, v in os.environ.items() if k != target.on_cpu}
    command = [sys.executable, "-m", "benchmarks.gpu_record", "--backend", name]
    done = subprocess.run(
        [*command, "--device", "cpu", "--output", str(output)],
        cwd=ROOT,
        env={**environment, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    record = json.loads(output.read_text())
    assert record["passed"]
    assert record["environment"]["kernel_digests"] == target.digests()
    assert KERNELS[name] <= set(record["environment"]["kernel_digests"])
    for part in ("backend", "device", "python", "torch", "commit"):
        assert record["environment"][part], part
    assert set(target.versions()) <= set(record["environment"])
    assert record["tests"]["passed"] and record["tests"]["counts"]["passed"] > 3
    assert record["memory"] == gpu_record.check_memory(target, torch.device("cpu"))
    assert set(record["checks"]) == set(CHECKS)
    for check in ("graph", "streams", "large_tensors"):
        assert record["checks"][check]["passed"] is True, check
    for case in ("attention forward ", "attention forward+backward", "decode", "drift", "verify"):
        rows = [row for row in record["benchmarks"] if row["case"].startswith(case)]
        assert rows, case
        assert all(time > 0 for row in rows for time in row["median_s"].values())


@BACKENDS
@pytest.mark.parametrize("broken", ["tests", "checks"])
def test_record_without_figures_when_something_fails(
    name: str, broken: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tested = {"passed": broken != "tests", "counts": {}}
    monkeypatch.setattr(gpu_record, "run_tests", lambda *a, **k: tested)
    monkeypatch.setattr(gpu_record, "CHECKS", {"graph": lambda device: {"passed": False}})
    monkeypatch.setenv(gpu_record.TARGETS[name].on_cpu, "1")
    output = tmp_path / "record.json"
    arguments = ["--backend", name, "--device", "cpu", "--output", str(output)]
    monkeypatch.setattr(sys, "argv", ["gpu_record", *arguments])
    with dk.use_backend(name):  # restores the choice that the command makes
        assert gpu_record.main() == 1
    record = json.loads(output.read_text())
    assert record["benchmarks"] == [] and not record["passed"]
    assert ("checks" in record) == (broken == "checks")


@BACKENDS
def test_memory_checker_runs_every_tool(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stand-in for compute-sanitizer notes its arguments and runs no kernel."""
    log = tmp_path / "log"
    tool = tmp_path / "compute-sanitizer"
    tool.write_text(f'#!/bin/sh\necho "$PYTORCH_NO_CUDA_MEMORY_CACHING $@" >> {log}\n')
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    record = gpu_record.check_memory(gpu_record.TARGETS[name], torch.device("cuda"))
    assert record["passed"]
    lines = log.read_text().splitlines()
    assert len(lines) == len(gpu_record.SANITIZERS)
    for checker, line in zip(gpu_record.SANITIZERS, lines, strict=True):
        assert line.startswith(f"1 --tool {checker} ") and "--error-exitcode 1" in line
