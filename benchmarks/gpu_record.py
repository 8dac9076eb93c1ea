"""``python -m benchmarks.gpu_record``: tests of the Triton kernels, benchmarks, and their record.

    --device cuda   natively; writes benchmarks/results/<device>/triton.json
    --device cpu    the same path on Triton's interpreter with tiny shapes: its times mean nothing

Tests come first, then small cases under compute-sanitizer: a record where either fails holds no
figures, and one without compute-sanitizer says so. The digest of the kernel sources says which
kernels a record is about.
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
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import driftar_kernels as dk

from .cases import OURS
from .peers.attention import sdpa
from .peers.drift import drift_loss
from .timing import Contest, Race

ROOT = Path(__file__).resolve().parent.parent
KERNELS = ROOT / "driftar_kernels" / "triton"
RESULTS = ROOT / "benchmarks" / "results"
# Small cases of every kernel, each tool's findings an error.
SANITIZERS = ("memcheck", "racecheck", "synccheck")
SANITIZED = (
    "test_case and fp32 and not tree_256 and not many_blocks or test_entropy_kinds or test_verify "
    "or test_commit or test_dtypes or test_regimes and (many or least)"
)
TINY_TESTS = "test_case and plain and fp32 or test_entropy_kinds and plain or test_ties"

Record = dict[str, Any]


def kernel_digests() -> dict[str, str]:
    """SHA-256 of every file that kernels come from."""
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(KERNELS.glob("*.py"))
    }


def environment(device: torch.device) -> Record:
    """What ran where."""
    cuda = device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(device) if cuda else f"interpreter on {_processor()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "triton": importlib.metadata.version("triton"),
        "driftar_kernels": dk.__version__,
        "autotuned": os.environ.get("DRIFTAR_KERNELS_AUTOTUNE") == "1",
        "commit": subprocess.run(
            ["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True
        ).stdout.strip(),
        "kernel_digests": kernel_digests(),
    }


def _processor() -> str:
    return platform.processor() or platform.machine()


def run_tests(device: torch.device, *prefix: str, select: str = "", **more: str) -> Record:
    """The operators' tests on the triton backend, in a process of their own."""
    variables = {"DRIFTAR_KERNELS_EXPECT_BACKENDS": "reference,triton", **more}
    if device.type == "cuda":
        variables["DRIFTAR_KERNELS_TEST_DEVICE"] = "cuda"
    expression = f"triton and ({select})" if select else "triton"
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


def check_memory(device: torch.device) -> Record:
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
        runs[name] = run_tests(device, *prefix, select=SANITIZED, **variables)
    return {"passed": all(run["passed"] for run in runs.values()), **runs}


def timed(
    device: torch.device, ours: Callable[[], object], **others: Callable[[], object]
) -> Record:
    """Interleaved medians in seconds; on a GPU every call is waited for."""

    def waited(call: Callable[[], object]) -> None:
        call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    competitors = {name: partial(waited, call) for name, call in others.items()}
    # The operators' tests have run before.
    contest = Contest(check=lambda: None, ours=partial(waited, ours), peers=competitors)
    # Once is enough where times mean nothing.
    seconds, rounds = (1.0, 5) if device.type == "cuda" else (0.0, 1)
    race = Race(contest, seconds=seconds, min_rounds=rounds)
    if race.unavailable:
        raise RuntimeError(f"competitors did not run: {race.unavailable}")
    for _ in range(race.rounds):
        race.run_peers()
        race.run_ours()
    return race.medians()


def _flash(query: Tensor, key: Tensor, value: Tensor) -> list[Tensor]:
    backend = torch.nn.attention.SDPBackend
    kinds = [backend.FLASH_ATTENTION] if query.is_cuda else [backend.MATH]
    with torch.nn.attention.sdpa_kernel(kinds):
        return [sdpa(query, key, value, is_causal=True)]


