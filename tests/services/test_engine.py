"""The loop with fake executors at the end of its links: no socket, no process."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from common.errors import DeadlineExceeded, Overloaded, RequestFailed, Unavailable
from common.sampling import SamplingParams, StopConditions
from common.step import StepPlan
from common.tenant import TenantLimits
from common.types import FinishReason
from executor.fake_runner import FakeRunner
from executor.runner import execute
from scheduler.scheduler import Scheduler, SchedulerLimits
from scheduler.sequence import Begun
from services import engine as engine_module
from services.admission import Admission, AdmissionLimits
from services.engine import Engine
from services.request_stream import RequestStream
from tests.services.instant_link import InstantLink
from tests.services.served import HANG_S

GREEDY = SamplingParams(temperature=0.0)
_LONG_NS = 10_000 * 1_000_000_000


def run(test: Callable[[Engine], Awaitable[None]], *, limits: SchedulerLimits | None = None, **settings: Any) -> None:
    """Run a test beside the engine's loop."""

    async def main() -> None:
        core = Scheduler(limits or SchedulerLimits(), model="fake", eos=set(), secret=b"test")
        engine = Engine(core, **settings)
        loop = asyncio.create_task(engine.run())
        async with asyncio.timeout(HANG_S):
            await test(engine)
        loop.cancel()
        await asyncio.gather(loop, return_exceptions=True)

    asyncio.run(main())


def join(engine: Engine, session: int = 1, **settings: Any) -> InstantLink:
    link = InstantLink(engine, session, **settings)
    engine.join(session, link.facts, link)
    return link


def standing() -> int:
    """The time of an engine whose timers end requests, and which finds none too late before that."""
    return 1_000_000_000


async def read(stream: RequestStream) -> dict[int, list[int]]:
    tokens: dict[int, list[int]] = {}
    while stream.is_open:
        for event in await stream.take():
            tokens.setdefault(event.choice, []).extend(event.tokens)
    return tokens


def test_a_request_receives_its_tokens_and_its_end() -> None:
    async def test(engine: Engine) -> None:
        join(engine)
        stream = engine.submit([1, 2, 3], GREEDY, StopConditions(max_tokens=4))
        assert await read(stream) == {0: [3, 4, 5, 6]}
        assert stream.sequences[0].reason is FinishReason.LENGTH
        assert engine.num_requests == 0

    run(test)


def test_choices_arrive_in_one_stream() -> None:
    async def test(engine: Engine) -> None:
        join(engine)
        stream = engine.submit([1, 2, 3], GREEDY, StopConditions(max_tokens=2), choices=3)
        assert await read(stream) == {0: [3, 4], 1: [3, 4], 2: [3, 4]}

    run(test)


def test_a_request_waits_for_an_executor_to_join() -> None:
    async def test(engine: Engine) -> None:
        stream = engine.submit([1, 2, 3], GREEDY, StopConditions(max_tokens=2))
        reading = asyncio.create_task(read(stream))
        await asyncio.sleep(0)
        join(engine)
        assert await reading == {0: [3, 4]}

    run(test)


def test_without_an_executor_a_request_gives_up_after_its_wait() -> None:
    async def test(engine: Engine) -> None:
        stream = engine.submit([1, 2, 3], GREEDY, StopConditions(max_tokens=2))
        with pytest.raises(Unavailable, match="no executor is connected"):
            await read(stream)
        assert engine.num_requests == 0

    run(test, executor_wait_s=0.01)


def test_closing_a_stream_frees_its_blocks_with_the_step_in_flight() -> None:
    async def test(engine: Engine) -> None:
        link = join(engine, steps=1)
        stream = engine.submit([1] * 9, GREEDY, StopConditions(max_tokens=50))
        await stream.take()
        pool = engine.scheduler.session(1).pool
        assert pool.num_free < 32
        stream.close()
        link.allow(2)
        await engine.idle()
        while engine.scheduler.session(1).outstanding:
            await asyncio.sleep(0)
        assert pool.num_free == 32

    run(test)


