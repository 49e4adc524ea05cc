"""The scheduler's end of the link: one executor dials in, is checked, and gets plans until it leaves or is lost.

One receive loop, one send loop, one closer; the idea is etcd's watch server.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import time
from collections.abc import Callable
from typing import Final

import grpc

from common import failpoints
from common.errors import ExecutorRejected, InvalidRequest, NameTaken, PagewireError, StaleEpoch, Unavailable
from common.model_folder import ModelFolder
from common.step import ExecutorFacts, StepPlan
from protos import executor_pb2 as pb
from scheduler.suspicion import End
from services import codec_link
from services.boot_clock import boot_s
from services.codec_link import WireError
from services.engine import Engine
from services.handlers import Context, answer, parse
from services.step_spans import StepSpans
from services.tracing import Tracer

log = logging.getLogger(__name__)

_ENDED = object()  # the send loop's last item
_PING: Final = pb.LinkResponse(ping=pb.Ping()).SerializeToString()

_PATIENCE: Final = 8
"""A step may take so many times what steps like it took lately."""

_LATE_S: Final = 0.25
"""A timer that fires later than this did not fire late: this process stood still, and has not read what was sent."""

_IDLE_S: Final = 5.0
"""How long the compute thread may not tick between steps. It does four times a second, if it gets a core."""

_LAST_EPOCH: Final = 2**63 - 1
"""Nanoseconds: in the year 2262."""

_MAX_CUT: Final = 1024
"""Links that broke, whose executors may dial again."""


class ExecutorLost(Unavailable):
    """The scheduler ends the session. `step` is the one that the executor was in, or had not passed."""

    def __init__(self, message: str, end: End, step: int = 0) -> None:
        super().__init__(message)
        self.end = end
        self.step = step


class ExecutorLinkService:
    """pagewire.executor.v1.ExecutorLink. `epoch` names this scheduler process: later ones have higher ones.

    By default it is the time of day at which the process began. Where that went back, the process is the later one all
    the same, and takes a higher epoch as soon as it hears of one: by how long ago both began, so by no clock that
    anybody sets. One that stood still while another took its place began earlier, and never does.

    A step is given up after `step_timeout_s`, or earlier: after eight times what steps like it took lately, but never
    before `step_patience_s`.
    """

    def __init__(
        self,
        engine: Engine,
        model: ModelFolder,
        *,
        epoch: int | None = None,
        heartbeat_ms: int = 250,
        hello_timeout_s: float = 10.0,
        suspect_s: float = 1.0,
        silence_s: float = 2.0,
        lease_s: float = 5.0,
        step_timeout_s: float = 120.0,
        step_patience_s: float = 2.0,
        tracer: Tracer | None = None,
        clock: Callable[[], float] = boot_s,
    ) -> None:
        self._engine = engine
        self._model = model
        self._epoch = time.time_ns() if epoch is None else epoch
        self._clock = clock
        self._began_s = clock()
        self._heartbeat_ms = heartbeat_ms
        self._hello_timeout_s = hello_timeout_s
        self._suspect_s = min(suspect_s, silence_s)
        self._silence_s = silence_s
        self._lease_s = lease_s
        self._step_timeout_s = step_timeout_s
        self._step_patience_s = step_patience_s
        self._tracer = tracer
        self._sessions = itertools.count(1)
        self._live: dict[str, _Link] = {}  # by the executor's name
        self._cut: dict[bytes, int] = {}  # incarnations whose link broke, and the session that ended by it
        self._stopping = False

    def handler(self) -> grpc.GenericRpcHandler:
        """What a gRPC server serves. Messages come as bytes, so that malformed ones are ours to answer."""
        descriptor = pb.DESCRIPTOR.services_by_name["ExecutorLink"]

        async def link(_: object, context: Context) -> None:
            await answer(f"{descriptor.full_name}.Link", context, self._serve(context))

        return grpc.method_handlers_generic_handler(
            descriptor.full_name, {"Link": grpc.stream_stream_rpc_method_handler(link)}
        )

    def stopping(self) -> None:
        """The scheduler stops: links that end from now on end for that."""
        self._stopping = True

    async def _serve(self, context: Context) -> None:
        session = next(self._sessions)
        name, why = context.peer(), "it closed the stream"
        link: _Link | None = None
        end, step = End.LOST, 0
        try:
            facts, incarnation = await self._hello(context)
            name = f"{facts.name} ({context.peer()})"
            link = self._enter(session, facts, incarnation, context)
            await self._run(link, facts, context)
            if link.leaving:
                end = End.CLEAN
            elif link.is_closed:  # by the engine, which knows why
                end = End.WRONG
        except PagewireError as error:
            why = str(error)
            if isinstance(error, ExecutorLost):
                end, step = error.end, error.step
            else:
                end = End.WRONG  # a message that is none
            raise
        except asyncio.CancelledError:
            why = "connection lost"
            raise
        finally:
            if link is None:
                log.info("executor %s was turned away: %s", name, why)
            else:
                if end is End.LOST and link.leaving:  # its grace was over before what ran there
                    end = End.CLEAN
                if end is End.LOST:
                    step = link.passed
                self._exit(link, End.CLEAN if self._stopping else end, step)
                log.info("executor %s, session %d, is gone: %s", name, session, why)

    async def _hello(self, context: Context) -> tuple[ExecutorFacts, bytes]:
        try:
            async with asyncio.timeout(self._hello_timeout_s):
                message = await _read(context)
        except TimeoutError:
            raise Unavailable(f"no hello within {self._hello_timeout_s:g} s") from None
        if message is None or message.WhichOneof("message") != "hello":
            raise InvalidRequest("message", "the first one must be hello")
        hello = message.hello
        try:
            facts = codec_link.facts_from_pb(hello)
        except WireError as error:
            raise InvalidRequest(f"hello.{error.field}", error.problem) from error
        model = self._model
        if facts.model_digest != model.digest:
            raise ExecutorRejected(
                f"this scheduler serves {model.name} ({model.digest[:12]}), "
                f"the executor has {facts.model} ({facts.model_digest[:12]}): start both with the same model folder"
            )
        if facts.vocab_size != model.vocab_size:
            raise InvalidRequest("hello.vocab_size", f"must be {model.vocab_size}, got {facts.vocab_size}")
        self._outrank(hello.last_epoch, hello.last_epoch_age_ms)
        return facts, hello.incarnation

    def _outrank(self, epoch: int, age_ms: int) -> None:
        """An executor served the scheduler of that epoch, which began so long ago.

        Raises StaleEpoch when that one began after this one. Of the two ages, only the other one's can be told as less
        than it was, by the time that messages took: whoever is in doubt is not the later one.
        """
        if epoch <= self._epoch:
            return
        if epoch >= _LAST_EPOCH:
            raise InvalidRequest("hello.last_epoch", f"must be in [0, {_LAST_EPOCH}), got {epoch}")
        if self._age_ms() >= age_ms:
            raise StaleEpoch(f"it served a scheduler of epoch {epoch}, later than {self._epoch}")
        self._epoch = epoch + 1

    def _age_ms(self) -> int:
        return round(1000 * (self._clock() - self._began_s))

    def _enter(self, session: int, facts: ExecutorFacts, incarnation: bytes, context: Context) -> _Link:
        """One link a name. Who lives keeps it; the same process may dial again before its old link is known to be dead.

        Raises NameTaken.
        """
        old = self._live.get(facts.name)
        if old is not None:
            if old.incarnation != incarnation:
                raise NameTaken(f"an executor named {facts.name} is connected already; give each a --name of its own")
            old.superseded.set()
            self._exit(old, End.LOST, old.passed)
        cut = self._cut.pop(incarnation, None)
        if cut is not None:
            self._engine.acquit(cut, facts.name)
        spans = StepSpans(self._tracer, link=facts.name) if self._tracer is not None else None
        link = self._live[facts.name] = _Link(session, facts.name, incarnation, context, spans)
        return link

    def _exit(self, link: _Link, end: End, step: int) -> None:
        """The session is over. Twice is harmless."""
        if self._live.get(link.name) is link:
            del self._live[link.name]
            if end is End.LOST:
                self._cut[link.incarnation] = link.session
                if len(self._cut) > _MAX_CUT:
                    del self._cut[next(iter(self._cut))]
            self._engine.lose(link.session, end, step=step)

    async def _run(self, link: _Link, facts: ExecutorFacts, context: Context) -> None:
        failpoints.hit("before_welcome")
        welcome = pb.Welcome(
            epoch=self._epoch,
            session=link.session,
            heartbeat_ms=self._heartbeat_ms,
            lease_ms=round(1000 * self._lease_s),
            age_ms=self._age_ms(),
        )
        await context.write(pb.LinkResponse(welcome=welcome).SerializeToString())
        if link.superseded.is_set():
            raise ExecutorLost("the same process dialled again", End.LOST)
        self._engine.join(link.session, facts, link)
        log.info(
            "executor %s joined as session %d: %d blocks of %d tokens, %s, %s",
            *(facts.name, link.session, facts.num_blocks, facts.block_size, facts.dtype, facts.device),
        )
        tasks = [
            asyncio.create_task(self._receive(link, context)),
            asyncio.create_task(link.send_loop()),
            asyncio.create_task(link.ping_loop(self._lease_s / 5)),
            asyncio.create_task(_superseded(link)),
        ]
        try:
            await self._until_over(link, tasks)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _until_over(self, link: _Link, tasks: list[asyncio.Task[None]]) -> None:
        """Raises what ended the link, and ExecutorLost when the executor falls silent. One timer, whatever is heard.

        Time in which this process stood still is nobody's silence: what was sent meanwhile waits to be read.
        """
        planned_s = time.monotonic()
        while not any(task.done() for task in tasks):
            now_s = time.monotonic()
            if now_s - planned_s > _LATE_S:
                link.heard_s += now_s - planned_s
            quiet_s = now_s - link.heard_s
            if quiet_s >= self._silence_s:
                raise ExecutorLost(f"nothing heard for {self._silence_s:g} s", End.SILENT, link.passed)
            if quiet_s >= self._suspect_s and not link.is_silent:
                link.is_silent = True
                log.info("session %d: nothing heard for %g s", link.session, self._suspect_s)
                self._engine.fell_silent(link.session)
            timeout_s = (self._silence_s if link.is_silent else self._suspect_s) - quiet_s
            planned_s = now_s + timeout_s
            await asyncio.wait(tasks, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
        for task in tasks:
            if task.done():
                task.result()

    async def _receive(self, link: _Link, context: Context) -> None:
        pulse = ComputePulse()
        session = link.session
        while (message := await _read(context)) is not None:
            link.heard_s = time.monotonic()
            if link.is_silent:
                link.is_silent = False
                self._engine.spoke(session)
            kind = message.WhichOneof("message")
            if kind == "result":
                if message.result.session != session:
                    log.warning("session %d: dropped a result of session %d", session, message.result.session)
                    self._engine.fenced(len(message.result.refs) // 4)
                    continue
                try:
                    result = codec_link.result_from_pb(message.result)
                except WireError as error:
                    raise InvalidRequest(f"result.{error.field}", error.problem) from error
                if link.spans is not None:
                    link.spans.answered(result)
                self._engine.answered(session, result)
            elif kind == "heartbeat" and message.heartbeat.session == session:
                link.passed = max(link.passed, message.heartbeat.step)
                pulse.beat(message.heartbeat, self._limit_s(session, message.heartbeat.step))
                self._check_answers(session)
            elif kind == "leave":
                log.info("session %d leaves: %s", session, message.leave.reason)
                link.leaving = True
                self._engine.leave(session)
            elif kind == "fault" and message.fault.session == session:
                fault = message.fault
                raise ExecutorLost(f"step {fault.step} failed: {_printable(fault.what)}", End.FAILED, fault.step)
            elif kind == "hello":
                raise InvalidRequest("message", "a second hello on one link")

    def _limit_s(self, session: int, step: int) -> float:
        """How long the executor may be in that step."""
        longest_s = self._engine.longest_step_s(session, step)
        if longest_s is None:
            return self._step_timeout_s
        return min(self._step_timeout_s, max(self._step_patience_s, _PATIENCE * longest_s))

    def _check_answers(self, session: int) -> None:
        """An executor that lives and ticks, and has a step that it neither computes nor answers, is none."""
        step, waited_s = self._engine.unanswered_s(session)
        limit_s = self._step_timeout_s + self._silence_s
        if waited_s > limit_s:
            raise ExecutorLost(f"step {step} was not answered for over {limit_s:g} s", End.STUCK, step)


class ComputePulse:
    """Whether an executor's compute thread moves: its event loop sends the heartbeats, so they alone prove nothing."""

    def __init__(self, *, idle_s: float = _IDLE_S, clock: Callable[[], float] = time.monotonic) -> None:
        self._idle_s = idle_s
        self._clock = clock
        self._tick = -1
        self._since_s = 0.0

    def beat(self, heartbeat: pb.Heartbeat, limit_s: float) -> None:
        """Raise ExecutorLost when the thread is in one step for over `limit_s`, or stands still without one.

        The time in a step is told by the executor's own clock, so that a message that waited proves nothing.
        """
        if heartbeat.computing:
            self._tick = -1
            if heartbeat.step_ms > 1000 * limit_s:
                problem = f"the compute thread has been in step {heartbeat.step} for over {limit_s:g} s"
                raise ExecutorLost(problem, End.STUCK, heartbeat.step)
        elif heartbeat.tick != self._tick:
            self._tick, self._since_s = heartbeat.tick, self._clock()
        elif self._clock() - self._since_s > self._idle_s:
            problem = f"the compute thread has been in its loop for over {self._idle_s:g} s"
            raise ExecutorLost(problem, End.SILENT, heartbeat.step)


