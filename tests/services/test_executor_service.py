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
from services import codec_link, watchdog
from services.executor_service import ExecutorService
from services.grpc_options import link_options
from services.handlers import Context
from tests.services.served import HANG_S

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


async def hello(context: Context) -> pb.Hello:
    data = await context.read()
    assert isinstance(data, bytes), "the executor left"
    return pb.LinkRequest.FromString(data).hello


async def answer(
    context: Context,
    *,
    session: int = 1,
    heartbeat_ms: int = 1000,
    epoch: int = 1,
    lease_ms: int = 0,
    age_ms: int = 0,
) -> None:
    word = pb.Welcome(epoch=epoch, session=session, heartbeat_ms=heartbeat_ms, lease_ms=lease_ms, age_ms=age_ms)
    await context.write(pb.LinkResponse(welcome=word).SerializeToString())


async def welcome(context: Context, **fields: int) -> None:
    await hello(context)
    await answer(context, **fields)


async def send(context: Context, plan: StepPlan, *, session: int = 1) -> None:
    message = pb.LinkResponse(plan=codec_link.plan_to_pb(plan, session))
    await context.write(message.SerializeToString())


async def next_message(context: Context, kind: str) -> pb.LinkRequest:
    """The next of a kind; others are passed over."""
    while True:
        data = await context.read()
        assert isinstance(data, bytes), "the executor left"
        message = pb.LinkRequest.FromString(data)
        if message.WhichOneof("message") == kind:
            return message


async def next_result(context: Context) -> StepResult:
    return codec_link.result_from_pb((await next_message(context, "result")).result)


def run(
    played: Played,
    until: Callable[[], Awaitable[object]],
    *,
    next_token: Callable[[Prefix], int | None] = position_token,
    max_backoff_s: float = 0.001,
    watchdog_s: float = 0.0,
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
            lambda: FakeRunner(next_token=next_token),
            address,
            drain_s=0,
            max_backoff_s=max_backoff_s,
            watchdog_s=watchdog_s,
        )
        serving = asyncio.create_task(service.run(stop))
        waiting = asyncio.ensure_future(until())
        try:
            async with asyncio.timeout(4 * HANG_S):  # two hundred links take a while on a slow machine
                await asyncio.wait({serving, waiting}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            stop.set()
            await serving
            await server.stop(None)
        await waiting

    asyncio.run(main())


def test_an_executor_dials_again_when_the_last_links_step_has_ended_and_answers_for_the_new_one_alone() -> None:
    """Both schedulers call their session 1, and the first one is gone while a step of it hangs."""
    computing, go_on = threading.Event(), threading.Event()
    answered: asyncio.Queue[StepResult] = asyncio.Queue()
    gone = asyncio.Event()

    def next_token(prefix: Prefix) -> int:
        if prefix.num_tokens == 3:  # the first scheduler's prompt
            computing.set()
            go_on.wait(HANG_S)
            return 777
        return position_token(prefix)

    async def played(link: int, context: Context) -> None:
        assert link == 0 or go_on.is_set(), "it is not ready for work"
        await welcome(context)
        await send(context, first_step([7, 8, 9] if link == 0 else [1, 2, 3, 4, 5]))
        if link == 0:
            await asyncio.to_thread(computing.wait, HANG_S)
            gone.set()
        else:
            answered.put_nowait(await next_result(context))

    async def check() -> None:
        await gone.wait()
        await asyncio.sleep(0.2)  # it could dial now
        go_on.set()
        assert list((await answered.get()).tokens) == [5]

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


def test_an_executor_keeps_to_the_later_of_two_schedulers() -> None:
    hellos: list[pb.Hello] = []
    said: list[object] = []
    found = asyncio.Event()

    async def played(link: int, context: Context) -> None:
        hellos.append(await hello(context))
        await answer(context, epoch=(7, 6, 8)[min(link, 2)], age_ms=(5000, 90_000, 0)[min(link, 2)])
        if link == 1:
            said.append(await context.read())  # or never: the executor cancels this call, maybe before the read is over
        elif link == 2:
            await next_message(context, "heartbeat")
            found.set()

    run(played, found.wait)
    assert not any(isinstance(data, bytes) for data in said), "it has nothing to say to the earlier one"
    assert [hello.last_epoch for hello in hellos[:3]] == [0, 7, 7]
    ages_ms = [hello.last_epoch_age_ms for hello in hellos[:3]]
    assert ages_ms[0] == 0 and 5000 <= ages_ms[1] <= ages_ms[2] < 90_000, "of the later one, which it knows"
    assert len({hello.incarnation for hello in hellos}) == 1


def test_an_executor_gives_up_a_scheduler_that_says_nothing_and_dials_again() -> None:
    again = asyncio.Event()

    async def played(link: int, context: Context) -> None:
        await welcome(context, lease_ms=100, heartbeat_ms=10)
        if link == 1:
            again.set()
        while isinstance(await context.read(), bytes):
            pass

    run(played, again.wait)


def test_a_ping_is_a_word() -> None:
    enough = asyncio.Event()

    async def played(link: int, context: Context) -> None:
        assert link == 0, "it was given up"
        await welcome(context, lease_ms=2000, heartbeat_ms=10)
        for _ in range(60):
            await context.write(pb.LinkResponse(ping=pb.Ping()).SerializeToString())
            await asyncio.sleep(0.05)
        enough.set()

    run(played, enough.wait)


def test_a_step_that_fails_is_reported_by_its_number_and_kind_and_the_executor_lives() -> None:
    faults: asyncio.Queue[pb.Fault] = asyncio.Queue()

    def next_token(prefix: Prefix) -> int:
        raise RuntimeError("a secret prompt")

    async def played(link: int, context: Context) -> None:
        await welcome(context)
        await send(context, first_step([1, 2, 3]))
        faults.put_nowait((await next_message(context, "fault")).fault)

    async def check() -> None:
        for _ in range(2):
            assert await faults.get() == pb.Fault(session=1, step=0, what="RuntimeError")

    run(played, check, next_token=next_token)


def test_a_heartbeat_says_how_long_the_step_has_taken() -> None:
    go_on, seen = threading.Event(), asyncio.Event()

    def next_token(prefix: Prefix) -> int:
        go_on.wait(HANG_S)
        return 7

    async def played(link: int, context: Context) -> None:
        await welcome(context, heartbeat_ms=10)
        await send(context, first_step([1, 2, 3]))
        while (beat := (await next_message(context, "heartbeat")).heartbeat).step_ms < 50:
            assert not beat.step_ms or beat.computing
        assert (beat.computing, beat.step) == (True, 0)
        go_on.set()
        while (await next_message(context, "heartbeat")).heartbeat.computing:
            pass
        seen.set()

    run(played, seen.wait, next_token=next_token)


def test_a_process_whose_step_never_ends_ends_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    ended, go_on = threading.Event(), threading.Event()

    def end_process() -> None:
        ended.set()
        go_on.set()

    def next_token(prefix: Prefix) -> int:
        go_on.wait(HANG_S)
        return 7

    async def played(link: int, context: Context) -> None:
        await welcome(context)
        await send(context, first_step([1, 2, 3]))
        while isinstance(await context.read(), bytes):
            pass

    async def check() -> None:
        assert await asyncio.to_thread(ended.wait, HANG_S)

    monkeypatch.setattr(watchdog, "end_process", end_process)
    run(played, check, next_token=next_token, watchdog_s=0.5)
