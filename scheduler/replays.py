"""The sequences that compute again what a lost executor had.

They go first, but not alone: `policy.decide` gives them a share of each step while others want the rest.
"""

from __future__ import annotations

from collections.abc import Iterable

from scheduler import policy
from scheduler.sequence import Sequence
from scheduler.suspicion import runs_alone


class Replays:
    """Those that are not through yet, in the order of their loss. Empty almost always, and then it costs nothing."""

    def __init__(self) -> None:
        self._sequences: dict[Sequence, None] = {}

    def __len__(self) -> int:
        return len(self._sequences)

    def __contains__(self, sequence: Sequence) -> bool:
        return sequence in self._sequences

    def add(self, sequence: Sequence) -> None:
        """What it had is lost: it computes again all that is known of it."""
        sequence.replay_until = len(sequence.tokens)
        self._sequences[sequence] = None

    def forget(self, sequence: Sequence) -> None:
        """It has ended."""
        self._sequences.pop(sequence, None)

    def among(self, running: Iterable[Sequence], rows: Iterable[policy.Running]) -> set[int]:
        """Which of the rows are replays. Those that have caught up are none any more, and are forgotten."""
        found: set[int] = set()
        for i, (sequence, row) in enumerate(zip(running, rows, strict=True)):
            if sequence in self._sequences:
                if row.num_planned < sequence.replay_until:
                    found.add(i)
                else:
                    del self._sequences[sequence]
        return found

    def num_tokens_waiting(self, at_most: int) -> int:
        """Tokens of replays that no executor holds yet; `at_most` is as good as more."""
        tokens = 0
        for sequence in self._sequences:
            if sequence.session is None and not runs_alone(sequence.request):
                tokens += len(sequence.tokens)
                if tokens >= at_most:
                    break
        return tokens
