"""One writer for a directory: a lock file that names its holder and dies with it."""

from __future__ import annotations

import fcntl
import json
import os
import socket
from pathlib import Path
from types import TracebackType

from driftar.training.manifest import CheckpointError

__all__ = ["DirectoryLock"]


class DirectoryLock:
    """Exclusive lock on `directory` through ``<directory>/.lock`` (created, holds pid and host).

    The lock is the kernel's (flock), so that a killed process never leaves a stale one; the text
    only tells who holds it. Entering also proves that the directory can be written, before any
    work is done. Raises CheckpointError when another process holds it or it cannot be written.
    """

    def __init__(self, directory: Path) -> None:
        self.path = directory / ".lock"
        self._descriptor: int | None = None

    def __enter__(self) -> DirectoryLock:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            # O_NOFOLLOW: a link planted here must not make us truncate a file elsewhere.
            descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644)
        except OSError as error:
            raise CheckpointError(
                self.path.parent, f"cannot be written: {error.strerror}"
            ) from error
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            holder = os.pread(descriptor, 4096, 0).decode("utf-8", "replace")
            os.close(descriptor)
            raise CheckpointError(
                self.path.parent, f"another process is writing here: {holder.strip() or 'unknown'}"
            ) from error
        except OSError as error:
            os.close(descriptor)
            raise CheckpointError(
                self.path.parent, f"cannot be locked on this file system: {error.strerror}"
            ) from error
        holder = json.dumps({"pid": os.getpid(), "host": socket.gethostname()})
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, holder.encode(), 0)
        self._descriptor = descriptor
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._descriptor is not None:
            # The file stays: removing it would let two processes lock two files of that name.
            os.close(self._descriptor)
            self._descriptor = None
