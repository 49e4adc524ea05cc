"""How long the parts of a start take, for the log."""

from __future__ import annotations

import time


class PartClock:
    """Seconds that parts of a start take, in words."""

    def __init__(self) -> None:
        self._began_s = self._last_s = time.perf_counter()
        self._parts: list[str] = []

    def tell(self, part: str) -> None:
        """What was done since the part before."""
        now_s = time.perf_counter()
        self._parts.append(f"{part} {now_s - self._last_s:.1f}")
        self._last_s = now_s

    def __str__(self) -> str:
        return f"{self._last_s - self._began_s:.1f} s: {', '.join(self._parts)}"
