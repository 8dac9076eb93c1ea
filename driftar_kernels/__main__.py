"""``python -m driftar_kernels``: what was built, what will run and why, and a self-check of a
second.
"""

from __future__ import annotations

import argparse
import platform
import sys
import time
from collections.abc import Callable

import torch
from torch import Tensor

from . import (
    DraftTree,
    _library,
    attention,
    available_backends,
    drift_field,
    entropy_prior,
    use_backend,
    verify_tree,
)
from .backends import BACKENDS, DEFAULT_ORDER
from .version import __version__

TOLERANCE = 1e-4  # relative, fp32 against the fp64 reference


def describe() -> None:
    """Print versions, instruction sets and backends."""
    print(f"driftar_kernels  {__version__}")
    print(f"Python           {platform.python_version()} on {platform.machine()}")
    print(f"PyTorch          {torch.__version__}, {torch.get_num_threads()} threads")
    info = _library.build_info
    if info:
        print(f"native library   built for PyTorch {info['torch']} with {info['compiler']}")
        print(
            f"instruction sets {info['instruction_sets']}; running {info['active_instruction_set']}"
        )
    print("backends")
    for backend in BACKENDS.values():
        reason = backend.missing()
        state = (
            f"usable on {', '.join(backend.devices)} tensors"
            if reason is None
            else f"not usable: {reason}"
        )
        print(f"  {backend.name:<10} {backend.description:<38} {state}")
    for device, order in DEFAULT_ORDER.items():
        usable = [name for name in order if BACKENDS[name].missing() is None]
        print(f"default for {device} tensors: {', then '.join(usable)}")


def _cases() -> dict[str, Callable[[torch.dtype], list[Tensor]]]:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    query, key, value = normal(2, 4, 96, 40), normal(2, 2, 130, 40), normal(2, 2, 130, 24)
    gen, pos, neg = normal(3, 32, 48), normal(3, 40, 48), normal(3, 8, 48)
    mean, noise = normal(4, 16, 8), normal(4, 16, 8)
    entropy = torch.rand(4, 16, generator=generator, dtype=torch.float64)
    tree = DraftTree([-1, 0, 0, 1, 1, 2, 3, -1])
    draft = normal(4, 8, 16)
    target = draft + 0.2 * normal(4, 8, 16)

    def run_attention(dtype: torch.dtype) -> list[Tensor]:
        inputs = [x.to(dtype).requires_grad_() for x in (query, key, value)]
        result = attention(*inputs, is_causal=True, query_offset=34, enable_gqa=True)
        if result.entropy is None:
            raise RuntimeError("attention returned no entropy")
        gradients = torch.autograd.grad(result.out.sum() + result.entropy.sum(), inputs)
        return [result.out.detach(), result.entropy.detach(), result.lse.detach(), *gradients]

    def run_drift(dtype: torch.dtype) -> list[Tensor]:
        return list(drift_field(gen.to(dtype), pos.to(dtype), neg.to(dtype)))

    def run_tree(dtype: torch.dtype) -> list[Tensor]:
        return list(verify_tree(tree, draft.to(dtype), target.to(dtype), tolerance=0.8))

    def run_prior(dtype: torch.dtype) -> list[Tensor]:
        return [entropy_prior(mean.to(dtype), entropy.to(dtype), noise.to(dtype))]

    return {"attention": run_attention, "drift": run_drift, "tree": run_tree, "prior": run_prior}


def self_check() -> bool:
    """Compare every usable backend in fp32 with the fp64 reference; True when all agree."""
    start = time.perf_counter()
    passed = True
    print("self-check (largest relative error in fp32)")
    for name, run in _cases().items():
        with use_backend("reference"):
            expected = run(torch.float64)
        for backend in available_backends():
            if "cpu" not in BACKENDS[backend].devices:
                continue
            with use_backend(backend):
                actual = run(torch.float32)
            error = max(
                float(
                    (a.double() - e.double()).abs().max() / e.double().abs().max().clamp(min=1e-30)
                )
                for a, e in zip(actual, expected, strict=True)
            )
            good = error <= TOLERANCE
            passed &= good
            print(f"  {name:<10} {backend:<10} {error:.1e}  {'ok' if good else 'WRONG'}")
    print(f"{'passed' if passed else 'FAILED'} in {time.perf_counter() - start:.1f} s")
    return passed


def main() -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m driftar_kernels",
        description="Show what was built and what will run, then check every usable backend "
        "against the fp64 reference.",
    )
    parser.add_argument("--no-check", action="store_true", help="only describe the installation")
    arguments = parser.parse_args()
    describe()
    return 0 if arguments.no_check or self_check() else 1


if __name__ == "__main__":
    sys.exit(main())
