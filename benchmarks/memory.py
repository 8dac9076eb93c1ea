"""Peak memory of one forward and backward, measured in a fresh process.

``python -m benchmarks.memory`` prints one number: the bytes by which the process's largest resident
set exceeds what it held before the call, less the tensors that the call returns. Inputs, and the
gradients that come in, exist before; outputs and the gradients that go out are what is returned.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import re
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor

import driftar_kernels as dk

from . import cases
from .cases import OURS
from .peers import attention as attention_peers

Sizes = Mapping[str, int]
Workload = Callable[[], list[Tensor]]


def attention(sizes: Sizes, dtype: torch.dtype, competitor: str) -> Workload:
    """Causal attention on ``[B, H, L, D]``, loss on output and entropy."""
    shape = [sizes[name] for name in "BHLD"]
    query, key, value = (torch.randn(shape).to(dtype).requires_grad_() for _ in range(3))
    grad_out, grad_entropy = torch.randn(shape).to(dtype), torch.randn(shape[:3])

    def ours() -> list[Tensor]:
        result = dk.attention(query, key, value, is_causal=True)
        assert result.entropy is not None
        return [result.out, result.entropy, result.lse, result.max_score]

    forwards: dict[str, Workload] = {
        OURS: ours,
        cases.SDPA: lambda: [attention_peers.sdpa(query, key, value, is_causal=True)],
        cases.MATERIALISED: lambda: list(
            attention_peers.materialised(query, key, value, is_causal=True)
        ),
    }
    forward = forwards[competitor]

    def call() -> list[Tensor]:
        values = forward()
        weights = [grad_out, grad_entropy][: len(values)]
        gradients = torch.autograd.grad(values[: len(weights)], (query, key, value), weights)
        return [*values, *gradients]

    return call


def drift_loss(sizes: Sizes, dtype: torch.dtype, competitor: str) -> Workload:
    """Drift loss without negatives and its gradient."""
    gen = torch.randn(sizes["B"], sizes["N"], sizes["S"], dtype=dtype, requires_grad=True)
    pos = torch.randn(sizes["B"], sizes["P"], sizes["S"], dtype=dtype) + 0.5

    def call() -> list[Tensor]:
        loss = dk.drift_loss(gen, pos)
        return [loss, *torch.autograd.grad(loss, gen)]

    return call


# With a small problem each, so that thread pools and code are in memory before the measurement.
WORKLOADS: dict[str, tuple[Callable[..., Workload], Sizes]] = {
    "attention": (attention, {"B": 1, "H": 2, "L": 64, "D": 64}),
    "drift_loss": (drift_loss, {"B": 1, "N": 32, "P": 32, "S": 64}),
}


def peak_beyond(call: Workload) -> int:
    """Growth of the resident set at its highest during ``call``, less what it returns."""
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
    before = _status("VmRSS")
    returned = call()
    return _status("VmHWM") - before - sum(x.numel() * x.element_size() for x in returned)


def in_fresh_process(
    workload: str, sizes: Sizes, dtype: torch.dtype, competitor: str = OURS
) -> float:
    """Bytes of :func:`peak_beyond` in a new process; RuntimeError with its message on failure."""
    request = json.dumps([workload, dict(sizes), str(dtype).removeprefix("torch."), competitor])
    result = subprocess.run(
        [sys.executable, "-m", "benchmarks.memory", request],
        cwd=Path(__file__).resolve().parent.parent,
        capture_output=True,
        text=True,
    )
    if result.returncode != 0:
        reason = result.stderr.strip().splitlines() or [f"exit status {result.returncode}"]
        raise RuntimeError(f"measuring the memory of {workload} failed: {reason[-1]}")
    return float(result.stdout)


def _status(name: str) -> int:
    text = Path("/proc/self/status").read_text(encoding="ascii")
    found = re.search(rf"^{name}:\s+(\d+) kB$", text, re.M)
    if found is None:
        raise RuntimeError(f"/proc/self/status has no {name}")
    return int(found[1]) * 1024


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.memory", description="Bytes of peak memory of one workload."
    )
    parser.add_argument(
        "request",
        help='JSON, e.g. ["attention", {"B":1,"H":4,"L":4096,"D":64}, "float32", "driftar"]',
    )
    workload, sizes, dtype, competitor = json.loads(parser.parse_args().request)
    build, small = WORKLOADS[workload]
    torch.manual_seed(0)
    build(small, getattr(torch, dtype), competitor)()
    print(peak_beyond(build(sizes, getattr(torch, dtype), competitor)))


if __name__ == "__main__":
    main()
