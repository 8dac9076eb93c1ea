"""Checkpoints: round trips, every kind of damage, kills during saves, locks."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import driftar
from driftar.training.checkpoint import ArchitectureError, CheckpointError, CheckpointStore
from driftar.training.model_file import load_model, save_model
from driftar.training.state_codec import decode_tree, encode_tree
from tests.driftar.training.fake_task import FakeTask, TinyModel, fingerprint, seed_everything

MODEL = "module_model.safetensors"


@pytest.fixture
def store(tmp_path: Path) -> CheckpointStore:
    """Checkpoints after 1 and 2 steps."""
    store = CheckpointStore(tmp_path / "run")
    task = FakeTask()
    for step in range(2):
        task.step(step)
        store.save(task, step + 1, {})
    return store


def flip_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-3] ^= 4
    path.write_bytes(data)


def edit_manifest(directory: Path, change: Callable[[dict], object]) -> None:  # type: ignore[type-arg]
    path = directory / "manifest.json"
    manifest = json.loads(path.read_text())
    change(manifest)
    path.write_text(json.dumps(manifest))


def rename_entry(new_name: str) -> Callable[[Path], None]:
    def damage(directory: Path) -> None:
        edit_manifest(
            directory,
            lambda manifest: manifest["files"].update({new_name: {"size": 1, "sha256": ""}}),
        )

    return damage


def link_out(directory: Path) -> None:
    outside = directory.parent.parent / "outside"
    shutil.move(directory / MODEL, outside)
    (directory / MODEL).symlink_to(outside)


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "flipped bit": (lambda d: flip_bit(d / MODEL), "SHA-256"),
    "flipped bit in the state": (lambda d: flip_bit(d / "state.safetensors"), "SHA-256"),
    "flipped bit in the JSON": (lambda d: flip_bit(d / "state.json"), "SHA-256"),
    **{
        f"cut to {size} bytes": (lambda d, n=size: os.truncate(d / MODEL, n), "the manifest says")
        for size in (0, 4, 8, 60)
    },
    "trailing byte": (lambda d: (d / MODEL).open("ab").write(b"x"), "the manifest says"),
    "missing file": (lambda d: (d / MODEL).unlink(), "cannot be read"),
    "no manifest": (lambda d: (d / "manifest.json").unlink(), "never finished"),
    "empty manifest": (lambda d: (d / "manifest.json").write_text(""), "not valid JSON"),
    "nested manifest": (lambda d: (d / "manifest.json").write_text("[" * 100_000), "JSON"),
    "foreign manifest": (
        lambda d: (d / "manifest.json").write_text('{"a": 1}'),
        "not the manifest",
    ),
    "other kind": (lambda d: edit_manifest(d, lambda m: m.update(kind="model")), "expected a"),
    "future format": (
        lambda d: edit_manifest(d, lambda m: m.update(format_version=9)),
        "version 9",
    ),
    "no files": (lambda d: edit_manifest(d, lambda m: m.update(files={})), "no files"),
    "foreign file": (lambda d: (d / "evil.pt").write_bytes(b"\x80\x04"), "not its own"),
    "name above": (rename_entry("../outside"), "not a plain file name"),
    "absolute name": (rename_entry("/etc/passwd"), "not a plain file name"),
    "dot name": (rename_entry(".."), "not a plain file name"),
    "link to outside": (link_out, "not a regular file"),
}


@pytest.mark.parametrize("kind", DAMAGES)
def test_damage_is_refused_by_path_and_passed_over_by_the_run(
    store: CheckpointStore, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    damage, cause = DAMAGES[kind]
    newest = store.path_of(2)
    damage(newest)
    task = FakeTask()
    before = fingerprint_modules(task)
    with pytest.raises(CheckpointError, match=cause) as refused:
        store.restore(task, newest)
    assert str(newest) in str(refused.value)
    assert fingerprint_modules(task) == before
    restored = store.restore_newest(task)
    assert restored is not None and restored[0] == 1
    assert "damaged checkpoint" in caplog.text
    damage_all(store)
    with pytest.raises(CheckpointError, match="2 checkpoints, none valid"):
        store.restore_newest(FakeTask())


def fingerprint_modules(task: FakeTask) -> list[object]:
    return [entry.tolist() for m in task.modules.values() for entry in m.state_dict().values()]


def damage_all(store: CheckpointStore) -> None:
    for step in store.steps():
        (store.path_of(step) / "manifest.json").write_text("")


def test_an_undamaged_checkpoint_restores_everything(store: CheckpointStore) -> None:
    task = FakeTask()
    for step in range(3):
        task.step(step)
    store.save(task, 3, {"note": 7})
    seed_state = fingerprint(task)
    restored = FakeTask()
    seed_everything(1)
    assert store.restore_newest(restored) == (3, {"note": 7})
    assert fingerprint(restored) == seed_state
    assert (store.directory / "latest").read_text() == "step_00000003\n"
    assert (store.path_of(3) / MODEL).stat().st_mode & 0o044 == 0o044 & ~current_umask()


def current_umask() -> int:
    umask = os.umask(0)
    os.umask(umask)
    return umask


def test_an_empty_directory_has_no_checkpoint(tmp_path: Path) -> None:
    assert CheckpointStore(tmp_path / "none").restore_newest(FakeTask()) is None


def test_only_the_newest_are_kept_and_damaged_later_ones_do_not_count(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, keep=2)
    task = FakeTask()
    for step in (1, 2, 3, 9):
        store.save(task, step, {})
    assert store.steps() == [3, 9]
    (store.path_of(9) / "manifest.json").unlink()
    store.save(task, 4, {})
    assert store.steps() == [3, 4, 9]
    store.save(task, 9, {})
    assert store.restore_newest(FakeTask()) == (9, {})


def test_another_model_is_named_by_its_differences(store: CheckpointStore) -> None:
    with pytest.raises(ArchitectureError, match=r"config.width is 4, expected 6"):
        store.restore_newest(FakeTask(width=6))
    task = FakeTask()
    task.name = "other"
    with pytest.raises(ArchitectureError, match="task 'fake', not to 'other'"):
        store.restore_newest(task)
    task = FakeTask()
    model = task.modules["model"]
    model.register_buffer("seen", torch.zeros(()))
    for number in range(12):
        model.register_buffer(f"new_{number}", torch.zeros(1))
    with pytest.raises(ArchitectureError, match=r"13 differences: model: new_0 is missing.*\.\.\."):
        store.restore_newest(task)
    task = FakeTask()
    task.modules["model"].register_buffer("seen", torch.zeros(()))
    with pytest.raises(
        ArchitectureError, match=r"seen has dtype torch\.int64, expected torch\.float32"
    ):
        store.restore_newest(task)


KILLED_WRITER = """
import sys
from driftar.training.checkpoint import CheckpointStore
from tests.driftar.training.fake_task import FakeTask
store = CheckpointStore(sys.argv[1])
with store.lock():
    task = FakeTask(width=256)
    store.save(task, 1, {})
    print("ready", flush=True)
    for step in range(2, 100_000):
        store.save(task, step, {})
