"""The gateway's OpenAPI description is what its parser takes, no more and no less."""

from __future__ import annotations

import json
from typing import Any

import pytest

from common.errors import InvalidRequest
from services.gateway import chat, completions, embeddings, openapi, responses
from services.gateway.bodies import parse
from services.gateway.description import described
from services.gateway.fields import Fields
from tests.executor.schemas import problem
from tests.services.gateway_calls import Scheduler, ask, gateway
from tests.services.test_gateway_requests import OF_CACHE, OF_REQUEST, OF_SAMPLING, OF_STOPPING, OF_STRUCTURED

DOCUMENT: dict[str, Any] = openapi.document(max_prompts=8)
READERS: dict[str, Any] = {
    "/v1/chat/completions": chat.read,
    "/v1/completions": lambda body: completions.read(body, max_prompts=8),
    "/v1/responses": responses.read,
}
LEAST: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "hi"}]},
    "/v1/completions": {"prompt": "hi"},
    "/v1/responses": {"input": "hi"},
}
NESTED: dict[str, list[dict[str, Any]]] = {
    "/v1/chat/completions": [
        {"stream": True, "stream_options": {"include_usage": True, "include_obfuscation": False}},
        {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "strict": True, "schema": {}}}},
        {"response_format": {"type": "text"}},
        {"tools": [{"type": "function", "function": {"name": "a", "parameters": {}}}], "tool_choice": "required"},
        {"tool_choice": {"type": "function", "function": {"name": "a"}}},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "hi"}]}]},
        {"messages": [{"role": "assistant", "tool_calls": [{"id": "a", "function": {"name": "a"}}]}]},
        {"logprobs": True, "top_logprobs": 2, "user": "me", "temperature": None},
    ],
    "/v1/completions": [
        {"prompt": [1, 2]},
        {"prompt": ["a", [1]], "stop": "x", "beams": 4},
        {"beams": {"width": 4, "early_stopping": True}},
        {"beams": {"width": 4, "early_stopping": "never"}, "logit_bias": {"5": -1}},
    ],
    "/v1/responses": [
        {"text": {"format": {"type": "json_schema", "name": "x", "schema": {}}}},
        {"tools": [{"type": "function", "name": "a"}], "tool_choice": {"type": "function", "name": "a"}},
        {"input": [{"role": "user", "content": "hi"}, {"type": "function_call", "call_id": "a", "name": "a"}]},
        {"instructions": "Be brief.", "metadata": {"a": "b"}, "include": ["message.output_text.logprobs"]},
    ],
}


def understand(path: str, body: Fields) -> None:
    READERS[path](body)
    body.refuse_unknown()


def schema(path: str) -> dict[str, Any]:
    body: dict[str, Any] = DOCUMENT["paths"][path]["post"]["requestBody"]["content"]["application/json"]["schema"]
    return body


@pytest.mark.parametrize("asked", [{"input": "a"}, {"input": [[1], "b"], "dimensions": 3, "encoding_format": "base64"}])
def test_what_is_understood_of_a_request_for_embeddings_is_described(asked: dict[str, Any]) -> None:
    body = parse(json.dumps({"model": "m", "priority": "low", "cache_salt": "s", "user": "me", **asked}).encode())
    described_as = schema("/v1/embeddings")

    embeddings.read(body)
    body.refuse_unknown()
    assert problem({"model": "m", "priority": "low", "cache_salt": "s", "user": "me", **asked}, described_as) is None
    assert problem({"input": []}, described_as) is not None
    assert problem({**asked, "stream": True}, described_as) is not None


@pytest.mark.parametrize("path", list(READERS))
def test_every_field_of_our_own_api_is_described_by_its_name(path: str) -> None:
    own = {*OF_SAMPLING, *OF_STRUCTURED, *OF_STOPPING, *OF_REQUEST, *OF_CACHE, "choices", "beams"}
    renamed = {"/v1/responses": {"max_tokens", "logprobs"}}.get(path, set())

    assert own - renamed <= set(schema(path)["properties"])


@pytest.mark.parametrize(("path", "asked"), [(path, asked) for path, each in NESTED.items() for asked in each])
def test_what_is_understood_is_described(path: str, asked: dict[str, Any]) -> None:
    body = {**LEAST[path], **asked}
    understand(path, parse(json.dumps(body).encode()))

    assert problem(body, schema(path)) is None


@pytest.mark.parametrize(
    ("path", "asked"),
    [
        ("/v1/chat/completions", {"temprature": 1}),
        ("/v1/chat/completions", {"messages": [{"content": "hi"}]}),
        ("/v1/chat/completions", {"tools": [{"type": "function", "name": "a"}]}),
        ("/v1/completions", {"max_tokens": -1}),
        ("/v1/completions", {"beams": {"size": 4}}),
        ("/v1/completions", {"priority": "now"}),
        ("/v1/completions", {"prompt": [["a"]]}),
        ("/v1/responses", {"stream": 1}),
        ("/v1/responses", {"text": {"format": {"type": "xml"}}}),
    ],
)
def test_what_is_refused_is_not_described(path: str, asked: dict[str, Any]) -> None:
    body = {**LEAST[path], **asked}
    assert problem(body, schema(path)) is not None

    fields = parse(json.dumps(body).encode())
    with pytest.raises(InvalidRequest):
        understand(path, fields)


def test_a_member_that_nobody_reads_any_more_is_described_no_more() -> None:
    def read(body: Fields) -> None:
        body.integer("there", 1, 5)

    told = described(read, {"needed": 1})

    assert told["properties"] == {"there": {"type": ["integer", "null"], "minimum": 1, "maximum": 5}}
    assert (told["required"], told["additionalProperties"]) == (["needed"], False)


def test_it_is_served_to_whoever_asks_and_names_every_path() -> None:
    app = gateway(Scheduler())
    told = ask(app, {}, path="/openapi.json", method="GET")

    assert told.status == 200 and told.json == openapi.document(max_prompts=4)
    assert {path.replace("{model}", "x") for path in DOCUMENT["paths"]} >= {
        *READERS,
        "/v1/models/x",
        "/health",
        "/live",
        "/ready",
    }
