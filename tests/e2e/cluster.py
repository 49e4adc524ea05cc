"""Real processes for tests: a scheduler and executors on free ports, their logs at hand, killed at will."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import grpc

from protos import inference_pb2 as pb
from protos import inference_pb2_grpc, monitoring_pb2, monitoring_pb2_grpc

ROOT = Path(__file__).resolve().parents[2]
START_TIMEOUT_S = 300.0
END_TIMEOUT_S = 120.0
EXECUTOR_WAIT_S = 120.0

_T = TypeVar("_T")


class Process:
    """One `python -m services …`, or another module that is one, ready once it has announced itself."""

    def __init__(
        self,
        arguments: Sequence[str],
        log: Path,
        environment: Mapping[str, str] | None = None,
        *,
        module: str = "services",
        prefix: Sequence[str] = (),
        root: Path = ROOT,
    ) -> None:
        """`prefix` is a command that runs the one behind it: `ip netns exec NAME`. `root` is a checkout."""
        read_fd, write_fd = os.pipe()
        self.log = log
        with log.open("ab") as stderr:
            self.popen = subprocess.Popen(
                [
                    *prefix,
                    sys.executable,
                    "-m",
                    module,
                    *arguments,
                    f"--ready-fd={write_fd}",
                    f"--die-with-parent={os.getpid()}",
                ],
                cwd=root,
                pass_fds=(write_fd,),
                stdin=subprocess.DEVNULL,
                stdout=stderr,
                stderr=stderr,
                # threads that wait sleep: where there is other work, spinning ones would keep it from its core
                env={**os.environ, "OMP_WAIT_POLICY": "passive", **(environment or {})},
            )
        os.close(write_fd)
        self._ready = os.fdopen(read_fd, "rb", buffering=0)
        self._announced = b""

    def wait_ready(self) -> str:
        """The announcement. Fails with the log when the process ends first."""
        line = b""
        with self._ready:
            while not line.endswith(b"\n"):
                readable, _, _ = select.select([self._ready], [], [], START_TIMEOUT_S)
                chunk = self._ready.read(4096) if readable else b""
                if not chunk:
                    if not readable:
                        self.popen.kill()
                    raise AssertionError(f"not ready, exit code {self.wait()}:\n{self.log.read_text()}")
                line += chunk
        return line.decode().strip()

    def look(self) -> str:
        """The announcement, or nothing as long as it has not come; never waits. Fails when the process ended first."""
        while not self._announced.endswith(b"\n") and select.select([self._ready], [], [], 0)[0]:
            chunk = self._ready.read(4096)
            if not chunk:
                raise AssertionError(f"not ready, exit code {self.wait()}:\n{self.log.read_text()}")
            self._announced += chunk
        return self._announced.decode().strip() if self._announced.endswith(b"\n") else ""

    def wait(self, timeout_s: float = END_TIMEOUT_S) -> int:
        """The exit code."""
        return self.popen.wait(timeout_s)

    def signal(self, number: signal.Signals) -> None:
        """Send a signal."""
        self.popen.send_signal(number)

    def close(self) -> None:
        """Kill it if it still runs."""
        with contextlib.suppress(OSError):
            self._ready.close()
        if self.popen.poll() is None:
            self.popen.kill()
        self.popen.wait()


class Cluster:
    """A scheduler, its executors, and a client of the public API."""

    def __init__(
        self,
        model: Path,
        folder: Path,
        *,
        flags: Sequence[str] = (),
        environment: Mapping[str, str] | None = None,
        module: str = "services",
    ) -> None:
        self._module = module
        self.model = model
        self.folder = folder
        self.executors: list[Process] = []
        self.link = f"unix:{folder}/link"
        self.admin = f"unix:{folder}/admin"
        self.scheduler = Process(
            [
                *("scheduler", "--model", str(model), "--listen", "127.0.0.1:0", "--link-listen", self.link),
                *("--admin-listen", self.admin),
                f"--executor-wait-s={EXECUTOR_WAIT_S}",  # requests wait for executors that a test starts
                *("--ticket-keys", str(folder / "ticket-keys"), *flags),
            ],
            folder / "scheduler.log",
            environment,
            module=module,
        )
        announced: Mapping[str, str] = json.loads(self.scheduler.wait_ready())
        self.announced = announced
        self.address = announced["listen"]
        self.link, self.admin = announced["link"], announced["admin"]  # flags may have changed them
        self.health = announced.get("health") or self.address
        self.channel = grpc.insecure_channel(self.address)
        self.stub = inference_pb2_grpc.InferenceServiceStub(self.channel)

    def start_executor(
        self,
        *flags: str,
        fake: bool = True,
        environment: Mapping[str, str] | None = None,
        prefix: Sequence[str] = (),
    ) -> Process:
        """Another executor, joined."""
        number = len(self.executors)
        process = Process(
            [
                *("executor", "--model", str(self.model), "--scheduler", self.link, "--name", f"executor-{number}"),
                *(("--fake",) if fake else ()),
                *flags,
            ],
            self.folder / f"executor-{number}.log",
            environment,
            module=self._module,
            prefix=prefix,
        )
        self.executors.append(process)
        process.wait_ready()
        return process

    def crowded(self, num: int, ask: Callable[[], _T], *executor: str) -> _T:
        """What `ask` returns, which asks for `num` answers at once. An executor begins when all wait: side by side."""
        with grpc.insecure_channel(self.admin) as channel, ThreadPoolExecutor(1) as pool:
            stub = monitoring_pb2_grpc.MonitoringServiceStub(channel)
            asking = pool.submit(ask)
            until_s = time.monotonic() + END_TIMEOUT_S
            try:
                while stub.GetStatus(monitoring_pb2.GetStatusRequest()).scheduler.num_waiting < num:
                    assert not asking.done(), asking.result()
                    assert time.monotonic() < until_s, f"fewer than {num} wait"
                    time.sleep(0.01)
                self.start_executor("--dtype=float32", "--threads=1", *executor, fake=False)
            except BaseException:
                self.close()  # or whoever asks would wait for it
                raise
            return asking.result()

    def tokens(self, prompt: Sequence[int], max_tokens: int, **sampling: float) -> list[int]:
        """The token ids of one answer; greedy unless told."""
        request = pb.GenerateRequest(
            token_ids=pb.TokenIds(ids=prompt),
            sampling=pb.SamplingParams(**{"temperature": 0.0, **sampling}),  # type: ignore[arg-type]
            stopping=pb.StopConditions(max_tokens=max_tokens, ignore_eos=True),
        )
        return list(self.stub.Generate(request).choices[0].token_ids)

    def counters(self) -> Mapping[str, Any]:
        """What the scheduler counted: it logs that as it stops, here with --log-format=json. Stops it."""
        self.scheduler.signal(signal.SIGTERM)
        assert self.scheduler.wait() == 0
        lines = [json.loads(line) for line in self.scheduler.log.read_text().splitlines()]
        (counted,) = [line for line in lines if line["message"].startswith("stopped")]
        return dict(counted)

    def close(self) -> None:
        """End everything."""
        self.channel.close()
        for process in (self.scheduler, *self.executors):
            process.close()


def until_error(
    messages: Iterable[pb.GenerateStreamResponse],
) -> tuple[list[pb.GenerateStreamResponse], grpc.RpcError]:
    """What a stream still says, and how it ends badly, which it must."""
    heard: list[pb.GenerateStreamResponse] = []
    try:
        for message in messages:
            heard.append(message)  # noqa: PERF402  what came before an error is wanted, too
    except grpc.RpcError as error:
        return heard, error
    raise AssertionError("it ended well")


def until_logged(log: Path, words: str, process: Process) -> None:
    """Return once a process that runs has logged these words."""
    until_s = time.monotonic() + START_TIMEOUT_S
    while words not in log.read_text():
        assert process.popen.poll() is None and time.monotonic() < until_s, log.read_text()
        time.sleep(0.01)


@contextlib.contextmanager
def cluster(model: Path, folder: Path, *, executors: int = 1, flags: Sequence[str] = ()) -> Iterator[Cluster]:
    """A cluster with fake executors."""
    running = Cluster(model, folder, flags=flags)
    try:
        for _ in range(executors):
            running.start_executor()
        yield running
    finally:
        running.close()
