"""Every instruction set that was built computes the same, chosen by an environment variable."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from driftar_kernels import _library

BUILT = _library.build_info.get("instruction_sets", "").split()


def run(isa: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "driftar_kernels", *arguments],
        env={**os.environ, "DRIFTAR_KERNELS_ISA": isa},
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_there_is_a_baseline() -> None:
    assert BUILT


@pytest.mark.parametrize("isa", BUILT)
def test_self_check_passes_on(isa: str) -> None:
    result = run(isa)
    if "this processor or its kernel does not have it" in result.stderr:
        pytest.skip(f"this processor has no {isa}")
    assert result.returncode == 0, result.stderr
    assert f"running {isa}" in result.stdout
    assert "cpu        not usable" not in result.stdout


def test_unknown_instruction_set_is_named() -> None:
    result = run("sse9", "--no-check")
    assert result.returncode != 0
    assert "DRIFTAR_KERNELS_ISA" in result.stderr and "sse9" in result.stderr
