"""Launches whose kernels resources.py compiles: the launchers on shapes alone (meta tensors)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from . import attention, chain, drift, prior, tree, tuning

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


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


def _attention_tf32(width: int) -> None:
    """fp32 with products in TF32, as PyTorch's matmul precision may ask for."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        _attention(torch.float32, width)
    finally:
        torch.set_float32_matmul_precision(before)


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
    for width in (64, 128, 256):
        runs[f"attention fp32 as tf32 D={width}"] = partial(_attention_tf32, width)
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
