"""The one loop: fold the answers in, plan, send, hand the tokens out. The only place that waits for work.

Everything here runs on one event loop. Calls from handlers and links change the core at once and wake the loop. An
executor never waits for readers: the next plan is sent before anybody hears of a token, when a result arrives or when
the core says that it is due. Readers take a few at a time, also those that come back and find something, so that the
next result is seen after one turn of theirs at most. What a reader has not taken by then is merged into one event:
under load tokens share messages, and an idle loop delays none. Who has taken nothing yet goes first, in most of the
places: a step answers its new rows last, so their first tokens would wait until everybody's next ones are written.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from itertools import islice
from typing import Final, Protocol

from common import failpoints
from common.cache_control import CacheControl
from common.errors import (
    DeadlineExceeded,
    InvalidRequest,
    Overloaded,
    PagewireError,
    RequestFailed,
    Superseded,
    Unavailable,
)
from common.sampling import SamplingParams, StopConditions
from common.step import ExecutorFacts, StepPlan, StepResult
from common.types import FinishReason, Priority, SequenceId
from scheduler.beams import TextFollower
from scheduler.results import ProtocolError
from scheduler.scheduler import Scheduler, TokenOutput
from scheduler.sequence import Begun, Request, any_begun
from scheduler.sequence import Sequence as CoreSequence
from scheduler.suspicion import GIVEN_UP_AT, End
from scheduler.timeline import Kind, Timeline
from services.admission import Admission, Ask
from services.request_stream import RequestStream
from services.timelines import Timelines

log = logging.getLogger(__name__)

_GOES_ON: Final = FinishReason.NONE  # looked up once: an enum's member is slow to find
_LEAST_WAIT_S: Final = 1e-3  # uvloop's timers have whole milliseconds, and may be early by one
_LOOK_AGAIN_S: Final = 1.0
_DRAINING_WAIT_S: Final = 2.0  # a link that broke is back by then
# Each makes a message and writes it. gRPC hands over one new call a turn, so turns are short.
READERS_AT_ONCE: Final = 8
FIRST_AT_ONCE: Final = 6  # of these, that have taken nothing yet, while others are due


class Link(Protocol):
    """The way to one executor."""

    def send(self, plan: StepPlan) -> None:
        """Queue the plan; never waits."""
        ...

    def close(self, why: str) -> None:
        """End the link: the executor may come back with a new session."""
        ...


class Engine:
    """Owns the core.

    `executor_wait_s`: how long a request waits while no executor could run it. `max_request_s`: how long any may take.
    `max_chunk_tokens`: of one choice, that a reader takes at once.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        *,
        admission: Admission | None = None,
        timelines: Timelines | None = None,
        executor_wait_s: float = 30.0,
        max_request_s: float = 3600.0,
        max_chunk_tokens: int = 256,
        clock_ns: Callable[[], int] = time.monotonic_ns,
    ) -> None:
        self.scheduler = scheduler
        self.max_chunk_tokens = max_chunk_tokens
        self._is_draining = False
        self.last_result_ns = 0
        self._looked_ns = 0  # when the loop last asked the core for steps
        self.admission = admission or Admission()
        self.timelines = Timelines() if timelines is None else timelines
        self._executor_wait_s = executor_wait_s
        self._max_request_s = max_request_s
        self._clock_ns = clock_ns
        self._links: dict[int, Link] = {}
        self._streams: dict[SequenceId, RequestStream] = {}
        self._answers: deque[tuple[int, StepResult]] = deque()
        self._due: dict[RequestStream, None] = {}  # readers that are to be woken, in order
        self._due_first: dict[RequestStream, None] = {}  # before them: those that have taken nothing yet
        self._may_pass = READERS_AT_ONCE  # readers that may take something before the loop's next turn, unasked
        self._due_ns: dict[int, int] = {}  # by session that holds its next plan back: until then
        self._timers: dict[int, asyncio.TimerHandle] = {}  # of these
        self._work = asyncio.Event()
        self._changed = asyncio.Event()  # a sequence ended
        self._executors_changed = asyncio.Event()

    # ---- requests

    def deadline_after(self, time_left_s: float | None) -> int:
        """When a request that arrives now must have ended: within the time its caller has, and within ours."""
        left_s = self._max_request_s if time_left_s is None else min(time_left_s, self._max_request_s)
        return self._clock_ns() + int(left_s * 1e9)

    def timeline(self, request_id: str, *, tenant: str = "", operation: str = "text_completion") -> Timeline:
        """For a request that arrives now: `submit` takes it."""
        return self.timelines.make(request_id, self._clock_ns(), tenant=tenant, operation=operation)

    def refused(self, request_id: str, limit: str, tenant: str) -> None:
        """A request was refused now, for that."""
        self.timelines.refused(request_id, limit, self._clock_ns(), tenant=tenant)

    def seconds_until(self, time_ns: int) -> float:
        """How far away that time is, on the engine's clock."""
        return (time_ns - self._clock_ns()) / 1e9

    def check_room(self, ask: Ask) -> None:
        """Raise what `submit` would for a request like this one: Overloaded, Unavailable, DeadlineExceeded."""
        self._check_room(ask, self._clock_ns())

    def submit(
        self,
        prompt: Sequence[int],
        sampling: SamplingParams,
        stop: StopConditions,
        *,
        choices: int = 1,
        begun: Mapping[int, Begun] | None = None,
        tenant: str = "",
        weight: float = 1.0,
        priority: Priority = Priority.NORMAL,
        deadline_ns: int = 0,
        cache: CacheControl = CacheControl(),  # noqa: B008 - it is a tuple
        follow: TextFollower | None = None,
        resumed: bool | None = None,
        max_drafts: int | None = None,
        timeline: Timeline | None = None,
        dimensions: int = 0,
    ) -> RequestStream:
        """Queue a request, or the rest of one: `begun` is what its choices have already.

        `follow` is for a beam search that stop strings end. `resumed`: its reader has some of it; unless told, where
        any choice has begun. With `dimensions` it ends in a vector of so many numbers, which its sequence has then.

        Raises InvalidRequest, Overloaded, Unavailable while draining, DeadlineExceeded. The rest of one is not refused
        because too much is pinned: it then goes on without its pin.
        """
        now = self._clock_ns()
        resumed = any_begun(begun) if resumed is None else resumed
        ask = Ask(
            tenant=tenant,
            priority=priority,
            prompt_tokens=len(prompt),
            max_tokens=stop.max_tokens,
            choices=sampling.beams.width if sampling.beams else choices if begun is None else len(begun),
            deadline_ns=deadline_ns,
            resumed=resumed,
        )
        self._check_room(ask, now)
        pinned = self._to_pin(prompt, cache, tenant, now, resumes=begun is not None)
        failpoints.hit("before_admit")
        self.scheduler.weigh(tenant, weight)
        made = self.scheduler.add(
            prompt,
            sampling,
            stop,
            now,
            choices=choices,
            begun=begun,
            tenant=tenant,
            salt=cache.salt,
            caches=not cache.no_cache,
            priority=priority,
            expected_output=self.admission.expected_output(ask),
            deadline_ns=deadline_ns,
            follow=follow,
            resumed=resumed,
            max_drafts=max_drafts,
            timeline=timeline,
            dimensions=dimensions,
        )
        self.admission.take(ask, now)
        if timeline is not None:
            self.timelines.opened(timeline)
        stream = RequestStream(self, made, {s.choice: s.num_output for s in made})
        if pinned:
            until_ns = now + cache.pin_seconds * 1_000_000_000
            stream.pin = self.scheduler.prefixes.pin(pinned, until_ns, tenant=tenant, salt=cache.salt)
        for sequence in made:
            self._streams[sequence.id] = stream
        self._expire_at(stream, deadline_ns)
        failpoints.hit("after_admit")
        if not self.scheduler.fits_somewhere(made[0]):
            self._give_up_later(stream)
        self._work.set()
        return stream

    def attach(self, stream: RequestStream, taken: Mapping[int, int], *, deadline_ns: int = 0) -> RequestStream:
        """Another reader, who has `taken` so many tokens of each choice that goes on. The old one gets Superseded.

        From now on the new reader's deadline is the request's.
        """
        sequences = [stream.sequences[choice] for choice in taken]
        timeline = next(iter(stream.sequences.values())).request.timeline
        if timeline is not None and not timeline.is_over:
            timeline.add(Kind.ATTACHED, self._clock_ns(), num_tokens=sum(taken.values()))
        taker = RequestStream(self, sequences, taken)
        for choice, sequence in stream.sequences.items():
            if choice not in taken:  # its end is known to the reader; should it run on, it runs for nobody
                self.finish(sequence.id, FinishReason.ABORTED)
            elif sequence.id in self._streams:
                self._streams[sequence.id] = taker
        for sequence in sequences:
            sequence.expire_at(deadline_ns)
        self._expire_at(taker, deadline_ns)
        taker.pin = stream.pin
        if stream.giving_up is not None:
            self._give_up_later(taker)
        stream.supersede(Superseded("another call has taken over this request"))
        return taker

    def drain(self) -> None:
        """Take nothing new. What is there may finish; what no executor could run waits for a moment only."""
        self._is_draining = True
        for stream in dict.fromkeys(self._streams.values()):
            if stream.giving_up is not None:
                stream.giving_up.cancel()
                stream.giving_up = None
        self._give_up_stuck_later()

    def fail_all(self, error: PagewireError) -> None:
        """End every request that still runs."""
        for stream in dict.fromkeys(self._streams.values()):
            stream.fail(error)
            stream.close()

    def finish(self, id: SequenceId, reason: FinishReason) -> None:
        """End a sequence early. Harmless when it has ended."""
        self.scheduler.finish(id, reason, self._clock_ns())
        stream = self._streams.pop(id, None)
        if stream is not None:
            self._settle(stream.sequence(id))
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

    @property
    def can_serve(self) -> bool:
        """New work is taken, by this scheduler and by an executor."""
        return not self._is_draining and any(not session.leaving for session in self.scheduler.sessions)

    @property
    def is_draining(self) -> bool:
        """Nothing new is taken any more."""
        return self._is_draining

    def join(self, session: int, facts: ExecutorFacts, link: Link) -> None:
        """An executor is ready for plans."""
        self.scheduler.join(session, facts, self._clock_ns())
        self._links[session] = link
        for stream in dict.fromkeys(self._streams.values()):
            if stream.giving_up is not None and not stream.is_stuck(self.scheduler):
                stream.giving_up.cancel()
                stream.giving_up = None
        self._executors_changed.set()
        self._work.set()

    def leave(self, session: int) -> None:
        """The executor wants no new sequences."""
        self.scheduler.leave(session)
        if self._is_draining:
            self._give_up_stuck_later()
        self._executors_changed.set()
        self._work.set()

    def fell_silent(self, session: int) -> None:
        """Nothing was heard of the executor for a while."""
        self.scheduler.fell_silent(session)
        self._work.set()  # others may take what waited for it

    def spoke(self, session: int) -> None:
        """The executor that fell silent is heard again."""
        self.scheduler.spoke(session)
        self._work.set()

    def acquit(self, session: int, name: str) -> None:
        """The process behind a session that was lost has dialled again."""
        self.scheduler.acquit(session, name)
        self._work.set()

    def longest_step_s(self, session: int, step: int) -> float | None:
        """What steps like this outstanding one took at most lately; None while that is unknown."""
        if session not in self._links:
            return None
        state = self.scheduler.session(session)
        num_tokens = state.tokens_of(step)
        longest_ns = None if num_tokens is None else state.pace.longest_ns(num_tokens)
        return None if longest_ns is None else longest_ns / 1e9

    def unanswered_s(self, session: int) -> tuple[int, float]:
        """The oldest step that is not answered, and since when it could have been; (0, 0) while there is none."""
        if session not in self._links:
            return 0, 0.0
        step, since_ns = self.scheduler.session(session).unanswered()
        return step, (self._clock_ns() - since_ns) / 1e9 if since_ns else 0.0

    def lose(self, session: int, end: End = End.LOST, *, step: int = 0, culprit: CoreSequence | None = None) -> None:
        """The link is gone; what ran there goes on elsewhere. What it answered until then still counts."""
        self._fold_answers_of(session)
        if self._links.pop(session, None) is None:
            return
        self._look_at(session, 0, 0)
        losses = self.scheduler.lose(session, self._clock_ns(), end, step=step, culprit=culprit)
        self._hand_out(losses.ended)
        for request in losses.given_up:
            self._give_up_request(request)
        self._give_up_stuck_later()
        self._executors_changed.set()
        self._work.set()

    async def executors_changed(self) -> None:
        """Return once an executor has joined or gone since the last call."""
        await self._executors_changed.wait()
        self._executors_changed.clear()

    def fenced(self, num_rows: int) -> None:
        """A result came of a session that is over."""
        self.scheduler.fenced(num_rows)

    def answered(self, session: int, result: StepResult) -> None:
        """A result arrived."""
        self._answers.append((session, result))
        self._work.set()

    # ---- readers

    def lets_pass(self) -> bool:
        """Whether a reader that comes back may take what is there at once. Else it lines up.

        Where all come back at once, and each wrote what there is, the executors would wait for hundreds of them.
        """
        if self._due or self._due_first or not self._may_pass:
            return False
        self._may_pass -= 1
        return True

    def line_up(self, stream: RequestStream) -> None:
        """Wake this reader when those before it were."""
        if not (self._due or self._due_first):
            self._work.set()
        (self._due if stream.has_begun else self._due_first)[stream] = None

    # ---- the loop

    async def run(self) -> None:
        """Until cancelled."""
        while True:
            if await self._wait_for_work():
                while self._answers:
                    session, result = self._answers.popleft()
                    outputs = self._fold(session, result)
                    self._send_steps(session)
                    self._hand_out(outputs)
                self._looked_ns = self._clock_ns()  # before: what is held back past this might have been so then
                for session in list(self._links):
                    self._send_steps(session)
                line = self.scheduler.waiting
                self.admission.rate.observe(self._clock_ns(), line.tokens_admitted, waiting=line.has_new)
            self._wake_readers()

    async def _wait_for_work(self) -> bool:
        """Return whether there is any: else there are only readers to be woken.

        Also looks again now and then while requests wait for the best of several executors: it may be stuck.
        """
        if self._due or self._due_first:
            await asyncio.sleep(0)  # a turn for the readers that were woken; then it is the others'
            if not self._work.is_set():
                return False
        elif look_again_s := self._look_again_s():
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(look_again_s):
                    await self._work.wait()
        else:
            await self._work.wait()
        self._work.clear()
        return True

    def _look_again_s(self) -> float:
        """Seconds until the core might decide otherwise although nothing happens; 0 is never."""
        if not self.scheduler.waiting:
            return 0.0
        held_back_s = 0.0
        if held_back_ns := self.scheduler.held_back_ns(self._looked_ns):
            # whoever came free since it was looked at was not looked at: then soon, and not never
            held_back_s = max(_LEAST_WAIT_S, held_back_ns / 1e9 - (self._clock_ns() - self._looked_ns) / 1e9)
        if len(self._links) > 1:
            return min(held_back_s or _LOOK_AGAIN_S, _LOOK_AGAIN_S)
        return held_back_s

    def _wake_readers(self) -> None:
        self._may_pass = READERS_AT_ONCE
        first = list(islice(self._due_first, FIRST_AT_ONCE if self._due else READERS_AT_ONCE))
        for stream in [*first, *islice(self._due, READERS_AT_ONCE - len(first))]:
            self._due_first.pop(stream, None)
            self._due.pop(stream, None)
            stream.wake()

    def _send_steps(self, session: int) -> None:
        link = self._links.get(session)
        if link is None:  # lost
            return
        state = self.scheduler.session(session)
        while (plan := self.scheduler.schedule(session, now_ns := self._clock_ns())) is not None:
            if failpoints.hit("before_plan_send") != "drop":
                link.send(plan)
        due_ns = state.due_ns if now_ns < state.due_ns else 0
        if due_ns != self._due_ns.get(session, 0):
            self._look_at(session, due_ns, now_ns)
        if state.leaving and not state.running and not state.outstanding:
            link.close("nothing left to run")

    def _look_at(self, session: int, due_ns: int, now_ns: int) -> None:
        """Have the loop look again when the session's next plan is due; 0 is when something happens."""
        if self._due_ns.pop(session, 0):
            self._timers.pop(session).cancel()
        if due_ns:
            wait_s = max(_LEAST_WAIT_S, (due_ns - now_ns) / 1e9)
            self._due_ns[session] = due_ns
            self._timers[session] = asyncio.get_running_loop().call_later(wait_s, self._is_due, session)

    def _is_due(self, session: int) -> None:
        del self._due_ns[session], self._timers[session]
        self._work.set()

    def _fold_answers_of(self, session: int) -> None:
        mine = [result for owner, result in self._answers if owner == session]
        if mine:
            self._answers = deque(answer for answer in self._answers if answer[0] != session)
            for result in mine:
                self._hand_out(self._fold(session, result))

    def _fold(self, session: int, result: StepResult) -> Sequence[TokenOutput]:
        failpoints.hit("before_commit")
        self.last_result_ns = self._clock_ns()
        try:
            return self.scheduler.update(session, result, self.last_result_ns)
        except ProtocolError as error:
            log.error("executor of session %d broke the protocol: %s", session, error)
            link = self._links[session]
            self.lose(session, End.WRONG, culprit=error.culprit)
            link.close(str(error))
            return ()

    def _hand_out(self, outputs: Sequence[TokenOutput]) -> None:
        failpoints.hit("after_commit_before_outbox")
        for id, _, reason in outputs:
            ended = reason is not _GOES_ON
            stream = self._streams.pop(id) if ended else self._streams[id]
            stream.note(id)
            if stream.is_waited_for:  # another one takes what there is when it comes back
                (self._due if stream.has_begun else self._due_first)[stream] = None
            if ended:
                self._settle(stream.sequence(id))
                self._changed.set()

    def _check_room(self, ask: Ask, now: int) -> None:
        if self._is_draining:
            raise Unavailable("the scheduler is shutting down")
        if 0 < ask.deadline_ns <= now:
            raise DeadlineExceeded("the deadline passed before the request was queued")
        self.admission.check(ask, self.scheduler.waiting.standing(ask.tenant, ask.priority), now)

    def _to_pin(
        self, prompt: Sequence[int], cache: CacheControl, tenant: str, now: int, *, resumes: bool
    ) -> Sequence[int]:
        """The tokens to pin; none where a request that resumes may not. Raises InvalidRequest, Overloaded."""
        if not cache.pin_seconds:
            return ()
        pinned = prompt[: cache.pin_tokens] if cache.pin_tokens else prompt
        try:
            self.scheduler.prefixes.check_pin(pinned, now, tenant=tenant, salt=cache.salt)
        except (InvalidRequest, Overloaded) as error:
            if resumes:
                return ()
            if isinstance(error, Overloaded):
                self.admission.refuse_pin(error)
            raise
        return pinned

    def _settle(self, sequence: CoreSequence) -> None:
        """What the sequence cost in the end; one that was never admitted cost nothing."""
        prompt = 0 if sequence.choice else sequence.num_prompt
        made = sequence.num_output - sequence.num_begun
        if made:
            self.admission.pace.add(made, sequence.last_token_ns - sequence.admitted_ns)
        if sequence.request.resumed:  # the rest was paid where it began
            expected, used = 0, made
        else:
            expected, used = sequence.cost, prompt + sequence.num_used if sequence.admitted_ns else 0
        self.admission.settle(
            sequence.tenant,
            expected=expected,
            used=used,
            num_output=sequence.num_output,
            now_ns=self._clock_ns(),
        )
        timeline = sequence.request.timeline
        if timeline is not None and timeline.is_over:
            self.timelines.ended(timeline)

    def _expire_at(self, stream: RequestStream, deadline_ns: int) -> None:
        if deadline_ns:
            loop = asyncio.get_running_loop()
            stream.deadline = loop.call_later((deadline_ns - self._clock_ns()) / 1e9, self._expire, stream)

    def _expire(self, stream: RequestStream) -> None:
        stream.deadline = None
        if any(not s.reason for s in stream.sequences.values()):
            stream.fail(DeadlineExceeded("the deadline passed before the answer was complete"))
            stream.close()

    def _give_up_request(self, request: Request) -> None:
        """Tell its reader, after the tokens that it has."""
        error_id = secrets.token_hex(8)
        about = {} if request.timeline is None else {"request_id": request.timeline.request_id}
        log.error(
            "sequence %d is given up: %d executors died with it; %s",
            *(request.id, GIVEN_UP_AT, error_id),
            extra={"fields": {"error_id": error_id, **about}},
        )
        streams = {self._streams.get(SequenceId(request.id + i)): None for i in range(request.num_choices)}
        for stream in streams:
            if stream is not None:
                problem = f"{GIVEN_UP_AT} executors died while they computed it; the server's log has it as {error_id}"
                stream.fail(RequestFailed(f"the request is given up: {problem}", error_id))
                stream.close()

    def _give_up_stuck_later(self) -> None:
        for stream in dict.fromkeys(self._streams.values()):
            if stream.is_stuck(self.scheduler):
                self._give_up_later(stream)

    def _give_up_later(self, stream: RequestStream) -> None:
        if stream.giving_up is None:
            wait_s = min(self._executor_wait_s, _DRAINING_WAIT_S) if self._is_draining else self._executor_wait_s
            stream.giving_up = asyncio.get_running_loop().call_later(wait_s, self._give_up, stream, wait_s)

    def _give_up(self, stream: RequestStream, waited_s: float) -> None:
        stream.giving_up = None
        if not stream.is_stuck(self.scheduler):
            return
        what = "no executor is connected" if not self._links else "no connected executor can hold the request"
        stream.fail(Unavailable(f"{what}; waited {waited_s:g} s"))
        stream.close()
