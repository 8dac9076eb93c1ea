"""Checkpoints that survive a kill at any moment and refuse to load anything altered.

A training checkpoint is a directory ``step_<N>``: one safetensors file for each module, one for the
other tensors, ``state.json`` for the rest and, written last, the manifest with sizes and SHA-256.
It is written as ``step_<N>.tmp-<pid>``, forced to the disk and renamed; ``latest`` then names it.
"""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch import Tensor, nn

from driftar.files import fsync_directory, write_json, write_text
from driftar.training.lock import DirectoryLock
from driftar.training.manifest import CheckpointError, read_manifest, write_manifest
from driftar.training.state_codec import (
    capture_random_state,
    decode_tree,
    encode_tree,
    read_tensors,
    restore_random_state,
    tensor_differences,
    write_tensors,
)
from driftar.training.task import TrainingTask

__all__ = ["ArchitectureError", "CheckpointError", "CheckpointStore"]

_log = logging.getLogger(__name__)
_STEP_NAME = re.compile(r"step_(\d{8,})")
_TEMPORARY_NAME = re.compile(r"step_\d{8,}\.(tmp|old)-\d+|\.latest\.tmp-\d+")
_STATE_TENSORS = "state.safetensors"
_STATE_JSON = "state.json"
_KIND = "training"
_SHOWN_DIFFERENCES = 10


class ArchitectureError(CheckpointError):
    """An intact checkpoint of another task or model; an older one of the run would not help."""


class CheckpointStore:
    """The checkpoints of one training run in one directory; the newest `keep` are kept."""

    def __init__(self, directory: Path | str, keep: int = 3) -> None:
        if keep < 1:
            raise ValueError(f"keep must be at least 1, got {keep}")
        self.directory = Path(directory)
        self.keep = keep

    def lock(self) -> DirectoryLock:
        """The lock that a writer holds, so that two trainers cannot share the directory."""
        return DirectoryLock(self.directory)

    def path_of(self, step: int) -> Path:
        """Where the checkpoint of `step` (number of finished steps) lies or would lie."""
        return self.directory / f"step_{step:08d}"

    def steps(self) -> list[int]:
        """The steps that have a checkpoint directory, valid or not, in ascending order."""
        if not self.directory.is_dir():
            return []
        found = (_STEP_NAME.fullmatch(entry.name) for entry in self.directory.iterdir())
        return sorted(int(match.group(1)) for match in found if match is not None)

    def clean_stale(self) -> None:
        """Remove what killed saves left behind; only the holder of the lock may call it."""
        if not self.directory.is_dir():
            return
        for entry in self.directory.iterdir():
            if _TEMPORARY_NAME.fullmatch(entry.name) and not entry.is_symlink():
                _log.info("removing the unfinished %s", entry)
                if entry.is_dir():
                    shutil.rmtree(entry, ignore_errors=True)
                else:
                    entry.unlink(missing_ok=True)

    def save(self, task: TrainingTask, step: int, progress: Mapping[str, Any]) -> Path:
        """Write the complete state of `task` after `step` steps and return its path.

        progress: JSON-able state of the loop. Raises CheckpointError if it cannot be written (the
        cause tells the free space); every earlier checkpoint is then intact.
        """
        final = self.path_of(step)
        temporary = final.with_name(f"{final.name}.tmp-{os.getpid()}")
        retired = final.with_name(f"{final.name}.old-{os.getpid()}")
        try:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
            _write_state(temporary, task, step, progress)
            fsync_directory(temporary)
            if final.exists():
                # Only after falling back from a damaged checkpoint of this step.
                os.replace(final, retired)
            os.replace(temporary, final)
            fsync_directory(self.directory)
            write_text(self.directory / "latest", final.name + "\n")
        except (OSError, SafetensorError) as error:
            free = _free_bytes(self.directory)
            shutil.rmtree(temporary, ignore_errors=True)
            raise CheckpointError(
                final, f"cannot be written: {error} (needs {_state_bytes(task)} bytes, {free} free)"
            ) from error
        shutil.rmtree(retired, ignore_errors=True)
        self._prune(step)
        return final

    def restore_newest(self, task: TrainingTask) -> tuple[int, dict[str, Any]] | None:
        """Load the newest valid checkpoint into `task`; None if the run has none at all.

        Damaged ones are passed over with a warning. Raises ArchitectureError for a checkpoint of
        another model and CheckpointError when there are checkpoints but none is valid.
        """
        causes = []
        for step in reversed(self.steps()):
            try:
                return self.restore(task, self.path_of(step))
            except ArchitectureError:
                raise
            except CheckpointError as error:
                _log.warning("passing over a damaged checkpoint: %s", error)
                causes.append(str(error))
        if causes:
            raise CheckpointError(
                self.directory, f"has {len(causes)} checkpoints, none valid; newest: {causes[0]}"
            )
        return None

    def restore(self, task: TrainingTask, path: Path | str) -> tuple[int, dict[str, Any]]:
        """Load one checkpoint into `task` and return its step and the loop's progress.

        Raises CheckpointError if it is damaged and ArchitectureError, listing what differs, if it
        belongs to another task or model; `task` is changed only after everything was checked.
        """
        path = Path(path)
        manifest = read_manifest(path, _KIND)
        unlisted = {entry.name for entry in path.iterdir() if not entry.name.startswith(".")}
        unlisted -= {*manifest["files"], "manifest.json"}
        if unlisted:
            raise CheckpointError(path, f"holds files that are not its own: {sorted(unlisted)}")
        _compare_architecture(path, manifest.get("architecture"), _architecture(task))
        stored = {name: read_tensors(path / _module_file(name)) for name in task.modules}
        _compare_tensors(path, task, stored)
        try:
            plain = json.loads((path / _STATE_JSON).read_text(encoding="utf-8"))
            state = decode_tree(plain["state"], read_tensors(path / _STATE_TENSORS))
            step, progress = int(plain["step"]), dict(plain["progress"])
            _apply(task, stored, state)
        except (KeyError, TypeError, ValueError, RuntimeError, OSError) as error:
            raise CheckpointError(path, f"its state does not fit: {error}") from error
        return step, progress

    def _prune(self, newest: int) -> None:
        # Steps beyond `newest` are damaged ones that were passed over: they must not count as kept.
        for step in [step for step in self.steps() if step <= newest][: -self.keep]:
            path = self.path_of(step)
            retired = path.with_name(f"{path.name}.old-{os.getpid()}")
            try:
                os.replace(path, retired)
                shutil.rmtree(retired)
            except OSError as error:
                _log.warning("cannot remove the old checkpoint %s: %s", path, error)