def test_a_reader_that_is_slow_gets_everything_in_fewer_events() -> None:
    async def test(engine: Engine) -> None:
        join(engine)
        stream = engine.submit([1, 2, 3], GREEDY, StopConditions(max_tokens=9))
        await engine.idle()
        events = await stream.take()
        assert [e.tokens for e in events] == [[3, 4, 5, 6, 7, 8, 9, 10, 11]]

    run(test)


def test_a_reader_that_fell_behind_takes_no_more_at_once_than_a_message_may_have() -> None:
    async def test(engine: Engine) -> None:
        join(engine)
        scored = SamplingParams(temperature=0.0, logprobs=0)
        stream = engine.submit([1, 2, 3], scored, StopConditions(max_tokens=9), choices=2)
        await engine.idle()
        taken = [await stream.take() for _ in range(3)]

        assert not stream.is_open
        for choice in range(2):
            events = [event for events in taken for event in events if event.choice == choice]
            assert [event.tokens for event in events] == [[3, 4, 5, 6], [7, 8, 9, 10], [11]]
            assert [event.reason for event in events] == [FinishReason.NONE, FinishReason.NONE, FinishReason.LENGTH]
            assert [len(event.logprobs) for event in events] == [4, 4, 1]

    run(test, max_chunk_tokens=4)


def test_what_a_reader_has_not_taken_comes_before_the_error_that_ends_its_request() -> None:
    async def test(engine: Engine) -> None:
        join(engine, steps=5)
        stream = engine.submit([1, 2, 3], GREEDY, StopConditions(max_tokens=9))
        while stream.sequences[0].num_output < 5:
            await asyncio.sleep(0)
        engine.fail_all(Unavailable("gone"))
        taken = [await stream.take() for _ in range(3)]
        assert [event.tokens for events in taken for event in events] == [[3, 4], [5, 6], [7]]
        with pytest.raises(Unavailable):
            await stream.take()

    run(test, max_chunk_tokens=2)


def test_a_choice_that_its_reader_ends_has_nothing_left_to_take() -> None:
    async def test(engine: Engine) -> None:
        join(engine)
        stream = engine.submit([1, 2, 3], GREEDY, StopConditions(max_tokens=9))
        await engine.idle()
        await stream.take()
        stream.end_choice(0, FinishReason.STOP_STRING)
        assert not stream.is_open

    run(test, max_chunk_tokens=4)


def test_the_next_plan_is_sent_before_any_reader_hears_of_a_result() -> None:
    async def test(engine: Engine) -> None:
        link = join(engine, steps=1)
        happened: list[str] = []
        streams = [engine.submit([1, 2, 3], GREEDY, StopConditions(max_tokens=9)) for _ in range(3)]

        async def hear(stream: RequestStream) -> None:
            await stream.take()
            happened.append("token")

        send = link.send

        def send_and_tell(plan: StepPlan) -> None:
            happened.append("plan")
            send(plan)

        link.send = send_and_tell  # type: ignore[method-assign]
        await asyncio.gather(*(hear(stream) for stream in streams))
        assert happened == ["plan", "plan", "plan", "token", "token", "token"], "two for the credit, one for the result"

    run(test)


def test_an_executor_has_its_next_plan_whenever_it_ends_a_step() -> None:
    async def test(engine: Engine) -> None:
        link = join(engine, steps=0, num_blocks=1024)
        streams = [engine.submit([1, 2, 3], GREEDY, StopConditions(max_tokens=20)) for _ in range(40)]
        readers = [asyncio.create_task(read(stream)) for stream in streams]
        await asyncio.sleep(0)
        for _ in range(18):
            assert len(link.held) == 2, "one that it ends now, one that it goes on with"
            link.allow(1)
            await asyncio.sleep(0)  # one turn of the loop, and of the readers
        link.allow(2)
        assert await asyncio.gather(*readers) == [{0: list(range(3, 23))}] * 40

    run(test)


