"""The scheduler's end of the link: what it takes for a sign of life, whom it lets in, and how it ends."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc import aio

from common.model_folder import ModelFolder, read_model_folder
from common.sampling import SamplingParams, StopConditions
from common.step import ExecutorFacts, StepPlan
from executor.fake_runner import FakeRunner
from executor.runner import execute
from protos import executor_pb2 as pb
from scheduler.scheduler import Scheduler, SchedulerLimits
from scheduler.suspicion import End
from services import codec_link
from services.engine import Engine
from services.grpc_options import link_options
from services.link_service import ComputePulse, ExecutorLinkService, ExecutorLost
from services.request_stream import RequestStream
from tests.e2e import fake_model
from tests.services.served import HANG_S

GREEDY = SamplingParams(temperature=0.0)


class Clock:
    """Seconds that pass when the test says so."""

    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


def beat(tick: int, *, step: int = 0, step_ms: int | None = None) -> pb.Heartbeat:
    return pb.Heartbeat(session=1, tick=tick, step=step, computing=step_ms is not None, step_ms=step_ms or 0)


def test_a_loop_that_ticks_is_alive_for_ever() -> None:
    clock = Clock()
    pulse = ComputePulse(idle_s=5, clock=clock)
    for tick in range(100):
        clock.now_s += 4
        pulse.beat(beat(tick), 60)


def test_heartbeats_of_a_loop_that_stands_still_prove_nothing() -> None:
    clock = Clock()
    pulse = ComputePulse(idle_s=5, clock=clock)
    pulse.beat(beat(7), 60)
    clock.now_s += 4
    pulse.beat(beat(7), 60)
    clock.now_s += 2
    with pytest.raises(ExecutorLost, match="its loop for over 5 s"):
        pulse.beat(beat(7), 60)


def test_a_step_may_take_long_but_not_for_ever_by_the_executors_own_clock() -> None:
    clock = Clock()
    pulse = ComputePulse(idle_s=5, clock=clock)
    pulse.beat(beat(7, step=3, step_ms=10), 60)
    clock.now_s += 3600
    pulse.beat(beat(7, step=3, step_ms=59_000), 60)
    with pytest.raises(ExecutorLost, match="step 3 for over 60 s") as lost:
        pulse.beat(beat(7, step=3, step_ms=61_000), 60)
    assert (lost.value.end, lost.value.step) == (End.STUCK, 3)


def test_a_loop_that_waits_again_after_a_long_step_has_not_stood_still() -> None:
    clock = Clock()
    pulse = ComputePulse(idle_s=5, clock=clock)
    pulse.beat(beat(7), 60)
    pulse.beat(beat(8, step=3, step_ms=10), 60)
    clock.now_s += 30
    pulse.beat(beat(8, step=4), 60)


# ---- over a real connection, against executors that are played by the test


class Played:
    """One link of an executor that says what the test wants."""

    def __init__(self, channel: aio.Channel, facts: ExecutorFacts) -> None:
        self.runner = FakeRunner(max_model_len=64, num_blocks=16, vocab_size=facts.vocab_size)
        self.session = 0
        self._facts = facts
        self._call: aio.StreamStreamCall[bytes, bytes] = channel.stream_stream(
            "/pagewire.executor.v1.ExecutorLink/Link"
        )()

    async def hello(self, incarnation: bytes, *, last_epoch: int = 0, last_epoch_age_s: float = 0.0) -> pb.Welcome:
        """Dial in. Raises AioRpcError when turned away."""
        await self.say(hello=codec_link.hello_to_pb(self._facts, incarnation, last_epoch, last_epoch_age_s))
        welcome = (await self.hear()).welcome
        self.session = welcome.session
        return welcome

    async def say(self, **message: object) -> None:
        """Send one message."""
        await self._call.write(pb.LinkRequest(**message).SerializeToString())  # type: ignore[arg-type]

    async def beat(self, tick: int = 0, **fields: object) -> None:
        """A heartbeat."""
        await self.say(heartbeat=pb.Heartbeat(session=self.session, tick=tick, **fields))  # type: ignore[arg-type]

    async def hear(self) -> pb.LinkResponse:
        """The next message. Raises AioRpcError at the end of the link."""
        data = await self._call.read()
        if isinstance(data, bytes):
            return pb.LinkResponse.FromString(data)
        raise await self.ending()

    async def plan(self) -> StepPlan:
        """The next plan; pings are passed over."""
        while not (message := await self.hear()).HasField("plan"):
            pass
        return codec_link.plan_from_pb(message.plan)

    async def answer(self, plan: StepPlan) -> None:
        """Run a plan and send its result."""
        result = execute(self.runner, plan)
        await self.say(result=codec_link.result_to_pb(result, self.session))

    async def ending(self) -> aio.AioRpcError:
        """How the link ended, once all that was said before is read."""
        with suppress(aio.AioRpcError):
            while isinstance(await self._call.read(), bytes):
                pass
        code, details = await self._call.code(), await self._call.details()
        return aio.AioRpcError(code, aio.Metadata(), aio.Metadata(), details)

    def cut(self) -> None:
        """Break the link."""
        self._call.cancel()


class Room:
    """A scheduler's engine and link service, and executors that dial in. What steps take is for the clock to say."""

    def __init__(self, engine: Engine, clock: Clock, model: ModelFolder, address: str) -> None:
        self.engine = engine
        self.clock = clock
        self.core = engine.scheduler
        self._model = model
        self._address = address
        self._channels: list[aio.Channel] = []

    def dial(self, name: str = "played") -> Played:
        """Another link, over a connection of its own."""
        channel = aio.insecure_channel(self._address, options=link_options())
        self._channels.append(channel)
        facts = ExecutorFacts(
            name=name,
            model=self._model.name,
            model_digest=self._model.digest,
            vocab_size=self._model.vocab_size,
            max_model_len=64,
            num_blocks=16,
            block_size=4,
            max_sequences=4,
            max_step_tokens=64,
        )
        return Played(channel, facts)

    def submit(self, *prompt: int, max_tokens: int = 3) -> RequestStream:
        """A request."""
        return self.engine.submit(prompt, GREEDY, StopConditions(max_tokens=max_tokens))

    async def until(self, holds: Callable[[], bool]) -> None:
        """Wait until it is so."""
        while not holds():
            await asyncio.sleep(0.001)

    async def close(self) -> None:
        """Break all links."""
        for channel in self._channels:
            await channel.close()


