"""What an executor did under its name, beyond one session: how often it died young, and sent rows without a token.

Time is an argument, as everywhere here. An executor with neither has no entry, so names that come and go cost nothing.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import Final

from common.types import SequenceId

MAX_NAMES: Final = 1024
"""Executors that are remembered; the one that was entered first is forgotten first."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Patience:
    """What an executor may do before it is left without work, and for how long it is."""

    young_ns: int = 5_000_000_000  # who dies at a lesser age than this dies young
    first_hold_ns: int = 500_000_000  # without work after the second such death; doubled with each
    longest_hold_ns: int = 10_000_000_000
    max_unusable: int = 3  # requests with an unusable row, within the window
    window_ns: int = 60_000_000_000
    quarantine_ns: int = 60_000_000_000  # without new sequences after so many


@dataclass(slots=True)
class Reputation:
    """One name."""

    young_deaths: int = 0  # in a row
    unusable: deque[tuple[int, SequenceId]] = field(default_factory=deque[tuple[int, SequenceId]])  # when, request
    quarantined_until_ns: int = 0

    @property
    def is_spotless(self) -> bool:
        """Nothing to remember."""
        return not self.young_deaths and not self.unusable

    def died(self, age_ns: int, patience: Patience) -> None:
        """A session ended uncleanly after `age_ns`. Once may happen to anybody: it takes two to wait."""
        self.young_deaths = self.young_deaths + 1 if age_ns < patience.young_ns else 0

    def hold_ns(self, patience: Patience) -> int:
        """How long its next session gets no work."""
        if self.young_deaths < 2:
            return 0
        doublings = min(self.young_deaths - 2, 32)
        return min(patience.longest_hold_ns, patience.first_hold_ns << doublings)

    def sent_unusable(self, request: SequenceId, now_ns: int, patience: Patience) -> bool:
        """A row of the request came back unusable. Returns whether the executor is quarantined for that, from now on.

        A request counts once, however many choices it has.
        """
        while self.unusable and self.unusable[0][0] <= now_ns - patience.window_ns:
            self.unusable.popleft()
        if any(request == other for _, other in self.unusable):
            return False
        self.unusable.append((now_ns, request))
        if len(self.unusable) < patience.max_unusable or now_ns < self.quarantined_until_ns:
            return False
        self.quarantined_until_ns = now_ns + patience.quarantine_ns
        return True

    def excuse(self, request: SequenceId, patience: Patience) -> None:
        """The request is unusable everywhere: it was not the executor."""
        others = deque(entry for entry in self.unusable if entry[1] != request)
        if len(others) < min(len(self.unusable), patience.max_unusable):
            self.quarantined_until_ns = 0
        self.unusable = others


class Reputations:
    """All names. Bounded."""

    def __init__(self) -> None:
        self._by_name: dict[str, Reputation] = {}

    def of(self, name: str) -> Reputation:
        """What is known of the name; a spotless one when nothing is. Whoever changes that calls `keep`."""
        return self._by_name.get(name) or Reputation()

    def keep(self, name: str, reputation: Reputation) -> None:
        """Remember, or forget what is spotless."""
        if reputation.is_spotless:
            self._by_name.pop(name, None)
            return
        self._by_name[name] = reputation
        if len(self._by_name) > MAX_NAMES:
            del self._by_name[next(iter(self._by_name))]

    def excuse(self, request: SequenceId, patience: Patience) -> None:
        """The request's rows are unusable everywhere: strike them from every name."""
        for reputation in self._by_name.values():
            reputation.excuse(request, patience)
