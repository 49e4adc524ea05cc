"""How an executor spent its time, by its own clock: computing, or idle although there was work."""

from __future__ import annotations

from collections import deque
from typing import Final

RECENT_STEPS: Final = 256
"""The steps that `idle_ratio` looks at: seconds to half a minute of work."""


class Occupancy:
    """Sums over the answered steps of one session.

    Between two steps an executor is idle. That counts only where a sequence of the later step was there already when
    the earlier one was answered: an executor without requests does not wait for its scheduler.
    """

    def __init__(self) -> None:
        self.num_steps = 0
        self.compute_ns = 0
        self.idle_ns = 0
        self._recent: deque[tuple[int, int]] = deque(maxlen=RECENT_STEPS)

    def add(self, *, compute_ns: int, idle_ns: int) -> None:
        """One answered step, and the idle time before it that counts."""
        self.num_steps += 1
        self.compute_ns += compute_ns
        self.idle_ns += idle_ns
        self._recent.append((compute_ns, idle_ns))

    @property
    def idle_ratio(self) -> float:
        """Share of idle time in all of it over the recent steps; 0 before the first."""
        compute_ns = sum(compute for compute, _ in self._recent)
        idle_ns = sum(idle for _, idle in self._recent)
        return idle_ns / (compute_ns + idle_ns) if idle_ns else 0.0
