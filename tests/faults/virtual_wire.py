"""gRPC between simulated processes: real handlers at one end, calls like those of grpc.aio at the other.

One call has one connection of its own. Like TCP it keeps the order of what it carries and loses nothing while it lives;
it is slow, it stalls, it is cut, it goes dark in one direction or both, and a peer that is dark for longer than gRPC's
pings allow is seen as gone. A fault that TCP does not have, a message twice or changed, is a sender's bug: `tamper`.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from typing import Any, Final, Literal, NamedTuple, Never, Self

import grpc
from grpc import aio

from tests.faults.virtual_time import Process, World

PING_TIMEOUT_S: Final = 3.0  # services/grpc_options.py: a ping a second, answered within two
_CONNECT_TIMEOUT_S: Final = 20.0  # what gRPC gives a dial that nobody answers
_LOST: Final = ("connection lost", grpc.StatusCode.UNAVAILABLE)

Metadata = tuple[tuple[str, str | bytes], ...]


class Item(NamedTuple):
    """What travels in one direction."""

    kind: Literal["open", "message", "half_close", "status", "cancel"]
    data: bytes = b""
    code: grpc.StatusCode = grpc.StatusCode.OK
    details: str = ""
    trailers: Metadata = ()


@dataclass(frozen=True, slots=True)
class CallDetails:
    """What a generic handler is asked with."""

    method: str
    invocation_metadata: Metadata = ()


Tamper = Callable[[Item], list[Item]]


class Pipe:
    """One direction of a connection."""

    def __init__(self, connection: Connection, arrive: Callable[[Item], None]) -> None:
        self.tamper: Tamper | None = None
        self.is_dark = False
        self._connection = connection
        self._arrive = arrive
        self._held: list[tuple[int, Item]] = []  # lost in the dark, by their number: they are sent again
        self._landed: dict[int, Item] = {}  # after one that is missing
        self._num_sent = self._num_arrived = 0
        self._last_s = 0.0

    def send(self, item: Item) -> None:
        """The sender's kernel has it."""
        for each in self.tamper(item) if self.tamper is not None and item.kind == "message" else (item,):
            self._carry(self._num_sent, each)
            self._num_sent += 1

    def light(self) -> None:
        """Packets pass again: what was held is sent once more."""
        self.is_dark = False
        held, self._held = self._held, []
        for number, item in held:
            self._carry(number, item)

    def _carry(self, number: int, item: Item) -> None:
        if self.is_dark:
            self._held.append((number, item))
            return
        world = self._connection.world
        self._last_s = max(self._last_s + 1e-6, world.now_s + self._connection.latency_s())
        world.at(self._last_s, lambda: self._land(number, item))

    def _land(self, number: int, item: Item) -> None:
        if self._connection.is_cut:
            return
        if self.is_dark:
            self._held.append((number, item))
            return
        self._landed[number] = item
        while (following := self._landed.pop(self._num_arrived, None)) is not None:  # TCP keeps the order
            self._num_arrived += 1
            self._arrive(following)


class Connection:
    """One call from `client` to `server`."""

    def __init__(self, network: Network, client: Process, server: Process, details: CallDetails) -> None:
        self.network = network
        self.world = network.world
        self.client, self.server = client, server
        self.details = details
        self.is_cut = False
        self._gave_up = False  # one end, in the dark
        self.base_s = self.world.draw.uniform(0.00005, 0.002)
        self.jitter_s = 0.0
        self.window = 1000  # messages that may be on their way down
        self.one_message = False  # the client sends one, together with the call
        self.deadline_s: float | None = None
        self.call = ClientCall(self)
        self.context = ServerContext(self)
        self.up = Pipe(self, self._arrive_up)
        self.down = Pipe(self, self._arrive_down)
        self._ends: dict[Process, ClientCall | ServerContext] = {client: self.call, server: self.context}

    @property
    def is_over(self) -> bool:
        """Neither end has anything to hear any more."""
        return all(end.is_over for end in self._ends.values())

    def latency_s(self) -> float:
        """How long the next message travels."""
        return self.base_s + self.world.draw.random() * self.jitter_s

    def cut(self, *, why: str = _LOST[0]) -> None:
        """RST: what is on its way is lost, and both ends are told."""
        if not self.is_cut:
            self.is_cut = True
            for process in self._ends:
                self._tell(process, why)

    def darken(self, seconds: float, *, up: bool = True, down: bool = True) -> None:
        """No packet passes. TCP would wait for minutes; gRPC's pings do not."""
        self.up.is_dark |= up
        self.down.is_dark |= down
        self.world.after(seconds, self._light)
        # a ping is lost in either direction, or its answer is
        for process in self._ends:
            wait_s = PING_TIMEOUT_S + self.world.draw.uniform(-1.0, 0.4)
            if seconds > wait_s:
                self.world.after(wait_s, lambda process=process: self._tell(process, "ping timeout"))  # type: ignore[misc]

    def _light(self) -> None:
        if self._gave_up:
            self.cut()  # who has given up answers the first packet with RST
        elif not self.is_cut:
            self.up.light()
            self.down.light()

    def peer_is_stopped(self, stopped: Process) -> None:
        """Its kernel acknowledges, and nobody answers pings: the other end gives up, if it is still so by then."""
        stop = self.network.stopped[stopped]

        def give_up() -> None:
            if self.network.stopped.get(stopped) == stop:
                self.cut(why="ping timeout")

        self.world.after(PING_TIMEOUT_S + self.world.draw.uniform(-1.0, 0.4), give_up)

    def _tell(self, process: Process, why: str) -> None:
        """One end finds the connection broken. A dark connection breaks at each end when that end notices."""
        self._gave_up = True
        self._ends[process].break_off(why)

    def _arrive_up(self, item: Item) -> None:
        self.world.note("up", item.kind, item.data)
        self.server.call(self.context.hear, item)

    def _arrive_down(self, item: Item) -> None:
        self.world.note("down", item.kind, item.data)
        self.client.call(self.call.hear, item)


