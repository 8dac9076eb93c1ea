"""The machine and the versions behind a record."""

from __future__ import annotations

import os
import platform
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from driftar_kernels import __version__, _library


def describe() -> dict[str, Any]:
    """CPU, cores, threads, instruction set, versions."""
    info = _library.build_info
    return {
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "instruction_set": info.get("active_instruction_set", "none"),
        "driftar": __version__,
        "torch": torch.__version__,
        "compiler": info.get("compiler", "none"),
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
    }


def directory_name(machine: Mapping[str, Any]) -> str:
    """A name for the machine's results: its CPU, cores and instruction set."""
    text = f"{machine['cpu']} {machine['cores']} cores {machine['instruction_set']}"
    return re.sub(r"[^a-z0-9]+", "-", re.sub(r"\((r|tm)\)", "", text.lower())).strip("-")


def _cpu_model() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return platform.processor() or platform.machine()
    names = re.findall(r"^model name\s*:\s*(.+)$", text, re.M)
    return names[0] if names else platform.machine()
