"""What any endpoint can ask for: every field of our own API by its name, and OpenAI's names for some of them.

A member that is not there is left unset: its default is the scheduler's. What is out of a control's range is for the
scheduler to say; what no message can hold is refused here.
"""

from __future__ import annotations

import re
from typing import Any, Final

from google.protobuf.message import Message

from common.errors import InvalidRequest
from protos import inference_pb2 as pb
from services.gateway.fields import MAX_U32, Fields, integer, number, shown_word

_MAX_BIASES: Final = 4096  # far above the scheduler's limit: a message of more would be too large for it
_MAX_CHOICES: Final = 128  # OpenAI's; the scheduler has a limit of its own, and room is made here before it is asked
_BIASES: Final = {"type": "object", "additionalProperties": {"type": "number"}, "maxProperties": _MAX_BIASES}
# Fields that are not taken as they are: another name, form or range, or an endpoint's own business.
_OTHERWISE: Final = frozenset({"text", "top_k", "seed", "n", "logprobs", "max_tokens", "resumable"})

# What OpenAI's own servers use for accounting, routing or storing, and what changes no answer here.
WITHOUT_EFFECT: Final = (
    "metadata", "prompt_cache_key", "prompt_cache_retention", "safety_identifier", "service_tier", "store", "user",
)  # fmt: skip


def read_options(fields: Fields, request: pb.GenerateStreamRequest, *, max_tokens: tuple[str, ...]) -> dict[str, str]:
    """Fill in what the members ask for. `max_tokens` are the endpoint's names for that.

    Returns what the caller calls the scheduler's fields, where that is something else. Raises InvalidRequest.
    """
    names: dict[str, str] = {}
    _read_sampling(fields, request.sampling)
    names |= _read_stopping(fields, request.stopping, max_tokens)
    read_plain(fields, request)
    read_plain(fields, request.cache)
    _read_beams(fields, request.sampling)
    fields.ignore(*WITHOUT_EFFECT)
    return names


def read_plain(fields: Fields, message: Message) -> None:
    """Fill in each field that is a number, a word, a truth, a text or a list of these, by its own name.

    So a control that is new in the API can be asked for without a word here. Raises InvalidRequest.
    """
    for field in message.DESCRIPTOR.fields:
        name = field.name
        if name in _OTHERWISE or field.message_type is not None:
            continue
        if field.is_repeated:
            found = fields.strings(name) if field.cpp_type == field.CPPTYPE_STRING else fields.integers(name)
            if found:  # to add nothing would make the message be there
                getattr(message, name).extend(found)
        elif (value := _plain(fields, field)) is not None:
            setattr(message, name, value)


def _plain(fields: Fields, field: Any) -> Any:
    match field.cpp_type:
        case field.CPPTYPE_FLOAT | field.CPPTYPE_DOUBLE:
            return fields.number(field.name)
        case field.CPPTYPE_BOOL:
            return fields.boolean(field.name)
        case field.CPPTYPE_STRING:
            return fields.string(field.name)
        case field.CPPTYPE_UINT64:
            return fields.integer(field.name, 0, (1 << 64) - 1)
        case field.CPPTYPE_ENUM:  # PRIORITY_LOW is "low"
            prefix = re.sub(r"(?<!^)(?=[A-Z])", "_", field.enum_type.name).lower() + "_"
            words = {value.name.lower().removeprefix(prefix): value.number for value in field.enum_type.values[1:]}
            return words.get(fields.word(field.name, tuple(words)) or "")
        case _:
            return fields.integer(field.name)


