"""What the command line asks of a server: answers by the client that everybody has, and what only operators ask.

Every failure is a PagewireError that a person can read.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import grpc
from grpc import aio
from grpc_health.v1 import health_pb2

from common.errors import PagewireError, Unauthenticated, Unavailable
from pagewire.aio import AsyncClient, AsyncStream
from protos import inference_pb2 as pb
from protos import inference_pb2_grpc, monitoring_pb2, monitoring_pb2_grpc
from services.grpc_options import client_options
from services.lifecycle import is_local
from services.status import DETAILS_KEY, from_rpc_error
from services.tls import Dialer, PemFiles


@dataclass(frozen=True, slots=True, kw_only=True)
class Server:
    """Where a scheduler is, and how it is called."""

    address: str
    api_key: str = field(default="", repr=False)
    tls: PemFiles | None = None
    insecure: bool = False  # the key may go over the network without TLS


_NO_HURRY_S = 86_400.0  # whoever reads the answer ends it


class Client:
    """The public API over one channel."""

    def __init__(
        self, channel: aio.Channel, asking: AsyncClient, address: str, api_key: str = "", *, has_tls: bool = False
    ) -> None:
        self._address = address
        self._has_tls = has_tls
        self._asking = asking
        self._metadata = bearer(api_key)
        self._stub: inference_pb2_grpc.InferenceServiceAsyncStub = inference_pb2_grpc.InferenceServiceStub(channel)
        self._check = channel.unary_unary(
            "/grpc.health.v1.Health/Check",
            request_serializer=health_pb2.HealthCheckRequest.SerializeToString,
            response_deserializer=health_pb2.HealthCheckResponse.FromString,
        )

    def ask(self, request: pb.GenerateStreamRequest) -> AsyncStream:
        """The answer as it is made, also by a server that was started again meanwhile."""
        return self._asking.send(request)

    async def model(self, timeout_s: float = 5.0) -> pb.GetModelResponse:
        """What is served."""
        try:
            return await self._stub.GetModel(pb.GetModelRequest(), timeout=timeout_s, metadata=self._metadata)
        except aio.AioRpcError as error:
            raise _for_people(error, self._address, has_tls=self._has_tls) from error

    async def is_serving(self, timeout_s: float = 5.0) -> bool:
        """Whether the server says that it can answer requests."""
        try:
            answer = await self._check(health_pb2.HealthCheckRequest(), timeout=timeout_s)
        except aio.AioRpcError as error:
            raise _for_people(error, self._address, has_tls=self._has_tls) from error
        return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)


@asynccontextmanager
async def connect(server: Server) -> AsyncIterator[Client]:
    """A client of the server. Raises PagewireError where its key would go over a network that anybody can listen to."""
    key = server.api_key
    if key and server.tls is None and not server.insecure and not is_local(server.address):
        raise PagewireError(f"the API key is not sent to {server.address} without TLS: give --tls-ca, or --insecure")
    if not (key.isascii() and key.isprintable()) or " " in key:  # gRPC would repeat it in its complaint
        raise PagewireError("the API key is not printable ASCII: the file must hold the key and nothing else")
    dial = Dialer(server.address, client_options(), server.tls)
    async with (
        dial() as channel,
        AsyncClient(
            server.address,
            api_key=key,
            insecure=server.insecure,
            timeout_s=_NO_HURRY_S,
            credentials=dial.credentials(),
        ) as asking,
    ):
        yield Client(channel, asking, server.address, key, has_tls=server.tls is not None)


def bearer(key: str) -> tuple[tuple[str, str], ...]:
    """The metadata that shows an API key; none for an empty one."""
    return (("authorization", f"Bearer {key}"),) if key else ()


async def status(admin: str, timeout_s: float = 5.0) -> monitoring_pb2.GetStatusResponse:
    """What the server with this admin socket did and does."""
    async with aio.insecure_channel(admin, options=client_options()) as channel:
        stub: monitoring_pb2_grpc.MonitoringServiceAsyncStub = monitoring_pb2_grpc.MonitoringServiceStub(channel)
        try:
            return await stub.GetStatus(monitoring_pb2.GetStatusRequest(), timeout=timeout_s)
        except aio.AioRpcError as error:
            raise _for_people(error, admin) from error


async def watch(admin: str, interval_ms: int) -> AsyncGenerator[monitoring_pb2.WatchStateResponse, None]:
    """What the server with this admin socket does, again and again, until it is closed."""
    request = monitoring_pb2.WatchStateRequest(interval_ms=interval_ms)
    async with aio.insecure_channel(admin, options=client_options()) as channel:
        stub: monitoring_pb2_grpc.MonitoringServiceAsyncStub = monitoring_pb2_grpc.MonitoringServiceStub(channel)
        try:
            async for state in stub.WatchState(request):
                yield state
        except aio.AioRpcError as error:
            raise _for_people(error, admin) from error


async def explain(
    admin: str, request_id: str, tenant: str | None = None, timeout_s: float = 5.0
) -> monitoring_pb2.ExplainResponse:
    """What happened to a request on the server with this admin socket. Raises UnknownRequest."""
    async with aio.insecure_channel(admin, options=client_options()) as channel:
        stub: monitoring_pb2_grpc.MonitoringServiceAsyncStub = monitoring_pb2_grpc.MonitoringServiceStub(channel)
        request = monitoring_pb2.ExplainRequest(request_id=request_id, tenant=tenant)
        try:
            return await stub.Explain(request, timeout=timeout_s)
        except aio.AioRpcError as error:
            raise _for_people(error, admin) from error


def _for_people(error: aio.AioRpcError, address: str, *, has_tls: bool | None = None) -> PagewireError:
    """The error in words, also where it is gRPC's own and not the server's. `has_tls`: None where nobody may."""
    details = error.details() or "no details"
    if error.code() is grpc.StatusCode.UNAVAILABLE and DETAILS_KEY not in error.trailing_metadata():
        return Unavailable(f"no connection to {address}: {_why(details, has_tls=has_tls)}")
    if error.code() is grpc.StatusCode.UNAUTHENTICATED:
        return Unauthenticated(f"{address} asks for an API key that it knows: give --api-key-file FILE")
    if error.code() is grpc.StatusCode.UNIMPLEMENTED:
        return PagewireError(f"what answers on {address} is not a Pagewire server for clients ({details})")
    known = from_rpc_error(error)
    return known if isinstance(known, PagewireError) else PagewireError(f"{error.code().name}: {details}")


def _why(details: str, *, has_tls: bool | None) -> str:
    """Why there is no connection, and what to type next."""
    # gRPC tells the whole story in one line, from general to particular; the last part is what a person can use, unless
    # that is the OK which it puts behind a fault of TLS
    reason = details.rstrip("].").removesuffix(": OK").rsplit(": ", 1)[-1]
    if "CERTIFICATE_VERIFY_FAILED" in details:
        return f"its certificate is not trusted: {reason}. If that is the right server, {_mend(reason)}"
    if "Hostname Verification Check failed" in details:
        return "its certificate is for another name. Call it by a name that is in there"
    if "WRONG_VERSION_NUMBER" in details:
        return "it speaks no TLS. If that is the right server, leave out --tls-ca"
    if reason == "Socket closed" and has_tls is False:
        return "it closed the connection. If it speaks TLS, name the authority of its certificate: --tls-ca FILE"
    if reason == "Socket closed" and has_tls:
        return "it closed the connection. If it asks for a certificate, show one: --client-cert FILE --client-key FILE"
    return f"{reason}. Is a server running there? Start one: pagewire serve"


def _mend(reason: str) -> str:
    """What helps against a certificate's fault."""
    if "expired" in reason:
        return "put a new one there"
    if "not yet valid" in reason:
        return "set the clock of this machine"
    if "issuer" in reason or "self-signed" in reason or "self signed" in reason:
        return "name the authority that signed it: --tls-ca FILE"
    return "make it one for servers"
