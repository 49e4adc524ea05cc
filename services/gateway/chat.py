"""/v1/chat/completions: messages in, messages out."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, Mapping, Sequence
from json.encoder import encode_basestring_ascii
from typing import Any, Final

from common.errors import InvalidRequest
from pagewire.answers import Finish, FinishReason, TokenLogprobs, Usage
from protos import inference_pb2 as pb
from services.gateway import scores
from services.gateway.answers import Answers, Piece
from services.gateway.asked import Asked, read_manner
from services.gateway.errors import NotServed
from services.gateway.events import event
from services.gateway.fields import MOST_LISTED, Fields, array, shown, shown_word, text
from services.gateway.long_json import in_turns
from services.gateway.options import read_options, read_structured
from services.gateway.roles import ROLES
from services.gateway.tools import read_tool_message, read_tools, told_calls, told_deltas

DONE: Final = b"data: [DONE]\n\n"

_MAX_TOKENS: Final = ("max_completion_tokens", "max_tokens")
# What assistants' messages bring along when they are sent back as they came.
_OF_ANSWERS: Final = ("name", "refusal", "audio", "annotations", "reasoning_content", "reasoning")

CONTENT: Final = {
    "anyOf": [
        {"type": "string"},
        {
            "type": "array",
            "items": {
                "type": "object",
                "required": ["type", "text"],
                "properties": {"type": {"enum": ["text", "input_text", "output_text"]}, "text": {"type": "string"}},
            },
        },
    ]
}
"""The text of a message, whole or in parts."""


def read(body: Fields) -> Asked:
    """What a chat request asks for. Raises InvalidRequest, NotServed. Whoever calls refuses what is left over."""
    request = pb.GenerateStreamRequest()
    names = read_tools(body, request.chat)
    names |= read_options(body, request, max_tokens=_MAX_TOKENS)
    names |= read_structured(body, request.sampling)
    names |= _read_logprobs(body, request.sampling)
    messages = body.list_of_fields("messages")
    if not messages:
        raise InvalidRequest("messages", "is empty")
    request.chat.SetInParent()
    called: dict[str, str] = {}
    for message in messages:
        names |= add_message(request.chat, message, called)
    names |= {"chat.messages": "messages", "chat": "messages"}
    body.harmless("reasoning_effort", "none")
    body.harmless("verbosity", "medium")
    for name, only in (("modalities", ["text"]), ("audio", None)):
        if body.take(name) not in (None, only):
            raise NotServed(name, f"{name}: answers are text")
    return Asked(requests=[request], manner=read_manner(body), names=names)


def add_message(chat: pb.ChatMessages, message: Fields, called: dict[str, str]) -> dict[str, str]:
    """Add a message; `called` are functions by the ids of the calls before it, and gets its own.

    Returns what its caller calls some of its fields. Raises InvalidRequest, NotServed.
    """
    role = message.required_kind("role", ROLES)
    added = pb.ChatMessage(role="system" if role == "developer" else role)
    names = read_tool_message(message, added, called)
    content = message.take("content", CONTENT)
    if content is None and role == "assistant":  # it said no, and nothing else
        content = message.string("refusal")
    if content is not None or not added.tool_calls:  # calls need no words
        added.content = content_text(content, message, "content")
    message.ignore(*_OF_ANSWERS)
    message.refuse_unknown()
    chat.messages.append(added)
    return names


def content_text(content: object, around: Fields, name: str) -> str:
    """The text of a message, which may come in parts; it is `around`'s member `name`.

    Raises InvalidRequest, NotServed.
    """
    path = around.path(name)
    if isinstance(content, str):
        return text(content, path)
    if content is None:
        raise InvalidRequest(path, "must be a string or a list of parts, and is not there")
    if not isinstance(content, list):
        raise InvalidRequest(path, f"must be a string or a list of parts, got {shown(content)}")
    parts = array(content, path, MOST_LISTED)
    return "".join(_part(around.inside(part, f"{path}[{i}]")) for i, part in enumerate(parts))


def _part(part: Fields) -> str:
    kind = part.string("type")
    name = "refusal" if kind == "refusal" else "text"
    if kind not in ("text", "input_text", "output_text", "refusal"):
        raise NotServed(part.path("type"), f"{part.path('type')}: this model reads text, got {shown_word(kind)}")
    words = part.string(name)
    if words is None:
        raise InvalidRequest(part.path(name), "must be a string, and is not there")
    part.ignore("annotations", "logprobs", "cache_control", "prompt_cache_breakpoint")
    part.refuse_unknown()
    return words


def _read_logprobs(body: Fields, sampling: pb.SamplingParams) -> dict[str, str]:
    """OpenAI's pair: whether, and how many beside each."""
    wanted = body.boolean("logprobs")
    top = body.integer("top_logprobs")
    if top is not None and not wanted:
        raise InvalidRequest("top_logprobs", "is for logprobs: say logprobs, too")
    if wanted:
        sampling.logprobs = top or 0
    return {"logprobs": "top_logprobs"}


