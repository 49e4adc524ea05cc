"""The scheduler process: servers for clients, for executors and for its operator, around one engine.

Each has an address of its own: a client can never dial in as an executor nor ask what other tenants do, and each side
has the gRPC options and the protection it needs. Probes may have one, too: a kubelet's speak no TLS.
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
import logging
import os
import secrets
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Final, NoReturn

import grpc
from grpc import aio

from common.config import SchedulerConfig
from common.log import without_texts
from common.model_folder import read_model_folder
from common.sampling import RequestLimits
from common.tenant import TenantLimits
from protos import inference_pb2, monitoring_pb2
from scheduler.pins import PinLimits
from scheduler.reputation import Patience
from scheduler.scheduler import Scheduler, SchedulerLimits
from services import health, lifecycle, request_log, ticket_keys, tls
from services.admin import admin_address, bind_admin
from services.admission import Admission, AdmissionLimits
from services.answering import Answerer
from services.chat_template import ChatTemplate
from services.draining import drain
from services.engine import Engine
from services.gate import Gate, keys_in
from services.grammar_checker import GrammarChecker
from services.grpc_options import link_options, server_options
from services.handlers import Arrivals, service_handler
from services.health import Health
from services.in_turns import InTurns
from services.latencies import Latencies
from services.lifecycle import StartupError
from services.link_service import ExecutorLinkService
from services.live_requests import LiveRequests
from services.metrics_server import MetricsServer
from services.model_store import home
from services.monitoring import Monitoring
from services.prometheus import of_status
from services.reflection import reflection_handler
from services.scheduler_service import SchedulerService
from services.slow_readers import SlowReaders
from services.text import Tokenizer
from services.tickets import TicketKey, Tickets
from services.timelines import Timelines
from services.tools.formats import FORMATS
from services.traced_calls import TracedCalls
from services.tracing import open_tracer

if TYPE_CHECKING:
    from services.vllm_api.service import VllmEngine

if TYPE_CHECKING:
    from services.open_inference.stream import Streams

log = logging.getLogger(__name__)

SERVICE = inference_pb2.DESCRIPTOR.services_by_name["InferenceService"].full_name
MONITORING = monitoring_pb2.DESCRIPTOR.services_by_name["MonitoringService"].full_name
OPEN_INFERENCE: Final = "inference.GRPCInferenceService"

_LAST_WORDS_S: Final = 5.0  # for the ends of calls, which are many at once when a drain is over


async def run(
    config: SchedulerConfig, model_path: Path, ready_fd: int | None = None, *, otlp_endpoint: str = ""
) -> None:
    """Serve until SIGTERM or SIGINT, then let running requests finish within the grace.

    Announces `{"listen": "HOST:PORT", "link": "…", "admin": "unix:…", "health": "…"}` once all servers accept. Raises
    StartupError and ModelFolderError before it listens.
    """
    lifecycle.check_binds(config)
    gate, client_tls, link_tls = _security(config)
    lifecycle.keep_secrets()
    lifecycle.take_descriptors()
    stop = lifecycle.stop_event()
    model = read_model_folder(model_path)
    limits = SchedulerLimits(
        token_budget=config.token_budget,
        max_running=config.max_running,
        watermark=config.watermark,
        reserve=config.reserve,
        prefix_caching=config.prefix_caching,
        pins=PinLimits(max_tokens_per_tenant=config.max_pinned_tokens_per_tenant, max_share=config.max_pinned_share),
        patience=Patience(
            quarantine_ns=round(config.quarantine_s * 1e9), longest_hold_ns=round(config.max_executor_hold_s * 1e9)
        ),
    )
    core = Scheduler(limits, model=model.digest, eos=set(model.eos_token_ids), secret=secrets.token_bytes(32))
    admission = Admission(
        AdmissionLimits(
            max_calls=config.max_streams,
            max_waiting=config.max_waiting,
            max_waiting_tokens=config.max_waiting_tokens,
            max_ttft_s=config.max_ttft_s,
        ),
        tenants=gate.limits_of,
        default=_tenant_limits(config),
    )
    latencies = Latencies()
    tracer = open_tracer("scheduler", otlp_endpoint, model=model.name)
    afterwards = InTurns(request_log.tell, *([tracer.request_ended] if tracer is not None else []))
    engine = Engine(
        core,
        admission=admission,
        timelines=Timelines(
            max_requests=config.max_timelines,
            max_events=config.max_timeline_events,
            on_end=(latencies.add, afterwards),
            records=tracer is not None,
        ),
        executor_wait_s=config.executor_wait_s,
        max_request_s=config.max_request_s,
        max_chunk_tokens=config.max_chunk_tokens,
    )
    grammars = GrammarChecker(model, cpu_s=config.grammar_cpu_s, memory_mib=config.grammar_memory_mib)
    template = ChatTemplate.of(model, FORMATS.get(config.tool_format)) if model.has_chat_template else None
    answerer = Answerer(
        engine,
        model,
        Tokenizer(model.path / "tokenizer.json"),
        template,
        default_max_tokens=config.default_max_tokens,
        tickets=Tickets(_ticket_keys(config.ticket_keys), lifetime_s=config.ticket_lifetime_s),
        live=LiveRequests(linger_s=config.linger_s, max_lingering=config.max_lingering),
        grammars=grammars,
    )
    request_limits = RequestLimits(
        max_choices=config.max_choices,
        max_embedding_inputs=config.max_embedding_inputs,
        max_embedding_bytes=config.max_embedding_bytes,
        max_structured_bytes=config.max_grammar_bytes,
        max_pin_seconds=config.max_pin_seconds,
    )
    service = SchedulerService(answerer, request_limits, lambda: len(core.sessions))
    readers = SlowReaders(config.reader_timeout_s)
    links = ExecutorLinkService(
        engine,
        model,
        hello_timeout_s=config.first_message_s,
        suspect_s=config.suspect_s,
        silence_s=config.silence_s,
        lease_s=config.lease_s,
        step_timeout_s=config.step_timeout_s,
        step_patience_s=config.step_patience_s,
        tracer=tracer,
    )

    handshake_ms = round(1000 * config.handshake_s)
    clients = aio.server(
        interceptors=(gate, TracedCalls(tracer, SERVICE)),
        options=server_options(
            max_streams=config.max_streams,
            max_message_bytes=config.max_message_bytes,
            handshake_timeout_ms=handshake_ms,
        ),
    )
    arrivals = Arrivals(limit_s=config.first_message_s, at_once=config.max_streams)
    served = [SERVICE]
    vllm_engine = _vllm_engine(service, answerer, engine, config) if config.vllm_api else None
    if vllm_engine is not None:
        served.append(vllm_engine.name)
        clients.add_generic_rpc_handlers(
            (
                service_handler(
                    vllm_engine.name,
                    vllm_engine.file,
                    vllm_engine.methods(),
                    open_call=admission.open_call,
                    arrivals=arrivals,
                    write=readers.write,
                ),
            )
        )
    streams: Streams | None = None
    if config.open_inference:
        from services.open_inference.serving import open_inference

        idle = Arrivals(limit_s=config.open_inference_idle_s, at_once=config.max_streams)
        handler, streams = open_inference(
            answerer,
            request_limits,
            is_ready=lambda: engine.can_serve,
            open_call=admission.open_call,
            arrivals=arrivals,
            idle=idle,
            write=readers.write,
        )
        clients.add_generic_rpc_handlers((handler,))
        served.append(OPEN_INFERENCE)
    health_service = Health(served, max_watches=config.max_health_watches)
    clients.add_generic_rpc_handlers(
        (
            service_handler(
                SERVICE,
                inference_pb2.DESCRIPTOR,
                service,
                open_call=admission.open_call,
                arrivals=arrivals,
                write=readers.write,
            ),
            reflection_handler(
                (*served, health.SERVICE),
                open_call=admission.open_call,
                arrivals=arrivals,
                write=readers.write,
            ),
            health_service.handler(),
        )
    )
    executors = aio.server(options=link_options(handshake_timeout_ms=handshake_ms))
    executors.add_generic_rpc_handlers((links.handler(),))
    monitoring = Monitoring(engine, latencies)
    admins = aio.server(options=server_options(max_streams=64))
    admins.add_generic_rpc_handlers(
        (
            service_handler(MONITORING, monitoring_pb2.DESCRIPTOR, monitoring),
            reflection_handler((MONITORING,)),
        )
    )

    probes = aio.server(
        options=server_options(max_streams=64, max_message_bytes=1024, handshake_timeout_ms=handshake_ms)
    )
    probes.add_generic_rpc_handlers((health_service.handler(),))

    listen = _bind(clients, config.listen, client_tls)
    if config.local_listen:
        _bind(clients, config.local_listen, None)
    link = _bind(executors, config.link_listen, link_tls)
    if admin := admin_address(config.admin_listen, listen):
        bind_admin(admins, admin)
        await admins.start()
    health_listen = ""
    if config.health_listen:
        health_listen = _bind(probes, config.health_listen, None)
        await probes.start()
    await clients.start()
    await executors.start()
    metrics_server = MetricsServer(partial(_metrics, monitoring))
    measured = {}
    if config.metrics_listen:
        measured["metrics"] = await metrics_server.listen(config.metrics_listen)
        log.info("http://%s/metrics is for Prometheus", measured["metrics"])
    lifecycle.spare_the_collector()
    loop_task = asyncio.create_task(engine.run(), name="engine")
    others = [
        asyncio.create_task(_tell_health(engine, health_service), name="health"),
        asyncio.create_task(gate.watch(), name="gate"),
    ]
    log.info("serving %s on %s; executors dial %s", model.name, listen, link)
    if template is not None:
        told = "its chat template" if template.knows_tools else "the system message"
        log.info("tools are told of by %s, and called as %s does", told, template.tool_format.name)
    addresses = {"listen": listen, "link": link, "admin": admin, "health": health_listen, **measured}
    lifecycle.announce(ready_fd, json.dumps(addresses))
    try:
        stopping = asyncio.create_task(stop.wait())
        await asyncio.wait({stopping, loop_task}, return_when=asyncio.FIRST_COMPLETED)
        if loop_task.done():
            _die_of(loop_task.exception())
        log.info("draining %d sequences, at most %g s", engine.num_requests, config.drain_s)

        def announce() -> None:
            health_service.shut_down()
            if vllm_engine is not None:
                vllm_engine.close()  # who routes by what is cached here sends it elsewhere from now on

        await drain(engine, links, loop_task, grace_s=config.drain_s, announce=announce)
        if loop_task.done():
            _die_of(loop_task.exception())
        health_service.close()
        if streams is not None:
            streams.close()
        await clients.stop(grace=_LAST_WORDS_S)
        await executors.stop(grace=0.5)
        await admins.stop(grace=0.5)
        await probes.stop(grace=0.5)
        await metrics_server.close()
        afterwards.finish()
        if tracer is not None:
            tracer.close()
    finally:
        for task in (loop_task, *others):
            task.cancel()
        await asyncio.gather(loop_task, *others, return_exceptions=True)
        await grammars.close()
    log.info("stopped: %s", core.counters, extra={"fields": dataclasses.asdict(core.counters)})


def _vllm_engine(service: SchedulerService, answerer: Answerer, engine: Engine, config: SchedulerConfig) -> VllmEngine:
    """SMG's way in. Raises StartupError where its messages are not installed."""
    from services.vllm_api.service import VllmEngine

    return VllmEngine(service.start, service.Embed, answerer, engine, max_kv_streams=config.max_kv_streams)


