"""Chooses among the tiles of a shape class by timing them, where ``DRIFTAR_KERNELS_AUTOTUNE=1``.

Off by default: what is fastest varies between machines, and with it the last bits of results. A
class is timed once, before its first result is computed, and its choice is kept in
``$XDG_CACHE_HOME/driftar_kernels`` (``~/.cache``), so that later calls and processes run the same
tile. Only kernels that can run twice on the same memory are timed, none that works in place.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Hashable
from functools import cache, partial
from pathlib import Path

import torch
import triton

from .tuning import INTERPRETED, Tile, Tiles

ENVIRONMENT_VARIABLE = "DRIFTAR_KERNELS_AUTOTUNE"

Launch = Callable[[Tile], None]

_chosen: dict[tuple[torch.device, Hashable, Tiles], Tile] = {}


def enabled(device: torch.device) -> bool:
    """Whether tiles are timed: asked for, on a GPU, and not while a CUDA graph is captured."""
    if os.environ.get(ENVIRONMENT_VARIABLE) != "1" or INTERPRETED or device.type != "cuda":
        return False
    return not torch.cuda.is_current_stream_capturing()


def run(
    device: torch.device, shape_class: Hashable, tiles: Tiles, launch: Launch, recorded: bool
) -> None:
    """Launch in the chosen one of ``tiles``; ``launch`` must not read what it writes. Where it is
    ``recorded`` instead of run, nothing can be timed: the choice made before holds, or the default.
    """
    tile = tiles[0]
    if len(tiles) > 1 and enabled(device):
        tile = choose(device, shape_class, tiles, None if recorded else launch)
    launch(tile)


def choose(
    device: torch.device, shape_class: Hashable, tiles: Tiles, launch: Launch | None
) -> Tile:
    """The fastest of ``tiles``: as chosen before, by this process or another, or timed now, where
    ``launch`` is given; otherwise the default."""
    key = device, shape_class, tiles
    if key not in _chosen:
        store = Store(cache_folder(), fingerprint(device))
        label = repr((shape_class, tiles))
        index = store.load().get(label)
        if not isinstance(index, int) or not 0 <= index < len(tiles):
            if launch is None:
                return tiles[0]
            durations = [milliseconds(partial(launch, tile)) for tile in tiles]
            index = durations.index(min(durations))
            store.add(label, index)
        _chosen[key] = tiles[index]
    return _chosen[key]


def milliseconds(call: Callable[[], None]) -> float:
    """Median duration on the device; infinite where it does not fit there."""
    try:
        return float(triton.testing.do_bench(call, warmup=10, rep=40, return_mode="median"))
    except triton.runtime.errors.OutOfResources:
        return float("inf")


def cache_folder() -> Path:
    """Where choices are kept."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "driftar_kernels"


@cache
def fingerprint(device: torch.device) -> str:
    """Names the device, the compiler and the kernels that choices are valid for."""
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(path.read_bytes())
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    for text in (name, triton.__version__, torch.__version__):
        digest.update(text.encode() + b"\0")
    return digest.hexdigest()[:16]


class Store:
    """Choices on disk: a JSON object in a folder that only its owner may use.

    Files are replaced in one step, so readers never see a part of one; of two writers at once the
    last wins, and what the other one added is timed again.
    """

    def __init__(self, folder: Path, name: str) -> None:
        self.folder = folder
        self.path = folder / f"autotune-{name}.json"

    def load(self) -> dict[str, int]:
        """All choices; none where the file is missing, damaged or somebody else's."""
        try:
            if self.path.stat().st_uid != os.getuid():
                return {}
            found = json.loads(self.path.read_text())
        except (OSError, ValueError):
            return {}
        return found if isinstance(found, dict) else {}

    def add(self, label: str, index: int) -> None:
        """Keep a choice; a folder that cannot be written keeps none."""
        choices = {**self.load(), label: index}
        try:
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            if self.folder.stat().st_uid != os.getuid():
                return
            with tempfile.NamedTemporaryFile("w", dir=self.folder, delete=False) as part:
                json.dump(choices, part, indent=1, sort_keys=True)
            os.replace(part.name, self.path)
        except OSError:
            return
