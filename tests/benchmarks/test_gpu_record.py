"""The one-command record of the Triton kernels, end to end on Triton's interpreter."""

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
from tests.helpers.targets import BACKEND_DEVICES

ROOT = Path(__file__).resolve().parents[2]

if "triton" not in BACKEND_DEVICES:
    pytest.skip("TRITON_INTERPRET=1 tests the Triton kernels", allow_module_level=True)


def test_triton_record_on_the_interpreter(tmp_path: Path) -> None:
    """Tests, memory check, all benchmarks, and a record that says what ran."""
    output = tmp_path / "record.json"
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu_record", "--device", "cpu", "--output", str(output)],
        cwd=ROOT,
        env={**environment, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    record = json.loads(output.read_text())
    assert record["environment"]["kernel_digests"] == gpu_record.kernel_digests()
    assert {"attention_forward.py", "drift_kernels.py", "tree.py"} <= set(
        record["environment"]["kernel_digests"]
    )
    for part in ("device", "python", "torch", "triton", "commit"):
        assert record["environment"][part], part
    assert record["tests"]["passed"] and record["tests"]["counts"]["passed"] > 3
    assert record["memory"] == gpu_record.check_memory(torch.device("cpu"))
    for name in ("attention forward ", "attention forward+backward", "decode", "drift", "verify"):
        rows = [row for row in record["benchmarks"] if row["case"].startswith(name)]
        assert rows, name
        assert all(time > 0 for row in rows for time in row["median_s"].values())


def test_triton_record_without_figures_when_tests_fail(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu_record, "run_tests", lambda *a, **k: {"passed": False, "counts": {}})
    output = tmp_path / "record.json"
    monkeypatch.setattr(sys, "argv", ["gpu_record", "--device", "cpu", "--output", str(output)])
    with dk.use_backend("triton"):  # restores the choice that the command makes
        assert gpu_record.main() == 1
    assert json.loads(output.read_text())["benchmarks"] == []


def test_triton_memory_checker_runs_every_tool(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stand-in for compute-sanitizer notes its arguments and runs no kernel."""
    log = tmp_path / "log"
    tool = tmp_path / "compute-sanitizer"
    tool.write_text(f'#!/bin/sh\necho "$PYTORCH_NO_CUDA_MEMORY_CACHING $@" >> {log}\n')
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    record = gpu_record.check_memory(torch.device("cuda"))
    assert record["passed"]
    lines = log.read_text().splitlines()
    assert len(lines) == len(gpu_record.SANITIZERS)
    for name, line in zip(gpu_record.SANITIZERS, lines, strict=True):
        assert line.startswith(f"1 --tool {name} ") and "--error-exitcode 1" in line
