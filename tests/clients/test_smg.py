"""SMG, a gateway for many engines, drives a scheduler as it drives vLLM; OpenAI's and Anthropic's clients ask it."""

from __future__ import annotations

import importlib
import json
import os
import re
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import grpc
import openai
import pytest

from protos import inference_pb2 as pb
from protos import monitoring_pb2, monitoring_pb2_grpc
from tests.clients.needed import needs
from tests.e2e.cluster import Cluster
from tests.e2e.sockets import port_that_stays

needs("smg", "anthropic")

START_TIMEOUT_S = 120.0
COLOURS: Any = [{"role": "user", "content": "Name three colours."}]
WEATHER: Any = {
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


class Smg(NamedTuple):
    """A gateway that runs, and the scheduler behind it."""

    url: str
    metrics: str
    scheduler: Cluster
    model: str
    client: openai.OpenAI
    log: Path

    def status(self) -> monitoring_pb2.GetStatusResponse:
        with grpc.insecure_channel(self.scheduler.admin) as channel:
            return monitoring_pb2_grpc.MonitoringServiceStub(channel).GetStatus(monitoring_pb2.GetStatusRequest())


def until(condition: Callable[[], object], process: subprocess.Popen[bytes] | None = None) -> None:
    """Look again and again: nothing of a program that is not ours tells when."""
    deadline = time.monotonic() + START_TIMEOUT_S
    while not condition():
        assert time.monotonic() < deadline and (process is None or process.poll() is None)
        time.sleep(0.05)


def get(url: str) -> str:
    """What is there; nothing where nobody listens, or it says no."""
    try:
        with urllib.request.urlopen(url, timeout=60) as response:
            return str(response.read().decode())
    except OSError:
        return ""


def answers(client: openai.OpenAI, model: str) -> bool:
    """Whether SMG has the tokenizer by now, which it asks the scheduler for after it has told of the model."""
    try:
        client.chat.completions.create(model=model, messages=COLOURS, max_completion_tokens=1)
    except openai.InternalServerError as error:  # 503: retry shortly
        if error.status_code != 503:
            raise
        return False
    return True


@pytest.fixture(scope="module")
def smg(default_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Smg]:
    folder = tmp_path_factory.mktemp("smg")
    scheduler = Cluster(default_model, folder, flags=["--vllm-api"])
    port, metrics, log = port_that_stays(), port_that_stays(), folder / "smg.log"
    process: subprocess.Popen[bytes] | None = None
    try:
        scheduler.start_executor("--dtype=float32", fake=False)
        with log.open("wb") as said:
            process = subprocess.Popen(
                [
                    *(str(Path(sys.executable).with_name("smg")), "launch", "--host=127.0.0.1", f"--port={port}"),
                    *("--worker-urls", f"grpc://{scheduler.address}", "--model-path", str(default_model)),
                    *("--policy=cache_aware", f"--prometheus-port={metrics}", "--prometheus-host=127.0.0.1"),
                ],
                stdin=subprocess.DEVNULL,
                stdout=said,
                stderr=said,
                env={**os.environ, "HF_HUB_OFFLINE": "1"},
            )
        url = f"http://127.0.0.1:{port}"
        until(lambda: '"id"' in get(f"{url}/v1/models"), process)
        model = json.loads(get(f"{url}/v1/models"))["data"][0]["id"]
        with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=60) as client:
            until(lambda: answers(client, model), process)
            yield Smg(url, f"http://127.0.0.1:{metrics}/metrics", scheduler, model, client, log)
    finally:
        if process is not None:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        scheduler.close()


def ours(smg: Smg, prompt: str, max_tokens: int) -> str:
    """What Pagewire itself says to the chat, greedily."""
    request = pb.GenerateRequest(
        chat=pb.ChatMessages(messages=[pb.ChatMessage(role="user", content=prompt)]),
        sampling=pb.SamplingParams(temperature=0.0),
        stopping=pb.StopConditions(max_tokens=max_tokens),
    )
    return smg.scheduler.stub.Generate(request).choices[0].text


# ---- OpenAI's client


def test_the_model_has_the_name_that_the_scheduler_serves_it_by(smg: Smg, default_model: Path) -> None:
    assert smg.model == default_model.name


def test_a_chat_says_what_pagewire_says(smg: Smg) -> None:
    answer = smg.client.chat.completions.create(
        model=smg.model, messages=COLOURS, max_completion_tokens=16, temperature=0
    )

    assert answer.choices[0].message.content == ours(smg, "Name three colours.", 16)
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage is not None and answer.usage.completion_tokens == 16


def test_a_stream_adds_up_to_the_same_and_tells_its_usage(smg: Smg) -> None:
    chunks = list(
        smg.client.chat.completions.create(
            model=smg.model,
            messages=COLOURS,
            max_completion_tokens=16,
            temperature=0,
            stream=True,
            stream_options={"include_usage": True},
        )
    )

    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == ours(smg, "Name three colours.", 16)
    assert len(chunks) > 8
    assert chunks[-1].usage is not None and chunks[-1].usage.completion_tokens == 16


