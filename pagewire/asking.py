"""A user's words to a request: what `generate` and `stream` take."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypedDict

from pagewire.borrowed import borrow
from pagewire.tools import call_fields, problem_of, tool_fields

if TYPE_CHECKING:
    from common import errors
    from protos import inference_pb2 as pb
else:
    errors = borrow("common.errors")
    pb = borrow("protos.inference_pb2")


class Settings(TypedDict, total=False):
    """Everything but the prompt in words. What is not given takes the server's default, which protos/ tells."""

    # A chat, each message with its "role" and "content", or what `Answer.message` and `ToolCall.result` give; instead
    # of a prompt.
    messages: Sequence[Mapping[str, Any]]
    tools: Sequence[Mapping[str, Any]]  # functions that a chat's answer may call: pagewire/tools.py says how
    tool_choice: str  # "auto", "none", "required", or the name of the one that is called
    parallel_tool_calls: bool  # False: one call at most
    token_ids: Sequence[int]  # a prompt that is tokenised already; instead of one in words
    max_tokens: int
    temperature: float  # 0 is greedy
    top_k: int
    top_p: float
    min_p: float
    typical_p: float
    repetition_penalty: float  # over the tokens of prompt and answer; 1 is none
    presence_penalty: float  # over the tokens of the answer; 0 is none
    frequency_penalty: float  # the same, times how often each is there
    logit_bias: Mapping[int, float]  # token id: what is added to its logit
    allowed_token_ids: Sequence[int]  # no other token is chosen
    banned_token_ids: Sequence[int]
    bad_words: str | Sequence[str]  # texts that the answer does not contain
    json_schema: str | Mapping[str, Any]  # the answer is JSON that is valid by it; one of these five at most
    json_object: bool  # the answer is any JSON object
    regex: str  # the whole answer matches it
    grammar: str  # the answer is a `start` of it, in Lark's syntax
    choices: Sequence[str]  # the answer is one of these
    logprobs: int  # so many of the likeliest tokens are told beside each token of the answer
    prompt_logprobs: int  # the same for the prompt
    beams: int | Mapping[str, Any]  # a beam search: its width, or what BeamSearch in protos/ has
    seed: int
    n: int  # choices that share the prompt
    best_of: int  # so many are made, and the likeliest n of them are the answer
    stop: str | Sequence[str]  # the text ends before the first of these
    stop_token_ids: Sequence[int]
    include_stop: bool  # the text ends behind the stop string, not before it
    ignore_eos: bool
    min_tokens: int  # before so many, nothing but max_tokens ends the answer
    cache_salt: str  # the blocks of the prompt are shared with requests of the same salt alone
    no_cache: bool  # nothing is read from the prefix cache, and nothing is left there
    pin_seconds: int  # the prompt stays in the prefix cache for so long
    pin_tokens: int  # only so many first tokens of it do
    max_drafts: int  # tokens guessed ahead in one step, where the server guesses any; 0 is none
    skip_special_tokens: bool
    priority: str  # "high", "normal" or "low": what waits for room goes on in this order
    model: str
    request_id: str  # by default a random one


_SAMPLING = frozenset(pb.SamplingParams.DESCRIPTOR.fields_by_name)
_STOPPING = frozenset(pb.StopConditions.DESCRIPTOR.fields_by_name)
_STRUCTURED = frozenset(pb.StructuredOutput.DESCRIPTOR.fields_by_name)
_CACHE = frozenset(pb.CacheControl.DESCRIPTOR.fields_by_name)
_EARLY_STOPPING = {
    False: pb.EARLY_STOPPING_LIKELY,
    True: pb.EARLY_STOPPING_FULL,
    "never": pb.EARLY_STOPPING_NEVER,
}
_PRIORITIES = {"high": pb.PRIORITY_HIGH, "normal": pb.PRIORITY_NORMAL, "low": pb.PRIORITY_LOW}
OF_CHATS = frozenset(pb.ChatMessages.DESCRIPTOR.fields_by_name) - {"messages"}
_LISTS = frozenset({"allowed_token_ids", "banned_token_ids", "bad_words", "stop", "stop_token_ids"})


def request_of(prompt: str | None, settings: Settings) -> pb.GenerateStreamRequest:
    """The request. Raises TypeError for a setting that there is not, InvalidRequest for one that cannot be sent."""
    check_names(settings, Settings)
    given: dict[str, Any] = {name: value for name, value in settings.items() if value is not None}
    structured = sorted(_STRUCTURED & given.keys())
    if len(structured) > 1:
        raise TypeError(f"give one of {' and '.join(f'{name}=' for name in structured)}")
    inputs = [name for name in ("messages", "token_ids") if name in given]
    if len(inputs) + (prompt is not None) != 1:
        raise TypeError("give one of: a prompt in words, messages=, token_ids=")
    if "messages" not in given and (lost := sorted(OF_CHATS & given.keys())):
        raise TypeError(f"{lost[0]}= goes with messages=, for a chat alone has tools")
    request = pb.GenerateStreamRequest()
    if prompt is not None:
        set_field(request, "text", prompt)
    for name, value in given.items():
        if name == "messages":
            set_messages(request.chat, value)
        elif name == "token_ids":
            set_tokens(request.token_ids, name, value)
        elif name == "beams":
            _set_beams(request.sampling.beams, value)
        elif name in OF_CHATS:
            set_tools(request.chat, name, value)
        elif name in _STRUCTURED:
            _set_structured(request.sampling.structured, name, value)
        else:
            parts = ((request.sampling, _SAMPLING), (request.stopping, _STOPPING), (request.cache, _CACHE))
            part = next((part for part, names in parts if name in names), request)
            if name in _LISTS:
                extend(getattr(part, name), name, [value] if isinstance(value, str) else value)
            elif name == "logit_bias":
                _add_all(request.sampling.logit_bias, name, value)
            elif name == "priority":
                set_priority(request, value)
            else:
                set_field(part, name, value)
    return request


