"""The backends under test, and what happens when one of them is missing."""

from __future__ import annotations

import os

import pytest

import driftar_kernels
from tests.helpers.emulator import EMULATED
from tests.helpers.interpreter import INTERPRETED

EXPECT_VARIABLE = "DRIFTAR_KERNELS_EXPECT_BACKENDS"
DEVICE_VARIABLE = "DRIFTAR_KERNELS_TEST_DEVICE"
DEFAULT_EXPECTED = "cpu,reference,triton" if INTERPRETED else "cpu,reference"
if EMULATED:
    DEFAULT_EXPECTED = "cuda,reference"


def expected_backends() -> set[str]:
    """Backends that must be there: a missing one fails its tests instead of hiding them."""
    return set(filter(None, os.environ.get(EXPECT_VARIABLE, DEFAULT_EXPECTED).split(",")))


# A backend joins every test by one entry: its name and the device of the tensors it is tested with.
BACKEND_DEVICES = {"reference": "cpu"}
if not EMULATED:  # the emulated kernels take the place of the CPU kernels
    BACKEND_DEVICES["cpu"] = "cpu"
for name in ("triton", "cuda"):
    if name in expected_backends():
        BACKEND_DEVICES[name] = os.environ.get(DEVICE_VARIABLE, "cpu")


def require_backend(name: str) -> None:
    """Fail, or skip where the backend is not expected, with the reason that the package gives."""
    if name in driftar_kernels.available_backends():
        return
    try:
        driftar_kernels.use_backend(name)
    except RuntimeError as error:
        reason = str(error)
    else:
        reason = f"use_backend({name!r}) works although available_backends() does not list it"
    if name in expected_backends():
        pytest.fail(f"expected backend is missing ({EXPECT_VARIABLE}): {reason}")
    pytest.skip(reason)
