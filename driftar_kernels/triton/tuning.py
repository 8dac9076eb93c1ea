"""The one table of tile sizes, warps and pipeline stages.

Choices are made by class of shape: nothing is compiled per sequence length. The first tile of a
class is its default, so that results do not vary between runs; autotune.py times the others too,
where it is asked to. Registers and shared memory of every tile are reported by
``python -m driftar_kernels.triton.resources``.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch

from .._library import TRITON_INTERPRETED as INTERPRETED  # whose programs run one by one, slowly


@dataclass(frozen=True)
class Tile:
    """Shape of a program's tile and how it is run.

    Attributes:
        rows, columns: elements of the tile.
        warps: of 32 threads.
        stages: depth of the software pipeline of global loads.
    """

    rows: int
    columns: int
    warps: int = 4
    stages: int = 1


ELEMENTWISE = Tile(16, 64)
TREE_COLUMNS = 16  # columns of draft and target that a tree's program reads at a time
COMMIT_COLUMNS = 128
MERGE_ROWS = 16
MAP = Tile(32, 32, 8)  # its program keeps one number per row and head
MAP_GRADIENT = Tile(32, 32, 8)  # one stage: what a step adds to, the next one reads
FEW_ROWS = 64  # up to here keys are split over programs
FEWEST_ROWS = 16  # of a matrix unit's tile
INNER_CHUNK = 32
# (pass, bytes of an element) -> {largest padded head dimension: tiles of queries x keys}. The tiles
# bound the registers of the accumulators: queries x Dv forward, queries x D for the queries'
# gradient, keys x (D + Dv) for the keys'. Alternatives to the default load less per product (larger
# tiles) or leave more programs to hide latency (fewer warps, smaller tiles). "decode" is the
# forward pass of few rows, where the bandwidth of the keys is all.
Tiles = tuple[Tile, ...]
ATTENTION: dict[tuple[str, int], dict[int, Tiles]] = {
    ("forward", 2): {
        64: (Tile(128, 64, 8, 2), Tile(64, 64, 4, 3)),
        128: (Tile(128, 32, 8, 3), Tile(64, 64, 8, 2)),
        256: (Tile(64, 32, 8, 1),),
    },
    ("decode", 2): {
        64: (Tile(16, 64, 4, 2), Tile(16, 128, 4, 2)),
        128: (Tile(16, 32, 4, 3), Tile(16, 64, 4, 2)),
        256: (Tile(16, 32, 4, 1), Tile(16, 32, 4, 2)),
    },
    ("query_gradient", 2): {
        64: (Tile(64, 64, 8, 2), Tile(128, 32, 8, 2)),
        128: (Tile(64, 64, 8, 2), Tile(64, 32, 8, 2)),
        256: (Tile(32, 32, 8, 1),),
    },
    ("key_gradient", 2): {
        64: (Tile(32, 64, 8, 2), Tile(64, 64, 8, 2)),
        128: (Tile(32, 32, 4, 2), Tile(64, 64, 8, 2)),
        256: (Tile(32, 32, 8, 1),),
    },
    ("forward", 4): {
        64: (Tile(32, 32, 8, 1),),
        128: (Tile(16, 32, 8, 1),),
        256: (Tile(16, 16, 8, 1),),
    },
    ("decode", 4): {
        64: (Tile(16, 32, 4, 1),),
        128: (Tile(16, 32, 4, 1),),
        256: (Tile(16, 16, 4, 1),),
    },
    ("query_gradient", 4): {
        64: (Tile(32, 32, 8, 1),),
        128: (Tile(32, 32, 8, 1),),
        256: (Tile(16, 16, 8, 1),),
    },
    ("key_gradient", 4): {
        64: (Tile(32, 32, 8, 1),),
        128: (Tile(16, 32, 8, 1),),
        256: (Tile(16, 16, 8, 1),),
    },
}
# Instead of those of fp32, where these would spill once matrix units multiply.
TF32: dict[tuple[str, int], Tiles] = {
    ("forward", 256): (Tile(32, 16, 8, 1),),
    ("key_gradient", 128): (Tile(32, 32, 8, 1),),
}


def attention_pass(name: str, rows: int) -> str:
    """The pass over ``rows`` packed rows: "decode" for "forward" where they are few."""
    return "decode" if name == "forward" and rows <= FEWEST_ROWS else name


def attention_tiles(
    name: str, dtype: torch.dtype, precision: str, widest: int, crowded: bool
) -> Tiles:
    """Tiles that a pass may run in, the default first; ``widest`` of D and Dv.

    ``crowded`` passes hold a tile of a mask or a tree as well.
    """
    classes = ATTENTION[name, dtype.itemsize]
    largest = next((c for c in classes if widest <= c), None)
    if largest is None:
        raise NotImplementedError(
            f"attention: head dimensions up to {max(classes)} run on the triton backend, "
            f"got {widest}"
        )
    tiles = classes[largest]
    if precision == "tf32":
        tiles = TF32.get((name, largest), tiles)
    if crowded and name != "decode":
        warps = 4 if widest <= 64 else tiles[0].warps
        most = 64 if name == "forward" else 32
        return (Tile(min(tiles[0].rows, most), min(tiles[0].columns, 32), warps, 1),)
    return tiles


def inner_chunk(dtype: torch.dtype, precision: str, widest: int) -> int:
    """Features that an inner product takes at a time; 0: all at once.

    Without matrix units (fp32 in full precision) a thread holds whole rows of both operands, and
    those of wide heads do not fit into registers.
    """
    exact = dtype == torch.float32 and precision == "ieee"
    return INNER_CHUNK if exact and widest > 64 else 0


@cache
def _processors(device: torch.device) -> int:
    if device.type != "cuda":
        return 8
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def key_splits(
    device: torch.device, programs: int, rows: int, keys: int, columns: int
) -> tuple[int, int]:
    """How many programs share the keys of a row block, and how many keys each takes."""
    blocks = -(-keys // columns)
    wanted = 1 if rows > FEW_ROWS else 2 * _processors(device) // max(programs, 1)
    splits = max(1, min(wanted, blocks // 2, 65535))  # two blocks at least, to hide latency
    per_split = -(-blocks // splits)
    return -(-blocks // per_split) if blocks else 1, per_split * columns


def tree_warps(lanes: int) -> int:
    """One lane a node, and enough warps to stream draft and target."""
    return max(4, min(lanes // 32, 16))


def chain_tile(batch: int, width: int) -> Tile:
    """fp64 and rejection loops: few chains a program, so that the slowest keeps few others."""
    if INTERPRETED:  # whose time is that of its programs, whatever they hold
        rows, columns = (4096, 16) if width <= 64 else (256, 256)
        return Tile(min(rows, 1 << (batch - 1).bit_length()), columns)
    return Tile(32, 16) if width <= 16 else Tile(4, 128)


# The drifting field. 3xTF32 keeps fp32's accuracy on matrix units, which the distances need.
DRIFT_PRECISION = "tf32x3"
DRIFT_CENTRE = Tile(32, 64)
DRIFT_DISTANCE = Tile(32, 64, 8, 2)
DRIFT_NORMALISER = Tile(64, 64, 8)
DRIFT_FORCE = Tile(32, 32, 4, 2)
DRIFT_FEATURES = 64  # features that a product takes at a time
PANEL_ELEMENTS = 1 << 24  # distances that a large problem holds at a time