def set_messages(chat: pb.ChatMessages, messages: Sequence[Mapping[str, Any]]) -> None:
    """Set a chat's messages, also none. Raises InvalidRequest for what is none."""
    chat.SetInParent()
    for number, message in enumerate(messages):
        field = f"messages[{number}]"
        if problem := problem_of(message):
            raise errors.InvalidRequest(field, problem)
        added = chat.messages.add()
        for name, value in message.items():
            if name != "tool_calls" and value is not None:
                set_field(added, name, value, f"{field}.{name}")
        for i, call in enumerate(message.get("tool_calls") or ()):
            part = added.tool_calls.add()
            for name, value in call_fields(call).items():
                set_field(part, name, value, f"{field}.tool_calls[{i}].{name}")


def set_tools(chat: pb.ChatMessages, name: str, value: Any) -> None:
    """Set `tools`, `tool_choice` or `parallel_tool_calls`. Raises InvalidRequest for what cannot be sent."""
    if name == "tools":
        for number, tool in enumerate(value):
            added = chat.tools.add()
            for key, part in tool_fields(tool).items():
                set_field(added, key, part, f"tools[{number}].{key}")
    elif name == "tool_choice":
        if value in ("auto", "none", "required"):
            chat.tool_choice.mode = pb.ToolChoiceMode.Value(f"TOOL_CHOICE_MODE_{value.upper()}")
        else:
            set_field(chat.tool_choice, "function", value, name)
    else:
        set_field(chat, name, value)


def _set_beams(beams: pb.BeamSearch, value: int | Mapping[str, Any]) -> None:
    """`value` is a width, or has the fields of BeamSearch; `early_stopping` as Transformers has it."""
    given = value if isinstance(value, Mapping) else {"width": value}
    beams.SetInParent()
    for name, part in given.items():
        told = f"beams.{name}"
        if name not in beams.DESCRIPTOR.fields_by_name:
            raise errors.InvalidRequest(told, f"there is {', '.join(beams.DESCRIPTOR.fields_by_name)}")
        if name == "early_stopping" and isinstance(part, bool | str) and part in _EARLY_STOPPING:
            beams.early_stopping = _EARLY_STOPPING[part]
        else:
            set_field(beams, name, part, told)


def _set_structured(structured: pb.StructuredOutput, name: str, value: Any) -> None:
    if name == "choices":
        extend(structured.choices.values, name, [value] if isinstance(value, str) else value)
        structured.choices.SetInParent()
        return
    if name == "json_schema" and not isinstance(value, str):
        try:
            value = json.dumps(value)
        except (TypeError, ValueError, RecursionError):
            raise errors.InvalidRequest(name, f"cannot be {_shown(value)}") from None
    set_field(structured, name, value)


def check_names(settings: Mapping[str, Any], known: type[Any]) -> None:
    """Raise TypeError for a setting that the typed dictionary `known` has not."""
    names = known.__annotations__
    if unknown := settings.keys() - names.keys():
        raise TypeError(f"there is no setting {min(unknown)!r}; there are: {', '.join(names)}")


def set_field(message: Any, name: str, value: Any, told: str = "") -> None:
    """Set a field. Raises InvalidRequest, of `told` or `name`, for a value that it cannot have."""
    try:
        setattr(message, name, value)
    except AttributeError:
        raise errors.InvalidRequest(told or name, "there is no such field") from None
    except (TypeError, ValueError, UnicodeError):
        raise errors.InvalidRequest(told or name, f"cannot be {_shown(value)}") from None


def set_priority(request: pb.GenerateStreamRequest | pb.EmbedRequest, value: object) -> None:
    """Set what goes first. Raises InvalidRequest for a word that is none."""
    if not isinstance(value, str) or value not in _PRIORITIES:
        raise errors.InvalidRequest("priority", f"must be one of {', '.join(_PRIORITIES)}")
    request.priority = _PRIORITIES[value]


def set_tokens(tokens: pb.TokenIds, name: str, values: Sequence[int]) -> None:
    """Set token ids, also none. Raises InvalidRequest, of `name`, for what is none."""
    extend(tokens.ids, name, values)
    tokens.SetInParent()


def extend(numbers: Any, name: str, values: Sequence[Any]) -> None:
    """Add to a list of the message. Raises InvalidRequest, of `name`, for what cannot be in it."""
    try:
        numbers.extend(values)
    except (TypeError, ValueError, UnicodeError):
        raise errors.InvalidRequest(name, f"cannot be {_shown(values)}") from None


def _add_all(biases: Any, name: str, values: Mapping[int, float]) -> None:
    try:
        for token, bias in values.items():
            biases[token] = bias
    except (AttributeError, TypeError, ValueError):
        raise errors.InvalidRequest(name, f"cannot be {_shown(values)}") from None


def _shown(value: Any) -> str:
    """A number as it is; of anything longer the type, for it may be a prompt."""
    return repr(value) if isinstance(value, int | float) else f"a {type(value).__name__} like this"