def test_results_are_seen_between_the_turns_of_many_readers() -> None:
    async def test(engine: Engine) -> None:
        link = join(engine, steps=1, num_blocks=1024)
        streams = [engine.submit([1, 2, 3], GREEDY, StopConditions(max_tokens=9)) for _ in range(60)]
        heard: list[list[int]] = []

        async def hear(stream: RequestStream) -> None:
            (event,) = await stream.take()
            heard.append(event.tokens)
            if len(heard) == 1:
                link.allow(1)

        await asyncio.gather(*(hear(stream) for stream in streams))
        assert heard[0] == [3]
        assert heard[-1] == [3, 4], "its second token came before its turn, and shares the first one's event"

    run(test)


def test_readers_that_all_come_back_at_once_line_up_behind_the_next_plan() -> None:
    async def test(engine: Engine) -> None:
        link = join(engine, steps=1, num_blocks=1024)
        streams = [engine.submit([1, 2, 3], GREEDY, StopConditions(max_tokens=9)) for _ in range(60)]
        written = asyncio.Event()
        writing: list[RequestStream] = []
        taken: list[list[int]] = []
        taken_before_plan = 0

        async def hear(stream: RequestStream) -> None:
            await stream.take()
            writing.append(stream)
            await written.wait()
            (event,) = await stream.take()
            taken.append(event.tokens)
            if len(taken) == 1:
                link.allow(1)

        def send(plan: StepPlan) -> None:
            nonlocal taken_before_plan
            taken_before_plan = len(taken)

        readers = [asyncio.create_task(hear(stream)) for stream in streams]
        while len(writing) < len(streams):
            await asyncio.sleep(0)
        link.allow(1)
        while any(stream.sequences[0].num_output < 2 for stream in streams):
            await asyncio.sleep(0)
        link.send = send  # type: ignore[method-assign]
        written.set()
        await asyncio.gather(*readers)
        assert 1 <= taken_before_plan <= 2 * engine_module.READERS_AT_ONCE
        assert taken[0] == [4], "it came back first, and takes what is there"
        assert taken[-1] == [4, 5], "the token that came before its turn is in the same event"

    run(test)


def test_a_first_token_is_heard_before_the_next_ones_of_who_has_begun() -> None:
    """Also where its row is the last of the step, as that of a new request is."""

    async def test(engine: Engine) -> None:
        link = join(engine, steps=1, num_blocks=1024)
        begun = [engine.submit([1, 2, 3], GREEDY, StopConditions(max_tokens=9)) for _ in range(30)]
        for stream in begun:
            await stream.take()
        new = engine.submit([1, 2, 3], GREEDY, StopConditions(max_tokens=9))
        link.allow(2)  # those that were on their way without it
        while any(stream.sequences[0].num_output < 3 for stream in begun):
            await asyncio.sleep(0)
        for stream in begun:
            await stream.take()
        heard: list[RequestStream] = []

        async def hear(stream: RequestStream) -> None:
            await stream.take()
            heard.append(stream)

        readers = [asyncio.create_task(hear(stream)) for stream in (*begun, new)]
        await asyncio.sleep(0)
        assert not heard
        link.allow(1)
        await asyncio.gather(*readers)
        assert heard.index(new) < engine_module.READERS_AT_ONCE, "it goes with the first that are woken"

    run(test)


def test_a_crowd_of_first_tokens_leaves_places_to_who_has_begun() -> None:
    async def test(engine: Engine) -> None:
        link = join(engine, steps=1, num_blocks=1024)
        begun = engine.submit([1, 2, 3], GREEDY, StopConditions(max_tokens=9))
        await begun.take()
        others = [engine.submit([1, 2, 3], GREEDY, StopConditions(max_tokens=1)) for _ in range(60)]
        link.allow(2)
        while begun.sequences[0].num_output < 3:
            await asyncio.sleep(0)
        await begun.take()
        heard: list[RequestStream] = []

        async def hear(stream: RequestStream) -> None:
            await stream.take()
            heard.append(stream)

        readers = [asyncio.create_task(hear(stream)) for stream in (*others, begun)]
        await asyncio.sleep(0)
        link.allow(1)
        await asyncio.gather(*readers)
        assert heard.index(begun) == engine_module.FIRST_AT_ONCE

    run(test)


