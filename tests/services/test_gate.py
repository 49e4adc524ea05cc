"""Who gets past the gate, and as whom."""

from __future__ import annotations

import asyncio
import contextvars
import gc
import logging
import weakref
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import grpc
import pytest
from google.protobuf.message import Message
from grpc import aio
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2

from common.errors import Unauthenticated
from protos import inference_pb2 as pb
from services import reflection
from services.api_keys import ApiKeys, line_of, new_key, read_api_keys
from services.caller import ANONYMOUS, Caller, current_caller
from services.gate import LOOK_EVERY_S, Gate, keys_in
from services.handlers import Context, service_handler
from services.reflection import reflection_handler
from services.status import from_rpc_error
from services.watched_files import WatchedFiles
from tests.services.served import HANG_S, until

METHODS = ["Unary", "ServerStream", "ClientStream", "Both", "NotThere"]
SECRET = "pw-a-secret-in-an-exception"

Metadata = Sequence[tuple[str, str | bytes]]


async def say_caller(_: object, context: object) -> bytes:
    return repr(current_caller()).encode()


async def stream_caller(_: object, context: object) -> AsyncIterator[bytes]:
    yield repr(current_caller()).encode()


@asynccontextmanager
async def served(gate: Gate) -> AsyncIterator[aio.Channel]:
    """A channel to a server whose methods tell who calls them."""
    server = aio.server(interceptors=(gate,))
    methods: dict[str, grpc.RpcMethodHandler[bytes, bytes]] = {
        "Unary": grpc.unary_unary_rpc_method_handler(say_caller),
        "ServerStream": grpc.unary_stream_rpc_method_handler(stream_caller),
        "ClientStream": grpc.stream_unary_rpc_method_handler(say_caller),
        "Both": grpc.stream_stream_rpc_method_handler(stream_caller),
    }
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("test.Service", methods),))
    health_pb2_grpc.add_HealthServicer_to_server(health.aio.HealthServicer(), server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        async with aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            yield channel
    finally:
        await server.stop(0)


async def call(channel: aio.Channel, method: str, metadata: Metadata = ()) -> bytes:
    """The one message of the answer."""
    path = f"/test.Service/{method}"
    if method == "ServerStream":
        stream: aio.UnaryStreamMultiCallable[bytes, bytes] = channel.unary_stream(path)
        (message,) = [message async for message in stream(b"", metadata=metadata, timeout=HANG_S)]
        return message
    if method == "ClientStream":
        upload: aio.StreamUnaryMultiCallable[bytes, bytes] = channel.stream_unary(path)
        return await upload(iter([b""]), metadata=metadata, timeout=HANG_S)
    if method == "Both":
        both: aio.StreamStreamMultiCallable[bytes, bytes] = channel.stream_stream(path)
        (message,) = [message async for message in both(iter([b""]), metadata=metadata, timeout=HANG_S)]
        return message
    unary: aio.UnaryUnaryMultiCallable[bytes, bytes] = channel.unary_unary(path)
    return await unary(b"", metadata=metadata, timeout=HANG_S)


async def refusal(channel: aio.Channel, method: str, metadata: Metadata = ()) -> aio.AioRpcError:
    with pytest.raises(aio.AioRpcError) as refused:
        await call(channel, method, metadata)
    return refused.value


def bearer(key: str) -> Metadata:
    return (("authorization", f"Bearer {key}"),)


def keys_of(path: Path, **keys: str) -> ApiKeys:
    path.write_text("".join(f"{line_of(tenant, key)}\n" for tenant, key in keys.items()))
    return read_api_keys(path)


def test_without_keys_everybody_is_the_one_tenant() -> None:
    async def scenario() -> None:
        async with served(Gate(None)) as channel:
            for metadata in ((), bearer("whatever")):
                assert await call(channel, "Unary", metadata) == repr(ANONYMOUS).encode()

    asyncio.run(scenario())


@pytest.mark.parametrize("method", METHODS[:-1])
def test_a_key_makes_its_holder_the_tenant_in_methods_of_every_kind(method: str, tmp_path: Path) -> None:
    acme, other = new_key(), new_key()
    keys = keys_of(tmp_path / "keys", acme=acme, other=other)

    async def scenario() -> None:
        async with served(Gate(lambda: keys)) as channel:
            for key, tenant in ((acme, "acme"), (other, "other"), (acme, "acme")):
                assert await call(channel, method, bearer(key)) == repr(Caller(tenant=tenant)).encode()

    asyncio.run(scenario())


@pytest.mark.parametrize("method", METHODS)
def test_every_reason_to_refuse_looks_the_same(method: str, tmp_path: Path) -> None:
    key = new_key()
    keys = keys_of(tmp_path / "keys", acme=key)
    wrong: list[Metadata] = [
        (),
        bearer(""),
        bearer(new_key()),
        bearer(key[:-1]),
        bearer(key + "x" * 200),
        (("authorization", key),),
        (("authorization", f"Basic {key}"),),
        (*bearer(key), *bearer(key)),
        (*bearer(key), *bearer(new_key())),
        (("authorization-bin", f"Bearer {key}".encode()),),
        (("x-api-key", key),),
    ]

    async def scenario() -> None:
        async with served(Gate(lambda: keys)) as channel:
            refusals = [await refusal(channel, method, metadata) for metadata in wrong]
        told = {(error.code(), error.details(), tuple(error.trailing_metadata())) for error in refusals}
        assert len(told) == 1
        assert refusals[0].code() is grpc.StatusCode.UNAUTHENTICATED
        assert isinstance(from_rpc_error(refusals[0]), Unauthenticated)

    asyncio.run(scenario())


def test_health_asks_nobody_for_a_key(tmp_path: Path) -> None:
    keys = keys_of(tmp_path / "keys")

    async def scenario() -> None:
        async with served(Gate(lambda: keys)) as channel:
            check: aio.UnaryUnaryMultiCallable[bytes, bytes] = channel.unary_unary("/grpc.health.v1.Health/Check")
            answer = health_pb2.HealthCheckResponse.FromString(await check(b"", timeout=HANG_S))
            assert answer.status == health_pb2.HealthCheckResponse.SERVING
            await refusal(channel, "Unary")

    asyncio.run(scenario())


def test_a_key_works_once_it_is_in_the_file_and_no_longer_when_it_is_not(tmp_path: Path) -> None:
    first, second = new_key(), new_key()
    path = tmp_path / "keys"
    keys_of(path, acme=first)
    watched = WatchedFiles([path], lambda: read_api_keys(path), look_every_s=0)

    async def scenario() -> None:
        async with served(Gate(watched.current)) as channel:
            await call(channel, "Unary", bearer(first))
            await refusal(channel, "Unary", bearer(second))
            keys_of(path, acme=second)
            await refusal(channel, "Unary", bearer(first))
            await call(channel, "Unary", bearer(second))
            path.write_text("nonsense\n")
            await call(channel, "Unary", bearer(second))
            path.write_text("# nobody any more\n")
            await refusal(channel, "Unary", bearer(second))

    asyncio.run(scenario())


def test_a_gate_that_fails_lets_nobody_through_and_says_nothing(caplog: pytest.LogCaptureFixture) -> None:
    def fail() -> ApiKeys:
        raise RuntimeError(SECRET)

    async def scenario() -> aio.AioRpcError:
        async with served(Gate(fail)) as channel:
            return await refusal(channel, "Unary", bearer(new_key()))

    error = asyncio.run(scenario())
    assert error.code() is grpc.StatusCode.UNAUTHENTICATED
    assert "the gate failed" in caplog.text
    assert SECRET not in caplog.text and SECRET not in f"{error} {error.trailing_metadata()}"


def test_a_method_that_nobody_was_let_into_has_no_tenant() -> None:
    """A server without a gate fails, and does not serve everybody as one tenant."""

    async def scenario() -> None:
        server = aio.server()
        method: grpc.RpcMethodHandler[bytes, bytes] = grpc.unary_unary_rpc_method_handler(say_caller)
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("test.Service", {"Unary": method}),))
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        async with aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            assert (await refusal(channel, "Unary")).code() is grpc.StatusCode.UNKNOWN
        await server.stop(0)

    contextvars.Context().run(asyncio.run, scenario())
    with pytest.raises(LookupError):
        contextvars.Context().run(current_caller)


