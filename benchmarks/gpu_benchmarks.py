"""What a GPU record measures: every operator beside its peers, its target and its floor.

A floor is the time that the counted FLOPs or bytes alone would take, at the rates of PyTorch's own
matrix product and copy in the same run.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

import driftar_kernels as dk

from .cases import OURS
from .peers.attention import sdpa
from .peers.drift import drift_loss
from .timing import Contest, Race

Record = dict[str, Any]
Call = Callable[[], object]

CUDNN, FLASH = "cuDNN SDPA without entropy", "SDPA without entropy"

# Ours must be so many times as fast as the peer.
FORWARD_TARGETS = {"triton": {FLASH: 0.95}, "cuda": {FLASH: 1.4, CUDNN: 0.85}}
TRAINING_TARGETS = {"triton": {FLASH: 0.9}, "cuda": {FLASH: 0.95}}
DECODE_TARGET = {"triton": 0.8, "cuda": 0.85}  # of the bandwidth of a copy
DRIFT_TARGETS = {
    "triton": {"eager": 5.0, "compiled": 2.0},
    "cuda": {"eager": 8.0, "compiled": 3.0},
}
DRIFT_FLOOR = 0.5  # of the larger floor
TREE_SECONDS = {"triton": 15e-6, "cuda": 8e-6}


def timed(device: torch.device, ours: Call, **others: Call) -> dict[str, float]:
    """Interleaved medians in seconds; on a GPU every call is waited for."""
    return raced(device, ours, others)


def raced(device: torch.device, ours: Call, others: Mapping[str, Call]) -> dict[str, float]:
    """:func:`timed` for peers whose names are no identifiers."""

    def waited(call: Call) -> None:
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


@functools.cache
def product_rate(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of a square matrix product; of fp32 with tf32 operands."""
    size = 8192 if device.type == "cuda" else 64
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        return 2 * size**3 / timed(device, lambda: torch.mm(a, b))[OURS]
    finally:
        torch.set_float32_matmul_precision(before)


@functools.cache
def copy_rate(device: torch.device) -> float:
    """Bytes/s, read and written, of a copy of 1 GiB."""
    a = torch.empty(1 << 28 if device.type == "cuda" else 1 << 10, device=device)
    b = torch.empty_like(a)
    return 2 * a.nbytes / timed(device, lambda: b.copy_(a))[OURS]


def row(
    name: str, medians: Mapping[str, float], ratio: float, target: float, **more: Any
) -> Record:
    """One line of a record: ``ratio`` is at least ``target`` where that is reached."""
    return {
        "case": name,
        "median_s": dict(medians),
        "ratio": ratio,
        "target": target,
        "reached": ratio >= target,
        **more,
    }


def against(
    name: str, medians: Mapping[str, float], targets: Mapping[str, float], floor: float
) -> list[Record]:
    """A line for every peer that there is a target for."""
    return [
        row(f"{name}, of {peer}", medians, medians[peer] / medians[OURS], target, floor_s=floor)
        for peer, target in targets.items()
        if peer in medians
    ]


def _sdpa_with(backend: Any, query: Tensor, key: Tensor, value: Tensor) -> list[Tensor]:
    kinds = torch.nn.attention.SDPBackend
    with torch.nn.attention.sdpa_kernel([backend] if query.is_cuda else [kinds.MATH]):
        return [sdpa(query, key, value, is_causal=True)]


def bench_attention(backend: str, device: torch.device) -> list[Record]:
    """Forward and forward + backward, causal, with entropy, against SDPA without it."""
    cuda = device.type == "cuda"
    dtype = torch.bfloat16
    kinds = torch.nn.attention.SDPBackend
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

            peers = {FLASH: kinds.FLASH_ATTENTION} | (
                {CUDNN: kinds.CUDNN_ATTENTION} if cuda else {}
            )
            forward = raced(
                device,
                partial(entropic, plain),
                {name: partial(_sdpa_with, kind, *plain) for name, kind in peers.items()},
            )
            training = raced(
                device,
                partial(both, partial(entropic, leaves)),
                {FLASH: partial(both, partial(_sdpa_with, kinds.FLASH_ATTENTION, *leaves))},
            )
            # Half of the map is visible; backward passes do five products, forward passes two.
            product = shape[0] * shape[1] * length * length * width
            rate = product_rate(device, dtype)
            for name, medians, targets, products in (
                ("forward", forward, FORWARD_TARGETS[backend], 2),
                ("forward+backward", training, TRAINING_TARGETS[backend], 7),
            ):
                label = f"attention {name} {list(shape)}"
                rows += against(label, medians, targets, products * product / rate)
    return rows


def bench_decode(backend: str, device: torch.device) -> list[Record]:
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
    floor = (key.nbytes + value.nbytes) / copy_rate(device)
    ratio, goal = medians["copy"] / medians[OURS], DECODE_TARGET[backend]
    return [row(f"decode, {keys} keys", medians, ratio, goal, floor_s=floor)]


def bench_drift(backend: str, device: torch.device) -> list[Record]:
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
        targets = dict(DRIFT_TARGETS[backend])
        if batch <= 100:
            del targets["compiled"]
        # One product for distances, one per temperature; every point is read, the gradient written.
        points = count + positives + negatives
        products = 2 * batch * count * points * features * (1 + 3)
        traffic = 4 * batch * features * (points + count)
        floor = max(products / product_rate(device, torch.float32), traffic / copy_rate(device))
        rows += against(name, medians, targets, floor)
        ratio = floor / medians[OURS]
        rows.append(row(f"{name}, of its floor", medians, ratio, DRIFT_FLOOR, floor_s=floor))
    return rows


def bench_tree(backend: str, device: torch.device) -> list[Record]:
    """verify_tree on 64 nodes of 16 channels: on a GPU the time of one of many in a graph."""
    parents = torch.tensor([max((node - 1) // 2, 0) if node else -1 for node in range(64)])
    tree = dk.DraftTree(parents).to(device)
    draft = torch.randn(1, 64, 16, device=device)

    def verify() -> object:
        return dk.verify_tree(tree, draft, draft, tolerance=0.1)

    medians = timed(device, verify)
    own = medians[OURS]
    if device.type == "cuda":
        repeats = 100
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for _ in range(repeats):
                verify()
        own = timed(device, graph.replay)[OURS] / repeats
    target = TREE_SECONDS[backend]
    return [row("verify_tree, 64 nodes", medians, target / own, 1.0, on_device_s=own)]


BENCHMARKS = (bench_attention, bench_decode, bench_drift, bench_tree)
