"""The API keys that the scheduler took of late, by their SHA-256: who shows one is no stranger while it is gone."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable
from typing import Final

KNOWN_S: Final = 3600.0
_MOST: Final = 1024


class KnownKeys:
    """Each is known for `for_s` after it was last taken; of more than `most` the one that was so longest ago is not."""

    def __init__(
        self, *, for_s: float = KNOWN_S, most: int = _MOST, clock_s: Callable[[], float] = time.monotonic
    ) -> None:
        self._for_s = for_s
        self._most = most
        self._clock_s = clock_s
        self._taken_s: dict[bytes, float] = {}  # longest ago first

    def __contains__(self, key: str) -> bool:
        taken_s = self._taken_s.get(_digest(key))
        return taken_s is not None and self._clock_s() < taken_s + self._for_s

    def taken(self, key: str) -> None:
        """The scheduler answered to it."""
        digest = _digest(key)
        self._taken_s.pop(digest, None)
        self._taken_s[digest] = self._clock_s()
        if len(self._taken_s) > self._most:
            del self._taken_s[next(iter(self._taken_s))]

    def refused(self, key: str) -> None:
        """The scheduler does not take it, or no longer."""
        self._taken_s.pop(_digest(key), None)


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode()).digest()
