"""Every operator has its file in every room, and every native operator its kernel."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
OPERATORS = ("attention", "tree", "drift", "prior")
ROOMS = (
    "driftar_kernels/{op}.py",
    "driftar_kernels/reference/{op}.py",
    "csrc/cpu/{op}.h",
    "csrc/cpu/{op}.cpp",
    "csrc/cuda/{op}.h",
    "csrc/cuda/{op}.cpp",
    "driftar_kernels/triton/{op}.py",
    "docs/ops/{op}.md",
    "tests/driftar_kernels/test_{op}.py",
    "benchmarks/bench_{op}.py",
)


@pytest.mark.parametrize("room", ROOMS)
@pytest.mark.parametrize("op", OPERATORS)
def test_room_has_operator(op: str, room: str) -> None:
    assert (ROOT / room.format(op=op)).is_file()


@pytest.mark.parametrize("op", OPERATORS)
def test_operator_has_kernel(op: str) -> None:
    assert list((ROOT / "csrc/cpu").glob(f"{op}*_kernel.cpp"))
    assert list((ROOT / "csrc/cuda").glob(f"{op}*.cu"))


def test_every_source_is_built() -> None:
    listed = set(re.findall(r"csrc/\S+\.(?:cpp|cu)\b", (ROOT / "CMakeLists.txt").read_text()))
    sources = [path for kind in ("*.cpp", "*.cu") for path in (ROOT / "csrc").rglob(kind)]
    existing = {str(path.relative_to(ROOT)) for path in sources}
    assert listed == existing


# What every call into PyTorch costs matters to small problems on the CPU; on a GPU launches do.
CPU_ALONE = {"drift_field"}


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_every_schema_is_implemented(device: str) -> None:
    text = (ROOT / "csrc/ops.cpp").read_text()
    schemas = set(re.findall(r'def\(\s*"(\w+)\(', text))
    bindings = "".join(path.read_text() for path in (ROOT / "csrc" / device).glob("*.cpp"))
    wanted = schemas - CPU_ALONE if device == "cuda" else schemas
    assert wanted == set(re.findall(r'library\.impl\("(\w+)"', bindings))
    assert schemas


def test_kernels_stay_free_of_torch() -> None:
    allowed = re.compile(r"#include <(ATen/cpu/vec/|c10/util/(BFloat16|Half)\.h)")
    for path in (ROOT / "csrc").rglob("*_kernel.cpp"):
        torch_includes = re.findall(r"#include <(?:ATen|torch|c10)/[^>]*>", path.read_text())
        assert all(allowed.match(line) for line in torch_includes), path
    for path in (ROOT / "csrc/cuda").iterdir():
        if path.suffix in (".cu", ".cuh"):
            assert not re.search(r"#include <(?:ATen|torch|c10)/", path.read_text()), path


def test_kernels_package_does_not_know_the_models() -> None:
    for path in (ROOT / "driftar_kernels").rglob("*.py"):
        assert not re.search(r"^\s*(from|import) driftar\b", path.read_text(), re.M), path


def test_models_use_public_names_only() -> None:
    for path in (ROOT / "driftar").rglob("*.py"):
        assert not re.search(r"^\s*(from|import) driftar_kernels\.", path.read_text(), re.M), path
