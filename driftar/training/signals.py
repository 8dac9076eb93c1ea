"""Stopping on SIGTERM, SIGINT and SIGUSR1: finish the step, save, exit 128 + signal number."""

from __future__ import annotations

import logging
import os
import signal
import threading
from types import FrameType, TracebackType
from typing import Any

__all__ = ["StopRequested", "StopSignals"]

_log = logging.getLogger(__name__)
_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


class StopRequested(BaseException):
    """Raised by `StopSignals.poll` (and by the loop, after it saved) when a signal asked to stop.

    Like KeyboardInterrupt it is no Exception: a broad ``except Exception`` must not swallow it.
    """

    def __init__(self, signum: int) -> None:
        super().__init__(f"stopped by {signal.Signals(signum).name}")
        self.signum = signum

    @property
    def exit_code(self) -> int:
        """128 + signal number: 143 for SIGTERM, 130 for SIGINT, as a shell reports them."""
        return 128 + self.signum


class StopSignals:
    """Context manager that turns the first stop signal into a flag; a second one exits at once.

    Handlers can only be installed in the main thread; elsewhere the flag simply stays unset. The
    previous handlers come back on exit. Instances may be nested (the innermost receives).
    """

    def __init__(self) -> None:
        self._signum: int | None = None
        self._previous: dict[signal.Signals, Any] = {}

    @property
    def requested(self) -> int | None:
        """Number of the signal that arrived, None while there was none."""
        return self._signum

    def poll(self) -> None:
        """Raise `StopRequested` if a signal has arrived; cheap, to be called in every loop."""
        if self._signum is not None:
            raise StopRequested(self._signum)

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            for number in _SIGNALS:
                self._previous[number] = signal.signal(number, self._receive)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for number, handler in self._previous.items():
            # None: the handler was not installed from Python and cannot be put back.
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)
        self._previous.clear()

    def _receive(self, signum: int, frame: FrameType | None) -> None:
        if self._signum is not None:
            # No clean-up on purpose: whoever signals twice wants the process gone now.
            os._exit(128 + signum)
        self._signum = signum
        _log.warning(
            "%s: finishing the current step and saving; a second signal exits at once",
            signal.Signals(signum).name,
        )
