"""`serve`: a scheduler and its local executors as processes of their own, kept alive, ended together."""

from __future__ import annotations

import asyncio
import json
import logging
import tempfile
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from common.config import ExecutorConfig, GatewayConfig, LogConfig, SchedulerConfig
from services.admin import NONE
from services.children import Child, keep_alive
from services.cores import usable_cores
from services.flags import to_flags
from services.lifecycle import check_binds

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Cluster:
    """What runs."""

    address: str  # for clients
    scheduler: Child
    executors: list[Child]
    http: str = ""  # for OpenAI's clients; empty without a gateway


@asynccontextmanager
async def cluster(
    scheduler: SchedulerConfig,
    executor: ExecutorConfig,
    *,
    num_executors: int,
    model: Path,
    logs: LogConfig,
    gateway: GatewayConfig | None = None,
    on_start: Callable[[str], None] = lambda what: None,
    quiet: bool = False,
) -> AsyncIterator[Cluster]:
    """Start everything, wait until it serves, keep it alive, and end it all on leaving.

    Executors and a gateway dial sockets in a folder that only this user can open, so no ports are needed for them.
    Raises ChildFailed when a process cannot start.
    """
    with tempfile.TemporaryDirectory(prefix="pagewire-") as folder:
        link = f"unix:{folder}/link"
        scheduler = replace(
            scheduler, model=str(model), link_listen=link, link_tls_cert="", link_tls_key="", link_tls_ca=""
        )
        if gateway is not None:
            scheduler = replace(scheduler, local_listen=f"unix:{folder}/clients")
        check_binds(scheduler)
        threads = executor.threads or max(1, usable_cores() // num_executors)
        executor = replace(
            executor,
            model=str(model),
            scheduler=link,
            threads=threads,
            link_tls_cert="",
            link_tls_key="",
            link_tls_ca="",
        )
        first = Child("scheduler", ["scheduler", *to_flags(scheduler), *to_flags(logs)], quiet=quiet)
        door, drain_s = Child("gateway", [], quiet=quiet), gateway.http_drain_s if gateway is not None else 0.0
        others: list[Child] = []
        for i in range(num_executors):
            named = replace(executor, name=executor.name or f"executor-{i}")
            others.append(Child(named.name, ["executor", *to_flags(named), *to_flags(logs)], quiet=quiet))
        starting: list[asyncio.Task[str]] = []
        keepers: list[asyncio.Task[None]] = []
        try:
            on_start("scheduler")
            on_start(f"{num_executors} executor{'s' if num_executors > 1 else ''}: loading the model")
            # all at once: an executor dials until the scheduler is there, and has more to load
            starting += [asyncio.create_task(child.start()) for child in (first, *others)]
            announced = json.loads(await starting[0])
            address = announced["listen"]
            # from now on the port is fixed: a scheduler that is started again must be found where it was
            first.arguments = ["scheduler", *to_flags(replace(scheduler, listen=address)), *to_flags(logs)]
            keepers.append(asyncio.create_task(keep_alive(first)))
            await asyncio.gather(*starting)
            keepers += [asyncio.create_task(keep_alive(child)) for child in others]
            http = ""
            if gateway is not None:
                on_start("gateway")
                gateway = replace(gateway, http_admin=gateway.http_admin or announced["admin"] or NONE)
                http = await _open(door, gateway, scheduler, logs)
                keepers.append(asyncio.create_task(keep_alive(door)))
            yield Cluster(address=address, scheduler=first, executors=others, http=http)
        finally:
            for task in (*starting, *keepers):
                task.cancel()
            await asyncio.gather(*starting, *keepers, return_exceptions=True)
            # these let requests finish on the executors, so they go first; what the gateway has open is the scheduler's
            await asyncio.gather(first.stop(scheduler.drain_s + 10), door.stop(max(scheduler.drain_s, drain_s) + 10))
            await asyncio.gather(*(child.stop(10) for child in others))


async def serve(
    scheduler: SchedulerConfig,
    executor: ExecutorConfig,
    *,
    num_executors: int,
    model: Path,
    logs: LogConfig,
    gateway: GatewayConfig | None = None,
    stop: asyncio.Event,
    on_ready: Callable[[Cluster], None],
) -> None:
    """Serve until `stop` is set, which may be before everything is up."""

    async def run() -> None:
        async with cluster(
            scheduler,
            executor,
            num_executors=num_executors,
            model=model,
            logs=logs,
            gateway=gateway,
            on_start=lambda what: log.info("starting %s", what),
        ) as running:
            on_ready(running)
            await asyncio.Event().wait()

    serving, stopping = asyncio.create_task(run()), asyncio.create_task(stop.wait())
    await asyncio.wait({serving, stopping}, return_when=asyncio.FIRST_COMPLETED)
    if serving.done():
        serving.result()
    serving.cancel()  # ends the processes in order
    stopping.cancel()
    await asyncio.gather(serving, stopping, return_exceptions=True)


async def _open(door: Child, gateway: GatewayConfig, scheduler: SchedulerConfig, logs: LogConfig) -> str:
    """Start the gateway before the scheduler; returns the address that it has taken."""
    flags = [f"--address={scheduler.local_listen}", *(["--insecure"] if scheduler.insecure else []), *to_flags(logs)]
    door.arguments = ["gateway", *to_flags(gateway), *flags]
    http: str = json.loads(await door.start())["http"]
    # where it was started once it must be found again
    door.arguments = ["gateway", *to_flags(replace(gateway, http=http)), *flags]
    return http
