"""/v1/responses: text in, text and calls out, told in named events. Nothing is stored: no response leads to another."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from common.errors import InvalidRequest
from pagewire.answers import FinishReason, Usage
from protos import inference_pb2 as pb
from services.gateway import scores
from services.gateway.answers import Answers
from services.gateway.asked import Asked, Manner
from services.gateway.chat import score
from services.gateway.errors import NotServed, Told
from services.gateway.events import event
from services.gateway.fields import Fields, shown_word
from services.gateway.input_items import read_input
from services.gateway.items import Items
from services.gateway.long_json import in_turns
from services.gateway.options import read_options, read_structured
from services.gateway.tools import read_tools

_LOGPROBS: Final = "message.output_text.logprobs"
_OF_TOOLS: Final = ("name", "description", "parameters", "strict")
_OF_SCHEMAS: Final = ("name", "description", "schema", "strict")
_OF_CHOICES: Final = ("type", "name")
_METADATA: Final = {"type": "object", "additionalProperties": {"type": "string"}}


@dataclass(frozen=True, slots=True, kw_only=True)
class AskedResponse(Asked):
    """With what a response repeats of its request."""

    instructions: str | None = None
    format: dict[str, Any]
    metadata: dict[str, str]
    user: str | None = None
    tools: list[dict[str, Any]]
    tool_choice: Any
    truncation: str = "disabled"


def read(body: Fields) -> AskedResponse:
    """What a request for a response asks for. Raises InvalidRequest, NotServed."""
    request = pb.GenerateStreamRequest()
    names: dict[str, str] = {}
    metadata, user = _read_metadata(body), body.string("user")
    names |= read_options(body, request, max_tokens=("max_output_tokens",))
    if request.sampling.HasField("n") and request.sampling.n != 1:
        raise NotServed("n", "n: a response has one output")
    text_format = _read_text(body)
    told_format = _told_format(text_format)  # reading takes it apart
    names |= read_structured(body, request.sampling, text_format)
    told_tools, told_choice = _told_tools(body.peek("tools")), _told_choice(body.peek("tool_choice"))
    names |= read_tools(body, request.chat, flat=True)
    if not request.chat.tools:
        request.chat.ClearField("parallel_tool_calls")  # says nothing then, and some clients always send it
    _read_include(body, request.sampling)
    instructions, of_input = read_input(body, request.chat)
    names = {**of_input, **names, "chat.messages": "input", "chat": "input", "logprobs": "top_logprobs"}
    if body.take("previous_response_id") is not None:
        raise NotServed("previous_response_id", "previous_response_id: nothing is stored here; send all of the input")
    if body.boolean("background"):
        raise NotServed("background", "background: nothing is stored here; read the answer as it is made")
    truncation = body.word("truncation", ("disabled", "auto"))  # what fits is not cut, and what does not is refused
    if (reasoning := body.fields("reasoning")) is not None:
        reasoning.harmless("effort", "none")
        reasoning.refuse_unknown()
    stream = body.boolean("stream") or False
    if (options := body.fields("stream_options")) is not None:
        options.boolean("include_usage")  # it always is, and aiperf asks for it all the same
        options.ignore("include_obfuscation")
        options.refuse_unknown()
    return AskedResponse(
        requests=[request],
        manner=Manner(
            stream=stream,
            return_token_ids=body.boolean("return_token_ids") or False,
            resumable=body.boolean("resumable"),
        ),
        names=names,
        instructions=instructions,
        format=told_format,
        metadata=metadata,
        user=user,
        tools=told_tools,
        tool_choice=told_choice if told_choice is not None else "auto",
        truncation=truncation or "disabled",
    )


def _read_metadata(body: Fields) -> dict[str, str]:
    given = body.fields("metadata", _METADATA)
    return {name: given.required_string(name) for name in given.names()} if given else {}


def _told_tools(tools: object) -> list[dict[str, Any]]:
    """The tools as the response repeats them. What is wrong with them is said where they are read."""
    each = [tool for tool in tools if isinstance(tool, dict)] if isinstance(tools, list) else []
    return [{"type": "function", **{name: tool.get(name) for name in _OF_TOOLS}} for tool in each]


def _told_format(asked: Fields | None) -> dict[str, Any]:
    """The format as the response repeats it. What is let pass is not repeated: nobody has looked at it."""
    given = asked.copy() if asked is not None else {"type": "text"}
    deeper = given.get("json_schema")  # as in chat completions
    inner = deeper if isinstance(deeper, dict) else given
    names = _OF_SCHEMAS if given.get("type") == "json_schema" else ()
    return {"type": given.get("type"), **_only(names, inner)}


def _told_choice(choice: object) -> Any:
    """A choice of tools as the response repeats it: reading takes it apart, and each of the tools that it allows."""
    if not isinstance(choice, dict):
        return choice
    if not isinstance(allowed := choice.get("tools"), list) or choice.get("type") != "allowed_tools":
        return _only(_OF_CHOICES, choice)
    return {
        **_only(("type", "mode"), choice),
        "tools": [_only(_OF_CHOICES, each) for each in allowed if isinstance(each, dict)],
    }


def _only(names: Sequence[str], members: Mapping[str, Any]) -> dict[str, Any]:
    return {name: members[name] for name in names if name in members}


def _read_text(body: Fields) -> Fields | None:
    """`text.format`."""
    asked = body.fields("text")
    if asked is None:
        return None
    format_ = asked.fields("format")
    asked.harmless("verbosity", "medium")
    asked.refuse_unknown()
    return format_


def _read_include(body: Fields, sampling: pb.SamplingParams) -> None:
    top = body.integer("top_logprobs")
    included = body.strings("include")
    if top and not included:
        raise InvalidRequest("top_logprobs", f"is for log-probabilities: include {_LOGPROBS}, too")
    for name in included:
        if name != _LOGPROBS:
            raise NotServed("include", f"include: {shown_word(name)} is not served here; {_LOGPROBS} is")
        sampling.logprobs = top or 0


# ---- telling


async def whole(answers: Answers, asked: AskedResponse) -> dict[str, Any]:
    """The response, when all of it is there. Raises PagewireErrors."""
    items = _items(answers, asked)
    while await answers.next() is not None:
        pass
    return _ended(answers, asked, items)


async def stream(answers: Answers, asked: AskedResponse) -> AsyncGenerator[bytes, None]:
    """The response in events, as it is made. Raises PagewireErrors."""
    told, items = _Events(answers, asked), _items(answers, asked)
    piece = await answers.next()  # an error that comes before the first token is no event
    if not answers.begins_at:
        beginning = _response(answers, asked, "in_progress", [], None)
        for kind in ("response.created", "response.in_progress"):
            yield await told.event(kind, {"response": beginning})
    token_ids: list[int] = []  # that are not told yet: some have no text, and no event of their own
    while piece is not None:
        if not piece.finish:
            events = items.add(piece)
            if asked.manner.return_token_ids:
                token_ids += piece.token_ids
                if events:
                    events[-1][1]["token_ids"], token_ids = token_ids, []
            for i, (kind, more) in enumerate(events, 1):
                yield await told.event(kind, more, has_id=i == len(events))
        piece = await answers.next()
    ended = _ended(answers, asked, items)
    status: str = ended["status"]
    ends = items.end(status)
    if asked.manner.return_token_ids:
        ends[0][1]["token_ids"] = token_ids
    for kind, more in (*ends, (f"response.{status}", {"response": ended})):
        yield await told.event(kind, more)


class _Events:
    def __init__(self, answers: Answers, asked: AskedResponse) -> None:
        self._answers = answers

    async def event(self, kind: str, more: dict[str, Any], *, has_id: bool = False) -> bytes:
        """An event. Only the last one of what came at once has an id: who comes back with it hears what comes next."""
        number = self._answers.next_event
        self._answers.next_event += 1
        id = self._answers.id(number) if has_id else ""
        return event(await in_turns({"type": kind, "sequence_number": number, **more}), id, kind)


def error_event(failed: Told, answers: Answers) -> bytes:
    """The last event of a stream that fails."""
    data = {
        "type": "error",
        "sequence_number": answers.next_event,
        "code": failed.code,
        "message": failed.message,
        "param": failed.param,
    }
    return event(json.dumps(data), name="error")


def _items(answers: Answers, asked: AskedResponse) -> Items:
    request = asked.requests[0]
    scored = request.sampling.HasField("logprobs")
    return Items(answers, asked.request_id, scored=scored, may_call=bool(request.chat.tools))


def _ended(answers: Answers, asked: AskedResponse, items: Items) -> dict[str, Any]:
    is_whole = answers.streams[0].continuation.finishes[0].reason is not FinishReason.LENGTH
    status = "completed" if is_whole else "incomplete"
    heard = answers.streams[0].continuation
    more: dict[str, Any] = {**score(heard.finishes[0]), **answers.told_of(0)}
    if heard.prompt_logprobs:
        more["prompt_logprobs"] = scores.all_of_chat(heard.prompt_logprobs)
    if asked.manner.return_token_ids:
        more["token_ids"] = list(heard.token_ids(0))
    return {**_response(answers, asked, status, items.all(status), answers.usage()), **more}


def _response(
    answers: Answers, asked: AskedResponse, status: str, output: list[dict[str, Any]], usage: Usage | None
) -> dict[str, Any]:
    request = asked.requests[0]
    sampling, stopping, chat = request.sampling, request.stopping, request.chat
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
        "parallel_tool_calls": chat.parallel_tool_calls if chat.HasField("parallel_tool_calls") else True,
        "previous_response_id": None,
        "reasoning": {"effort": None, "summary": None},
        "store": False,
        "temperature": sampling.temperature if sampling.HasField("temperature") else 1.0,
        "text": {"format": asked.format},
        "tool_choice": asked.tool_choice,
        "tools": asked.tools,
        "top_p": sampling.top_p if sampling.HasField("top_p") else 1.0,
        "truncation": asked.truncation,
        "usage": _usage(usage) if usage else None,
        "user": asked.user,
    }


def _usage(usage: Usage) -> dict[str, Any]:
    return {
        "input_tokens": usage.prompt_tokens,
        "input_tokens_details": {"cached_tokens": usage.cached_prompt_tokens},
        "output_tokens": usage.completion_tokens,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
    }
