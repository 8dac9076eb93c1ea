"""The CUDA kernels on a CPU: their sources compiled as C++ for the emulator of tests/cuda_emulator.

With DRIFTAR_CUDA_EMULATED=1 the kernels take the place of the CPU kernels in this process, and
every operator test runs them as the backend "cuda".
"""

from __future__ import annotations

import ctypes
import dataclasses
import fcntl
import os
import subprocess
import sysconfig
import warnings
from functools import cache
from pathlib import Path

import torch

from driftar_kernels import backends

EMULATED = os.environ.get("DRIFTAR_CUDA_EMULATED") == "1"
ROOT = Path(__file__).resolve().parents[2]
BUILD = ROOT / "build" / "cuda_emulated"


@cache
def library_path() -> Path:
    """Builds what changed, one process at a time: all workers of a test run come here at once."""
    BUILD.mkdir(parents=True, exist_ok=True)
    with (BUILD / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        _build()
    return BUILD / "libcuda_emulated.so"


def _build() -> None:
    options = {
        "CMAKE_BUILD_TYPE": "Release",
        "DRIFTAR_CUDA": "OFF",
        "DRIFTAR_CUDA_EMULATED": "ON",
        "DRIFTAR_TORCH_DIR": Path(torch.__file__).parent,
        "DRIFTAR_PYTHON_INCLUDE": sysconfig.get_path("include"),
    }
    configure = ["cmake", "-S", str(ROOT), "-B", str(BUILD), "-G", "Ninja"]
    configure += [f"-D{name}={value}" for name, value in options.items()]
    for command in (configure, ["cmake", "--build", str(BUILD), "--target", "cuda_emulated"]):
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)}\n{done.stdout}\n{done.stderr}")


@cache
def library() -> ctypes.CDLL:
    """The emulator's own functions; loading them registers no operator twice."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the operators' CPU kernels are replaced on purpose
        torch.ops.load_library(str(library_path()))
    loaded = ctypes.CDLL(str(library_path()))
    for name in ("driftar_emulator_run", "driftar_emulator_multiply"):
        getattr(loaded, name).restype = ctypes.c_char_p
    return loaded


def take_over() -> None:
    """Run the CUDA kernels on CPU tensors of this process, in memory that is guarded."""
    library().driftar_emulator_guard_memory()
    backends.BACKENDS["cuda"] = dataclasses.replace(
        backends.BACKENDS["cuda"], devices=("cpu",), missing=lambda: None
    )