def test_who_comes_back_to_a_stream_that_he_heard_before_is_no_first_reader() -> None:
    async def test(engine: Engine) -> None:
        join(engine, steps=0)
        stream = engine.submit([1, 2, 3], GREEDY, StopConditions(max_tokens=9))
        assert not stream.has_begun
        assert not engine.attach(stream, {0: 0}).has_begun
        assert engine.attach(stream, {0: 2}).has_begun

    run(test)


def test_who_gives_up_in_the_line_of_first_tokens_leaves_it_to_the_others() -> None:
    async def test(engine: Engine) -> None:
        link = join(engine, steps=0, num_blocks=1024)
        streams = [
            engine.submit([1, 2, 3], GREEDY, StopConditions(max_tokens=1))
            for _ in range(3 * engine_module.READERS_AT_ONCE)
        ]
        readers = [asyncio.create_task(stream.take()) for stream in streams]
        await asyncio.sleep(0)
        link.allow(1)
        while not readers[0].done():
            await asyncio.sleep(0)
        assert not readers[-1].done(), "it stands in the line"
        streams[-1].abort()
        assert [[event.tokens for event in await reader] for reader in readers] == [[[3]]] * len(readers)
        assert engine.num_requests == 0

    run(test)


def test_a_reader_in_the_line_hears_of_a_failure_after_what_is_there() -> None:
    async def test(engine: Engine) -> None:
        link = join(engine, steps=1)
        stream = engine.submit([1, 2, 3], GREEDY, StopConditions(max_tokens=9))
        assert [event.tokens for event in await stream.take()] == [[3]]
        link.allow(1)
        while stream.sequences[0].num_output < 2:
            await asyncio.sleep(0)
        engine.lets_pass = lambda: False  # type: ignore[method-assign]
        reader = asyncio.create_task(stream.take())
        await asyncio.sleep(0)
        stream.fail(Unavailable("over"))
        assert [event.tokens for event in await reader] == [[4]]
        with pytest.raises(Unavailable):
            await stream.take()

    run(test)


async def decode(engine: Engine, link: InstantLink, *, max_tokens: int = 100) -> RequestStream:
    """A request after so many steps that a plan may be made late: one is in flight, and the next is not made yet."""
    stream = engine.submit([1], GREEDY, StopConditions(max_tokens=max_tokens))
    while stream.sequences[0].num_output < 20 or len(link.held) != 1:
        link.allow(1)
        await asyncio.sleep(0)
    return stream


def test_a_plan_that_is_made_late_is_made_although_nothing_else_happens() -> None:
    async def test(engine: Engine) -> None:
        link = join(engine, steps=0, compute_ns=35_000_000)
        await decode(engine, link)
        while len(link.held) < 2:
            await asyncio.sleep(0)
        assert engine.scheduler.session(1).outstanding[-1].held_since_ns

    run(test)


