"""Large results reuse the memory of earlier ones, up to a limit."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor

from driftar_kernels import _library, entropy_prior
from tests.helpers.inputs import normal

pytestmark = pytest.mark.skipif(
    _library.native_error is not None, reason="needs the compiled library"
)

ROWS, WIDTH = 300, 1024  # 1.2 MB, just beyond what counts as large


@pytest.fixture(autouse=True)
def uninitialised() -> None:
    """Memory that PyTorch would fill comes from PyTorch."""
    torch.use_deterministic_algorithms(False)


def large(rows: int = ROWS, seed: int = 0) -> Tensor:
    mean = normal(rows, WIDTH, seed=seed)
    return entropy_prior(mean, torch.zeros(rows), torch.zeros_like(mean))


def run(code: str, megabytes: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "DRIFTAR_KERNELS_CACHE_MB": megabytes},
        capture_output=True,
        text=True,
        timeout=120,
    )


REUSES = """
import torch
from driftar_kernels import entropy_prior
mean, entropy = torch.zeros(300, 1024), torch.zeros(300)
result = entropy_prior(mean, entropy, mean)
first = result.data_ptr()
del result
between = [torch.empty(300, 1024) for _ in range(9)]  # take what the C library got back
print(entropy_prior(mean, entropy, mean).data_ptr() == first)
"""


def test_a_freed_block_serves_the_next_result() -> None:
    gc.collect()
    result = large()
    address = result.data_ptr()
    del result
    assert large().data_ptr() == address


def test_blocks_in_use_are_not_shared() -> None:
    results = [large(seed=seed) for seed in range(3)]
    assert len({x.data_ptr() for x in results}) == 3
    for seed, x in enumerate(results):
        assert torch.equal(x, normal(ROWS, WIDTH, seed=seed))


def test_a_view_keeps_its_block() -> None:
    view = large()[5:7]
    other = large(seed=1)
    assert torch.equal(view, normal(ROWS, WIDTH, seed=0)[5:7])
    assert other.data_ptr() != view.data_ptr() - 5 * WIDTH * 4


def test_results_can_grow() -> None:
    result = large()
    result.resize_(2 * ROWS, WIDTH)
    assert torch.equal(result[:ROWS], normal(ROWS, WIDTH, seed=0))


def test_threads_get_blocks_of_their_own() -> None:
    def check(seed: int) -> bool:
        return all(torch.equal(large(seed=seed), normal(ROWS, WIDTH, seed=seed)) for _ in range(5))

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(check, range(8)))


def test_filled_memory_where_pytorch_fills_it() -> None:
    address = large().data_ptr()
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert large().data_ptr() != address


@pytest.mark.parametrize(("megabytes", "reused"), [("", True), ("64", True), ("0", False)])
def test_limit(megabytes: str, reused: bool) -> None:
    result = run(REUSES, megabytes)
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == [str(reused)]


@pytest.mark.parametrize("megabytes", ["-1", "lots", "1e3"])
def test_bad_limit_is_named(megabytes: str) -> None:
    result = run(REUSES, megabytes)
    assert result.returncode != 0
    assert "DRIFTAR_KERNELS_CACHE_MB" in result.stderr and megabytes in result.stderr
