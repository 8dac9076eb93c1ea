"""Which backend runs: the default order, explicit choices, and refusals that say why."""

from __future__ import annotations

import os
import subprocess
import sys
import threading

import pytest
import torch

import driftar_kernels
from driftar_kernels import attention, available_backends, use_backend
from tests.helpers.inputs import AttentionCase
from tests.helpers.recording import native_operators
from tests.helpers.targets import expected_backends

KNOWN = ("cpu", "cuda", "triton", "reference")
VARIABLE = "DRIFTAR_KERNELS_BACKEND"


def python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """A fresh interpreter that finds what this one finds."""
    merged = dict(os.environ, PYTHONPATH=os.pathsep.join(filter(None, sys.path)))
    merged.pop(VARIABLE, None)
    merged.update(environment)
    return subprocess.run(
        [sys.executable, "-c", code], env=merged, capture_output=True, text=True, timeout=120
    )


def runs_natively() -> bool:
    """Whether attention reaches a compiled operator under the current choice."""
    query, key, value = AttentionCase().qkv()
    return bool(native_operators(lambda: attention(query, key, value)))


def test_expected_backends_are_there() -> None:
    missing = expected_backends() - set(available_backends())
    assert not missing, f"expected but missing: {missing}"


def test_reference_is_always_available() -> None:
    found = available_backends()
    assert "reference" in found and set(found) <= set(KNOWN)


def test_the_choice_decides_what_runs(backend: str) -> None:
    assert runs_natively() == (backend != "reference")


def test_default_is_the_native_backend_for_cpu_tensors() -> None:
    use_backend(None)
    assert runs_natively() == ("cpu" in available_backends())


def test_context_restores_the_choice_before(backend: str) -> None:
    native = runs_natively()
    with use_backend("reference"):
        assert not runs_natively()
        with use_backend(backend):
            assert runs_natively() == native
        assert not runs_natively()
    assert runs_natively() == native


def test_context_restores_after_an_exception(backend: str) -> None:
    native = runs_natively()
    with pytest.raises(KeyError), use_backend("reference"):
        raise KeyError
    assert runs_natively() == native


def test_function_call_holds_until_the_next(backend: str) -> None:
    with use_backend(backend):
        use_backend("reference")
        assert not runs_natively()
        use_backend(backend)
        assert runs_natively() == (backend != "reference")


def test_the_choice_belongs_to_its_thread(backend: str) -> None:
    """Another thread starts from the default."""
    seen: list[bool] = []
    with use_backend("reference"):
        thread = threading.Thread(target=lambda: seen.append(runs_natively()))
        thread.start()
        thread.join()
    assert seen == ["cpu" in available_backends()]


@pytest.mark.parametrize("name", ["", "CPU", "opencl"])
def test_unknown_name(name: str) -> None:
    with pytest.raises(ValueError, match="reference"):
        use_backend(name)


@pytest.mark.parametrize("name", [name for name in KNOWN if name not in available_backends()])
def test_unavailable_backend_says_why(name: str) -> None:
    before = runs_natively()
    with pytest.raises(RuntimeError, match=name) as caught:
        use_backend(name)
    assert len(str(caught.value)) > len(name) + 40, "the message gives no reason"
    assert runs_natively() == before


def test_explicit_choice_never_falls_back_to_another_device(native_backend: str) -> None:
    """A backend that does not take a tensor's device refuses it by name."""
    query, key, value = (t.to("meta") for t in AttentionCase().qkv())
    with pytest.raises((RuntimeError, ValueError), match="meta"):
        attention(query, key, value)


REPORT = """
import torch, driftar_kernels
from tests.helpers.recording import native_operators
from tests.helpers.targets import expected_backends
q = torch.randn(1, 1, 4, 8)
print(bool(native_operators(lambda: driftar_kernels.attention(q, q, q))))
"""


def test_environment_variable_sets_the_process(backend: str) -> None:
    done = python(REPORT, **{VARIABLE: backend})
    assert done.stdout.strip() == str(backend != "reference"), done.stderr


def test_use_backend_overrides_the_environment_variable(backend: str) -> None:
    code = REPORT.replace("q = ", f"driftar_kernels.use_backend({backend!r})\nq = ")
    done = python(code, **{VARIABLE: "reference"})
    assert done.stdout.strip() == str(backend != "reference"), done.stderr


def test_empty_environment_variable_is_no_choice() -> None:
    done = python(REPORT, **{VARIABLE: ""})
    assert done.stdout.strip() == str("cpu" in available_backends()), done.stderr


def test_unknown_name_in_the_environment_variable() -> None:
    done = python(REPORT, **{VARIABLE: "fastest"})
    assert done.returncode != 0
    assert VARIABLE in done.stderr and "fastest" in done.stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is there")
def test_unavailable_name_in_the_environment_variable() -> None:
    """It is refused with the reason, at import or at the first call; nothing falls back."""
    done = python(REPORT, **{VARIABLE: "cuda"})
    assert done.returncode != 0 and "True" not in done.stdout and "False" not in done.stdout
    assert "cuda" in done.stderr.splitlines()[-1]


def test_public_names() -> None:
    for name in driftar_kernels.__all__:
        assert hasattr(driftar_kernels, name), name
    wanted = {
        "attention",
        "AttentionOutput",
        "DraftTree",
        "TreeVerdict",
        "ChainVerdict",
        "walk_tree",
    }
    wanted |= {
        "verify_tree",
        "verify_chain",
        "commit_path",
        "drift_field",
        "drift_loss",
        "DriftField",
    }
    wanted |= {"entropy_to_sigma", "entropy_prior", "available_backends", "use_backend"}
    assert wanted <= set(driftar_kernels.__all__)
