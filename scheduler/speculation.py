"""How many tokens are guessed ahead of each sequence in a step. Pure: numbers in, numbers out.

A draft is a token more to compute, and is kept only if all before it are: with a chance of `rate` for each, that at
place j (from 1) is kept with rate ** j. A step takes as long as its tokens and `overhead` more would: while it has few,
its weights are what it waits for. What it brings for its time is num_tokens / (overhead + num_tokens), and a draft
that is likelier to be kept than that makes it more. The likeliest come first, whoever's they are, until the next
one would make it less: a lone sequence whose drafts are kept has many, a crowd few, a step with much of a prompt none.

The idea of speculation is of Leviathan et al. (ICML 2023) and Chen et al. (2023); that acceptance and load together
should say how much of it there is, by what comes out in the time, of Liu et al. (SmartSpec, 2024).
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple

WORTH: Final = 0.3
"""What it costs to wait for a row that has drafts is not in that: one is kept as often at least."""

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


def share(
    candidates: Sequence[Candidate], *, num_tokens: int, overhead: int, room: int, draft_cost: float = 1.0
) -> list[int]:
    """Drafts for each candidate, `room` at most in all, beside the `num_tokens` of the step without them.

    `overhead`: tokens whose computing takes as long as what a step takes in any case. `draft_cost`: as
    many for one draft, with what it takes to guess it. Of equals the first goes first.
    """
    drafts = [0] * len(candidates)
    kept, computed = float(num_tokens), float(overhead + num_tokens)
    best = [(-each.chance, i) for i, each in enumerate(candidates) if each.most > 0]
    heapq.heapify(best)
    while best and room > 0:
        chance, i = -best[0][0], best[0][1]
        if chance < WORTH or chance * computed <= kept * draft_cost:
            break
        drafts[i] += 1
        room -= 1
        kept += chance
        computed += draft_cost
        if drafts[i] < candidates[i].most:
            heapq.heapreplace(best, (-chance * candidates[i].chance, i))
        else:
            heapq.heappop(best)
    return drafts