@asynccontextmanager
async def room(folder: Path, **settings: Any) -> AsyncIterator[Room]:
    model = read_model_folder(fake_model.write(folder / "fake"))
    clock = Clock()
    core = Scheduler(SchedulerLimits(), model="fake", eos=set(), secret=b"test")
    engine = Engine(core, clock_ns=lambda: round(clock.now_s * 1e9))
    server = aio.server(options=link_options())
    service = ExecutorLinkService(engine, model, **settings)
    server.add_generic_rpc_handlers((service.handler(),))
    address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    await server.start()
    loop = asyncio.create_task(engine.run())
    there = Room(engine, clock, model, address)
    try:
        async with asyncio.timeout(HANG_S):
            yield there
    finally:
        await there.close()
        await server.stop(None)
        loop.cancel()
        await asyncio.gather(loop, return_exceptions=True)


def run(folder: Path, test: Callable[[Room], Awaitable[None]], **settings: Any) -> None:
    """Play one test. Who plays an executor beats when it is to, and is not taken for silent unless that is tested."""
    settings = {"suspect_s": HANG_S, "silence_s": HANG_S, **settings}

    async def main() -> None:
        async with room(folder, **settings) as there:
            await test(there)

    asyncio.run(main())


def test_an_executor_that_falls_silent_is_given_up(tmp_path: Path) -> None:
    async def test(room: Room) -> None:
        silent = room.dial()
        await silent.hello(bytes(16))
        end = await silent.ending()
        assert end.code() is grpc.StatusCode.UNAVAILABLE
        assert end.details() == "nothing heard for 0.05 s"
        await room.until(lambda: not room.core.sessions)
        assert room.core.counters.unclean_ends == 1

    run(tmp_path, test, silence_s=0.05)


def test_an_executor_that_is_quiet_gets_nothing_until_it_speaks_again(tmp_path: Path) -> None:
    async def test(room: Room) -> None:
        quiet = room.dial()
        await quiet.hello(bytes(16))
        await room.until(lambda: any(session.silent for session in room.core.sessions))
        room.submit(1, 2, 3)
        await asyncio.sleep(0)
        assert not room.core.sessions[0].outstanding
        await quiet.beat()
        await quiet.plan()
        assert not room.core.sessions[0].silent

    run(tmp_path, test, suspect_s=0.05)


