"""The emulator's units of Hopper, and the choice of the Hopper kernel.

The operators' own tests run that kernel where the emulated device is a Hopper (make test-cuda).
"""

from __future__ import annotations

import ctypes
from functools import cache

import pytest
import torch
from torch import Tensor

from tests.helpers.emulator import EMULATED, library
from tests.helpers.inputs import normal

if not EMULATED:
    pytest.skip("DRIFTAR_CUDA_EMULATED=1 tests the CUDA kernels", allow_module_level=True)

# What the emulator says, or None where a wrong result is what shows.
FAULTS = {
    "unawaited_copy": None,
    "unawaited_product": None,
    "missing_fence": "before wgmma.fence",
    "too_many_bytes": "deadlock",
    "early_reuse": None,
    "divergent_products": "different products",
    "lonely_barrier": "deadlock",
    "abandoned_barrier": "named barrier",
    "abandoned_copy": "copies in flight",
}


@cache
def emulator() -> ctypes.CDLL:
    """Its functions for Hopper."""
    loaded = library()
    for name in ("warpgroup_product", "tile"):
        getattr(loaded, f"driftar_emulator_{name}").restype = ctypes.c_char_p
    for name in ("forward", "copies_in_bulk"):
        getattr(loaded, f"driftar_plan_{name}").restype = ctypes.c_bool
    return loaded


def pointer(x: Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(x.data_ptr())


def product(fault: str, columns: int, transposed: bool) -> tuple[bytes | None, Tensor, Tensor]:
    """What the emulator reports, the result, and what it should be."""
    a = normal(64, 64, seed=1).bfloat16()
    b = normal(*((64, columns) if transposed else (columns, 64)), seed=2).bfloat16()
    out = torch.full((64, columns), torch.nan)
    message = emulator().driftar_emulator_warpgroup_product(
        fault.encode(), columns, transposed, pointer(a), pointer(b), pointer(out)
    )
    return message, out.double(), a.double() @ (b if transposed else b.mT).double()


@pytest.mark.parametrize("columns, transposed", [(128, False), (128, True), (64, True)])
def test_products_of_a_warpgroup(columns: int, transposed: bool) -> None:
    """Keys as they lie, by rows; values by columns, in one and in two panels."""
    message, out, expected = product("none", columns, transposed)
    assert message is None
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("fault", FAULTS)
def test_planted_faults_show(fault: str) -> None:
    message, out, expected = product(fault, 128, False)
    wanted = FAULTS[fault]
    if wanted is None:
        assert message is None and not torch.allclose(out, expected, atol=1e-2)
    else:
        assert message is not None and wanted in message.decode()


def test_copies_are_swizzled_and_end_with_the_tensor() -> None:
    """Piece c of 16 bytes of row r lies at place c ^ (r % 8); zeros are outside of the tensor."""
    rows, columns = 21, 88
    data = torch.arange(rows * columns, dtype=torch.int16).reshape(rows, columns)
    out = torch.full((16, 64), -1, dtype=torch.int16)
    first_row, first_column = 10, 64
    message = emulator().driftar_emulator_tile(
        pointer(data), rows, columns, 16, first_row, first_column, pointer(out)
    )
    assert message is None
    expected = torch.zeros(16, 8, 8, dtype=torch.int16)
    whole = torch.zeros(first_row + 16, first_column + 64, dtype=torch.int16)
    whole[:rows, :columns] = data
    box = whole[first_row:, first_column:].reshape(16, 8, 8)
    for r in range(16):
        for c in range(8):
            expected[r, c ^ (r % 8)] = box[r, c]
    assert torch.equal(out, expected.reshape(16, 64))


def plan(
    *,
    capability: int = 90,
    batch: int = 2,
    heads: tuple[int, int] = (8, 2),
    lengths: tuple[int, int] = (1024, 1024),
    widths: tuple[int, int] = (128, 128),
    scalar: int = 1,
    masked: bool = False,
    tree: bool = False,
    scale: float = 0.1,
) -> tuple[bool, int, int]:
    """(Hopper kernel, splits, keys of each) on a device of 132 multiprocessors."""
    sizes = (ctypes.c_int64 * 7)(batch, *heads, *lengths, *widths)
    splits, each = ctypes.c_int(), ctypes.c_int()
    chosen = emulator().driftar_plan_forward(
        capability,
        132,
        sizes,
        scalar,
        masked,
        tree,
        ctypes.c_float(scale),
        ctypes.byref(splits),
        ctypes.byref(each),
    )
    return bool(chosen), splits.value, each.value


@pytest.mark.parametrize("capability, chosen", [(80, 0), (89, 0), (90, 1), (100, 0), (120, 0)])
def test_hopper_kernel_is_for_hopper(capability: int, chosen: int) -> None:
    assert plan(capability=capability)[0] == chosen


@pytest.mark.parametrize(
    "options",
    [
        {"scalar": 0},  # fp32
        {"masked": True},
        {"tree": True},
        {"widths": (256, 128)},
        {"widths": (64, 136)},
        {"widths": (60, 64)},  # rows are no multiple of 16 bytes, however they lie
        {"heads": (129, 1)},  # more heads than rows of a tile
        {"lengths": (16, 0)},
        {"scale": 0.0},
        {"scale": -0.1},  # the largest product would not be the largest score
        {"scale": float("nan")},
    ],
    ids=str,
)
def test_other_calls_take_the_other_kernel(options: dict[str, object]) -> None:
    assert not plan(**options)[0]  # type: ignore[arg-type]


@pytest.mark.parametrize("width", [8, 64, 80, 96, 128])
def test_padded_widths_take_the_hopper_kernel(width: int) -> None:
    assert plan(widths=(width, 128))[0] and plan(widths=(64, width))[0]


def test_hopper_kernel_splits_the_keys_of_few_queries() -> None:
    assert plan()[1] == 1  # 128 blocks of 32 queries of 4 heads
    chosen, splits, each = plan(batch=1, lengths=(1, 1 << 16))
    assert chosen and splits > 32 and each % 128 == 0 and splits * each >= 1 << 16


def test_bulk_copies_want_aligned_rows_that_do_not_repeat() -> None:
    def bulk(heads: int, stride: int, vectors: bool) -> bool:
        copies = emulator().driftar_plan_copies_in_bulk
        return bool(copies(ctypes.c_int64(heads), ctypes.c_int64(stride), vectors))

    assert bulk(4, 640, True) and bulk(1, 0, True)
    assert not bulk(4, 640, False) and not bulk(4, 0, True) and not bulk(4, 1 << 39, True)
