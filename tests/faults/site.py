"""A scheduler and its executors, each started again whenever it dies, as a supervisor would.

Every process can be struck at a failpoint at a moment of one's choice. One executor dials through a proxy, and so do
clients, so that links can be broken, too.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import signal
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Final, Self

from grpc import aio

from protos import monitoring_pb2, monitoring_pb2_grpc
from services.failpoints import VARIABLE
from services.grpc_options import client_options
from tests.e2e.cluster import Process
from tests.e2e.sockets import port_that_stays
from tests.faults.proxy import Proxy
from tests.faults.recorder import History

_LOOK_S: Final = 0.01
_WHOLE_TIMEOUT_S: Final = 90.0
_EMPTY_TIMEOUT_S: Final = 60.0
_ARMED: Final = "failpoints are armed"  # the words of services/failpoints.py

Status = monitoring_pb2.GetStatusResponse


class Victim:
    """A process that can be struck."""

    def __init__(self, name: str, arguments: Sequence[str], folder: Path, rule: str = "") -> None:
        """With `rule` it is armed from its start on."""
        self.name = name
        self._orders = folder / f"{name}.orders"
        self._struck = folder / f"{name}.orders.struck"
        self._orders.write_text(rule)
        self._struck.unlink(missing_ok=True)
        self._log = folder / f"{name.partition('.')[0]}.log"
        self._num_armed = 0
        self.process = Process(arguments, self._log, {VARIABLE: f"@{self._orders}"})

    def arm(self, rule: str) -> None:
        """Have it struck, from now on. An empty rule takes that back."""
        self._num_armed = self._log.read_text().count(_ARMED)
        self._orders.write_text(rule)
        self.process.signal(signal.SIGUSR1)

    async def armed(self, timeout_s: float) -> None:
        """Return when it has read its orders, or will not any more."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                while not self.is_dead and self._log.read_text().count(_ARMED) <= self._num_armed:
                    await asyncio.sleep(_LOOK_S / 2)

    @property
    def is_struck(self) -> bool:
        """It was, at its failpoint."""
        return self._struck.exists()

    @property
    def is_dead(self) -> bool:
        """It has ended."""
        return self.process.popen.poll() is not None

    @property
    def is_frozen(self) -> bool:
        """It is stopped."""
        return _state(self.process.popen.pid) == "T"

    async def struck(self, timeout_s: float) -> bool:
        """Wait until it was struck; False when it was not in that time."""
        try:
            async with asyncio.timeout(timeout_s):
                while not self.is_struck:
                    await asyncio.sleep(_LOOK_S / 2)
        except TimeoutError:
            return False
        return True


