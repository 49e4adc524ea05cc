"""Ends a process whose compute thread stands still, so that whoever supervises it starts it anew.

It has a thread of its own, for the event loop may stand still as well. It counts looks instead of reading a clock: a
process that was stopped and goes on has not been looking, and is not ended for that.
"""

from __future__ import annotations

import faulthandler
import logging
import os
import threading
from collections.abc import Callable
from typing import Final, NoReturn

log = logging.getLogger(__name__)

LOOKS: Final = 10
"""So many looks in a row must see the same."""


class Watchdog:
    """Calls `on_stuck`, from its thread, when `progress` stays the same for `patience_s`."""

    def __init__(
        self, progress: Callable[[], object], *, patience_s: float, on_stuck: Callable[[], None] | None = None
    ) -> None:
        self._progress = progress
        self._every_s = patience_s / LOOKS
        self._on_stuck = on_stuck or end_process
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="watchdog", daemon=True)

    def start(self) -> None:
        """Look from now on."""
        self._thread.start()

    def stop(self) -> None:
        """Look no more."""
        self._stop.set()

    def _run(self) -> None:
        seen, same = self._progress(), 0
        while not self._stop.wait(self._every_s):
            now = self._progress()
            same = same + 1 if now == seen else 0
            seen = now
            if same >= LOOKS:
                self._on_stuck()
                return


def end_process(why: str = "the compute thread stands still") -> NoReturn:
    """End at once, with the places where all threads stand: files and lines, and nothing that they hold."""
    log.critical("%s; ending the process", why)
    faulthandler.dump_traceback(all_threads=True)
    logging.shutdown()
    os._exit(os.EX_SOFTWARE)
