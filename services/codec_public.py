"""Protobuf ↔ values, for the public API: the only converter between protos/inference.proto and services/request.py.

Unset fields get their defaults here, and every limit that needs no model state is checked here. A problem is told with
the field's name and the limit, in the numbers that the caller sent.
"""

from __future__ import annotations

import json
import math
import secrets
import struct
import typing
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import islice
from typing import Any, Final, Literal

from common.cache_control import CacheControl, check_cache_control
from common.errors import InvalidRequest
from common.sampling import (
    BeamParams,
    EarlyStopping,
    Grammar,
    RequestLimits,
    SamplingParams,
    StopConditions,
    check_bad_words,
    check_beams,
    check_lengths,
    check_listed,
    check_sampling,
    check_stop,
    check_structured,
)
from common.step import MAX_DRAFTS, Logprobs
from common.types import Priority
from protos import inference_pb2 as pb
from services.answer import Delta, Finish, PinnedPrefix, PromptLogprobs
from services.request import (
    CHARACTERS_A_TOKEN,
    Chat,
    EmbedSpec,
    GenerateSpec,
    Input,
    Message,
    RequestSize,
    ResumePoint,
    Text,
    TokenIds,
)
from services.tools.codec import call_delta_pb, calls_from_pb, tools_from_pb, with_text

# Optional floats that are called the same in the message and in the value.
_Number = Literal[
    "temperature", "top_p", "min_p", "typical_p", "repetition_penalty", "presence_penalty", "frequency_penalty"
]  # fmt: skip

Spell = Callable[[int], bytes]
"""The text of a token."""

_DEFAULTS: Final = SamplingParams()
_MAX_REQUEST_ID: Final = 128
_PRIORITIES: Final = frozenset(int(priority) for priority in Priority)
_EARLY_STOPPING: Final[dict[int, EarlyStopping]] = {
    pb.EARLY_STOPPING_UNSPECIFIED: False,
    pb.EARLY_STOPPING_LIKELY: False,
    pb.EARLY_STOPPING_FULL: True,
    pb.EARLY_STOPPING_NEVER: "never",
}
_NUMBERS: Final[tuple[_Number, ...]] = typing.get_args(_Number)


def size_from_pb(
    message: pb.GenerateRequest | pb.GenerateStreamRequest | pb.ResumeRequest,
    limits: RequestLimits,
    *,
    max_length: int,
) -> RequestSize:
    """What it would take to serve the request. Raises nothing."""
    resumes = isinstance(message, pb.ResumeRequest)
    request = message.request if isinstance(message, pb.ResumeRequest) else message
    asked, stopping = request.sampling, request.stopping
    n = max(asked.n if asked.HasField("n") else 1, asked.best_of, asked.beams.width)
    return RequestSize(
        request_id=request.request_id,
        resumable=resumes or (isinstance(request, pb.GenerateStreamRequest) and request.resumable),
        resumed=isinstance(message, pb.ResumeRequest)
        and any(point.token_ids for point in islice(message.choices, limits.max_choices)),
        priority=Priority(request.priority) if int(request.priority) in _PRIORITIES else Priority.NORMAL,
        num_sequences=n if 1 <= n <= limits.max_choices else 1,
        max_tokens=stopping.max_tokens if 1 <= stopping.max_tokens <= max_length else 1,
        fewest_tokens=min(_fewest_tokens(request, limits), max_length),
    )


def _fewest_tokens(request: pb.GenerateRequest | pb.GenerateStreamRequest, limits: RequestLimits) -> int:
    match request.WhichOneof("input"):
        case "token_ids":
            return len(request.token_ids.ids)
        case "chat":
            messages = islice(request.chat.messages, limits.max_messages)
            return sum(len(message.content) for message in messages) // CHARACTERS_A_TOKEN
        case "text":
            return len(request.text) // CHARACTERS_A_TOKEN
        case None:
            return 0


