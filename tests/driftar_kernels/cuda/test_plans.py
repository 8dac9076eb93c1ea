"""What the host decides about launches: tiles, splits, stages, shared memory. No GPU is needed."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

SOURCE = Path(__file__).with_name("plans.cpp")
# Shared memory that a block can have, by architecture.
SM_80, SM_86, SM_90 = 163 << 10, 99 << 10, 227 << 10

Plan = Callable[..., int]


@pytest.fixture(scope="module")
def plans(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Plan]:
    """The functions of plans.cpp by name, on integers."""
    compiler = shutil.which("c++")
    if compiler is None:
        pytest.skip("no C++ compiler was found")
    library = tmp_path_factory.mktemp("plans") / "plans.so"
    flags = ["-std=c++20", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC"]
    subprocess.run([compiler, *flags, str(SOURCE), "-o", str(library)], check=True)
    loaded = ctypes.CDLL(str(library))

    def plan(name: str) -> Plan:
        function = getattr(loaded, name)
        function.restype = ctypes.c_int64
        return lambda *sizes: int(function(*map(ctypes.c_int64, sizes)))

    return plan


@pytest.mark.parametrize("blocks", [1, 7, 264, 1000])
@pytest.mark.parametrize("keys", [0, 1, 64, 257, 4096, 100_000])
def test_splits_cover_the_keys(plans: Callable[[str], Plan], blocks: int, keys: int) -> None:
    each = ctypes.c_int()
    splits = plans("splits")(blocks, keys, 64, 132, ctypes.addressof(each))
    assert each.value % 64 == 0 and splits * each.value >= keys
    assert (splits - 1) * each.value < max(keys, 1)
    if blocks >= 264 or keys < 512:
        assert splits == 1  # the queries fill the device, or there is nothing to split
    if blocks == 1 and keys == 100_000:
        assert splits > 32


def test_heads_are_padded(plans: Callable[[str], Plan]) -> None:
    wide = {1: 64, 64: 64, 65: 128, 128: 128, 129: 256, 256: 256}
    assert {width: plans("width")(width, 4) for width in wide} == wide
    narrow = wide | {65: 80, 80: 80, 81: 96, 96: 96, 97: 128}
    assert {width: plans("width")(width, 2) for width in narrow} == narrow


@pytest.mark.parametrize("bytes_of_element", [2, 4])
def test_stages_leave_room_for_two_blocks(
    plans: Callable[[str], Plan], bytes_of_element: int
) -> None:
    """More stages would not fit; one stage of the widest fp32 heads fills a multiprocessor."""
    for width in (64, 80, 96, 128, 256):
        stages = plans("stages")(width, bytes_of_element)
        taken = plans("attention_bytes")(width, bytes_of_element, stages)
        more = plans("attention_bytes")(width, bytes_of_element, stages + 1)
        assert taken <= SM_80
        if stages > 1:
            assert 2 * (taken + 1024) <= 164 << 10
        assert stages == 3 or 2 * (more + 1024) > 164 << 10
    assert [plans("stages")(width, 2) for width in (64, 80, 96, 128, 256)] == [3, 3, 2, 1, 2]


def test_caches_move_in_the_widest_units(plans: Callable[[str], Plan]) -> None:
    unit = plans("copied_unit")  # address, width, element, row, column
    assert unit(4096, 128, 2, 128, 2) == 16
    assert unit(4096 + 8, 128, 2, 128, 2) == 8  # the address
    assert unit(4096, 12, 4, 128, 4) == 4  # the width
    assert unit(4096, 128, 2, 130, 2) == 2  # the rows
    assert unit(4096, 128, 2, 128, 4) == 2  # apart


def test_panels_are_whole_tiles(plans: Callable[[str], Plan]) -> None:
    rows = plans("panel")
    assert rows(1, 8000, 16000, 1 << 24) == 1024
    assert rows(1, 100, 200, 1 << 24) == 100
    assert rows(64, 1000, 1 << 20, 1 << 24) == 64


def test_small_problems_take_the_temperatures_that_fit(plans: Callable[[str], Plan]) -> None:
    """Of the published sizes: N = P = 64, Q = 16 or 32, three temperatures."""
    together = plans("together")  # batch, N, M, temperatures, multiprocessors, shared memory
    assert together(2048, 64, 144, 3, 132, SM_90) == 3
    assert together(2048, 64, 160, 3, 132, SM_90) == 3
    assert together(2048, 64, 144, 3, 108, SM_80) == 1  # in three passes over the points
    assert together(2048, 32, 80, 3, 108, SM_80) == 3
    assert together(2048, 64, 144, 3, 84, SM_86) == 0  # no room for distances and coefficients
    assert together(2048, 8, 24, 16, 132, SM_90) == 16


def test_problems_that_no_block_takes(plans: Callable[[str], Plan]) -> None:
    together = plans("together")
    assert together(64, 64, 144, 3, 132, SM_90) == 0  # too few of them
    assert together(66, 64, 144, 3, 132, SM_90) == 3
    assert together(2048, 640, 1312, 3, 132, SM_90) == 0  # too large
    assert together(2048, 1 << 31, 1 << 31, 3, 132, SM_90) == 0


@pytest.mark.parametrize("limit", [SM_80, SM_86, SM_90])
def test_small_problems_stay_within_shared_memory(plans: Callable[[str], Plan], limit: int) -> None:
    for generated in (1, 31, 32, 33, 64, 100):
        for others in (0, 1, 40, 100, 300):
            for temperatures in (1, 2, 3, 5, 16):
                points = generated + others
                count = plans("together")(2048, generated, points, temperatures, 132, limit)
                assert count <= temperatures
                if count == 0:
                    assert plans("batch_bytes")(generated, points, 2) > limit
                    continue
                assert plans("batch_bytes")(generated, points, 1 + count) <= limit
                # One more at a time would save a pass over the points, or does not fit.
                passes = -(-temperatures // count)
                fewer = -(-temperatures // max(passes - 1, 1))
                assert passes == 1 or plans("batch_bytes")(generated, points, 1 + fewer) > limit
