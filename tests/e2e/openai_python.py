"""OpenAI's client for Python asks a gateway, and tells what it was told as `openai_node/ask.mjs` does."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import openai
from openai import OpenAI


def ask(client: OpenAI, asked: Mapping[str, Any]) -> dict[str, Any]:
    """What there is to tell of each request."""
    chat = client.chat.completions.create(**asked["chat"])
    completion = client.completions.create(**asked["completion"])
    formed = client.chat.completions.create(**asked["formed"])
    response = client.responses.create(**asked["response"])
    with client.chat.completions.stream(**asked["tools"]) as stream:
        tools = stream.get_final_completion()
    with client.responses.stream(**asked["response_tools"]) as events:
        response_tools = events.get_final_response()
    refused: list[Any] = []
    try:
        client.chat.completions.create(**{**asked["chat"], "model": "gpt-4o"})
    except openai.NotFoundError as error:
        refused = [error.status_code, error.code, error.param]
    return {
        "chat": [chat.choices[0].message.content, chat.choices[0].finish_reason, chat.usage.completion_tokens],
        "chat_scores": [token.logprob for token in chat.choices[0].logprobs.content],
        "chat_streamed": "".join(
            chunk.choices[0].delta.content or ""
            for chunk in client.chat.completions.create(**asked["chat"], stream=True)
        ),
        "completion": [completion.choices[0].text, completion.choices[0].finish_reason],
        "completion_scores": completion.choices[0].logprobs.token_logprobs,
        "completion_streamed": "".join(
            chunk.choices[0].text for chunk in client.completions.create(**asked["completion"], stream=True)
        ),
        "formed": json.loads(formed.choices[0].message.content),
        "tools": _calls(tools.choices[0].message),
        "response": response.output_text,
        "response_streamed": "".join(
            event.delta
            for event in client.responses.create(**asked["response"], stream=True)
            if event.type == "response.output_text.delta"
        ),
        "response_tools": _called(response_tools),
        "refused": refused,
        "models": [model.id for model in client.models.list()],
    }


def _calls(message: Any) -> list[list[str]]:
    return [[call.function.name, call.function.arguments] for call in message.tool_calls or []]


def _called(response: Any) -> list[list[str]]:
    return [[item.name, item.arguments] for item in response.output if item.type == "function_call"]