def test_choices_differ_and_tell_how_likely_their_tokens_were(smg: Smg) -> None:
    answer = smg.client.chat.completions.create(
        model=smg.model, messages=COLOURS, max_completion_tokens=12, n=2, seed=3, logprobs=True, top_logprobs=2
    )

    assert [choice.index for choice in answer.choices] == [0, 1]
    assert answer.choices[0].message.content != answer.choices[1].message.content
    for choice in answer.choices:
        assert choice.logprobs is not None and choice.logprobs.content is not None
        assert len(choice.logprobs.content) == 12
        assert all(token.logprob <= 0 and len(token.top_logprobs) == 2 for token in choice.logprobs.content)


def test_a_completion_goes_on_with_its_prompt_and_stops_where_it_was_told_to(smg: Smg) -> None:
    def complete(**asked: Any) -> Any:
        return smg.client.completions.create(model=smg.model, prompt="The sea is", temperature=0, **asked)

    text = complete(max_tokens=12).choices[0].text
    request = pb.GenerateRequest(
        text="The sea is", sampling=pb.SamplingParams(temperature=0.0), stopping=pb.StopConditions(max_tokens=12)
    )
    assert text == smg.scheduler.stub.Generate(request).choices[0].text
    word = text.split()[2]
    stopped = complete(max_tokens=12, stop=[word])
    assert stopped.choices[0].finish_reason == "stop"
    assert stopped.choices[0].text == text[: text.index(word)]


def test_an_answer_keeps_to_a_schema(smg: Smg) -> None:
    schema = {
        "type": "object",
        "properties": {"colour": {"enum": ["red", "green"]}},
        "required": ["colour"],
        "additionalProperties": False,
    }
    answer = smg.client.chat.completions.create(
        model=smg.model,
        messages=COLOURS,
        max_completion_tokens=64,
        response_format={"type": "json_schema", "json_schema": {"name": "colour", "schema": schema}},
    )

    assert json.loads(answer.choices[0].message.content or "")["colour"] in {"red", "green"}


def test_a_tool_that_must_be_called_is(smg: Smg) -> None:
    answer = smg.client.chat.completions.create(
        model=smg.model,
        messages=[{"role": "user", "content": "How is the weather in Oslo?"}],
        tools=[WEATHER],
        tool_choice="required",
        max_completion_tokens=200,
        temperature=0,
    )

    calls: Any = answer.choices[0].message.tool_calls
    assert calls[0].function.name == "weather"
    assert set(json.loads(calls[0].function.arguments)) == {"city"}


def test_what_cannot_be_served_is_an_error_of_the_caller_s(smg: Smg) -> None:
    asking = smg.client.chat.completions
    with pytest.raises(openai.BadRequestError):  # a penalty that the scheduler refuses
        asking.create(model=smg.model, messages=COLOURS, extra_body={"repetition_penalty": 1000.0})
    with pytest.raises(openai.BadRequestError):  # longer than the context
        asking.create(model=smg.model, messages=[{"role": "user", "content": "word " * 20_000}])


def test_who_leaves_ends_the_request(smg: Smg) -> None:
    stream = smg.client.chat.completions.create(
        model=smg.model,
        messages=[{"role": "user", "content": "Count to a thousand."}],
        max_completion_tokens=4000,
        stream=True,
        extra_body={"ignore_eos": True},
    )
    next(iter(stream))
    until(lambda: smg.status().scheduler.num_running == 1)  # what others asked for may still be left
    stream.close()
    until(lambda: not smg.status().scheduler.num_running)


# ---- Anthropic's client


def test_anthropic_s_messages_and_their_stream_say_the_same(smg: Smg) -> None:
    anthropic: Any = importlib.import_module("anthropic")
    asked: Any = {
        "model": smg.model,
        "max_tokens": 16,
        "messages": COLOURS,
        "extra_body": {"temperature": 0},
    }
    with anthropic.Anthropic(base_url=smg.url, api_key="none", max_retries=0, timeout=60) as client:
        message: Any = client.messages.create(**asked)
        with client.messages.stream(**asked) as stream:
            streamed = "".join(stream.text_stream)

    assert message.content[0].text == streamed == ours(smg, "Name three colours.", 16)
    assert (message.stop_reason, message.usage.output_tokens) == ("max_tokens", 16)


# ---- what it routes by


def test_it_knows_the_blocks_that_are_cached(smg: Smg) -> None:
    prompt = "The quick brown fox jumps over the lazy dog. " * 8
    smg.client.completions.create(model=smg.model, prompt=prompt, max_tokens=1)

    def blocks() -> int:
        found = re.findall(r"^smg_kv_index_blocks(?:\{.*\})? (\d+)", get(smg.metrics), re.MULTILINE)
        return max(map(int, found), default=0)

    until(lambda: blocks() >= 4)


def test_a_stream_outlives_the_executor_that_computed_it(smg: Smg) -> None:
    smg.scheduler.start_executor("--dtype=float32", fake=False)
    stream = smg.client.chat.completions.create(
        model=smg.model, messages=COLOURS, max_completion_tokens=160, temperature=0, stream=True
    )
    chunks = iter(stream)
    text = next(chunks).choices[0].delta.content or ""
    (name,) = [executor.name for executor in smg.status().executors if executor.num_running]
    smg.scheduler.executors[int(name.removeprefix("executor-"))].popen.kill()
    text += "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)

    assert text == ours(smg, "Name three colours.", 160)
    assert len(smg.status().executors) == 1
