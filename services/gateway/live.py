"""The live view: one page, and what it shows of the scheduler as server-sent events.

On loopback it is there unless it is switched off, without the names of tenants: other users of the machine may look,
too. Where other machines can reach the gateway, or where names are to be shown, it needs a key of its own, which is no
tenant's: `--live-view FILE`.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import hmac
import json
import re
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from starlette.requests import Request
from starlette.responses import Response

from common.addresses import is_loopback, name_of
from common.errors import InvalidRequest, Overloaded, PagewireError, Unauthenticated, Unavailable
from common.types import Priority
from protos import monitoring_pb2 as pb
from services.gateway.errors import NotShown
from services.gateway.events import event

Watch = Callable[[int], AsyncGenerator[pb.WatchStateResponse, None]]

MAX_VIEWS: Final = 8
MAX_KEY: Final = 128  # characters of any key that can be shown here; the scheduler takes no longer ones either
_LEAST_KEY: Final = 16

NO_STATE: Final = (
    "the scheduler's state cannot be read from here: its operator's socket is not there, or not this user's. Start the "
    "gateway on its machine, as its user, with --http-admin unix:PATH of the scheduler's --admin-listen"
)
NOT_SHOWN: Final = (
    "the live view is shown to this machine alone, and not through a proxy or to pages of other sites. To show it to "
    "others, too, write a key into a file and start the gateway with --live-view FILE"
)

_OF_PROXIES: Final = ("x-forwarded-for", "x-forwarded-host", "forwarded", "x-real-ip", "via")
_OWN_PAGE: Final = ("", "same-origin", "none")  # what a browser says of who asks: nothing, this page, its user


@dataclass(frozen=True, slots=True, kw_only=True)
class LiveAccess:
    """Who may look: whoever shows `key`, or where there is none, this machine if `local`, and else nobody."""

    local: bool = False
    key: str = ""


def read_access(setting: str, *, is_local: bool) -> LiveAccess:
    """As `--live-view` says: empty, none, or a file with a key. Raises PagewireError for what is no key."""
    if setting == "none":
        return LiveAccess()
    if not setting:
        return LiveAccess(local=is_local)
    try:
        key = Path(setting).read_text("utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "not a text file"
        raise PagewireError(f"--live-view {setting}: {why}") from error
    if not _LEAST_KEY <= len(key) <= MAX_KEY or not key.isascii() or not key.isprintable() or " " in key:
        raise PagewireError(
            f"--live-view {setting}: must hold a key and nothing else, {_LEAST_KEY} to {MAX_KEY} printable "
            f"characters: openssl rand -hex 16 > {setting}"
        )
    return LiveAccess(key=key)


class LiveView:
    """`watch` asks the scheduler for pictures, an interval in milliseconds apart; None: it is not here."""

    def __init__(self, access: LiveAccess, watch: Callable[[], Watch | None], *, most: int = MAX_VIEWS) -> None:
        self._access = access
        self._watch = watch
        self._most = most
        self._num_open = 0
        self._is_over = asyncio.Event()

    def close(self) -> None:
        """Nobody looks any more."""
        self._is_over.set()

    def page(self, request: Request) -> Response:
        """The page, which holds nothing that is not in every copy of this program. Raises NotShown."""
        self._check_shown(request)
        return Response(PAGE, media_type="text/html", headers=PAGE_HEADERS)

    def check(self, request: Request, key: str) -> None:
        """Raise NotShown or Unauthenticated where the caller may not look."""
        self._check_shown(request)
        if self._access.key and not hmac.compare_digest(key.encode(), self._access.key.encode()):
            raise Unauthenticated("the key of the live view is needed")

    async def states(self, interval_ms: int) -> AsyncGenerator[bytes, None]:
        """The pictures as events, until it is closed. Raises Overloaded, Unavailable, InvalidRequest."""
        watch = self._watch()
        if watch is None:
            raise Unavailable(NO_STATE)
        if self._num_open >= self._most:
            raise Overloaded(f"{self._most} live views are open, which is all there may be")
        self._num_open += 1
        try:
            tenant = Names() if not self._access.key else str
            async with aclosing(watch(interval_ms)) as pictures:
                while (picture := await self._next(pictures)) is not None:
                    yield event(json.dumps(told(picture, tenant), separators=(",", ":")))
        except Unavailable as error:
            raise Unavailable(NO_STATE) from error
        finally:
            self._num_open -= 1

    async def _next(self, pictures: AsyncGenerator[pb.WatchStateResponse, None]) -> pb.WatchStateResponse | None:
        """The next picture; None where there is none, or once this is closed, which does not wait for an interval."""
        picture = asyncio.ensure_future(anext(pictures, None))
        is_over = asyncio.ensure_future(self._is_over.wait())
        try:
            await asyncio.wait({picture, is_over}, return_when=asyncio.FIRST_COMPLETED)
            return None if is_over.done() else picture.result()
        finally:
            picture.cancel()
            is_over.cancel()
            await asyncio.gather(picture, is_over, return_exceptions=True)

    def _check_shown(self, request: Request) -> None:
        """Without a key: that this machine asks itself, by its own name, through nobody and for no other page.

        Its names are those of hosts.py, without what --http-hosts adds: that is for proxies. A proxy on this machine
        asks from here for whoever asks it, and may call the gateway 127.0.0.1: many say so in a header, and one that
        says nothing (nginx, as it comes) speaks HTTP/1.0. A page that cannot read an answer can still ask, and take the
        places of those who look.
        """
        if self._access.key:
            return
        headers = request.headers
        itself = is_loopback(name_of(headers.get("host", "")))
        through = request.scope.get("http_version") == "1.0" or any(name in headers for name in _OF_PROXIES)
        own = headers.get("sec-fetch-site", "") in _OWN_PAGE
        if not self._access.local or not itself or through or not own:
            raise NotShown(NOT_SHOWN)


async def nothing_to_close() -> None:
    """A stream's generator closes what it opened."""