def request_from_pb(
    request: pb.GenerateRequest | pb.GenerateStreamRequest, limits: RequestLimits, *, vocab_size: int
) -> GenerateSpec:
    """The request as a checked value. Raises InvalidRequest naming the field and its limit."""
    asked = request.sampling
    check_lengths(
        limits,
        logit_bias=len(asked.logit_bias),
        allowed=len(asked.allowed_token_ids),
        banned=len(asked.banned_token_ids),
        bad_words=len(asked.bad_words),
    )
    structured, grammar = structured_from_pb(asked, limits)
    sampling = replace(sampling_from_pb(asked), grammar=grammar)
    check_sampling(sampling, limits)
    check_listed(sampling, vocab_size)
    bad_words = tuple(asked.bad_words)
    check_bad_words(bad_words, limits)
    n = asked.n if asked.HasField("n") else 1
    if not 1 <= n <= limits.max_choices:
        raise InvalidRequest("n", f"must be in [1, {limits.max_choices}], got {n}")
    check_beams(sampling, n, limits)
    stopping = request.stopping
    max_tokens = stopping.max_tokens if stopping.HasField("max_tokens") else None
    source = input_from_pb(request, limits, vocab_size=vocab_size)
    if isinstance(source, Chat) and source.tools is not None and grammar is not None:
        source = replace(source, tools=with_text(source.tools, structured, grammar, asked.structured))
    spec = GenerateSpec(
        request_id=_request_id(request.request_id),
        model=request.model,
        input=source,
        sampling=sampling,
        n=n,
        max_tokens=max_tokens,
        stop_token_ids=tuple(stopping.stop_token_ids),
        stop_strings=tuple(stopping.stop),
        ignore_eos=stopping.ignore_eos,
        skip_special_tokens=request.skip_special_tokens if request.HasField("skip_special_tokens") else True,
        priority=_priority(request.priority),
        resumable=isinstance(request, pb.GenerateStreamRequest) and request.resumable,
        bad_words=bad_words,
        min_tokens=stopping.min_tokens,
        include_stop=stopping.include_stop,
        structured=structured,
        cache=cache_from_pb(request, limits),
        best_of=best_of_from_pb(asked, n, limits),
        max_drafts=_max_drafts(request),
    )
    stop = StopConditions(
        max_tokens=1 if max_tokens is None else max_tokens,
        stop_token_ids=spec.stop_token_ids,
        stop_strings=spec.stop_strings,
    )
    check_stop(stop, limits, vocab_size)
    return spec


def _max_drafts(request: pb.GenerateRequest | pb.GenerateStreamRequest) -> int | None:
    if not request.HasField("max_drafts"):
        return None
    if request.max_drafts > MAX_DRAFTS:
        raise InvalidRequest("max_drafts", f"must be in [0, {MAX_DRAFTS}], got {request.max_drafts}")
    return request.max_drafts


def resume_from_pb(
    request: pb.ResumeRequest, limits: RequestLimits, *, vocab_size: int
) -> tuple[GenerateSpec, list[ResumePoint]]:
    """The request as a checked value, and where its choices go on. Raises InvalidRequest as `request_from_pb` does."""
    if not request.request.request_id:
        raise InvalidRequest("request.request_id", "must be the one that PromptInfo told")
    if not request.request.sampling.HasField("seed"):
        raise InvalidRequest("request.sampling.seed", "must be the one that PromptInfo told")
    spec = request_from_pb(request.request, limits, vocab_size=vocab_size)
    if not request.choices:
        raise InvalidRequest("choices", "is empty")
    points: list[ResumePoint] = []
    for i, point in enumerate(request.choices):
        if point.choice >= spec.n:
            raise InvalidRequest(f"choices[{i}].choice", f"must be in [0, {spec.n}), got {point.choice}")
        if any(point.choice == other.choice for other in points):
            raise InvalidRequest(f"choices[{i}].choice", f"{point.choice} is there twice")
        ids = tuple(point.token_ids)
        if ids:
            token_ids(f"choices[{i}].token_ids", ids, vocab_size)
        points.append(ResumePoint(choice=point.choice, ticket=point.ticket, token_ids=ids))
    return spec, points


def sampling_from_pb(sampling: pb.SamplingParams) -> SamplingParams:
    """Sampling parameters with their defaults; a seed is drawn where there is none. Not checked.

    Bad words are left out: their tokens are not known here. So is the grammar, which is `structured_from_pb`'s.
    """
    beams = beams_from_pb(sampling)
    given: dict[str, Any] = {} if beams is None else {"temperature": 0.0}
    given |= {name: _shortest(getattr(sampling, name)) for name in _NUMBERS if sampling.HasField(name)}
    return SamplingParams(
        **given,
        beams=beams,
        top_k=sampling.top_k if sampling.HasField("top_k") else _DEFAULTS.top_k,
        seed=sampling.seed if sampling.HasField("seed") else secrets.randbits(63),
        logit_bias=tuple((token, _shortest(sampling.logit_bias[token])) for token in sorted(sampling.logit_bias)),
        allowed_token_ids=tuple(sampling.allowed_token_ids),
        banned_token_ids=tuple(sampling.banned_token_ids),
        logprobs=sampling.logprobs if sampling.HasField("logprobs") else None,
        prompt_logprobs=sampling.prompt_logprobs if sampling.HasField("prompt_logprobs") else None,
    )