class Site:
    """See above. `executors` is how many there are while all is well; the first dials through `wire`."""

    def __init__(
        self,
        name: str,
        model: Path,
        folder: Path,
        history: History,
        *,
        executors: int,
        ticket_keys: Path,
        scheduler_flags: Sequence[str],
        executor_flags: Sequence[str],
    ) -> None:
        self.name = name
        self.address = f"127.0.0.1:{port_that_stays()}"
        self.doors: list[Proxy] = []  # to the clients' address
        self.executors: list[Victim | None] = [None] * executors
        self._model = model
        self._folder = folder
        self._history = history
        self._link = f"unix:{folder}/{name}.link"
        self._admin = f"unix:{folder}/{name}.admin"
        self._scheduler_flags = ["--ticket-keys", str(ticket_keys), *scheduler_flags]
        self._executor_flags = executor_flags
        self._number = 0
        self._stack = contextlib.AsyncExitStack()
        self._processes: list[Victim] = []

    async def __aenter__(self) -> Self:
        self.scheduler = self._start_scheduler()
        await self._announced()
        self.wire = await self._stack.enter_async_context(Proxy(self._link))
        for _ in range(2):
            self.doors.append(await self._stack.enter_async_context(Proxy(self.address)))
        self._channel = await self._stack.enter_async_context(
            aio.insecure_channel(self._admin, options=client_options())
        )
        self._stub: monitoring_pb2_grpc.MonitoringServiceAsyncStub = monitoring_pb2_grpc.MonitoringServiceStub(
            self._channel
        )
        self._keeper = asyncio.create_task(self._keep())
        await self.whole()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None
    ) -> None:
        self._keeper.cancel()
        await asyncio.gather(self._keeper, return_exceptions=True)
        for victim in self._processes:
            victim.process.close()
        await self._stack.aclose()

    @property
    def processes(self) -> list[Victim]:
        """Those that live."""
        return [self.scheduler, *(victim for victim in self.executors if victim is not None)]

    async def status(self) -> Status | None:
        """What the scheduler says of itself; None while it does not answer."""
        try:
            return await self._stub.GetStatus(monitoring_pb2.GetStatusRequest(), timeout=5.0)
        except aio.AioRpcError:
            return None

    async def whole(self) -> None:
        """Return when every executor has joined and may be given work. Raises TimeoutError."""
        async with asyncio.timeout(_WHOLE_TIMEOUT_S):
            while True:
                names = {victim.name for victim in self.executors if victim is not None and not victim.is_dead}
                if len(names) == len(self.executors) and (status := await self.status()) is not None:
                    ready = {e.name for e in status.executors if not (e.silent or e.quarantined or e.held_back)}
                    if names == ready:
                        return
                await asyncio.sleep(3 * _LOOK_S)

    async def empty(self) -> str:
        """Return when nothing runs and every block is free; what is still held, when that is never."""
        status = None
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_EMPTY_TIMEOUT_S):
                while True:
                    status = await self.status()
                    if status is not None and _is_empty(status):
                        return ""
                    await asyncio.sleep(10 * _LOOK_S)
        return f"{self.name} is not empty: {str(status).split()}"

    def start_one_more(self, rule: str) -> Victim:
        """An executor beside the others, armed from its start on. When it is dead, nobody takes its place."""
        return self._start_executor(len(self.executors), rule)

    def end(self, victim: Victim) -> None:
        """Let go of one that was started beside the others."""
        self._processes.remove(victim)
        victim.process.close()

    # ---- the supervisor

    async def _keep(self) -> None:
        while True:
            if self.scheduler.is_dead:
                self._processes.remove(self.scheduler)
                self.scheduler.process.close()
                self.scheduler = self._start_scheduler()
            for slot, victim in enumerate(self.executors):
                if victim is None or victim.is_dead:
                    if victim is not None:
                        self._processes.remove(victim)
                        victim.process.close()
                    self.executors[slot] = self._start_executor(slot)
            await asyncio.sleep(_LOOK_S)

    def _start_scheduler(self) -> Victim:
        self._number += 1
        name = f"scheduler-{self.name}.{self._number}"
        self._history.write("start", what=name)
        victim = Victim(
            name,
            [
                *("scheduler", "--model", str(self._model), "--listen", self.address, "--link-listen", self._link),
                *("--admin-listen", self._admin, *self._scheduler_flags),
            ],
            self._folder,
        )
        self._processes.append(victim)
        return victim

    def _start_executor(self, slot: int, rule: str = "") -> Victim:
        self._number += 1
        name = f"executor-{self.name}{slot}.{self._number}"
        self._history.write("start", what=name)
        victim = Victim(
            name,
            [
                *("executor", "--model", str(self._model), "--name", name),
                *("--scheduler", self._link if slot else self.wire.address),
                *self._executor_flags,
            ],
            self._folder,
            rule,
        )
        self._processes.append(victim)
        return victim

    async def _announced(self) -> None:
        while not (line := self.scheduler.process.look()):
            await asyncio.sleep(_LOOK_S)
        announced: Mapping[str, str] = json.loads(line)
        self.address = announced["listen"]


def _is_empty(status: Status) -> bool:
    held = status.scheduler.num_running + status.scheduler.num_waiting
    return not held and all(e.num_free_blocks == e.num_blocks and not e.num_running for e in status.executors)


def _state(pid: int) -> str:
    """The kernel's letter for a process; empty for one that is gone."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return ""
    return stat.rpartition(")")[2].split()[0]
