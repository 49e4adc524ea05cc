"""What one request receives, as its reader takes it: events of new tokens, in turn with other readers, and one error.

It holds no token: those are the core's. When a reader is woken is the engine's to say (services/engine.py).
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, NamedTuple

from common.errors import PagewireError
from common.step import Logprobs
from common.types import FinishReason, SequenceId
from scheduler.pins import Pin
from scheduler.scheduler import Scheduler
from scheduler.sequence import Sequence as CoreSequence
from scheduler.sequence import Status

if TYPE_CHECKING:
    from services.engine import Engine


class ChoiceEvent(NamedTuple):
    """New tokens of one choice, and why it ended, if it did."""

    choice: int
    tokens: list[int]
    reason: FinishReason
    logprobs: Sequence[Logprobs | None] = ()  # one a token, where the request asks for them


class RequestStream:
    """What one request receives: its sequences' committed tokens, from where the reader is.

    The tokens themselves stay where they are, so one that is not read costs nothing more, and a second reader can begin
    anywhere. `taken` says, by choice, how many tokens the reader has already.
    """

    def __init__(
        self, engine: Engine, sequences: Sequence[CoreSequence], taken: Mapping[int, int] = MappingProxyType({})
    ) -> None:
        self.sequences = {s.choice: s for s in sequences}
        self.giving_up: asyncio.TimerHandle | None = None  # runs while no executor could hold the request
        self.deadline: asyncio.TimerHandle | None = None
        self.pin: Pin | None = None  # what of its prompt was pinned for it
        self.is_waited_for = False  # its reader has taken all there was
        self.has_begun = any(taken.values())  # its reader has taken something
        self._engine = engine
        self._choice_of = {s.id: s.choice for s in sequences}
        self._taken = {choice: taken.get(choice, 0) for choice in self.sequences}
        self._news: dict[int, None] = {}  # choices with something to take, in the order it came
        self._open = set(self.sequences)  # those whose end the reader has not taken
        self._error: PagewireError | None = None
        self._superseded = False
        self._called: asyncio.Future[None] | None = None  # its reader waits for this
        for choice, sequence in self.sequences.items():
            if sequence.reason or sequence.num_output > self._taken[choice]:
                self._news[choice] = None

    @property
    def is_open(self) -> bool:
        """There is, or will be, something to take."""
        return bool(self._open)

    @property
    def error(self) -> PagewireError | None:
        """What the whole request failed with, if it did."""
        return self._error

    def sequence(self, id: SequenceId) -> CoreSequence:
        """The sequence of that id."""
        return self.sequences[self._choice_of[id]]

    def is_stuck(self, scheduler: Scheduler) -> bool:
        """One of its sequences waits, and no executor that is there could ever hold it."""
        return any(s.status is Status.WAITING and not scheduler.fits_somewhere(s) for s in self.sequences.values())

    def note(self, id: SequenceId) -> None:
        """The sequence has a new token, or has ended. The reader hears of it with the next `wake`."""
        self._news[self._choice_of[id]] = None

    def wake(self) -> None:
        """Let the reader take what is there, if it has not yet."""
        if self._news:
            self._call()

    def fail(self, error: PagewireError) -> None:
        """The whole request ends with an error, once what is there was taken."""
        self._error = error
        timeline = next(iter(self.sequences.values())).request.timeline
        if timeline is not None and not self._superseded:
            timeline.error = type(error).__name__
        self._call()

    def supersede(self, error: PagewireError) -> None:
        """Another reader takes over: this one gets the error and nothing more, and ends nothing by leaving."""
        self._superseded = True
        self._news.clear()
        self._stop_timers()
        self.fail(error)

    def end_choice(self, choice: int, reason: FinishReason) -> None:
        """The reader found an end that the core cannot see: a stop string. Nothing more comes for this choice."""
        self._open.discard(choice)
        self._news.pop(choice, None)
        self._engine.finish(self.sequences[choice].id, reason)

    async def take(self) -> list[ChoiceEvent]:
        """Wait for something new and for a turn, and take it: of each choice as much as one message may have.

        Raises the error that the request failed with.
        """
        assert self._open, "every choice has ended: nothing will ever come"
        if not self._news or not self._engine.lets_pass():
            await self._turn()
        self.has_begun = True
        events: list[ChoiceEvent] = []
        news, self._news = self._news, {}
        for choice in news:
            sequence = self.sequences[choice]
            first = self._taken[choice]
            begin = sequence.num_prompt + first
            tokens = sequence.tokens[begin : begin + self._engine.max_chunk_tokens].tolist()
            self._taken[choice] += len(tokens)
            logprobs = () if sequence.sampling.logprobs is None else sequence.logprobs_of(first, len(tokens))
            reason = sequence.reason
            if self._taken[choice] < sequence.num_output:
                self._news[choice] = None  # the rest, and the end, come next
                reason = FinishReason.NONE
            elif self._error is not None and reason in (FinishReason.ABORTED, FinishReason.ERROR):
                reason = FinishReason.NONE  # the error is the end, and it comes next
            events.append(ChoiceEvent(choice, tokens, reason, logprobs))
            if reason:
                self._open.discard(choice)
        return events

    async def _turn(self) -> None:
        """Return when there is something to take, and the loop lets this reader take it."""
        while True:
            if self._news:
                self._engine.line_up(self)
            elif self._error is not None:
                raise self._error
            else:
                self.is_waited_for = True
            self._called = asyncio.get_running_loop().create_future()
            try:
                await self._called
            finally:
                self._called, self.is_waited_for = None, False
            if self._news:
                return

    def _call(self) -> None:
        if self._called is not None and not self._called.done():
            self._called.set_result(None)

    def abort(self) -> None:
        """End what still runs. Who reads it hears that it was aborted."""
        self.close()
        self._news.update(dict.fromkeys(self._open))
        self.wake()

    def close(self) -> None:
        """The reader leaves; whatever still runs is aborted and its blocks come free."""
        if self._superseded:
            return
        self._stop_timers()
        for sequence in self.sequences.values():
            self._engine.finish(sequence.id, FinishReason.ABORTED)

    def _stop_timers(self) -> None:
        for timer in (self.giving_up, self.deadline):
            if timer is not None:
                timer.cancel()
        self.giving_up = self.deadline = None