def test_an_executor_that_holds_its_plan_back_has_one_timer_whoever_comes_and_none_once_it_is_lost(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made: list[asyncio.TimerHandle] = []

    async def test(engine: Engine) -> None:
        loop = asyncio.get_running_loop()
        call_later = loop.call_later

        def watched(delay: float, callback: Any, *args: Any) -> asyncio.TimerHandle:
            made.append(call_later(delay, callback, *args))
            return made[-1]

        await decode(engine, join(engine, steps=0, compute_ns=_LONG_NS))
        monkeypatch.setattr(loop, "call_later", watched)
        before = {handle for handle in loop._scheduled if not handle.cancelled()}  # type: ignore[attr-defined]
        for _ in range(3):
            other = engine.submit([1, 2, 3], GREEDY, StopConditions(max_tokens=1))
            await asyncio.sleep(0)
            other.close()
            await asyncio.sleep(0)
        assert [handle for handle in made if handle.when() > loop.time() + 3600 * 2] == []
        engine.lose(1)
        (timer,) = [handle for handle in before if handle.cancelled() and handle.when() > loop.time() + 3600 * 2]
        assert timer not in made

    run(test)


def test_a_plan_that_waits_for_its_time_is_made_at_once_when_the_executor_has_nothing_left() -> None:
    """Also for who came meanwhile."""

    async def test(engine: Engine) -> None:
        link = join(engine, steps=0, compute_ns=_LONG_NS)
        await decode(engine, link)
        other = engine.submit([1, 2, 3], GREEDY, StopConditions(max_tokens=1))
        for _ in range(10):
            await asyncio.sleep(0)
        assert len(link.held) == 1
        link.allow(1)
        while not link.held:
            await asyncio.sleep(0)
        assert len(link.held[0].refs) == 2
        link.allow(1)
        assert await read(other) == {0: [3]}

    run(test)


def test_nothing_waits_for_the_time_of_a_lost_executor() -> None:
    async def test(engine: Engine) -> None:
        stream = await decode(engine, join(engine, steps=0, compute_ns=_LONG_NS), max_tokens=22)
        engine.lose(1)
        join(engine, 2)
        assert await read(stream) == {0: list(range(1, 23))}

    run(test)


def test_a_lost_executor_is_a_pause_for_the_reader() -> None:
    async def test(engine: Engine) -> None:
        join(engine, 1, steps=3)
        stream = engine.submit([1, 2, 3], GREEDY, StopConditions(max_tokens=8))
        reading = asyncio.create_task(read(stream))
        while stream.sequences[0].num_output < 3:
            await asyncio.sleep(0)
        engine.lose(1)
        join(engine, 2)
        assert await reading == {0: [3, 4, 5, 6, 7, 8, 9, 10]}

    run(test)


def test_an_executor_that_breaks_the_protocol_loses_its_link_not_its_requests() -> None:
    async def test(engine: Engine) -> None:
        first = join(engine, 1, steps=0)
        stream = engine.submit([1, 2, 3], GREEDY, StopConditions(max_tokens=3))
        reading = asyncio.create_task(read(stream))
        while not engine.scheduler.session(1).outstanding:
            await asyncio.sleep(0)
        wrong = execute(FakeRunner(num_blocks=32), StepPlan(step=7, refs=[], num_scheduled=[]))
        engine.answered(1, wrong)
        join(engine, 2)
        assert await reading == {0: [3, 4, 5]}
        assert "step" in first.closed

    run(test)


def test_a_request_that_three_executors_died_with_fails_alone_after_the_tokens_it_has() -> None:
    async def test(engine: Engine) -> None:
        join(engine, 1, steps=2)
        stream = engine.submit([1, 2, 3], GREEDY, StopConditions(max_tokens=8), choices=2)
        while any(s.num_output < 1 for s in stream.sequences.values()):
            await asyncio.sleep(0)
        for session in (1, 2, 3):
            while not engine.scheduler.session(session).outstanding:
                await asyncio.sleep(0)
            engine.lose(session)
            link = join(engine, session + 1, steps=0, name=f"fake-{session}")
        other = engine.submit([1, 2, 3, 4], GREEDY, StopConditions(max_tokens=2))

        assert {event.choice for event in await stream.take()} == {0, 1}
        with pytest.raises(RequestFailed, match="3 executors died") as failure:
            await stream.take()
        assert failure.value.error_id in str(failure.value)
        link.allow(100)
        assert await read(other) == {0: [4, 5]}
        assert engine.num_requests == 0

    run(test)


def test_an_executor_that_is_held_back_is_asked_again_when_its_time_is_over() -> None:
    async def test(engine: Engine) -> None:
        began_ns = time.monotonic_ns()
        for session in (1, 2):
            join(engine, session)
            engine.lose(session)
        join(engine, 3)
        assert engine.scheduler.held_back_ns(began_ns) > 0
        stream = engine.submit([1, 2, 3], GREEDY, StopConditions(max_tokens=2))
        assert await read(stream) == {0: [3, 4]}

    run(test)


@pytest.mark.parametrize("looks", range(1, 8))
def test_an_executor_whose_time_is_over_between_two_looks_at_the_clock_is_asked_again(looks: int) -> None:
    clock = SteppedClock(step_ns=1)

    async def test(engine: Engine) -> None:
        for session in (1, 2):
            join(engine, session)
            engine.lose(session)
        join(engine, 3)
        stream = engine.submit([1, 2, 3], GREEDY, StopConditions(max_tokens=2))
        clock.step_ns = engine.scheduler.held_back_ns(clock.now_ns) // looks  # held at one look, and free at the next
        assert await read(stream) == {0: [3, 4]}

    run(test, clock_ns=clock)


class SteppedClock:
    """It goes on with each look."""

    def __init__(self, *, step_ns: int) -> None:
        self.now_ns, self.step_ns = 0, step_ns

    def __call__(self) -> int:
        self.now_ns += self.step_ns
        return self.now_ns


def test_a_choice_whose_rows_cannot_be_used_ends_alone() -> None:
    async def test(engine: Engine) -> None:
        link = join(engine)
        link.runner = FakeRunner(num_blocks=32, next_token=lambda p: None if p.choice == 1 else p.num_tokens)
        stream = engine.submit([1, 2, 3], GREEDY, StopConditions(max_tokens=2), choices=2)
        assert await read(stream) == {0: [3, 4], 1: []}
        assert [s.reason for s in stream.sequences.values()] == [FinishReason.LENGTH, FinishReason.ERROR]

    run(test)


def test_a_full_queue_refuses_with_a_time_to_come_back() -> None:
    async def test(engine: Engine) -> None:
        engine.submit([1], GREEDY, StopConditions(max_tokens=1))
        engine.submit([1], GREEDY, StopConditions(max_tokens=1))
        with pytest.raises(Overloaded) as refusal:
            engine.submit([1], GREEDY, StopConditions(max_tokens=1))
        assert refusal.value.retry_after_s > 0

    run(test, admission=Admission(AdmissionLimits(max_waiting=2)))


def test_a_request_ends_at_its_deadline_and_frees_its_blocks() -> None:
    async def test(engine: Engine) -> None:
        link = join(engine, steps=2)
        stream = engine.submit(
            [1, 2, 3], GREEDY, StopConditions(max_tokens=50), deadline_ns=engine.deadline_after(time_left_s=0.02)
        )
        with pytest.raises(DeadlineExceeded):
            await read(stream)
        assert engine.num_requests == 0
        link.allow(2)
        while engine.scheduler.session(1).outstanding:
            await asyncio.sleep(0)
        assert engine.scheduler.session(1).pool.num_free == 32

    run(test, clock_ns=standing)


def test_a_request_that_expires_in_the_line_costs_its_executor_nothing() -> None:
    async def test(engine: Engine) -> None:
        stream = engine.submit(
            [1, 2, 3], GREEDY, StopConditions(max_tokens=5), deadline_ns=engine.deadline_after(time_left_s=0.01)
        )
        with pytest.raises(DeadlineExceeded):
            await read(stream)
        link = join(engine)
        assert await read(engine.submit([1, 2], GREEDY, StopConditions(max_tokens=1))) == {0: [2]}
        assert engine.scheduler.session(1).occupancy.num_steps == 1 and not link.held

    run(test, clock_ns=standing)


def test_a_request_that_comes_after_its_deadline_is_not_queued() -> None:
    async def test(engine: Engine) -> None:
        with pytest.raises(DeadlineExceeded):
            engine.submit([1], GREEDY, StopConditions(max_tokens=1), deadline_ns=engine.deadline_after(0.0))
        assert not engine.scheduler.waiting

    run(test)


def test_no_request_takes_longer_than_any_may() -> None:
    async def test(engine: Engine) -> None:
        join(engine, steps=1)
        stream = engine.submit([1], GREEDY, StopConditions(max_tokens=9), deadline_ns=engine.deadline_after(None))
        with pytest.raises(DeadlineExceeded):
            await read(stream)

    run(test, max_request_s=0.02, clock_ns=standing)


def test_a_deadline_does_not_outlive_its_request() -> None:
    async def test(engine: Engine) -> None:
        join(engine)
        stream = engine.submit([1], GREEDY, StopConditions(max_tokens=2), deadline_ns=engine.deadline_after(60))
        assert stream.deadline is not None
        assert await read(stream) == {0: [1, 2]}
        stream.close()
        assert stream.deadline is None

    run(test)


def test_what_a_tenant_used_is_known_when_its_request_ends() -> None:
    async def test(engine: Engine) -> None:
        link = join(engine)
        limits = {"prompt": [1, 2, 3], "sampling": GREEDY, "stop": StopConditions(max_tokens=7), "tenant": "a"}
        await read(engine.submit(**limits))  # type: ignore[arg-type]  # 10 of 20
        link.close("")
        engine.submit(**limits).close()  # type: ignore[arg-type]  # never ran, so it costs nothing
        engine.submit(**limits)  # type: ignore[arg-type]  # the other 10
        with pytest.raises(Overloaded, match="used up"):
            engine.submit(**limits)  # type: ignore[arg-type]
        engine.submit([1], GREEDY, StopConditions(max_tokens=1), tenant="b")
        assert engine.admission.refusals == {"tenant_rate": 1}

    tenants = {"a": TenantLimits(tokens_per_s=0.001, burst_tokens=20)}
    run(test, admission=Admission(tenants=tenants.get))


def test_the_rate_of_the_line_is_seen_while_more_waits_than_runs() -> None:
    async def test(engine: Engine) -> None:
        join(engine, num_blocks=4)
        streams = [engine.submit([1, 2, 3], GREEDY, StopConditions(max_tokens=9)) for _ in range(12)]
        await asyncio.gather(*(read(stream) for stream in streams))
        assert engine.admission.rate.tokens_per_s is not None

    ticks = itertools.count(step=10**8)
    run(test, clock_ns=lambda: next(ticks))


def test_a_draining_engine_finishes_what_it_has_and_takes_nothing_new() -> None:
    async def test(engine: Engine) -> None:
        join(engine)
        stream = engine.submit([1, 2], GREEDY, StopConditions(max_tokens=3))
        engine.drain()
        with pytest.raises(Unavailable):
            engine.submit([1], GREEDY, StopConditions(max_tokens=1))
        assert await read(stream) == {0: [2, 3, 4]}

    run(test)


def test_a_draining_engine_gives_up_at_once_what_no_executor_could_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_module, "_DRAINING_WAIT_S", 0.01)

    async def test(engine: Engine) -> None:
        waiting = engine.submit([1, 2], GREEDY, StopConditions(max_tokens=3))
        engine.drain()
        with pytest.raises(Unavailable, match=r"no executor is connected; waited 0\.01 s"):
            await read(waiting)
        await engine.idle()

    run(test, executor_wait_s=3600)