class _Inbox:
    """What has arrived at one end and was not read."""

    def __init__(self) -> None:
        self._items: deque[bytes] = deque()
        self._ended = False
        self._waiter: asyncio.Future[None] | None = None

    def put(self, data: bytes) -> None:
        self._items.append(data)
        self._wake()

    def end(self, *, lose: bool = False) -> None:
        """Nothing more comes. With `lose`, what was not read is gone too."""
        self._ended = True
        if lose:
            self._items.clear()
        self._wake()

    async def get(self) -> bytes | None:
        """The next message; None when there will be none."""
        while not self._items:
            if self._ended:
                return None
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter
        return self._items.popleft()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)


class ServerContext:
    """What grpc.aio gives a handler, as far as ours use it."""

    def __init__(self, connection: Connection) -> None:
        self.is_over = False
        self._connection = connection
        self._inbox = _Inbox()
        self._task: asyncio.Task[Any] | None = None
        self._trailers: Metadata = ()
        self._client_gone = False
        self._aborted: aio.AbortError | None = None
        self._unread = 0  # messages that the client has not read yet
        self._room: asyncio.Future[None] | None = None

    # ---- for handlers

    async def read(self) -> Any:
        data = await self._inbox.get()
        return aio.EOF if data is None else data

    async def write(self, data: bytes) -> None:
        while self._unread >= self._connection.window and not self.is_over:  # HTTP/2's flow control
            self._room = asyncio.get_running_loop().create_future()
            await self._room
        if self.is_over:
            raise asyncio.CancelledError if self._client_gone else aio.UsageError("the call is over")
        assert isinstance(data, bytes)
        self._unread += 1
        self._connection.down.send(Item("message", data))

    async def send_initial_metadata(self, metadata: Metadata) -> None:
        if self.is_over:
            raise asyncio.CancelledError if self._client_gone else aio.UsageError("the call is over")

    async def abort(self, code: grpc.StatusCode, details: str = "", trailing_metadata: Metadata = ()) -> Never:
        self._finish(code, details, tuple(trailing_metadata))
        self._aborted = aio.AbortError()
        raise self._aborted

    def peer(self) -> str:
        return f"simulated:{self._connection.client.name}"

    def trailing_metadata(self) -> Metadata:
        return self._trailers

    def set_trailing_metadata(self, trailers: Metadata) -> None:
        self._trailers = trailers

    def invocation_metadata(self) -> Metadata:
        return self._connection.details.invocation_metadata

    def time_remaining(self) -> float | None:
        deadline_s = self._connection.deadline_s
        return None if deadline_s is None else max(0.0, deadline_s - self._connection.world.now_s)

    def cancelled(self) -> bool:
        return self._client_gone

    def done(self) -> bool:
        return self.is_over

    # ---- for the connection

    def was_read(self) -> None:
        """The client took one message."""
        self._unread -= 1
        self._wake_writer()

    def _wake_writer(self) -> None:
        if self._room is not None and not self._room.done():
            self._room.set_result(None)

    def hear(self, item: Item) -> None:
        if self.is_over:
            return
        if item.kind == "open":
            self._task = self._connection.server.create_task(self._serve(item.data))
        elif item.kind == "message":
            self._inbox.put(item.data)
        elif item.kind == "half_close":
            self._inbox.end()
        else:
            self._client_left()

    def break_off(self, why: str) -> None:
        self._connection.server.call(self._client_left)

    def _client_left(self) -> None:
        """A read may end before the task hears that it is cancelled: gRPC promises no order."""
        if self.is_over:
            return
        self._client_gone = self.is_over = True
        self._wake_writer()
        if self._connection.world.draw.random() < 0.5:
            self._inbox.end()
            self._connection.server.call_soon(self._cancel)
        else:
            self._cancel()

    def _cancel(self) -> None:
        if self._task is not None:
            self._task.cancel()

    def _finish(self, code: grpc.StatusCode, details: str, trailers: Metadata) -> None:
        if not self.is_over:
            self.is_over = True
            self._connection.down.send(Item("status", b"", code, details, trailers))

    def _raise_if_aborted(self) -> None:
        """As gRPC does when a handler returns."""
        if self._aborted is not None:
            raise self._aborted

    async def _serve(self, request: bytes) -> None:
        handler: Any = await self._connection.network.handler(self._connection.server, self._connection.details)
        if handler is None:
            self._finish(grpc.StatusCode.UNIMPLEMENTED, "no such method", ())
            return
        try:
            if self._connection.one_message:
                self._inbox.put(request)
                self._inbox.end()
            if handler.response_streaming:
                await handler.stream_stream(None, self)
                self._raise_if_aborted()
            else:
                response = await handler.stream_unary(None, self)
                self._raise_if_aborted()
                await self.write(response)
        except aio.AbortError:
            pass
        except asyncio.CancelledError:
            if not self._client_gone:
                self._connection.network.broken_rules.append(f"{self._connection.details.method} left its client alone")
            raise
        except Exception as error:  # noqa: BLE001 - gRPC would send its text to the client
            self._connection.network.broken_rules.append(f"{self._connection.details.method}: {error!r} escaped")
            self._finish(grpc.StatusCode.UNKNOWN, "an exception escaped", ())
        else:
            task = asyncio.current_task()
            if task is not None and task.cancelling():  # gRPC leaks memory for every call where that is done
                self._connection.network.broken_rules.append(f"{self._connection.details.method} swallowed its cancel")
            self._finish(grpc.StatusCode.OK, "", self._trailers)


