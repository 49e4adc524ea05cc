"""Peers that speak HTTP/2 badly, slowly or not at all: each ends in a status or a closed connection, others go on."""

from __future__ import annotations

import asyncio
import itertools
import random
import re
import resource
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from typing import Any

import pytest
from grpc import aio

from protos import inference_pb2 as pb
from protos import monitoring_pb2, monitoring_pb2_grpc
from tests.e2e import fake_model
from tests.e2e.cluster import Cluster, cluster
from tests.faults.bystander import Bystander, bystander, num_descriptors, rss_mib
from tests.faults.raw_frames import (
    ACK,
    CANCEL,
    CONTINUATION,
    END_HEADERS,
    END_STREAM,
    HEADERS,
    PING,
    PREFACE,
    RST_STREAM,
    SETTINGS,
    call,
    frame,
    header_block,
    message,
    raw_connection,
)

GENERATE = "/pagewire.v1.InferenceService/Generate"
STREAM = "/pagewire.v1.InferenceService/GenerateStream"
LINK = "/pagewire.executor.v1.ExecutorLink/Link"
SETTLED_TOKENS = 16
MAX_GROWTH_MIB = 128  # what is cancelled in thousands waits for the collector

ASKED = pb.GenerateRequest(text="x", stopping=pb.StopConditions(max_tokens=1)).SerializeToString()
MODEL = "/pagewire.v1.InferenceService/GetModel"


