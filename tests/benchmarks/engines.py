"""The servers that can be compared, read from engines.toml, and one of them running."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
import socket
import string
import subprocess
import time
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Literal, Self

from tests.benchmarks import machine
from tests.benchmarks.openai_client import OpenAIClient
from tests.benchmarks.pagewire_client import PagewireClient
from tests.benchmarks.playing import Client
from tests.e2e.sockets import port_that_stays

ROOT: Final = Path(__file__).resolve().parents[2]
TABLE: Final = Path(__file__).with_name("engines.toml")

_LOOK_AGAIN_S: Final = 0.02
_STOP_S: Final = 40.0


class EngineMissing(Exception):
    """The server cannot run here; the text says what is missing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Engine:
    """One server with its settings. `${NAME}`s are still to be filled in, so that no result names a folder of ours."""

    name: str
    dialect: Literal["pagewire", "vllm", "llama"]
    precision: str  # those of equal precision are compared
    command: Sequence[str]
    arguments: Sequence[str] = ()
    environment: Mapping[str, str] = field(default_factory=dict[str, str])
    weight_bits: float = 16
    kv_bits: float = 16
    version: Sequence[str] = ()  # a command that prints it
    extra: Mapping[str, Any] = field(default_factory=dict[str, Any])  # added to every request
    note: str = ""


def read(names: Sequence[str], table: Path = TABLE) -> list[Engine]:
    """The engines of these names. Raises EngineMissing for a name that is not in the table."""
    described = tomllib.loads(table.read_text(encoding="utf-8"))
    return [Engine(name=name, **_described(name, described)) for name in names]


def _described(name: str, table: Mapping[str, Any]) -> dict[str, Any]:
    if name not in table:
        raise EngineMissing(f"{name}: not in the table of engines, which has {', '.join(table)}")
    own = dict(table[name])
    if "like" not in own:
        return own
    like = _described(own.pop("like"), table)
    return {
        **like,
        **own,
        "arguments": [*like.get("arguments", ()), *own.get("arguments", ())],
        "environment": {**like.get("environment", {}), **own.get("environment", {})},
    }


class RunningServer:
    """A server in a session of its own, so that everything it starts can be counted and ended."""

    def __init__(self, engine: Engine, places: Mapping[str, str], log: Path) -> None:
        """Start it. `places` fills in the `${NAME}`s. Raises EngineMissing."""
        self.engine = engine
        self.log = log
        self._port = port_that_stays()
        fill = _Filler(engine.name, {**places, "PORT": str(self._port)})
        command = [fill(word) for word in (*engine.command, *engine.arguments)]
        environment = {name: fill(value) for name, value in engine.environment.items()}
        for word in command:
            if word.startswith("/") and not Path(word).exists():
                raise EngineMissing(f"{engine.name}: there is no {word}")
        if shutil.which(command[0]) is None:
            raise EngineMissing(f"{engine.name}: there is no program {command[0]}")
        self._began_s = time.monotonic()
        with log.open("wb") as out:
            self._process = subprocess.Popen(
                command,
                cwd=ROOT,
                env={**os.environ, **environment},
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self.pid = self._process.pid

    @property
    def address(self) -> str:
        """Where it is asked."""
        return f"http://127.0.0.1:{self._port}"

    def client(self) -> Client:
        """A client that speaks its dialect."""
        if self.engine.dialect == "pagewire":
            return PagewireClient(f"127.0.0.1:{self._port}")
        return OpenAIClient(f"http://127.0.0.1:{self._port}", self.engine.dialect, extra=self.engine.extra)

    async def ready(self, timeout_s: float) -> float:
        """Wait until it would answer; seconds since it was started. Raises EngineMissing when it does not."""
        try:
            async with asyncio.timeout(timeout_s):
                while not self._listens():
                    await self._look_again()
                async with self.client() as client:
                    while not await client.is_ready():
                        await self._look_again()
        except TimeoutError:
            raise EngineMissing(
                f"{self.engine.name}: not ready within {timeout_s:g} s; its log ends {self._last_words()}"
            ) from None
        return time.monotonic() - self._began_s

    @property
    def alive(self) -> bool:
        """Whether its first process still runs."""
        return self._process.poll() is None

    async def _look_again(self) -> None:
        if (code := self._process.poll()) is not None:
            raise EngineMissing(f"{self.engine.name}: ended with exit code {code}; its log ends {self._last_words()}")
        await asyncio.sleep(_LOOK_AGAIN_S)

    def _listens(self) -> bool:
        """Tried by hand: a gRPC channel that is refused once waits for a second before it tries again."""
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", self._port)) == 0

    def stop(self) -> None:
        """End it in order; what is left of it after that is killed."""
        with contextlib.ExitStack() as family:
            handles = [family.enter_context(_Handle(pid)) for pid in machine.processes(self.pid)]
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.terminate()
                self._process.wait(_STOP_S)
            for handle in handles:
                handle.kill()
        self._process.wait()

    def _last_words(self) -> str:
        lines = self.log.read_text(errors="replace").split("\n")
        return repr(" ".join(line for line in lines if line.strip())[-400:])


def version_of(engine: Engine, places: Mapping[str, str]) -> str:
    """What the engine says of itself, or nothing."""
    if not engine.version:
        return ""
    fill = _Filler(engine.name, places)
    try:
        told = subprocess.run(
            [fill(word) for word in engine.version], capture_output=True, text=True, timeout=60, check=True
        )
    except (OSError, subprocess.SubprocessError, EngineMissing):
        return ""
    return (told.stdout + told.stderr).strip().split("\n")[0]


class _Handle:
    """A process that can be killed later, whoever has its number then."""

    def __init__(self, pid: int) -> None:
        self._pid = pid

    def __enter__(self) -> Self:
        try:
            self._fd: int | None = os.pidfd_open(self._pid)
        except ProcessLookupError:
            self._fd = None
        return self

    def __exit__(self, *_: object) -> None:
        if self._fd is not None:
            os.close(self._fd)

    def kill(self) -> None:
        """Harmless when it has ended."""
        if self._fd is not None:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._fd, signal.SIGKILL)


class _Filler:
    def __init__(self, engine: str, places: Mapping[str, str]) -> None:
        self._engine = engine
        self._places = {**os.environ, **places}

    def __call__(self, text: str) -> str:
        try:
            return string.Template(text).substitute(self._places)
        except KeyError as error:
            raise EngineMissing(f"{self._engine}: {error.args[0]} is not set") from None
