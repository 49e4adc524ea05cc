"""What the client for Python is told of tokens and models."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any, cast

import pytest

from common.errors import InvalidRequest, UnknownModel
from pagewire import AsyncClient, Client, Model
from pagewire.tokens import TokenizeSettings, detokenize_request, tokenize_request
from protos import inference_pb2 as pb
from tests.services.scripted import played

both = pytest.mark.parametrize("kind", [Client, AsyncClient])


async def ask(kind: type[Client | AsyncClient], address: str, use: Callable[[Any], Any]) -> Any:
    """By either client."""
    if issubclass(kind, AsyncClient):
        async with kind(address) as client:
            return await use(client)

    def blocking() -> Any:
        with kind(address) as client:
            return use(client)

    return await asyncio.to_thread(blocking)


@both
def test_texts_have_tokens_and_tokens_a_text(kind: type[Client | AsyncClient]) -> None:
    with played() as (server, run):
        told = run(lambda address: ask(kind, address, lambda client: client.tokenize("AB", add_special_tokens=False)))
        assert told == (65, 66)
        told = run(
            lambda address: ask(kind, address, lambda client: client.detokenize([65, 66], skip_special_tokens=False))
        )
        assert told == "AB"
    assert server.asked == [
        pb.TokenizeRequest(text="AB", add_special_tokens=False),
        pb.DetokenizeRequest(token_ids=[65, 66], skip_special_tokens=False),
    ]


@both
def test_a_model_is_told_by_its_limits_and_another_s_name_is_refused(kind: type[Client | AsyncClient]) -> None:
    with played() as (_, run):
        assert run(lambda address: ask(kind, address, lambda client: client.model())) == Model(
            name="m",
            digest="",
            vocab_size=9,
            max_model_len=0,
            max_choices=0,
            has_chat_template=True,
            num_executors=0,
            embedding_dimensions=0,
        )
        with pytest.raises(UnknownModel, match="x is not served here"):
            run(lambda address: ask(kind, address, lambda client: client.model("x")))


def test_a_chat_is_tokenized_with_its_tools() -> None:
    chat: TokenizeSettings = {
        "messages": [{"role": "user", "content": "hi"}],
        "tools": [{"name": "f"}],
        "tool_choice": "required",
        "model": "m",
    }
    assert tokenize_request(None, chat) == pb.TokenizeRequest(
        model="m",
        chat=pb.ChatMessages(
            messages=[pb.ChatMessage(role="user", content="hi")],
            tools=[pb.Tool(name="f")],
            tool_choice=pb.ToolChoice(mode=pb.TOOL_CHOICE_MODE_REQUIRED),
        ),
    )
    assert tokenize_request(None, {"messages": []}).HasField("chat")


@pytest.mark.parametrize(
    ("text", "settings", "error", "says"),
    [
        (None, {}, TypeError, "give one of: a text, messages="),
        ("a", {"messages": []}, TypeError, "give one of: a text, messages="),
        ("a", {"tools": []}, TypeError, "tools= goes with messages="),
        ("a", {"temperature": 1}, TypeError, "there is no setting 'temperature'"),
        ("\ud800", {}, InvalidRequest, "text: cannot be"),
        ("a", {"add_special_tokens": "no"}, InvalidRequest, "add_special_tokens: cannot be"),
    ],
)
def test_what_cannot_be_tokenized_is_refused_by_its_name(
    text: str | None, settings: Any, error: type[Exception], says: str
) -> None:
    with pytest.raises(error, match=says):
        tokenize_request(text, cast("TokenizeSettings", settings))


def test_what_are_no_tokens_is_refused_by_its_name() -> None:
    with pytest.raises(InvalidRequest, match="token_ids: cannot be"):
        detokenize_request([-1], skip_special_tokens=None, model="")
