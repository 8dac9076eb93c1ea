from __future__ import annotations

import argparse
import json
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from driftar.models.weights import WeightsError, read_weights

STATE = {"a.weight": torch.arange(6.0).reshape(2, 3), "b": torch.ones(4, dtype=torch.bfloat16)}


def assert_state(found: dict[str, Tensor]) -> None:
    assert found.keys() == STATE.keys()
    for key, value in STATE.items():
        assert torch.equal(found[key], value)


def shard(folder: Path) -> Path:
    save_file({"a.weight": STATE["a.weight"]}, folder / "model-1.safetensors")
    save_file({"b": STATE["b"]}, folder / "model-2.safetensors")
    index = folder / "model.safetensors.index.json"
    files = {"a.weight": "model-1.safetensors", "b": "model-2.safetensors"}
    index.write_text(json.dumps({"metadata": {}, "weight_map": files}))
    return index


def test_every_kind_of_file_is_read(tmp_path: Path) -> None:
    torch.save(STATE, tmp_path / "plain.pth")
    save_file(STATE, tmp_path / "plain.safetensors")
    (tmp_path / "shards").mkdir()
    index = shard(tmp_path / "shards")
    for path in (tmp_path / "plain.pth", str(tmp_path / "plain.safetensors"), index, index.parent):
        assert_state(read_weights(path))
    assert_state(read_weights(STATE))


def test_averaged_weights_come_first(tmp_path: Path) -> None:
    other = {key: value + 1 for key, value in STATE.items()}
    training = {
        "model": other,
        "model_ema": STATE,
        "optimizer": {"state": {0: {"step": 3.0}}, "param_groups": [{"lr": 1e-4}]},
        "epoch": 7,
        "args": argparse.Namespace(model="mar_base", lr=1e-4, resume=None),
    }
    torch.save(training, tmp_path / "checkpoint-last.pth")
    assert_state(read_weights(tmp_path))
    assert_state(read_weights(training))
    assert_state(read_weights({"model": STATE, "model_ema": {}}))
    assert_state(read_weights({"state_dict": STATE}))


class Malicious:
    def __init__(self, sentinel: Path) -> None:
        self.sentinel = sentinel

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Path]]:
        return Path.touch, (self.sentinel,)


@pytest.mark.parametrize("name", ["model.pth", "model.safetensors", "model.bin"])
def test_pickles_are_never_run(tmp_path: Path, name: str) -> None:
    sentinel = tmp_path / "sentinel"
    path = tmp_path / name
    torch.save({"a": Malicious(sentinel)}, path)
    with pytest.raises(WeightsError, match=name):
        read_weights(path)
    path.write_bytes(pickle.dumps(Malicious(sentinel)))
    with pytest.raises(WeightsError, match=name):
        read_weights(path)
    assert not sentinel.exists()


@pytest.mark.parametrize("name", ["model.pth", "model.safetensors"])
def test_truncated_and_overwritten_files_are_one_clear_error(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    torch.save(STATE, path) if path.suffix == ".pth" else save_file(STATE, path)
    content = path.read_bytes()
    for length in (0, 1, 8, len(content) // 2, len(content) - 1):
        path.write_bytes(content[:length])
        with pytest.raises(WeightsError, match=name):
            read_weights(path)
    path.write_bytes(b"\xff" * len(content))
    with pytest.raises(WeightsError, match=name):
        read_weights(path)


def test_headers_that_promise_too_much_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes((1 << 62).to_bytes(8, "little") + b"{}")
    with pytest.raises(WeightsError, match=r"model\.safetensors"):
        read_weights(path)
    entry = {"dtype": "F32", "shape": [1 << 40], "data_offsets": [0, 1 << 42]}
    header = json.dumps({"a": entry}).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header)
    with pytest.raises(WeightsError, match=r"model\.safetensors"):
        read_weights(path)


def test_compressed_archives_are_refused(tmp_path: Path) -> None:
    torch.save({"a": torch.zeros(1 << 16)}, tmp_path / "plain.pth")
    bomb = tmp_path / "bomb.pth"
    with zipfile.ZipFile(tmp_path / "plain.pth") as source, zipfile.ZipFile(bomb, "w") as target:
        for member in source.namelist():
            target.writestr(member, source.read(member), zipfile.ZIP_DEFLATED)
    with pytest.raises(WeightsError, match="compressed"):
        read_weights(bomb)


@pytest.mark.parametrize("name", ["../outside.safetensors", "/etc/passwd", "", "..", 3])
def test_an_index_cannot_leave_its_folder(tmp_path: Path, name: Any) -> None:
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(WeightsError, match="plain file name"):
        read_weights(index)


def test_shards_must_hold_what_the_index_says(tmp_path: Path) -> None:
    index = shard(tmp_path)
    save_file({"c": STATE["b"]}, tmp_path / "model-2.safetensors")
    with pytest.raises(WeightsError, match=r"model-2.*b, c"):
        read_weights(index)
    (tmp_path / "model-2.safetensors").unlink()
    with pytest.raises(WeightsError, match=r"cannot be read|not a readable"):
        read_weights(index)


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"weight_map": []}', "[" * 100_000, "\ud800"])
def test_a_broken_index_is_named(tmp_path: Path, content: str) -> None:
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(content, errors="surrogatepass")
    with pytest.raises(WeightsError, match="index"):
        read_weights(index)


def test_places_without_weights_are_named(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="holds no weights"):
        read_weights(tmp_path)
    with pytest.raises(WeightsError, match=r"absent\.pth: cannot be read"):
        read_weights(tmp_path / "absent.pth")
    (tmp_path / "weights.txt").touch()
    with pytest.raises(WeightsError, match="no known kind"):
        read_weights(tmp_path / "weights.txt")
    for name in ("a.pth", "b.pth"):
        torch.save(STATE, tmp_path / name)
    with pytest.raises(WeightsError, match=r"a\.pth, b\.pth"):
        read_weights(tmp_path)
    torch.save([STATE], tmp_path / "a.pth")
    with pytest.raises(WeightsError, match="holds a list"):
        read_weights(tmp_path / "a.pth")


def test_foreign_entries_are_all_named() -> None:
    with pytest.raises(WeightsError, match=r"'a' \(int\), 3 \(Tensor\), 'c' \(Tensor\)"):
        read_weights({"a": 1, 3: STATE["b"], "c": torch.empty(2, device="meta"), "d": STATE["b"]})
