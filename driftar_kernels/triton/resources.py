"""``python -m driftar_kernels.triton.resources``: machine code of every kernel without a GPU.

Runs the launchers on shapes alone (meta tensors), compiles each launch they make for every GPU
architecture, and reports registers, shared memory and spills. Exits with 1 when a kernel spills or
does not fit.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from torch._library.triton import set_wrap_triton_enabled
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature

from .resource_cases import cases

ARCHITECTURES = {80: 163, 90: 227, 100: 227}  # KiB of shared memory that one program may take
REPORT = Path("benchmarks/results/triton_resources.md")


@dataclass(frozen=True)
class Launch:
    """A kernel with the arguments of one launch."""

    kernel: Any
    arguments: tuple[Any, ...]
    keywords: dict[str, Any]


@contextmanager
def recorded() -> Iterator[list[Launch]]:
    """Collects launches instead of running them."""
    launches: list[Launch] = []
    original = JITFunction.run

    def record(kernel: Any, *arguments: Any, grid: Any, warmup: bool, **keywords: Any) -> None:
        launches.append(Launch(kernel, arguments, keywords))

    JITFunction.run = record
    try:
        with set_wrap_triton_enabled(False):
            yield launches
    finally:
        JITFunction.run = original


@dataclass(frozen=True)
class Usage:
    """What a compiled kernel takes of a multiprocessor."""

    registers: int
    spilled: int  # bytes of local memory per thread
    shared: int  # bytes per program
    warps: int


def compiled(launch: Launch, architecture: int) -> Usage:
    """Compile for an architecture (80, 90, 100) as a launch there would."""
    target = GPUTarget("cuda", architecture, 32)
    backend = make_backend(target)
    function = launch.kernel
    bind = create_function_from_signature(function.signature, function.params, backend)
    bound, specialization, _ = bind(*launch.arguments, **launch.keywords)
    options, signature, constants, attributes = function._pack_args(
        backend, launch.keywords, bound, specialization, None
    )
    source = ASTSource(function, signature, constants, attributes)
    kernel = triton.compile(source, target=target, options=options.__dict__)
    ptx = kernel.asm["ptx"]
    tool = triton.knobs.nvidia.ptxas_blackwell if architecture >= 100 else triton.knobs.nvidia.ptxas
    full_name = re.search(r"\.target (sm_\w+)", ptx)
    if full_name is None:
        raise ValueError("the PTX names no architecture")
    with tempfile.TemporaryDirectory() as folder:
        source_file = Path(folder) / "kernel.ptx"
        source_file.write_text(ptx)
        # As Triton assembles it; the compiled kernel does not keep what the assembler says.
        flags = ["-v", "-lineinfo", "--regAllocOptLevel=2", f"--gpu-name={full_name[1]}"]
        listing = subprocess.run(
            [tool.path, *flags, str(source_file), "-o", str(Path(folder) / "kernel.cubin")],
            check=True,
            capture_output=True,
            text=True,
        ).stderr
    registers = re.search(r"Used (\d+) registers", listing)
    spilled = re.search(r"(\d+) bytes spill stores", listing)
    if registers is None or spilled is None:
        raise ValueError(f"cannot read what the assembler says: {listing}")
    return Usage(
        int(registers[1]), int(spilled[1]), kernel.metadata.shared, kernel.metadata.num_warps
    )


def measure(names: list[str], architectures: list[int]) -> list[tuple[str, str, dict[int, Usage]]]:
    """(case, kernel, usage by architecture) of every launch of the named cases."""
    rows = []
    known = cases()
    for name in names:
        with recorded() as launches:
            known[name].run()
        seen = set()
        for launch in launches:
            kernel = launch.kernel.fn.__name__
            if kernel in seen:  # the same kernel again, for another tensor
                continue
            if known[name].kernel not in ("", kernel):
                continue
            seen.add(kernel)
            usage = {arch: compiled(launch, arch) for arch in architectures}
            rows.append((name, kernel, usage))
    return rows


def table(rows: list[tuple[str, str, dict[int, Usage]]]) -> str:
    """Markdown: registers per thread / shared KiB / spilled bytes, per architecture."""
    architectures = list(rows[0][2])
    heads = "".join(f" sm_{arch} |" for arch in architectures)
    lines = [f"| case | kernel | warps |{heads}", "|---|---|---|" + "---|" * len(architectures)]
    for name, kernel, usage in rows:
        cells = "".join(
            f" {use.registers} / {use.shared / 1024:.0f} / {use.spilled} |"
            for use in usage.values()
        )
        warps = next(iter(usage.values())).warps
        lines.append(f"| {name} | {kernel} | {warps} |{cells}")
    return "\n".join(lines)


def problems(rows: list[tuple[str, str, dict[int, Usage]]]) -> list[str]:
    """What spills or does not fit."""
    found = []
    for name, kernel, usage in rows:
        for arch, use in usage.items():
            where = f"{name}, {kernel}, sm_{arch}"
            if use.spilled:
                found.append(f"{where}: {use.spilled} bytes spilled per thread")
            if use.shared > ARCHITECTURES[arch] * 1024:
                found.append(f"{where}: {use.shared} bytes of shared memory do not fit")
    return found


def main() -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m driftar_kernels.triton.resources",
        description="Compile every kernel for GPU architectures and report what it takes.",
    )
    parser.add_argument("--only", default="", help="cases whose name contains this")
    parser.add_argument("--arch", type=int, nargs="+", default=list(ARCHITECTURES))
    parser.add_argument("--output", type=Path, help=f"write the report, e.g. {REPORT}")
    arguments = parser.parse_args()
    rows = measure([name for name in cases() if arguments.only in name], arguments.arch)
    report = (
        "# Resources of the Triton kernels\n\n"
        "Registers per thread / KiB of shared memory per program / bytes spilled per thread, as "
        f"compiled by Triton {triton.__version__}.\n"
        "Made by `python -m driftar_kernels.triton.resources --output "
        f"{REPORT}`; no GPU is needed.\n\n{table(rows)}\n"
    )
    print(report)
    if arguments.output:
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        arguments.output.write_text(report)
    found = problems(rows)
    for problem in found:
        print(problem, file=sys.stderr)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