def test_who_tries_keys_is_logged_now_and_then_and_never_with_the_key(
    caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    keys, now_s, wrong = keys_of(tmp_path / "keys"), [0.0], new_key()

    async def scenario() -> None:
        async with served(Gate(lambda: keys, clock=lambda: now_s[0])) as channel:
            for now_s[0] in (0.0, 1.0, 2.0, 61.0):
                await refusal(channel, "Unary", bearer(wrong))

    with caplog.at_level(logging.DEBUG):
        asyncio.run(scenario())

    told = [record.getMessage() for record in caplog.records if record.name == "services.gate"]
    assert [text.partition(" calls had no valid API key, the last from ipv4:")[0] for text in told] == ["1", "3"]
    assert wrong[3:] not in caplog.text


# ---- keys that are withdrawn while calls are open


class Patient:
    """A service whose methods answer once, and then wait."""

    def __init__(self) -> None:
        self.entered: list[str] = []
        self.left: list[str] = []

    async def GenerateStream(self, request: pb.GenerateStreamRequest, context: Context) -> AsyncGenerator[Message]:  # noqa: N802
        self.entered.append(current_caller().tenant)
        try:
            yield pb.GenerateStreamResponse(delta=pb.Delta(text=current_caller().tenant))
            await asyncio.get_running_loop().create_future()
        finally:
            self.left.append(current_caller().tenant)

    Resume = GenerateStream

    async def Generate(self, request: pb.GenerateRequest, context: Context) -> Message:  # noqa: N802
        self.entered.append(current_caller().tenant)
        try:
            await asyncio.get_running_loop().create_future()
        finally:
            self.left.append(current_caller().tenant)
        return pb.GenerateResponse()

    Tokenize = Detokenize = GetModel = Cancel = Unpin = Embed = Generate


@asynccontextmanager
async def patient(gate: Gate, service: Patient) -> AsyncIterator[aio.Channel]:
    name = pb.DESCRIPTOR.services_by_name["InferenceService"].full_name
    async with behind(gate, service_handler(name, pb.DESCRIPTOR, service)) as channel:
        yield channel


@asynccontextmanager
async def behind(gate: Gate, handler: grpc.GenericRpcHandler) -> AsyncIterator[aio.Channel]:
    server = aio.server(interceptors=(gate,))
    server.add_generic_rpc_handlers((handler,))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        async with asyncio.timeout(HANG_S), aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            yield channel
    finally:
        await server.stop(0)


def stream(channel: aio.Channel, key: str) -> aio.UnaryStreamCall[bytes, bytes]:
    method: aio.UnaryStreamMultiCallable[bytes, bytes] = channel.unary_stream(
        "/pagewire.v1.InferenceService/GenerateStream"
    )
    return method(b"", metadata=bearer(key))


async def tenant_of(call: aio.UnaryStreamCall[bytes, bytes]) -> str:
    data = await call.read()
    assert isinstance(data, bytes), await call.code()
    return pb.GenerateStreamResponse.FromString(data).delta.text


def test_open_calls_end_with_their_key_and_others_go_on(tmp_path: Path) -> None:
    first, second, other = new_key(), new_key(), new_key()
    path = tmp_path / "keys"
    lines = {key: line_of(tenant, key) for key, tenant in ((first, "acme"), (second, "acme"), (other, "other"))}
    path.write_text("\n".join(lines.values()))
    watched = WatchedFiles([path], lambda: read_api_keys(path), look_every_s=0)

    async def scenario() -> None:
        gate, service = Gate(watched.current), Patient()
        async with patient(gate, service) as channel:
            calls = [stream(channel, key) for key in (first, first, second, other)]
            assert [await tenant_of(call) for call in calls] == ["acme", "acme", "acme", "other"]
            unary: aio.UnaryUnaryMultiCallable[bytes, bytes] = channel.unary_unary(
                "/pagewire.v1.InferenceService/Generate"
            )
            whole = unary(b"", metadata=bearer(first))
            await until(lambda: len(service.entered) == 5)  # a call ends without its method where that did not begin
            assert gate.num_calls == 5
            gate.look()
            gate.look()
            assert not any(call.done() for call in calls)

            path.write_text("\n".join([lines[second], lines[other]]))
            gate.look()
            gate.look()
            for call in calls[:2]:
                assert await call.code() is grpc.StatusCode.UNAUTHENTICATED
            assert await whole.code() is grpc.StatusCode.UNAUTHENTICATED
            assert not calls[2].done() and not calls[3].done()
            await until(lambda: len(service.left) == 3)  # the caller hears of it before the method does
            assert service.left == ["acme"] * 3
            gate.look()
            gate.look()
            assert not calls[2].done() and not calls[3].done()

    asyncio.run(scenario())


def test_a_file_that_is_empty_while_it_is_written_ends_nothing(tmp_path: Path) -> None:
    key = new_key()
    path = tmp_path / "keys"
    keys_of(path, acme=key)
    watched = WatchedFiles([path], lambda: read_api_keys(path), look_every_s=0)

    async def scenario() -> None:
        gate = Gate(watched.current)
        async with patient(gate, Patient()) as channel:
            call = stream(channel, key)
            assert await tenant_of(call) == "acme"
            for text in ("", line_of("acme", key), "", line_of("acme", key), "nonsense", "nonsense"):
                path.write_text(text)
                gate.look()
            await stream(channel, key).read()
            assert not call.done()

    asyncio.run(scenario())


def test_one_look_at_the_file_is_not_two_of_the_gates(tmp_path: Path) -> None:
    key = new_key()
    path = tmp_path / "keys"
    keys_of(path, acme=key)
    now_s = [0.0]
    keys = keys_in(path, clock=lambda: now_s[0])

    async def scenario() -> None:
        gate = Gate(keys)
        async with patient(gate, Patient()) as channel:
            call = stream(channel, key)
            assert await tenant_of(call) == "acme"
            whole = path.read_text()
            for number in range(1, 5):
                path.write_text("" if number % 2 else whole)
                now_s[0] = number * LOOK_EVERY_S
                gate.look()
            assert not call.cancelled() and gate.num_calls == 1
            path.write_text("")
            for number in range(5, 7):
                now_s[0] = number * LOOK_EVERY_S
                gate.look()
            assert await call.code() is grpc.StatusCode.UNAUTHENTICATED

    asyncio.run(scenario())


def test_a_key_that_becomes_another_tenants_ends_what_it_had_opened(tmp_path: Path) -> None:
    key = new_key()
    path = tmp_path / "keys"
    keys_of(path, acme=key)
    watched = WatchedFiles([path], lambda: read_api_keys(path), look_every_s=0)

    async def scenario() -> None:
        gate = Gate(watched.current)
        async with patient(gate, Patient()) as channel:
            call = stream(channel, key)
            assert await tenant_of(call) == "acme"
            keys_of(path, other=key)
            gate.look()
            gate.look()
            assert await call.code() is grpc.StatusCode.UNAUTHENTICATED
            assert await tenant_of(stream(channel, key)) == "other"

    asyncio.run(scenario())


def test_a_call_that_asks_by_reflection_ends_with_its_key_and_hears_why(tmp_path: Path) -> None:
    key = new_key()
    path = tmp_path / "keys"
    keys_of(path, acme=key)
    watched = WatchedFiles([path], lambda: read_api_keys(path), look_every_s=0)

    async def scenario() -> None:
        gate = Gate(watched.current)
        async with behind(gate, reflection_handler(["pagewire.v1.InferenceService"])) as channel:
            method: aio.StreamStreamMultiCallable[bytes, bytes] = channel.stream_stream(
                f"/{reflection.SERVICE}/ServerReflectionInfo"
            )
            silent, asking = method(metadata=bearer(key)), method(metadata=bearer(key))
            await asking.write(reflection_pb2.ServerReflectionRequest(list_services="").SerializeToString())
            told = await asking.read()
            assert isinstance(told, bytes)
            names = reflection_pb2.ServerReflectionResponse.FromString(told).list_services_response.service
            assert [name.name for name in names] == [reflection.SERVICE, "pagewire.v1.InferenceService"]
            while gate.num_calls < 2:
                await asyncio.sleep(0)

            path.write_text("# nobody any more\n")
            gate.look()
            gate.look()
            for ended in (silent, asking):
                assert await ended.code() is grpc.StatusCode.UNAUTHENTICATED

    asyncio.run(scenario())


def test_a_call_that_asks_by_reflection_and_sends_nonsense_hears_so() -> None:
    async def scenario() -> None:
        async with behind(Gate(None), reflection_handler([])) as channel:
            method: aio.StreamStreamMultiCallable[bytes, bytes] = channel.stream_stream(
                f"/{reflection.SERVICE}/ServerReflectionInfo"
            )
            asked = method(iter([b"\xff\xff"]))
            assert await asked.code() is grpc.StatusCode.INVALID_ARGUMENT

    asyncio.run(scenario())


def test_a_call_under_a_key_is_free_when_it_ends_and_waits_for_no_collector(tmp_path: Path) -> None:
    key = new_key()
    keys = keys_of(tmp_path / "keys", acme=key)

    async def scenario() -> None:
        tasks: list[weakref.ref[asyncio.Task[object]]] = []

        async def note(_: object, context: object) -> bytes:
            task = asyncio.current_task()
            assert task is not None
            tasks.append(weakref.ref(task))
            return b""

        method: grpc.RpcMethodHandler[bytes, bytes] = grpc.unary_unary_rpc_method_handler(note)
        handler = grpc.method_handlers_generic_handler("test.Service", {"Unary": method})
        async with behind(Gate(lambda: keys), handler) as channel:
            await call(channel, "Unary", bearer(key))
            while tasks[0]() is not None:
                await asyncio.sleep(0)

    gc.disable()
    try:
        asyncio.run(scenario())
    finally:
        gc.enable()


def test_calls_that_have_ended_are_not_kept(tmp_path: Path) -> None:
    key = new_key()
    keys = keys_of(tmp_path / "keys", acme=key)

    async def scenario() -> None:
        gate = Gate(lambda: keys)
        async with served(gate) as channel:
            for method in METHODS[:-1]:
                await call(channel, method, bearer(key))
            while gate.num_calls:
                await asyncio.sleep(0)

    asyncio.run(scenario())


@pytest.mark.parametrize("method", METHODS)
def test_more_metadata_than_any_call_needs_is_refused_whatever_grpc_lets_pass(method: str) -> None:
    async def scenario() -> tuple[grpc.StatusCode, str | None]:
        async with served(Gate(None, max_metadata_bytes=1000)) as channel:
            await call(channel, "Unary", (("x", "a" * 700),))
            with pytest.raises(aio.AioRpcError) as refused:
                await call(channel, method, (("x", "a" * 1000),))
            return refused.value.code(), refused.value.details()

    problem = "the metadata of a call has at most 1000 bytes"
    assert asyncio.run(scenario()) == (grpc.StatusCode.RESOURCE_EXHAUSTED, problem)
