"""How a scheduler leaves: it takes nothing new, what runs may finish within the grace, the rest goes on elsewhere."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

from common import failpoints
from common.errors import Unavailable
from services.engine import Engine
from services.link_service import ExecutorLinkService

log = logging.getLogger(__name__)


async def drain(
    engine: Engine,
    links: ExecutorLinkService,
    loop: asyncio.Task[None],
    *,
    grace_s: float,
    announce: Callable[[], None],
) -> None:
    """Return when nothing runs any more, after `grace_s` at the latest, or when the engine's `loop` has failed.

    `announce` tells that nobody should come.
    """
    engine.drain()
    announce()
    failpoints.hit("mid_drain")
    idle = asyncio.create_task(engine.idle())
    await asyncio.wait({idle, loop}, timeout=grace_s, return_when=asyncio.FIRST_COMPLETED)
    idle.cancel()
    if loop.done():
        return
    if engine.num_requests:
        log.info("%d sequences go on elsewhere: their callers have tickets", engine.num_requests)
    links.stopping()
    engine.fail_all(Unavailable("the scheduler is shutting down; the rest of the answer is to be had elsewhere"))