def test_time_in_which_the_scheduler_stood_still_is_nobodys_silence(tmp_path: Path) -> None:
    async def test(room: Room) -> None:
        executor = room.dial()
        await executor.hello(bytes(16))
        for tick in range(3):
            await executor.beat(tick)
            await asyncio.sleep(0.05)
            time.sleep(1.0)  # noqa: ASYNC251 - the scheduler's own loop: it reads nothing meanwhile
        assert len(room.core.sessions) == 1

    run(tmp_path, test, silence_s=0.8, suspect_s=0.7)


def test_a_scheduler_without_plans_says_that_it_lives(tmp_path: Path) -> None:
    async def test(room: Room) -> None:
        executor = room.dial()
        welcome = await executor.hello(bytes(16))
        assert welcome.lease_ms == 500
        for _ in range(3):
            assert (await executor.hear()).HasField("ping")

    run(tmp_path, test, lease_s=0.5)


def test_a_step_that_fails_is_told_and_accuses_the_requests_in_it(tmp_path: Path) -> None:
    async def test(room: Room) -> None:
        executor = room.dial()
        await executor.hello(bytes(16))
        room.submit(1, 2, 3)
        plan = await executor.plan()
        await executor.say(fault=pb.Fault(session=executor.session, step=plan.step, what="MemoryError\n"))
        end = await executor.ending()
        assert end.code() is grpc.StatusCode.UNAVAILABLE
        assert end.details() == "step 0 failed: something that cannot be printed"
        assert (room.core.num_suspects, room.core.counters.suspected) == (1, 1)

    run(tmp_path, test)


def test_a_fault_of_another_session_means_nothing(tmp_path: Path) -> None:
    async def test(room: Room) -> None:
        executor = room.dial()
        await executor.hello(bytes(16))
        await executor.say(fault=pb.Fault(session=7, step=0, what="Bug"))
        stream = room.submit(1, 2, 3, max_tokens=1)
        await executor.answer(await executor.plan())
        assert [event.tokens for event in await stream.take()] == [[3]]

    run(tmp_path, test)


def test_a_step_is_given_up_when_it_takes_far_longer_than_others_like_it(tmp_path: Path) -> None:
    async def test(room: Room) -> None:
        executor = room.dial()
        await executor.hello(bytes(16))
        room.submit(1, 2, 3, max_tokens=30)
        for _ in range(20):
            plan = await executor.plan()
            room.clock.now_s += 0.1
            await executor.answer(plan)
        plan = await executor.plan()
        await executor.beat(computing=True, step=plan.step, step_ms=1500)
        await executor.beat(computing=True, step=plan.step, step_ms=2500)
        end = await executor.ending()
        assert end.details() == f"the compute thread has been in step {plan.step} for over 2 s"
        assert room.core.counters.suspected == 1

    run(tmp_path, test)


def test_the_first_steps_may_take_as_long_as_any(tmp_path: Path) -> None:
    async def test(room: Room) -> None:
        executor = room.dial()
        await executor.hello(bytes(16))
        stream = room.submit(1, 2, 3, max_tokens=1)
        plan = await executor.plan()
        await executor.beat(computing=True, step=plan.step, step_ms=100_000)
        await executor.answer(plan)
        assert [event.tokens for event in await stream.take()] == [[3]]

    run(tmp_path, test, step_timeout_s=120)


def test_an_executor_that_ticks_and_never_answers_is_given_up(tmp_path: Path) -> None:
    async def test(room: Room) -> None:
        executor = room.dial()
        await executor.hello(bytes(16))
        room.submit(1, 2, 3)
        await executor.plan()
        for tick, seconds in ((1, 0), (2, 181)):
            room.clock.now_s += seconds
            await executor.beat(tick)
        assert (await executor.ending()).details() == "step 0 was not answered for over 180 s"

    run(tmp_path, test, step_timeout_s=120, silence_s=60)


