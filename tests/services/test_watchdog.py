"""A thread that stands still is found by looking, and not by the clock."""

from __future__ import annotations

import itertools
import subprocess
import sys
import threading

from services.watchdog import LOOKS, Watchdog
from tests.services.served import HANG_S


def test_what_stands_still_is_found() -> None:
    found = threading.Event()
    Watchdog(lambda: 7, patience_s=0.01, on_stuck=found.set).start()
    assert found.wait(HANG_S)


def test_what_moves_is_left_alone_however_slowly() -> None:
    looked, found = threading.Event(), threading.Event()
    looks = itertools.count()

    def progress() -> int:
        look = next(looks)
        if look == 5 * LOOKS:
            looked.set()
        return look // (LOOKS - 1)

    watchdog = Watchdog(progress, patience_s=0.01, on_stuck=found.set)
    watchdog.start()
    assert looked.wait(HANG_S)
    watchdog.stop()
    assert not found.is_set()


def test_the_process_ends_with_the_places_where_its_threads_stand() -> None:
    code = "from services.watchdog import Watchdog; import threading; Watchdog(lambda: 1, patience_s=0.01).start(); "
    code += "threading.Event().wait(60)"
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=2 * HANG_S, check=False)
    assert process.returncode == 70
    assert b"most recent call first" in process.stderr
