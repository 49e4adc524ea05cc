"""Clients in other languages and by reflection, and the examples, against a running server."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import grpc
import pytest

from protos import inference_pb2 as pb
from tests.e2e.cluster import ROOT, Cluster
from tests.e2e.programs import CTRL_C, Ended, Terminal, run

PYTHON_EXAMPLE = (sys.executable, str(ROOT / "examples" / "python" / "stream.py"))
BUF = str(Path(sys.executable).with_name("buf"))
SERVICE = "pagewire.v1.InferenceService"
NOBODY = "127.0.0.1:1"  # no process listens on port 1
BEGINNING = "9:;<="  # of the fake model's answer to a chat that says "hi"


@pytest.fixture(scope="session")
def node_modules() -> Path:
    """What the Node example depends on: installed once for each lock file on this machine, found again offline."""
    for program in ("node", "npm"):
        if shutil.which(program) is None:
            pytest.skip(f"{program} is not installed: the Node example is NOT tested")
    example = ROOT / "examples" / "node"
    lock = (example / "package-lock.json").read_bytes()
    caches = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "pagewire-tests"
    installed = caches / f"node-{hashlib.sha256(lock).hexdigest()[:16]}"
    if not installed.exists():
        caches.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=caches) as workspace:
            making = Path(workspace, "making")
            making.mkdir()
            for name in ("package.json", "package-lock.json"):
                shutil.copy(example / name, making)
            subprocess.run(["npm", "ci", "--ignore-scripts", "--no-audit", "--no-fund"], cwd=making, check=True)
            try:
                making.rename(installed)
            except OSError:  # another run of the tests was first
                assert installed.exists()
    return installed / "node_modules"


@pytest.fixture
def node_example(node_modules: Path, tmp_path: Path) -> tuple[str, str]:
    """The command that runs the Node example: a copy, so that nothing is installed in the repository."""
    copy = tmp_path / "checkout"
    shutil.copytree(
        ROOT / "examples" / "node", copy / "examples" / "node", ignore=shutil.ignore_patterns("node_modules")
    )
    (copy / "protos").mkdir()
    shutil.copy(ROOT / "protos" / "inference.proto", copy / "protos")
    (copy / "examples" / "node" / "node_modules").symlink_to(node_modules)
    return "node", str(copy / "examples" / "node" / "stream.mjs")


@pytest.fixture(params=["Node", "Python"])
def example(request: pytest.FixtureRequest) -> tuple[str, str]:
    """The command that runs an example; it takes an address and a prompt."""
    if request.param == "Python":
        return PYTHON_EXAMPLE
    command: tuple[str, str] = request.getfixturevalue("node_example")
    return command


def answer(running: Cluster, prompt: str, max_tokens: int) -> str:
    """The text that the fake model answers to this chat."""
    chat = pb.ChatMessages(messages=[pb.ChatMessage(role="user", content=prompt)])
    stopping = pb.StopConditions(max_tokens=max_tokens)
    return running.stub.Generate(pb.GenerateRequest(chat=chat, stopping=stopping)).choices[0].text


def test_an_example_prints_the_whole_answer_why_it_ended_and_what_it_cost(
    shared: Cluster, example: tuple[str, str]
) -> None:
    ended = run(*example, shared.address, "hi")

    cost = "[FINISH_REASON_LENGTH: 24 + 256 tokens]"
    assert ended == Ended(code=0, out=f"{answer(shared, 'hi', 256)}\n{cost}\n", err="")


def test_ctrl_c_in_an_example_cancels_the_call_on_the_server(slow: Cluster, example: tuple[str, str]) -> None:
    with Terminal(*example, slow.address, "hi") as terminal:
        terminal.read_until(BEGINNING)
        terminal.type(CTRL_C)
        ended = terminal.end()

    assert ended.code == 130
    assert "cancelled" in ended.out.lower()
    assert slow.counters()["finished"] == {str(pb.FINISH_REASON_ABORTED): 1}


def test_a_refusal_reaches_an_example_with_its_code_and_the_field(shared: Cluster, example: tuple[str, str]) -> None:
    ended = run(*example, shared.address, "a" * 600)

    problem = "INVALID_ARGUMENT: chat: 622 tokens leave no room in the context of 512"
    assert (ended.code, ended.out, ended.err.strip()) == (1, "", problem)


def test_an_example_says_so_when_no_server_is_there(example: tuple[str, str]) -> None:
    ended = run(*example, NOBODY, "hi")

    assert ended.code == 1
    assert ended.err.strip().startswith("UNAVAILABLE: ")
    assert "Traceback" not in ended.err and "    at " not in ended.err


def buf_curl(address: str, path: str = "", *flags: str) -> Ended:
    """`buf curl` without a schema: what it knows, it knows by reflection."""
    return run(BUF, "curl", "--protocol", "grpc", *flags, f"http://{address}/{path}")


def messages(text: str) -> list[dict[str, Any]]:
    """The JSON documents that stand in `text` one after another."""
    found: list[dict[str, Any]] = []
    while text := text.lstrip():
        message, end = json.JSONDecoder().raw_decode(text)
        found.append(message)
        text = text[end:]
    return found


def test_reflection_names_the_services_that_clients_may_call(shared: Cluster) -> None:
    ended = buf_curl(shared.address, "", "--list-services")

    assert ended.code == 0, ended.err
    assert ended.out.split() == [
        "grpc.health.v1.Health",
        "grpc.reflection.v1alpha.ServerReflection",
        SERVICE,
    ]


def test_a_unary_method_is_called_by_reflection(shared: Cluster) -> None:
    ended = buf_curl(shared.address, f"{SERVICE}/GetModel")

    assert ended.code == 0, ended.err
    (model,) = messages(ended.out)
    assert (model["model"], model["vocabSize"], model["chat"]) == ("fake", 320, True)


def test_a_stream_is_read_by_reflection(shared: Cluster) -> None:
    asked = {"text": "hello", "sampling": {"temperature": 0}, "stopping": {"maxTokens": 4}}
    ended = buf_curl(shared.address, f"{SERVICE}/GenerateStream", "--data", json.dumps(asked))

    assert ended.code == 0, ended.err
    first, *deltas, last = messages(ended.out)
    assert first["prompt"]["promptTokens"] == 5
    assert [token for m in deltas for token in m["delta"]["tokenIds"]] == [5, 6, 7, 8]
    assert last["finish"]["reason"] == "FINISH_REASON_LENGTH"


def test_buf_shows_the_refusal_and_its_details(shared: Cluster) -> None:
    asked = {"text": "hello", "sampling": {"temperature": -1}}
    ended = buf_curl(shared.address, f"{SERVICE}/GenerateStream", "--data", json.dumps(asked))

    assert ended.code == grpc.StatusCode.INVALID_ARGUMENT.value[0] << 3  # buf shifts the code by three bits
    refusal = json.loads(ended.err)
    assert refusal["code"] == "invalid_argument"
    assert refusal["message"] == "temperature: must be in [0, 100], got -1.0"
    assert [detail["type"] for detail in refusal["details"]] == ["google.rpc.ErrorInfo", "google.rpc.BadRequest"]
