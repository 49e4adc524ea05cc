"""Guess that what was said before is said again: the tokens that followed the last few where they stood before.

Prompt lookup (Saxena, 2023): answers that copy from their prompt, as edits, summaries and code do, are guessed for
next to nothing. What is searched is the sequence alone, its prompt and its answer, in a window of its newest tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import numpy as np
from numpy.typing import NDArray

from common.types import BlockId
from executor.resident import Resident, Rows

WINDOW: Final = 16_384
"""Tokens that are searched: the newest ones. A pass over so many takes some ten microseconds."""

_LONGEST: Final = 8  # tokens that are compared: who agrees in so many is as good a guess as any
_SHORTEST: Final = 2  # tokens that must agree: single ones agree everywhere


class NgramProposer:
    """Looks the newest tokens up among the older ones. Holds nothing between steps."""

    def __init__(self, held: Resident, *, window: int = WINDOW) -> None:
        self._held = held
        self._window = window

    def begin_session(self) -> None:
        """Nothing is held."""

    def begin_step(self, rows: Rows, copies: Sequence[tuple[BlockId, BlockId]]) -> None:
        """Nothing is held."""

    def propose(self, slots: NDArray[np.int64], most: NDArray[np.int64]) -> list[list[int]]:
        """What followed the newest tokens of each sequence where they stood before; empty where they never did."""
        guesses: list[list[int]] = []
        for slot, wanted in zip(slots.tolist(), most.tolist(), strict=True):
            known = int(self._held.num_tokens[slot])
            guesses.append(lookup(self._held.token_ids[slot, max(0, known - self._window) : known], wanted))
        return guesses


def lookup(tokens: NDArray[np.int32], most: int) -> list[int]:
    """Return up to `most` tokens that followed the longest end of `tokens` (K,) that stands in it once more.

    Of equally long ones the newest is taken. What follows it may reach the end of `tokens`: then it goes on from its
    own beginning, as something that repeats itself does.
    """
    ends = np.flatnonzero(tokens[:-1] == tokens[-1])  # of what agrees, in one token so far
    length = 1
    while length < _LONGEST and len(ends):
        deeper = ends[ends >= length]
        longer = deeper[tokens[deeper - length] == tokens[-1 - length]]
        if not len(longer):
            break
        ends, length = longer, length + 1
    if length < _SHORTEST or not len(ends):
        return []
    behind = tokens[int(ends[-1]) + 1 :]
    return np.resize(behind[:most], most).tolist() if len(behind) < most else behind[:most].tolist()
