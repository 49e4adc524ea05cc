"""What those see who look on, how often it is taken, and that nothing is taken while nobody looks."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any, cast

import pytest
from google.protobuf.descriptor import Descriptor, FieldDescriptor

from common.errors import InvalidRequest, Overloaded
from executor.fake_runner import position_token
from protos import monitoring_pb2 as pb
from scheduler.scheduler import Scheduler
from services.engine import Engine
from services.live_state import Camera, Watchers, checked_ms
from services.monitoring import Monitoring
from tests.scheduler.world import World
from tests.services.served import HANG_S

SECOND = 1_000_000_000


def camera(world: World) -> Camera:
    monitoring = Monitoring(Engine(world.scheduler))
    return Camera(world.scheduler, monitoring.status, lambda: world.now_ns)


def test_rows_queues_and_blocks_are_those_of_the_scheduler() -> None:
    world = World(max_sequences=1)
    world.add("a", prompt=9, max_tokens=20, tenant="one")
    world.step()
    world.step()
    world.add("b", prompt=5, max_tokens=7, tenant="two")

    state = camera(world).take()

    (executor,) = state.executors
    assert (state.num_executors, executor.status.num_blocks, len(executor.cells)) == (1, 64, 64)
    (row,) = executor.rows
    assert (row.request, row.tenant, row.prompt_tokens, row.output_tokens, row.max_tokens) == (0, "one", 9, 2, 20)
    assert (row.computed_tokens, row.num_blocks, row.cached_prompt_tokens) == (10, 3, 0)
    assert executor.cells.count(pb.BLOCK_STATE_HELD) == 3
    (waiting,) = state.waiting
    assert (waiting.tenant, waiting.num_sequences, waiting.tokens, waiting.begun) == ("two", 1, 12, False)


def test_a_rate_is_what_came_in_the_last_second_and_nothing_when_somebody_begins_to_look() -> None:
    world = World()
    looking = camera(world)
    world.add("a", prompt=4, max_tokens=50)
    for _ in range(10):
        world.step()
    assert looking.take().output_tokens_per_s == 0

    for step in range(1, 5):  # ten tokens in each half of a second
        for _ in range(10):
            world.step()
        world.now_ns = step * SECOND // 2
        assert round(looking.take().output_tokens_per_s) == 20

    looking.forget()
    world.now_ns += 3600 * SECOND
    assert looking.take().output_tokens_per_s == 0


def test_the_time_to_a_first_token_is_that_of_the_last_minute() -> None:
    world = World(max_sequences=8)
    looking = camera(world)
    assert looking.take().first_tokens == pb.FirstTokenTimes()
    for number in range(4):
        world.add(f"r{number}", prompt=4, max_tokens=2)
    world.now_ns += SECOND
    world.run()

    times = looking.take().first_tokens
    assert times.count == 4
    assert times.p50_ns == times.p95_ns == pytest.approx(SECOND, abs=100)

    world.now_ns += 61 * SECOND
    assert looking.take().first_tokens.count == 0


def test_how_many_guesses_are_right_is_told_while_some_are_made() -> None:
    world = World(executors=0)
    world.join(guess=position_token)
    looking = camera(world)
    looking.take()
    world.add("a", prompt=5, max_tokens=8)
    world.run()

    assert looking.take().accepted_ratio == 1
    looking.forget()
    looking.take()
    assert looking.take().accepted_ratio == 0


def test_a_picture_stays_small_however_much_there_is() -> None:
    world = World(executors=0, max_sequences=9, num_blocks=1000)
    for _ in range(66):
        world.join()
    for number in range(90):
        world.add(f"r{number}", prompt=1, tenant=f"tenant {number}")
    world.send(0)

    state = camera(world).take()

    assert (len(state.executors), state.num_executors) == (64, 66)
    assert (len(state.waiting), state.num_queues) == (64, 90 - state.executors[0].status.num_running)
    assert sum(len(each.cells) for each in state.executors) <= 4 * 4096
    assert state.executors[0].blocks_per_cell == 4
    assert state.ByteSize() < 32_000


def test_rows_are_bounded_over_all_executors() -> None:
    world = World(max_sequences=40, num_blocks=1000, token_budget=64)
    for number in range(40):
        world.add(f"r{number}", prompt=1)
    world.send(0)
    for _ in range(63):
        world.join()

    state = camera(world).take()

    assert state.executors[0].status.num_running > 32
    assert [len(each.rows) for each in state.executors] == [2048 // 64] + [0] * 63


def test_a_picture_has_no_place_for_a_word_of_a_prompt() -> None:
    def strings(message: Descriptor) -> Iterator[str]:
        for field in message.fields:
            if field.message_type is not None:
                yield from strings(field.message_type)
            elif field.type in (FieldDescriptor.TYPE_STRING, FieldDescriptor.TYPE_BYTES):
                yield field.full_name.removeprefix("pagewire.v1.")

    assert set(strings(pb.WatchStateResponse.DESCRIPTOR)) == {
        "ExecutorStatus.name",
        "ExecutorStatus.device",
        "ExecutorStatus.dtype",
        "ExecutorState.cells",
        "RowState.tenant",
        "WaitingState.tenant",
        # names of limits and of reasons
        "SchedulerStatus.FinishedSequencesEntry.key",
        "SchedulerStatus.RefusedRequestsEntry.key",
        "PinStatus.TokensByTenantEntry.key",  # left empty
    }


# ---- how often


class Counting(Camera):
    """Counts its pictures, which are empty."""

    def __init__(self) -> None:
        super().__init__(cast("Scheduler", None), pb.GetStatusResponse)
        self.num_taken = 0
        self.num_forgotten = 0

    def take(self) -> pb.WatchStateResponse:
        self.num_taken += 1
        return pb.WatchStateResponse(num_executors=self.num_taken)

    def forget(self) -> None:
        self.num_forgotten += 1


class Clock:
    """Seconds that pass when the test says so."""

    def __init__(self) -> None:
        self.now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


def test_all_who_look_see_one_picture_in_each_interval() -> None:
    counting, clock = Counting(), Clock()
    watchers = Watchers(counting, clock_s=clock)

    async def run() -> None:
        looking = [watchers.watch(500) for _ in range(5)]
        seen = [await anext(each) for each in looking]
        assert [each.num_executors for each in seen] == [1] * 5
        for number in range(2, 6):
            clock.now_s += watchers.due_in_s(0.5)
            assert [watchers.look().num_executors for _ in looking] == [number] * 5
        for each in looking:
            await each.aclose()

    asyncio.run(run())
    assert (counting.num_taken, counting.num_forgotten) == (5, 1)


@pytest.mark.parametrize("early_s", [0, 0.001, -0.004])
def test_a_timer_that_is_not_exact_neither_skips_an_interval_nor_shows_one_twice(early_s: float) -> None:
    counting, clock = Counting(), Clock()
    watchers = Watchers(counting, clock_s=clock)
    watchers._intervals_s[None] = 0.1

    for _ in range(50):
        clock.now_s += watchers.due_in_s(0.1) - early_s
        watchers.look()

    assert counting.num_taken == 50
    assert clock.now_s == pytest.approx(1005, abs=0.01)


def test_the_first_picture_comes_at_once_and_the_next_an_interval_later() -> None:
    async def run() -> None:
        looking = Watchers(Counting()).watch(100)
        async with asyncio.timeout(HANG_S):
            assert [(await anext(looking)).num_executors for _ in range(3)] == [1, 2, 3]
        await looking.aclose()

    asyncio.run(run())


def test_nothing_is_taken_while_nobody_looks() -> None:
    counting = Counting()
    watchers = Watchers(counting)

    async def run() -> None:
        looking = watchers.watch(500)  # not begun
        assert (counting.num_taken, len(watchers)) == (0, 0)
        await looking.aclose()

    asyncio.run(run())
    assert (counting.num_taken, counting.num_forgotten) == (0, 0)


def test_only_so_many_may_look_and_one_who_leaves_makes_room() -> None:
    watchers = Watchers(Counting(), most=2)

    async def run() -> None:
        first, second, third = (watchers.watch(500) for _ in range(3))
        await anext(first)
        await anext(second)
        with pytest.raises(Overloaded, match="2 watch already"):
            await anext(third)
        await first.aclose()
        fourth = watchers.watch(500)
        await anext(fourth)
        assert len(watchers) == 2
        for each in (second, fourth):
            await each.aclose()

    asyncio.run(run())
    assert len(watchers) == 0


@pytest.mark.parametrize("interval_ms", [1, 99, 10_001, 4_000_000_000])
def test_an_interval_that_is_too_short_or_too_long_is_refused(interval_ms: int) -> None:
    with pytest.raises(InvalidRequest, match=r"interval_ms: must be in \[100, 10000\], or 0 for 500, got "):
        checked_ms(interval_ms)


def test_the_method_passes_on_what_is_asked_for() -> None:
    no_context: Any = None

    async def run() -> None:
        monitoring = Monitoring(Engine(World().scheduler))
        states = monitoring.WatchState(pb.WatchStateRequest(), no_context)
        assert (await anext(states)).num_executors == 1
        await states.aclose()
        with pytest.raises(InvalidRequest):
            await anext(monitoring.WatchState(pb.WatchStateRequest(interval_ms=5), no_context))

    asyncio.run(run())
