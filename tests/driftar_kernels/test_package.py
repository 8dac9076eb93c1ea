"""The package as installed: imports that never fail, the report, floating-point mode, fork."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import torch

import driftar_kernels

PACKAGE = Path(driftar_kernels.__file__).parent


def python(
    *arguments: str, front: Path | None = None, **environment: str
) -> subprocess.CompletedProcess[str]:
    """A fresh interpreter that finds what this one finds, packages in ``front`` first."""
    path = [str(front), *sys.path] if front else sys.path
    merged = dict(os.environ, PYTHONPATH=os.pathsep.join(filter(None, path)), **environment)
    return subprocess.run(
        [sys.executable, *arguments],
        env=merged,
        cwd=front,  # -c and -m put the working directory before PYTHONPATH
        capture_output=True,
        text=True,
        timeout=120,
    )


USE_EVERYTHING = """
import torch, driftar_kernels as k
assert k.available_backends() == ["reference"], k.available_backends()
q = torch.randn(1, 2, 5, 8, requires_grad=True)
k.attention(q, q, q).entropy.sum().backward()
k.drift_loss(torch.randn(1, 3, 4), torch.randn(1, 3, 4))
k.entropy_prior(torch.zeros(2, 3), torch.rand(2), torch.ones(2, 3))
tree = k.DraftTree([-1, 0])
verdict = k.verify_tree(tree, torch.ones(1, 2, 3), torch.ones(1, 2, 3), tolerance=0.1)
k.commit_path(torch.randn(1, 1, 4, 2), torch.randn(1, 1, 4, 2), torch.tensor([1]), verdict)
mean = torch.zeros(1, 2, 2)
k.verify_chain(mean[:, :1], mean[:, :1], torch.ones(1, 1), mean, torch.ones(1, 2))
try:
    k.use_backend("cpu")
except RuntimeError as error:
    print("refused:", error)
"""


MISSING = "None"
# It lacks what the Python files expect of it.
OUTDATED = "__import__('types').SimpleNamespace(build_info=lambda: {'problem': ''})"


@pytest.mark.parametrize("library", [MISSING, OUTDATED], ids=["missing", "outdated"])
def test_works_without_the_compiled_library(library: str) -> None:
    """One warning, the reference for everything, a reason on asking for the missing one."""
    block = f"import sys; sys.modules['driftar_kernels._C'] = {library}\n"
    done = python("-W", "always", "-c", block + USE_EVERYTHING)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("UserWarning") == 1 and "reference" in done.stderr
    assert "refused:" in done.stdout and torch.__version__ in done.stdout


def test_works_with_a_library_that_does_not_load(tmp_path: Path) -> None:
    """A truncated or foreign binary: the loader's reason is passed on."""
    copy = tmp_path / "driftar_kernels"
    shutil.copytree(
        PACKAGE, copy, ignore=shutil.ignore_patterns("_C*.so", "_C*.pyd", "__pycache__")
    )
    library = copy / f"_C{sysconfig.get_config_var('EXT_SUFFIX')}"
    library.write_bytes(b"not a shared library")
    done = python("-W", "always", "-c", USE_EVERYTHING, front=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("UserWarning") == 1
    assert "_C" in done.stdout and "refused:" in done.stdout
    report = python("-m", "driftar_kernels", front=tmp_path)
    assert "not usable" in report.stdout, report.stderr


def test_report(backend: str) -> None:
    """`python -m driftar_kernels`: versions, backends with reasons, a self-check that passes."""
    done = python("-m", "driftar_kernels")
    assert done.returncode == 0, done.stdout + done.stderr
    assert driftar_kernels.__version__ in done.stdout and torch.__version__ in done.stdout
    for name in ("cpu", "cuda", "triton", "reference"):
        assert name in done.stdout
    assert done.stdout.count(backend) >= 2 and "self-check" in done.stdout


def test_import_leaves_floating_point_alone() -> None:
    """No -ffast-math start-up code: denormals live, NaN and infinities are told apart."""
    code = (
        "import sys, torch, driftar_kernels\n"
        "assert sys.float_info.min / 2 != 0.0\n"
        "assert float(torch.tensor(1e-40)) != 0.0 and float(torch.tensor(1e-40) * 1.0) != 0.0\n"
        "q = torch.randn(1, 1, 3, 8); driftar_kernels.attention(q, q, q)\n"
        "assert sys.float_info.min / 2 != 0.0 and float(torch.tensor(1e-40) * 1.0) != 0.0\n"
    )
    done = python("-c", code)
    assert done.returncode == 0, done.stderr


def test_import_is_quiet_and_light() -> None:
    """No output, no warning, and none of the heavy optional packages."""
    code = (
        "import sys, driftar_kernels\n"
        "heavy = {'matplotlib', 'sklearn', 'scipy', 'torch._inductor.compile_fx', 'driftar'}\n"
        "print(sorted(heavy & set(sys.modules)))\n"
    )
    done = python("-W", "error", "-c", code)
    if "cpu" in driftar_kernels.available_backends():
        assert done.returncode == 0 and done.stdout == "[]\n" and not done.stderr, done.stderr


def test_is_typed() -> None:
    assert (PACKAGE / "py.typed").exists()


FORK = """
import os, signal, sys, torch
import driftar_kernels as k
k.use_backend(sys.argv[1])
torch.set_num_threads(2)
length = 40 if sys.argv[1] == "triton" else 130  # the interpreter takes its time
def work():
    q = torch.randn(2, 4, length, 40, requires_grad=True)
    k.attention(q, q, q, is_causal=True).entropy.sum().backward()
    k.walk_tree(k.DraftTree([-1, 0, 1]), torch.ones(64, 3, dtype=torch.bool))
    k.entropy_to_sigma(torch.rand(100_000 * length // 130))
work()
child = os.fork()
if child == 0:
    signal.alarm(20)
    if sys.argv[1] in ("reference", "triton"):  # both run PyTorch's own operators as well
        torch.set_num_threads(1)
    work()
    os._exit(0)
_, status = os.waitpid(child, 0)
print(status)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_fork_after_threads(backend: str) -> None:
    """A child of a threaded parent does not hang (on one thread, where PyTorch itself computes)."""
    done = python("-W", "ignore", "-c", FORK, backend, OMP_NUM_THREADS="2")
    assert done.stdout.strip() == "0", f"status {done.stdout} {done.stderr}"


BAD_CALLS = """
import torch, driftar_kernels as k
q = torch.randn(1, 1, 3, 8)
for call in (
    lambda: k.DraftTree([0]),
    lambda: k.attention(q, q, q[..., :2, :]),
    lambda: k.drift_field(q[0], q[0], temperatures=()),
    lambda: k.entropy_to_sigma(q, tau=0.0),
):
    try:
        call()
    except ValueError:
        continue
    raise SystemExit(1)
"""


def test_optimised_python_still_validates() -> None:
    """No check is an assert statement."""
    done = python("-O", "-c", BAD_CALLS)
    assert done.returncode == 0, done.stderr
