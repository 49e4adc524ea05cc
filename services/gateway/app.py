"""The paths of OpenAI's API, and the edge at which every ending becomes a status and a body that its clients know."""

from __future__ import annotations

import asyncio
import json
import logging
import secrets
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Final, Literal

from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route, Router
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from common import log
from common.errors import InvalidRequest, Overloaded, PagewireError, Unauthenticated, Unavailable
from common.log import without_texts
from protos import inference_pb2 as pb
from services.gateway import chat, completions, embeddings, openapi, positions, responses
from services.gateway.answers import Answers
from services.gateway.asked import Asked, check_request_id
from services.gateway.bodies import Bodies, parse
from services.gateway.errors import LAST_EVENT_ID, NotServed, Told, WrongHost, told, told_of_bug, told_of_http
from services.gateway.events import EventStream, Patience, event, while_connected
from services.gateway.fields import Fields, LetPass
from services.gateway.held_scores import HeldScores
from services.gateway.hosts import Hosts
from services.gateway.known_keys import KnownKeys
from services.gateway.live import MAX_KEY, LiveAccess, LiveView, interval_ms, nothing_to_close
from services.gateway.long_json import WholeAnswer
from services.gateway.metrics import Metrics
from services.gateway.roles import check_roles
from services.gateway.traced import Ending, traced
from services.gateway.upstream import Upstream
from services.tracing import Tracer

_log = logging.getLogger(__name__)

_MAX_NAME: Final = 80  # characters of what a caller calls a request; what is longer is cut
_KEY_S: Final = 1.0  # a scheduler that stands still takes no more of the time that a scrape has
_NAMES: Final = "pagewire.names"
"""Where a request's scope holds what its caller calls the scheduler's fields."""

_CALLED: Final = "pagewire.request_id"
"""Where it holds what the request is called in its answer, and by the scheduler where its body says nothing else."""

_FAILED: Final = "pagewire.failed"
"""Where it holds the status of what a stream failed by after it had begun, which its reader is told in an event."""

_STOPS: Final = "the gateway stops; another one may answer"
_ALREADY_TOLD: Final = b"data: [DONE]\n\n"
_EVENTS: Final = "text/event-stream"

