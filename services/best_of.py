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

import asyncio
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, Final

from common.errors import TicketStale
from common.types import FinishReason
from scheduler.sequence import Sequence as CoreSequence
from services.answer import Answer, Choice, Delta, Finish, PromptLogprobs
from services.request_stream import ChoiceEvent

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
        self._logprobs = dict.fromkeys(self._choices, 0.0)  # of all tokens so far, by the number of what is made
        self._telling: Iterator[list[PromptLogprobs | Delta | Finish]] | None = None

    @property
    def is_open(self) -> bool:
        """Some choice that is to be told has not had its Finish."""
        return bool(self._ended) or not all(choice.has_ended for choice in self._told.values())

    async def next(self) -> list[PromptLogprobs | Delta | Finish]:
        """Wait for what comes next, which may be nothing to tell: none of a choice is told before all have ended."""
        if self._ended:
            return await super().next()
        if super().is_open:
            events = await super().next()
            for event in events:
                if isinstance(event, Delta):
                    self._logprobs[event.choice] += sum(told.token if told else -math.inf for told in event.logprobs)
            return [event for event in events if isinstance(event, PromptLogprobs)]
        if self._telling is None:
            self._telling = self._tell_best()
        await asyncio.sleep(0)  # a long answer is a few milliseconds of work: others have their turn
        return next(self._telling)

    def _tell_best(self) -> Iterator[list[PromptLogprobs | Delta | Finish]]:
        assert self._stream is not None
        sequences = self._stream.sequences
        ranked = sorted(sequences, key=self._worth, reverse=True)
        discarded = sum(self._choices[number].num_tokens for number in ranked[self.spec.n :])
        for place, number in enumerate(ranked[: self.spec.n]):
            choice = self._told.get(place)
            if choice is not None and not choice.has_ended:
                yield from self._tell(place, choice, sequences[number], 0 if place else discarded)

    def _worth(self, number: int) -> tuple[bool, float, int]:
        """The greater, the better."""
        choice = self._choices[number]
        mean = self._logprobs[number] / choice.num_tokens if choice.num_tokens else -math.inf
        is_good = choice.finish.reason not in _NOT_COMPLETE
        return is_good, -math.inf if math.isnan(mean) else mean, -number

    def _tell(
        self, place: int, choice: Choice, sequence: CoreSequence, discarded: int
    ) -> Iterator[list[PromptLogprobs | Delta | Finish]]:
        """All of it that the reader does not have, in parts."""
        first, tokens = choice.num_tokens, sequence.tokens[sequence.num_prompt :].tolist()
        if tokens[:first] != list(self._begun.get(place, ())):
            raise TicketStale("the answer did not come out as before, so that it cannot go on; ask anew")
        start = first
        while not choice.has_ended:
            stop = start + _PART
            logprobs = () if self.spec.sampling.logprobs is None else sequence.logprobs_of(start, _PART)
            reason = sequence.reason if stop >= len(tokens) else FinishReason.NONE
            event = ChoiceEvent(place, tokens[start:stop], reason, logprobs)
            delta, finish = choice.take(event, sequence, self._expiry_s())
            if finish is not None:
                finish = replace(finish, usage=replace(finish.usage, discarded_tokens=discarded))
            yield [each for each in (delta, finish) if each is not None]
            start = stop