def beams_from_pb(sampling: pb.SamplingParams) -> BeamParams | None:
    """The beam search that is asked for; not checked."""
    if not sampling.HasField("beams"):
        return None
    asked = sampling.beams
    if asked.early_stopping not in _EARLY_STOPPING:
        names = ", ".join(pb.EarlyStopping.keys())
        raise InvalidRequest("beams.early_stopping", f"must be one of {names}, got {asked.early_stopping}")
    return BeamParams(
        width=asked.width,
        length_penalty=_shortest(asked.length_penalty) if asked.HasField("length_penalty") else 1.0,
        early_stopping=_EARLY_STOPPING[asked.early_stopping],
    )


def structured_from_pb(sampling: pb.SamplingParams, limits: RequestLimits) -> tuple[str, Grammar | None]:
    """The field that says what the answer must be, and that as a grammar; not compiled. Empty and None without one.

    Raises InvalidRequest naming the field where it is too long, or says nothing.
    """
    if not sampling.HasField("structured"):
        return "", None
    asked = sampling.structured
    field = asked.WhichOneof("kind")
    match field:
        case None:
            raise InvalidRequest("structured", f"one of {', '.join(asked.DESCRIPTOR.fields_by_name)} must be set")
        case "json_object":
            if not asked.json_object:
                raise InvalidRequest(field, "must be true, or not set")
            grammar = Grammar("json_schema", '{"type": "object"}')
        case "choices":
            check_structured(field, asked.choices.values, limits)
            choices = dict.fromkeys(asked.choices.values)
            # a string of Lark is written as one of JSON
            grammar = Grammar("lark", "start: " + " | ".join(json.dumps(text, ensure_ascii=False) for text in choices))
        case "grammar":
            check_structured(field, [asked.grammar], limits)
            grammar = Grammar("lark", asked.grammar)
        case "json_schema" | "regex":
            source: str = getattr(asked, field)
            check_structured(field, [source], limits)
            grammar = Grammar(field, source)
    return field, grammar


def best_of_from_pb(sampling: pb.SamplingParams, n: int, limits: RequestLimits) -> int:
    """How many choices are made to tell the best n of them; 0 where there is nothing to choose or to put in order."""
    if not sampling.HasField("best_of"):
        return 0
    if sampling.HasField("beams"):
        raise InvalidRequest("best_of", "must not be set with beams, whose answers are the best that were found")
    if not n <= sampling.best_of <= limits.max_choices:
        raise InvalidRequest("best_of", f"must be in [{n}, {limits.max_choices}], from n on, got {sampling.best_of}")
    return sampling.best_of if sampling.best_of > 1 else 0


def embed_size_from_pb(request: pb.EmbedRequest, limits: RequestLimits, *, max_length: int) -> RequestSize:
    """What it would take to serve the request. Raises nothing."""
    fewest = sum(
        len(each.token_ids.ids) or len(each.text) // CHARACTERS_A_TOKEN
        for each in islice(request.inputs, limits.max_embedding_inputs)
    )
    return RequestSize(
        request_id=request.request_id,
        resumable=False,
        resumed=False,
        priority=Priority(request.priority) if int(request.priority) in _PRIORITIES else Priority.NORMAL,
        num_sequences=1,
        max_tokens=1,
        fewest_tokens=min(fewest, max_length),
    )


