"""Clients in other languages and by reflection, and the examples, against a running server."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest

from protos import inference_pb2 as pb
from tests.e2e import buf, examples
from tests.e2e.cluster import Cluster, cluster
from tests.e2e.programs import CTRL_C, Ended, Terminal, run

SERVICE = "pagewire.v1.InferenceService"
NOBODY = "127.0.0.1:1"  # no process listens on port 1
BEGINNING = "9:;<="  # of the fake model's answer to a chat that says "hi"


@pytest.fixture(scope="module", params=["Node", "Python", "Go", "C++", "Ruby"])
def example(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> examples.Command:
    """The command that runs an example; it takes an address and a prompt."""
    folder = tmp_path_factory.mktemp("example")
    match request.param:
        case "Node":
            return examples.node(folder)
        case "Go":
            return examples.go(folder)
        case "C++":
            return examples.cpp(folder)
        case "Ruby":
            return examples.ruby(folder)
    return examples.python()


@pytest.fixture(scope="module")
def full(fake_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """A scheduler without executors, in whose line one sequence may wait, and does."""
    flags = ["--max-waiting=1", "--executor-wait-s=3000"]
    with cluster(fake_folder, tmp_path_factory.mktemp("full"), executors=0, flags=flags) as running:
        waiting = running.stub.GenerateStream(pb.GenerateStreamRequest(text="x"))
        assert next(waiting).HasField("prompt")
        yield running
        waiting.cancel()


def answer(running: Cluster, prompt: str, max_tokens: int) -> str:
    """The text that the fake model answers to this chat."""
    chat = pb.ChatMessages(messages=[pb.ChatMessage(role="user", content=prompt)])
    stopping = pb.StopConditions(max_tokens=max_tokens)
    return running.stub.Generate(pb.GenerateRequest(chat=chat, stopping=stopping)).choices[0].text


def test_an_example_prints_the_whole_answer_why_it_ended_and_what_it_cost(
    shared: Cluster, example: examples.Command
) -> None:
    ended = run(*example, shared.address, "hi")

    cost = "[FINISH_REASON_LENGTH: 24 + 256 tokens]"
    assert ended == Ended(code=0, out=f"{answer(shared, 'hi', 256)}\n{cost}\n", err="")


def test_ctrl_c_in_an_example_cancels_the_call_on_the_server(slow: Cluster, example: examples.Command) -> None:
    with Terminal(*example, slow.address, "hi") as terminal:
        terminal.read_until(BEGINNING)
        terminal.type(CTRL_C)
        ended = terminal.end()

    assert ended.code == 130
    assert "cancelled" in ended.out.lower()
    assert slow.counters()["finished"] == {str(pb.FINISH_REASON_ABORTED): 1}


def test_a_refusal_reaches_an_example_with_its_code_and_the_field(shared: Cluster, example: examples.Command) -> None:
    ended = run(*example, shared.address, "a" * 600)

    problem = "INVALID_ARGUMENT: chat: 622 tokens leave no room in the context of 512\n  in chat"
    assert (ended.code, ended.out, ended.err.strip()) == (1, "", problem)


def test_an_example_says_when_to_come_back_where_there_is_no_room(full: Cluster, example: examples.Command) -> None:
    ended = run(*example, full.address, "hi")

    assert ended.code == 1
    problem = "RESOURCE_EXHAUSTED: waiting_sequences: there is no room for 1 more; 1 may wait in all (--max-waiting)"
    assert re.fullmatch(rf"{re.escape(problem)}\n  try again in \d+ ms", ended.err.strip()), ended.err


def test_an_example_says_so_when_no_server_is_there(example: examples.Command) -> None:
    ended = run(*example, NOBODY, "hi")

    assert ended.code == 1
    assert ended.err.strip().startswith("UNAVAILABLE: ")
    assert "Traceback" not in ended.err and "    at " not in ended.err


def test_reflection_names_the_services_that_clients_may_call(shared: Cluster) -> None:
    ended = buf.curl(shared.address, "", "--list-services")

    assert ended.code == 0, ended.err
    assert ended.out.split() == [
        "grpc.health.v1.Health",
        "grpc.reflection.v1alpha.ServerReflection",
        SERVICE,
    ]


def test_a_unary_method_is_called_by_reflection(shared: Cluster) -> None:
    ended = buf.curl(shared.address, f"{SERVICE}/GetModel")

    assert ended.code == 0, ended.err
    (model,) = buf.messages(ended.out)
    assert (model["model"], model["vocabSize"], model["chat"]) == ("fake", 320, True)


def test_a_whole_answer_is_asked_for_by_reflection(shared: Cluster) -> None:
    asked = {"text": "hello", "sampling": {"temperature": 0}, "stopping": {"maxTokens": 4}}
    ended = buf.curl(shared.address, f"{SERVICE}/Generate", "--data", json.dumps(asked))

    assert ended.code == 0, ended.err
    (answered,) = buf.messages(ended.out)
    (choice,) = answered["choices"]
    assert (choice["tokenIds"], choice["text"], choice["reason"]) == ([5, 6, 7, 8], "&'()", "FINISH_REASON_LENGTH")


def test_a_stream_is_read_by_reflection(shared: Cluster) -> None:
    asked = {"text": "hello", "sampling": {"temperature": 0}, "stopping": {"maxTokens": 4}}
    ended = buf.curl(shared.address, f"{SERVICE}/GenerateStream", "--data", json.dumps(asked))

    assert ended.code == 0, ended.err
    first, *deltas, last = buf.messages(ended.out)
    assert first["prompt"]["promptTokens"] == 5
    assert [token for m in deltas for token in m["delta"]["tokenIds"]] == [5, 6, 7, 8]
    assert last["finish"]["reason"] == "FINISH_REASON_LENGTH"


def test_buf_shows_the_refusal_and_its_details(shared: Cluster) -> None:
    asked = {"text": "hello", "sampling": {"temperature": -1}}
    ended = buf.curl(shared.address, f"{SERVICE}/GenerateStream", "--data", json.dumps(asked))

    assert ended.code == grpc.StatusCode.INVALID_ARGUMENT.value[0] << 3  # buf shifts the code by three bits
    refusal = json.loads(ended.err)
    assert refusal["code"] == "invalid_argument"
    assert refusal["message"] == "temperature: must be in [0, 100], got -1.0"
    assert [detail["type"] for detail in refusal["details"]] == ["google.rpc.ErrorInfo", "google.rpc.BadRequest"]
