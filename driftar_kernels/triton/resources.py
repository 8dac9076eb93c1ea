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
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature

from . import attention, chain, drift, prior, tree, tuning

ARCHITECTURES = {80: 163, 90: 227, 100: 227}  # KiB of shared memory that one program may take
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
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


def _empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _attention(dtype: torch.dtype, width: int, entropy: str = "head", **options: Any) -> None:
    """Forward and backward at L = 4096, 8 heads on 4, causal."""
    length = options.pop("queries", 4096)
    query = _empty(2, 8, length, width, dtype=dtype)
    key, value = (_empty(2, 4, 4096, width, dtype=dtype) for _ in range(2))
    arguments: dict[str, Any] = {
        "attn_mask": None,
        "query_offsets": None,
        "key_lengths": None,
        "parents": None,
        "query_offset": 0,
        "scale": 0.125,
        "is_causal": True,
        "entropy": entropy,
        "entropy_from": 0,
        **options,
    }
    out, row_entropy, lse, _, entropy_lse, cross, norm = attention.attention_forward(
        query, key, value, normalize=True, **arguments
    )
    attention.attention_backward(
        _empty(*out.shape, dtype=dtype), row_entropy, lse, query, key, value,
        out=out, lse=lse, entropy_lse=entropy_lse, entropy_cross=cross, entropy_norm=norm,
        **arguments,
    )  # fmt: skip


def _drift(batch: int, count: int, negatives: int, features: int) -> None:
    gen, pos = (_empty(batch, count, features) for _ in range(2))
    neg = _empty(batch, negatives, features) if negatives else None
    weight = _empty(batch, 2 * count + negatives)
    keep = batch > 1
    distances, sums = drift.drift_distances(gen, pos, neg, weight, keep)
    drift.drift_force(gen, pos, neg, weight, distances, sums[0], [0.02, 0.05, 0.2])


def _trees(nodes: int, width: int) -> None:
    parents, draft = _empty(8, nodes, dtype=torch.int64), _empty(8, nodes, width)
    verdict = tree.verify_tree(parents, draft, draft, 0.1, nodes)
    tree.walk_tree(parents, _empty(8, nodes, dtype=torch.bool), nodes)
    cache = _empty(8, 4, 4096, 64, dtype=torch.bfloat16)
    lengths = _empty(8, dtype=torch.int64)
    tree.commit_path(cache, cache, lengths, verdict[1], verdict[0])


def _chain(width: int) -> None:
    draft, target = _empty(8, 4, width), _empty(8, 5, width)
    seed = _empty(1, dtype=torch.int64)
    chain.verify_chain(draft, draft, draft[..., 0], target, target[..., 0], seed)


def _prior(dtype: torch.dtype) -> None:
    mean, entropy = _empty(64, 256, 16, dtype=dtype), _empty(64, 256)
    settings = (0.5, 2.0, 1.0)
    sigma = prior.entropy_to_sigma(entropy, *settings)
    prior.entropy_to_sigma_backward(sigma, entropy, *settings)
    prior.entropy_prior(mean, entropy, mean, *settings)
    prior.entropy_prior_backward(mean, entropy, mean, *settings, True, True)


def _in_tile(name: str, width: int, tile: tuning.Tile) -> None:
    """One pass of bf16 attention in a tile that is not its default."""
    classes = tuning.ATTENTION[name, 2]
    tiles, classes[width] = classes[width], (tile,)
    try:
        _attention(torch.bfloat16, width, queries=1 if name == "decode" else 4096)
    finally:
        classes[width] = tiles


@dataclass(frozen=True)
class Case:
    """What is compiled together.

    Attributes:
        run: makes the launches.
        kernel: the only one of them that counts, where one is named.
    """

    run: Callable[[], None]
    kernel: str = ""


KERNELS = {
    "forward": "forward_kernel",
    "decode": "forward_kernel",
    "query_gradient": "query_gradient_kernel",
    "key_gradient": "key_gradient_kernel",
}


def cases() -> dict[str, Case]:
    """Every head-dimension class and dtype, every option once, and every tile that autotuning may
    choose instead of the default."""
    runs: dict[str, Callable[[], None]] = {}
    for label, dtype in DTYPES.items():
        for width in (64, 128, 256):
            runs[f"attention {label} D={width}"] = partial(_attention, dtype, width)
    half = torch.bfloat16
    offsets = _empty(2, dtype=torch.int64)
    options: dict[str, dict[str, Any]] = {
        "D=72": {"width": 72},
        "full": {"is_causal": False},
        "no entropy": {"entropy": "none"},
        "map": {"entropy": "map"},
        "entropy_from": {"entropy_from": 16},
        "bool mask": {"is_causal": False, "attn_mask": _empty(4096, 4096, dtype=torch.bool)},
        "float mask": {"is_causal": False, "attn_mask": _empty(4096, 4096, dtype=half)},
        "cache": {"query_offsets": offsets, "key_lengths": offsets},
        "tree": {
            "is_causal": False,
            "queries": 64,
            "parents": _empty(1, 64, dtype=torch.int64),
            "key_lengths": offsets,
        },
        "decode": {"queries": 1, "query_offset": 4095, "key_lengths": offsets},
    }
    for label, keywords in options.items():
        given = {"width": 64, **keywords}
        runs[f"attention bf16 {label}"] = partial(_attention, half, **given)
    runs["drift many small"] = partial(_drift, 256, 64, 16, 1024)
    runs["drift one large"] = partial(_drift, 1, 4096, 0, 512)
    for nodes, width in ((64, 16), (256, 64)):
        runs[f"trees N={nodes} D={width}"] = partial(_trees, nodes, width)
    for width in (16, 256):
        runs[f"chain D={width}"] = partial(_chain, width)
    runs["prior"] = partial(_prior, half)
    result = {name: Case(run) for name, run in runs.items()}
    for (name, size), classes in tuning.ATTENTION.items():
        for width, tiles in classes.items() if size == 2 else ():
            for tile in tiles[1:]:
                label = (
                    f"autotuned D={width} {name} {tile.rows}x{tile.columns}, {tile.stages} stages"
                )
                result[label] = Case(partial(_in_tile, name, width, tile), KERNELS[name])
    return result


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
