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

from common.config import ExecutorConfig, LogConfig, SchedulerConfig
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


@asynccontextmanager
async def cluster(
    scheduler: SchedulerConfig,
    executor: ExecutorConfig,
    *,
    num_executors: int,
    model: Path,
    logs: LogConfig,
    on_start: Callable[[str], None] = lambda what: None,
    quiet: bool = False,
) -> AsyncIterator[Cluster]:
    """Start everything, wait until it serves, keep it alive, and end it all on leaving.

    Executors dial a socket in a folder that only this user can open, so no port is needed for them. Raises
    ChildFailed when a process cannot start.
    """
    with tempfile.TemporaryDirectory(prefix="pagewire-") as folder:
        link = f"unix:{folder}/link"
        scheduler = replace(
            scheduler, model=str(model), link_listen=link, link_tls_cert="", link_tls_key="", link_tls_ca=""
        )
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
            address = json.loads(await starting[0])["listen"]
            # from now on the port is fixed: a scheduler that is started again must be found where it was
            first.arguments = ["scheduler", *to_flags(replace(scheduler, listen=address)), *to_flags(logs)]
            keepers.append(asyncio.create_task(keep_alive(first)))
            await asyncio.gather(*starting)
            keepers += [asyncio.create_task(keep_alive(child)) for child in others]
            yield Cluster(address=address, scheduler=first, executors=others)
        finally:
            for task in (*starting, *keepers):
                task.cancel()
            await asyncio.gather(*starting, *keepers, return_exceptions=True)
            await first.stop(scheduler.drain_s + 10)  # it lets requests finish on the executors, so it goes first
            await asyncio.gather(*(child.stop(10) for child in others))


async def serve(
    scheduler: SchedulerConfig,
    executor: ExecutorConfig,
    *,
    num_executors: int,
    model: Path,
    logs: LogConfig,
    stop: asyncio.Event,
    on_ready: Callable[[str], None],
) -> None:
    """Serve until `stop` is set, which may be before everything is up."""

    async def run() -> None:
        async with cluster(
            scheduler,
            executor,
            num_executors=num_executors,
            model=model,
            logs=logs,
            on_start=lambda what: log.info("starting %s", what),
        ) as running:
            on_ready(running.address)
            await asyncio.Event().wait()

    serving, stopping = asyncio.create_task(run()), asyncio.create_task(stop.wait())
    await asyncio.wait({serving, stopping}, return_when=asyncio.FIRST_COMPLETED)
    if serving.done():
        serving.result()
    serving.cancel()  # ends the processes in order
    stopping.cancel()
    await asyncio.gather(serving, stopping, return_exceptions=True)
