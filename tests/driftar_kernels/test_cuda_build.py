"""The CUDA sources compile. That their kernels are right is shown by `make test-cuda`."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
import torch

from benchmarks import cuda_resources

ROOT = Path(__file__).resolve().parents[2]
TORCH = Path(torch.__file__).parent / "include"


@pytest.mark.slow
@pytest.mark.parametrize("architecture", cuda_resources.ARCHITECTURES)
@pytest.mark.parametrize("source", [path.name for path in cuda_resources.sources()])
def test_device_code_compiles_without_warnings_and_spills(source: str, architecture: str) -> None:
    if cuda_resources.nvcc() is None:
        pytest.skip("nvcc was not found")
    if cuda_resources.HOPPER_SOURCES.search(source) and cuda_resources.nvdisasm() is None:
        pytest.skip("nvdisasm, which shows the instructions of Hopper, was not found")
    usage = cuda_resources.measure([architecture], source)
    assert usage[source]
    assert not cuda_resources.problems(usage)


def test_resource_check_knows_what_it_refuses() -> None:
    """Serialised products are information to the assembler, and no error."""
    injected = "ptxas info    : (C7517) warpgroup.wait is injected in around line 121 by compiler"
    assert cuda_resources.SERIALISED.search(injected)
    assert not cuda_resources.SERIALISED.search("ptxas info    : Used 168 registers")

    def found(spilled: int, machine: tuple[int, ...]) -> list[str]:
        usage = cuda_resources.Usage(168, 0, spilled, 32, machine)
        source = "attention_forward_hopper.cu"
        return cuda_resources.problems({source: {"kernel": {cuda_resources.HOPPER: usage}}})

    whole = (1,) * len(cuda_resources.HOPPER_INSTRUCTIONS)
    assert not found(0, whole)
    assert "8 bytes spilled" in found(8, whole)[0]
    assert "no HGMMA" in found(0, (0, *whole[1:]))[0]
    assert "not disassembled" in found(0, ())[0]


@pytest.mark.slow
@pytest.mark.parametrize(
    "binding", sorted((ROOT / "csrc/cuda").glob("*.cpp")), ids=lambda p: p.stem
)
def test_bindings_compile_against_pytorch(binding: Path, tmp_path: Path) -> None:
    """With CUDA's own headers; CPU builds of PyTorch lack one that its build generates."""
    nvcc = cuda_resources.nvcc()
    if nvcc is None:
        pytest.skip("nvcc, beside which CUDA's headers lie, was not found")
    listing = subprocess.run([nvcc, "--dryrun", "x.cu"], capture_output=True, text=True).stderr
    top = next(line for line in listing.splitlines() if "TOP=" in line).split("TOP=")[1].strip()
    if not (TORCH / "c10/cuda/impl/cuda_cmake_macros.h").exists():
        generated = tmp_path / "c10/cuda/impl/cuda_cmake_macros.h"
        generated.parent.mkdir(parents=True)
        generated.write_text("#define C10_CUDA_BUILD_SHARED_LIBS\n")
    headers = [TORCH, TORCH / "torch/csrc/api/include", tmp_path, Path(top) / "include"]
    flags = ["-std=c++20", "-fsyntax-only", "-Wall", "-Wextra", "-Wno-unused-parameter", "-Werror"]
    command = ["g++", *flags, *(f"-isystem{path}" for path in headers), str(binding)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
