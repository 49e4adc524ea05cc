"""Requests that end together are told of a few at a time, and all of them."""

from __future__ import annotations

import asyncio

from scheduler.timeline import Timeline
from services.in_turns import InTurns


def timelines(count: int) -> list[Timeline]:
    return [Timeline(f"r{number}", number, tenant="", max_events=0) for number in range(count)]


def test_the_loop_has_its_turns_between_requests_that_end_together() -> None:
    async def main() -> None:
        told: list[Timeline] = []
        afterwards, ended = InTurns(told.append), timelines(9)
        for each in ended:
            afterwards(each)
        assert not told, "who ends them does not wait"
        most = 0
        while len(afterwards):
            before = len(told)
            await asyncio.sleep(0)
            most = max(most, len(told) - before)
        assert (told, most) == (ended, 2)

    asyncio.run(main())


def test_those_that_wait_at_the_end_are_told_then() -> None:
    async def main() -> None:
        told: list[Timeline] = []
        afterwards, ended = InTurns(told.append), timelines(9)
        for each in ended:
            afterwards(each)
        afterwards.finish()
        assert told == ended

    asyncio.run(main())


def test_one_who_fails_keeps_nobody_from_hearing() -> None:
    async def main() -> None:
        def failing(_: Timeline) -> None:
            raise ValueError("words of a prompt")

        told: list[Timeline] = []
        afterwards, ended = InTurns(failing, told.append), timelines(3)
        for each in ended:
            afterwards(each)
        while len(afterwards):
            await asyncio.sleep(0)
        assert told == ended

    asyncio.run(main())


def test_more_than_can_wait_are_told_at_once() -> None:
    async def main() -> None:
        told: list[Timeline] = []
        afterwards = InTurns(told.append)
        (one,) = timelines(1)
        for _ in range(8200):
            afterwards(one)
        assert len(afterwards) == 8192 and len(told) == 8
        afterwards.finish()

    asyncio.run(main())
