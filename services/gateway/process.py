"""The gateway's process: an HTTP server in front of the schedulers at some addresses. It holds nothing that matters."""

from __future__ import annotations

import asyncio
import json
import logging
import ssl
from collections.abc import Callable, Coroutine, Sequence
from typing import Any, Final, Self

from common.config import GatewayConfig
from common.errors import PagewireError, Unavailable
from services import client, lifecycle, tls
from services.admin import NONE, find_admin
from services.gateway.app import Gateway
from services.gateway.bodies import Bodies
from services.gateway.connection import ConnectionLimits
from services.gateway.events import Patience
from services.gateway.hosts import read_hosts
from services.gateway.live import LiveView, Watch, read_access
from services.gateway.metrics import AskStatus, Metrics
from services.gateway.server import HttpServer
from services.gateway.upstream import Upstream, connect
from services.lifecycle import StartupError
from services.tracing import open_tracer
from services.watched_files import WatchedFiles

log = logging.getLogger(__name__)

DEFAULT_HTTP: Final = "127.0.0.1:8000"

_LOOK_S: Final = 1.0
_STATUS_S: Final = 2.0  # one that stands still is told of within the 5 s that a scrape often has

Follow = Callable[[], Coroutine[Any, Any, None]]


async def run(
    config: GatewayConfig,
    addresses: Sequence[str],
    files: tls.PemFiles | None,
    *,
    insecure: bool,
    ready_fd: int | None = None,
    otlp_endpoint: str = "",
) -> None:
    """Serve until SIGTERM or SIGINT, then let requests finish within the grace.

    `files` are for the schedulers' TLS. Announces `{"http": "HOST:PORT"}`. Raises StartupError before it listens.
    """
    http = config.http or DEFAULT_HTTP
    served = tls.server_files(config.http_tls_cert, config.http_tls_key, config.http_tls_client_ca, flags="--http-tls")
    missing = [] if served else ["--http-tls-cert", "--http-tls-key"]
    lifecycle.check_bind(http, insecure=insecure, missing=missing)
    hosts = read_hosts(config.http_hosts, is_local=lifecycle.is_local(http))
    access = read_access(config.live_view, is_local=lifecycle.is_local(http))
    lifecycle.keep_secrets()
    lifecycle.take_descriptors()
    stop = lifecycle.stop_event()
    async with connect(
        addresses,
        files,
        insecure=insecure,
        patience_s=config.http_patience_s,
        begin_patience_s=config.http_begin_patience_s,
    ) as upstream:
        needs_key = not insecure and not lifecycle.is_local(http)
        if needs_key:
            await _check_keys(upstream, http, stop)
        tracer = open_tracer("gateway", otlp_endpoint)
        metrics = Metrics(_status_of(config.http_admin, addresses[0]), upstream.is_reachable)
        gateway = Gateway(
            upstream,
            Bodies(
                max_bytes=config.http_max_body_bytes,
                limit_s=config.http_body_s,
                max_total_bytes=config.http_max_bodies_bytes,
            ),
            Patience(comment_s=config.http_comment_s, reader_s=config.http_reader_timeout_s),
            metrics,
            max_requests=config.http_max_requests,
            max_prompts=config.http_max_prompts,
            max_scores_bytes=config.http_max_scores_bytes,
            unknown_fields=config.http_unknown_fields,
            metrics_need_key=needs_key,
            hosts=hosts,
            live=LiveView(access, lambda: _watch_of(config.http_admin, addresses[0])),
            tracer=tracer,
        )
        limits = ConnectionLimits(
            most=config.http_max_connections,
            head_s=config.http_head_s,
            head_bytes=config.http_max_head_bytes,
            idle_s=config.http_idle_s,
            reader_s=config.http_reader_timeout_s,
        )
        context, follow = _tls(served)
        server = HttpServer(gateway, limits, context)
        metrics.num_connections = lambda: server.num_connections
        if stop.is_set():
            return
        address = await server.listen(http)
        following = asyncio.create_task(follow())
        try:
            lifecycle.spare_the_collector()
            lifecycle.announce(ready_fd, json.dumps({"http": address}))
            log.info("listening on %s for OpenAI's clients; schedulers: %s", address, ", ".join(addresses))
            await stop.wait()
            gateway.drain()
            log.info("draining %d requests, at most %g s", metrics.num_open, config.http_drain_s)
            await server.drain(config.http_drain_s)
            if tracer is not None:
                tracer.close()
        finally:
            following.cancel()
            await asyncio.gather(following, return_exceptions=True)
    log.info("stopped")


