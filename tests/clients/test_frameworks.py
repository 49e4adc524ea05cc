"""Libraries that people build on, langchain-openai and litellm, are told of the default model what our client is told.

Each is a program of its own; what they tell alike has one name in both.
"""

from __future__ import annotations

import json
import os
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from pagewire import Client
from tests.e2e.cluster import ROOT, Cluster
from tests.e2e.gateways import Gateway
from tests.e2e.programs import run

COLOURS: list[Any] = [{"role": "user", "content": "Name three colours."}]
# It wants older versions of what the server stands on: make test-clients has it in an environment of its own.
LITELLM_PYTHON = os.environ.get("PAGEWIRE_LITELLM_PYTHON", str(ROOT / ".venv-litellm" / "bin" / "python"))


def told(python: str, program: str, gateway: Gateway, model: str) -> dict[str, Any]:
    """What the program told of each thing that it tried."""
    path = str(ROOT / "tests" / "clients" / program)
    ended = run(python, path, f"http://{gateway.http}/v1", model)
    assert ended.code == 0, ended.out + ended.err
    return {what: value for line in ended.out.splitlines() for what, value in json.loads(line).items()}


@pytest.fixture(scope="module")
def expected(smollm: Cluster) -> dict[str, Any]:
    """The same by our own client."""
    with Client(smollm.address) as client:
        text = client.generate(messages=COLOURS, max_tokens=16, temperature=0).text
        completion = client.generate("The sea is", max_tokens=12, temperature=0).text
    return {
        "chat": [text, "length", 16],
        "streamed": [text, "length", 16],
        "twice": [text, text],
        "by responses": text,
        "scored": [[True, 2]] * 16,
        "completion": completion,
        "after the tool": True,
        "after it": text,
    }


def check(answers: dict[str, Any], expected: dict[str, Any]) -> None:
    """What is the same for both. Takes it out of `answers`."""
    assert answers.pop("chunks") > 8
    tool = answers.pop("tool")
    assert [name for name, _ in tool] == ["weather"] and set(tool[0][1]) == {"city"}
    assert answers.pop("tool streamed") == tool
    assert answers.pop("json_schema")["colour"] in {"red", "green"}
    assert {name: answers.pop(name) for name in expected} == expected


@pytest.mark.skipif(find_spec("langchain_openai") is None, reason="langchain-openai: make test-clients has it")
def test_langchain_is_told_what_our_client_is(smollm: Cluster, gateway: Gateway, expected: dict[str, Any]) -> None:
    answers = told(sys.executable, "langchain_program.py", gateway, smollm.model.name)

    check(answers, expected)
    assert answers.pop("function_calling")["colour"] in {"red", "green"}
    assert answers == {
        "refused": [400, None, "temperature"],
        "another model": [404, "model_not_found", "model"],
        "too long": [400, "context_length_exceeded", "messages"],
        "unknown": [400, None, "temprature"],
    }


@pytest.mark.skipif(not Path(LITELLM_PYTHON).exists(), reason="litellm is not in .venv-litellm")
def test_litellm_is_told_what_our_client_is(smollm: Cluster, gateway: Gateway, expected: dict[str, Any]) -> None:
    answers = told(LITELLM_PYTHON, "litellm_program.py", gateway, smollm.model.name)

    check(answers, expected)
    assert answers == {
        "refused": ["BadRequestError", 400],
        "another model": ["NotFoundError", 404],
        "too long": ["ContextWindowExceededError", 400],
        "unknown": ["BadRequestError", 400],
        "no embeddings": ["BadRequestError", 400],
        "nobody there": ["InternalServerError", 500],
    }