class _Link:
    """The engine's way to one executor. Plans queue here; the executor's credit bounds how many."""

    def __init__(
        self, session: int, name: str, incarnation: bytes, context: Context, spans: StepSpans | None = None
    ) -> None:
        self.session = session
        self.name = name
        self.incarnation = incarnation
        self.superseded = asyncio.Event()  # the same process has dialled again
        self.leaving = False
        self.is_silent = False
        self.passed = 0  # the executor had ended all steps before this, by its own word
        self.heard_s = time.monotonic()  # when the executor last said something
        self.spans = spans
        self._context = context
        self.is_closed = False  # from this side
        self._queue: asyncio.Queue[StepPlan | object] = asyncio.Queue()

    def send(self, plan: StepPlan) -> None:
        if self.spans is not None:
            self.spans.planned(plan)
        self._queue.put_nowait(plan)

    def close(self, why: str) -> None:
        if not self.is_closed:
            self.is_closed = True
            log.info("session %d: closing the link: %s", self.session, why)
            self._queue.put_nowait(_ENDED)

    async def send_loop(self) -> None:
        """Returns when the link was closed from this side."""
        with contextlib.suppress(asyncio.CancelledError):
            while (item := await self._queue.get()) is not _ENDED:
                if isinstance(item, StepPlan):
                    message = pb.LinkResponse(plan=codec_link.plan_to_pb(item, self.session))
                    await self._context.write(message.SerializeToString())
                    failpoints.hit("after_plan_send")
                else:
                    await self._context.write(_PING)

    async def ping_loop(self, every_s: float) -> None:
        """A word now and then, whether there are plans or not: executors give up a scheduler that says nothing."""
        while True:
            await asyncio.sleep(every_s)
            if self._queue.empty():  # else there is something to say
                self._queue.put_nowait(None)


async def _superseded(link: _Link) -> None:
    await link.superseded.wait()
    raise ExecutorLost("the same process dialled again", End.LOST)


def _printable(word: str) -> str:
    """A word of an executor, as it may stand in a log line."""
    return word if len(word) <= 64 and word.isprintable() else "something that cannot be printed"


async def _read(context: Context) -> pb.LinkRequest | None:
    """The executor's next message; None when it closed the stream."""
    data = await context.read()
    return parse(pb.LinkRequest, data) if isinstance(data, bytes) else None
