"""Metrics as JSON lines, one for each step, without gaps or repetitions across resumptions."""

from __future__ import annotations

import json
import logging
import math
import os
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from driftar.files import write_text

__all__ = ["StepLog", "read_step_log"]

_log = logging.getLogger(__name__)


def read_step_log(path: Path | str) -> list[dict[str, Any]]:
    """The records of a log in step order; a line cut off by a kill is left out.

    Each is ``{"step": int, name: float or None, ...}``, None standing for a non-finite value.
    """
    records: list[dict[str, Any]] = []
    path = Path(path)
    if not path.exists():
        return records
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if isinstance(record, dict) and isinstance(record.get("step"), int):
            records.append(record)
    return records


class StepLog:
    """Appends records to `path`, first dropping those of steps from `next_step` on.

    A full disk must not end a training run: lines that cannot be written are kept in memory, with
    one warning, and written when there is space again.
    """

    def __init__(self, path: Path | str, next_step: int) -> None:
        self.path = Path(path)
        self._pending: list[str] = []
        self._warned = False
        self.path.parent.mkdir(parents=True, exist_ok=True)
        by_step = {record["step"]: record for record in read_step_log(self.path)}
        kept = [by_step[step] for step in sorted(by_step) if step < next_step]
        if len(kept) < next_step:
            _log.warning(
                "%s lacks %d of the %d steps before this one",
                path,
                next_step - len(kept),
                next_step,
            )
        write_text(self.path, "".join(json.dumps(record) + "\n" for record in kept))
        self._stream = self.path.open("ab", buffering=0)

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Add the record of one step; NaN and infinities become null."""
        record: dict[str, Any] = {"step": step}
        for name, value in metrics.items():
            number = float(value)
            record[name] = number if math.isfinite(number) else None
        self._pending.append(json.dumps(record) + "\n")

    def flush(self) -> None:
        """Write the pending records and force them to the disk; called before every checkpoint."""
        if not self._pending:
            return
        # O_APPEND leaves the stream's own position at 0 until the first write: ask the file.
        start = os.fstat(self._stream.fileno()).st_size
        data = "".join(self._pending).encode()
        try:
            while data:
                data = data[self._stream.write(data) :]
            os.fsync(self._stream.fileno())
        except OSError as error:
            os.ftruncate(self._stream.fileno(), start)
            if not self._warned:
                _log.warning("cannot write %s (%s); keeping its lines in memory", self.path, error)
                self._warned = True
            return
        self._pending.clear()

    def __enter__(self) -> StepLog:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.flush()
        self._stream.close()
