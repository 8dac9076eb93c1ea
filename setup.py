"""Drives CMake; sources and flags are listed in CMakeLists.txt alone.

The PyTorch to build against is the one already installed in the target environment. It is found by
path, also from inside pip's build isolation, and never imported or downloaded.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
MINIMUM_TORCH = (2, 11)
PACKAGING_ONLY = {"sdist", "clean", "--help", "--version", "--name"}


def fail(message: str) -> None:
    """End with one line that says what to do."""
    raise SystemExit(f"driftar: {message}")


def site_packages() -> list[Path]:
    """Where the target environment keeps its packages; build isolation hides it from sys.path
    only.
    """
    library = (
        Path("lib") / f"python{sys.version_info.major}.{sys.version_info.minor}" / "site-packages"
    )
    found = [Path(path) for path in sys.path if path]
    found += [Path(sysconfig.get_path(name)) for name in ("platlib", "purelib")]
    prefixes = (sys.prefix, os.environ.get("VIRTUAL_ENV"), os.environ.get("CONDA_PREFIX"))
    found += [Path(prefix) / library for prefix in prefixes if prefix]
    return found


def find_torch() -> Path:
    """Directory of the installed torch package."""
    given = os.environ.get("DRIFTAR_TORCH_DIR")
    candidates = [Path(given)] if given else [path / "torch" for path in site_packages()]
    for directory in candidates:
        version_file = directory / "version.py"
        if not version_file.is_file():
            continue
        match = re.search(r"__version__ = '(\d+)\.(\d+)([^']*)'", version_file.read_text())
        if match is None:
            continue
        if (int(match[1]), int(match[2])) < MINIMUM_TORCH:
            fail(
                f"PyTorch {match[1]}.{match[2]}{match[3]} is too old; install PyTorch "
                f"{'.'.join(map(str, MINIMUM_TORCH))} or newer first: pip install -U torch"
            )
        return directory
    fail(
        f"DRIFTAR_TORCH_DIR={given} holds no PyTorch"
        if given
        else "PyTorch is not installed in this environment; install it first: pip install torch"
    )
    raise AssertionError("unreachable")


def require_tools() -> None:
    """CMake and a C++ compiler on the PATH."""
    if shutil.which("cmake") is None:
        fail("CMake was not found; install it first: pip install cmake (or your system's package)")
    compiler = os.environ.get("CXX", "").split()[:1] or ["c++", "g++", "clang++"]
    if not any(shutil.which(name) for name in compiler):
        fail("no C++ compiler was found; install g++ or clang++, or set CXX")


class CMakeBuild(build_ext):
    """Builds the one extension module with CMake, with Ninja where it is installed."""

    def build_extension(self, ext: Extension) -> None:
        torch = find_torch()
        require_tools()
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        build = Path(self.build_temp).resolve() / "cmake"
        build.mkdir(parents=True, exist_ok=True)
        cache = build / "CMakeCache.txt"
        if cache.exists() and f"DRIFTAR_TORCH_DIR:UNINITIALIZED={torch}" not in cache.read_text():
            shutil.rmtree(build)  # configured for another PyTorch
            build.mkdir(parents=True)
        options = {
            "CMAKE_BUILD_TYPE": "Debug" if self.debug else "Release",
            "CMAKE_LIBRARY_OUTPUT_DIRECTORY": target.parent,
            "DRIFTAR_TORCH_DIR": torch,
            "DRIFTAR_PYTHON_INCLUDE": sysconfig.get_path("include"),
            "DRIFTAR_EXTENSION_SUFFIX": sysconfig.get_config_var("EXT_SUFFIX"),
        }
        generator = ["-G", "Ninja"] if shutil.which("ninja") else []
        configure = ["cmake", "-S", str(ROOT), "-B", str(build), *generator]
        configure += [f"-D{name}={value}" for name, value in options.items()]
        configure += os.environ.get("CMAKE_ARGS", "").split()
        jobs = os.environ.get("MAX_JOBS") or str(os.cpu_count() or 1)
        try:
            subprocess.run(configure, check=True)
            subprocess.run(["cmake", "--build", str(build), "--parallel", jobs], check=True)
        except subprocess.CalledProcessError as error:
            fail(f"building the native kernels failed, see the lines above ({error})")


if not PACKAGING_ONLY & set(sys.argv[1:]):
    find_torch()  # before pip fetches anything else

setup(
    ext_modules=[Extension("driftar_kernels._C", sources=[])],
    cmdclass={"build_ext": CMakeBuild},
)