def _hand(handler: Any) -> Callable[[Any], Awaitable[Any]]:
    async def found(_: object) -> Any:
        return handler

    return found


class ClientCall:
    """A call as grpc.aio gives it to the one who calls."""

    def __init__(self, connection: Connection) -> None:
        self.is_over = False
        self._connection = connection
        self._inbox = _Inbox()
        self._status: Item | None = None
        self._over = asyncio.Event()

    # ---- for callers

    async def write(self, data: bytes) -> None:
        if self._status is not None:
            raise asyncio.InvalidStateError("RPC already finished.")
        self._connection.up.send(Item("message", data))

    async def read(self) -> Any:
        try:
            data = await self._inbox.get()
        except asyncio.CancelledError:
            self.cancel()
            raise
        if data is None:
            self._raise_for_status()
            return aio.EOF
        connection = self._connection
        connection.world.after(connection.base_s, lambda: connection.server.call(connection.context.was_read))
        return data

    async def done_writing(self) -> None:
        self._connection.up.send(Item("half_close"))

    def cancel(self) -> bool:
        if self._status is not None:
            return False
        self._end(Item("status", b"", grpc.StatusCode.CANCELLED, "Locally cancelled by application!"))
        self._connection.up.send(Item("cancel"))
        return True

    async def code(self) -> grpc.StatusCode:
        await self._over.wait()
        assert self._status is not None
        return self._status.code

    async def details(self) -> str:
        await self._over.wait()
        assert self._status is not None
        return self._status.details

    def done(self) -> bool:
        return self._status is not None

    async def __aiter__(self) -> AsyncIterator[bytes]:
        while (data := await self.read()) is not aio.EOF:
            yield data

    # ---- for the connection

    def hear(self, item: Item) -> None:
        if self._status is not None:
            return
        if item.kind == "message":
            self._inbox.put(item.data)
        else:
            self._end(item)

    def break_off(self, why: str) -> None:
        """What had arrived and was not read may be lost with the connection."""
        status = Item("status", b"", grpc.StatusCode.UNAVAILABLE, why)
        self._connection.client.call(self._end, status, self._connection.world.draw.random() < 0.5)

    def _end(self, status: Item, lose: bool = False) -> None:
        if self._status is None:
            self._status = status
            self.is_over = True
            self._over.set()
            self._inbox.end(lose=lose)

    def _raise_for_status(self) -> None:
        status = self._status
        assert status is not None
        if status.code is not grpc.StatusCode.OK:
            raise aio.AioRpcError(status.code, aio.Metadata(), aio.Metadata(*status.trailers), details=status.details)


