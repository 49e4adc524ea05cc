"""How long an executor's steps take, by its own clock: what a step that does not end is judged by."""

from __future__ import annotations

from collections import deque
from typing import Final

ENOUGH: Final = 8
"""Steps to have seen before anything is said: the first ones compile, allocate and fill caches."""

RECENT: Final = 32
"""Steps of each size that are remembered."""


class Pace:
    """The recent steps of one session, by the power of two that their tokens come to.

    A step is judged only by steps that were at least as large: what a larger one takes cannot be known from smaller
    ones, and an executor that is given up for nothing costs more than one that is given up late.
    """

    def __init__(self) -> None:
        self._recent: dict[int, deque[int]] = {}

    def add(self, num_tokens: int, compute_ns: int) -> None:
        """One answered step."""
        size = num_tokens.bit_length()
        steps = self._recent.get(size)
        if steps is None:
            steps = self._recent[size] = deque(maxlen=RECENT)
        steps.append(compute_ns)

    def shortest_ns(self, num_tokens: int) -> int:
        """The shortest of the recent steps of this size; 0 while there were too few to say."""
        steps = self._recent.get(num_tokens.bit_length(), ())
        return min(steps) if len(steps) >= ENOUGH else 0

    def longest_ns(self, num_tokens: int) -> int | None:
        """The longest of the recent steps of this size or more; None while there were too few to say."""
        size = num_tokens.bit_length()
        seen = [ns for other, steps in self._recent.items() if other >= size for ns in steps]
        return max(seen) if len(seen) >= ENOUGH else None
