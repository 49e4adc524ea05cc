"""Ending a call from outside, at every point of its life."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import pytest

from common.errors import PagewireError, Unauthenticated
from services.caller import ANONYMOUS
from services.open_call import OpenCall
from tests.services.served import HANG_S

ENDED = Unauthenticated("ended")


def ending(live: Callable[[OpenCall], Awaitable[None]], *, end: Callable[[OpenCall], None]) -> list[str]:
    """How a call ends that lives so and is ended by another task meanwhile."""
    ends: list[str] = []

    async def scenario() -> None:
        started = asyncio.Event()

        def meanwhile(call: OpenCall) -> None:
            end(call)
            started.set()

        async def task() -> None:
            this = asyncio.current_task()
            assert this is not None
            call = OpenCall(ANONYMOUS, this)
            asyncio.get_running_loop().call_soon(meanwhile, call)
            try:
                await live(call)
                ends.append("well")
            except PagewireError as error:
                ends.append(str(error))
            except asyncio.CancelledError as error:
                ends.append(f"cancelled: {error.args[0]}")

        async with asyncio.timeout(HANG_S):
            await asyncio.create_task(task())
            await started.wait()

    asyncio.run(scenario())
    return ends


async def turns(count: int = 5) -> None:
    for _ in range(count):
        await asyncio.sleep(0)


def end(call: OpenCall) -> None:
    call.end(ENDED)


def test_before_it_begins_it_is_not_cancelled_and_does_not_begin() -> None:
    async def live(call: OpenCall) -> None:
        await turns()
        call.begin()

    assert ending(live, end=end) == ["ended"]


def test_while_it_works_it_is_cancelled_with_its_error() -> None:
    async def live(call: OpenCall) -> None:
        call.begin()
        await turns()

    assert ending(live, end=end) == ["cancelled: ended"]


def test_what_must_not_be_disturbed_is_done_first() -> None:
    done: list[bool] = []

    async def write() -> None:
        await turns()
        done.append(True)

    async def live(call: OpenCall) -> None:
        call.begin()
        await call.undisturbed(write())

    assert ending(live, end=end) == ["ended"]
    assert done == [True]


@pytest.mark.parametrize("num_writes", [1, 3])
def test_whom_nobody_ends_ends_well(num_writes: int) -> None:
    async def live(call: OpenCall) -> None:
        call.begin()
        for _ in range(num_writes):
            await call.undisturbed(turns())

    assert ending(live, end=lambda call: None) == ["well"]
