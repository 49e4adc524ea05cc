"""OpenAI's own clients, for Python and Node, and `buf curl`, against the default model: told what ours is told."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pagewire import Client
from tests.e2e import buf, openai_python
from tests.e2e.cluster import Cluster
from tests.e2e.gateways import Gateway
from tests.e2e.npm import NODE, node_modules
from tests.executor.schemas import problem

HERE = Path(__file__).parent
PERSON: dict[str, Any] = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 8}, "age": {"type": "integer", "maximum": 99}},
    "required": ["name", "age"],
    "additionalProperties": False,
}
GREET: dict[str, Any] = {"name": "greet", "description": "Greets a person.", "parameters": PERSON, "strict": True}
SAYS: list[dict[str, Any]] = [{"role": "user", "content": "Greet Ada, who is 36."}]
ALIKE: dict[str, Any] = {"temperature": 0, "seed": 5}
TOOLS: dict[str, Any] = {**ALIKE, "tool_choice": "required", "parallel_tool_calls": False}


@pytest.fixture(scope="module")
def running(default_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    cluster = Cluster(default_model, tmp_path_factory.mktemp("cluster"))
    try:
        cluster.start_executor("--num-blocks=256", fake=False)
        yield cluster
    finally:
        cluster.close()


@pytest.fixture(scope="module")
def gateway(running: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    with Gateway(running.address, tmp_path_factory.mktemp("gateway") / "log") as made:
        yield made


@pytest.fixture(scope="module")
def expected(running: Cluster) -> dict[str, Any]:
    """The same by our own client."""
    with Client(running.address) as client:
        chat = client.generate(messages=SAYS, max_tokens=8, logprobs=0, **ALIKE)
        text = client.generate("The capital of France is", max_tokens=6, prompt_logprobs=0, logprobs=0, **ALIKE)
        formed = client.generate(messages=SAYS, json_schema=PERSON, max_tokens=60, **ALIKE)
        [call] = client.generate(messages=SAYS, tools=[GREET], max_tokens=60, **TOOLS).tool_calls
    called = [[call.name, call.arguments]]
    return {
        "chat": [chat.text, "length", 8],
        "chat_scores": [pytest.approx(each.token.logprob, abs=1e-3) for each in chat.logprobs],
        "chat_streamed": chat.text,
        "completion": ["The capital of France is" + text.text, "length"],
        "completion_scores": [
            each.token.logprob if each.token.logprob is None else pytest.approx(each.token.logprob, abs=1e-3)
            for each in (*text.prompt_logprobs, *text.logprobs)
        ],
        "completion_streamed": "The capital of France is" + text.text,
        "formed": json.loads(formed.text),
        "tools": called,
        "response": chat.text,
        "response_streamed": chat.text,
        "response_tools": called,
        "refused": [404, "model_not_found", "model"],
        "models": [chat.model],
    }


def asked(model: str) -> dict[str, Any]:
    chat: dict[str, Any] = {"model": model, "messages": SAYS, **ALIKE}
    response: dict[str, Any] = {"model": model, "input": "Greet Ada, who is 36.", "temperature": 0}
    form = {"type": "json_schema", "json_schema": {"name": "person", "strict": True, "schema": PERSON}}
    return {
        "chat": {**chat, "max_completion_tokens": 8, "logprobs": True},
        "completion": {
            "model": model, "prompt": "The capital of France is", "max_tokens": 6, "echo": True, "logprobs": 0, **ALIKE,
        },
        "formed": {**chat, "max_completion_tokens": 60, "response_format": form},
        "tools": {**chat, **TOOLS, "max_completion_tokens": 60, "tools": [{"type": "function", "function": GREET}]},
        "response": {**response, "max_output_tokens": 8},
        "response_tools": {
            **response, "max_output_tokens": 60, "tools": [{"type": "function", **GREET}],
            "tool_choice": "required", "parallel_tool_calls": False,
        },
    }  # fmt: skip


def ask_with_python(gateway: Gateway, model: str, folder: Path) -> dict[str, Any]:
    with gateway.client() as client:
        return openai_python.ask(client, asked(model))


def ask_with_node(gateway: Gateway, model: str, folder: Path) -> dict[str, Any]:
    source = HERE / "openai_node"
    shutil.copy(source / "ask.mjs", folder)
    (folder / "node_modules").symlink_to(node_modules(source))
    said = json.dumps({"baseURL": f"http://{gateway.http}/v1", "asked": asked(model)})
    done = subprocess.run(
        [NODE, "ask.mjs"], cwd=folder, input=said, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    told: dict[str, Any] = json.loads(done.stdout)
    return told


@pytest.mark.parametrize("ask", [ask_with_python, ask_with_node], ids=["Python", "Node"])
def test_openais_client_is_told_what_ours_is(
    ask: Any, running: Cluster, gateway: Gateway, expected: dict[str, Any], tmp_path: Path
) -> None:
    told = ask(gateway, running.model.name, tmp_path)

    for name, wanted in expected.items():
        assert told[name] == wanted, name
    assert problem(told["formed"], PERSON) is None
    assert problem(json.loads(told["tools"][0][1]), PERSON) is None


def test_buf_reads_what_ours_reads_by_reflection(running: Cluster) -> None:
    prompt = "The capital of France is"
    asked = {"text": prompt, "sampling": {"temperature": 0}, "stopping": {"maxTokens": 6}}
    ended = buf.curl(running.address, "pagewire.v1.InferenceService/GenerateStream", "--data", json.dumps(asked))
    with Client(running.address) as client:
        ours = client.generate(prompt, max_tokens=6, temperature=0)

    assert ended.code == 0, ended.err
    first, *deltas, last = buf.messages(ended.out)
    assert first["prompt"]["model"] == running.model.name
    assert "".join(each["delta"]["text"] for each in deltas) == ours.text
    assert last["finish"]["reason"] == "FINISH_REASON_LENGTH"
