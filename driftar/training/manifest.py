"""The manifest of a checkpoint: what its files are, by size and SHA-256, and what wrote them.

safetensors notices a broken header but not a flipped bit in the data; the manifest does. It is
written last, so that a directory without one was never finished.
"""

from __future__ import annotations

import json
import platform
import stat
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from driftar.files import fsync_file, sha256_file, write_json
from driftar_kernels import __version__

__all__ = ["MANIFEST_NAME", "CheckpointError", "read_manifest", "write_manifest"]

MANIFEST_NAME = "manifest.json"
_FORMAT = "driftar-checkpoint"
_FORMAT_VERSION = 1
# A manifest is a few kilobytes; the cap keeps a foreign file from filling the memory.
_MAX_MANIFEST_BYTES = 16 << 20


class CheckpointError(Exception):
    """A checkpoint that cannot be written, read or trusted: where (`path`) and why (`cause`)."""

    def __init__(self, path: Path | str, cause: str) -> None:
        super().__init__(f"{path}: {cause}")
        self.path = Path(path)
        self.cause = cause


def write_manifest(
    directory: Path, kind: str, file_names: Iterable[str], content: dict[str, Any]
) -> None:
    """Hash, and force to the disk, the named files of `directory`; then write its manifest.

    content: JSON-able entries beside the reserved ``format``, ``kind``, ``versions``, ``files``.
    """
    files = {}
    for name in sorted(file_names):
        path = directory / name
        fsync_file(path)
        files[name] = {"size": path.stat().st_size, "sha256": sha256_file(path)}
    write_json(
        directory / MANIFEST_NAME,
        {
            "format": _FORMAT,
            "format_version": _FORMAT_VERSION,
            "kind": kind,
            "versions": {
                "driftar": __version__,
                "torch": torch.__version__,
                "python": platform.python_version(),
            },
            **content,
            "files": files,
        },
    )


def read_manifest(directory: Path, kind: str, *, follow_links: bool = False) -> dict[str, Any]:
    """Read a manifest and verify every file it lists: plain name, regular file, size, SHA-256.

    follow_links: allow links, of which the Hugging Face cache is made. Raises CheckpointError if
    the manifest is missing, foreign or of another kind, if a name could leave the directory, or if
    a file is missing, a link, truncated or altered.
    """
    path = directory / MANIFEST_NAME
    manifest = _parse(path)
    if manifest.get("format") != _FORMAT:
        raise CheckpointError(path, "is not the manifest of a driftar checkpoint")
    if manifest.get("format_version") != _FORMAT_VERSION:
        raise CheckpointError(
            path,
            f"has format version {manifest.get('format_version')!r}, "
            f"this driftar reads {_FORMAT_VERSION}",
        )
    if manifest.get("kind") != kind:
        raise CheckpointError(path, f"describes a {manifest.get('kind')!r}, expected a {kind!r}")
    files = manifest.get("files")
    if not isinstance(files, dict) or not files:
        raise CheckpointError(path, "lists no files")
    for name, entry in files.items():
        _verify(directory, name, entry, follow_links)
    return manifest


def _parse(path: Path) -> dict[str, Any]:
    try:
        if path.stat().st_size > _MAX_MANIFEST_BYTES:
            raise CheckpointError(path, "is far too large for a manifest")
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(
            path, "is missing: not a checkpoint, or one never finished"
        ) from error
    except OSError as error:
        raise CheckpointError(path, f"cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(path, f"is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(path, "is not a JSON object")
    return value


def _verify(directory: Path, name: str, entry: Any, follow_links: bool) -> None:
    if name != Path(name).name or name in ("", ".", "..") or "\\" in name or "\0" in name:
        raise CheckpointError(directory, f"manifest names {name!r}, which is not a plain file name")
    path = directory / name
    if (
        not isinstance(entry, dict)
        or not isinstance(entry.get("size"), int)
        or not isinstance(entry.get("sha256"), str)
    ):
        raise CheckpointError(directory, f"manifest entry of {name!r} lacks its size or SHA-256")
    try:
        status = path.stat() if follow_links else path.lstat()
        if not stat.S_ISREG(status.st_mode):
            raise CheckpointError(path, "is not a regular file")
        if status.st_size != entry["size"]:
            raise CheckpointError(
                path, f"has {status.st_size} bytes, the manifest says {entry['size']}"
            )
        if sha256_file(path) != entry["sha256"]:
            raise CheckpointError(path, "was altered: its SHA-256 differs from the manifest's")
    except OSError as error:
        raise CheckpointError(path, f"cannot be read: {error.strerror}") from error