def test_what_waits_for_an_executor_that_leaves_does_not_hold_up_the_drain(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_module, "_DRAINING_WAIT_S", 0.01)

    async def test(engine: Engine) -> None:
        link = InstantLink(engine, 1, steps=1, runner=FakeRunner(max_sequences=1))
        engine.join(1, link.facts, link)
        running = engine.submit([1, 2, 3], GREEDY, StopConditions(max_tokens=12))
        waiting = engine.submit([4, 5, 6], GREEDY, StopConditions(max_tokens=12))
        while not engine.scheduler.session(1).outstanding:
            await asyncio.sleep(0)
        engine.drain()
        engine.leave(1)
        with pytest.raises(Unavailable):
            await read(waiting)
        link.allow(30)
        assert await read(running) == {0: list(range(3, 15))}
        await engine.idle()

    run(test, executor_wait_s=3600)


def test_an_engine_can_serve_while_an_executor_is_there_that_stays() -> None:
    async def test(engine: Engine) -> None:
        assert not engine.can_serve
        join(engine)
        await engine.executors_changed()
        assert engine.can_serve
        stream = engine.submit([1, 2], GREEDY, StopConditions(max_tokens=30))
        while not engine.scheduler.session(1).running:
            await asyncio.sleep(0)
        engine.leave(1)
        await engine.executors_changed()
        assert not engine.can_serve and engine.scheduler.sessions
        assert len((await read(stream))[0]) == 30

    run(test)


