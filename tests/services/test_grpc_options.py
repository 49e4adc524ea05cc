"""Each option shows its effect on a loopback connection, against gRPC itself or against raw HTTP/2 frames."""

from __future__ import annotations

import asyncio
import json
import socket
import struct
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager, suppress
from typing import Any, TypeVar

import grpc
import pytest
from grpc import aio

from services.grpc_options import MIB, Options, client_options, link_options, server_options
from tests.certificates import Authority
from tests.services.served import HANG_S

T = TypeVar("T")

SETTINGS, PING, GOAWAY = 4, 6, 7  # types of HTTP/2 frames
MAX_CONCURRENT_STREAMS, MAX_HEADER_LIST_SIZE = 3, 6  # keys of a SETTINGS frame
ACK = 1


class RawPeer:
    """One end of an HTTP/2 connection that sends what it is told to, and answers nothing by itself."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer

    def send(self, kind: int, payload: bytes = b"") -> None:
        self.writer.write(struct.pack(">I", len(payload))[1:] + bytes([kind, 0]) + bytes(4) + payload)

    async def close(self) -> None:
        self.writer.close()
        with suppress(ConnectionError):
            await self.writer.wait_closed()

    async def frame(self, kind: int, flags: int = 0) -> bytes | None:
        """The payload of the next frame of this kind; None when the connection ends before."""
        try:
            while True:
                header = await self.reader.readexactly(9)
                payload = await self.reader.readexactly(int.from_bytes(header[:3], "big"))
                if (header[3], header[4]) == (kind, flags):
                    return payload
        except (asyncio.IncompleteReadError, ConnectionError):
            return None


@asynccontextmanager
async def raw_client(port: int, *, silent: bool = False) -> AsyncIterator[RawPeer]:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    peer = RawPeer(reader, writer)
    if not silent:
        writer.write(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n")
        peer.send(SETTINGS)
    try:
        yield peer
    finally:
        await peer.close()


class Echo:
    """Sends back what it gets; counts calls and remembers who called."""

    def __init__(self) -> None:
        self.calls = 0
        self.peers: set[str] = set()

    async def unary(self, request: bytes, context: Any) -> bytes:
        self.calls += 1
        self.peers.add(context.peer())
        return request

    async def forget(self, request: bytes, context: Any) -> bytes:
        await asyncio.get_running_loop().create_future()
        raise AssertionError

    async def refuse(self, request: bytes, context: Any) -> bytes:
        self.calls += 1
        await context.abort(grpc.StatusCode.UNAVAILABLE, "not now")
        raise AssertionError


@asynccontextmanager
async def echo_server(
    options: Options, echo: Echo | None = None, credentials: grpc.ServerCredentials | None = None
) -> AsyncIterator[int]:
    """The port of a server with these options."""
    echo = echo or Echo()
    server = aio.server(options=options)
    methods: dict[str, grpc.RpcMethodHandler[bytes, bytes]] = {
        "Unary": grpc.unary_unary_rpc_method_handler(echo.unary),
        "Forget": grpc.unary_unary_rpc_method_handler(echo.forget),
        "Refuse": grpc.unary_unary_rpc_method_handler(echo.refuse),
    }
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("test.Echo", methods),))
    address = "127.0.0.1:0"
    port = server.add_secure_port(address, credentials) if credentials else server.add_insecure_port(address)
    await server.start()
    try:
        yield port
    finally:
        await server.stop(0)


@asynccontextmanager
async def channel_to(
    port: int, options: Options = (), compression: grpc.Compression | None = None
) -> AsyncIterator[aio.Channel]:
    async with aio.insecure_channel(f"127.0.0.1:{port}", options=options, compression=compression) as channel:
        yield channel


async def unary(channel: aio.Channel, request: bytes = b"", method: str = "Unary", **call: Any) -> bytes:
    method_of: aio.UnaryUnaryMultiCallable[bytes, bytes] = channel.unary_unary(f"/test.Echo/{method}")
    return await method_of(request, **call)


async def code_of(channel: aio.Channel, request: bytes = b"", method: str = "Unary", **call: Any) -> grpc.StatusCode:
    try:
        await unary(channel, request, method, timeout=4 * HANG_S, **call)  # also of a burst the last
    except aio.AioRpcError as error:
        return error.code()
    return grpc.StatusCode.OK


def run(scenario: Coroutine[Any, Any, T]) -> T:
    async def bounded() -> T:
        async with asyncio.timeout(5 * HANG_S):
            return await scenario

    return asyncio.run(bounded())


def patient(options: Options) -> Options:
    """The same, for a peer whose answer to a ping may take its time, or never comes."""
    return tuple({**dict(options), "grpc.keepalive_timeout_ms": 600_000, "grpc.http2.ping_timeout_ms": 600_000}.items())


SERVERS = pytest.mark.parametrize("options", [link_options(), server_options()], ids=["link", "server"])
CHANNELS = pytest.mark.parametrize("options", [link_options(), client_options()], ids=["link", "client"])


@SERVERS
def test_a_port_that_is_taken_is_not_shared(options: Options) -> None:
    async def scenario() -> None:
        async with echo_server(options) as port:
            second = aio.server(options=options)
            with pytest.raises(RuntimeError, match="Failed to bind"):
                second.add_insecure_port(f"127.0.0.1:{port}")

    run(scenario())


@pytest.mark.parametrize(
    "options",
    [patient(link_options(keepalive_ms=80)), patient(server_options(min_ping_interval_ms=20))],
    ids=["link", "server"],
)
def test_a_peer_that_pings_often_keeps_its_idle_connection(options: Options) -> None:
    async def scenario() -> None:
        async with echo_server(options) as port, raw_client(port) as peer:
            for _ in range(6):
                await asyncio.sleep(0.03)  # the pace of the pings, not a wait for anything
                peer.send(PING, b"12345678")
                assert await peer.frame(PING, ACK) == b"12345678"

    run(scenario())


@pytest.mark.parametrize(
    "options", [link_options(keepalive_ms=100), server_options(keepalive_ms=200)], ids=["link", "server"]
)
def test_a_server_drops_a_client_that_no_longer_answers_pings(options: Options) -> None:
    async def scenario() -> None:
        async with echo_server(options) as port, raw_client(port) as peer:
            assert await peer.frame(PING) is not None
            assert await peer.frame(PING, ACK) is None  # nothing but the end of the connection comes

    run(scenario())


@pytest.mark.parametrize(
    "options",
    [link_options(keepalive_ms=100), client_options(keepalive_ms=200, answer_within_ms=100)],
    ids=["link", "client"],
)
def test_a_call_ends_when_the_server_no_longer_answers_pings(options: Options) -> None:
    async def scenario() -> grpc.StatusCode:
        closed = asyncio.Event()

        async def frozen(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            peer = RawPeer(reader, writer)
            peer.send(SETTINGS)
            await reader.read(-1)  # its kernel takes everything that comes
            await peer.close()
            closed.set()

        server = await asyncio.start_server(frozen, "127.0.0.1", 0)
        async with server:
            async with channel_to(server.sockets[0].getsockname()[1], options) as channel:
                code = await code_of(channel)
            await closed.wait()
        return code

    assert run(scenario()) is grpc.StatusCode.UNAVAILABLE


@pytest.mark.parametrize(
    "options",
    [patient(link_options(keepalive_ms=50)), patient(client_options(keepalive_ms=50))],
    ids=["link", "client"],
)
def test_a_channel_pings_while_nothing_is_called(options: Options) -> None:
    """So that a server that is gone is known before the next call. gRPC pings twice without data, and then no more."""

    async def scenario() -> int:
        pings = 0
        enough = asyncio.Event()
        peers: list[RawPeer] = []

        async def answering(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            nonlocal pings
            peer = RawPeer(reader, writer)
            peers.append(peer)
            peer.send(SETTINGS)
            await reader.readexactly(24)  # the preface
            while (payload := await peer.frame(PING)) is not None:
                peer.writer.write(b"\0\0\x08" + bytes([PING, ACK]) + bytes(4) + payload)
                pings += 1
                if pings == 4:
                    enough.set()

        server = await asyncio.start_server(answering, "127.0.0.1", 0)
        async with server:
            async with channel_to(server.sockets[0].getsockname()[1], options) as channel:
                channel.get_state(try_to_connect=True)
                await enough.wait()
            for peer in peers:
                await peer.close()
        return pings

    assert run(scenario()) >= 4


@CHANNELS
def test_a_server_that_is_away_is_dialled_again_and_again(options: Options) -> None:
    """By default each dial from the sixth on would come five seconds after the one before it, and more."""

    async def scenario() -> None:
        dials_s: list[float] = []
        enough = asyncio.Event()

        async def absent(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            dials_s.append(asyncio.get_running_loop().time())
            writer.transport.abort()
            if len(dials_s) >= 6 and dials_s[-1] - dials_s[-2] < 4:
                enough.set()

        server = await asyncio.start_server(absent, "127.0.0.1", 0)
        async with server, channel_to(server.sockets[0].getsockname()[1], options) as channel:
            waiting = asyncio.create_task(channel.channel_ready())
            await enough.wait()
            waiting.cancel()
            await asyncio.gather(waiting, return_exceptions=True)

    run(scenario())


def test_a_call_does_not_outlive_its_connections_age_for_ever() -> None:
    async def scenario() -> grpc.StatusCode:
        options = server_options(max_age_ms=100, max_call_ms=100)
        async with echo_server(options) as port, channel_to(port) as channel:
            return await code_of(channel, method="Forget", wait_for_ready=True)

    assert run(scenario()) is grpc.StatusCode.UNAVAILABLE


def test_a_burst_of_calls_is_answered_whole() -> None:
    async def scenario() -> set[grpc.StatusCode]:
        async with echo_server(server_options(max_streams=2000)) as port, channel_to(port) as channel:
            return set(await asyncio.gather(*[code_of(channel) for _ in range(2000)]))

    assert run(scenario()) == {grpc.StatusCode.OK}


@SERVERS
def test_compressed_messages_are_refused(options: Options) -> None:
    async def scenario() -> grpc.StatusCode:
        async with echo_server(options) as port, channel_to(port, compression=grpc.Compression.Gzip) as channel:
            return await code_of(channel, bytes(1000))

    assert run(scenario()) is grpc.StatusCode.UNIMPLEMENTED


@pytest.mark.parametrize(("size", "code"), [(1000, grpc.StatusCode.OK), (1001, grpc.StatusCode.RESOURCE_EXHAUSTED)])
def test_a_message_that_is_too_large_for_the_server_is_refused(size: int, code: grpc.StatusCode) -> None:
    async def scenario() -> grpc.StatusCode:
        async with echo_server(server_options(max_message_bytes=1000)) as port, channel_to(port) as channel:
            return await code_of(channel, bytes(size))

    assert run(scenario()) is code


def test_a_refusal_by_grpc_itself_is_not_held_back() -> None:
    async def scenario() -> None:
        time_s = asyncio.get_running_loop().time
        async with echo_server(server_options(max_message_bytes=1000)) as port, channel_to(port) as channel:
            took_s = 1.0
            while took_s >= 0.1:  # held back, each would take as long at the very least
                began_s = time_s()
                assert await code_of(channel, bytes(1001)) is grpc.StatusCode.RESOURCE_EXHAUSTED
                took_s = time_s() - began_s

    run(scenario())


@CHANNELS
def test_an_answer_or_a_plan_may_be_larger_than_grpc_allows_by_default(options: Options) -> None:
    async def scenario() -> bytes:
        async with echo_server(link_options()) as port, channel_to(port, options) as channel:
            return await unary(channel, bytes(5 * MIB))

    assert len(run(scenario())) == 5 * MIB


HASTY = pytest.mark.parametrize(
    "options",
    [link_options(handshake_timeout_ms=200), server_options(handshake_timeout_ms=200)],
    ids=["link", "server"],
)


@HASTY
def test_a_silent_connection_is_dropped(options: Options) -> None:
    async def scenario() -> None:
        async with echo_server(options) as port, raw_client(port, silent=True) as peer:
            await peer.reader.read(-1)

    run(scenario())


@HASTY
def test_a_silent_connection_to_a_port_with_tls_is_dropped(options: Options, authority: Authority) -> None:
    own = authority.issue("server")
    credentials = grpc.ssl_server_credentials([(own.key.read_bytes(), own.cert.read_bytes())])

    async def scenario() -> None:
        async with echo_server(options, None, credentials) as port, raw_client(port, silent=True) as peer:
            await peer.reader.read(-1)

    run(scenario())


@HASTY
def test_a_connection_that_does_not_take_the_settings_is_dropped(options: Options) -> None:
    """Until it has, gRPC does not hold it to the limits that it was told."""

    async def scenario() -> None:
        async with echo_server(options) as port, raw_client(port) as peer:
            assert await peer.frame(SETTINGS) is not None
            assert await peer.frame(-1) is None

    run(scenario())


@pytest.mark.parametrize(
    "options", [server_options(max_idle_ms=200), server_options(max_age_ms=200)], ids=["idle", "old"]
)
def test_an_idle_and_an_old_connection_are_asked_to_go(options: Options) -> None:
    async def scenario() -> bytes | None:
        async with echo_server(options) as port, raw_client(port) as peer:
            return await peer.frame(GOAWAY)

    assert run(scenario()) is not None


@pytest.mark.parametrize(
    "options", [link_options(max_connections=2), server_options(max_connections=2)], ids=["link", "server"]
)
def test_connections_are_bounded(options: Options) -> None:
    async def scenario() -> None:
        async with (
            echo_server(options) as port,
            raw_client(port) as first,
            raw_client(port) as second,
        ):
            assert await first.frame(SETTINGS) is not None
            assert await second.frame(SETTINGS) is not None
            async with raw_client(port) as third:
                assert await third.frame(SETTINGS) is None

    run(scenario())


@pytest.mark.parametrize(
    ("options", "max_streams", "max_metadata"),
    [(link_options(), 8, 16_384), (server_options(max_streams=7, max_metadata_bytes=3000), 14, 3000)],
    ids=["link", "server"],
)
def test_a_server_announces_its_limits(options: Options, max_streams: int, max_metadata: int) -> None:
    async def scenario() -> dict[int, int]:
        async with echo_server(options) as port, raw_client(port) as peer:
            payload = await peer.frame(SETTINGS)
            assert payload is not None
            return dict(struct.iter_unpack(">HI", payload))

    settings = run(scenario())

    assert settings[MAX_CONCURRENT_STREAMS] == max_streams
    assert settings[MAX_HEADER_LIST_SIZE] == max_metadata


@pytest.mark.parametrize(("size", "code"), [(8800, grpc.StatusCode.OK), (12_000, grpc.StatusCode.RESOURCE_EXHAUSTED)])
def test_too_much_metadata_is_refused_and_never_at_random(size: int, code: grpc.StatusCode) -> None:
    async def scenario() -> set[grpc.StatusCode]:
        async with echo_server(server_options(max_metadata_bytes=10_000)) as port, channel_to(port) as channel:
            return set(await asyncio.gather(*[code_of(channel, metadata=(("x", "a" * size),)) for _ in range(30)]))

    assert run(scenario()) == {code}


@CHANNELS
def test_a_proxy_in_the_environment_is_passed_over(options: Options, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as nobody:
        proxy = f"http://127.0.0.1:{nobody.getsockname()[1]}"
    for name in ("no_proxy", "NO_PROXY", "no_grpc_proxy"):
        monkeypatch.delenv(name, raising=False)
    for name in ("grpc_proxy", "https_proxy", "http_proxy"):
        monkeypatch.setenv(name, proxy)

    async def scenario() -> grpc.StatusCode:
        async with echo_server(()) as port, channel_to(port, options) as channel:
            return await code_of(channel)

    assert run(scenario()) is grpc.StatusCode.OK


def test_each_link_has_a_connection_of_its_own() -> None:
    async def scenario() -> int:
        echo = Echo()
        async with (
            echo_server(link_options(), echo) as port,
            channel_to(port, link_options()) as first,
            channel_to(port, link_options()) as second,
        ):
            await unary(first)
            await unary(second)
        return len(echo.peers)

    assert run(scenario()) == 2


def test_grpc_does_not_retry_on_a_link() -> None:
    retry = {"maxAttempts": 3, "initialBackoff": "0.01s", "maxBackoff": "0.01s", "backoffMultiplier": 1}
    policy = {"name": [{}], "retryPolicy": {**retry, "retryableStatusCodes": ["UNAVAILABLE"]}}

    async def scenario() -> int:
        echo = Echo()
        options: Any = (*link_options(), ("grpc.service_config", json.dumps({"methodConfig": [policy]})))
        async with echo_server(link_options(), echo) as port, channel_to(port, options) as channel:
            assert await code_of(channel, method="Refuse") is grpc.StatusCode.UNAVAILABLE
        return echo.calls

    assert run(scenario()) == 1