@pytest.fixture(scope="module")
def attacked(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """A cluster that is patient for a second only, and has a link that can be dialled like its clients' address."""
    folder = tmp_path_factory.mktemp("attacked")
    flags = ["--link-listen=127.0.0.1:0", "--first-message-s=1", "--handshake-s=1"]
    with cluster(fake_model.write(folder / "fake"), folder, executors=0, flags=flags) as running:
        running.start_executor("--fake-step-s=0.002")
        yield running


def run(scenario: Coroutine[Any, Any, None]) -> None:
    async def bounded() -> None:
        async with asyncio.timeout(300):
            await scenario

    asyncio.run(bounded())


@asynccontextmanager
async def unharmed(running: Cluster) -> AsyncIterator[Bystander]:
    """Whatever is done inside: a stream of somebody else goes on while and after it is, and no memory is kept."""
    pid = running.scheduler.popen.pid
    async with bystander(running.address) as other:
        before_mib = rss_mib(pid)
        yield other
        settled = other.num_tokens + SETTLED_TOKENS
        while other.num_tokens < settled:
            await other.more()
        assert rss_mib(pid) - before_mib < MAX_GROWTH_MIB


async def goes_on(other: Bystander) -> None:
    """It reads on, with what was done so far in place."""
    enough = other.num_tokens + SETTLED_TOKENS
    while other.num_tokens < enough:
        await other.more()


ADDRESSES = pytest.mark.parametrize("which", ["clients", "executors"])


def address_of(running: Cluster, which: str) -> str:
    return running.address if which == "clients" else running.link


# ---- connections


@ADDRESSES
@pytest.mark.parametrize(
    "said",
    [
        random.Random(1).randbytes(1 << 16),
        b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
        b"\x16\x03\x01\x00\xa5\x01\x00\x00\xa1\x03\x03" + bytes(160),
        PREFACE + b"\xff" * 4096,
        PREFACE + frame(SETTINGS) + b"\xff\xff\xff\x00\x00\x00\x00\x00\x01" + bytes(1 << 16),
        PREFACE + frame(SETTINGS) + frame(HEADERS, b"\x82\xff\xff\xff\xff\xff\xff\xff", flags=END_HEADERS, stream=1),
    ],
    ids=["garbage", "HTTP/1.1", "TLS", "garbage after the preface", "a frame of 16 MiB", "broken HPACK"],
)
def test_a_connection_that_says_nonsense_is_closed(attacked: Cluster, which: str, said: bytes) -> None:
    async def scenario() -> None:
        async with unharmed(attacked), raw_connection(address_of(attacked, which)) as peer:
            with suppress(ConnectionError):
                await peer.send(said)
            await peer.end()

    run(scenario())


@ADDRESSES
def test_connections_that_say_nothing_are_closed(attacked: Cluster, which: str) -> None:
    async def scenario() -> None:
        async with unharmed(attacked) as other, AsyncExitStack() as stack:
            silent = [await stack.enter_async_context(raw_connection(address_of(attacked, which))) for _ in range(200)]
            await goes_on(other)
            for peer in silent:
                await peer.end()

    run(scenario())


@ADDRESSES
def test_a_connection_that_drips_is_closed(attacked: Cluster, which: str) -> None:
    """A byte now and then does not count as being alive."""

    async def scenario() -> None:
        async with unharmed(attacked), raw_connection(address_of(attacked, which)) as peer:
            ended = asyncio.create_task(peer.end())
            with suppress(ConnectionError):
                for byte in PREFACE:
                    await peer.send(bytes((byte,)))
                    await asyncio.wait({ended}, timeout=2)  # the pace of the drip: all of it would take 48 seconds
                    if ended.done():
                        return
                raise AssertionError("it might have gone on for ever")

    run(scenario())


def test_a_thousand_connections_keep_nobody_out(attacked: Cluster) -> None:
    async def scenario() -> None:
        async with unharmed(attacked) as other, AsyncExitStack() as stack:
            for _ in range(1000):
                peer = await stack.enter_async_context(raw_connection(attacked.address))
                await peer.greet()
            await goes_on(other)
            async with bystander(attacked.address) as newcomer:
                await goes_on(newcomer)

    run(scenario())


def test_a_server_without_file_descriptors_left_goes_on_and_recovers(attacked: Cluster) -> None:
    pid = attacked.scheduler.popen.pid
    whole = resource.prlimit(pid, resource.RLIMIT_NOFILE)

    async def scenario() -> None:
        async with unharmed(attacked) as other:
            num_open = num_descriptors(pid)
            resource.prlimit(pid, resource.RLIMIT_NOFILE, (num_open + 20, whole[1]))
            async with AsyncExitStack() as stack:
                for _ in range(60):
                    peer = await stack.enter_async_context(raw_connection(attacked.address))
                    with suppress(ConnectionError):
                        await peer.send(PREFACE + frame(SETTINGS))
                await goes_on(other)
            resource.prlimit(pid, resource.RLIMIT_NOFILE, whole)
            async with bystander(attacked.address) as newcomer:
                await goes_on(newcomer)

    try:
        run(scenario())
    finally:
        resource.prlimit(pid, resource.RLIMIT_NOFILE, whole)


# ---- calls


@pytest.mark.parametrize(
    ("said", "ending"),
    [
        (call(1, MODEL) + message(1, b"", end=True), {"status 0"}),
        (call(1, GENERATE) + message(1, b"\xff\xff\xff", end=True), {"status 3"}),
        (call(1, GENERATE, flags=END_HEADERS | END_STREAM), {"status 3"}),
        (call(1, STREAM, flags=END_HEADERS | END_STREAM), {"status 3"}),
        (call(1, GENERATE), {"status 14"}),
        (call(1, STREAM), {"status 14"}),
        (call(1, GENERATE) + message(1, bytes(10), length=100), {"status 14"}),
        (call(1, GENERATE) + message(1, bytes(1000), length=3 << 30), {"status 8"}),
        (call(1, GENERATE) + message(1, bytes(1000), length=(4 << 20) + 1), {"status 8"}),
        (call(1, GENERATE) + message(1, ASKED, compressed=1, end=True), {"status 12", "status 13"}),
        (call(1, GENERATE) + message(1, ASKED, compressed=7, end=True), {"status 3", "status 13"}),
        (call(1, "/pagewire.v1.InferenceService/Nothing") + message(1, b"", end=True), {"status 12"}),
        (call(1, GENERATE, more=[(b"x", b"a" * 9_000)]) + message(1, ASKED, end=True), {"status 8"}),
        (call(1, GENERATE, more=[(b"x", b"a" * 17_000)]) + message(1, ASKED, end=True), {"status 8"}),
        (call(1, GENERATE, more=[(b"x", b"a" * (1 << 20))]) + message(1, ASKED, end=True), {"status 8"}),
        (call(1, GENERATE, more=[(b"x", b"a")] * 3000) + message(1, ASKED, end=True), {"status 8"}),
    ],
    ids=[
        "a good one",
        "no message of ours",
        "unary, ended without a message",
        "stream, ended without a message",
        "unary, no message and no end",
        "stream, no message and no end",
        "a message that never gets whole",
        "a message of 3 GB, by its own word",
        "a message that is a byte too long",
        "compressed, by its own word",
        "a flag that nobody knows",
        "no such method",
        "metadata of 9 KB",
        "metadata of 17 KB",
        "metadata of 1 MiB",
        "3,000 headers",
    ],
)
@pytest.mark.parametrize("polite", [True, False], ids=["polite", "rude"])
def test_a_bad_call_ends_with_a_status(attacked: Cluster, said: bytes, ending: set[str], polite: bool) -> None:
    """Also when the peer has not acknowledged the settings, which gRPC does not hold it to then."""

    async def scenario() -> None:
        async with unharmed(attacked), raw_connection(attacked.address) as peer:
            if polite:
                await peer.greet()
                await peer.send(said)
            else:
                await peer.send(PREFACE + frame(SETTINGS) + said)
            (told,) = (await peer.endings(1)).values()
            assert told in ending

    run(scenario())


@pytest.mark.parametrize(
    ("said", "ending"),
    [
        (call(1, LINK, flags=END_HEADERS | END_STREAM), "status 3"),
        (call(1, LINK), "status 14"),
        (call(1, LINK) + message(1, bytes(10), length=100), "status 14"),
        (call(1, LINK) + message(1, bytes(1000), length=3 << 30), "status 8"),
        (call(1, LINK) + message(1, b"\xff\xff\xff"), "status 3"),
    ],
    ids=["ended at once", "says nothing", "a hello that never gets whole", "a hello of 3 GB", "no hello"],
)
def test_a_bad_link_ends_with_a_status(attacked: Cluster, said: bytes, ending: str) -> None:
    async def scenario() -> None:
        async with unharmed(attacked), raw_connection(attacked.link) as peer:
            await peer.greet()
            await peer.send(said)
            assert await peer.endings(1) == {1: ending}

    run(scenario())


def test_a_thousand_calls_without_their_message_keep_nobody_out(attacked: Cluster) -> None:
    async def scenario() -> None:
        async with unharmed(attacked) as other, AsyncExitStack() as stack:
            peers = [await stack.enter_async_context(raw_connection(attacked.address)) for _ in range(20)]
            for peer in peers:
                await peer.greet()
                await peer.send(b"".join(call(1 + 2 * n, STREAM) for n in range(50)))
            await goes_on(other)
            for peer in peers:
                assert len(await peer.endings(50)) == 50

    run(scenario())


# ---- floods


async def flood(running: Cluster, other: Bystander, frames: Callable[[], Iterator[bytes]], *, polite: bool) -> None:
    """Send on and on, by another connection when the server ends one, until the bystander has read its share.

    gRPC does not hold a peer to its settings that is not `polite`, and does not acknowledge them.
    """
    enough = other.num_tokens + SETTLED_TOKENS
    num_sent = 0
    while other.num_tokens < enough or num_sent < 2000:
        async with raw_connection(running.address) as peer:
            await peer.send(PREFACE + frame(SETTINGS) + (frame(SETTINGS, flags=ACK) if polite else b""))
            reading = asyncio.create_task(peer.end())
            try:
                with suppress(ConnectionError):
                    for said in frames():
                        await peer.send(said)
                        num_sent += 1
                        if reading.done() or (other.num_tokens >= enough and num_sent >= 2000):
                            break
                        if num_sent % 100 == 0:
                            await asyncio.sleep(0)
            finally:
                reading.cancel()
                await asyncio.gather(reading, return_exceptions=True)


def rapid_resets() -> Iterator[bytes]:
    for stream in itertools.count(1, 2):
        yield call(stream, STREAM) + frame(RST_STREAM, CANCEL, stream=stream)


def pings() -> Iterator[bytes]:
    return itertools.repeat(frame(PING, bytes(8)))


def settings() -> Iterator[bytes]:
    return itertools.repeat(frame(SETTINGS))


def calls_that_never_begin() -> Iterator[bytes]:
    """One call, whose headers have no end."""
    yield frame(HEADERS, header_block([(b"x", b"a" * 1000)]), stream=1)
    yield from itertools.repeat(frame(CONTINUATION, header_block([(b"x", b"a" * 16_000)]), stream=1))


def empty_continuations() -> Iterator[bytes]:
    yield frame(HEADERS, stream=1)
    yield from itertools.repeat(frame(CONTINUATION, stream=1))


def wide_tables() -> Iterator[bytes]:
    """A header of 4 KB goes into the connection's table once; each call names it a thousand times: 1 KB says 4 MB."""
    once = b"\x40" + header_block([(b"x", b"a" * 4000)])[1:]  # put into the table, where it is number 62
    for stream in itertools.count(1, 2):
        yield frame(
            HEADERS, (once if stream == 1 else b"") + b"\xbe" * 1000, flags=END_HEADERS | END_STREAM, stream=stream
        )


@pytest.mark.parametrize(
    "frames", [rapid_resets, pings, settings, calls_that_never_begin, empty_continuations, wide_tables]
)
@pytest.mark.parametrize("polite", [True, False], ids=["polite", "rude"])
def test_a_flood_holds_nobody_up(attacked: Cluster, frames: Callable[[], Iterator[bytes]], polite: bool) -> None:
    async def scenario() -> None:
        async with unharmed(attacked) as other:
            await flood(attacked, other, frames, polite=polite)

    run(scenario())


def test_what_was_attacked_holds_nothing_afterwards(attacked: Cluster) -> None:
    """Last in this file: nothing runs any more, nothing waits, and no stranger's words are in the log."""

    async def scenario() -> None:
        async with aio.insecure_channel(attacked.admin) as channel:
            stub: monitoring_pb2_grpc.MonitoringServiceAsyncStub = monitoring_pb2_grpc.MonitoringServiceStub(channel)
            status = await stub.GetStatus(monitoring_pb2.GetStatusRequest())
            while status.scheduler.num_running or status.scheduler.num_waiting:
                status = await stub.GetStatus(monitoring_pb2.GetStatusRequest())
            (executor,) = status.executors
            assert executor.num_free_blocks == executor.num_blocks

    run(scenario())
    log = attacked.scheduler.log.read_text().splitlines()
    assert [line for line in log if not re.match(r"[0-9:]{8} scheduler ", line)] == []
