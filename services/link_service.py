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

import grpc

from common import failpoints
from common.errors import ExecutorRejected, InvalidRequest, PagewireError, Unavailable
from common.model_folder import ModelFolder
from common.step import ExecutorFacts, StepPlan
from protos import executor_pb2 as pb
from services import codec_link
from services.codec_link import WireError
from services.engine import Engine
from services.handlers import Context, answer, parse

log = logging.getLogger(__name__)

_ENDED = object()  # the send loop's last item


class ExecutorLinkService:
    """pagewire.executor.v1.ExecutorLink. `epoch` names this scheduler process."""

    def __init__(
        self,
        engine: Engine,
        model: ModelFolder,
        *,
        epoch: int | None = None,
        heartbeat_ms: int = 250,
        hello_timeout_s: float = 10.0,
        silence_s: float = 5.0,
        step_timeout_s: float = 120.0,
    ) -> None:
        self._engine = engine
        self._model = model
        self._epoch = time.time_ns() if epoch is None else epoch
        self._heartbeat_ms = heartbeat_ms
        self._hello_timeout_s = hello_timeout_s
        self._silence_s = silence_s
        self._step_timeout_s = step_timeout_s
        self._sessions = itertools.count(1)

    def handler(self) -> grpc.GenericRpcHandler:
        """What a gRPC server serves. Messages come as bytes, so that malformed ones are ours to answer."""
        descriptor = pb.DESCRIPTOR.services_by_name["ExecutorLink"]

        async def link(_: object, context: Context) -> None:
            await answer(f"{descriptor.full_name}.Link", context, self._serve(context))

        return grpc.method_handlers_generic_handler(
            descriptor.full_name, {"Link": grpc.stream_stream_rpc_method_handler(link)}
        )

    async def _serve(self, context: Context) -> None:
        session = next(self._sessions)
        name, why = context.peer(), "it closed the stream"
        try:
            facts = await self._hello(context)
            name = f"{facts.name} ({context.peer()})"
            await self._run(session, facts, context)
        except PagewireError as error:
            why = str(error)
            raise
        except asyncio.CancelledError:
            why = "connection lost"
            raise
        finally:
            self._engine.lose(session)
            log.info("executor %s, session %d, is gone: %s", name, session, why)

    async def _hello(self, context: Context) -> ExecutorFacts:
        try:
            async with asyncio.timeout(self._hello_timeout_s):
                message = await _read(context)
        except TimeoutError:
            raise Unavailable(f"no hello within {self._hello_timeout_s:g} s") from None
        if message is None or message.WhichOneof("message") != "hello":
            raise InvalidRequest("message", "the first one must be hello")
        try:
            facts = codec_link.facts_from_pb(message.hello)
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
        return facts

    async def _run(self, session: int, facts: ExecutorFacts, context: Context) -> None:
        failpoints.hit("before_welcome")
        welcome = pb.Welcome(epoch=self._epoch, session=session, heartbeat_ms=self._heartbeat_ms)
        await context.write(pb.LinkResponse(welcome=welcome).SerializeToString())
        link = _Link(session, context)
        sender = asyncio.create_task(link.send_loop())
        self._engine.join(session, facts, link)
        log.info(
            "executor %s joined as session %d: %d blocks of %d tokens, %s, %s",
            *(facts.name, session, facts.num_blocks, facts.block_size, facts.dtype, facts.device),
        )
        receiver = asyncio.create_task(self._receive(session, link, context))
        try:
            await self._until_over(link, receiver, sender)
        finally:
            for task in (sender, receiver):
                task.cancel()
            await asyncio.gather(sender, receiver, return_exceptions=True)

    async def _until_over(self, link: _Link, *tasks: asyncio.Task[None]) -> None:
        """Raises what ended the link, and Unavailable when the executor falls silent. One timer, whatever is heard."""
        while not any(task.done() for task in tasks):
            patience_s = link.heard_s + self._silence_s - time.monotonic()
            if patience_s <= 0:
                raise Unavailable(f"nothing heard for {self._silence_s:g} s")
            await asyncio.wait(tasks, timeout=patience_s, return_when=asyncio.FIRST_COMPLETED)
        for task in tasks:
            if task.done():
                task.result()

    async def _receive(self, session: int, link: _Link, context: Context) -> None:
        pulse = ComputePulse(idle_s=self._silence_s, step_s=self._step_timeout_s)
        while (message := await _read(context)) is not None:
            link.heard_s = time.monotonic()
            kind = message.WhichOneof("message")
            if kind == "result":
                if message.result.session != session:
                    log.warning("session %d: dropped a result of session %d", session, message.result.session)
                    continue
                try:
                    self._engine.answered(session, codec_link.result_from_pb(message.result))
                except WireError as error:
                    raise InvalidRequest(f"result.{error.field}", error.problem) from error
            elif kind == "heartbeat":
                pulse.beat(message.heartbeat)
            elif kind == "leave":
                log.info("session %d leaves: %s", session, message.leave.reason)
                self._engine.leave(session)
            elif kind == "hello":
                raise InvalidRequest("message", "a second hello on one link")


class ComputePulse:
    """Whether an executor's compute thread moves: its event loop sends the heartbeats, so they alone prove nothing."""

    def __init__(self, *, idle_s: float, step_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._idle_s = idle_s
        self._step_s = step_s
        self._clock = clock
        self._seen = (-1, -1, False)
        self._since = 0.0

    def beat(self, heartbeat: pb.Heartbeat) -> None:
        """Raise Unavailable when the thread has stood still for too long: in one step, or without one."""
        seen = (heartbeat.tick, heartbeat.step, heartbeat.computing)
        if seen != self._seen:
            self._seen, self._since = seen, self._clock()
            return
        limit_s = self._step_s if heartbeat.computing else self._idle_s
        if self._clock() - self._since > limit_s:
            what = f"step {heartbeat.step}" if heartbeat.computing else "its loop"
            raise Unavailable(f"the compute thread has been in {what} for over {limit_s:g} s")


class _Link:
    """The engine's way to one executor. Plans queue here; the executor's credit bounds how many."""

    def __init__(self, session: int, context: Context) -> None:
        self._session = session
        self._context = context
        self._queue: asyncio.Queue[StepPlan | object] = asyncio.Queue()
        self._closed = False
        self.heard_s = time.monotonic()  # when the executor last said something

    def send(self, plan: StepPlan) -> None:
        self._queue.put_nowait(plan)

    def close(self, why: str) -> None:
        if not self._closed:
            self._closed = True
            log.info("session %d: closing the link: %s", self._session, why)
            self._queue.put_nowait(_ENDED)

    async def send_loop(self) -> None:
        """Returns when the link was closed from this side."""
        with contextlib.suppress(asyncio.CancelledError):
            while isinstance(plan := await self._queue.get(), StepPlan):
                message = pb.LinkResponse(plan=codec_link.plan_to_pb(plan, self._session))
                await self._context.write(message.SerializeToString())
                failpoints.hit("after_plan_send")


async def _read(context: Context) -> pb.LinkRequest | None:
    """The executor's next message; None when it closed the stream."""
    data = await context.read()
    return parse(pb.LinkRequest, data) if isinstance(data, bytes) else None
