"""What a few files hold, read again when they change: keys and certificates are replaced without a restart."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final, Generic, TypeVar

from common.errors import PagewireError

log = logging.getLogger(__name__)

_T = TypeVar("_T")

_Stamp = tuple[tuple[int, ...] | None, ...]

_LOOK_EVERY_S: Final = 1.0


class WatchedFiles(Generic[_T]):
    """The value that `read` makes of the files at `paths`. Any thread may ask for it.

    `read` raises a PagewireError for what it cannot use. At first that reaches whoever makes this; later it is logged,
    and the value from before stays in force until the files change again.
    """

    def __init__(
        self,
        paths: Sequence[Path],
        read: Callable[[], _T],
        *,
        look_every_s: float | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._paths = tuple(paths)
        self._read = read
        self._look_every_s = _LOOK_EVERY_S if look_every_s is None else look_every_s
        self._clock = clock
        self._lock = threading.Lock()
        self._seen = self._stamp()  # taken before the files are read: what changes meanwhile is read again
        self._value = read()
        self._looked_s = clock()

    def current(self) -> _T:
        """The value. Looks at most once a second whether the files have changed."""
        with self._lock:
            now = self._clock()
            if now - self._looked_s >= self._look_every_s:
                self._looked_s = now
                self._look()
            return self._value

    def _look(self) -> None:
        stamp = self._stamp()
        if stamp == self._seen:
            return
        self._seen = stamp
        for path in filter(_is_unlinked, self._paths):
            log.error(
                "%s: outside of this container another file has taken its place, which a restart would let it see. "
                "Write into the file instead of replacing it: cat NEW > FILE",
                path,
            )
        try:
            self._value = self._read()
        except PagewireError as error:
            log.error("%s; what was read before stays in force", error)
        else:
            log.info("read anew: %s", ", ".join(map(str, self._paths)))

    def _stamp(self) -> _Stamp:
        return tuple(_stamp_of(path) for path in self._paths)


def _stamp_of(path: Path) -> tuple[int, ...] | None:
    """What tells one content of a file from another. Links are followed: secrets are often swapped behind one."""
    try:
        stat = path.stat()
    except OSError:
        return None
    return stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns


def _is_unlinked(path: Path) -> bool:
    """Whether a file is found by its path and lies in no folder: one that is mounted alone stays that one."""
    try:
        return path.stat().st_nlink == 0
    except OSError:
        return False
