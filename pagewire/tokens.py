"""Tokens of texts, texts of tokens, and the model that has them: what is asked without an answer being made."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypedDict

from pagewire.asking import OF_CHATS, check_names, extend, set_field, set_messages, set_tools
from pagewire.borrowed import borrow

if TYPE_CHECKING:
    from protos import inference_pb2 as pb
else:
    pb = borrow("protos.inference_pb2")


class TokenizeSettings(TypedDict, total=False):
    """Everything but a text. What is not given takes the server's default, which protos/ tells."""

    messages: Sequence[Mapping[str, Any]]  # a chat, as in Settings; instead of a text
    tools: Sequence[Mapping[str, Any]]
    tool_choice: str
    parallel_tool_calls: bool
    add_special_tokens: bool  # those that the tokenizer puts around a text
    model: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    """What is served, and its limits."""

    name: str
    digest: str
    vocab_size: int
    max_model_len: int  # prompt and answer together, in tokens
    max_choices: int
    has_chat_template: bool
    num_executors: int  # that are connected now
    embedding_dimensions: int  # numbers of the vectors that it makes; 0: it makes none


def tokenize_request(text: str | None, settings: TokenizeSettings) -> pb.TokenizeRequest:
    """The request. Raises TypeError for a setting that there is not, InvalidRequest for what cannot be sent."""
    check_names(settings, TokenizeSettings)
    given: dict[str, Any] = {name: value for name, value in settings.items() if value is not None}
    if ("messages" in given) == (text is not None):
        raise TypeError("give one of: a text, messages=")
    request = pb.TokenizeRequest()
    if text is not None:
        set_field(request, "text", text)
        if lost := sorted(OF_CHATS & given.keys()):
            raise TypeError(f"{lost[0]}= goes with messages=, for a chat alone has tools")
    for name, value in given.items():
        if name == "messages":
            set_messages(request.chat, value)
        elif name in OF_CHATS:
            set_tools(request.chat, name, value)
        else:
            set_field(request, name, value)
    return request


def detokenize_request(
    token_ids: Sequence[int], *, skip_special_tokens: bool | None, model: str
) -> pb.DetokenizeRequest:
    """The request. Raises InvalidRequest for what cannot be sent."""
    request = pb.DetokenizeRequest()
    extend(request.token_ids, "token_ids", token_ids)
    set_field(request, "model", model)
    if skip_special_tokens is not None:
        set_field(request, "skip_special_tokens", skip_special_tokens)
    return request


def model_request(name: str) -> pb.GetModelRequest:
    """The request. Raises InvalidRequest for what cannot be sent."""
    request = pb.GetModelRequest()
    set_field(request, "model", name)
    return request


def model_of(told: pb.GetModelResponse) -> Model:
    """What the answer to it says."""
    return Model(
        name=told.model,
        digest=told.digest,
        vocab_size=told.vocab_size,
        max_model_len=told.max_model_len,
        max_choices=told.max_choices,
        has_chat_template=told.chat,
        num_executors=told.num_executors,
        embedding_dimensions=told.embedding_dimensions,
    )