def bench_attention(device: torch.device) -> list[Record]:
    """Forward and forward + backward, causal, with entropy, against SDPA without it."""
    cuda = device.type == "cuda"
    dtype = torch.bfloat16
    rows = []
    for width in (64, 128):
        for length in (1024, 2048, 4096, 8192, 16384) if cuda else (64,):
            shape = (max(1, 16384 // length), 16, length, width) if cuda else (1, 2, length, width)
            leaves = [
                torch.randn(shape, device=device, dtype=dtype).requires_grad_() for _ in "qkv"
            ]
            plain = [x.detach() for x in leaves]

            def both(run: Callable[[], list[Tensor]], inputs: list[Tensor] = leaves) -> object:
                total = torch.stack([x.float().sum() for x in run()]).sum()
                return torch.autograd.grad(total, inputs)

            def entropic(inputs: list[Tensor]) -> list[Tensor]:
                result = dk.attention(*inputs, is_causal=True)
                assert result.entropy is not None
                return [result.out, result.entropy]

            forward = timed(device, partial(entropic, plain), sdpa=partial(_flash, *plain))
            training = timed(
                device,
                partial(both, partial(entropic, leaves)),
                sdpa=partial(both, partial(_flash, *leaves)),
            )
            for name, medians, target in (
                ("forward", forward, 0.95),
                ("forward+backward", training, 0.9),
            ):
                ratio = medians["sdpa"] / medians[OURS]
                rows.append(_row(f"attention {name} {list(shape)}", medians, ratio, target))
    return rows


def bench_decode(device: torch.device) -> list[Record]:
    """One query on a long cache, as a share of the bandwidth of a copy of the cache."""
    keys = 32768 if device.type == "cuda" else 256
    query = torch.randn(1, 32, 1, 128, device=device, dtype=torch.bfloat16)
    key, value = (
        torch.randn(1, 8, keys, 128, device=device, dtype=torch.bfloat16) for _ in range(2)
    )
    target = torch.empty_like(key)

    def decode() -> object:
        return dk.attention(query, key, value, enable_gqa=True)

    medians = timed(device, decode, copy=lambda: target.copy_(key))
    # A copy of the keys moves as many bytes as decoding reads.
    return [_row(f"decode, {keys} keys", medians, medians["copy"] / medians[OURS], 0.8)]


def bench_drift(device: torch.device) -> list[Record]:
    """drift_loss forward + backward against the published formula, eager and compiled."""
    cuda = device.type == "cuda"
    shapes = (
        [(2048, 64, 64, 16, 128), (128, 64, 64, 32, 640), (8, 640, 640, 32, 384)]
        if cuda
        else [(1, 8, 8, 4, 16)]
    )
    rows = []
    compiled = torch.compile(drift_loss)
    for batch, count, positives, negatives, features in shapes:
        gen = torch.randn(batch, count, features, device=device).requires_grad_()
        pos = torch.randn(batch, positives, features, device=device) + 0.5
        neg = torch.randn(batch, negatives, features, device=device) - 0.5

        def step(
            loss: Callable[..., Tensor], gen: Tensor = gen, pos: Tensor = pos, neg: Tensor = neg
        ) -> object:
            return torch.autograd.grad(loss(gen, pos, neg), gen)

        others = {"eager": partial(step, drift_loss)}
        if cuda:
            others["compiled"] = partial(step, compiled)
        medians = timed(device, partial(step, dk.drift_loss), **others)
        name = f"drift_loss forward+backward {[batch, count, positives, negatives, features]}"
        targets = {"eager": 5.0, "compiled": 2.0} if batch > 100 else {"eager": 5.0}
        for peer, target in targets.items():
            ratio = medians[peer] / medians[OURS]
            rows.append(_row(f"{name}, of {peer}", medians, ratio, target))
    return rows


def bench_tree(device: torch.device) -> list[Record]:
    """verify_tree on 64 nodes of 16 channels; the target is 15 microseconds."""
    parents = torch.tensor([max((node - 1) // 2, 0) if node else -1 for node in range(64)])
    tree = dk.DraftTree(parents).to(device)
    draft = torch.randn(1, 64, 16, device=device)
    medians = timed(device, lambda: dk.verify_tree(tree, draft, draft, tolerance=0.1))
    return [_row("verify_tree, 64 nodes", medians, 15e-6 / medians[OURS], 1.0)]


def _row(name: str, medians: Record, ratio: float, target: float) -> Record:
    return {
        "case": name,
        "median_s": medians,
        "ratio": ratio,
        "target": target,
        "reached": ratio >= target,
    }


def main() -> int:
    """Command line; returns the exit status: 0 when the tests passed."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_record", description=__doc__)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--output", type=Path, help="where the record goes")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if (device.type == "cpu") != interpreted:
        # The interpreter is chosen when Triton is imported: start again with the right choice.
        variables = {**os.environ, "TRITON_INTERPRET": str(int(device.type == "cpu"))}
        command = [sys.executable, "-m", "benchmarks.gpu_record", *sys.argv[1:]]
        return subprocess.run(command, env=variables).returncode
    dk.use_backend("triton")  # raises, with the reason, where it cannot run

    record: Record = {"environment": environment(device)}
    record["tests"] = run_tests(device, select="" if device.type == "cuda" else TINY_TESTS)
    record["memory"] = check_memory(device)
    passed = record["tests"]["passed"] and record["memory"]["passed"] is not False
    record["benchmarks"] = []
    if passed:
        for bench in (bench_attention, bench_decode, bench_drift, bench_tree):
            record["benchmarks"] += bench(device)
    name = re.sub(r"\W+", "_", record["environment"]["device"]).strip("_").lower()
    output = arguments.output or RESULTS / name / "triton.json"
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(record, indent=2) + "\n")
    for row in record["benchmarks"] if device.type == "cuda" else ():
        state = "reached" if row["reached"] else "missed"
        print(f"{row['case']}: {row['ratio']:.2f} of {row['target']} ({state})")
    print(f"{'passed' if passed else 'FAILED'}; written to {output}")
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
