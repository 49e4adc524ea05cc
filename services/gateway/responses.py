"""/v1/responses: text in, text out, told in named events. Nothing is stored, so no response leads to another."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator
from dataclasses import dataclass
from typing import Any, Final

from common.errors import InvalidRequest
from pagewire.answers import FinishReason, TokenLogprobs, Usage
from protos import inference_pb2 as pb
from services.gateway import scores
from services.gateway.answers import Answers
from services.gateway.asked import Asked, Manner
from services.gateway.chat import add_message
from services.gateway.errors import NotServed
from services.gateway.events import event
from services.gateway.fields import Fields, array, fields, shown, text
from services.gateway.options import read_format, read_options, read_structured
from services.gateway.tools import refuse_tools

_LOGPROBS: Final = "message.output_text.logprobs"
_PREAMBLE: Final = 4  # events before the first text
_OF_ITEMS: Final = ("id", "status")  # what items bring along when they are sent back as they came


@dataclass(frozen=True, slots=True, kw_only=True)
class AskedResponse(Asked):
    """With what a response repeats of its request."""

    instructions: str | None = None
    format: dict[str, Any]
    metadata: dict[str, Any]
    user: str | None = None


def read(body: Fields) -> AskedResponse:
    """What a request for a response asks for. Raises InvalidRequest, NotServed."""
    request = pb.GenerateStreamRequest()
    names = {"chat.messages": "input", "chat": "input", "logprobs": "top_logprobs"}
    metadata, user = body.peek("metadata"), body.peek("user")
    names |= read_options(body, request, max_tokens=("max_output_tokens",))
    if request.sampling.HasField("n") and request.sampling.n != 1:
        raise NotServed("n", "n: a response has one output")
    told_format = _read_text(body, request.sampling, names)
    names |= read_structured(body, request.sampling, "response_format")
    refuse_tools(body)
    _read_include(body, request.sampling)
    instructions = _read_input(body, request)
    if body.take("previous_response_id") is not None:
        raise NotServed("previous_response_id", "previous_response_id: nothing is stored here; send all of the input")
    if body.boolean("background"):
        raise NotServed("background", "background: nothing is stored here; read the answer as it is made")
    body.word("truncation", ("disabled",))
    if (reasoning := body.fields("reasoning")) is not None:
        reasoning.refuse_unknown()
    stream = body.boolean("stream") or False
    if (options := body.fields("stream_options")) is not None:
        options.ignore("include_obfuscation")
        options.refuse_unknown()
    return AskedResponse(
        requests=[request],
        manner=Manner(stream=stream, resumable=body.boolean("resumable")),
        names=names,
        instructions=instructions,
        format=told_format,
        metadata=metadata if isinstance(metadata, dict) else {},
        user=user if isinstance(user, str) else None,
    )


def _read_text(body: Fields, sampling: pb.SamplingParams, names: dict[str, str]) -> dict[str, Any]:
    """`text.format`. Returns it as the response repeats it."""
    asked = body.fields("text")
    if asked is None:
        return {"type": "text"}
    format_ = asked.fields("format")
    asked.refuse_unknown()
    if format_ is None:
        return {"type": "text"}
    told = format_.copy()
    structured = pb.StructuredOutput()
    if found := read_format(format_, structured, "text.format"):
        names |= found
        sampling.structured.CopyFrom(structured)
    return told


def _read_include(body: Fields, sampling: pb.SamplingParams) -> None:
    top = body.integer("top_logprobs")
    for name in body.strings("include"):
        if name != _LOGPROBS:
            raise NotServed("include", f"include: {shown(name)} is not served here; {_LOGPROBS} is")
        sampling.logprobs = top or 0


def _read_input(body: Fields, request: pb.GenerateStreamRequest) -> str | None:
    """Messages, and before them the instructions, which are returned."""
    request.chat.SetInParent()
    instructions = body.string("instructions")
    if instructions is not None:
        request.chat.messages.add(role="system", content=instructions)
    value = body.take("input")
    if isinstance(value, str):
        request.chat.messages.add(role="user", content=text(value, "input"))
        return instructions
    items = array(value, "input")
    if not items:
        raise InvalidRequest("input", "must be a string or a list of messages, and is empty")
    for i, each in enumerate(items):
        item = fields(each, f"input[{i}]")
        kind = item.string("type") or "message"
        if kind != "message":
            raise NotServed(item.path("type"), f"{item.path('type')}: {shown(kind)} is not served here; message is")
        item.ignore(*_OF_ITEMS)
        add_message(request.chat, item, {})
    return instructions


# ---- telling


async def whole(answers: Answers, asked: AskedResponse) -> dict[str, Any]:
    """The response, when all of it is there. Raises PagewireErrors."""
    while await answers.next() is not None:
        pass
    return _ended(answers, asked)


async def stream(answers: Answers, asked: AskedResponse) -> AsyncGenerator[bytes, None]:
    """The response in events, as it is made. Raises PagewireErrors."""
    told = _Events(answers, asked)
    place = {"item_id": f"msg_{asked.request_id}", "output_index": 0, "content_index": 0}
    scored = asked.requests[0].sampling.HasField("logprobs")
    piece = await answers.next()  # an error that comes before the first token is no event
    part = _part("", (), asked)
    beginning = _response(answers, asked, "in_progress", [], None)
    for kind, more in (
        ("response.created", {"response": beginning}),
        ("response.in_progress", {"response": beginning}),
        ("response.output_item.added", {"output_index": 0, "item": _item(asked, "in_progress", [])}),
        ("response.content_part.added", {**place, "part": part}),
    )[min(answers.begins_at, _PREAMBLE) :]:
        yield told.event(kind, more, has_id=False)
    while piece is not None:
        if not piece.finish and (piece.text or scored):
            logprobs = scores.of_chat(piece.logprobs) if scored else []
            yield told.event("response.output_text.delta", {**place, "delta": piece.text, "logprobs": logprobs})
        piece = await answers.next()
    ended = _ended(answers, asked)
    item = ended["output"][0]
    part = item["content"][0]
    for kind, more in (
        ("response.output_text.done", {**place, "text": part["text"], "logprobs": part["logprobs"]}),
        ("response.content_part.done", {**place, "part": part}),
        ("response.output_item.done", {"output_index": 0, "item": item}),
        (f"response.{ended['status']}", {"response": ended}),
    ):
        yield told.event(kind, more, has_id=False)


class _Events:
    def __init__(self, answers: Answers, asked: AskedResponse) -> None:
        self._answers = answers
        self._has_ids = asked.manner.resumable is not False
        self._next = answers.begins_at

    def event(self, kind: str, more: dict[str, Any], *, has_id: bool = True) -> bytes:
        """An event. Those before the text and behind it have no id: who comes back hears from the last text on."""
        number = self._next
        self._next += 1
        id = self._answers.id(number) if has_id and self._has_ids else ""
        return event(json.dumps({"type": kind, "sequence_number": number, **more}), id, kind)


def error_event(message: str, code: str | None, param: str | None) -> bytes:
    """The last event of a stream that fails."""
    data = {"type": "error", "sequence_number": 0, "code": code, "message": message, "param": param}
    return event(json.dumps(data), name="error")


def _ended(answers: Answers, asked: AskedResponse) -> dict[str, Any]:
    answer = answers.streams[0].answer
    is_whole = answer.finish.reason is not FinishReason.LENGTH
    status = "completed" if is_whole else "incomplete"
    part = _part(answer.text, answer.logprobs, asked)
    return _response(answers, asked, status, [_item(asked, status, [part])], answers.usage())


def _response(
    answers: Answers, asked: AskedResponse, status: str, output: list[dict[str, Any]], usage: Usage | None
) -> dict[str, Any]:
    request = asked.requests[0]
    sampling, stopping = request.sampling, request.stopping
    return {
        "id": f"resp_{asked.request_id}",
        "object": "response",
        "created_at": answers.created,
        "status": status,
        "background": False,
        "error": None,
        "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
        "instructions": asked.instructions,
        "max_output_tokens": stopping.max_tokens if stopping.HasField("max_tokens") else None,
        "metadata": asked.metadata,
        "model": answers.model,
        "output": output,
        "parallel_tool_calls": True,
        "previous_response_id": None,
        "reasoning": {"effort": None, "summary": None},
        "store": False,
        "temperature": sampling.temperature if sampling.HasField("temperature") else 1.0,
        "text": {"format": asked.format},
        "tool_choice": "auto",
        "tools": [],
        "top_p": sampling.top_p if sampling.HasField("top_p") else 1.0,
        "truncation": "disabled",
        "usage": _usage(usage) if usage else None,
        "user": asked.user,
    }


def _item(asked: AskedResponse, status: str, content: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "id": f"msg_{asked.request_id}",
        "type": "message",
        "status": status,
        "role": "assistant",
        "content": content,
    }


def _part(words: str, logprobs: tuple[TokenLogprobs, ...], asked: AskedResponse) -> dict[str, Any]:
    scored = asked.requests[0].sampling.HasField("logprobs")
    return {
        "type": "output_text",
        "text": words,
        "annotations": [],
        "logprobs": scores.of_chat(logprobs) if scored else [],
    }


def _usage(usage: Usage) -> dict[str, Any]:
    return {
        "input_tokens": usage.prompt_tokens,
        "input_tokens_details": {"cached_tokens": usage.cached_prompt_tokens},
        "output_tokens": usage.completion_tokens,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
    }
