"""Servers against each other on the same work, in turns: `make bench ARGS="--peers llama-bf16,vllm-bf16"`.

A turn: start a server, wait until it is ready, warm it up, play every workload, stop it. All engines take a turn, then
all take the next one, so that a machine that grows slower or faster in an hour does so for everyone. A run that others
disturbed is repeated a few times. What is found is written after every run; nothing is lost when it is interrupted.
"""

from __future__ import annotations

import argparse
import asyncio
import datetime as dt
import json
import os
import platform
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any, Final

import uvloop

from common.config import DEFAULT_MODEL
from services.event_loop import EventLoop
from services.model_store import resolve
from tests.benchmarks import engines, machine, plot, report, workloads
from tests.benchmarks.engines import Engine, EngineMissing, RunningServer
from tests.benchmarks.floors import ModelShape
from tests.benchmarks.metrics import Summary, summarize
from tests.benchmarks.playing import Answer, play
from tests.benchmarks.results import Results

_OURS: Final = ("grpcio", "numpy", "torch", "transformers", "uvloop", "aiohttp")
_WARMUPS: Final = 2
_AGAIN: Final = 1000  # added to a run's number when it is repeated, so that its prompts are new
_USUAL_S: Final = {"start": 15, "w1": 20, "w2": 5, "w3": 40, "w4": 10, "w5": 30, "prefill": 8}


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What is compared, and how patiently."""

    engines: Sequence[Engine]
    workloads: Sequence[str]
    runs: int
    model: Path
    out: Path
    seed: int = 0
    repeats: int = 2
    quiet_wait_s: float = 30.0
    ready_timeout_s: float = 600.0
    measure_limits: bool = True


@dataclass(slots=True)
class Pace:
    """How long everything takes, and so how long the rest will."""

    left: list[tuple[str, str]]  # engine and what it does, in order
    seen: dict[tuple[str, str], float] = field(default_factory=dict[tuple[str, str], float])
    total: int = 0

    def __post_init__(self) -> None:
        self.total = len(self.left)

    def done(self, engine: str, what: str, seconds: float) -> None:
        """Note one piece of work."""
        self.seen[engine, what] = seconds
        if (engine, what) in self.left:
            self.left.remove((engine, what))

    def drop(self, engine: str) -> None:
        """This engine will not run any more."""
        self.left = [work for work in self.left if work[0] != engine]

    def __str__(self) -> str:
        minutes = sum(self._guess(*work) for work in self.left) / 60
        return f"[{self.total - len(self.left)}/{self.total}, {minutes:.0f} min left]"

    def _guess(self, engine: str, what: str) -> float:
        if (engine, what) in self.seen:
            return self.seen[engine, what]
        others = [seconds for (_, same), seconds in self.seen.items() if same == what]
        return sum(others) / len(others) if others else _USUAL_S.get(what.partition("@")[0], 30)


class Bench:
    """One benchmark as it runs."""

    def __init__(self, settings: Settings, command: str) -> None:
        self._settings = settings
        self._words = workloads.words(settings.model / "tokenizer.json")
        self._shape = ModelShape.of(settings.model)
        self._places = {"MODEL": str(settings.model), "PYTHON": sys.executable}
        works = ["start", *settings.workloads]
        self._pace = Pace([(e.name, what) for _ in range(settings.runs) for e in settings.engines for what in works])
        self.results = Results(about=_about(command, settings), shape=asdict(self._shape) if self._shape else None)
        for engine in settings.engines:
            self.results.engines[engine.name] = {
                "dialect": engine.dialect,
                "precision": engine.precision,
                "weight_bits": engine.weight_bits,
                "kv_bits": engine.kv_bits,
                "command": [*engine.command, *engine.arguments],
                "environment": dict(engine.environment),
                "version": engines.version_of(engine, self._places),
                "note": engine.note,
            }

    async def run(self) -> None:
        """All turns of all engines. SIGINT and SIGTERM cancel it, also where the shell has made us ignore them."""
        task = asyncio.current_task()
        assert task is not None
        for number in (signal.SIGINT, signal.SIGTERM):
            asyncio.get_running_loop().add_signal_handler(number, task.cancel)
        for run in range(self._settings.runs):
            if self._settings.measure_limits:
                await self._measure_limits()
            for engine in self._settings.engines:
                if engine.name not in self.results.left_out:
                    try:
                        await self._turn(engine, run)
                    except EngineMissing as missing:
                        self.results.left_out[engine.name] = str(missing)
                        self._pace.drop(engine.name)
                        self._say(f"left out: {missing}")
            self._save()

    async def _turn(self, engine: Engine, run: int) -> None:
        await machine.quiet(None, self._settings.quiet_wait_s)
        before = machine.Reading.now()
        server = RunningServer(engine, self._places, self._settings.out / f"{engine.name}.log")
        try:
            ready_s = await server.ready(self._settings.ready_timeout_s)
            account = machine.Reading.now(server.pid).since(before)
            start: dict[str, Any] = {
                "engine": engine.name,
                "run": run,
                "ready_s": round(ready_s, 3),
                "account": asdict(account),
                "at_ready": asdict(machine.memory(server.pid)),
            }
            self.results.starts.append(start)
            self._pace.done(engine.name, "start", ready_s)
            self._say(f"{engine.name} · start {run + 1}: ready in {ready_s:.1f} s{_disturbed(account)}")
            for i in range(_WARMUPS):
                await self._play(server, workloads.build("warmup", self._words, run=_WARMUPS * run + i))
            for name in self._settings.workloads:
                await self._measure(server, name, run)
            start["after"] = asdict(machine.memory(server.pid))
        finally:
            await asyncio.to_thread(server.stop)

    async def _measure(self, server: RunningServer, name: str, run: int) -> None:
        """One run of one workload, again while others disturb it and repeats are left."""
        began_s = time.monotonic()
        for attempt in range(self._settings.repeats + 1):
            disturbed = await self._measure_once(server, name, run, attempt)
            if not disturbed:
                break
        self._pace.done(server.engine.name, name, time.monotonic() - began_s)
        self._save()
        if not server.alive:
            raise EngineMissing(f"{server.engine.name}: ended while it was measured; see its log")

    async def _measure_once(self, server: RunningServer, name: str, run: int, attempt: int) -> bool:
        """Whether others disturbed it."""
        engine = server.engine.name
        workload = workloads.build(name, self._words, seed=self._settings.seed, run=run + _AGAIN * attempt)
        await machine.quiet(server.pid, self._settings.quiet_wait_s)
        before = machine.Reading.now(server.pid)
        answers = await self._play(server, workload)
        account = machine.Reading.now(server.pid).since(before)
        summary = summarize(workload, answers)
        self.results.runs.append(
            {
                "engine": engine,
                "workload": name,
                "run": run,
                "attempt": attempt,
                "disturbed": account.disturbed,
                "account": asdict(account),
                "summary": asdict(summary),
                "answers": [_row(answer) for answer in answers],
            }
        )
        again = f", attempt {attempt + 1}" if attempt else ""
        self._say(f"{engine} · {name} · run {run + 1}{again}: {_told(summary)}{_disturbed(account)}")
        return account.disturbed

    async def _play(self, server: RunningServer, workload: workloads.Workload) -> list[Answer]:
        async with server.client() as client:
            await client.is_ready()  # a channel connects with its first call, which is not what is measured
            return await play(workload, client)

    async def _measure_limits(self) -> None:
        if self._shape is None:
            return
        await machine.quiet(None, self._settings.quiet_wait_s)
        command = [sys.executable, "-m", "tests.benchmarks.limits", str(self._settings.model)]
        process = await asyncio.create_subprocess_exec(*command, cwd=engines.ROOT, stdout=subprocess.PIPE)
        told, _ = await process.communicate()
        if process.returncode:
            self._say("limits of the machine: not measured, see above")
            return
        found = json.loads(told)
        self.results.limits.append(found)
        self._say(
            f"the machine: reads {found[-1]['read_gb_s']} GB/s, "
            f"multiplies {max(found[-1]['matrix_gflop_s'].values())} GFLOP/s in bf16"
        )

    def _save(self) -> None:
        self.results.save(self._settings.out / "results.json")

    def _say(self, line: str) -> None:
        print(f"{self._pace} {line}", flush=True)


def _about(command: str, settings: Settings) -> dict[str, Any]:
    return {
        "date": dt.datetime.now(dt.UTC).date().isoformat(),
        "command": command,
        "model": settings.model.name,
        "machine": machine.describe(),
        "versions": {"Pagewire": _commit(), "Python": platform.python_version(), **_versions()},
        "seed": settings.seed,
    }


def _versions() -> dict[str, str]:
    found = {}
    for name in _OURS:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def _commit() -> str:
    """The commit that is checked out, marked where files differ from it; else the version."""
    command = ["git", "describe", "--always", "--dirty=+changes", "--abbrev=12"]
    told = subprocess.run(command, cwd=engines.ROOT, capture_output=True, text=True, check=False)
    return told.stdout.strip() or metadata.version("pagewire")


def _row(answer: Answer) -> list[Any]:
    """Kind, submitted s, first token ms, ms a token, tokens, longest gap ms; or kind, submitted s, error."""
    beginning = [answer.request.kind, round(answer.submitted_s, 4)]
    if answer.error:
        return [*beginning, answer.error]
    longest_s = max(answer.gaps_s, default=0.0)
    milliseconds = [round(seconds * 1e3, 2) for seconds in (answer.ttft_s, answer.tpot_s, longest_s)]
    return [*beginning, *milliseconds[:2], answer.num_tokens, milliseconds[2]]


def _told(summary: Summary) -> str:
    parts = []
    if summary.ttft_ms is not None:
        parts.append(f"first token {summary.ttft_ms.p50:,.0f} ms")
    if summary.tpot_ms is not None:
        parts += [f"then {summary.tpot_ms.p50:,.1f} ms each", f"{summary.output_tokens_per_s:,.0f} tokens/s"]
    if summary.online is not None:
        parts.append(f"{summary.online.within_slo:.0%} in time")
    if summary.disturbance is not None and summary.disturbance.longest_ms is not None:
        parts.append(f"longest gap {summary.disturbance.longest_ms:,.0f} ms")
    if summary.failed:
        parts.append(f"{summary.failed} of {summary.requests} failed: {summary.errors[0]}")
    if summary.short_of_asked:
        parts.append(f"{summary.short_of_asked} of {summary.requests} too short")
    return ", ".join(parts)


def _disturbed(account: machine.Account) -> str:
    return f", disturbed: others took {account.foreign:.0%} of the machine" if account.disturbed else ""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark; write results.json, RESULTS.md and results.svg."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--engines", default="pagewire-bf16", help="comma-separated, from engines.toml")
    parser.add_argument("--peers", default="", help="more engines: llama-bf16, vllm-bf16, ...")
    parser.add_argument("--workloads", default="w1,w2,w3,w4,w5,prefill")
    parser.add_argument("--runs", type=int, default=3, help="turns of each engine")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--repeats", type=int, default=2, help="how often a disturbed run is repeated")
    parser.add_argument("--quiet-wait-s", type=float, default=30.0, help="how long to wait for a quiet machine")
    parser.add_argument("--ready-timeout-s", type=float, default=600.0)
    parser.add_argument("--model", default=DEFAULT_MODEL)
    parser.add_argument("--table", type=Path, default=engines.TABLE, help="the table of engines")
    parser.add_argument("--no-limits", action="store_true", help="do not measure the machine")
    parser.add_argument("--out", type=Path, default=Path("build/bench"), help="folder for what is found")
    parsed = parser.parse_args(arguments)
    try:
        settings = Settings(
            engines=engines.read(
                [name for name in f"{parsed.engines},{parsed.peers}".split(",") if name], parsed.table
            ),
            workloads=workloads.spelled_out(parsed.workloads),
            runs=parsed.runs,
            model=resolve(parsed.model),
            out=parsed.out,
            seed=parsed.seed,
            repeats=parsed.repeats,
            quiet_wait_s=parsed.quiet_wait_s,
            ready_timeout_s=parsed.ready_timeout_s,
            measure_limits=not parsed.no_limits,
        )
        for name in settings.workloads:
            workloads.build(name, [0])
    except (EngineMissing, ValueError) as error:
        parser.error(str(error))
    settings.out.mkdir(parents=True, exist_ok=True)
    command = f"python -m tests.benchmarks.bench_serving {shlex.join(sys.argv[1:] if arguments is None else arguments)}"
    bench = Bench(settings, command)
    try:
        uvloop.run(bench.run(), loop_factory=EventLoop)
    except asyncio.CancelledError:
        print("interrupted")
    return _write(bench.results, settings.out)


def _write(results: Results, out: Path) -> int:
    if not results.runs:
        print("nothing was measured")
        return 1
    results.save(out / "results.json")
    text = report.markdown(results)
    (out / "RESULTS.md").write_text(text, encoding="utf-8")
    plot.draw(results, out / "results.svg")
    print(f"\n{text}\nWritten to {os.path.relpath(out)}: results.json, RESULTS.md, results.svg")
    return 0


if __name__ == "__main__":
    sys.exit(main())
