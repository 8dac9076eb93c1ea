"""Stop signals: a flag first, an immediate exit second."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading

import pytest

from driftar.training.signals import StopRequested, StopSignals

TWICE = """
import os, signal, time
from driftar.training.signals import StopSignals
with StopSignals() as stop:
    os.kill(os.getpid(), signal.SIGTERM)
    print("still here", stop.requested, flush=True)
    os.kill(os.getpid(), signal.SIGINT)
    print("never printed", flush=True)
"""


def test_the_first_signal_is_a_flag() -> None:
    previous = signal.getsignal(signal.SIGTERM)
    with StopSignals() as stop:
        stop.poll()
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.requested == signal.SIGTERM
        with pytest.raises(StopRequested, match="SIGTERM") as raised:
            stop.poll()
    assert raised.value.exit_code == 143
    assert not isinstance(raised.value, Exception)
    assert signal.getsignal(signal.SIGTERM) is previous


def test_the_second_signal_exits_at_once() -> None:
    done = subprocess.run([sys.executable, "-c", TWICE], capture_output=True, text=True, timeout=60)
    assert done.stdout == "still here 15\n"
    assert done.returncode == 130


def test_outside_the_main_thread_nothing_is_installed() -> None:
    seen = []

    def enter() -> None:
        with StopSignals() as stop:
            seen.append(stop.requested)

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert seen == [None]
