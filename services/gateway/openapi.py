"""The OpenAPI description of the gateway, made of what it reads requests with: neither says what the other does not."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final

from services.gateway import chat, completions, embeddings, responses
from services.gateway.description import described
from services.gateway.errors import LAST_EVENT_ID, statuses
from services.gateway.fields import Fields

_ABOUT: Final = (
    "OpenAI's API, and every control of Pagewire's own by its name. What is not described is refused, and so is what "
    "is out of a control's range, which the scheduler knows: with 400 and the name of the member. A stream's events "
    f"have ids where text/event-stream is accepted: with the last one, as {LAST_EVENT_ID}, the same request goes on."
)
_ERROR: Final = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"enum": ["invalid_request_error", "rate_limit_error", "server_error"]},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "null"]},
            },
        }
    },
}
_MODEL: Final = {
    "type": "object",
    "required": ["id", "object", "created", "owned_by", "max_model_len"],
    "properties": {
        "id": {"type": "string"},
        "object": {"const": "model"},
        "created": {"type": "integer"},
        "owned_by": {"type": "string"},
        "max_model_len": {"type": "integer"},
    },
}
_VECTOR: Final = {
    "type": "object",
    "required": ["object", "index", "embedding"],
    "properties": {
        "object": {"const": "embedding"},
        "index": {"type": "integer"},
        "embedding": {"anyOf": [{"type": "array", "items": {"type": "number"}}, {"type": "string"}]},
    },
}
_VECTORS: Final = {
    "type": "object",
    "required": ["object", "data", "model", "usage"],
    "properties": {
        "object": {"const": "list"},
        "data": {"type": "array", "items": _VECTOR},
        "model": {"type": "string"},
        "usage": {"type": "object"},
    },
}
_LIST: Final = {
    "type": "object",
    "required": ["object", "data"],
    "properties": {"object": {"const": "list"}, "data": {"type": "array", "items": _MODEL}},
}
_HEALTH: Final = {
    "type": "object",
    "required": ["status"],
    "properties": {"status": {"enum": ["serving", "not_serving"]}},
}
_LIVE: Final = {"type": "object", "required": ["status"], "properties": {"status": {"const": "live"}}}
_READY: Final = {
    "type": "object",
    "required": ["status"],
    "properties": {"status": {"enum": ["ready", "draining"]}},
}
_WORDS: Final = {"type": "string"}
_EVENT: Final = {  # a schema is of each event: what is of the whole stream has none before OpenAPI 3.2
    "type": "object",
    "required": ["data"],
    "properties": {"data": _WORDS, "event": _WORDS, "id": _WORDS, "retry": {"type": "integer"}},
}
_HEADERS: Final = [
    {"name": "X-Request-Id", "in": "header", "schema": _WORDS, "description": "what the answer calls the request"},
    {"name": LAST_EVENT_ID, "in": "header", "schema": _WORDS, "description": "of a stream that goes on"},
]


def document(*, max_prompts: int) -> dict[str, Any]:
    """All of it."""

    def read_completion(body: Fields) -> object:
        return completions.read(body, max_prompts=max_prompts)

    return {
        "openapi": "3.1.0",
        "info": {"title": "Pagewire", "version": "1", "description": _ABOUT},
        "security": [{"key": []}, {}],
        "paths": {
            "/v1/chat/completions": _asked(chat.read, {"messages": []}, "Answer a chat", "chat.completion"),
            "/v1/completions": _asked(
                read_completion, {"prompt": "a"}, "Go on with texts or tokens", "text_completion"
            ),
            "/v1/responses": _asked(responses.read, {"input": "a"}, "Answer items", "response"),
            "/v1/embeddings": {"post": _embeddings()},
            "/v1/models": {"get": _looked("What is served", _LIST)},
            "/v1/models/{model}": {
                "get": _looked("One model", _MODEL),
                "parameters": [{"name": "model", "in": "path", "required": True, "schema": _WORDS}],
            },
            "/health": {"get": {**_looked("Whether a scheduler can answer", _HEALTH, (503,), _HEALTH), "security": []}},
            "/live": {"get": {**_looked("Whether the gateway answers at all", _LIVE, ()), "security": []}},
            "/ready": {
                "get": {**_looked("Whether it takes requests, or drains", _READY, (503,), _READY), "security": []}
            },
            "/metrics": {"get": _looked("For Prometheus", _WORDS, kind="text/plain")},
            "/openapi.json": {"get": {**_looked("This", {"type": "object"}, (403,)), "security": []}},
        },
        "components": {
            "schemas": {"Error": _ERROR},
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
    }


def _asked(read: Callable[[Fields], object], needed: Mapping[str, object], what: str, told_as: str) -> dict[str, Any]:
    """An endpoint that is asked for an answer, whole or in events."""
    whole = {
        "type": "object",
        "required": ["id", "object", "model", "usage"],
        "properties": {"id": _WORDS, "object": {"const": told_as}, "model": _WORDS, "usage": {"type": "object"}},
    }
    answer = {"application/json": {"schema": whole}, "text/event-stream": {"schema": _EVENT}}
    return {
        "post": {
            "summary": what,
            "parameters": _HEADERS,
            "requestBody": {"required": True, "content": {"application/json": {"schema": described(read, needed)}}},
            "responses": {"200": {"description": "The answer", "content": answer}, **_failures(statuses())},
        }
    }


def _embeddings() -> dict[str, Any]:
    asked = {"application/json": {"schema": described(embeddings.read, {"input": "a"})}}
    answer = {"application/json": {"schema": _VECTORS}}
    return {
        "summary": "A vector for each text, by a model that makes any",
        "requestBody": {"required": True, "content": asked},
        "responses": {"200": {"description": "The vectors", "content": answer}, **_failures(statuses())},
    }


def _looked(
    what: str,
    schema: Mapping[str, Any],
    failing: tuple[int, ...] = (400, 401, 403, 404, 429, 503, 504),
    failed: Mapping[str, Any] | None = None,
    *,
    kind: str = "application/json",
) -> dict[str, Any]:
    """An endpoint that only looks; `failed` is what it says where it fails, if that is not an error."""
    there = {"description": "What there is", "content": {kind: {"schema": schema}}}
    return {"summary": what, "responses": {"200": there, **_failures(failing, failed)}}


def _failures(failing: tuple[int, ...], failed: Mapping[str, Any] | None = None) -> dict[str, Any]:
    content = {"application/json": {"schema": failed or {"$ref": "#/components/schemas/Error"}}}
    return {str(status): {"description": "What is wrong", "content": content} for status in failing}
