"""How many tokens are guessed ahead of each sequence in a step. Pure: numbers in, numbers out.

A draft is a token more to compute, and is kept only if all before it are: with a chance of `rate` for each, that at
place j (from 1) is kept with rate ** j. Drafts are cheap while a step waits for its weights, and cost what any other
token costs from `draft_step_tokens` on, which the executor says. So the drafts that are likeliest to be kept get what a
step has left below that, whoever's they are; where a step is full of sequences, or of prompts, nothing is guessed.
The idea of speculation is of Leviathan et al. (ICML 2023) and Chen et al. (2023); that its length should follow from
both acceptance and load is of Liu et al. (SmartSpec, 2024).
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple

WORTH: Final = 0.3
"""A draft that is kept less often costs more than it wins, also where it is cheap."""

TRY_EVERY: Final = 8
"""Steps: in each of these, sequences whose drafts were not kept try one again, all at once."""

_FIRST_RATE: Final = 0.6
_LEAST_RATE: Final = 0.2  # one that is kept in such a step brings a sequence back to where drafts are worth while
_LEARNED: Final = 0.25  # share of the last draft in the rate


@dataclass(slots=True)
class Acceptance:
    """What became of a sequence's drafts so far. It decides how soon its tokens come, and never which."""

    rate: float = _FIRST_RATE  # how often a draft is kept when those before it were, lately
    drafted: int = 0
    accepted: int = 0

    def learn(self, drafted: int, accepted: int) -> None:
        """A row carried so many drafts, and so many were kept. To have no guess is no better than a wrong one."""
        self.drafted += drafted
        self.accepted += accepted
        for _ in range(accepted):
            self.rate += _LEARNED * (1 - self.rate)
        if accepted < drafted or not drafted:
            self.rate = max(_LEAST_RATE, self.rate * (1 - _LEARNED))

    def chance(self, step: int) -> float:
        """That a draft is kept in this step of its executor; 0 where none is worth trying."""
        if self.rate >= WORTH:
            return self.rate
        return WORTH if step % TRY_EVERY == 0 else 0.0


class Candidate(NamedTuple):
    """A row that may carry drafts."""

    chance: float  # that one is kept, when those before it are
    most: int  # drafts that it may carry


def share(candidates: Sequence[Candidate], room: int) -> list[int]:
    """Drafts for each of the candidates, `room` in all: those that are likeliest to be kept, the first among equals."""
    drafts = [0] * len(candidates)
    best = [(-each.chance, i) for i, each in enumerate(candidates) if each.most > 0 and each.chance >= WORTH]
    heapq.heapify(best)
    while best and room > 0:
        chance, i = heapq.heappop(best)
        drafts[i] += 1
        room -= 1
        chance *= candidates[i].chance
        if drafts[i] < candidates[i].most and -chance >= WORTH:
            heapq.heappush(best, (chance, i))
    return drafts
