"""Every tile that the Triton kernels may run in, and how one of them is chosen."""

from __future__ import annotations

import json
import stat
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

import driftar_kernels as dk
from tests.driftar_kernels.test_attention_gradients import check_gradients
from tests.helpers.inputs import AttentionCase
from tests.helpers.targets import BACKEND_DEVICES, require_backend
from tests.helpers.tolerance import assert_bitwise

if "triton" not in BACKEND_DEVICES:
    pytest.skip("TRITON_INTERPRET=1 tests the Triton kernels", allow_module_level=True)

from driftar_kernels.triton import autotune
from driftar_kernels.triton.tuning import ATTENTION, Tile, Tiles

CPU = torch.device("cpu")
TILES = [
    pytest.param(name, size, width, tile, id=f"{name}-{8 * size}bit-{width}-{index}")
    for (name, size), classes in ATTENTION.items()
    for width, tiles in classes.items()
    for index, tile in enumerate(tiles)
]


@pytest.fixture(autouse=True)
def chosen() -> Iterator[None]:
    require_backend("triton")
    with dk.use_backend("triton"):
        yield


@pytest.mark.parametrize(("name", "size", "width", "tile"), TILES)
def test_every_tile_is_right(
    monkeypatch: pytest.MonkeyPatch, name: str, size: int, width: int, tile: Tile
) -> None:
    """Alone, on lengths that no tile divides and that need two of it."""
    monkeypatch.setitem(ATTENTION[name, size], width, (tile,))
    queries = 2 if name == "decode" else tile.rows // 2 + 3
    case = AttentionCase(
        batch=1, heads=2, kv_heads=1, queries=queries, keys=tile.columns + 5, dim=width,
        value_dim=width,
    )  # fmt: skip
    dtype = torch.bfloat16 if size == 2 else torch.float32
    keywords = {"is_causal": True, "query_offset": 5, "enable_gqa": True}
    check_gradients(case.qkv(dtype=dtype), keywords)


@pytest.fixture
def tuned(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[list[int]]:
    """Autotuning as on a GPU, with timings that favour the last tile; yields what was timed."""
    timed: list[int] = []

    def decreasing(call: Callable[[], None]) -> float:
        call()
        timed.append(1)
        return -float(len(timed))

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(autotune, "enabled", lambda device: True)
    monkeypatch.setattr(autotune, "milliseconds", decreasing)
    monkeypatch.setattr(autotune, "_chosen", {})
    yield timed


def test_the_first_call_equals_the_second(tuned: list[int]) -> None:
    """A class is timed before its first result, once for all lengths, and used for both."""
    case = AttentionCase(batch=1, queries=70, keys=90, dim=16)
    leaves = [x.requires_grad_() for x in case.qkv(dtype=torch.bfloat16)]

    def run() -> list[torch.Tensor]:
        result = dk.attention(*leaves, is_causal=True)
        assert result.entropy is not None
        total = result.out.float().sum() + result.entropy.sum()
        return [result.out, result.entropy, *torch.autograd.grad(total, leaves)]

    first = run()
    passes = ("forward", "query_gradient", "key_gradient")
    assert len(tuned) == sum(len(ATTENTION[name, 2][64]) for name in passes)
    assert_bitwise(first, run())
    dk.attention(*AttentionCase(queries=75, keys=80, dim=16).qkv(dtype=torch.bfloat16))
    before = len(tuned)  # not causal: another class
    dk.attention(*AttentionCase(queries=71, keys=99, dim=16).qkv(dtype=torch.bfloat16))
    assert len(tuned) == before


def test_another_process_finds_the_choice(
    tuned: list[int], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    tiles: Tiles = (Tile(16, 16), Tile(32, 16), Tile(64, 16))

    def choose() -> Tile:
        return autotune.choose(CPU, ("a class",), tiles, lambda tile: None)

    def recorded() -> Tile:
        return autotune.choose(CPU, ("a class",), tiles, None)

    assert recorded() == tiles[0]  # nothing can be timed, nothing is kept
    assert choose() == choose() == recorded() == tiles[2]
    assert len(tuned) == 3
    monkeypatch.setattr(autotune, "_chosen", {})  # as a new process starts
    assert choose() == tiles[2] and len(tuned) == 3
    (file,) = (tmp_path / "driftar_kernels").iterdir()  # no temporary file stays behind
    assert stat.S_IMODE(file.parent.stat().st_mode) == 0o700
    assert list(json.loads(file.read_text()).values()) == [2]
    for damage in ("", "[]", '{"other": 1}', file.read_text().replace("2", "7")):
        file.write_text(damage)
        monkeypatch.setattr(autotune, "_chosen", {})
        tuned.clear()
        assert choose() == tiles[2] and len(tuned) == 3


def test_a_cache_that_cannot_be_written_is_no_error(
    tuned: list[int], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    tiles: Tiles = (Tile(16, 16), Tile(32, 16))
    assert autotune.choose(CPU, ("a class",), tiles, lambda tile: None) == tiles[1]


def test_off_unless_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """And always off on the interpreter, whatever the environment says."""
    for value in ("", "0", "1"):
        monkeypatch.setenv(autotune.ENVIRONMENT_VARIABLE, value)
        assert not autotune.enabled(CPU)
    ran: list[Tile] = []
    tiles: Tiles = (Tile(16, 16), Tile(32, 16))
    for recorded in (False, True):
        autotune.run(CPU, ("a class",), tiles, ran.append, recorded)
    assert ran == [tiles[0]] * 2


def test_kernels_that_work_in_place_are_never_timed(
    monkeypatch: pytest.MonkeyPatch, tuned: list[int]
) -> None:
    """Gradients of "map" add up in memory, commit_path moves rows of its arguments."""
    names: list[str] = []
    run = autotune.run

    def spy(device: torch.device, shape_class: tuple[str, ...], *rest: object) -> None:
        names.append(shape_class[0])
        run(device, shape_class, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(autotune, "run", spy)
    leaves = [x.requires_grad_() for x in AttentionCase(queries=20).qkv()]
    result = dk.attention(*leaves, entropy="map")
    assert result.entropy is not None
    result.entropy.sum().backward()
    verdict = dk.walk_tree(dk.DraftTree([-1, 0]), torch.ones(1, 2, dtype=torch.bool))
    cache = torch.randn(1, 1, 4, 2)
    dk.commit_path(cache, cache.clone(), torch.tensor([1]), verdict)
    assert names == ["forward"]
