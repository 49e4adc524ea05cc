"""Health as everybody may ask for it: what it says, and how much of it there is for each."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import grpc
import pytest
from grpc import aio
from grpc_health.v1 import health_pb2 as pb

from common.errors import Overloaded
from services import health
from services.health import Health
from services.status import from_rpc_error
from tests.services.served import HANG_S

SERVING, NOT_SERVING = pb.HealthCheckResponse.SERVING, pb.HealthCheckResponse.NOT_SERVING
UNKNOWN = pb.HealthCheckResponse.SERVICE_UNKNOWN


class Prober:
    """One who asks, over a connection of its own."""

    def __init__(self, channel: aio.Channel) -> None:
        self._channel = channel

    async def check(self, service: str = "") -> int:
        call: aio.UnaryUnaryMultiCallable[bytes, bytes] = self._channel.unary_unary(f"/{health.SERVICE}/Check")
        answer = await call(pb.HealthCheckRequest(service=service).SerializeToString(), timeout=HANG_S)
        return pb.HealthCheckResponse.FromString(answer).status

    async def list(self) -> dict[str, int]:
        call: aio.UnaryUnaryMultiCallable[bytes, bytes] = self._channel.unary_unary(f"/{health.SERVICE}/List")
        answer = await call(b"", timeout=HANG_S)
        told = pb.HealthListResponse.FromString(answer)  # type: ignore[attr-defined]  # its stubs are older
        return {name: answer.status for name, answer in told.statuses.items()}

    def watch(self, service: str = "") -> aio.UnaryStreamCall[bytes, bytes]:
        call: aio.UnaryStreamMultiCallable[bytes, bytes] = self._channel.unary_stream(f"/{health.SERVICE}/Watch")
        return call(pb.HealthCheckRequest(service=service).SerializeToString(), timeout=HANG_S)


async def heard(watch: aio.UnaryStreamCall[bytes, bytes]) -> int:
    """The next status. Raises AioRpcError at the end."""
    data = await watch.read()
    if isinstance(data, bytes):
        return pb.HealthCheckResponse.FromString(data).status
    raise aio.AioRpcError(
        await watch.code(), await watch.initial_metadata(), await watch.trailing_metadata(), await watch.details()
    )


@asynccontextmanager
async def served(service: Health, *more: str) -> AsyncIterator[list[Prober]]:
    """A prober on this host, and one for each address more."""
    async with AsyncExitStack() as stack, asyncio.timeout(HANG_S):
        server = aio.server()
        server.add_generic_rpc_handlers((service.handler(),))
        addresses = [f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}", *more]
        for address in more:
            server.add_insecure_port(address)
        await server.start()
        stack.push_async_callback(server.stop, 0)
        yield [Prober(await stack.enter_async_context(aio.insecure_channel(address))) for address in addresses]


def test_all_services_are_what_the_server_is() -> None:
    async def scenario() -> None:
        service = Health(["a.Service"])
        async with served(service) as (prober,):
            assert [await prober.check(), await prober.check("a.Service")] == [NOT_SERVING, NOT_SERVING]
            service.set_serving(True)
            assert [await prober.check(), await prober.check("a.Service")] == [SERVING, SERVING]
            assert await prober.list() == {"": SERVING, "a.Service": SERVING, health.LIVENESS: SERVING}
            with pytest.raises(aio.AioRpcError) as refused:
                await prober.check("b.Service")
            assert refused.value.code() is grpc.StatusCode.NOT_FOUND

    asyncio.run(scenario())


def test_who_cannot_serve_is_alive_all_the_same() -> None:
    async def scenario() -> None:
        service = Health(["a.Service"])
        async with served(service) as (prober,):
            assert [await prober.check(), await prober.check(health.LIVENESS)] == [NOT_SERVING, SERVING]
            service.shut_down()
            assert [await prober.check(), await prober.check(health.LIVENESS)] == [NOT_SERVING, SERVING]

    asyncio.run(scenario())


def test_a_watcher_hears_what_is_and_what_comes() -> None:
    async def scenario() -> None:
        service = Health(["a.Service"])
        async with served(service) as (prober,):
            watches = [prober.watch(), prober.watch("a.Service")]
            stranger = prober.watch("b.Service")
            assert [await heard(watch) for watch in (*watches, stranger)] == [NOT_SERVING, NOT_SERVING, UNKNOWN]
            watches.pop().cancel()
            for is_serving, status in ((True, SERVING), (False, NOT_SERVING), (True, SERVING)):
                service.set_serving(is_serving)
                assert await heard(watches[0]) == status
            service.shut_down()
            service.set_serving(True)
            assert await heard(watches[0]) == NOT_SERVING == await prober.check()
            service.close()
            with pytest.raises(aio.AioRpcError) as ended:
                await heard(watches[0])
            assert ended.value.code() is grpc.StatusCode.UNAVAILABLE

    asyncio.run(scenario())


def test_a_watcher_hears_the_last_word_also_when_the_end_comes_at_once() -> None:
    async def scenario() -> None:
        service = Health([])
        service.set_serving(True)
        async with served(service) as (prober,):
            watch = prober.watch()
            assert await heard(watch) == SERVING
            service.shut_down()
            service.close()
            assert await heard(watch) == NOT_SERVING
            with pytest.raises(aio.AioRpcError) as ended:
                await heard(watch)
            assert ended.value.code() is grpc.StatusCode.UNAVAILABLE

    asyncio.run(scenario())


def test_watches_are_bounded_and_checks_are_not(tmp_path: Path) -> None:
    async def scenario() -> None:
        service = Health([], max_watches=4)
        async with served(service, f"unix:{tmp_path}/other") as (greedy, other):
            open_watches = [greedy.watch(), greedy.watch()]
            assert [await heard(watch) for watch in open_watches] == [NOT_SERVING] * 2
            with pytest.raises(aio.AioRpcError) as refused:
                await heard(greedy.watch())
            error = from_rpc_error(refused.value)
            assert isinstance(error, Overloaded) and error.retry_after_s > 0

            open_watches.append(other.watch())
            assert await heard(open_watches[-1]) == NOT_SERVING, "one host does not take the room of the next"
            for prober in (greedy, other):
                with pytest.raises(aio.AioRpcError):
                    await heard(prober.watch())
                assert await prober.check() == NOT_SERVING

            service.set_serving(True)
            assert [await heard(watch) for watch in open_watches] == [SERVING] * 3, "nobody was disturbed"
            for watch in open_watches:
                watch.cancel()
            while service.num_watches:  # the server hears of it a little later
                await asyncio.sleep(0.001)
            assert await heard(greedy.watch()) == SERVING

    asyncio.run(scenario())
