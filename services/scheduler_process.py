"""The scheduler process: two servers, one for clients and one for executors, around one engine.

Two ports on purpose: a client can never dial in as an executor, and each side has the gRPC options it needs.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import gc
import json
import logging
import os
import secrets
from pathlib import Path
from typing import NoReturn

from grpc import aio
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from common import failpoints
from common.config import SchedulerConfig
from common.model_folder import read_model_folder
from common.sampling import RequestLimits
from protos import inference_pb2, monitoring_pb2
from scheduler.scheduler import Scheduler, SchedulerLimits
from services import lifecycle
from services.answering import Answerer
from services.chat_template import ChatTemplate
from services.engine import Engine
from services.grpc_options import link_options, server_options
from services.handlers import service_handler, without_texts
from services.lifecycle import StartupError
from services.link_service import ExecutorLinkService
from services.monitoring import Monitoring
from services.scheduler_service import SchedulerService
from services.text import Tokenizer

log = logging.getLogger(__name__)

SERVICE = inference_pb2.DESCRIPTOR.services_by_name["InferenceService"].full_name
MONITORING = monitoring_pb2.DESCRIPTOR.services_by_name["MonitoringService"].full_name


async def run(config: SchedulerConfig, model_path: Path, ready_fd: int | None = None) -> None:
    """Serve until SIGTERM or SIGINT, then let running requests finish within the grace.

    Announces `{"listen": "HOST:PORT", "link": "…"}` once both servers accept. Raises StartupError and
    ModelFolderError before it listens.
    """
    lifecycle.check_bind(config.listen, insecure=config.insecure)
    lifecycle.check_bind(config.link_listen, insecure=config.insecure)
    stop = lifecycle.stop_event()
    model = read_model_folder(model_path)
    limits = SchedulerLimits(
        token_budget=config.token_budget,
        max_running=config.max_running,
        watermark=config.watermark,
        prefix_caching=config.prefix_caching,
    )
    core = Scheduler(limits, model=model.digest, eos=set(model.eos_token_ids), secret=secrets.token_bytes(32))
    engine = Engine(core, executor_wait_s=config.executor_wait_s, max_waiting=config.max_waiting)
    answerer = Answerer(
        engine,
        model,
        Tokenizer(model.path / "tokenizer.json"),
        ChatTemplate.of(model) if model.has_chat_template else None,
        default_max_tokens=config.default_max_tokens,
    )
    service = SchedulerService(
        answerer,
        RequestLimits(max_choices=config.max_choices),
        lambda: len(core.sessions),
        max_streams=config.max_streams,
    )
    links = ExecutorLinkService(engine, model, silence_s=config.silence_s, step_timeout_s=config.step_timeout_s)

    clients = aio.server(
        options=server_options(max_streams=config.max_streams, max_message_bytes=config.max_message_bytes)
    )
    clients.add_generic_rpc_handlers((service_handler(SERVICE, inference_pb2.DESCRIPTOR, service),))
    clients.add_generic_rpc_handlers((service_handler(MONITORING, monitoring_pb2.DESCRIPTOR, Monitoring(core)),))
    health_servicer = health.aio.HealthServicer()
    health_pb2_grpc.add_HealthServicer_to_server(health_servicer, clients)
    reflection.enable_server_reflection((SERVICE, MONITORING, health.SERVICE_NAME, reflection.SERVICE_NAME), clients)
    executors = aio.server(options=link_options())
    executors.add_generic_rpc_handlers((links.handler(),))

    listen = _bind(clients, config.listen)
    link = _bind(executors, config.link_listen)
    await clients.start()
    await executors.start()
    _spare_the_collector()
    loop_task = asyncio.create_task(engine.run(), name="engine")
    health_task = asyncio.create_task(_tell_health(engine, health_servicer), name="health")
    log.info("serving %s on %s; executors dial %s", model.name, listen, link)
    lifecycle.announce(ready_fd, json.dumps({"listen": listen, "link": link}))
    try:
        stopping = asyncio.create_task(stop.wait())
        await asyncio.wait({stopping, loop_task}, return_when=asyncio.FIRST_COMPLETED)
        if loop_task.done():
            _die_of(loop_task.exception())
        log.info("draining %d sequences, at most %g s", engine.num_requests, config.drain_s)
        engine.draining = True
        failpoints.hit("mid_drain")
        await health_servicer.enter_graceful_shutdown()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(config.drain_s):
                await engine.idle()
        await clients.stop(grace=1.0)
        await executors.stop(grace=0.5)
    finally:
        for task in (loop_task, health_task):
            task.cancel()
        await asyncio.gather(loop_task, health_task, return_exceptions=True)
    log.info("stopped: %s", core.counters, extra={"fields": dataclasses.asdict(core.counters)})


def _spare_the_collector() -> None:
    """What is loaded by now stays for ever: a full collection would walk it for tens of milliseconds, in a step."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 100)


def _die_of(bug: BaseException | None) -> NoReturn:
    """End at once: a core that failed cannot be trusted, and whoever started this process starts it anew."""
    assert bug is not None, "the engine's loop has no end"
    log.critical("the engine failed\n%s", "".join(without_texts(bug)))
    logging.shutdown()
    os._exit(os.EX_SOFTWARE)


def _bind(server: aio.Server, address: str) -> str:
    """The bound address, with the port that was really taken. Raises StartupError when it is taken already."""
    try:
        port = server.add_insecure_port(address)
    except RuntimeError as error:
        raise StartupError(
            f"cannot listen on {address}: the port is taken, or not allowed. Another scheduler may run there; "
            f"stop it, or choose another port (port 0 takes a free one)."
        ) from error
    if address.startswith("unix"):
        return address
    return f"{address.rpartition(':')[0]}:{port}"


async def _tell_health(engine: Engine, servicer: health.aio.HealthServicer) -> None:
    """SERVING while an executor is connected. Pushed, never computed by a probe."""
    while True:
        serving = bool(engine.scheduler.sessions)
        status = health_pb2.HealthCheckResponse.SERVING if serving else health_pb2.HealthCheckResponse.NOT_SERVING
        for name in ("", SERVICE):
            await servicer.set(name, status)
        await engine.executors_changed()