UnknownFields = Literal["refuse", "ignore"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Telling:
    """How the answers to one request are told: whole, in events, and as the last event of a stream that fails."""

    whole: Callable[[Answers], Awaitable[dict[str, Any]]]
    stream: Callable[[Answers], AsyncGenerator[bytes, None]]
    error: Callable[[Told, Answers], bytes]
    repeats: bool = False  # the last events of a stream have all of it once more


class _Path:
    """What a path answers, as an application: Starlette's own would stand between each event and its connection."""

    def __init__(self, answer: Callable[[Request], Awaitable[ASGIApp]]) -> None:
        self._answer = answer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        response = await self._answer(Request(scope, receive))
        await response(scope, receive, send)


class Gateway:
    """An ASGI application; it holds nothing of a request when that has ended."""

    def __init__(
        self,
        upstream: Upstream,
        bodies: Bodies,
        patience: Patience,
        metrics: Metrics,
        *,
        max_requests: int,
        max_prompts: int,
        max_scores_bytes: int = 128 << 20,
        unknown_fields: UnknownFields = "refuse",
        metrics_need_key: bool = False,
        hosts: Hosts | None = None,
        live: LiveView | None = None,
        tracer: Tracer | None = None,
    ) -> None:
        """With `metrics_need_key`, /metrics is for those whose API key the scheduler takes. `tracer` makes spans.

        Where the scheduler cannot say so, the keys count that it took of late; who shows another one hears of this
        process alone.
        """
        self.draining = False
        self._upstream = upstream
        self._bodies = bodies
        self._patience = patience
        self._metrics = metrics
        self._max_requests = max_requests
        self._max_prompts = max_prompts
        self._held_scores = HeldScores(max_bytes=max_scores_bytes)
        self._unknown_fields = unknown_fields
        self._metrics_need_key = metrics_need_key
        self._hosts = hosts or Hosts()
        self._view = live or LiveView(LiveAccess(), lambda: None)
        self._tracer = tracer
        self._known = KnownKeys()
        self._num_looking = 0  # requests that only look: GET and the like
        self._began = int(time.time())
        self._description: Mapping[str, Any] = {}  # made when it is first asked for
        self._router = Router(
            [
                Route("/live", _Path(self._live), methods=["GET"]),
                Route("/ready", _Path(self._ready), methods=["GET"]),
                Route("/v1/chat/completions", _Path(self._chat), methods=["POST"]),
                Route("/v1/completions", _Path(self._completions), methods=["POST"]),
                Route("/v1/responses", _Path(self._responses), methods=["POST"]),
                Route("/v1/embeddings", _Path(self._embeddings), methods=["POST"]),
                Route("/v1/models", _Path(self._models), methods=["GET"]),
                Route("/v1/models/{model:path}", _Path(self._model), methods=["GET"]),
                Route("/health", _Path(self._health), methods=["GET"]),
                Route("/metrics", _Path(self._tell_metrics), methods=["GET"]),
                Route("/openapi.json", _Path(self._describe), methods=["GET"]),
                Route("/", _Path(self._live_page), methods=["GET"]),
                Route("/live/state", _Path(self._live_state), methods=["GET"]),
            ],
            redirect_slashes=False,
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request. Raises nothing but what ends the task."""
        if scope["type"] != "http":
            return
        scope["app"] = self  # so Starlette raises what it would answer otherwise
        scope[_CALLED] = _id_of(scope)
        status = 0

        def sending(message: Message) -> Awaitable[None]:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message.get("headers", ()), (b"x-request-id", scope[_CALLED].encode())]
            return send(message)

        counts = scope["method"] == "POST"
        self._num_looking += not counts
        log.about(afresh=True, request_id=scope[_CALLED])

        def is_known() -> bool:
            with suppress(Unauthenticated):
                return _key(Request(scope)) in self._known
            return False

        with (
            self._metrics.request(scope["path"] if counts else "") as ended,
            traced(self._tracer if counts else None, scope, lambda: Ending(status, scope.get(_FAILED, 0), is_known())),
        ):
            try:
                if not self._hosts.allow(scope):
                    raise WrongHost
                # apart, so that /health answers where all is busy, and who only looks keeps nobody from an answer
                if (self._metrics.num_open if counts else self._num_looking) > self._max_requests:
                    raise Overloaded(f"{self._max_requests} requests are open, which is all there may be")
                await self._router(scope, receive, sending)
            except ClientDisconnect:
                status = status or 499  # as nginx counts them
            except asyncio.CancelledError:  # the process ends
                if not status:  # without an answer uvicorn would tell a bug
                    await _told(Unavailable(_STOPS), scope).response()(scope, receive, sending)
                scope.setdefault(_FAILED, 503)  # of an answer that had begun, too
                raise
            except Exception as error:  # noqa: BLE001  the edge: whatever it is, the caller gets a status and no more
                failed = _told(error, scope)
                if not status:
                    await failed.response()(scope, receive, sending)
            finally:
                self._num_looking -= not counts
                ended(scope.get(_FAILED, status))

    def drain(self) -> None:
        """Take nothing new, and end what has no end of its own."""
        self.draining = True
        self._view.close()

    # ---- answers

    async def _chat(self, request: Request) -> ASGIApp:
        body = await self._body(request)
        asked = chat.read(body)
        self._refuse_unknown(body)
        telling = Telling(
            whole=lambda answers: chat.whole(answers, asked),
            stream=lambda answers: chat.stream(answers, asked),
            error=_error_event,
        )
        return await self._answer(request, asked, telling)

    async def _completions(self, request: Request) -> ASGIApp:
        body = await self._body(request)
        asked = completions.read(body, max_prompts=self._max_prompts)
        self._refuse_unknown(body)
        request.scope[_NAMES] = asked.names
        prompts = [""] * len(asked.requests)
        if asked.echo:
            echoing = completions.echoes(self._upstream, asked, _key(request))
            prompts = await while_connected(request.receive, echoing)
        telling = Telling(
            whole=lambda answers: completions.whole(answers, asked, prompts),
            stream=lambda answers: completions.stream(answers, asked, prompts),
            error=_error_event,
        )
        return await self._answer(request, asked, telling)

    async def _responses(self, request: Request) -> ASGIApp:
        body = await self._body(request)
        asked = responses.read(body)
        self._refuse_unknown(body)
        telling = Telling(
            whole=lambda answers: responses.whole(answers, asked),
            stream=lambda answers: responses.stream(answers, asked),
            error=responses.error_event,
            repeats=True,
        )
        return await self._answer(request, asked, telling)

    async def _body(self, request: Request) -> Fields:
        if self.draining:
            raise Unavailable(_STOPS)
        key = _key(request)

        async def may_be_large() -> None:  # nobody else has an answer while megabytes are parsed
            if key not in self._known:
                await self._served("", key)

        let_pass = None if self._unknown_fields == "refuse" else LetPass()
        return parse(await self._bodies.read(request.scope, request.receive, may_be_large), let_pass)

    def _refuse_unknown(self, body: Fields) -> None:
        """The last word on a body: all in it was read."""
        body.refuse_unknown()
        if body.num_let_pass:
            _log.warning("%d members of a request are not known here, and ignored", body.num_let_pass)

    async def _answer(self, request: Request, asked: Asked, telling: Telling) -> ASGIApp:
        request.scope[_NAMES] = asked.names
        if self._unknown_fields == "refuse":
            check_roles(asked.requests[0].chat)
        key = _key(request)
        position = None
        if (last := request.headers.get(LAST_EVENT_ID)) and asked.manner.stream:
            position = positions.read(last)
        elif asked.manner.resume_token_ids:
            raise InvalidRequest("resume_token_ids", f"are for a stream that goes on: send {LAST_EVENT_ID}, too")
        asked.begin(position, request.scope[_CALLED])
        request.scope[_CALLED] = asked.request_id
        log.about(request_id=asked.request_id)
        if position is not None and position.done:
            return Response(_ALREADY_TOLD, media_type=_EVENTS)
        has_ids = asked.manner.resumable
        if has_ids is None:  # a line that is no data ends many a client that was written for OpenAI's servers alone
            has_ids = position is not None or _EVENTS in request.headers.get("accept", "").lower()
        first_token = self._metrics.first_token()

        def on_first() -> None:
            first_token()
            self._known.taken(key)

        answers = Answers(
            self._upstream,
            asked.requests,
            key,
            created=position.created if position else int(time.time()),
            position=position,
            tokens=asked.manner.resume_token_ids,
            on_first=on_first,
            has_ids=has_ids,
            keeps_logprobs=telling.repeats or not asked.manner.stream,
            share=self._held_scores.share("logprobs" if chat.wants_logprobs(asked) else "prompt_logprobs"),
        )
        if not asked.manner.stream:
            return WholeAnswer(answers, telling.whole)
        answers.linger = bool(asked.manner.resumable)

        def tell(error: Exception) -> bytes:
            return telling.error(_told_late(error, request.scope), answers)

        def on_cut() -> bytes:  # the process ends before the answer: its reader may go on with another one
            answers.linger = has_ids
            return tell(Unavailable(_STOPS))

        return EventStream(
            telling.stream(answers),
            self._patience,
            close=answers.close,
            tell=tell,
            on_cut=on_cut,
            comes_back=has_ids,
        )

    # ---- the rest

    async def _embeddings(self, request: Request) -> Response:
        body = await self._body(request)
        asked = embeddings.read(body)
        self._refuse_unknown(body)
        request.scope[_NAMES] = asked.names
        key, message = _key(request), asked.request
        message.request_id = message.request_id or request.scope[_CALLED]
        check_request_id(message.request_id)
        request.scope[_CALLED] = message.request_id
        log.about(request_id=message.request_id)
        try:
            answer = await while_connected(request.receive, self._upstream.embed(message, key))
        except InvalidRequest as error:
            if error.field == "model":
                raise NotServed("model", str(error)) from error
            raise
        self._known.taken(key)
        return Response(await embeddings.told(answer, asked), media_type="application/json")

    async def _models(self, request: Request) -> Response:
        served = await self._served("", _key(request))
        return _json({"object": "list", "data": [self._told_model(served.model, served.max_model_len)]})

    async def _model(self, request: Request) -> Response:
        served = await self._served(request.path_params["model"], _key(request))
        return _json(self._told_model(served.model, served.max_model_len))

    async def _served(self, name: str, key: str) -> pb.GetModelResponse:
        """As Upstream.model, and whose key it takes is known."""
        try:
            served = await self._upstream.model(name, key)
        except Unauthenticated:
            self._known.refused(key)
            raise
        self._known.taken(key)
        return served

    def _told_model(self, name: str, max_model_len: int) -> Mapping[str, Any]:
        return {
            "id": name,
            "object": "model",
            "created": self._began,
            "owned_by": "pagewire",
            "max_model_len": max_model_len,
        }

    async def _live(self, _: Request) -> Response:
        return _json({"status": "live"})  # whatever becomes of schedulers: to start a gateway anew would not help them

    async def _ready(self, _: Request) -> Response:
        # Of itself alone: were it about schedulers, all the gateways before them would leave their balancer at once,
        # and nobody would be there to wait for the one that comes back.
        return _json({"status": "draining" if self.draining else "ready"}, 503 if self.draining else 200)

    async def _health(self, _: Request) -> Response:
        serving = not self.draining and await self._upstream.is_serving()
        return _json({"status": "serving" if serving else "not_serving"}, 200 if serving else 503)

    async def _tell_metrics(self, request: Request) -> Response:
        own = self._metrics_need_key and not await self._is_taken(_key(request))
        return Response(await self._metrics.text(own=own), media_type="text/plain; version=0.0.4")

    async def _is_taken(self, key: str) -> bool:
        """Whether the scheduler takes this key, or where it does not say, took it of late. Raises Unauthenticated."""
        if not key:
            raise Unauthenticated("an API key is needed")
        try:
            async with asyncio.timeout(_KEY_S):
                await self._served("", key)
        except Unauthenticated:
            raise
        except (TimeoutError, PagewireError):  # just what somebody wants to hear of
            return key in self._known
        return True

    async def _describe(self, _: Request) -> Response:
        if not self._description:
            self._description = openapi.document(max_prompts=self._max_prompts)
        return _json(self._description)

    async def _live_page(self, request: Request) -> Response:
        return self._view.page(request)

    async def _live_state(self, request: Request) -> ASGIApp:
        self._view.check(request, _key(request))
        if self.draining:
            raise Unavailable(_STOPS)

        def tell(error: Exception) -> bytes:
            return _error_event(_told_late(error, request.scope))

        return EventStream(
            self._view.states(interval_ms(request)),
            self._patience,
            close=nothing_to_close,
            tell=tell,
            on_cut=lambda: tell(Unavailable(_STOPS)),
        )


def _json(value: Mapping[str, Any], status: int = 200) -> Response:
    return Response(json.dumps(value).encode(), status, media_type="application/json")


def _error_event(failed: Told, _: Answers | None = None) -> bytes:
    return event(failed.body.decode())


def _told(error: Exception, scope: Scope) -> Told:
    """What the caller is told. Of a bug the log is told, too, without its text, which may be a prompt's."""
    if isinstance(error, PagewireError):
        return told(error, scope.get(_NAMES))
    if isinstance(error, HTTPException):
        return told_of_http(error)
    error_id = secrets.token_hex(8)
    _log.error(
        "a request failed with internal error %s\n%s",
        error_id,
        "".join(without_texts(error)),
        extra={"fields": {"error_id": error_id}},
    )
    return told_of_bug(error_id)


def _told_late(error: Exception, scope: Scope) -> Told:
    """As `_told`, of a stream that has begun: its status is too late for its reader, and not for who counts."""
    failed = _told(error, scope)
    scope[_FAILED] = failed.status
    return failed


def _key(request: Request) -> str:
    """The API key that the caller shows; empty where he shows none. Raises Unauthenticated for what can be none."""
    shown = request.headers.get("authorization", "")
    scheme, _, key = shown.partition(" ")
    key = key.strip()
    if not shown or (scheme.lower() == "bearer" and not key):  # clients without a key say so, too
        return ""
    if scheme.lower() != "bearer" or len(key) > MAX_KEY or not (key.isascii() and key.isprintable()):
        raise Unauthenticated("an API key is needed: Authorization: Bearer KEY")
    if " " in key:
        raise Unauthenticated("an API key is needed: Authorization: Bearer KEY")
    return key


def _id_of(scope: Scope) -> str:
    """What this request is called, here and by the scheduler: a name that no other has, begun as its caller called it.

    A proxy may give many requests one name, and strangers may think of the same; a scheduler takes two of one name for
    one that was sent twice. Who means that says `request_id` in the body.
    """
    for name, value in scope["headers"]:
        if name == b"x-request-id" and value and all(0x21 <= byte <= 0x7E for byte in value):
            return f"{str(value[:_MAX_NAME], 'ascii')}-{secrets.token_hex(6)}"
    return secrets.token_hex(12)