class Network:
    """Who listens where, and every connection that was made."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.connections: list[Connection] = []
        self.stopped: dict[Process, int] = {}  # by SIGSTOP; which of all stops it is
        self.broken_rules: list[str] = []
        self.jitter_s = 0.0  # of connections to come
        self._listeners: dict[str, Process] = {}
        self._handlers: dict[Process, list[tuple[grpc.GenericRpcHandler, aio.ServerInterceptor | None]]] = {}

    def listen(self, address: str, process: Process) -> None:
        """Who dials the address from now on comes to the process."""
        self._listeners[address] = process

    def close(self, process: Process) -> None:
        """The process accepts no connection any more."""
        self._listeners = {address: other for address, other in self._listeners.items() if other is not process}

    def serve(
        self, process: Process, handler: grpc.GenericRpcHandler, interceptor: aio.ServerInterceptor | None = None
    ) -> None:
        """What the process does for those who dial it."""
        self._handlers.setdefault(process, []).append((handler, interceptor))

    async def handler(self, server: Process, details: CallDetails) -> Any:
        """What serves the method, behind the interceptor that stands before it."""
        for generic, interceptor in self._handlers.get(server, ()):
            found = generic.service(details)  # type: ignore[arg-type]
            if found is not None:
                if interceptor is None:
                    return found
                return await interceptor.intercept_service(_hand(found), details)  # type: ignore[arg-type]
        return None

    def open(
        self,
        client: Process,
        address: str,
        method: str,
        request: bytes | None = None,
        *,
        metadata: Metadata = (),
        timeout_s: float | None = None,
        window: int = 1000,
    ) -> ClientCall:
        """Dial and call. Nobody there is told as gRPC tells it."""
        server = self._listeners.get(address)
        details = CallDetails(method, metadata)
        if server is None or server.dead:
            connection = Connection(self, client, client, details)
            client.call_later(connection.base_s, connection.call.break_off, "failed to connect to all addresses")
            return connection.call
        connection = Connection(self, client, server, details)
        connection.deadline_s = None if timeout_s is None else self.world.now_s + timeout_s
        connection.jitter_s = self.jitter_s
        connection.window = window
        self.connections.append(connection)
        connection.one_message = request is not None
        connection.up.send(Item("open", request or b""))
        if server in self.stopped:  # the kernel answers the dial; nobody answers a ping
            connection.peer_is_stopped(server)
        return connection.call

    def of(self, process: Process) -> list[Connection]:
        """Connections that live, of one process."""
        return [c for c in self.live() if process in (c.client, c.server)]

    def live(self) -> list[Connection]:
        """All connections that live."""
        self.connections = [c for c in self.connections if not c.is_over]
        return self.connections

    def kill(self, process: Process) -> None:
        """The process vanishes; its kernel resets what it had open."""
        process.kill()
        for connection in self.of(process):
            connection.cut(why="connection reset by peer")

    def freeze(self, process: Process, seconds: float) -> None:
        """SIGSTOP, and SIGCONT later. A process that is stopped answers no ping."""
        if process.frozen or process.dead:
            return
        self.stopped[process] = self.world.next_number()
        process.freeze()
        for connection in self.of(process):
            connection.peer_is_stopped(process)
        self.world.after(seconds, lambda: self._go_on(process))

    def _go_on(self, process: Process) -> None:
        del self.stopped[process]
        process.thaw()

    def stall(self, process: Process, seconds: float) -> None:
        """The event loop stands still (a long callback); gRPC's own threads answer pings."""
        if not process.frozen and not process.dead:
            process.freeze()
            self.world.after(seconds, process.thaw)


class Channel:
    """As much of an aio channel as the processes use."""

    def __init__(self, network: Network, client: Process, address: str) -> None:
        self._network, self._client, self._address = network, client, address

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self, grace: float | None = None) -> None:
        pass

    def stream_stream(self, method: str, **_: Any) -> Callable[..., ClientCall]:
        return lambda **__: self._network.open(self._client, self._address, method)

    def unary_stream(self, method: str, *, window: int = 1000, **_: Any) -> Callable[..., ClientCall]:
        def call(request: bytes, *, timeout: float | None = None, metadata: Metadata = (), **_: Any) -> ClientCall:
            return self._network.open(
                *(self._client, self._address, method, request), metadata=metadata, timeout_s=timeout, window=window
            )

        return call

    def unary_unary(self, method: str, **_: Any) -> Callable[..., Awaitable[bytes]]:
        async def call(request: bytes, *, timeout: float, metadata: Metadata = (), **_: Any) -> bytes:  # noqa: ASYNC109 - gRPC calls it so
            made = self._network.open(self._client, self._address, method, request, metadata=metadata)
            try:
                async with asyncio.timeout(timeout):
                    answer: bytes = await made.read()
            except TimeoutError:
                made.cancel()
                raise aio.AioRpcError(
                    grpc.StatusCode.DEADLINE_EXCEEDED, aio.Metadata(), aio.Metadata(), details="Deadline Exceeded"
                ) from None
            return answer

        return call
