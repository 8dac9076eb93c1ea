"""``python -m benchmarks.cuda_resources``: machine code of every CUDA kernel without a GPU.

Compiles the sources that CMakeLists.txt lists with nvcc, every warning an error, and reports
registers, static and spilled memory as the assembler counts them, and the tensor-core
instructions. Exits with 1 when something does not compile or spills, when the assembler serialises
products of warpgroups, or when a Hopper kernel lacks the instructions it is written for.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
ARCHITECTURES = ("80", "90a")
REPORT = Path("benchmarks/results/cuda_resources.md")
FLAGS = ("-std=c++20", "-O3", "-Werror", "all-warnings", "-Xptxas", "-v")
ENTRY = re.compile(
    r"Compiling entry function '(?P<name>\w+)'.*?"
    r"(?P<stack>\d+) bytes stack frame, (?P<spilled>\d+) bytes spill stores.*?"
    r"Used (?P<registers>\d+) registers",
    re.S,
)
# Splitting fp32 operands of wide heads into halves takes more registers than there are.
TOLERATED = re.compile(r"kernel<float, (128|256)\b")
# nvcc's names of unnamed namespaces, which demanglers do not know and every compilation changes.
UNNAMED = re.compile(r"\d+_GLOBAL__N__[0-9a-f]{8}_\d+_\w+?_cu_[0-9a-f]{8}")
NAMESPACE = re.compile(r"\(anonymous namespace\)::|driftar::cuda::")
# The assembler only informs (C7510 and its neighbours) when it makes asynchronous products wait.
SERIALISED = re.compile(r"\(C75\d\d\).*|Potential Performance Loss.*")
# Machine instructions of the kernels in these sources: products of warpgroups, bulk copies of
# tensor tiles, barriers that count bytes, exponentials, register budgets of warpgroups.
HOPPER_SOURCES = re.compile(r"_hopper\.cu$")
HOPPER = "90a"
HOPPER_INSTRUCTIONS = ("HGMMA", "UTMALDG", "SYNCS", "MUFU.EX2", "USETMAXREG")


@dataclass(frozen=True)
class Usage:
    """What a compiled kernel takes; bytes per thread."""

    registers: int
    stack: int
    spilled: int
    products: int  # tensor-core instructions in its PTX
    machine: tuple[int, ...] = ()  # of each of HOPPER_INSTRUCTIONS, in kernels written for Hopper


def nvcc() -> str | None:
    """Path of the CUDA compiler, if there is one."""
    return os.environ.get("NVCC") or shutil.which("nvcc")


def nvdisasm() -> str | None:
    """Path of the disassembler, which may also be the one in Triton's package."""
    found = os.environ.get("NVDISASM") or shutil.which("nvdisasm")
    package = importlib.util.find_spec("triton")
    if found is None and package is not None and package.origin is not None:
        own = Path(package.origin).parent / "backends/nvidia/bin/nvdisasm"
        found = str(own) if own.exists() else None
    return found


def sources() -> list[Path]:
    """The device code, as the build lists it."""
    listed = re.findall(r"csrc/cuda/\w+\.cu\b", (ROOT / "CMakeLists.txt").read_text())
    return [ROOT / path for path in listed]


def machine_instructions(cubin: Path) -> dict[str, tuple[int, ...]]:
    """Counts of HOPPER_INSTRUCTIONS by mangled kernel name.

    Raises:
        RuntimeError: there is no disassembler.
    """
    disassembler = nvdisasm()
    if disassembler is None:
        raise RuntimeError("nvdisasm was not found: put it on the PATH or set NVDISASM")
    text = subprocess.run([disassembler, str(cubin)], check=True, capture_output=True, text=True)
    bodies = re.split(r"^\.text\.(\w+):$", text.stdout, flags=re.M)[1:]
    return {
        name: tuple(len(re.findall(rf"\b{re.escape(i)}\b", body)) for i in HOPPER_INSTRUCTIONS)
        for name, body in zip(bodies[::2], bodies[1::2], strict=True)
    }


