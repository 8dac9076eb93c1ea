"""What only the Triton backend has: splits of keys, packed trees, tile choices, machine code."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given

import driftar_kernels as dk
from tests.helpers.inputs import AttentionCase, chain, drift_inputs, generator, parent_lists
from tests.helpers.targets import BACKEND_DEVICES, require_backend
from tests.helpers.tolerance import assert_bitwise, assert_relative

if "triton" not in BACKEND_DEVICES:
    pytest.skip("TRITON_INTERPRET=1 tests the Triton kernels", allow_module_level=True)


@pytest.fixture(autouse=True)
def chosen() -> Iterator[None]:
    require_backend("triton")
    with dk.use_backend("triton"):
        yield


def test_every_operator_runs_its_kernels() -> None:
    from driftar_kernels import triton as kernels

    twins = {name for name in dir(torch.ops.driftar) if name.endswith("_triton")}
    assert {f"{name}_triton" for name in kernels.__all__} >= twins


@given(parents=parent_lists(70))
def test_ancestors_are_packed(parents: list[int]) -> None:
    from driftar_kernels.triton.attention_problem import pack_ancestors

    tree = dk.DraftTree(parents)
    bits = pack_ancestors(tree.parents)
    node = torch.arange(len(parents))
    unpacked = (bits[:, :, node // 32] >> (node % 32)) & 1
    assert torch.equal(unpacked.bool(), tree.ancestors)


@pytest.mark.parametrize("entropy_from", [0, 3])
def test_splitting_the_keys_changes_rounding_only(
    monkeypatch: pytest.MonkeyPatch, entropy_from: int
) -> None:
    """Few queries on many keys, some rows without any in whole splits."""
    from driftar_kernels.triton import attention as launcher

    case = AttentionCase(heads=4, kv_heads=2, queries=3, keys=300, dim=16)
    query, key, value = case.qkv()
    splits = []

    def run() -> dk.AttentionOutput:
        return dk.attention(
            query,
            key,
            value,
            enable_gqa=True,
            key_lengths=torch.tensor([300, 40]),
            entropy_from=entropy_from,
        )

    def recorded(*arguments: int) -> tuple[int, int]:
        splits.append(original(*arguments))
        return splits[-1]

    original = launcher.key_splits
    monkeypatch.setattr(launcher, "key_splits", recorded)
    split = run()
    assert splits[0][0] > 1
    monkeypatch.setattr(launcher, "key_splits", lambda *arguments: (1, 1 << 20))
    whole = run()
    for left, right in zip(split, whole, strict=True):
        assert left is not None and right is not None
        assert_relative(left, right.double(), 1e-6)


def test_panels_of_distances_equal_all_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A problem whose distances are held a few rows at a time."""
    from driftar_kernels.triton import drift as launcher

    gen, pos, neg, keywords = drift_inputs(2, 140, 30, 5, 12, weighted=True)
    whole = dk.drift_field(gen, pos, neg, **keywords)
    monkeypatch.setattr(dk.drift, "MAX_KEPT", 0)
    monkeypatch.setattr(launcher, "PANEL_ELEMENTS", 1)
    panels = dk.drift_field(gen, pos, neg, **keywords)
    for left, right in zip(whole, panels, strict=True):
        assert_relative(left, right.double(), 1e-6)


def test_chains_draw_the_numbers_of_the_native_kernels() -> None:
    """One seed, one verdict, on every backend that has the Philox stream."""
    if "cpu" not in dk.available_backends():
        pytest.skip("needs the compiled library")
    for dim in (1, 2, 5):
        inputs = chain([0.0, 0.2], [1.0, 0.8], [0.7, 0.0, 1.0], [0.9, 1.0, 0.5], dim=dim, batch=200)
        verdict = dk.verify_chain(*inputs, generator=generator(3))
        with dk.use_backend("cpu"):
            native = dk.verify_chain(*inputs, generator=generator(3))
        assert_bitwise([verdict.length], [native.length])
        assert_relative(verdict.next_sample, native.next_sample.double(), 1e-6)


def test_wide_heads_are_refused_with_the_limit() -> None:
    query = torch.randn(1, 1, 3, 257)
    with pytest.raises(NotImplementedError, match="256"):
        dk.attention(query, query, query)


@pytest.mark.parametrize(
    ("asked", "expected"), [("highest", "ieee"), ("high", "tf32"), ("medium", "tf32")]
)
def test_precision_follows_pytorch(asked: str, expected: str) -> None:
    from driftar_kernels.triton.attention_problem import precision

    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(asked)
    try:
        assert precision(torch.empty(0)) == expected
        assert precision(torch.empty(0, dtype=torch.bfloat16)) == "ieee"
    finally:
        torch.set_float32_matmul_precision(before)


def test_keys_are_split_only_where_rows_are_few() -> None:
    from driftar_kernels.triton.tuning import key_splits

    device = torch.device("cpu")
    assert key_splits(device, 1, 65, 4096, 64) == (1, 4096)
    assert key_splits(device, 1, 1, 0, 64)[0] == 1
    for keys in (1, 63, 64, 65, 1000, 4096):
        splits, each = key_splits(device, 1, 1, keys, 64)
        assert each % 64 == 0 and (splits - 1) * each < keys <= splits * each


def test_kernels_compile_without_spills() -> None:
    """The smallest part of the resource report, in a process that compiles instead of interpreting;
    CI makes the rest for one architecture."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    environment.pop("TRITON_INTERPRET", None)
    command = [sys.executable, "-m", "driftar_kernels.triton.resources"]
    done = subprocess.run(
        [*command, "--only", "prior", "--arch", "80", "90", "100"],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "kernel" in done.stdout