def read_structured(fields: Fields, sampling: pb.SamplingParams, text_format: Fields | None = None) -> dict[str, str]:
    """What the answer must be, by our names for that, in `response_format` or `text_format`; one of them at most.

    Returns names as `read_options` does. Raises InvalidRequest.
    """
    asked: list[str] = []
    structured = pb.StructuredOutput()
    if (schema := fields.schema("json_schema")) is not None:
        asked.append("json_schema")
        structured.json_schema = schema
    if fields.boolean("json_object"):
        asked.append("json_object")
        structured.json_object = True
    for name in ("regex", "grammar"):
        if (source := fields.string(name)) is not None:
            asked.append(name)
            setattr(structured, name, source)
    has_choices = fields.has("choices")
    choices = fields.strings("choices")
    if has_choices:
        asked.append("choices")
        structured.choices.SetInParent()
        structured.choices.values.extend(choices)
    names: dict[str, str] = {}
    for format_ in (fields.fields("response_format"), text_format):
        if format_ is not None and (found := _read_format(format_, structured)):
            names |= found
            asked.append(format_.here)
    fields.refuse_several(asked, "can say what the answer must be")
    if asked:
        sampling.structured.CopyFrom(structured)
    return names


def _read_format(fields: Fields, structured: pb.StructuredOutput) -> dict[str, str]:
    """OpenAI's `response_format`, or what its Responses API calls `text.format`. Returns no names for plain text."""
    kind = fields.required_word("type", ("text", "json_object", "json_schema"))
    if kind == "text":
        fields.refuse_unknown()
        return {}
    if kind == "json_object":
        fields.refuse_unknown()
        structured.json_object = True
        return {"json_object": fields.here}
    # in chat completions the schema lies one level deeper
    is_deeper = fields.is_object("json_schema") or fields.has("json_schema")
    inner = (fields.fields("json_schema") if is_deeper else None) or fields
    around = fields.path("json_schema") if fields.here == "response_format" and not is_deeper else ""
    structured.json_schema = inner.required_schema("schema", around)
    inner.string("name")
    inner.string("description")
    inner.boolean("strict")  # it always is
    for read in (inner, fields):
        read.refuse_unknown()
    return {"json_schema": inner.path("schema")}


def _read_sampling(fields: Fields, sampling: pb.SamplingParams) -> None:
    read_plain(fields, sampling)
    if (top_k := fields.integer("top_k", -1)) is not None:
        sampling.top_k = max(0, top_k)  # elsewhere -1 is none
    if (seed := fields.integer("seed", -(1 << 63), (1 << 64) - 1)) is not None:
        sampling.seed = seed % (1 << 64)  # OpenAI's are signed
    range_ = f"the gateway passes on 1 to {_MAX_CHOICES}, and the scheduler may serve fewer"
    if (n := fields.integer("n", 1, _MAX_CHOICES, range_)) is not None:
        sampling.n = n
    if (biases := fields.fields("logit_bias", _BIASES)) is not None:
        if len(biases.names()) > _MAX_BIASES:
            raise InvalidRequest("logit_bias", f"at most {_MAX_BIASES} tokens, got {len(biases.names())}")
        for token in biases.names():
            path = f"logit_bias[{shown_word(token)}]"
            id = (
                integer(int(token), path, 0, MAX_U32) if token.isascii() and token.isdigit() and len(token) < 16 else -1
            )
            if id < 0:
                raise InvalidRequest(path, "must be called by a token's id")
            sampling.logit_bias[id] = number(biases.take(token), path)


def _read_beams(fields: Fields, sampling: pb.SamplingParams) -> None:
    """A width, or an object with what BeamSearch has; when it stops, also as Transformers has it: false or true."""
    if not fields.is_object("beams"):
        if (width := fields.integer("beams")) is not None:
            sampling.beams.width = width
        return
    if (asked := fields.fields("beams")) is not None:
        sampling.beams.SetInParent()
        if asked.is_boolean("early_stopping"):
            early = asked.boolean("early_stopping")
            sampling.beams.early_stopping = pb.EARLY_STOPPING_FULL if early else pb.EARLY_STOPPING_LIKELY
        read_plain(asked, sampling.beams)
        asked.refuse_unknown()


def _read_stopping(fields: Fields, stopping: pb.StopConditions, max_tokens: tuple[str, ...]) -> dict[str, str]:
    given = ""
    for name in max_tokens:
        if (most := fields.integer(name)) is not None:
            if given and most != stopping.max_tokens:
                raise InvalidRequest(name, f"{given} says otherwise: give one of them")
            stopping.max_tokens, given = most, name
    read_plain(fields, stopping)
    return {"max_tokens": given} if given not in ("", "max_tokens") else {}
