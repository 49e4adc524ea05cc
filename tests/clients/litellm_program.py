"""What litellm is told by a gateway: in JSON, one line for each thing that was tried.

`python litellm_program.py URL MODEL`, where URL ends in /v1. A program of its own, because what it warns of as it
starts would be errors in a test.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
from typing import Any

os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"  # it asks the internet for prices as it is imported, otherwise

import litellm  # pyright: ignore[reportMissingImports]

COLOURS: Any = [{"role": "user", "content": "Name three colours."}]
OSLO: Any = [{"role": "user", "content": "How is the weather in Oslo?"}]
WEATHER: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather of a city",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "maxLength": 12}},
            "required": ["city"],
            "additionalProperties": False,
        },
    },
}
COLOUR: dict[str, Any] = {
    "type": "object",
    "properties": {"colour": {"enum": ["red", "green"]}},
    "required": ["colour"],
    "additionalProperties": False,
}


def tell(what: str, value: Any) -> None:
    """One line."""
    print(json.dumps({what: value}), flush=True)


def calls(message: Any) -> list[Any]:
    """The tools that a message calls."""
    return [[call.function.name, json.loads(call.function.arguments)] for call in message.tool_calls]


def main(url: str, name: str) -> None:
    """Try all of it."""
    litellm.suppress_debug_info = True
    shared: dict[str, Any] = {"api_base": url, "api_key": "none", "temperature": 0, "max_retries": 0}

    def chat(messages: Any = COLOURS, **asked: Any) -> Any:
        return litellm.completion(**{"model": f"openai/{name}", "messages": messages, **shared, **asked})

    def refusal(ask: Any = chat, **asked: Any) -> list[Any]:
        """The name of the error that it must end with, and its status."""
        try:
            ask(**asked)
        except Exception as error:  # noqa: BLE001  which one it is is what is told
            return [type(error).__name__, getattr(error, "status_code", None)]
        raise AssertionError("it was answered")

    answer = chat(max_tokens=16)
    tell("chat", [answer.choices[0].message.content, answer.choices[0].finish_reason, answer.usage.completion_tokens])
    chunks = list(chat(max_tokens=16, stream=True, stream_options={"include_usage": True}))
    whole = litellm.stream_chunk_builder(chunks)
    tell("streamed", [whole.choices[0].message.content, whole.choices[0].finish_reason, whole.usage.completion_tokens])
    tell("chunks", sum(bool(chunk.choices and chunk.choices[0].delta.content) for chunk in chunks))
    asked: dict[str, Any] = {"model": f"openai/{name}", "messages": COLOURS, "max_tokens": 16, **shared}

    async def at_once() -> list[Any]:
        return await asyncio.gather(*(litellm.acompletion(**asked) for _ in range(2)))

    tell("twice", [each.choices[0].message.content for each in asyncio.run(at_once())])
    scored = chat(max_tokens=16, logprobs=True, top_logprobs=2).choices[0].logprobs.content
    tell("scored", [[each.logprob <= 0, len(each.top_logprobs)] for each in scored])
    response = litellm.responses(model=f"openai/{name}", input=COLOURS[0]["content"], max_output_tokens=16, **shared)
    tell("by responses", response.output[0].content[0].text)
    completion = litellm.text_completion(
        model=f"text-completion-openai/{name}", prompt="The sea is", max_tokens=12, **shared
    )
    tell("completion", completion.choices[0].text)

    tools: dict[str, Any] = {
        "tools": [WEATHER],
        "tool_choice": "required",
        "parallel_tool_calls": False,
        "max_tokens": 200,
    }
    called = chat(OSLO, **tools).choices[0].message
    tell("tool", calls(called))
    tell(
        "tool streamed", calls(litellm.stream_chunk_builder(list(chat(OSLO, stream=True, **tools))).choices[0].message)
    )
    told_back = {"role": "tool", "tool_call_id": called.tool_calls[0].id, "content": "rain"}
    further = [*OSLO, called.model_dump(), told_back]
    tell("after the tool", bool(chat(further, tools=[WEATHER], max_tokens=16).choices[0].message.content))
    form = {"type": "json_schema", "json_schema": {"name": "colour", "strict": True, "schema": COLOUR}}
    tell("json_schema", json.loads(chat(max_tokens=200, response_format=form).choices[0].message.content))

    tell("refused", refusal(temperature=-1))
    tell("another model", refusal(model="openai/gpt-4o"))
    tell("too long", refusal(messages=[{"role": "user", "content": "word " * 9000}]))
    tell("unknown", refusal(extra_body={"temprature": 1}))
    tell("no embeddings", refusal(litellm.embedding, model=f"openai/{name}", input=["x"], api_base=url, api_key="none"))
    tell("nobody there", refusal(api_base="http://127.0.0.1:1/v1"))
    tell("after it", chat(max_tokens=16).choices[0].message.content)


if __name__ == "__main__":
    main(*sys.argv[1:3])