def test_answers_that_arrived_before_the_link_broke_count(tmp_path: Path) -> None:
    async def test(room: Room) -> None:
        executor = room.dial()
        await executor.hello(bytes(16))
        stream = room.submit(1, 2, 3, max_tokens=3)
        plan = await executor.plan()
        room.engine.answered(1, execute(executor.runner, plan))
        room.engine.lose(1)
        assert stream.sequences[0].num_output == 1
        assert room.core.counters.results_fenced == 0

    run(tmp_path, test)


def test_a_process_that_dials_again_is_served_at_once_and_its_old_link_is_lost(tmp_path: Path) -> None:
    async def test(room: Room) -> None:
        old, new = room.dial(), room.dial()
        await old.hello(b"a" * 16)
        stream = room.submit(1, 2, 3, max_tokens=1)
        await old.plan()
        await new.hello(b"a" * 16)
        await room.until(lambda: [session.id for session in room.core.sessions] == [new.session])
        await new.answer(await new.plan())
        assert [event.tokens for event in await stream.take()] == [[3]]
        assert (await old.ending()).details() == "the same process dialled again"
        assert room.core.num_suspects == 0, "the process lives: no request killed it"

    run(tmp_path, test, silence_s=60)


def test_a_link_that_broke_accuses_nobody_once_its_process_dials_again(tmp_path: Path) -> None:
    async def test(room: Room) -> None:
        first = room.dial()
        await first.hello(b"a" * 16)
        room.submit(1, 2, 3)
        await first.plan()
        first.cut()
        await room.until(lambda: not room.core.sessions)
        assert room.core.num_suspects == 1
        await room.dial().hello(b"a" * 16)  # that it is welcomed says that it is known
        assert room.core.num_suspects == 0

    run(tmp_path, test)


def test_a_new_process_of_the_name_acquits_nobody(tmp_path: Path) -> None:
    async def test(room: Room) -> None:
        first = room.dial()
        await first.hello(b"a" * 16)
        room.submit(1, 2, 3)
        await first.plan()
        first.cut()
        await room.until(lambda: not room.core.sessions)
        await room.dial().hello(b"b" * 16)
        assert room.core.num_suspects == 1

    run(tmp_path, test)


def test_a_second_executor_of_a_name_waits_for_the_end_of_the_first(tmp_path: Path) -> None:
    async def test(room: Room) -> None:
        first, second = room.dial("same"), room.dial("same")
        await first.hello(b"a" * 16)
        await room.until(lambda: len(room.core.sessions) == 1)
        with pytest.raises(aio.AioRpcError) as refusal:
            await second.hello(b"b" * 16)
        assert refusal.value.code() is grpc.StatusCode.ALREADY_EXISTS
        assert "--name" in (refusal.value.details() or "")
        assert [session.id for session in room.core.sessions] == [first.session]
        first.cut()
        await room.until(lambda: not room.core.sessions)
        await room.dial("same").hello(b"b" * 16)

    run(tmp_path, test)


def test_a_scheduler_that_was_replaced_does_not_take_its_executors_back(tmp_path: Path) -> None:
    async def test(room: Room) -> None:
        assert (await room.dial("one").hello(b"a" * 16)).epoch == 100
        with pytest.raises(aio.AioRpcError) as refusal:
            await room.dial("two").hello(b"b" * 16, last_epoch=101)
        assert refusal.value.code() is grpc.StatusCode.ABORTED
        assert (await room.dial("three").hello(b"c" * 16, last_epoch=99)).epoch == 100

    run(tmp_path, test, epoch=100)


def test_one_that_stood_still_while_it_was_replaced_is_not_the_later_one_though_nobody_knows_it(tmp_path: Path) -> None:
    clock = Clock()

    async def test(room: Room) -> None:
        clock.now_s += 10
        with pytest.raises(aio.AioRpcError) as refusal:
            await room.dial("one").hello(b"a" * 16, last_epoch=500, last_epoch_age_s=9)
        assert refusal.value.code() is grpc.StatusCode.ABORTED
        assert (await room.dial("two").hello(b"b" * 16)).epoch == 100

    run(tmp_path, test, epoch=100, clock=clock)


def test_a_scheduler_that_begins_when_its_clock_went_back_is_still_the_later_one(tmp_path: Path) -> None:
    clock = Clock()

    async def test(room: Room) -> None:
        clock.now_s += 8
        welcome = await room.dial("new").hello(b"n" * 16)
        assert (welcome.epoch, welcome.age_ms) == (100, 8000)
        assert (await room.dial("one").hello(b"a" * 16, last_epoch=500, last_epoch_age_s=9)).epoch == 501
        assert (await room.dial("two").hello(b"b" * 16, last_epoch=500, last_epoch_age_s=9)).epoch == 501

    run(tmp_path, test, epoch=100, clock=clock)


