"""Backends, devices and dtypes that every operator test runs on, and a hostile allocator."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

import pytest
import torch
from hypothesis import HealthCheck, settings

import driftar_kernels
from tests.helpers.emulator import EMULATED, take_over
from tests.helpers.interpreter import INTERPRETED, hasten
from tests.helpers.targets import BACKEND_DEVICES, require_backend

settings.register_profile(
    "ci",
    max_examples=25,
    derandomize=True,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
settings.register_profile("thorough", settings.get_profile("ci"), max_examples=400)
settings.register_profile("interpreted", settings.get_profile("ci"), max_examples=10)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "interpreted" if INTERPRETED else "ci"))


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "slow: takes more than a few seconds")
    if INTERPRETED and "triton" in driftar_kernels.available_backends():
        hasten()
    if EMULATED:
        take_over()


@pytest.fixture(autouse=True)
def hostile_memory() -> Iterator[None]:
    """Fresh memory holds NaN (integers: the maximum), so that an unwritten output cannot pass."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def fixed_seed() -> None:
    torch.manual_seed(20260328)


def default_device(backend: str) -> contextlib.AbstractContextManager[object]:
    """Where tests make their tensors."""
    name = BACKEND_DEVICES[backend]
    return contextlib.nullcontext() if name == "cpu" else torch.device(name)


@pytest.fixture(params=list(BACKEND_DEVICES))
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each backend in turn, chosen explicitly for the test."""
    require_backend(request.param)
    with driftar_kernels.use_backend(request.param), default_device(request.param):
        yield request.param


@pytest.fixture(params=[name for name in BACKEND_DEVICES if name != "reference"])
def native_backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each backend that runs registered operators on some devices only."""
    require_backend(request.param)
    with driftar_kernels.use_backend(request.param), default_device(request.param):
        yield request.param


@pytest.fixture
def device(backend: str) -> torch.device:
    """Where the tensors of the current backend live."""
    return torch.device(BACKEND_DEVICES[backend])


@pytest.fixture(params=[torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    """The dtypes that every backend takes."""
    result: torch.dtype = request.param
    return result
