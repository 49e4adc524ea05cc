"""The one loop: fold the answers in, plan, send, hand the tokens out. The only place that waits for work.

Everything here runs on one event loop. Calls from handlers and links change the core at once and wake the loop. An
executor never waits for readers: when a result arrives, the next plan is sent before anybody hears of a token, and
readers are woken a few at a time, so that the next result is seen after one turn of theirs at most. What a reader has
not taken by then is merged into one event: under load tokens share messages, and an idle loop delays none.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections import deque
from collections.abc import Callable, Sequence
from itertools import islice
from typing import Final, NamedTuple, Protocol

from common import failpoints
from common.errors import Overloaded, PagewireError, Unavailable
from common.sampling import SamplingParams, StopConditions
from common.step import ExecutorFacts, StepPlan, StepResult
from common.types import FinishReason, SequenceId
from scheduler.scheduler import ProtocolError, Scheduler
from scheduler.sequence import Sequence as CoreSequence
from scheduler.sequence import Status

log = logging.getLogger(__name__)

_LOOK_AGAIN_S: Final = 1.0
_READERS_AT_ONCE: Final = 16  # each makes a message and writes it: together about a millisecond


class Link(Protocol):
    """The way to one executor."""

    def send(self, plan: StepPlan) -> None:
        """Queue the plan; never waits."""
        ...

    def close(self, why: str) -> None:
        """End the link: the executor may come back with a new session."""
        ...


class ChoiceEvent(NamedTuple):
    """New tokens of one choice, and why it ended, if it did."""

    choice: int
    tokens: list[int]
    reason: FinishReason


class RequestStream:
    """What one request receives. Tokens that the reader has not taken yet are merged, never dropped."""

    def __init__(self, engine: Engine, sequences: Sequence[CoreSequence]) -> None:
        self.sequences = sequences
        self.giving_up: asyncio.TimerHandle | None = None  # runs while no executor could hold the request
        self._engine = engine
        self._pending: dict[int, ChoiceEvent] = {}
        self._open = {s.choice for s in sequences}  # those whose end the reader has not taken
        self._error: PagewireError | None = None
        self._wake = asyncio.Event()

    @property
    def is_open(self) -> bool:
        """There is, or will be, something to take."""
        return bool(self._open)

    def push(self, choice: int, token: int | None, reason: FinishReason) -> None:
        """A token, an end, or both. The reader hears of it with the next `wake`."""
        event = self._pending.get(choice)
        tokens = event.tokens if event else []
        if token is not None:
            tokens.append(token)
        self._pending[choice] = ChoiceEvent(choice, tokens, reason)

    def wake(self) -> None:
        """Let the reader take what is there, if it has not yet."""
        if self._pending:
            self._wake.set()

    def fail(self, error: PagewireError) -> None:
        """The whole request ends with an error."""
        self._error = error
        self._wake.set()

    def end_choice(self, choice: int, reason: FinishReason) -> None:
        """The reader found an end that the core cannot see: a stop string. Nothing more comes for this choice."""
        self._open.discard(choice)
        self._pending.pop(choice, None)
        self._engine.finish(self.sequences[choice].id, reason)

    async def take(self) -> list[ChoiceEvent]:
        """Wait for something new, and take all of it. Raises the error that the request failed with."""
        assert self._open, "every choice has ended: nothing will ever come"
        while not self._pending:
            await self._wake.wait()
            self._wake.clear()
            if self._error is not None:
                raise self._error
        events, self._pending = list(self._pending.values()), {}
        self._open.difference_update([e.choice for e in events if e.reason is not FinishReason.NONE])
        return events

    def close(self) -> None:
        """The reader leaves; whatever still runs is aborted and its blocks come free."""
        if self.giving_up is not None:
            self.giving_up.cancel()
            self.giving_up = None
        for sequence in self.sequences:
            self._engine.finish(sequence.id, FinishReason.ABORTED)


class Engine:
    """Owns the core. `executor_wait_s`: how long a request waits while no executor could run it."""

    def __init__(
        self,
        scheduler: Scheduler,
        *,
        executor_wait_s: float = 30.0,
        max_waiting: int = 2048,
        clock_ns: Callable[[], int] = time.monotonic_ns,
    ) -> None:
        self.scheduler = scheduler
        self.draining = False
        self.last_result_ns = 0
        self._executor_wait_s = executor_wait_s
        self._max_waiting = max_waiting
        self._clock_ns = clock_ns
        self._links: dict[int, Link] = {}
        self._streams: dict[SequenceId, RequestStream] = {}
        self._answers: deque[tuple[int, StepResult]] = deque()
        self._due: dict[RequestStream, None] = {}  # readers that are to be woken, in order
        self._work = asyncio.Event()
        self._changed = asyncio.Event()  # a sequence ended
        self._executors_changed = asyncio.Event()

    # ---- requests

    def submit(
        self,
        prompt: Sequence[int],
        sampling: SamplingParams,
        stop: StopConditions,
        *,
        choices: int = 1,
        tenant: str = "",
    ) -> RequestStream:
        """Queue a request. Raises InvalidRequest, Overloaded, or Unavailable while draining."""
        if self.draining:
            raise Unavailable("the scheduler is shutting down")
        waiting = len(self.scheduler.waiting)
        if waiting + choices > self._max_waiting:
            raise Overloaded(f"{waiting} sequences wait already, at most {self._max_waiting} may")
        failpoints.hit("before_admit")
        now = self._clock_ns()
        made = self.scheduler.add(prompt, sampling, stop, now, choices=choices, tenant=tenant)
        stream = RequestStream(self, made)
        for sequence in made:
            self._streams[sequence.id] = stream
        failpoints.hit("after_admit")
        if not self.scheduler.fits_somewhere(made[0]):
            self._give_up_later(stream)
        self._work.set()
        return stream

    def finish(self, id: SequenceId, reason: FinishReason) -> None:
        """End a sequence early. Harmless when it has ended."""
        self.scheduler.finish(id, reason)
        if self._streams.pop(id, None) is not None:
            self._changed.set()
            self._work.set()  # blocks came free: somebody may be waiting for them

    @property
    def num_requests(self) -> int:
        """Sequences that have not ended."""
        return len(self._streams)

    async def idle(self) -> None:
        """Return once nothing runs or waits."""
        while self._streams:
            self._changed.clear()
            await self._changed.wait()

    # ---- executors

    def join(self, session: int, facts: ExecutorFacts, link: Link) -> None:
        """An executor is ready for plans."""
        self.scheduler.join(session, facts)
        self._links[session] = link
        for stream in set(self._streams.values()):
            if stream.giving_up is not None and self.scheduler.fits_somewhere(stream.sequences[0]):
                stream.giving_up.cancel()
                stream.giving_up = None
        self._executors_changed.set()
        self._work.set()

    def leave(self, session: int) -> None:
        """The executor wants no new sequences."""
        self.scheduler.leave(session)
        self._work.set()

    def lose(self, session: int) -> None:
        """The link is gone; what ran there goes on elsewhere."""
        if self._links.pop(session, None) is None:
            return
        self.scheduler.lose(session)
        for stream in set(self._streams.values()):
            if any(s.status is Status.WAITING and not self.scheduler.fits_somewhere(s) for s in stream.sequences):
                self._give_up_later(stream)
        self._executors_changed.set()
        self._work.set()

    async def executors_changed(self) -> None:
        """Return once an executor has joined or gone since the last call."""
        await self._executors_changed.wait()
        self._executors_changed.clear()

    def answered(self, session: int, result: StepResult) -> None:
        """A result arrived."""
        self._answers.append((session, result))
        self._work.set()

    # ---- the loop

    async def run(self) -> None:
        """Until cancelled."""
        while True:
            await self._wait_for_work()
            while self._answers:
                session, result = self._answers.popleft()
                self._fold(session, result)
                self._send_steps(session)
            for session in list(self._links):
                self._send_steps(session)
            self._wake_readers()

    async def _wait_for_work(self) -> None:
        """Also looks again now and then while requests wait for the best of several executors: it may be stuck."""
        if self._due:
            await asyncio.sleep(0)  # a turn for the readers that were woken; then it is the others'
        elif self.scheduler.waiting and len(self._links) > 1:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_LOOK_AGAIN_S):
                    await self._work.wait()
        else:
            await self._work.wait()
        self._work.clear()

    def _wake_readers(self) -> None:
        for stream in list(islice(self._due, _READERS_AT_ONCE)):
            del self._due[stream]
            stream.wake()

    def _send_steps(self, session: int) -> None:
        link = self._links.get(session)
        if link is None:  # lost
            return
        while (plan := self.scheduler.schedule(session, self._clock_ns())) is not None:
            if failpoints.hit("before_plan_send") != "drop":
                link.send(plan)
        state = self.scheduler.session(session)
        if state.leaving and not state.running and not state.outstanding:
            link.close("nothing left to run")

    def _fold(self, session: int, result: StepResult) -> None:
        failpoints.hit("before_commit")
        self.last_result_ns = self._clock_ns()
        try:
            outputs = self.scheduler.update(session, result, self.last_result_ns)
        except ProtocolError as error:
            log.error("executor of session %d broke the protocol: %s", session, error)
            link = self._links[session]
            self.lose(session)
            link.close(str(error))
            return
        failpoints.hit("after_commit_before_outbox")
        for id, token, reason in outputs:
            ended = reason is not FinishReason.NONE
            stream = self._streams.pop(id) if ended else self._streams[id]
            stream.push(self._choice(stream, id), token, reason)
            self._due[stream] = None
            if ended:
                self._changed.set()

    @staticmethod
    def _choice(stream: RequestStream, id: SequenceId) -> int:
        return id - stream.sequences[0].id  # the choices of one request have consecutive ids

    def _give_up_later(self, stream: RequestStream) -> None:
        if stream.giving_up is None:
            loop = asyncio.get_running_loop()
            stream.giving_up = loop.call_later(self._executor_wait_s, self._give_up, stream)

    def _give_up(self, stream: RequestStream) -> None:
        stream.giving_up = None
        stuck = [s for s in stream.sequences if s.status is Status.WAITING and not self.scheduler.fits_somewhere(s)]
        if not stuck:
            return
        what = "no executor is connected" if not self._links else "no connected executor can hold the request"
        stream.fail(Unavailable(f"{what}; waited {self._executor_wait_s:g} s"))
        stream.close()
