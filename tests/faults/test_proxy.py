"""The proxy that breaks networks: what passes arrives whole and in order, and what must not pass does not."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from tests.faults.proxy import Proxy

WORDS = bytes(range(256)) * 400


class Ends(NamedTuple):
    """Both ends of one connection through the proxy."""

    proxy: Proxy
    near: tuple[asyncio.StreamReader, asyncio.StreamWriter]
    far: tuple[asyncio.StreamReader, asyncio.StreamWriter]
    arrived: asyncio.Queue[tuple[asyncio.StreamReader, asyncio.StreamWriter]]  # far ends of those that are made later


@asynccontextmanager
async def connected() -> AsyncIterator[Ends]:
    arrived: asyncio.Queue[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = asyncio.Queue()
    server = await asyncio.start_server(lambda *far: arrived.put_nowait(far), "127.0.0.1", 0)
    async with server, Proxy(f"127.0.0.1:{server.sockets[0].getsockname()[1]}") as proxy:
        near = await asyncio.open_connection("127.0.0.1", int(proxy.address.rpartition(":")[2]))
        far = await arrived.get()
        yield Ends(proxy, near, far, arrived)
        for _, writer in (near, far):
            writer.close()


def run(scenario: Coroutine[Any, Any, None]) -> None:
    async def bounded() -> None:
        async with asyncio.timeout(120):
            await scenario

    asyncio.run(bounded())


def test_bytes_pass_both_ways_and_so_does_their_end() -> None:
    async def scenario() -> None:
        async with connected() as (proxy, near, far, _):
            near[1].write(WORDS)
            near[1].write_eof()
            assert await far[0].read(-1) == WORDS
            far[1].write(WORDS[:1000])
            far[1].write_eof()
            assert await near[0].read(-1) == WORDS[:1000]
            assert (proxy.bytes_up, proxy.bytes_down, proxy.num_accepted) == (len(WORDS), 1000, 1)

    run(scenario())


def test_what_a_dark_network_swallows_arrives_when_it_has_healed() -> None:
    async def scenario() -> None:
        async with connected() as (proxy, near, far, _):
            proxy.blackhole()
            near[1].write(b"up")
            far[1].write(b"down")
            # A chance to pass where it must not: nothing tells the end of nothing.
            for reader in (near[0], far[0]):
                with pytest.raises(TimeoutError):
                    await asyncio.wait_for(reader.read(1), 0.05)
            proxy.heal()
            assert await far[0].readexactly(2) == b"up"
            assert await near[0].readexactly(4) == b"down"

    run(scenario())


def test_one_direction_can_be_dark_alone() -> None:
    async def scenario() -> None:
        async with connected() as (proxy, near, far, _):
            proxy.blackhole(down=False)
            far[1].write(b"down")
            assert await near[0].readexactly(4) == b"down"
            near[1].write(b"up")
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(far[0].read(1), 0.05)
            assert proxy.bytes_up == 0

    run(scenario())


def test_the_end_of_a_connection_does_not_pass_in_the_dark_either() -> None:
    async def scenario() -> None:
        async with connected() as (proxy, near, far, _):
            proxy.blackhole()
            near[1].transport.abort()
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(far[0].read(1), 0.05)
            proxy.heal()
            assert await far[0].read(-1) == b""

    run(scenario())


def test_both_ends_hear_a_reset_and_another_connection_can_be_made() -> None:
    async def scenario() -> None:
        async with connected() as (proxy, near, far, arrived):
            proxy.reset()
            for reader in (near[0], far[0]):
                with pytest.raises(ConnectionResetError):
                    await reader.read(1)
            _, again = await asyncio.open_connection("127.0.0.1", int(proxy.address.rpartition(":")[2]))
            reader, other = await arrived.get()
            again.write(b"again")
            assert await reader.readexactly(5) == b"again"
            other.close()
            again.close()

    run(scenario())


def test_what_is_to_happen_amid_an_answer_happens_at_its_byte() -> None:
    async def scenario() -> None:
        async with connected() as (proxy, near, far, _):
            proxy.after(1000, proxy.blackhole)
            far[1].write(WORDS[:600])
            far[1].write(WORDS[600:])
            assert await near[0].readexactly(1000) == WORDS[:1000]
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(near[0].read(1), 0.05)
            assert proxy.bytes_down == 1000
            proxy.heal()
            assert await near[0].readexactly(len(WORDS) - 1000) == WORDS[1000:]

    run(scenario())


def test_late_bytes_keep_their_order() -> None:
    async def scenario() -> None:
        async with connected() as (proxy, near, far, _):
            proxy.delay(0.05, 0.05)
            began_s = time.monotonic()
            for at in range(0, len(WORDS), 5000):
                near[1].write(WORDS[at : at + 5000])
                await asyncio.sleep(0)
            assert await far[0].readexactly(len(WORDS)) == WORDS
            assert time.monotonic() - began_s >= 0.05

    run(scenario())


def test_a_slow_network_takes_its_time() -> None:
    async def scenario() -> None:
        async with connected() as (proxy, near, far, _):
            proxy.throttle(50_000)
            began_s = time.monotonic()
            near[1].write(WORDS[:20_000])
            assert await far[0].readexactly(20_000) == WORDS[:20_000]
            assert time.monotonic() - began_s >= 0.3
            near[1].write(WORDS)
            proxy.heal()
            assert await far[0].readexactly(len(WORDS)) == WORDS

    run(scenario())


def test_where_nobody_listens_the_connection_is_reset(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with Proxy(f"unix:{tmp_path}/nobody") as proxy:
            reader, writer = await asyncio.open_connection("127.0.0.1", int(proxy.address.rpartition(":")[2]))
            with pytest.raises(ConnectionResetError):
                await reader.read(1)
            writer.close()

    run(scenario())
