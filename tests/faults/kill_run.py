"""Real processes, killed again and again while streams are read: `python -m tests.faults.kill_run --kills 1000`.

Executors, schedulers, clients and the links between them are struck, at random and at every failpoint; whatever dies
is started again, as a supervisor would. Readers use the Python client, and every stream must show them the undisturbed
run's tokens and text, once, in order, to the end. By default the next fault waits until every stream has moved on and
every process is there again, so that a pause belongs to one fault; with `--overlapping` several fall together. A fault
that nobody was there to feel (too few tokens before or after it) does not count and is repeated. What was heard and
what struck is kept as JSON lines.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import json
import logging
import math
import random
import sys
import tempfile
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final

from services.model_store import resolve
from tests.e2e import fake_model
from tests.faults import strikes
from tests.faults.kill_report import Report
from tests.faults.readers import AskedBefore, FakeQuestions, Questions, Readers
from tests.faults.recorder import ClientSource, History, Source
from tests.faults.site import Site
from tests.faults.strikes import Strike
from tests.faults.striking import LINGER_S, Broken, Ground

_MORE_READERS: Final = 2  # than streams that must be live: one that has its answer asks again, which takes a moment
_AT_ONCE: Final = 3  # strikes, where they overlap
_TELL_EVERY_S: Final = 10.0

_FAKE: Final = (
    *("--fake", "--fake-tokens=hash", "--fake-step-s=0.02"),
    *("--num-blocks=96", "--max-sequences=24", "--drain-s=2"),
)

Deck = Callable[[random.Random], list[Strike]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """Processes that are struck for a while, before others take their place."""

    sites: int
    executors: int  # of each
    deck: Deck


FAKE_STAGES: Final = (
    Stage(sites=1, executors=4, deck=strikes.with_standby),
    Stage(sites=1, executors=1, deck=strikes.alone),
    Stage(sites=2, executors=2, deck=strikes.two_schedulers),
)
MODEL_STAGES: Final = (Stage(sites=1, executors=2, deck=strikes.of_a_real_model),)


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """What is to be done, and where."""

    kills: int
    streams: int
    seed: int
    folder: Path
    history_file: Path
    stages: Sequence[Stage] = FAKE_STAGES
    model: str = ""  # empty: the fake one
    dtype: str = "float32"
    overlapping: bool = False
    tell: Callable[[str], None] = print

    async def play(self) -> Report:
        """Until so many faults were felt, or something broke."""
        draw = random.Random(self.seed)
        report = Report(self.seed, self.streams, self.kills, overlapping=self.overlapping, model=self.model)
        with History(self.history_file) as history:
            telling = asyncio.create_task(self._tell(report, history))
            try:
                questions: Questions | None = None
                for round_, stage in enumerate(itertools.cycle(self.stages)):
                    if len(report.real) >= self.kills or report.broken:
                        break
                    async with self._sites(stage, history, round_) as sites:
                        questions = questions or await self._questions(sites[0], draw)
                        strikes_ = stage.deck(draw)
                        share = self.kills * len(strikes_) / sum(len(s.deck(random.Random(0))) for s in self.stages)
                        await self._stage(strikes_[: math.ceil(share)], sites, questions, history, report, draw)
            finally:
                telling.cancel()
            report.seconds = history.now_s
            report.exact, report.inexact = history.num_exact, history.num_inexact
        struck = {fault.failpoint for fault in report.real}
        planned = {strike.failpoint for stage in self.stages for strike in stage.deck(random.Random(self.seed))}
        report.unstruck = sorted(planned - struck)
        return report

    async def _stage(
        self,
        deck: list[Strike],
        sites: list[Site],
        questions: Questions,
        history: History,
        report: Report,
        draw: random.Random,
    ) -> None:
        sources: list[Source] = []
        doors = [door.address for site in sites for door in site.doors]
        for number in range(self.streams + _MORE_READERS):
            at = number % len(doors)
            sources.append(ClientSource(",".join([*doors[at:], *doors[:at]])))
        readers = Readers(questions, sources, history, report, draw)
        ground = Ground(
            sites=sites,
            readers=readers,
            history=history,
            report=report,
            draw=draw,
            folder=self.folder,
            num_streams=self.streams,
            may_overlap=self.overlapping,
        )
        readers.start()
        try:
            await self._strike(deck, ground, report)
            await readers.finish()
            if not report.broken:
                for site in sites:
                    await site.whole()
                    if problem := await site.empty():
                        report.broken.append(f"I8: {problem}")
        except* TimeoutError as errors:
            report.broken.append(f"something stands still: {errors.exceptions}")
        except* Broken:
            pass
        finally:
            await readers.cancel()
            for source in sources:
                await source.close()

    async def _strike(self, deck: list[Strike], ground: Ground, report: Report) -> None:
        """The whole deck; what comes to nothing is tried once more at its end."""
        again: list[Strike] = []
        at_once = asyncio.Semaphore(_AT_ONCE if self.overlapping else 1)

        async def carry_out(strike: Strike) -> None:
            try:
                if not await ground.carry_out(strike):
                    again.append(strike)
            finally:
                at_once.release()

        for strikes_ in (deck, again):
            async with asyncio.TaskGroup() as falling:
                for strike in list(strikes_):
                    await at_once.acquire()
                    if len(report.real) >= self.kills or report.broken:
                        at_once.release()
                        break
                    falling.create_task(carry_out(strike))

    @contextlib.asynccontextmanager
    async def _sites(self, stage: Stage, history: History, round_: int) -> AsyncIterator[list[Site]]:
        model = resolve(self.model) if self.model else fake_model.write(self.folder / "fake")
        flags = _FAKE if not self.model else ("--dtype", self.dtype, "--threads", "1", "--kv-cache-bytes", "100000000")
        async with contextlib.AsyncExitStack() as stack:
            sites = [
                await stack.enter_async_context(
                    Site(
                        f"{round_}{'ab'[number]}",
                        model,
                        self.folder,
                        history,
                        executors=stage.executors,
                        ticket_keys=self.folder / "ticket-keys",
                        scheduler_flags=("--drain-s=2", f"--linger-s={LINGER_S}"),
                        executor_flags=flags,
                    )
                )
                for number in range(stage.sites)
            ]
            yield sites

    async def _questions(self, site: Site, draw: random.Random) -> Questions:
        if not self.model:
            return FakeQuestions(self.folder / "fake")
        self.tell("asking undisturbed first")
        return await AskedBefore.ask(resolve(self.model), site.address, draw, count=12, max_tokens=64)

    async def _tell(self, report: Report, history: History) -> None:
        while True:
            await asyncio.sleep(_TELL_EVERY_S)
            last = report.faults[-1] if report.faults else None
            told = f"; the last: {last.kind} {last.failpoint} {last.pause_s:.2f} s" if last is not None else ""
            self.tell(
                f"{history.now_s:6.0f} s: {len(report.real)} of {self.kills} faults, {report.answers} answers, "
                f"{report.tokens} tokens{told}"
            )


def main(arguments: Sequence[str] | None = None) -> int:
    """Run, print the table, keep the figures. Returns 1 when the run is red."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=1000, help="faults that must have been felt")
    parser.add_argument("--streams", type=int, default=8, help="streams that are live at each fault, at least")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", type=Path, help="folder for history.jsonl and report.json")
    parser.add_argument("--model", default="", help="a real model instead of the fake one, as smollm2")
    parser.add_argument("--dtype", default="float32", help="of the real model")
    manner = parser.add_mutually_exclusive_group()
    manner.add_argument("--one-at-a-time", action="store_true", help="the next fault when all is well (the default)")
    manner.add_argument("--overlapping", action="store_true", help="several at once; their pauses are not judged")
    options = parser.parse_args(arguments)
    logging.getLogger("asyncio").setLevel(logging.ERROR)  # proxies write to connections that are dead: that is the idea
    with tempfile.TemporaryDirectory() as folder:
        out = options.out or Path(folder)
        out.mkdir(parents=True, exist_ok=True)
        run = Run(
            kills=options.kills,
            streams=options.streams,
            seed=options.seed,
            folder=Path(folder),
            history_file=out / "history.jsonl",
            stages=MODEL_STAGES if options.model else FAKE_STAGES,
            model=options.model,
            dtype=options.dtype,
            overlapping=options.overlapping,
            tell=lambda line: print(line, flush=True),
        )
        report = asyncio.run(run.play())
        (out / "report.json").write_text(json.dumps(asdict(report), indent=1))
        if report.broken and options.out:
            for log in Path(folder).glob("*.log"):
                (out / log.name).write_bytes(log.read_bytes())
    print(report.markdown())
    return 0 if report.is_green else 1


if __name__ == "__main__":
    sys.exit(main())
