"""What langchain-openai is told by a gateway: in JSON, one line for each thing that was tried.

`python langchain_program.py URL MODEL`, where URL ends in /v1. A program of its own, because what it warns of as it
starts would be errors in a test.
"""

from __future__ import annotations

import json
import sys
from functools import reduce
from operator import add
from typing import Any

import openai
from langchain_core.messages import AIMessage, HumanMessage, ToolMessage  # pyright: ignore[reportMissingImports]
from langchain_openai import ChatOpenAI, OpenAI  # pyright: ignore[reportMissingImports]

COLOURS = "Name three colours."
OSLO = "How is the weather in Oslo?"
WEATHER: dict[str, Any] = {
    "title": "weather",
    "description": "The weather of a city",
    "type": "object",
    "properties": {"city": {"type": "string", "maxLength": 12}},
    "required": ["city"],
    "additionalProperties": False,
}
COLOUR: dict[str, Any] = {
    "title": "colour",
    "type": "object",
    "properties": {"colour": {"enum": ["red", "green"]}},
    "required": ["colour"],
    "additionalProperties": False,
}


def tell(what: str, value: Any) -> None:
    """One line."""
    print(json.dumps({what: value}), flush=True)


def refusal(model: Any, prompt: str) -> list[Any]:
    """How asking fails, which it must: the kind, and what OpenAI's client knows of it."""
    try:
        model.invoke(prompt)
    except openai.APIStatusError as error:
        return [error.status_code, error.code, error.param]
    raise AssertionError("it was answered")


def main(url: str, name: str) -> None:
    """Try all of it."""
    shared: dict[str, Any] = {"model": name, "base_url": url, "api_key": "none", "temperature": 0, "max_retries": 0}
    model = ChatOpenAI(**shared, max_tokens=16)

    answer = model.invoke(COLOURS)
    told = [answer.content, answer.response_metadata["finish_reason"], answer.usage_metadata["output_tokens"]]
    tell("chat", told)
    chunks = list(model.stream(COLOURS, stream_usage=True))
    whole = reduce(add, chunks)
    tell("streamed", [whole.content, whole.response_metadata["finish_reason"], whole.usage_metadata["output_tokens"]])
    tell("chunks", sum(bool(chunk.content) for chunk in chunks))
    tell("twice", [each.content for each in model.batch([COLOURS, COLOURS])])
    tell("by responses", ChatOpenAI(**shared, max_tokens=16, use_responses_api=True).invoke(COLOURS).text)
    scored = model.bind(logprobs=True, top_logprobs=2).invoke(COLOURS).response_metadata["logprobs"]["content"]
    tell("scored", [[each["logprob"] <= 0, len(each["top_logprobs"])] for each in scored])
    tell("completion", OpenAI(**shared, max_tokens=12).invoke("The sea is"))

    roomy = ChatOpenAI(**shared, max_tokens=200)
    able = roomy.bind_tools([WEATHER], tool_choice="any", strict=True, parallel_tool_calls=False)
    called = able.invoke(OSLO)
    tell("tool", [[call["name"], call["args"]] for call in called.tool_calls])
    streamed = reduce(add, able.stream(OSLO))
    tell("tool streamed", [[call["name"], call["args"]] for call in streamed.tool_calls])
    (call,) = called.tool_calls
    told_back = [HumanMessage(OSLO), AIMessage("", tool_calls=[call]), ToolMessage("rain", tool_call_id=call["id"])]
    tell("after the tool", bool(model.bind_tools([WEATHER]).invoke(told_back).content))
    for method in ("json_schema", "function_calling"):
        tell(method, roomy.with_structured_output(COLOUR, method=method, strict=True).invoke(COLOURS))

    tell("refused", refusal(ChatOpenAI(**{**shared, "temperature": -1}), COLOURS))
    tell("another model", refusal(ChatOpenAI(**{**shared, "model": "gpt-4o"}), COLOURS))
    tell("too long", refusal(model, "word " * 9000))
    tell("unknown", refusal(ChatOpenAI(**shared, extra_body={"temprature": 1}), COLOURS))
    tell("after it", model.invoke(COLOURS).content)


if __name__ == "__main__":
    main(*sys.argv[1:3])
