"""The executor's end of the link: dial the scheduler, say what is here, run its plans, dial again when it is gone.

The executor listens on nothing. It keeps its weights from one session to the next, and nothing else: a scheduler that
comes back tells it everything anew.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import math
import random
import secrets
import time
from collections.abc import Callable
from typing import Any, Never

import grpc
from google.protobuf.message import DecodeError
from grpc import aio

from common import failpoints
from common.errors import ExecutorRejected
from common.step import ExecutorFacts, StepResult
from executor.runner import Runner
from protos import executor_pb2 as pb
from services import codec_link
from services.boot_clock import boot_s
from services.codec_link import WireError
from services.compute import ComputeThread
from services.grpc_options import link_options
from services.step_spans import StepSpans
from services.tls import Dialer
from services.watchdog import Watchdog

log = logging.getLogger(__name__)

_METHOD = "/" + pb.DESCRIPTOR.services_by_name["ExecutorLink"].full_name + "/Link"
_WELCOME_TIMEOUT_S = 10.0
_LEAST_HEARTBEAT_S = 0.01
_LATE_S = 0.25  # a timer that fires later than this: this process stood still, and has not read what was sent
_LOOK_S = 0.02  # how often to look whether a step of a link that is gone has ended
_LAST_STEP_S = 5.0  # for the step that runs when this process ends

Call = aio.StreamStreamCall[bytes, bytes]


class LinkLost(Exception):
    """The link ended; another one may work."""


class ExecutorService:
    """One executor process. `scheduler` is HOST:PORT or unix:PATH of the scheduler's link address.

    `dial` opens a channel to it. With `watchdog_s` the process ends itself when its compute thread stands still for so
    long. `spans` makes the spans of steps, where requests are traced.
    """

    def __init__(
        self,
        make_runner: Callable[[], Runner],
        scheduler: str,
        *,
        dial: Callable[[], aio.Channel] | None = None,
        on_joined: Callable[[ExecutorFacts], None] = lambda facts: None,
        drain_s: float = 30.0,
        max_backoff_s: float = 1.0,
        watchdog_s: float = 0.0,
        spans: StepSpans | None = None,
        clock: Callable[[], float] = boot_s,
    ) -> None:
        self._scheduler = scheduler
        self._clock = clock
        self._dial = dial or Dialer(scheduler, link_options())
        self._on_joined = on_joined
        self._drain_s = drain_s
        self._max_backoff_s = max_backoff_s
        self._watchdog_s = watchdog_s
        self._spans = spans
        self._incarnation = secrets.token_bytes(codec_link.INCARNATION_BYTES)
        self._epoch = 0  # the highest that was welcomed here: a scheduler with a lower one has been replaced
        self._epoch_began_s = 0.0  # when its scheduler began, by our clock, at the latest
        self._heard_s = 0.0  # when the scheduler last said something
        self._session: int | None = None  # the one that is served, in the scheduler's words; None between links
        # The compute thread is told our own number of the session: every scheduler counts from 1, and a step of the
        # one that is gone must not answer for the one that came.
        self._numbers = itertools.count()
        self._number = next(self._numbers)
        self._outbox: asyncio.Queue[pb.LinkRequest] = asyncio.Queue()
        loop = asyncio.get_running_loop()
        self._loaded: asyncio.Future[ExecutorFacts] = loop.create_future()
        self._compute = ComputeThread(
            make_runner,
            report=ProgressLog(),
            on_loaded=lambda facts: _call_soon(loop, self._note_loaded, facts),
            on_result=lambda number, result: _call_soon(loop, self._note_result, number, result),
            on_failure=lambda number, error: _call_soon(loop, self._note_failure, number, error),
        )

    async def run(self, stop: asyncio.Event) -> bool:
        """Serve until `stop` is set and what runs here has finished, or the grace is over.

        Returns whether the compute thread has ended, too: one that loads a model does not hear that it should.

        Raises ModelFolderError when the model cannot be loaded, and ExecutorRejected when the scheduler serves
        something else: an operator must act.
        """
        self._compute.start()
        compute = self._compute
        watchdog = Watchdog(lambda: (compute.tick, compute.next_step), patience_s=self._watchdog_s)
        stopping = asyncio.create_task(stop.wait())
        try:
            both: set[asyncio.Future[Any]] = {self._loaded, stopping}
            await asyncio.wait(both, return_when=asyncio.FIRST_COMPLETED)
            if not stopping.done():
                if self._watchdog_s and self._loaded.exception() is None:
                    watchdog.start()
                await self._serve(self._loaded.result(), stopping)
        finally:
            stopping.cancel()
            watchdog.stop()
            has_ended = self._compute.stop(_LAST_STEP_S if self._loaded.done() else 0.0)
        return has_ended

    async def _serve(self, facts: ExecutorFacts, stopping: asyncio.Task[Any]) -> None:
        failures = 0
        while not stopping.done():
            await self._step_ended(stopping)
            link = asyncio.create_task(self._link(facts))
            await asyncio.wait({link, stopping}, return_when=asyncio.FIRST_COMPLETED)
            if stopping.done():
                await self._leave(link)
                return
            joined, why = link.result()  # ExecutorRejected is for an operator
            failures = 0 if joined else failures + 1
            log.log(logging.DEBUG if failures > 1 else logging.INFO, "no link to %s: %s", self._scheduler, why)
            # jitter, so that a scheduler that comes back is not met by all executors at once
            delay_s = min(self._max_backoff_s, 0.05 * 2 ** min(failures, 16)) * random.uniform(0.5, 1.0)
            await asyncio.wait({stopping}, timeout=delay_s)

    async def _step_ended(self, stopping: asyncio.Task[Any]) -> None:
        """Return when nothing of the last link is computed any more: who dials is ready for work at once.

        A step that hangs keeps this executor out of service, and no sequence waits for it here.
        """
        began_s = time.monotonic()
        while self._compute.computing and not stopping.done():
            if time.monotonic() - began_s > 1:
                log.warning("step %d of the last link is still computed", self._compute.next_step)
                began_s = math.inf
            await asyncio.wait({stopping}, timeout=_LOOK_S)

    async def _leave(self, link: asyncio.Task[Any]) -> None:
        """Ask the scheduler for no more, and let what runs here finish."""
        if self._session is not None and not link.done():
            failpoints.hit("on_drain")
            log.info("leaving; what runs here may finish within %g s", self._drain_s)
            self._outbox.put_nowait(pb.LinkRequest(leave=pb.Leave(reason="the executor is shutting down")))
            await asyncio.wait({link}, timeout=self._drain_s)
        link.cancel()
        await asyncio.gather(link, return_exceptions=True)

    async def _link(self, facts: ExecutorFacts) -> tuple[bool, str]:
        """One link from its first message to its last. Returns whether it came to a session, and why it ended."""
        self._outbox = asyncio.Queue()
        async with self._dial() as channel:
            call: Call = channel.stream_stream(_METHOD)()
            try:
                failpoints.hit("before_hello")
                age_s = self._clock() - self._epoch_began_s if self._epoch else 0.0
                hello = codec_link.hello_to_pb(facts, self._incarnation, self._epoch, age_s)
                await call.write(pb.LinkRequest(hello=hello).SerializeToString())
                async with asyncio.timeout(_WELCOME_TIMEOUT_S):
                    first = await _read(call)
                if first.WhichOneof("message") != "welcome":
                    raise LinkLost("the first message was not a welcome")
                welcome = first.welcome
                if welcome.epoch < self._epoch:
                    raise LinkLost(f"a scheduler of epoch {welcome.epoch}, but one of {self._epoch} was here since")
                self._epoch, self._epoch_began_s = welcome.epoch, self._clock() - welcome.age_ms / 1000
                self._session, self._number = welcome.session, next(self._numbers)
                self._compute.begin_session(self._number)
                if self._spans is not None:
                    self._spans.began()
                self._on_joined(facts)
                log.info("joined %s as session %d", self._scheduler, self._session)
                await self._exchange(call, welcome)
            except EOFError:
                return self._session is not None, "it closed the stream"
            except (LinkLost, WireError) as error:
                return self._session is not None, str(error)
            except TimeoutError:
                return False, f"no welcome within {_WELCOME_TIMEOUT_S:g} s"
            except aio.AioRpcError as error:
                if error.code() is grpc.StatusCode.FAILED_PRECONDITION:
                    raise ExecutorRejected(error.details() or "rejected") from error
                return self._session is not None, f"{error.code().name}: {error.details()}"
            finally:
                self._session = None
                self._compute.end_session(self._number)
                call.cancel()

    async def _exchange(self, call: Call, welcome: pb.Welcome) -> Never:
        """Raises EOFError when the scheduler closed the stream, else what broke it."""
        self._heard_s = time.monotonic()
        tasks = {
            asyncio.create_task(self._receive(call, welcome.session)),
            asyncio.create_task(self._send(call)),
            asyncio.create_task(self._beat(welcome)),
        }
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            done.pop().result()
            raise AssertionError("none of them returns")
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _receive(self, call: Call, session: int) -> Never:
        while True:
            message = await _read(call)
            self._heard_s = time.monotonic()
            if message.HasField("ping"):
                continue
            if message.WhichOneof("message") != "plan" or message.plan.session != session:
                raise LinkLost(f"expected a plan of session {session}")
            failpoints.hit("after_plan_recv")
            plan = codec_link.plan_from_pb(message.plan)
            if self._spans is not None:
                self._spans.planned(plan)
            self._compute.execute(self._number, plan)

    async def _send(self, call: Call) -> Never:
        while True:
            message = await self._outbox.get()
            if message.HasField("result") and failpoints.hit("mid_result_write") == "drop":
                continue
            try:
                await call.write(message.SerializeToString())
            except asyncio.InvalidStateError:  # the call is over, and this is heard before the receiver hears it
                raise await _ending(call) from None

    async def _beat(self, welcome: pb.Welcome) -> Never:
        """Say that we live, and find out whether the scheduler does: LinkLost when it has said nothing for its lease.

        Time in which this process stood still is nobody's silence.
        """
        heartbeat_s, lease_s = max(_LEAST_HEARTBEAT_S, welcome.heartbeat_ms / 1000), welcome.lease_ms / 1000
        planned_s = time.monotonic()
        while True:
            failpoints.hit("in_heartbeat")
            now_s = time.monotonic()
            if now_s - planned_s > _LATE_S:
                self._heard_s += now_s - planned_s
            if lease_s and now_s - self._heard_s > lease_s:
                raise LinkLost(f"the scheduler has said nothing for {lease_s:g} s")
            self._outbox.put_nowait(pb.LinkRequest(heartbeat=self._heartbeat(welcome.session)))
            planned_s = now_s + heartbeat_s
            await asyncio.sleep(heartbeat_s)

    def _heartbeat(self, session: int) -> pb.Heartbeat:
        compute = self._compute
        if compute.session != self._number:  # it has not begun with this session
            return pb.Heartbeat(session=session, tick=compute.tick)
        return pb.Heartbeat(
            session=session,
            tick=compute.tick,
            step=compute.next_step,
            computing=compute.computing,
            step_ms=round(1000 * compute.step_s),
        )

    # ---- from the compute thread, on the event loop

    def _note_loaded(self, facts: ExecutorFacts | BaseException) -> None:
        if self._loaded.done():
            return
        if isinstance(facts, BaseException):
            self._loaded.set_exception(facts)
        else:
            failpoints.hit("before_ready")
            self._loaded.set_result(facts)

    def _note_result(self, number: int, result: StepResult) -> None:
        # of another session: the link it belongs to is gone, and so is its meaning
        if number == self._number and self._session is not None:
            if self._spans is not None:
                self._spans.answered(result)
            self._outbox.put_nowait(pb.LinkRequest(result=codec_link.result_to_pb(result, self._session)))

    def _note_failure(self, number: int, error: BaseException) -> None:
        if number == self._number and self._session is not None:
            # the scheduler ends the link when it has read this; ended from here, it might never arrive
            fault = pb.Fault(session=self._session, step=self._compute.next_step, what=type(error).__name__)
            self._outbox.put_nowait(pb.LinkRequest(fault=fault))


class ProgressLog:
    """Says how far loading is: a line a stage, and every tenth of a long one."""

    def __init__(self) -> None:
        self._last = ("", -1)

    def __call__(self, stage: str, done: int, total: int) -> None:
        """Report `done` of `total` of a stage; total 0 is unknown."""
        failpoints.hit("mid_load")
        tenth = 10 * done // total if total else 0
        if (stage, tenth) != self._last:
            self._last = (stage, tenth)
            log.info("%s%s", stage, f" {100 * done // total}%" if total else "")


def _call_soon(loop: asyncio.AbstractEventLoop, function: Callable[..., None], *args: object) -> None:
    try:
        loop.call_soon_threadsafe(function, *args)
    except RuntimeError:  # the loop is closed: the process ends while a step still ran
        if not loop.is_closed():
            raise


async def _read(call: Call) -> pb.LinkResponse:
    data = await call.read()
    if isinstance(data, bytes):
        try:
            return pb.LinkResponse.FromString(data)
        except DecodeError as error:
            raise LinkLost("not a pagewire.executor.v1.LinkResponse") from error
    raise await _ending(call)


async def _ending(call: Call) -> Exception:
    """How a call ended that is over."""
    code, details = await call.code(), await call.details()
    if code is grpc.StatusCode.FAILED_PRECONDITION:
        return ExecutorRejected(details)
    return EOFError() if code is grpc.StatusCode.OK else LinkLost(f"{code.name}: {details}")