def test_an_executor_that_leaves_is_let_go_when_it_has_nothing_left() -> None:
    async def test(engine: Engine) -> None:
        link = join(engine, steps=1)
        stream = engine.submit([1, 2], GREEDY, StopConditions(max_tokens=3))
        reading = asyncio.create_task(read(stream))
        while not engine.scheduler.session(1).running:
            await asyncio.sleep(0)
        engine.leave(1)
        link.allow(10)
        assert await reading == {0: [2, 3, 4]}
        while not link.closed:
            await asyncio.sleep(0)

    run(test)


def test_an_executor_that_comes_back_ends_the_wait_and_its_clock() -> None:
    async def test(engine: Engine) -> None:
        join(engine, 1, steps=0)
        stream = engine.submit([1, 2, 3], GREEDY, StopConditions(max_tokens=2))
        engine.lose(1)
        assert stream.giving_up is not None
        join(engine, 2)
        assert stream.giving_up is None
        assert await read(stream) == {0: [3, 4]}

    run(test)


@pytest.mark.parametrize("num_silent", [0, 1000])
def test_a_thousand_silent_readers_cost_another_ones_stream_no_step(num_silent: int) -> None:
    async def test(engine: Engine) -> None:
        runner = FakeRunner(num_blocks=20_000, max_sequences=1024, max_step_tokens=4096)
        link = InstantLink(engine, 1, runner=runner)
        engine.join(1, link.facts, link)
        silent = [engine.submit([1, 2, 3], GREEDY, StopConditions(max_tokens=60)) for _ in range(num_silent)]
        while any(not stream.sequences[0].num_output for stream in silent):
            await asyncio.sleep(0)
        before = engine.scheduler.counters.steps
        assert await read(engine.submit([1, 2], GREEDY, StopConditions(max_tokens=8))) == {0: [*range(2, 10)]}
        in_flight = engine.scheduler.sessions[0].facts.credit
        assert 8 <= engine.scheduler.counters.steps - before <= 8 + 2 * in_flight
        assert all(not stream.sequences[0].reason for stream in silent), "all of them ran beside it"

    run(test, limits=SchedulerLimits(max_running=1024, token_budget=4096))


