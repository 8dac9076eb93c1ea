"""The one table of what is measured: groups, sizes, dtypes, peers with targets.

A group is one row of the targets; it is a pytest-benchmark group and a section of the report.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch

OURS = "driftar"

SDPA = "SDPA without entropy"
SDPA_TWICE = "SDPA twice"
MATERIALISED = "materialised map"
COMPILED_MAP = "materialised map, compiled"
FLEX = "FlexAttention without entropy"
FLEX_TWICE = "FlexAttention twice"
SDPA_MASK = "SDPA, same mask"
EAGER = "eager"
COMPILED = "eager, compiled"
TENSOR_WALK = "walk in PyTorch"
LIST_WALK = "walk in Python"
PER_SAMPLE = "eager, sample by sample"
SMALLEST_SDPA = "SDPA's smallest call"
ONE_THREAD = "1 thread"
ALONE = "alone"

MEGABYTE = 1e6


@dataclass(frozen=True)
class Target:
    """A bound on the operator's figure.

    Attributes:
        limit: largest allowed value.
        peer: what it is relative to; None for an absolute bound.
        kind: "ratio" to the peer, "excess" over the peer or "absolute", both in the case's unit.
    """

    limit: float
    peer: str | None = None
    kind: Literal["ratio", "excess", "absolute"] = "ratio"


@dataclass(frozen=True)
class Case:
    """One measurement.

    Attributes:
        group: key of :data:`TITLES`.
        sizes: the dimensions by name, as in the operator's docstring.
        dtype: of the inputs.
        targets: what must be reached.
        name: distinguishes cases of one group that differ in more than sizes.
        unit: "s" or "B" (bytes), the unit of the figure.
    """

    group: str
    sizes: Mapping[str, int]
    dtype: torch.dtype = torch.float32
    targets: tuple[Target, ...] = ()
    name: str = ""
    unit: Literal["s", "B"] = "s"

    def __getitem__(self, size: str) -> int:
        return self.sizes[size]

    @property
    def dtype_name(self) -> str:
        return {torch.float32: "fp32", torch.bfloat16: "bf16"}[self.dtype]

    @property
    def label(self) -> str:
        """For people: name, sizes and dtype."""
        sizes = " ".join(f"{name}={size}" for name, size in self.sizes.items())
        return ", ".join(filter(None, (self.name, sizes, self.dtype_name)))

    def __str__(self) -> str:
        return self.label.replace(", ", "-").replace(" ", "-").replace("=", "")


TITLES: dict[str, str] = {
    "attention-forward": "Attention with entropy, forward, causal",
    "attention-forward-backward": "Attention with entropy, forward and backward, causal",
    "attention-image": "Attention with entropy_from = 64, not causal, forward",
    "attention-map": 'Attention with entropy="map"',
    "attention-decode": "Attention with entropy, decoding",
    "drift-loss": "drift_loss, forward and backward",
    "verify-tree": "verify_tree",
    "verify-chain": "verify_chain",
    "commit-path": "commit_path",
    "entropy-prior": "entropy_prior",
    "overhead": "Smallest call of every operator",
    "memory": "Peak memory beyond inputs, outputs and gradients, forward and backward",
    "threads": "2 threads against 1",
    "openmp": "Between PyTorch matrix products against alone",
    "attention-length": "Attention with entropy, forward, causal, by length",
    "memory-length": "Peak memory of attention, forward and backward, causal, by length",
}

_DTYPES = (torch.float32, torch.bfloat16)


def _sizes(names: str, *rows: tuple[int, ...]) -> list[dict[str, int]]:
    return [dict(zip(names.split(), row, strict=True)) for row in rows]


_CAUSAL = _sizes(
    "B H L D", (8, 16, 256, 64), (1, 16, 1024, 64), (1, 16, 2048, 64), (1, 8, 4096, 128)
)
_IMAGE = _sizes("B H L D", (8, 16, 320, 64), (2, 16, 320, 80))
_MANY = {"B": 256, "N": 64, "P": 64, "Q": 32, "S": 640}
_ONE = {"B": 1, "N": 2048, "P": 4096, "Q": 0, "S": 256}
_LONG = {"B": 1, "H": 16, "L": 2048, "D": 64}
_SHORT = {"B": 8, "H": 16, "L": 256, "D": 64}


def _forward_targets(sizes: Mapping[str, int], dtype: torch.dtype) -> tuple[Target, ...]:
    of_sdpa = 0.90 if dtype == torch.bfloat16 else 0.95 if sizes["D"] == 128 else 0.85
    return (Target(of_sdpa, SDPA), Target(0.5, SDPA_TWICE), Target(1 / 12, MATERIALISED))


def _decode_cases() -> list[Case]:
    heads = [(32, 8, 64), (16, 16, 64), (32, 8, 128)]
    return [
        Case("attention-decode", sizes, dtype, (Target(0.9, SDPA_MASK),))
        for query_heads, key_heads, width in heads
        for dtype in _DTYPES
        for sizes in _sizes(
            "Hq Hkv Lq Lk D",
            *(
                (query_heads, key_heads, queries, keys, width)
                for queries in (1, 8, 64)
                for keys in (512, 2048, 8192)
                # One cache length stands for the wider head.
                if width == 64 or keys == 2048
            ),
        )
    ]


def _eager(group: str, sizes: list[dict[str, int]], name: str = "") -> list[Case]:
    return [Case(group, size, targets=(Target(1.0, EAGER),), name=name) for size in sizes]


def _all() -> list[Case]:
    cases = [
        Case("attention-forward", sizes, dtype, _forward_targets(sizes, dtype))
        for dtype in _DTYPES
        for sizes in _CAUSAL
    ]
    cases += [
        Case("attention-forward-backward", sizes, dtype, (Target(1.0, SDPA),))
        for dtype in _DTYPES
        for sizes in _CAUSAL
    ]
    cases += [
        Case("attention-image", sizes, dtype, (Target(0.9, SDPA),))
        for dtype in _DTYPES
        for sizes in _IMAGE
    ]
    cases += [
        Case("attention-map", _IMAGE[0], targets=(Target(1 / 5, MATERIALISED),), name=name)
        for name in (
            "forward, causal",
            "forward and backward, causal",
            "forward, all keys",
            "forward and backward, all keys",
        )
    ]
    cases += _decode_cases()
    drift = _sizes(
        "B N P Q S",
        (1024, 64, 64, 16, 128),
        (256, 64, 64, 32, 640),
        (16, 64, 64, 32, 5120),
        (1, 640, 640, 0, 384),
        (1, 2048, 4096, 0, 256),
    )
    limits = (1 / 10, 1 / 5, 1 / 4, 1 / 1.5, 1 / 4)
    cases += [
        Case("drift-loss", sizes, targets=(Target(limit, EAGER),))
        for sizes, limit in zip(drift, limits, strict=True)
    ]
    walks = (Target(1 / 20, TENSOR_WALK), Target(1 / 20, LIST_WALK))
    cases += [
        Case("verify-tree", {"B": batch, "N": nodes, "D": width}, targets=walks)
        for batch in (1, 64)
        for nodes in (16, 64, 256)
        for width in (16, 256, 1024)
    ]
    cases += _eager("verify-chain", _sizes("B K D", (1, 4, 16), (16, 8, 64), (64, 16, 1024)))
    cases += [
        Case(
            "commit-path",
            sizes,
            targets=(Target(1.0, EAGER), Target(1.0, PER_SAMPLE)),
        )
        for sizes in _sizes(
            "B H L N D", (1, 8, 512, 16, 64), (4, 8, 2048, 64, 64), (16, 16, 2048, 256, 128)
        )
    ]
    for name in ("forward", "forward and backward"):
        cases += _eager(
            "entropy-prior", _sizes("L C", (64, 16), (4096, 16), (1024, 768), (8192, 1280)), name
        )
    cases += [
        Case("overhead", {}, targets=(Target(15e-6, SMALLEST_SDPA, "excess"),), name=name)
        for name in (
            "attention",
            "drift_loss",
            "walk_tree",
            "verify_tree",
            "verify_chain",
            "commit_path",
            "entropy_to_sigma",
            "entropy_prior",
        )
    ]
    memory = {"B": 1, "H": 4, "L": 32768, "D": 64}
    cases += [
        Case("memory", memory, dtype, (_bytes(64),), "attention", "B") for dtype in _DTYPES
    ] + [
        Case(
            "memory",
            {"B": 1, "N": 16384, "P": 16384, "Q": 0, "S": 256},
            targets=(_bytes(200),),
            name="drift_loss",
            unit="B",
        )
    ]
    cases += [
        Case("threads", sizes, dtype, (Target(1 / 1.8, ONE_THREAD),), name)
        for name, sizes, dtype in (
            ("attention forward", _LONG, torch.float32),
            ("attention forward", _LONG, torch.bfloat16),
            ("attention forward and backward", _LONG, torch.float32),
            ("drift_loss", _MANY, torch.float32),
            ("drift_loss", _ONE, torch.float32),
        )
    ]
    cases += [
        Case("openmp", sizes, targets=(Target(1.05, ALONE),), name=name)
        for name, sizes in (
            ("attention forward", _SHORT),
            ("attention forward and backward", _SHORT),
            ("drift_loss", {**_MANY, "B": 16}),
        )
    ]
    lengths = [{"B": 1, "H": 4, "L": 2**power, "D": 64} for power in range(8, 14)]
    cases += [Case("attention-length", sizes, dtype) for dtype in _DTYPES for sizes in lengths]
    cases += [Case("memory-length", sizes, unit="B") for sizes in lengths]
    return cases


def _bytes(megabytes: int) -> Target:
    return Target(megabytes * MEGABYTE, kind="absolute")


CASES: tuple[Case, ...] = tuple(_all())


def of(group: str) -> list[Case]:
    """The cases of a group."""
    if group not in TITLES:
        raise KeyError(f"no group {group!r}; known are {', '.join(TITLES)}")
    return [case for case in CASES if case.group == group]