"""


def test_a_kill_at_any_moment_leaves_a_loadable_checkpoint(tmp_path: Path) -> None:
    directory = tmp_path / "run"
    root = Path(driftar.__file__).parents[1]
    with subprocess.Popen(
        [sys.executable, "-c", KILLED_WRITER, str(directory)], stdout=subprocess.PIPE, cwd=root
    ) as writer:
        assert writer.stdout is not None
        assert writer.stdout.readline() == b"ready\n"
        with (
            pytest.raises(CheckpointError, match=f'"pid": {writer.pid}'),
            CheckpointStore(directory).lock(),
        ):
            pass
        time.sleep(0.2)
        writer.kill()
    store = CheckpointStore(directory)
    newest = store.steps()[-1]
    with store.lock():
        store.clean_stale()
        restored = store.restore_newest(FakeTask(width=256))
    assert restored is not None and restored[0] == newest
    assert not [entry for entry in directory.iterdir() if ".tmp-" in entry.name]


@pytest.mark.parametrize("after", range(0, 45, 3))
def test_a_save_that_dies_at_any_call_loses_nothing(
    tmp_path: Path, after: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = CheckpointStore(tmp_path, keep=1)
    task = FakeTask()
    store.save(task, 1, {})
    task.step(0)
    pid = os.fork()
    if pid == 0:
        calls = 0

        def die(real: Callable[..., object]) -> Callable[..., object]:
            def call(*values: object, **named: object) -> object:
                nonlocal calls
                calls += 1
                if calls > after:
                    os._exit(9)
                return real(*values, **named)

            return call

        for name in ("fsync", "replace", "open", "chmod", "mkdir", "rmdir", "unlink"):
            setattr(os, name, die(getattr(os, name)))
        store.save(task, 2, {})
        os._exit(0)
    os.waitpid(pid, 0)
    store.clean_stale()
    assert not [entry for entry in tmp_path.iterdir() if ".tmp-" in entry.name]
    restored = store.restore_newest(FakeTask())
    assert restored is not None and restored[0] in (1, 2)


def test_a_file_in_place_of_the_directory_is_one_clear_error(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("")
    with (
        pytest.raises(CheckpointError, match="cannot be written"),
        CheckpointStore(tmp_path / "run").lock(),
    ):
        pass


@pytest.mark.parametrize(
    "value",
    [{}, {"a": [1, -0.0, float("inf"), None, True, "x"], 3: (torch.ones(2), {"b": ()})}],
)
def test_nested_state_returns_unchanged(value: object) -> None:
    tensors: dict[str, torch.Tensor] = {}
    code = json.loads(json.dumps(encode_tree(value, "state", tensors), allow_nan=False))
    assert repr(decode_tree(code, tensors)) == repr(value)


@pytest.mark.parametrize("value", [object(), {1.5: 2}, {"a": {1, 2}}])
def test_state_that_json_cannot_hold_is_named(value: object) -> None:
    with pytest.raises(TypeError, match="state"):
        encode_tree(value, "state", {})


@pytest.fixture
def tiny_registry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(driftar, "build_model", lambda name, **config: TinyModel(**config))


@pytest.mark.usefixtures("tiny_registry")
class TestModelFile:
    def test_round_trip_and_replacement(self, tmp_path: Path) -> None:
        first, second = TinyModel(3), TinyModel(5)
        save_model(tmp_path / "m", first)
        save_model(tmp_path / "m", second, step=4)
        loaded = load_model(tmp_path / "m")
        assert not loaded.training
        for key, value in second.state_dict().items():
            assert torch.equal(loaded.state_dict()[key], value)
        assert len(list((tmp_path / "m").iterdir())) == 2

    def test_damage_is_refused(self, tmp_path: Path) -> None:
        save_model(tmp_path, TinyModel())
        (weights,) = tmp_path.glob("*.safetensors")
        flip_bit(weights)
        with pytest.raises(CheckpointError, match="SHA-256"):
            load_model(tmp_path)

    def test_weights_of_another_shape_are_listed(self, tmp_path: Path) -> None:
        save_model(tmp_path, TinyModel())
        edit_manifest(tmp_path, lambda manifest: manifest["model"]["config"].update(width=5))
        with pytest.raises(ArchitectureError, match=r"layer.weight has shape \(4, 4\), expected"):
            load_model(tmp_path)

    def test_a_config_that_does_not_build_is_a_checkpoint_error(self, tmp_path: Path) -> None:
        save_model(tmp_path, TinyModel())
        edit_manifest(tmp_path, lambda manifest: manifest["model"]["config"].update(depth=5))
        with pytest.raises(CheckpointError, match="cannot be built"):
            load_model(tmp_path)

    def test_a_foreign_directory_is_refused(self, tmp_path: Path) -> None:
        save_file({"a": torch.ones(1)}, tmp_path / "model.safetensors")
        with pytest.raises(CheckpointError, match="not a checkpoint"):
            load_model(tmp_path)

    def test_a_model_without_config_is_refused(self, tmp_path: Path) -> None:
        with pytest.raises(TypeError, match="name"):
            save_model(tmp_path, torch.nn.Linear(1, 1))
