"""`serve`: everything under one parent, kept alive and ended together."""

from __future__ import annotations

import contextlib
import os
import re
import select
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from openai import OpenAI

from protos import inference_pb2 as pb
from protos import inference_pb2_grpc
from tests.e2e.cluster import END_TIMEOUT_S, ROOT
from tests.e2e.sockets import listening, port_that_stays


class Served:
    """A `serve` with two fake executors that prints its address."""

    def __init__(self, model: Path, log: Path, *more: str) -> None:
        self._log = log.open("wb")
        listen = f"--listen=127.0.0.1:{port_that_stays()}"
        flags = [f"--model={model}", listen, "--executors=2", "--fake", "--fake-step-s=0.01", *more]
        self.popen = subprocess.Popen(
            [sys.executable, "-m", "services", "serve", *flags],
            cwd=ROOT,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=self._log,
        )
        assert self.popen.stdout is not None
        first = self.popen.stdout.readline().decode()
        match = re.match(r"Serving on (\S+)\. Try:", first)
        assert match, f"{first!r}\n{log.read_text()}"
        self.address = match[1]
        self.dial()

    def dial(self) -> None:
        """Connect, anew where a connection was: a call on one whose end is not seen yet would fail."""
        # a pool of its own: gRPC would share the old connection, whose end it may not have seen yet
        self.channel = grpc.insecure_channel(self.address, options=[("grpc.use_local_subchannel_pool", 1)])
        self.stub = inference_pb2_grpc.InferenceServiceStub(self.channel)

    def kill(self, name: str) -> None:
        """Kill a child; return when it is gone."""
        gone = os.pidfd_open(self.children()[name])
        signal.pidfd_send_signal(gone, signal.SIGKILL)
        assert select.select([gone], [], [], END_TIMEOUT_S)[0], "still there"
        os.close(gone)

    def children(self) -> dict[str, int]:
        """Name (scheduler, executor-0, …) → pid of the processes that run now."""
        found: dict[str, int] = {}
        for entry in Path("/proc").iterdir():
            if not entry.name.isdigit():
                continue
            with contextlib.suppress(OSError):
                if f"\nPPid:\t{self.popen.pid}\n" in (entry / "status").read_text():
                    words = (entry / "cmdline").read_bytes().decode().split("\0")
                    name = next((w.removeprefix("--name=") for w in words if w.startswith("--name=")), words[3])
                    found[name] = int(entry.name)
        return found

    def tokens(self, length: int, max_tokens: int) -> list[int]:
        request = pb.GenerateRequest(
            token_ids=pb.TokenIds(ids=[1] * length),
            sampling=pb.SamplingParams(temperature=0),
            stopping=pb.StopConditions(max_tokens=max_tokens),
        )
        return list(self.stub.Generate(request, wait_for_ready=True, timeout=120).choices[0].token_ids)

    def close(self) -> None:
        self.channel.close()
        if self.popen.poll() is None:
            self.popen.terminate()
        self.popen.wait(END_TIMEOUT_S)
        assert self.popen.stdout is not None
        self.popen.stdout.close()
        self._log.close()


@pytest.fixture
def served(fake_folder: Path, tmp_path: Path) -> Iterator[Served]:
    running = Served(fake_folder, tmp_path / "serve.log")
    try:
        yield running
    finally:
        running.close()


def test_a_process_that_is_killed_is_started_again_where_it_was(served: Served) -> None:
    before = served.children()
    assert set(before) == {"scheduler", "executor-0", "executor-1"}
    for name in ("executor-0", "scheduler", "executor-1"):
        served.kill(name)
        if name == "scheduler":
            served.channel.close()
            served.dial()
        assert served.tokens(5, 20) == list(range(5, 25)), f"after {name} was killed"
    while set(served.children()) != set(before):
        served.tokens(5, 2)
    assert not set(served.children().values()) & set(before.values())


def test_sigterm_ends_every_process_and_exits_with_zero(served: Served) -> None:
    children = served.children()
    assert served.tokens(3, 2) == [3, 4]
    served.popen.terminate()

    assert served.popen.wait(END_TIMEOUT_S) == 0
    assert not any(Path(f"/proc/{pid}").exists() for pid in children.values())


def begun(served: Served, max_tokens: int) -> Iterator[pb.GenerateStreamResponse]:
    """A stream that has its first token."""
    request = pb.GenerateStreamRequest(
        token_ids=pb.TokenIds(ids=[1, 2, 3]),
        sampling=pb.SamplingParams(temperature=0),
        stopping=pb.StopConditions(max_tokens=max_tokens, ignore_eos=True),
    )
    stream = iter(served.stub.GenerateStream(request, timeout=120))
    next(stream)
    assert next(stream).delta.token_ids
    return stream


@pytest.mark.parametrize("everybody", [False, True], ids=["serve alone", "every process, as an init system does"])
def test_a_signal_lets_the_answers_that_run_finish(served: Served, *, everybody: bool) -> None:
    children = served.children()
    stream = begun(served, 60)
    if everybody:
        for pid in children.values():
            os.kill(pid, signal.SIGTERM)
    served.popen.terminate()
    *_, last = stream

    assert last.finish.usage.completion_tokens == 60
    assert served.popen.wait(END_TIMEOUT_S) == 0
    assert not any(Path(f"/proc/{pid}").exists() for pid in children.values())


def test_by_default_only_this_machine_can_reach_any_of_it(served: Served) -> None:
    found = {name: listening(pid) for name, pid in {"serve": served.popen.pid, **served.children()}.items()}

    assert found.pop("scheduler") == {served.address} and served.address.startswith("127.0.0.1:")
    assert not any(found.values())


def test_no_process_outlives_a_parent_that_is_killed(served: Served) -> None:
    children = [os.pidfd_open(pid) for pid in served.children().values()]
    served.popen.kill()
    for child in children:
        poll = select.poll()
        poll.register(child)
        assert poll.poll(1000 * END_TIMEOUT_S), "still there"
        os.close(child)


def test_a_signal_before_everything_is_up_ends_it_all_the_same(fake_folder: Path) -> None:
    flags = [f"--model={fake_folder}", "--listen=127.0.0.1:0", "--fake"]
    with subprocess.Popen(
        [sys.executable, "-m", "services", "serve", *flags],
        cwd=ROOT,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    ) as starting:
        assert starting.stderr is not None
        assert b"starting scheduler" in starting.stderr.readline()
        starting.terminate()
        starting.communicate(timeout=END_TIMEOUT_S)
        assert starting.returncode == 0


def test_a_gateway_stands_beside_the_rest_and_is_started_again_where_it_was(fake_folder: Path, tmp_path: Path) -> None:
    served = Served(fake_folder, tmp_path / "serve.log", f"--http=127.0.0.1:{port_that_stays()}")
    try:
        assert served.popen.stdout is not None
        line = ""
        while not line.startswith("For OpenAI's clients: "):
            line = served.popen.stdout.readline().decode()
        with OpenAI(base_url=line.rpartition("base_url=")[2].strip(), api_key="any", max_retries=8) as client:
            asked: dict[str, Any] = {"model": "", "prompt": [1] * 40, "max_tokens": 4, "temperature": 0}
            told = client.completions.create(**asked)
            served.kill("gateway")
            again = client.completions.create(**asked)
        assert told.choices[0].text == again.choices[0].text == "IJKL"
        assert set(served.children()) == {"scheduler", "gateway", "executor-0", "executor-1"}
    finally:
        served.close()
    assert served.popen.returncode == 0