def embed_from_pb(request: pb.EmbedRequest, limits: RequestLimits, *, vocab_size: int) -> EmbedSpec:
    """The request as a checked value. Raises InvalidRequest naming the field and its limit."""
    most = limits.max_embedding_inputs
    if not 1 <= len(request.inputs) <= most:
        raise InvalidRequest("inputs", f"must be 1 to {most} texts, got {len(request.inputs)}")
    if request.HasField("dimensions") and not request.dimensions:
        raise InvalidRequest("dimensions", "must be at least 1, or not set, got 0")
    cache = cache_from_pb(request, limits)
    if cache is not None and cache.pin_seconds:
        raise InvalidRequest("pin_seconds", "must not be set: texts that are embedded are not pinned")
    return EmbedSpec(
        request_id=_request_id(request.request_id),
        model=request.model,
        inputs=tuple(_embed_input(f"inputs[{i}]", each, vocab_size) for i, each in enumerate(request.inputs)),
        dimensions=request.dimensions if request.HasField("dimensions") else None,
        priority=_priority(request.priority),
        cache=cache,
    )


def _embed_input(path: str, message: pb.EmbedInput, vocab_size: int) -> Text | TokenIds:
    match message.WhichOneof("input"):
        case "text":
            if not message.text.strip():
                raise InvalidRequest(path, "is empty")
            return Text(text=message.text.strip())
        case "token_ids":
            return TokenIds(ids=token_ids(path, tuple(message.token_ids.ids), vocab_size))
        case None:
            raise InvalidRequest(path, "one of text or token_ids must be set")


def cache_from_pb(
    request: pb.GenerateRequest | pb.GenerateStreamRequest | pb.EmbedRequest, limits: RequestLimits
) -> CacheControl | None:
    """What is said of the prefix cache; None where that is nothing. Raises InvalidRequest as `request_from_pb` does."""
    asked = request.cache
    for field in ("pin_seconds", "pin_tokens"):
        if asked.HasField(field) and not getattr(asked, field):
            raise InvalidRequest(field, "must be at least 1, or not set; Unpin ends a pin")
    cache = CacheControl(
        salt=asked.cache_salt, no_cache=asked.no_cache, pin_seconds=asked.pin_seconds, pin_tokens=asked.pin_tokens
    )
    check_cache_control(cache, limits)
    return None if cache == CacheControl() else cache


def pin_id_from_pb(request: pb.UnpinRequest) -> str | None:
    """Which pin is to end; None for all of the caller's. Raises InvalidRequest where neither is said."""
    if request.WhichOneof("which") == "pin_id":
        return request.pin_id
    if not request.all:
        raise InvalidRequest("which", "pin_id must be set, or all be true")
    return None


def input_from_pb(
    request: pb.GenerateRequest | pb.GenerateStreamRequest | pb.TokenizeRequest,
    limits: RequestLimits,
    *,
    vocab_size: int,
) -> Input:
    """The prompt. Raises InvalidRequest when there is none, an id is outside the vocabulary, or a chat is too long."""
    kind = request.WhichOneof("input")
    if kind == "text":
        if not request.text:
            raise InvalidRequest("text", "is empty")
        return Text(text=request.text)
    if kind == "token_ids" and not isinstance(request, pb.TokenizeRequest):
        return TokenIds(ids=token_ids("token_ids", tuple(request.token_ids.ids), vocab_size))
    if kind == "chat":
        chat = request.chat
        if not chat.messages:
            raise InvalidRequest("chat", "is empty")
        if len(chat.messages) > limits.max_messages:
            raise InvalidRequest("chat", f"at most {limits.max_messages} messages, got {len(chat.messages)}")
        messages = tuple(_message(i, message, limits) for i, message in enumerate(chat.messages))
        return Chat(messages=messages, tools=tools_from_pb(chat, limits))
    raise InvalidRequest("input", "one of text, token_ids or chat must be set")


def _message(number: int, message: pb.ChatMessage, limits: RequestLimits) -> Message:
    if not message.role:
        raise InvalidRequest(f"chat.messages[{number}].role", "is empty")
    calls = calls_from_pb(f"chat.messages[{number}]", message, limits)
    return Message(
        role=message.role,
        content=message.content,
        tool_calls=calls,
        tool_call_id=message.tool_call_id,
        name=message.name,
    )


def token_ids(field: str, ids: tuple[int, ...], vocab_size: int) -> tuple[int, ...]:
    """The ids. Raises InvalidRequest when there are none or one is outside the vocabulary."""
    if not ids:
        raise InvalidRequest(field, "is empty")
    if (most := max(ids)) >= vocab_size:
        raise InvalidRequest(field, f"must be in [0, {vocab_size}), got {most} at index {ids.index(most)}")
    return ids