def interval_ms(request: Request) -> int:
    """The interval that is asked for; 0 where none is. Raises InvalidRequest."""
    asked = request.query_params.get("interval_ms", "0")
    if not (asked.isascii() and asked.isdigit() and len(asked) < 7):
        raise InvalidRequest("interval_ms", "must be a number of milliseconds, 100 to 10000")
    return int(asked)


class Names:
    """Numbers in place of tenants' names: the same one for the same tenant, as long as somebody looks."""

    def __init__(self) -> None:
        self._numbers = {"": ""}

    def __call__(self, tenant: str) -> str:
        """What the tenant is called."""
        return self._numbers.setdefault(tenant, f"tenant {len(self._numbers)}")


def told(state: pb.WatchStateResponse, tenant: Callable[[str], str]) -> dict[str, Any]:
    """A picture as the page reads it; `tenant` is how a tenant is called there."""
    s = state.scheduler
    return {
        "uptime_s": s.uptime_ns / 1e9,
        "running": s.num_running,
        "waiting": s.num_waiting,
        "tokens_per_s": round(state.output_tokens_per_s, 1),
        "prompt_tokens_per_s": round(state.prompt_tokens_per_s, 1),
        "first_token": {
            "count": state.first_tokens.count,
            "p50_ms": round(state.first_tokens.p50_ns / 1e6, 1),
            "p95_ms": round(state.first_tokens.p95_ns / 1e6, 1),
        },
        "prompt_tokens": s.prompt_tokens,
        "cached_prompt_tokens": s.cached_prompt_tokens,
        "output_tokens": s.output_tokens,
        "preemptions": s.preemptions,
        "moved": s.moved_sequences,
        "drafted": s.drafted_tokens,
        "accepted_ratio": round(state.accepted_ratio, 3),
        "num_executors": state.num_executors,
        "executors": [_told_executor(each, tenant) for each in state.executors],
        "num_queues": state.num_queues,
        "queues": [
            {
                "tenant": tenant(queue.tenant),
                "priority": "begun" if queue.begun else Priority(queue.priority).name.lower(),
                "sequences": queue.num_sequences,
                "tokens": queue.tokens,
                "age_s": round(queue.age_ns / 1e9, 1),
            }
            for queue in state.waiting
        ],
    }


def _told_executor(executor: pb.ExecutorState, tenant: Callable[[str], str]) -> dict[str, Any]:
    e = executor.status
    marks = {"leaving": e.leaving, "silent": e.silent, "quarantined": e.quarantined, "held back": e.held_back}
    return {
        "name": e.name,
        "device": e.device,
        "dtype": e.dtype,
        "marks": [mark for mark, is_so in marks.items() if is_so],
        "running": e.num_running,
        "in_flight": e.steps_in_flight,
        "credit": executor.credit,
        "idle": round(e.idle_ratio, 4),
        "blocks": e.num_blocks,
        "free": e.num_free_blocks,
        "cached": executor.num_cached_blocks,
        "block_size": executor.block_size,
        "cells": base64.b64encode(executor.cells).decode(),
        "blocks_per_cell": executor.blocks_per_cell,
        "rows": [
            {
                "request": f"{row.request}.{row.choice}" if row.choice else f"{row.request}",
                "tenant": tenant(row.tenant),
                "prompt": row.prompt_tokens,
                "cached": row.cached_prompt_tokens,
                "output": row.output_tokens,
                "computed": row.computed_tokens,
                "max": row.max_tokens,
                "blocks": row.num_blocks,
                "preemptions": row.preemptions,
            }
            for row in executor.rows
        ],
    }


def _hashes(page: str, tag: str) -> str:
    """The hashes by which a policy allows what stands between these tags, and nothing else."""
    found = re.findall(rf"<{tag}>(.*?)</{tag}>", page, re.DOTALL)
    assert found, f"the page has no {tag}"
    return " ".join(f"'sha256-{base64.b64encode(hashlib.sha256(each.encode()).digest()).decode()}'" for each in found)


PAGE: Final = (Path(__file__).with_name("live.html")).read_text("utf-8")

PAGE_HEADERS: Final = {
    "content-security-policy": (
        f"default-src 'none'; script-src {_hashes(PAGE, 'script')}; style-src {_hashes(PAGE, 'style')}; "
        "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
        "require-trusted-types-for 'script'; trusted-types 'none'"
    ),
    "cache-control": "no-cache",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "permissions-policy": "camera=(), geolocation=(), microphone=()",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
}