# ---- telling


async def whole(answers: Answers, asked: Asked) -> dict[str, Any]:
    """The answer, when all of it is there. Raises PagewireErrors."""
    while await answers.next() is not None:
        pass
    heard = answers.streams[0].continuation
    choices: list[dict[str, Any]] = []
    for n, finish in sorted(heard.finishes.items()):
        words, logprobs, calls = heard.heard(n)
        told: dict[str, Any] = {
            "index": n,
            "message": {"role": "assistant", "content": words, "refusal": None},
            "logprobs": {"content": scores.all_of_chat(logprobs), "refusal": None} if wants_logprobs(asked) else None,
            "finish_reason": finish_reason(finish),
            "stop_reason": stop_reason(finish),
        }
        told |= score(finish)
        if calls:
            told["message"] |= {"content": words or None, "tool_calls": told_calls(calls)}
        if asked.manner.return_token_ids:
            told["token_ids"] = list(heard.token_ids(n))
        choices.append(told)
    whole: dict[str, Any] = {
        **envelope(answers, asked, "chatcmpl", "chat.completion"),
        "choices": choices,
        "usage": usage_json(answers.usage()),
        **answers.told_of(0),
    }
    if heard.prompt_logprobs:
        whole["prompt_logprobs"] = scores.all_of_chat(heard.prompt_logprobs)
    return whole


async def stream(answers: Answers, asked: Asked) -> AsyncGenerator[bytes, None]:
    """The answer in events, as it is made. Raises PagewireErrors."""
    chunks = Chunks(answers, asked, "chatcmpl", "chat.completion.chunk")
    scored, ids = wants_logprobs(asked), asked.manner.return_token_ids
    has_role = [answers.was_told(choice) for choice in range(answers.n)]
    is_first = answers.begins_at == 0
    while (piece := await answers.next()) is not None:
        if not (piece.text or piece.tool_calls or piece.finish or scored or ids):
            continue  # half of a character
        more: dict[str, Any] = {}
        if is_first and answers.streams[0].continuation.prompt_logprobs:
            more["prompt_logprobs"] = scores.all_of_chat(answers.streams[0].continuation.prompt_logprobs)
        is_first = False
        if has_role[piece.choice] and not (
            piece.tool_calls or piece.finish or scored or ids or more
        ):  # most of the time
            yield chunks.plain(piece)
            continue
        delta: dict[str, Any] = {} if has_role[piece.choice] else {"role": "assistant", "content": ""}
        has_role[piece.choice] = True
        if piece.tool_calls:
            delta |= {"content": piece.text or None, "tool_calls": told_deltas(piece.tool_calls)}
        elif not piece.finish:
            delta["content"] = piece.text
        choice: dict[str, Any] = {
            "index": piece.choice,
            "delta": delta,
            "logprobs": _logprobs(piece.logprobs) if scored and not piece.finish else None,
            "finish_reason": finish_reason(piece.finish) if piece.finish else None,
        }
        if piece.finish:
            choice |= {"stop_reason": stop_reason(piece.finish), **score(piece.finish)}
            more |= answers.told_of(0)
        if ids:
            choice["token_ids"] = list(piece.token_ids)
        if not more:
            yield chunks.chunk([choice])
            continue
        yield await chunks.long_chunk([choice], more)
        answers.streams[0].continuation.forget_prompt_logprobs()
    if asked.manner.include_usage:
        yield chunks.usage(usage_json(answers.usage()))
    yield DONE