def fill_delta(message: pb.Delta, delta: Delta, spell: Spell) -> None:
    """Write new tokens into an empty message where it lies: made apart and copied, it would take twice the time."""
    message.choice = delta.choice
    message.index = delta.index
    message.token_ids.extend(delta.token_ids)
    message.text = delta.text
    message.ticket = delta.ticket
    if delta.logprobs:
        message.logprobs.extend(logprobs_pb(delta.token_ids, delta.logprobs, spell))
    if delta.calls:
        message.tool_calls.extend(map(call_delta_pb, delta.calls))


def prompt_logprobs_pb(part: PromptLogprobs, spell: Spell) -> pb.PromptLogprobs:
    """The message of how likely a part of the prompt was."""
    return pb.PromptLogprobs(index=part.index, logprobs=logprobs_pb(part.token_ids, part.logprobs, spell))


def logprobs_pb(tokens: Sequence[int], logprobs: Sequence[Logprobs | None], spell: Spell) -> list[pb.TokenLogprobs]:
    """The messages of how likely these tokens were."""

    def one(token: int, logprob: float | None) -> pb.TokenLogprob:
        return pb.TokenLogprob(token_id=token, logprob=logprob, text=spell(token))

    return [
        pb.TokenLogprobs(token=one(token, None))
        if told is None
        else pb.TokenLogprobs(token=one(token, told.token), top=map(one, told.top_ids, told.top))
        for token, told in zip(tokens, logprobs, strict=True)
    ]


def pinned_pb(pinned: PinnedPrefix | None) -> pb.PinnedPrefix | None:
    """The message of what was pinned."""
    if pinned is None:
        return None
    return pb.PinnedPrefix(pin_id=pinned.pin_id, tokens=pinned.tokens, expires_s=pinned.expires_s)


def finish_pb(finish: Finish) -> pb.Finish:
    """The message of a choice's end."""
    return pb.Finish(
        choice=finish.choice,
        reason=pb.FinishReason.ValueType(finish.reason),
        matched_stop=finish.matched_stop,
        matched_token_id=finish.matched_token_id,
        usage=_usage_pb(finish),
        exact=finish.exact,
        score=finish.score,
    )


def fill_finish(choice: pb.Choice, finish: Finish) -> None:
    """The end of a choice in the unary answer."""
    end = finish_pb(finish)
    choice.reason = end.reason
    choice.usage.CopyFrom(end.usage)
    choice.exact = end.exact
    if finish.score is not None:
        choice.score = finish.score
    if finish.matched_stop is not None:
        choice.matched_stop = finish.matched_stop
    if finish.matched_token_id is not None:
        choice.matched_token_id = finish.matched_token_id


def _usage_pb(finish: Finish) -> pb.Usage:
    usage = finish.usage
    return pb.Usage(
        prompt_tokens=usage.prompt_tokens,
        cached_prompt_tokens=usage.cached_prompt_tokens,
        completion_tokens=usage.completion_tokens,
        queue_ns=usage.queue_ns,
        prefill_ns=usage.prefill_ns,
        decode_ns=usage.decode_ns,
        discarded_tokens=usage.discarded_tokens,
        drafted_tokens=usage.drafted_tokens,
        accepted_tokens=usage.accepted_tokens,
    )


def _request_id(given: str) -> str:
    if len(given) > _MAX_REQUEST_ID:
        raise InvalidRequest("request_id", f"at most {_MAX_REQUEST_ID} characters, got {len(given)}")
    if not all("!" <= character <= "~" for character in given):  # it goes into log lines and metadata as it is
        raise InvalidRequest("request_id", "must be printable ASCII without spaces")
    return given or secrets.token_hex(8)


def _priority(given: int) -> Priority:
    if not given:
        return Priority.NORMAL
    try:
        return Priority(given)
    except ValueError:  # a number that the enum does not have goes through the wire
        raise InvalidRequest("priority", f"must be one of {', '.join(p.name for p in Priority)}, got {given}") from None


def _shortest(value: float) -> float:
    """The float32 as the number with fewest digits that rounds to it: 0.1, not 0.10000000149."""
    if not math.isfinite(value):
        return value
    for digits in range(1, 10):
        short = float(f"{value:.{digits}g}")
        try:
            if struct.unpack("<f", struct.pack("<f", short))[0] == value:
                return short
        except OverflowError:  # rounded up past the largest float32
            continue
    return value