def compiled(source: Path, architecture: str) -> dict[str, Usage]:
    """Usage by mangled kernel name.

    Raises:
        RuntimeError: the compiler refuses, or warns.
    """
    machine: dict[str, tuple[int, ...]] = {}
    with tempfile.TemporaryDirectory() as folder:
        command = [str(nvcc()), *FLAGS, f"-arch=sm_{architecture}", "-cubin", "--keep"]
        command += ["--keep-dir", folder, "-o", str(Path(folder) / "out.cubin"), str(source)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{source.name}, sm_{architecture}: {done.stdout}{done.stderr}")
        serialised = SERIALISED.search(done.stdout + done.stderr)
        if serialised:
            raise RuntimeError(f"{source.name}, sm_{architecture}: {serialised[0]}")
        ptx = (Path(folder) / f"{source.stem}.ptx").read_text()
        if architecture == HOPPER and HOPPER_SOURCES.search(source.name):
            machine = machine_instructions(Path(folder) / "out.cubin")
    bodies = re.split(r"\.visible \.entry |\.entry ", ptx)[1:]
    product = re.compile(r"\bmma\.sync|\bwgmma\.mma_async")
    products = {re.split(r"\W", body, maxsplit=1)[0]: len(product.findall(body)) for body in bodies}
    return {
        found["name"]: Usage(
            int(found["registers"]),
            int(found["stack"]),
            int(found["spilled"]),
            products[found["name"]],
            machine.get(found["name"], ()),
        )
        for found in ENTRY.finditer(done.stdout + done.stderr)
    }


def readable(names: list[str]) -> dict[str, str]:
    """Demangled kernel names without namespaces and parameters."""
    filt = shutil.which("c++filt")
    if filt is None:
        return {name: name for name in names}
    lines = subprocess.run(
        [filt], input="\n".join(names), check=True, capture_output=True, text=True
    ).stdout.splitlines()
    return {
        name: re.sub(r"^void |\([^()]*\)$", "", NAMESPACE.sub("", line))
        for name, line in zip(names, lines, strict=True)
    }


def measure(architectures: list[str], only: str = "") -> dict[str, dict[str, dict[str, Usage]]]:
    """{source: {kernel: {architecture: usage}}}."""
    result: dict[str, dict[str, dict[str, Usage]]] = {}
    for source in sources():
        if only not in source.name:
            continue
        by_name: dict[str, dict[str, Usage]] = {}
        for architecture in architectures:
            for name, usage in compiled(source, architecture).items():
                by_name.setdefault(UNNAMED.sub("12_GLOBAL__N_1", name), {})[architecture] = usage
        names = readable(list(by_name))
        result[source.name] = {names[name]: usage for name, usage in by_name.items()}
    return result


def table(usage: dict[str, dict[str, dict[str, Usage]]], architectures: list[str]) -> str:
    """Markdown: registers / stack bytes / spilled bytes / tensor-core instructions."""
    heads = "".join(f" sm_{architecture} |" for architecture in architectures)
    lines = [f"| source | kernel |{heads}", "|---|---|" + "---|" * len(architectures)]
    for source, kernels in usage.items():
        for kernel, columns in kernels.items():
            cells = "".join(
                f" {u.registers} / {u.stack} / {u.spilled} / {u.products} |"
                for u in (columns[architecture] for architecture in architectures)
            )
            lines.append(f"| {source} | `{kernel}` |{cells}")
    return "\n".join(lines)


def machine_table(usage: dict[str, dict[str, dict[str, Usage]]]) -> str:
    """Markdown: what the kernels for Hopper consist of."""
    lines = [
        "| kernel | " + " | ".join(HOPPER_INSTRUCTIONS) + " |",
        "|---|" + "---|" * len(HOPPER_INSTRUCTIONS),
    ]
    for kernels in usage.values():
        for kernel, columns in kernels.items():
            machine = columns[HOPPER].machine if HOPPER in columns else ()
            if machine:
                lines.append(f"| `{kernel}` | " + " | ".join(map(str, machine)) + " |")
    return "\n".join(lines)


def problems(usage: dict[str, dict[str, dict[str, Usage]]]) -> list[str]:
    """What spills, but for the tolerated kernels, and what a Hopper kernel lacks."""
    found = []
    for source, kernels in usage.items():
        for kernel, columns in kernels.items():
            for architecture, u in columns.items():
                place = f"{source}, {kernel}, sm_{architecture}"
                if u.spilled and not TOLERATED.search(kernel):
                    found.append(f"{place}: {u.spilled} bytes spilled per thread")
                for name, count in zip(HOPPER_INSTRUCTIONS, u.machine, strict=False):
                    if count == 0:
                        found.append(f"{place}: no {name}")
                if architecture == HOPPER and HOPPER_SOURCES.search(source) and not u.machine:
                    found.append(f"{place}: not disassembled")
    return found


def main() -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.cuda_resources",
        description="Compile every CUDA kernel for GPU architectures and report what it takes.",
    )
    parser.add_argument("--only", default="", help="sources whose name contains this")
    parser.add_argument("--arch", nargs="+", default=list(ARCHITECTURES))
    parser.add_argument("--output", type=Path, help=f"write the report, e.g. {REPORT}")
    arguments = parser.parse_args()
    tools = {"nvcc": nvcc()}
    if "90a" in arguments.arch:
        tools["nvdisasm"] = nvdisasm()
    for name, path in tools.items():
        if path is None:
            print(
                f"{name} was not found: put it on the PATH or set {name.upper()}", file=sys.stderr
            )
            return 1
    version = subprocess.run(
        [str(tools["nvcc"]), "--version"], capture_output=True, text=True
    ).stdout
    release = re.search(r"release ([\d.]+), V([\d.]+)", version)
    try:
        usage = measure(arguments.arch, arguments.only)
    except RuntimeError as error:
        print(error, file=sys.stderr)
        return 1
    report = (
        "# Resources of the CUDA kernels\n\n"
        "Registers / bytes of stack / bytes spilled per thread / tensor-core instructions "
        f"(`mma` and `wgmma` in the PTX), as compiled by nvcc {release[2] if release else '?'}.\n"
        f"Made by `python -m benchmarks.cuda_resources --output {REPORT}`; no GPU is needed.\n"
        "Splitting fp32 operands of wide heads takes more registers than there are; only these\n"
        "kernels may spill.\n\n"
        f"{table(usage, arguments.arch)}\n\n"
        "Machine instructions of the kernels for Hopper (sm_90a), none of which the assembler\n"
        "serialises; elsewhere these kernels only trap.\n\n"
        f"{machine_table(usage)}\n"
    )
    print(report)
    if arguments.output:
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        arguments.output.write_text(report)
    found = problems(usage)
    for problem in found:
        print(problem, file=sys.stderr)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