async def _check_keys(upstream: Upstream, http: str, stop: asyncio.Event) -> None:
    """Wait for a scheduler, and see that it asks for keys: who can reach this address can ask it anything.

    Raises StartupError where it asks nobody.
    """
    told = False
    while not stop.is_set():
        try:
            if await upstream.asks_for_keys():
                return
        except Unavailable:
            if not told:
                log.info("waiting for a scheduler, which must ask for API keys before %s is opened", http)
                told = True
            await asyncio.sleep(_LOOK_S)
        else:
            raise StartupError(
                f"{http} can be reached from other machines, and the scheduler asks nobody for an API key. Start it "
                f"with --api-keys, bind 127.0.0.1, or type --insecure if the network itself is trusted."
            )


def _status_of(admin: str, address: str) -> AskStatus | None:
    """How to ask for what /metrics tells of the scheduler; None where its operator's socket is not here."""
    found = _admin_of(admin, address)
    return None if found is None else lambda: client.status(found, _STATUS_S)


def _watch_of(admin: str, address: str) -> Watch | None:
    """How to ask for what the live view shows; None where the operator's socket is not here."""
    found = _admin_of(admin, address)
    return None if found is None else lambda interval_ms: client.watch(found, interval_ms)


def _admin_of(admin: str, address: str) -> str | None:
    if admin == NONE:
        return None
    if admin:
        return admin
    try:
        return find_admin(address)
    except PagewireError:  # on another machine, or it is not there yet
        return None


def _tls(files: tls.PemFiles | None) -> tuple[ssl.SSLContext | None, Follow]:
    """A context for the server, and what keeps it up to date with the files. Raises CertificateError."""
    if files is None:
        return None, _nothing
    watched = WatchedFiles([path for path in (files.cert, files.key, files.ca) if path], lambda: tls.read(files))
    known = watched.current()
    context = _Newest(_context(files))

    async def follow() -> None:
        nonlocal known
        while True:
            await asyncio.sleep(_LOOK_S)
            if (found := watched.current()) is not known:
                known = found
                try:
                    context.newest = _context(files)
                except (OSError, ssl.SSLError):
                    log.error("%s changed while it was read; what was read before stays in force", files.cert)

    return context, follow


class _Newest(ssl.SSLContext):
    """In place of the newest context at each handshake.

    Nothing takes an authority out of what a context trusts, and a session that began under one is taken up by it alone.
    """

    newest: ssl.SSLContext

    def __new__(cls, newest: ssl.SSLContext) -> Self:
        """Begin with this one."""
        self = super().__new__(cls, ssl.PROTOCOL_TLS_SERVER)
        self.newest = newest
        return self

    def wrap_bio(self, *arguments: Any, **named: Any) -> ssl.SSLObject:
        """As asyncio calls it for each connection."""
        return self.newest.wrap_bio(*arguments, **named)


def _context(files: tls.PemFiles) -> ssl.SSLContext:
    """What the files say now."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    assert files.cert is not None, "a server without a certificate"
    context.load_cert_chain(files.cert, files.key)
    if files.ca is not None:
        context.load_verify_locations(files.ca)
        context.verify_mode = ssl.CERT_REQUIRED
    return context


async def _nothing() -> None:
    pass
