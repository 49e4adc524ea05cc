"""The kill run for another server: `python -m tests.faults.peer_kill --peer vllm --out FOLDER`.

Eight streams are read over its OpenAI API; one of its processes is killed or stopped; whatever died is started again.
Its client does what the OpenAI client does: a request that could not be begun is tried twice more, a stream that broke
is lost. What a stream must show was asked before, from the same server, one stream at a time, greedily. As a control,
the same eight streams are read together with no fault at all.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import json
import os
import random
import signal
import statistics
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Literal, NamedTuple

import aiohttp

from common.config import DEFAULT_MODEL
from services.model_store import resolve
from services.text import Tokenizer
from tests.benchmarks import engines, machine
from tests.benchmarks.engines import Engine, EngineMissing, RunningServer
from tests.faults.readers import TEXTS

_PEERS: Final = {"vllm": "vllm-bf16"}
_ENGINE: Final = b"EngineCore"  # what vLLM's engine process calls itself
_STREAMS: Final = 8
_MAX_TOKENS: Final = 200
_RETRIES: Final = 2  # the OpenAI client's default, and its delays
_FIRST_DELAY_S: Final = 0.5
_MAX_DELAY_S: Final = 8.0
_FROZEN_S: Final = 10.0
_READY_S: Final = 600.0
_STREAM_S: Final = 300.0  # after so much time a stream has no end
_ENDS_ITSELF_S: Final = 60.0  # a server that is broken and does not end is killed by its supervisor after that

Fate = Literal["whole", "lost", "gapped", "repeated", "changed", "without an end", "refused"]
FATES: Final[tuple[Fate, ...]] = ("whole", "lost", "gapped", "repeated", "changed", "without an end", "refused")


class Blow(NamedTuple):
    """What is done to it."""

    name: str
    victim: Literal["engine", "server"]
    number: signal.Signals


BLOWS: Final = (
    Blow("engine process killed", "engine", signal.SIGKILL),
    Blow("API server killed", "server", signal.SIGKILL),
    Blow(f"engine process stopped for {_FROZEN_S:g} s", "engine", signal.SIGSTOP),
)


class Known(NamedTuple):
    """A prompt and its answer when nothing else is asked."""

    prompt: list[int]
    tokens: list[int]
    text: str


@dataclass(slots=True)
class Heard:
    """What a reader heard of one stream."""

    tokens: list[int] = field(default_factory=list[int])
    text: str = ""
    times: list[float] = field(default_factory=list[float])
    finish: str = ""
    problem: str = ""
    was_begun: bool = False

    def fate(self, known: Known) -> Fate:
        """How it went. What broke counts as lost, whatever it had said by then."""
        if not self.was_begun:
            return "refused"
        if self.problem:
            return "lost"
        if self.tokens != known.tokens[: len(self.tokens)]:
            return _difference(self.tokens, known.tokens)
        if not self.finish or len(self.tokens) < len(known.tokens):
            return "without an end"
        return "whole" if self.text == known.text else "changed"

    @property
    def longest_pause_s(self) -> float:
        """Between two words."""
        return max((later - sooner for sooner, later in itertools.pairwise(self.times)), default=0.0)


def _difference(tokens: Sequence[int], known: Sequence[int]) -> Fate:
    """How tokens differ from those that were to come."""
    at = next(n for n, token in enumerate(tokens) if n >= len(known) or token != known[n])
    rest = list(tokens[at : at + 8])
    if len(rest) >= 4:
        if any(rest == list(known[n : n + len(rest)]) for n in range(at + 1, len(known))):
            return "gapped"
        if any(rest == list(known[n : n + len(rest)]) for n in range(at)):
            return "repeated"
    return "changed"


@dataclass(slots=True)
class Row:
    """All blows of one kind."""

    times: int = 0
    fates: Counter[Fate] = field(default_factory=Counter[Fate])
    pauses_s: list[float] = field(default_factory=list[float])  # of streams that were whole
    again_s: list[float] = field(default_factory=list[float])  # until a new request had its first token


class PeerRun:
    """One peer, struck a few times in each way."""

    def __init__(self, engine: Engine, out: Path, *, times: int, seed: int) -> None:
        self._engine, self._out, self._times = engine, out, times
        self._draw = random.Random(seed)
        self._model = resolve(DEFAULT_MODEL)
        self._rows: dict[str, Row] = {}
        self._began_s = time.monotonic()
        self._starts = 0
        self._server: RunningServer | None = None

    async def play(self) -> str:
        """The table."""
        tokenizer = Tokenizer(self._model / "tokenizer.json")
        prompts = [tokenizer.encode(f"{n + 1}. {TEXTS[n % len(TEXTS)]}", True) for n in range(_STREAMS)]
        with (self._out / "history.jsonl").open("w") as self._history:
            try:
                await self._start()
                assert self._server is not None, "it was started"
                _engine_process(self._server.pid)  # who is to be struck is there: else better now than in half an hour
                known = [
                    Known(prompt, heard.tokens, heard.text) for prompt in prompts for heard in [await self._one(prompt)]
                ]
                for _ in range(self._times):
                    await self._strike(None, known)
                for blow in BLOWS:
                    for _ in range(self._times):
                        await self._strike(blow, known)
            finally:
                if self._server is not None:
                    self._server.stop()
        return self._table()

    async def _one(self, prompt: list[int]) -> Heard:
        heard = Heard()
        await self._read("undisturbed", prompt, heard)
        assert not heard.problem and heard.finish, f"an undisturbed stream broke: {heard.problem}"
        return heard

    async def _strike(self, blow: Blow | None, known: list[Known]) -> None:
        name = blow.name if blow is not None else "nothing (control)"
        row = self._rows.setdefault(name, Row())
        row.times += 1
        streams = [Heard() for _ in known]
        names = [f"{name} {row.times}, stream {n}" for n in range(len(known))]
        reading = [
            asyncio.create_task(self._read(stream, one.prompt, heard))
            for stream, one, heard in zip(names, known, streams, strict=True)
        ]
        if blow is not None:
            enough = self._draw.randrange(5, _MAX_TOKENS // 2)
            while min(len(heard.tokens) for heard in streams) < enough and not any(task.done() for task in reading):
                await asyncio.sleep(0.01)
            at_s = await self._fall(blow)
            row.again_s.append(await self._served_again(known[0].prompt, at_s))
        await asyncio.gather(*reading)
        for heard, one in zip(streams, known, strict=True):
            fate = heard.fate(one)
            row.fates[fate] += 1
            if fate == "whole":
                row.pauses_s.append(heard.longest_pause_s)
        self._write("fates", blow=name, fates=dict(Counter(h.fate(k) for h, k in zip(streams, known, strict=True))))
        (self._out / "table.md").write_text(self._table() + "\n")  # what a run that is broken off has shown
        print(f"{time.monotonic() - self._began_s:6.0f} s: {name}: {dict(row.fates)}", flush=True)

    async def _fall(self, blow: Blow) -> float:
        assert self._server is not None, "it runs"
        pid = self._server.pid if blow.victim == "server" else _engine_process(self._server.pid)
        os.kill(pid, blow.number)
        self._write("blow", what=blow.name)
        at_s = time.monotonic()
        if blow.number is signal.SIGSTOP:
            await asyncio.sleep(_FROZEN_S)
            with contextlib.suppress(ProcessLookupError):  # somebody has ended it for that
                os.kill(pid, signal.SIGCONT)
        return at_s

    async def _served_again(self, prompt: list[int], at_s: float) -> float:
        """Do what a supervisor does, until a new request has its first token; seconds since the blow."""
        while True:
            if self._server is None or not self._server.alive:
                await self._start()
            heard = Heard()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_ENDS_ITSELF_S):
                    await self._read("again", prompt, heard, max_tokens=1)
            if heard.tokens and not heard.problem:
                return time.monotonic() - at_s
            broken_s = time.monotonic() - at_s
            if self._server is not None and self._server.alive and broken_s > _ENDS_ITSELF_S:
                self._server.stop()
            await asyncio.sleep(0.5)

    async def _start(self) -> None:
        if self._server is not None:
            self._server.stop()
        self._starts += 1
        self._write("start")
        places = {"MODEL": str(self._model), "PYTHON": sys.executable}
        self._server = RunningServer(self._engine, places, self._out / f"server-{self._starts}.log")
        seconds = await self._server.ready(_READY_S)
        self._write("ready", seconds=round(seconds, 1))
        print(f"{time.monotonic() - self._began_s:6.0f} s: started in {seconds:.0f} s", flush=True)

    async def _read(self, name: str, prompt: list[int], heard: Heard, max_tokens: int = _MAX_TOKENS) -> None:
        """As the OpenAI client does."""
        try:
            async with asyncio.timeout(_STREAM_S):
                delay_s = _FIRST_DELAY_S
                for attempt in range(_RETRIES + 1):
                    try:
                        await self._attempt(name, prompt, heard, max_tokens)
                        return
                    except _NotBegun as error:
                        heard.problem = str(error)
                    if attempt < _RETRIES:
                        await asyncio.sleep(delay_s * self._draw.uniform(0.75, 1.0))
                        delay_s = min(_MAX_DELAY_S, 2 * delay_s)
        except TimeoutError:
            heard.problem = f"no end within {_STREAM_S:g} s"
        finally:
            self._write("end", stream=name, finish=heard.finish, problem=heard.problem, tokens=len(heard.tokens))

    async def _attempt(self, name: str, prompt: list[int], heard: Heard, max_tokens: int) -> None:
        assert self._server is not None, "it was started"
        body = {
            "model": "m",
            "prompt": prompt,
            "max_tokens": max_tokens,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
            "return_token_ids": True,
        }
        try:
            async with (
                aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=None)) as http,
                http.post(f"{self._server.address}/v1/completions", json=body) as response,
            ):
                if response.status != 200:
                    raise _NotBegun(f"HTTP {response.status}")
                heard.was_begun, heard.problem = True, ""
                async for line in response.content:
                    if line.startswith(b"data: {"):
                        self._hear(name, json.loads(line[5:]), heard)
        except aiohttp.ClientError as error:
            if not heard.was_begun:
                raise _NotBegun(type(error).__name__) from error
            heard.problem = type(error).__name__

    def _hear(self, name: str, event: dict[str, Any], heard: Heard) -> None:
        if event.get("error"):
            heard.problem = str(event["error"].get("type", "error"))
        for choice in event.get("choices", ()):
            ids = list(choice.get("token_ids") or ())
            heard.tokens += ids
            heard.text += choice.get("text") or ""
            heard.finish = choice.get("finish_reason") or heard.finish
            heard.times.append(time.monotonic())
            self._write("delta", stream=name, ids=ids, text=choice.get("text"))

    def _write(self, event: str, **facts: object) -> None:
        line = {"t": round(time.monotonic() - self._began_s, 4), "event": event, **facts}
        self._history.write(json.dumps(line, separators=(",", ":")) + "\n")

    def _table(self) -> str:
        lines = [
            f"| fault | times | streams | {' | '.join(FATES)} | longest pause of whole ones | served again after |",
            f"|---|---:|---:|{'---:|' * len(FATES)}---:|---:|",
        ]
        for name, row in self._rows.items():
            counts = " | ".join(str(row.fates[fate]) for fate in FATES)
            pause = f"{max(row.pauses_s):.1f} s" if row.pauses_s else ""
            again = f"{statistics.median(row.again_s):.0f} s" if row.again_s else ""
            lines.append(f"| {name} | {row.times} | {sum(row.fates.values())} | {counts} | {pause} | {again} |")
        return "\n".join(lines)


class _NotBegun(Exception):
    """There was no answer that could have broken."""


def _engine_process(server: int) -> int:
    """The process in which it computes. Raises ProcessLookupError."""
    for pid in machine.processes(server):
        with contextlib.suppress(OSError):  # it has ended
            if _ENGINE in Path(f"/proc/{pid}/cmdline").read_bytes():
                return pid
    raise ProcessLookupError(f"no process of the server calls itself {_ENGINE.decode()}")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run and print the table. Returns 0: what a peer loses is no failure of ours; 2 where it cannot be run here."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--peer", choices=sorted(_PEERS), default="vllm")
    parser.add_argument("--times", type=int, default=3, help="of each fault")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", type=Path, required=True, help="folder for history.jsonl and the server's logs")
    options = parser.parse_args(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    try:
        (engine,) = engines.read([_PEERS[options.peer]])
        print(asyncio.run(PeerRun(engine, options.out, times=options.times, seed=options.seed).play()))
    except (EngineMissing, ProcessLookupError) as missing:
        print(f"{missing}\nWhat a peer needs is said in tests/benchmarks/README.md.", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
