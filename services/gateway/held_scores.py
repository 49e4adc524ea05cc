"""The memory that log-probabilities have until they are told: a bound for all answers together, and for each."""

from __future__ import annotations

from typing import Final

from common.errors import InvalidRequest, Overloaded

_FREE_BYTES: Final = 1 << 16
"""The beginning of each answer's, which the bound of all together leaves out: the number of requests bounds it."""

_RETRY_S: Final = 5.0  # until an answer of that size is told


class HeldScores:
    """What all answers hold may be `max_bytes`, and one answer's half of that."""

    def __init__(self, *, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.num_bytes = 0  # that are held, without the beginning of each answer's

    def share(self, field: str) -> Share:
        """For one answer, which holds nothing yet. `field` asked for it."""
        return Share(self, field)


class Share:
    """What one answer holds."""

    def __init__(self, held: HeldScores, field: str) -> None:
        self._held = held
        self._field = field
        self._num_bytes = 0
        self._counted = 0

    def take(self, num_bytes: int) -> None:
        """It holds so many bytes more, or fewer.

        Raises InvalidRequest where that is more than one answer may hold, Overloaded where others hold it now. A small
        answer is never refused for what others hold.
        """
        self._num_bytes += num_bytes
        self._count(max(0, self._num_bytes - _FREE_BYTES))
        most = self._held.max_bytes // 2
        if num_bytes > 0 and self._num_bytes > most:
            raise InvalidRequest(
                self._field,
                f"the log-probabilities of one answer may take {most} bytes here until they are told: ask in several "
                f"requests, for fewer beside each token, or for a stream",
            )
        if num_bytes > 0 and self._counted and self._held.num_bytes > self._held.max_bytes:
            raise Overloaded(
                f"the log-probabilities of all answers take the {self._held.max_bytes} bytes that they have here until "
                f"they are told: come back later, ask in several requests, or for a stream",
                _RETRY_S,
            )

    def give_back(self) -> None:
        """It was told, or nobody waits for it any more."""
        self._num_bytes = 0
        self._count(0)

    def _count(self, counted: int) -> None:
        self._held.num_bytes += counted - self._counted
        self._counted = counted
