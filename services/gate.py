"""The gate of the clients' server: no call passes without an API key, or with more metadata than any needs.

It stands before all services and not inside them, so one that is added later is guarded too. Only health can be asked
by anybody: who watches a server must not need a key. A call whose key is taken out of the file ends.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import grpc
from grpc import aio

from common.errors import Overloaded, Unauthenticated
from common.log import without_texts
from common.tenant import TenantLimits
from services import health
from services.api_keys import ApiKeys, read_api_keys
from services.caller import ANONYMOUS, Caller, let_in
from services.handlers import Context
from services.open_call import OpenCall, opened
from services.status import to_rpc_status
from services.watched_files import WatchedFiles

_log = logging.getLogger(__name__)

_OPEN: Final = f"/{health.SERVICE}/"
_MAX_HEADER: Final = 128  # characters: a key and its scheme, twice over
_TELL_EVERY_S: Final = 60.0
LOOK_EVERY_S: Final = 0.5

# The same words for no key, a wrong one and one that was withdrawn.
_UNKNOWN: Final = Unauthenticated("an API key is needed: send it as metadata, authorization: Bearer KEY")
_REFUSAL: Final = to_rpc_status(_UNKNOWN)

_HEADER_COST: Final = 32  # bytes of each header, as HTTP/2 counts them, beside its name and value

Metadata = Sequence[tuple[str, str | bytes]]

if TYPE_CHECKING:
    Handler = grpc.RpcMethodHandler[Any, Any] | None  # of unknown messages: it is generic in the stubs alone


class Gate(aio.ServerInterceptor):
    """`keys` gives the keys that are valid now; without it nobody is asked for one, and there is one tenant.

    gRPC bounds metadata only for those who have acknowledged its settings. Here nobody gets by with more.
    """

    def __init__(
        self,
        keys: Callable[[], ApiKeys] | None,
        *,
        max_metadata_bytes: int = 8192,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._keys = keys
        self._max_metadata_bytes = max_metadata_bytes
        self._too_large = to_rpc_status(Overloaded(f"the metadata of a call has at most {max_metadata_bytes} bytes"))
        self._clock = clock
        self._num_refused = 0
        self._told_s = -_TELL_EVERY_S
        self._calls: dict[asyncio.Task[Any], OpenCall] = {}  # where there are keys
        self._missing: set[asyncio.Task[Any]] = set()  # of these, those whose key was not there at the last look
        # Neither reads a message, whatever the method takes.
        self._refuse: Handler = grpc.stream_stream_rpc_method_handler(self._end)
        self._refuse_metadata: Handler = grpc.stream_stream_rpc_method_handler(self._end_large)

    @property
    def num_calls(self) -> int:
        """Calls that are open under a key."""
        return len(self._calls)

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Handler]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Handler:
        """Let the call in for its tenant, or end it."""
        if _size(handler_call_details.invocation_metadata) > self._max_metadata_bytes:
            return self._refuse_metadata
        if not handler_call_details.method.startswith(_OPEN):
            try:
                caller = self._caller(handler_call_details.invocation_metadata)
            except Exception as error:  # noqa: BLE001  whatever it is: nobody passes by it, and gRPC would send its text
                _log.error("the gate failed\n%s", "".join(without_texts(error)))
                caller = None
            if caller is None:
                return self._refuse
            let_in(caller)
            if self._keys is not None:
                self._remember(caller)
        return await continuation(handler_call_details)

    def limits_of(self, tenant: str) -> TenantLimits | None:
        """What the tenant may have by the file of keys; None where it says nothing."""
        return self._keys().limits_of(tenant) if self._keys is not None else None

    async def watch(self) -> None:
        """End calls whose keys are gone, until cancelled. Without keys there is nothing to do."""
        while self._keys is not None:
            await asyncio.sleep(LOOK_EVERY_S)
            self.look()

    def look(self) -> None:
        """End the calls whose keys are gone, and were at the last look: a file is empty while it is written anew."""
        if self._keys is None or not self._calls:
            return
        try:
            keys = self._keys()
        except Exception as error:  # noqa: BLE001  a bug there must not end the watch: the next look may be better
            _log.error("the gate failed\n%s", "".join(without_texts(error)))
            return
        missing = {task for task, call in self._calls.items() if not keys.holds(call.caller)}
        gone, self._missing = missing & self._missing, missing - self._missing
        if gone:
            _log.info("%d calls end: their API keys were withdrawn", len(gone))
        for task in gone:
            self._calls.pop(task).end(_UNKNOWN)

    def _remember(self, caller: Caller) -> None:
        """This task is the call, from here to its end."""
        task = asyncio.current_task()
        assert task is not None, "gRPC asks interceptors in the call's own task"
        call = self._calls[task] = OpenCall(caller, task)
        opened(call)
        task.add_done_callback(self._forget)

    def _forget(self, task: asyncio.Task[Any]) -> None:
        self._calls.pop(task, None)
        self._missing.discard(task)

    def _caller(self, metadata: Metadata) -> Caller | None:
        if self._keys is None:
            return ANONYMOUS
        given = [value for name, value in metadata if name == "authorization"]
        if len(given) != 1 or not isinstance(given[0], str) or len(given[0]) > _MAX_HEADER:
            return None
        scheme, _, key = given[0].partition(" ")
        return self._keys().find(key.strip()) if scheme.lower() == "bearer" else None

    async def _end_large(self, _: object, context: Context) -> None:
        await context.abort(self._too_large.code, self._too_large.message, self._too_large.trailing_metadata)

    async def _end(self, _: object, context: Context) -> None:
        self._num_refused += 1
        now = self._clock()
        if now - self._told_s >= _TELL_EVERY_S:  # whoever calls a thousand times a second does not fill the log
            self._told_s = now
            _log.warning("%d calls had no valid API key, the last from %s", self._num_refused, context.peer())
            self._num_refused = 0
        await context.abort(_REFUSAL.code, _REFUSAL.message, _REFUSAL.trailing_metadata)


def _size(metadata: Metadata) -> int:
    return sum(len(name) + len(value) + _HEADER_COST for name, value in metadata)


def keys_in(
    path: Path, defaults: TenantLimits | None = None, *, clock: Callable[[], float] = time.monotonic
) -> Callable[[], ApiKeys]:
    """The keys that are in the file now, for a gate. Raises KeyFileError at once when it cannot be used.

    The file is looked at more often than the gate looks, so that two looks of the gate's never are one of the file.
    """
    limits = defaults or TenantLimits()
    return WatchedFiles([path], lambda: read_api_keys(path, limits), look_every_s=LOOK_EVERY_S / 2, clock=clock).current
