"""Beam search, the choosing in it: which continuations go on, which are answers, and when it is over. Pure.

The rules are those of Transformers' `generate(num_beams=...)` (generation/utils.py, _beam_search), and so is the
arithmetic: float32, rounded after each operation. Of all continuations of all beams, the `num_kept` best are looked at.
Those that end the answer are answers where they are among the `width` best; of the others the `width` best go on. An
answer's score is the sum of its tokens' log-probabilities over length ** length_penalty, its length being that of the
output with the token that ended it. It is over when

- `early_stopping` is True: as soon as there are `width` answers;
- False: when there are, and the best beam, as if it ended now, is not better than the worst of them;
- "never": when no beam could become better, if it got all of max_tokens (for a length_penalty above 0) or ended now;
- in any case at max_tokens, where whatever goes on ends.

One thing is different. Where the controls of a request leave fewer continuations than are looked at, Transformers goes
on with copies of beams whose score is -1e9, and may return them; here there are fewer beams then.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Sequence
from ctypes import c_float
from typing import NamedTuple

from common.sampling import BeamParams


class Continuation(NamedTuple):
    """A beam and the token that comes next."""

    parent: int  # which beam
    token: int
    score: float  # sum of the log-probabilities of all output tokens


class Hypothesis(NamedTuple):
    """An answer that was found."""

    score: float  # see above
    tokens: array[int]  # of the output, the token that ended it among them


Ends = Callable[[int, int], bool]
"""Whether a token ends the answer: (which beam, token)."""


def num_kept(width: int, num_ends: int) -> int:
    """Continuations that are looked at, where `num_ends` tokens end an answer: `width` of them always go on."""
    return max(2, 1 + num_ends) * width


class BeamSearch:
    """One search, from the prompt on."""

    def __init__(self, params: BeamParams, *, num_ends: int, max_tokens: int) -> None:
        self.answers: list[Hypothesis] = []  # the best so far, the best first; at most `width`
        self.num_kept = num_kept(params.width, num_ends)
        self._params = params
        self._max_tokens = max_tokens
        self._scores = [0.0]  # of the beams: in the beginning there is one, without a token
        self._num_tokens = 0  # of each beam's output

    def choose(
        self, ranked: Sequence[Sequence[tuple[int, float]]], outputs: Sequence[array[int]], ends: Ends
    ) -> list[Continuation]:
        """Let the search go on by a token. Returns the new beams, the best first; none when it is over.

        For each beam, in the order in which they were returned, `ranked` has its likeliest continuations (token,
        log-probability), at least `num_kept` where there are so many, and `outputs` its tokens.
        """
        width, penalty = self._params.width, self._params.length_penalty
        assert len(ranked) == len(outputs) == len(self._scores), f"{len(ranked)} of {len(self._scores)} beams"
        self._num_tokens += 1
        is_last = self._num_tokens >= self._max_tokens
        best = [
            Continuation(parent, token, _float32(score + logprob))
            for parent, (score, row) in enumerate(zip(self._scores, ranked, strict=True))
            for token, logprob in row
        ]
        best.sort(key=_worse)  # stable: of equals the first beam's first
        going_on: list[Continuation] = []
        over = _float32(self._num_tokens**penalty)
        for place, each in enumerate(best[: self.num_kept]):
            if place >= width == len(going_on):
                break  # nothing behind is an answer, or goes on
            if not (is_last or ends(each.parent, each.token)):
                going_on.append(each)
            elif place < width:
                tokens = outputs[each.parent][:]
                tokens.append(each.token)
                self.answers.append(Hypothesis(_float32(each.score / over), tokens))
        self.answers.sort(key=_worse)
        del self.answers[width:]
        if is_last or self._is_over(going_on):
            return []
        self._scores = [each.score for each in going_on]
        return going_on

    def _is_over(self, going_on: list[Continuation]) -> bool:
        width, length_penalty, early_stopping = self._params
        if not going_on:
            return True
        if len(self.answers) < width:
            return False
        if early_stopping is True:
            return True
        length = self._max_tokens if early_stopping == "never" and length_penalty > 0 else self._num_tokens
        return _float32(going_on[0].score / _float32(length**length_penalty)) <= self.answers[-1].score


def _worse(each: Continuation | Hypothesis) -> float:
    return -each.score


def _float32(number: float) -> float:
    return c_float(number).value
