"""grpc.health.v1.Health: whether requests can be answered now. Everybody may ask, so what asking can cost is bounded.

gRPC's own servicer writes to a watcher under the lock that a change of the status waits for, and counts no watchers.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncGenerator, Iterable
from typing import Final, cast

import grpc
from google.protobuf.descriptor import FileDescriptor
from google.protobuf.message import Message
from grpc_health.v1 import health_pb2 as pb

from common.errors import Overloaded, Unavailable
from services.handlers import Context, service_handler

SERVICE: Final = pb.DESCRIPTOR.services_by_name["Health"].full_name

LIVENESS: Final = "liveness"
"""The name under which it is SERVING as long as the process answers at all, whatever becomes of its executors."""

_COME_BACK_S: Final = 5.0


class Health:
    """One answer for the server and all its services, NOT_SERVING until told otherwise; and another for `liveness`.

    `max_watches`: Watch calls that may be open at once. One host may have as many as are still free, so there is always
    room for another one. Check is always answered.
    """

    def __init__(self, services: Iterable[str], *, max_watches: int = 256) -> None:
        self._names = {"", LIVENESS, *services}
        self._max_watches = max_watches
        self._watches = Counter[str]()  # by host
        self._is_serving = False
        self._is_stopping = False
        self._is_over = False
        self._changed = asyncio.Event()  # another one after each change

    @property
    def num_watches(self) -> int:
        """Watch calls that are open."""
        return self._watches.total()

    def set_serving(self, is_serving: bool) -> None:
        """Tell what is so from now on. After `shut_down` nothing changes any more."""
        if not self._is_stopping and is_serving != self._is_serving:
            self._is_serving = is_serving
            self._wake()

    def shut_down(self) -> None:
        """NOT_SERVING, for good."""
        self.set_serving(False)
        self._is_stopping = True

    def close(self) -> None:
        """End all watches."""
        self._is_over = True
        self._wake()

    def handler(self) -> grpc.GenericRpcHandler:
        """What a gRPC server serves."""
        return service_handler(SERVICE, cast("FileDescriptor", pb.DESCRIPTOR), self)

    async def Check(self, request: pb.HealthCheckRequest, context: Context) -> pb.HealthCheckResponse:  # noqa: N802
        """The status now."""
        if request.service not in self._names:
            await context.abort(grpc.StatusCode.NOT_FOUND, "no service of that name is served here")
        return pb.HealthCheckResponse(status=self._status_of(request.service))

    async def List(self, request: Message, context: Context) -> Message:  # noqa: N802
        """The status of each service now."""
        told = {name: pb.HealthCheckResponse(status=self._status_of(name)) for name in self._names}
        response: Message = pb.HealthListResponse(statuses=told)  # type: ignore[attr-defined]  # its stubs are older
        return response

    async def Watch(  # noqa: N802
        self, request: pb.HealthCheckRequest, context: Context
    ) -> AsyncGenerator[pb.HealthCheckResponse, None]:
        """The status now, and each one after it. Raises Overloaded for one watch too many."""
        host = context.peer().rpartition(":")[0]
        num_watches = self.num_watches
        if self._watches[host] >= self._max_watches - num_watches:
            raise Overloaded(f"{num_watches} watches are open already; Check is always answered", _COME_BACK_S)
        self._watches[host] += 1
        try:
            told: int | None = None
            while True:
                changed, status, is_over = self._changed, self._status_of(request.service), self._is_over
                if status != told:
                    told = status
                    yield pb.HealthCheckResponse(status=status)
                if is_over:  # the last word has been told, too, however soon the end came behind it
                    break
                await changed.wait()
        finally:
            self._watches[host] -= 1
            if not self._watches[host]:
                del self._watches[host]
        raise Unavailable("the scheduler is shutting down")

    def _status_of(self, service: str) -> int:
        if service not in self._names:
            return pb.HealthCheckResponse.SERVICE_UNKNOWN
        if service == LIVENESS:
            return pb.HealthCheckResponse.SERVING
        return pb.HealthCheckResponse.SERVING if self._is_serving else pb.HealthCheckResponse.NOT_SERVING

    def _wake(self) -> None:
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()
