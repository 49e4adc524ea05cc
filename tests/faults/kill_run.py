"""Real processes, killed again and again while streams are read: `python -m tests.faults.kill_run --kills 1000`.

Executors live short lives. Each is started with the death that it will die: at a failpoint, by SIGKILL or SIGSTOP at a
random moment, or it breaks a link and goes on. Whatever they do, every stream must show the undisturbed run's tokens,
once, in order, to the end. A death that nobody was there to feel (too few tokens before or after it) counts for
nothing, and a run with many of those is red. What was heard and what struck is kept as JSON lines.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import signal
import statistics
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Final, NamedTuple

from common.failpoints import EXECUTOR
from common.sampling import SamplingParams, StopConditions
from executor.fake_runner import prefix_hash_token
from protos import inference_pb2 as pb
from services.failpoints import VARIABLE
from services.text import Tokenizer
from tests.e2e import fake_model
from tests.e2e.cluster import Cluster, Process
from tests.faults.checker import Expected, undisturbed
from tests.faults.recorder import History, RawSource, record

STEP_S: Final = 0.01
FROZEN_S: Final = 6.0
_FEW_TOKENS: Final = 20  # before and after a death, of all streams together
_LIFE_S: Final = (0.2, 1.5)  # after it has joined
_LONGEST_LIFE_S: Final = 6.0  # of one whose failpoint is never reached
_ON_ITS_WAY_S: Final = 0.2
_AFTER_S: Final = 8.0  # by then life has gone on


class Death(NamedTuple):
    """How a life ends. `failpoint` is empty for one that is struck from outside."""

    kind: str
    failpoint: str = ""
    passage: int = 1

    @property
    def environment(self) -> dict[str, str]:
        """What the process is started with."""
        action = {"kill": "kill", "freeze": "freeze", "raise": "raise"}[self.kind]
        return {VARIABLE: f"{self.failpoint}={action}@{self.passage}"} if self.failpoint else {}


@dataclass(slots=True)
class Fault:
    """One death that happened."""

    at_s: float
    kind: str
    failpoint: str
    standby: bool  # another executor had joined and was well
    since_s: float  # when this life began
    tokens_before: int = 0
    tokens_after: int = 0
    pause_s: float = 0.0

    @property
    def is_void(self) -> bool:
        """Nobody was there to feel it."""
        return min(self.tokens_before, self.tokens_after) < _FEW_TOKENS


@dataclass(slots=True)
class Report:
    """What a run has shown."""

    seed: int
    streams: int
    seconds: float = 0.0
    answers: int = 0
    tokens: int = 0
    faults: list[Fault] = field(default_factory=list[Fault])
    broken: list[str] = field(default_factory=list[str])

    @property
    def real(self) -> list[Fault]:
        """Faults that somebody was there to feel."""
        return [fault for fault in self.faults if not fault.is_void]

    @property
    def is_green(self) -> bool:
        """Nothing broke, and the faults were real."""
        return not self.broken and len(self.real) >= 0.9 * len(self.faults) > 0

    def markdown(self) -> str:
        """The table, and what it comes to."""
        lines = ["| fault | standby | times | pause p50 | p99 | longest |", "|---|---|---:|---:|---:|---:|"]
        groups: dict[tuple[str, bool], list[float]] = {}
        for fault in self.real:
            groups.setdefault((fault.kind, fault.standby), []).append(fault.pause_s)
        for (kind, standby), pauses in sorted(groups.items()):
            pauses.sort()
            p50, p99 = statistics.median(pauses), pauses[min(len(pauses) - 1, int(0.99 * len(pauses)))]
            there = "yes" if standby else "no"
            lines.append(f"| {kind} | {there} | {len(pauses)} | {p50:.2f} s | {p99:.2f} s | {pauses[-1]:.2f} s |")
        places = Counter(fault.failpoint or "at random" for fault in self.real)
        lines += ["", "Where: " + ", ".join(f"{place} {count}" for place, count in sorted(places.items())) + "."]
        lines.append("")
        lines.append(
            f"{len(self.real)} faults ({len(self.faults) - len(self.real)} more that nobody felt) in "
            f"{self.seconds:.0f} s with {self.streams} streams live, seed {self.seed}: {self.answers} answers, "
            f"{self.tokens} tokens; {len(self.broken)} streams lost, gapped, repeated, changed or without an end."
        )
        return "\n".join([*lines, *(f"- {what}" for what in self.broken[:20])])


class Lives:
    """The executors: each slot holds one process after the other."""

    def __init__(self, cluster: Cluster, history: History, report: Report, draw: random.Random, num_slots: int) -> None:
        self._cluster, self._history, self._report, self._draw = cluster, history, report, draw
        self._well = [False] * num_slots
        self._deaths: list[Death] = []
        self._number = 0

    async def fill(self, slot: int) -> None:
        """Start one life after the other, until cancelled."""
        while True:
            await self._live(slot, self._next_death())

    def _next_death(self) -> Death:
        """Every failpoint with every action in turn, shuffled anew each round, and as many deaths at random."""
        if not self._deaths:
            draw = self._draw
            at_places = [Death(kind, name) for name in EXECUTOR for kind in ("kill", "freeze", "raise")]
            # at a place that is passed once in a life: what comes later would never come
            once = {"mid_load", "before_ready", "before_hello", "on_drain"}
            rare = {"before_block_copy"}
            for death in at_places:
                if death.kind == "raise" and death.failpoint in once:
                    continue  # a process that cannot start, which is another story
                if death.kind == "freeze" and draw.random() < 0.7:
                    continue  # each takes seconds in which little happens
                often = 1 if death.failpoint in once | rare else draw.choice([1, 2, 5, 20, 60])
                self._deaths.append(death._replace(passage=often))
            self._deaths += [Death("kill")] * len(self._deaths) + [Death("freeze")] * 3
            draw.shuffle(self._deaths)
        return self._deaths.pop()

    async def _live(self, slot: int, death: Death) -> None:
        self._number += 1
        since_s = self._history.write("start", slot=slot, death=death._asdict())
        process = Process(
            [
                *("executor", "--model", str(self._cluster.model), "--scheduler", self._cluster.link),
                *("--name", f"executor-{slot}.{self._number}", "--fake", "--fake-tokens=hash"),
                *(f"--fake-step-s={STEP_S}", "--num-blocks=256", "--max-sequences=16", "--drain-s=2"),
            ],
            self._cluster.folder / f"executor-{slot}.log",
            death.environment,
        )
        try:
            await self._until_dead(slot, process, death, since_s)
        finally:
            self._well[slot] = False
            process.close()

    async def _until_dead(self, slot: int, process: Process, death: Death, since_s: float) -> None:
        ended = asyncio.create_task(asyncio.to_thread(process.popen.wait))
        joined = asyncio.create_task(asyncio.to_thread(_is_joined, process))
        draw = self._draw
        while not joined.done() and not ended.done() and not _is_stopped(process):
            await asyncio.sleep(0.01)
        if joined.done():
            self._well[slot] = joined.result()
        if not death.failpoint:
            await asyncio.sleep(draw.uniform(*_LIFE_S))
        else:
            if death.failpoint == "on_drain":
                await asyncio.sleep(draw.uniform(*_LIFE_S))
                process.signal(signal.SIGTERM)
            until_s = self._history.now_s + _LONGEST_LIFE_S
            while not ended.done() and not _is_stopped(process) and self._history.now_s < until_s:
                await asyncio.sleep(0.01)
        kind, place = death.kind, death.failpoint
        if _is_stopped(process):
            kind = "freeze"
        elif not ended.done() and kind == "freeze" and not place:
            process.signal(signal.SIGSTOP)
        elif not ended.done():
            process.signal(signal.SIGKILL)  # its place was never reached, or it raised there and went on
            if place:
                kind, place = ("raise, then kill", place) if kind == "raise" else ("kill", "")
        self._well[slot] = False
        at_s = self._history.write("fault", slot=slot, kind=kind, failpoint=place)
        fault = Fault(at_s, kind, place, any(self._well), since_s)
        if kind == "freeze":
            await asyncio.sleep(FROZEN_S)
            process.signal(signal.SIGCONT)  # a zombie: what it computed meanwhile must harm nobody
            await asyncio.sleep(0.5)
            process.popen.kill()
        self._report.faults.append(fault)
        await ended
        await joined


def _is_joined(process: Process) -> bool:
    try:
        return bool(process.wait_ready())
    except (AssertionError, OSError, ValueError):
        return False  # it died first


def _is_stopped(process: Process) -> bool:
    try:
        stat = Path(f"/proc/{process.popen.pid}/stat").read_text()
    except OSError:
        return False
    return stat.rpartition(")")[2].split()[0] == "T"


class Readers:
    """Streams that are always live: whoever has his answer asks again."""

    def __init__(self, model: Path, history: History, report: Report, draw: random.Random) -> None:
        self._tokenizer = Tokenizer(model / "tokenizer.json")
        self._history, self._report, self._draw = history, report, draw
        self._number = 0

    async def read(self, source: RawSource) -> None:
        """Ask and read, until cancelled or something is wrong."""
        while True:
            self._number += 1
            request, expected = self._ask()
            name = f"stream {self._number}"
            try:
                async with asyncio.timeout(60):
                    tokens = await record(
                        self._history, source, name, request, expected, num_prompt=len(request.token_ids.ids)
                    )
            except asyncio.CancelledError:
                raise
            except Exception as error:  # noqa: BLE001 - a stream that ends badly is what we look for
                self._history.write("broken", stream=name, error=f"{type(error).__name__}: {error}")
                self._report.broken.append(f"{name}: {type(error).__name__}: {error}")
            else:
                self._report.answers += 1
                self._report.tokens += tokens

    def _ask(self) -> tuple[pb.GenerateStreamRequest, list[Expected]]:
        draw = self._draw
        prompt = [*range(1, 1 + draw.choice([0, 16, 40, 100])), *(draw.randrange(300) for _ in range(3))]
        sampling = SamplingParams(temperature=float(draw.random() < 0.5), seed=draw.randrange(1 << 32))
        n = draw.choice([1, 1, 1, 2])
        stop = StopConditions(max_tokens=draw.choice([60, 120, 240]), ignore_eos=True)
        request = pb.GenerateStreamRequest(
            token_ids=pb.TokenIds(ids=prompt),
            sampling=pb.SamplingParams(temperature=sampling.temperature, seed=sampling.seed, n=n),
            stopping=pb.StopConditions(max_tokens=stop.max_tokens, ignore_eos=True),
        )
        expected = [
            undisturbed(
                prompt,
                sampling,
                choice,
                stop,
                model=prefix_hash_token,
                tokenizer=self._tokenizer,
                vocab_size=fake_model.VOCAB_SIZE,
                eos=frozenset({fake_model.EOS}),
            )
            for choice in range(n)
        ]
        return request, expected


async def run(*, kills: int, streams: int, executors: int, seed: int, folder: Path, history_file: Path) -> Report:
    """Until that many faults were felt, or something broke."""
    draw = random.Random(seed)
    report = Report(seed, streams)
    model = fake_model.write(folder / "fake")
    cluster = await asyncio.to_thread(Cluster, model, folder)
    source = RawSource(cluster.address)
    with History(history_file) as history:
        lives = Lives(cluster, history, report, draw, executors)
        readers = Readers(model, history, report, draw)
        tasks = [asyncio.create_task(lives.fill(slot)) for slot in range(executors)]
        tasks += [asyncio.create_task(readers.read(source)) for _ in range(streams)]
        try:
            while not report.broken and len(_felt(report, history)) < kills:
                for task in tasks:
                    if task.done():
                        task.result()
                await asyncio.sleep(0.5)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await source.close()
            await asyncio.to_thread(cluster.close)
        report.seconds = history.now_s
        report.faults = [fault for fault in report.faults if fault.at_s + _AFTER_S < report.seconds]
        _felt(report, history)
    return report


def _felt(report: Report, history: History) -> list[Fault]:
    """Faults whose aftermath is over, measured."""
    now_s = history.now_s
    for fault in report.faults:
        if not fault.pause_s and fault.at_s + _AFTER_S < now_s:
            fault.tokens_before = history.tokens_between(fault.since_s, fault.at_s)
            fault.tokens_after = history.tokens_between(fault.at_s, fault.at_s + _AFTER_S)
            # what was on its way still arrives
            fault.pause_s = history.longest_pause_s(fault.at_s, fault.at_s + _ON_ITS_WAY_S)
    return [fault for fault in report.faults if fault.pause_s and not fault.is_void]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run, print the table, keep the figures. Returns 1 when the run is red."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=1000)
    parser.add_argument("--streams", type=int, default=8)
    parser.add_argument("--executors", type=int, default=3)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", type=Path, help="folder for history.jsonl and report.json")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        out = options.out or Path(folder)
        out.mkdir(parents=True, exist_ok=True)
        report = asyncio.run(
            run(
                kills=options.kills,
                streams=options.streams,
                executors=options.executors,
                seed=options.seed,
                folder=Path(folder),
                history_file=out / "history.jsonl",
            )
        )
        (out / "report.json").write_text(json.dumps(asdict(report), indent=1))
    print(report.markdown())
    return 0 if report.is_green else 1


if __name__ == "__main__":
    sys.exit(main())
