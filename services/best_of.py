"""The best of several: more choices are made than are told, and the likeliest are told once all have ended.

Choices are compared by the mean log-probability of their tokens, by the model's own distribution and without what a
stop string cut off; so does OpenAI's `best_of` ("the highest log probability per token"). Ones that failed come last,
and of equal ones the first goes first. Choice k is made as a request with `n` makes its choice k: it shares the
prompt's blocks, and draws the random numbers of that seed and k.

Which are the best is a function of the request, so a scheduler that never heard of it makes all of them anew when it is
resumed, and goes on behind what its reader has. Where executors promise no exactness the best may then be another one;
who has a part of the old one is told so.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Final

from common.errors import TicketStale
from common.types import FinishReason
from scheduler.sequence import Sequence as CoreSequence
from services.answer import Answer, Choice, Delta, Finish, PromptLogprobs
from services.engine import ChoiceEvent

_PART: Final = 1024  # tokens in one message: with all that may be told of each, it is well below what a client takes
_NOT_COMPLETE: Final = (FinishReason.ERROR, FinishReason.ABORTED)


class BestOfAnswer(Answer):
    """Reads all that are made, and tells the best of them, first the very best."""

    def __init__(
        self,
        told: Mapping[int, Choice],
        begun: Mapping[int, Sequence[int]],
        *answer: Any,
        **details: Any,
    ) -> None:
        """`told`: those that the reader asks for, by their place among the best, gone through `begun` of theirs.

        The rest is Answer's, for all that are made.
        """
        super().__init__(*answer, **details)
        self._told = told
        self._begun = begun
        self._ended = [choice.finish for choice in told.values() if choice.has_ended]
        self._is_ranked = self._stream is None

    @property
    def is_open(self) -> bool:
        """Some choice that is to be told has not had its Finish."""
        return bool(self._ended) or not self._is_ranked

    async def next(self) -> list[PromptLogprobs | Delta | Finish]:
        """Wait for what comes next; nothing of any choice comes before all have ended."""
        if self._ended:
            return await super().next()
        out: list[PromptLogprobs | Delta | Finish] = []
        if super().is_open:
            out += [event for event in await super().next() if isinstance(event, PromptLogprobs)]
        if not super().is_open:
            self._is_ranked = True
            out += self._best()
        return out

    def _best(self) -> list[PromptLogprobs | Delta | Finish]:
        assert self._stream is not None
        sequences = self._stream.sequences
        ranked = sorted(sequences, key=lambda number: self._worth(number, sequences[number]), reverse=True)
        out: list[PromptLogprobs | Delta | Finish] = []
        for place, number in enumerate(ranked[: self.spec.n]):
            choice = self._told.get(place)
            if choice is not None and not choice.has_ended:
                out += self._tell(place, choice, sequences[number])
        discarded = sum(self._choices[number].num_tokens for number in ranked[self.spec.n :])
        for i, event in enumerate(out):
            if isinstance(event, Finish) and event.choice == 0:
                out[i] = replace(event, usage=replace(event.usage, discarded_tokens=discarded))
        return out

    def _worth(self, number: int, sequence: CoreSequence) -> tuple[bool, float, int]:
        """The greater, the better."""
        choice = self._choices[number]
        num_tokens = choice.num_tokens
        total = sum(told.token if told else -math.inf for told in sequence.logprobs_of(0, num_tokens))
        mean = total / num_tokens if num_tokens and not math.isnan(total) else -math.inf
        return choice.finish.reason not in _NOT_COMPLETE, mean, -number

    def _tell(self, place: int, choice: Choice, sequence: CoreSequence) -> list[Delta | Finish]:
        """All of it that the reader does not have."""
        first, tokens = choice.num_tokens, sequence.tokens[sequence.num_prompt :].tolist()
        if tokens[:first] != list(self._begun.get(place, ())):
            raise TicketStale("the answer did not come out as before, so that it cannot go on; ask anew")
        out: list[Delta | Finish] = []
        expiry_s = self._expiry_s()
        for start in range(first, max(len(tokens), first + 1), _PART):
            part = tokens[start : start + _PART]
            is_last = start + _PART >= len(tokens)
            logprobs = () if self.spec.sampling.logprobs is None else sequence.logprobs_of(start, len(part))
            event = ChoiceEvent(place, part, sequence.reason if is_last else FinishReason.NONE, logprobs)
            delta, finish = choice.take(event, sequence, expiry_s)
            out += [each for each in (delta, finish) if each is not None]
            if finish is not None:
                break
        return out