def _module_file(name: str) -> str:
    return f"module_{name}.safetensors"


def _write_state(
    directory: Path, task: TrainingTask, step: int, progress: Mapping[str, Any]
) -> None:
    for name, module in task.modules.items():
        write_tensors(directory / _module_file(name), module.state_dict())
    tensors: dict[str, Tensor] = {}
    state = {
        "random": capture_random_state(),
        "generators": {name: entry.get_state() for name, entry in task.generators.items()},
        "optimizers": {name: entry.state_dict() for name, entry in task.optimizers.items()},
        "extra": task.extra_state(),
    }
    code = encode_tree(state, "state", tensors)
    write_tensors(directory / _STATE_TENSORS, tensors)
    write_json(directory / _STATE_JSON, {"step": step, "progress": dict(progress), "state": code})
    names = [_STATE_TENSORS, _STATE_JSON, *(_module_file(name) for name in task.modules)]
    content = {"step": step, "architecture": _architecture(task)}
    write_manifest(directory, _KIND, names, content)


def _apply(
    task: TrainingTask, stored: Mapping[str, Mapping[str, Tensor]], state: Mapping[str, Any]
) -> None:
    for kind, expected in (("generators", task.generators), ("optimizers", task.optimizers)):
        if set(state[kind]) != set(expected):
            raise ValueError(f"has {kind} {sorted(state[kind])}, expected {sorted(expected)}")
    for name, module in task.modules.items():
        module.load_state_dict(stored[name], strict=True)
    for name, optimizer in task.optimizers.items():
        optimizer.load_state_dict(state["optimizers"][name])
    for name, generator in task.generators.items():
        generator.set_state(state["generators"][name])
    task.load_extra_state(state["extra"])
    restore_random_state(state["random"])


def _architecture(task: TrainingTask) -> dict[str, Any]:
    modules = {name: describe_module(module) for name, module in task.modules.items()}
    return {"task": task.name, "modules": modules}


def describe_module(module: nn.Module) -> dict[str, Any]:
    """A module's class and, where it has them, its registered `name` and JSON-able `config`."""
    name, config = getattr(module, "name", None), getattr(module, "config", None)
    return {
        "class": type(module).__name__,
        "name": name if isinstance(name, str) else None,
        # Through JSON, so that it compares equal to what a manifest gives back.
        "config": json.loads(json.dumps(config)) if isinstance(config, dict) else None,
    }


def _compare_architecture(path: Path, found: Any, expected: dict[str, Any]) -> None:
    if not isinstance(found, dict) or not isinstance(found.get("modules"), dict):
        raise CheckpointError(path, "its manifest does not describe a task")
    if found.get("task") != expected["task"]:
        raise ArchitectureError(
            path, f"belongs to the task {found.get('task')!r}, not to {expected['task']!r}"
        )
    lines = []
    for name in sorted({*found["modules"], *expected["modules"]}):
        have, want = found["modules"].get(name), expected["modules"].get(name)
        if have is None or want is None:
            lines.append(f"module {name} is {'missing' if have is None else 'unexpected'}")
            continue
        for key in ("class", "name"):
            if have.get(key) != want[key]:
                lines.append(f"{name}.{key} is {have.get(key)!r}, expected {want[key]!r}")
        old, new = have.get("config") or {}, want["config"] or {}
        lines += [
            f"{name}.config.{key} is {old.get(key)!r}, expected {new.get(key)!r}"
            for key in sorted({*old, *new})
            if old.get(key) != new.get(key)
        ]
    raise_differences(path, lines)


def _compare_tensors(
    path: Path, task: TrainingTask, stored: Mapping[str, Mapping[str, Tensor]]
) -> None:
    lines: list[str] = []
    for name, module in task.modules.items():
        differences = tensor_differences(module.state_dict(), stored[name])
        lines += [f"{name}: {line}" for line in differences]
    raise_differences(path, lines)


def raise_differences(path: Path, lines: list[str]) -> None:
    """Raise ArchitectureError with the first ten of `lines` and their count, if there are any."""
    if lines:
        shown = "; ".join(lines[:_SHOWN_DIFFERENCES])
        more = " ..." if len(lines) > _SHOWN_DIFFERENCES else ""
        raise ArchitectureError(
            path, f"is of another model, {len(lines)} differences: {shown}{more}"
        )


def _state_bytes(task: TrainingTask) -> int:
    tensors = [entry for module in task.modules.values() for entry in module.state_dict().values()]
    for optimizer in task.optimizers.values():
        slots = optimizer.state_dict()["state"].values()
        tensors += [entry for slot in slots for entry in slot.values() if isinstance(entry, Tensor)]
    return sum(entry.numel() * entry.element_size() for entry in tensors)


def _free_bytes(directory: Path) -> int:
    try:
        return shutil.disk_usage(directory).free
    except OSError:
        return 0