def _ticket_keys(path: str) -> list[TicketKey]:
    """The keys in the file, or at the usual place; there, a process that may not write goes on with one of its own."""
    if path:
        return ticket_keys.read_or_make(Path(path))
    try:
        return ticket_keys.read_or_make(home() / "ticket-keys")
    except StartupError as error:
        log.warning("no stream of this process can be resumed by another: %s", error)
        return [ticket_keys.new_key()]


def _die_of(bug: BaseException | None) -> NoReturn:
    """End at once: a core that failed cannot be trusted, and whoever started this process starts it anew."""
    assert bug is not None, "the engine's loop has no end"
    log.critical("the engine failed\n%s", "".join(without_texts(bug)))
    logging.shutdown()
    os._exit(os.EX_SOFTWARE)


def _security(config: SchedulerConfig) -> tuple[Gate, grpc.ServerCredentials | None, grpc.ServerCredentials | None]:
    """The gate of the clients' server, its TLS and that of the link. Raises StartupError for a file it cannot use."""
    keys = None
    if config.api_keys:
        path = Path(config.api_keys)
        keys = keys_in(path, _tenant_limits(config))
        if not len(keys()):
            log.warning("%s holds no key: every call is refused. Make one: pagewire api-key TENANT >> %s", path, path)
    clients = tls.server_files(config.tls_cert, config.tls_key, config.tls_client_ca, flags="--tls")
    link = tls.server_files(config.link_tls_cert, config.link_tls_key, config.link_tls_ca, flags="--link-tls")
    return (
        Gate(keys),
        tls.server_credentials(clients) if clients is not None else None,
        tls.server_credentials(link) if link is not None else None,
    )


def _tenant_limits(config: SchedulerConfig) -> TenantLimits:
    """What a tenant may have of whom nothing else is said."""
    return TenantLimits(tokens_per_s=config.tenant_tokens_per_s, burst_tokens=config.tenant_burst_tokens)


def _bind(server: aio.Server, address: str, credentials: grpc.ServerCredentials | None) -> str:
    """The bound address, with the port that was really taken. Raises StartupError when it is taken already."""
    try:
        port = server.add_secure_port(address, credentials) if credentials else server.add_insecure_port(address)
    except RuntimeError as error:
        raise StartupError(
            f"cannot listen on {address}: the port is taken, or not allowed. Another scheduler may run there; "
            f"stop it, or choose another port (port 0 takes a free one)."
        ) from error
    if address.startswith("unix"):
        return address
    return f"{address.rpartition(':')[0]}:{port}"


async def _metrics(monitoring: Monitoring) -> str:
    """What Prometheus is told."""
    return "\n".join(of_status(monitoring.status())) + "\n"


async def _tell_health(engine: Engine, service: Health) -> None:
    """SERVING while an executor is there that stays. Pushed, never computed by a probe."""
    while True:
        service.set_serving(engine.can_serve)
        await engine.executors_changed()
