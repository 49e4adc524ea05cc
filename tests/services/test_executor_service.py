"""The executor's end of the link against a scheduler that is played by the test, over a real connection."""

from __future__ import annotations

import asyncio
import random
import threading
from collections.abc import Awaitable, Callable

import grpc
import pytest
from grpc import aio

from common.sampling import SamplingParams
from common.step import NewSequence, StepPlan, StepResult
from common.types import BlockId, SlotRef
from executor.fake_runner import FakeRunner, Prefix, position_token
from protos import executor_pb2 as pb
from services import codec_link
from services.executor_service import ExecutorService
from services.grpc_options import link_options
from services.handlers import Context

REF = SlotRef(1 << 16)
Played = Callable[[int, Context], Awaitable[None]]
"""One link: which one it is, from 0, and its call."""


def first_step(prompt: list[int]) -> StepPlan:
    """Step 0 of a session: one sequence, told whole."""
    new = NewSequence(
        ref=REF,
        attempt=1,
        token_ids=prompt,
        num_prompt=len(prompt),
        num_computed=0,
        block_table=[BlockId(0), BlockId(1)],
        sampling=SamplingParams(temperature=0.0),
        choice=0,
        max_tokens=5,
        stop_token_ids=(),
    )
    return StepPlan(step=0, refs=[REF], num_scheduled=[len(prompt)], new=[new])


async def welcome(context: Context, *, session: int = 1, heartbeat_ms: int = 1000) -> None:
    await context.read()
    message = pb.LinkResponse(welcome=pb.Welcome(epoch=1, session=session, heartbeat_ms=heartbeat_ms))
    await context.write(message.SerializeToString())


async def send(context: Context, plan: StepPlan, *, session: int = 1) -> None:
    message = pb.LinkResponse(plan=codec_link.plan_to_pb(plan, session))
    await context.write(message.SerializeToString())


async def next_result(context: Context) -> StepResult:
    while True:
        data = await context.read()
        assert isinstance(data, bytes), "the executor left"
        message = pb.LinkRequest.FromString(data)
        if message.WhichOneof("message") == "result":
            return codec_link.result_from_pb(message.result)


def run(
    played: Played,
    until: Callable[[], Awaitable[object]],
    *,
    next_token: Callable[[Prefix], int | None] = position_token,
    max_backoff_s: float = 0.001,
) -> None:
    """Serve a fake model to the played scheduler until `until` returns. What ends the executor early fails the test."""

    async def main() -> None:
        links = 0

        async def link(_: object, context: Context) -> None:
            nonlocal links
            links += 1
            await played(links - 1, context)

        server = aio.server(options=link_options())
        name = pb.DESCRIPTOR.services_by_name["ExecutorLink"].full_name
        handler: grpc.RpcMethodHandler[bytes, bytes] = grpc.stream_stream_rpc_method_handler(link)
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(name, {"Link": handler}),))
        address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
        await server.start()
        stop = asyncio.Event()
        service = ExecutorService(
            lambda: FakeRunner(next_token=next_token), address, drain_s=0, max_backoff_s=max_backoff_s
        )
        serving = asyncio.create_task(service.run(stop))
        waiting = asyncio.ensure_future(until())
        try:
            async with asyncio.timeout(60):
                await asyncio.wait({serving, waiting}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            stop.set()
            await serving
            await server.stop(None)
        await waiting

    asyncio.run(main())


def test_a_step_of_a_scheduler_that_is_gone_does_not_answer_for_the_one_that_came() -> None:
    """Both call their session 1, and the step that hangs ends when the second session has begun."""
    computing, go_on = threading.Event(), threading.Event()
    answered: asyncio.Queue[StepResult] = asyncio.Queue()

    def next_token(prefix: Prefix) -> int:
        if prefix.num_tokens == 3:  # the first scheduler's prompt
            computing.set()
            go_on.wait(30)
            return 777
        return position_token(prefix)

    async def played(link: int, context: Context) -> None:
        await welcome(context)
        await send(context, first_step([7, 8, 9] if link == 0 else [1, 2, 3, 4, 5]))
        if link == 0:
            await asyncio.to_thread(computing.wait, 30)
        else:
            await context.read()  # a heartbeat: the second session has begun
            go_on.set()
            answered.put_nowait(await next_result(context))

    async def check() -> None:
        assert list((await answered.get()).tokens) == [5]

    run(played, check, next_token=next_token)


def test_an_executor_whose_step_hangs_does_not_ask_for_more_work() -> None:
    """Whoever dialled again at once, empty, would be given the very sequences that it had just let down."""
    computing, go_on = threading.Event(), threading.Event()
    came_back: asyncio.Queue[bool] = asyncio.Queue()

    def next_token(prefix: Prefix) -> int:
        computing.set()
        go_on.wait(30)
        return position_token(prefix)

    async def played(link: int, context: Context) -> None:
        if link == 0:
            await welcome(context)
            await send(context, first_step([7, 8, 9]))
            await asyncio.to_thread(computing.wait, 30)
            await context.abort(grpc.StatusCode.UNAVAILABLE, "the compute thread has been in step 0 for too long")
        came_back.put_nowait(go_on.is_set())

    async def check() -> None:
        await asyncio.to_thread(computing.wait, 30)
        await asyncio.sleep(0.2)  # time enough to dial a hundred times
        go_on.set()
        assert await came_back.get()

    run(played, check, next_token=next_token)


@pytest.mark.parametrize("aborts", [False, True])
def test_an_executor_outlives_links_that_end_while_it_sends(aborts: bool) -> None:
    enough = asyncio.Event()

    async def played(link: int, context: Context) -> None:
        await welcome(context, heartbeat_ms=1)
        await context.read()
        if link == 200:
            enough.set()
        if aborts:
            await context.abort(grpc.StatusCode.UNAVAILABLE, "going down")

    run(played, enough.wait)


def test_an_executor_dials_for_as_long_as_it_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    """2 ** failures outgrows a float after 1,023 of them: a quarter of an hour without a scheduler."""
    found = asyncio.Event()
    attempts = 0

    async def link(self: ExecutorService, facts: object) -> tuple[bool, str]:
        nonlocal attempts
        attempts += 1
        if attempts == 1100:
            found.set()
        return False, "nobody there"

    async def played(link: int, context: Context) -> None:
        raise AssertionError("nobody dials here")

    monkeypatch.setattr(ExecutorService, "_link", link)
    monkeypatch.setattr(random, "uniform", lambda low, high: 0.0)
    run(played, found.wait)