def test_an_epoch_that_leaves_room_for_no_later_one_is_refused(tmp_path: Path) -> None:
    async def test(room: Room) -> None:
        with pytest.raises(aio.AioRpcError) as refusal:
            await room.dial().hello(bytes(16), last_epoch=2**64 - 1, last_epoch_age_s=3600)
        assert refusal.value.code() is grpc.StatusCode.INVALID_ARGUMENT

    run(tmp_path, test)


def test_a_result_of_another_session_is_dropped_and_counted(tmp_path: Path) -> None:
    async def test(room: Room) -> None:
        executor = room.dial()
        await executor.hello(bytes(16))
        stream = room.submit(1, 2, 3, max_tokens=1)
        plan = await executor.plan()
        result = execute(executor.runner, plan)
        await executor.say(result=codec_link.result_to_pb(result, executor.session + 7))
        await executor.say(result=codec_link.result_to_pb(result, executor.session))
        assert [event.tokens for event in await stream.take()] == [[3]]
        assert (room.core.counters.results_fenced, room.core.counters.rows_dropped) == (1, 1)

    run(tmp_path, test)


def test_a_wrong_answer_ends_the_link_and_accuses_no_request(tmp_path: Path) -> None:
    async def test(room: Room) -> None:
        executor = room.dial()
        await executor.hello(bytes(16))
        room.submit(1, 2, 3)
        plan = await executor.plan()
        await executor.answer(plan)
        await executor.say(result=pb.StepResult(session=executor.session, step=plan.step))
        assert (await executor.ending()).code() is grpc.StatusCode.OK
        await room.until(lambda: not room.core.sessions)
        assert (room.core.num_suspects, room.core.counters.unclean_ends) == (0, 1)
        await room.dial().hello(bytes(16))
        await room.until(lambda: bool(room.core.sessions))
        assert room.core.sessions[0].reputation.young_deaths == 1, "that it lives is no excuse"

    run(tmp_path, test)


def test_a_message_that_is_none_ends_the_link_and_accuses_no_request(tmp_path: Path) -> None:
    async def test(room: Room) -> None:
        executor = room.dial()
        await executor.hello(bytes(16))
        room.submit(1, 2, 3)
        plan = await executor.plan()
        await executor.say(result=pb.StepResult(session=executor.session, step=plan.step, refs=b"abc"))
        assert (await executor.ending()).code() is grpc.StatusCode.INVALID_ARGUMENT
        assert (room.core.num_suspects, room.core.counters.unclean_ends) == (0, 1)

    run(tmp_path, test)


def test_an_executor_that_leaves_ends_cleanly(tmp_path: Path) -> None:
    async def test(room: Room) -> None:
        executor = room.dial()
        await executor.hello(bytes(16))
        await executor.say(leave=pb.Leave(reason="maintenance"))
        assert (await executor.ending()).code() is grpc.StatusCode.OK
        assert room.core.counters.unclean_ends == 0

    run(tmp_path, test)


def test_an_executor_whose_grace_is_over_before_its_work_ends_cleanly_and_accuses_nobody(tmp_path: Path) -> None:
    async def test(room: Room) -> None:
        executor = room.dial()
        await executor.hello(bytes(16))
        stream = room.submit(1, 2, 3, max_tokens=9)
        await executor.answer(await executor.plan())
        await executor.plan()
        await executor.say(leave=pb.Leave(reason="maintenance"))
        await room.until(lambda: room.core.sessions[0].leaving)
        executor.cut()
        await room.until(lambda: not room.core.sessions)
        counters = room.core.counters
        assert (counters.unclean_ends, counters.suspected, counters.moved) == (0, 0, 1)

        other = room.dial("other")
        await other.hello(bytes(range(16)))

        async def work() -> None:
            while True:
                await other.answer(await other.plan())

        working = asyncio.create_task(work())
        tokens: list[int] = []
        while stream.is_open:
            tokens += [token for event in await stream.take() for token in event.tokens]
        assert tokens == list(range(3, 12))
        working.cancel()

    run(tmp_path, test)
