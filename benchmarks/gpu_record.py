"""``python -m benchmarks.gpu_record``: tests, checks and benchmarks of a GPU backend, on record.

    --backend cuda|triton
    --device cuda   natively; writes benchmarks/results/<device>/<backend>.json
    --device cpu    the same path on Triton's interpreter or on the emulator of the CUDA kernels,
                    with tiny shapes: its times mean nothing

Tests come first, then small cases under compute-sanitizer, then streams, graphs, devices and large
tensors: a record where any of these fails holds no figures, and one without compute-sanitizer says
so. The digest of the kernel sources says which kernels a record is about.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.metadata
import json
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import driftar_kernels as dk

from .gpu_benchmarks import BENCHMARKS
from .gpu_checks import CHECKS

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
# Small cases of every kernel, each tool's findings an error.
SANITIZERS = ("memcheck", "racecheck", "synccheck")
SANITIZED = (
    "test_case and fp32 and not tree_256 and not many_blocks or test_entropy_kinds or test_verify "
    "or test_commit or test_dtypes or test_regimes and (many or least)"
)
TINY_TESTS = "test_case and plain and fp32 or test_entropy_kinds and plain or test_ties"

Record = dict[str, Any]


@dataclass(frozen=True)
class Target:
    """A backend that a record is about.

    Attributes:
        name: of the backend.
        sources: what its kernels come from, as globs.
        on_cpu: environment variable under which a process runs its kernels on CPU tensors.
        runs_as: what that is called in a record.
        versions: of what it needs besides PyTorch.
    """

    name: str
    sources: tuple[str, ...]
    on_cpu: str
    runs_as: str
    versions: Callable[[], Record]

    def digests(self) -> dict[str, str]:
        """SHA-256 of every file that kernels come from."""
        return {
            str(path.relative_to(ROOT)): hashlib.sha256(path.read_bytes()).hexdigest()
            for pattern in self.sources
            for path in sorted(ROOT.glob(pattern))
        }


TARGETS = {
    target.name: target
    for target in (
        Target(
            "triton",
            ("driftar_kernels/triton/*.py",),
            "TRITON_INTERPRET",
            "interpreter",
            lambda: {
                "triton": importlib.metadata.version("triton"),
                "autotuned": os.environ.get("DRIFTAR_KERNELS_AUTOTUNE") == "1",
            },
        ),
        Target(
            "cuda",
            (
                "csrc/cuda/*.cu",
                "csrc/cuda/*.cuh",
                "csrc/cuda/*.h",
                "csrc/cuda/*.cpp",
                "csrc/common/*.h",
            ),
            "DRIFTAR_CUDA_EMULATED",
            "emulator",
            lambda: {"cuda_architectures": dk._library.build_info.get("cuda_architectures", "")},
        ),
    )
}


def environment(target: Target, device: torch.device) -> Record:
    """What ran where."""
    cuda = device.type == "cuda"
    name = torch.cuda.get_device_name(device) if cuda else f"{target.runs_as} on {_processor()}"
    driver = _answer("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    return {
        "backend": target.name,
        "device": name,
        "driver": driver if cuda else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "driftar_kernels": dk.__version__,
        "commit": _answer("git", "rev-parse", "HEAD"),
        **target.versions(),
        "kernel_digests": target.digests(),
    }


def _processor() -> str:
    return platform.processor() or platform.machine()


def _answer(*command: str) -> str:
    if shutil.which(command[0]) is None:
        return ""
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout.strip()


def run_tests(
    target: Target, device: torch.device, *prefix: str, select: str = "", **more: str
) -> Record:
    """The operators' tests on the backend, in a process of their own."""
    variables = {"DRIFTAR_KERNELS_EXPECT_BACKENDS": f"reference,{target.name}", **more}
    if device.type == "cuda":
        variables["DRIFTAR_KERNELS_TEST_DEVICE"] = "cuda"
    expression = f"{target.name} and ({select})" if select else target.name
    command = [*prefix, sys.executable, "-m", "pytest", "-q", "tests/driftar_kernels"]
    done = subprocess.run(
        [*command, "-k", expression, "-p", "no:cacheprovider"],
        cwd=ROOT,
        env={**os.environ, **variables},
        capture_output=True,
        text=True,
    )
    print(done.stdout[-2000:])
    counts = {
        kind: int(number)
        for number, kind in re.findall(r"(\d+) (passed|failed|skipped|errors?)", done.stdout)
    }
    return {"passed": done.returncode == 0, "counts": counts, "selected": expression}


def check_memory(target: Target, device: torch.device) -> Record:
    """Small cases under compute-sanitizer's checkers of memory, races and barriers."""
    tool = shutil.which("compute-sanitizer") or shutil.which(
        "compute-sanitizer", path=str(Path(os.environ.get("CUDA_HOME", "/usr/local/cuda")) / "bin")
    )
    if device.type != "cuda" or tool is None:
        return {"passed": None, "reason": "needs a CUDA device and compute-sanitizer"}
    # Without PyTorch's pool, memory behind a tensor belongs to nobody.
    variables = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    runs = {}
    for name in SANITIZERS:
        prefix = (tool, "--tool", name, "--error-exitcode", "1")
        runs[name] = run_tests(target, device, *prefix, select=SANITIZED, **variables)
    return {"passed": all(run["passed"] for run in runs.values()), **runs}


def record_of(target: Target, device: torch.device) -> Record:
    """Everything, in order; figures only where nothing failed."""
    record: Record = {"environment": environment(target, device)}
    native = device.type == "cuda"
    record["tests"] = run_tests(target, device, select="" if native else TINY_TESTS)
    record["memory"] = check_memory(target, device)
    parts = [record["tests"], record["memory"]]
    if record["tests"]["passed"]:
        record["checks"] = {name: check(device) for name, check in CHECKS.items()}
        parts += record["checks"].values()
    record["passed"] = all(part["passed"] is not False for part in parts)
    record["benchmarks"] = []
    if record["passed"]:
        for bench in BENCHMARKS:
            record["benchmarks"] += bench(target.name, device)
    return record


def take_over(target: Target, device: torch.device) -> None:
    """Make this process run the backend; raises, with the reason, where it cannot."""
    if target.name == "cuda" and device.type == "cpu":
        from tests.helpers import emulator

        emulator.take_over()
    dk.use_backend(target.name)


def main() -> int:
    """Command line; returns the exit status: 0 when nothing failed."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu_record",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--backend", choices=tuple(TARGETS), default="triton")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--output", type=Path, help="where the record goes")
    arguments = parser.parse_args()
    target, device = TARGETS[arguments.backend], torch.device(arguments.device)
    wanted = str(int(device.type == "cpu"))
    if os.environ.get(target.on_cpu, "0") != wanted:
        # What runs is chosen when the package is imported: start again with the right choice.
        variables = {**os.environ, target.on_cpu: wanted}
        command = [sys.executable, "-m", "benchmarks.gpu_record", *sys.argv[1:]]
        return subprocess.run(command, env=variables).returncode
    take_over(target, device)

    record = record_of(target, device)
    name = re.sub(r"\W+", "_", record["environment"]["device"]).strip("_").lower()
    output = arguments.output or RESULTS / name / f"{target.name}.json"
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(record, indent=2) + "\n")
    for row in record["benchmarks"] if device.type == "cuda" else ():
        state = "reached" if row["reached"] else "missed"
        print(f"{row['case']}: {row['ratio']:.2f} of {row['target']} ({state})")
    print(f"{'passed' if record['passed'] else 'FAILED'}; written to {output}")
    return 0 if record["passed"] else 1


if __name__ == "__main__":
    sys.exit(main())