def test_a_stream_that_is_resumed_is_taken_although_the_line_is_full() -> None:
    async def test(engine: Engine) -> None:
        engine.submit([1], GREEDY, StopConditions(max_tokens=5))
        with pytest.raises(Overloaded):
            engine.submit([1], GREEDY, StopConditions(max_tokens=5))
        with pytest.raises(Overloaded):
            engine.submit([1], GREEDY, StopConditions(max_tokens=5), begun={0: Begun((), "")})
        begun = {0: Begun((1, 2), "")}
        stream = engine.submit([1], GREEDY, StopConditions(max_tokens=5), begun=begun)
        with pytest.raises(Overloaded, match="waits to go on; 1 may"):
            engine.submit([1], GREEDY, StopConditions(max_tokens=5), begun=begun)
        join(engine)
        assert await read(stream) == {0: [3, 4, 5]}

    run(test, admission=Admission(AdmissionLimits(max_waiting=1)))


def test_what_a_resumed_stream_had_before_is_not_paid_for_again() -> None:
    async def test(engine: Engine) -> None:
        join(engine)
        ask: dict[str, Any] = {"prompt": [1, 2, 3], "sampling": GREEDY, "stop": StopConditions(max_tokens=7)}
        await read(engine.submit(**ask, begun={0: Begun((3, 4, 5, 6), "")}))  # 3 of 13
        await read(engine.submit(**ask))  # the other 10
        with pytest.raises(Overloaded, match="used up"):
            engine.submit([1], GREEDY, StopConditions(max_tokens=1))
        await read(engine.submit(**ask, begun={0: Begun((3, 4, 5, 6), "")}))  # which stops no stream

    run(test, admission=Admission(default=TenantLimits(tokens_per_s=0.001, burst_tokens=13)))