class Chunks:
    """Events of a stream, alike but for what is new. The commonest is put together from text, not made of objects."""

    def __init__(
        self, answers: Answers, asked: Asked, prefix: str, kind: str, *, new: str = '"delta":{"content":'
    ) -> None:
        """`new` is what stands before the new text in a choice."""
        self._answers = answers
        self._asked = asked
        self._prefix = prefix
        self._kind = kind
        self._next = answers.begins_at
        self._new = new
        self._ends = "}" if new.count("{") else ""
        self._head = ""
        self._tail = ""

    def plain(self, piece: Piece) -> bytes:
        """An event that has a choice's new text and nothing else."""
        if not self._head:
            frame = json.dumps({**self._envelope(), "choices": []})
            head, tail = frame.rsplit('"choices": []', 1)
            self._head = f'{head}"choices": [{{"index": '
            usage = ', "usage": null' if self._asked.manner.include_usage else ""
            self._tail = f'{self._ends}, "logprobs": null, "finish_reason": null}}]{usage}{tail}'
        words = encode_basestring_ascii(piece.text)  # as json.dumps, which asks first what it was given
        return event(f"{self._head}{piece.choice}, {self._new}{words}{self._tail}", self._id())

    def chunk(self, choices: Sequence[dict[str, Any]]) -> bytes:
        """An event of any kind."""
        return event(json.dumps(self._told(choices)), self._id())

    async def long_chunk(self, choices: Sequence[dict[str, Any]], more: Mapping[str, Any]) -> bytes:
        """One that has Longs."""
        return event(await in_turns({**self._told(choices), **more}), self._id())

    def usage(self, usage: Mapping[str, Any]) -> bytes:
        """The event that tells what all of it cost, behind all others."""
        told = {**self._envelope(), "choices": [], "usage": usage}
        return event(json.dumps(told), self._id(done=True))

    def _told(self, choices: Sequence[dict[str, Any]]) -> dict[str, Any]:
        usage: dict[str, Any] = {"usage": None} if self._asked.manner.include_usage else {}
        return {**self._envelope(), "choices": choices, **usage}

    def _envelope(self) -> dict[str, Any]:
        return envelope(self._answers, self._asked, self._prefix, self._kind)

    def _id(self, *, done: bool = False) -> str:
        number = self._next
        self._next += 1
        return self._answers.id(number, done=done)


def envelope(answers: Answers, asked: Asked, prefix: str, kind: str) -> dict[str, Any]:
    """What every answer begins with. The fingerprint is the executors' class: in one, a seed gives the same answer."""
    determinism = answers.determinism
    return {
        "id": f"{prefix}-{asked.request_id}",
        "object": kind,
        "created": answers.created,
        "model": answers.model,
        "system_fingerprint": f"fp_{determinism}" if determinism else None,
    }


def wants_logprobs(asked: Asked) -> bool:
    """Whether each token of the answer is scored."""
    return asked.requests[0].sampling.HasField("logprobs")


def finish_reason(finish: Finish) -> str:
    """OpenAI's word for it."""
    return finish.reason.value if finish.reason in (FinishReason.LENGTH, FinishReason.TOOL_CALLS) else "stop"


def stop_reason(finish: Finish) -> str | int | None:
    """Which stop string or token ended it, where the request named it."""
    if finish.matched_stop is not None:
        return finish.matched_stop
    return finish.matched_token_id if finish.reason is FinishReason.STOP_TOKEN else None


def score(finish: Finish) -> dict[str, float]:
    """Of an answer of a beam search, as a member of its choice."""
    return {} if finish.score is None else {"score": finish.score}


def usage_json(usage: Usage) -> dict[str, Any]:
    """What an answer cost."""
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": usage.cached_prompt_tokens},
    }


def _logprobs(told: Sequence[TokenLogprobs]) -> dict[str, Any]:
    return {"content": scores.of_chat(told), "refusal": None}
