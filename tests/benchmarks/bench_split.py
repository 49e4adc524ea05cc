"""What the border between scheduler and executor costs a decode step: `make bench-split`.

Two sides do the same work in turns, and a step's time is compared within each pair of turns:

- *split*: the engine and its link, as in a scheduler process, and a real executor process that dials it. This process
  is the scheduler: it never loads torch. Two plans are in flight, as always.
- *whole*: one process and one thread that calls in a loop what both halves are made of: `schedule`, `execute`,
  `update`. No message, no socket, no second process; but no step in flight either.

Both sides have the same core, runner and settings, and get the same prompts at once, so the core makes the same plans
for both; that they made the same tokens is checked. Neither has clients: what streaming costs is another matter, and
would blur this one. The whole side pays for its own scheduling in every step, as any engine in one process does.

A step's time is the mean over those steps in which every sequence got a token: from the first result to the last,
divided by the steps between them. Jitter of single messages cancels out; what is lost in every step does not.
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import json
import os
import random
import secrets
import statistics
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Final, Self

import uvloop
from grpc import aio

from common.config import ExecutorConfig
from common.model_folder import ModelFolder, read_model_folder
from common.sampling import SamplingParams, StopConditions
from common.step import StepResult
from executor.runner import execute
from scheduler.scheduler import Scheduler, SchedulerLimits
from services.children import ROOT, Child
from services.engine import Engine
from services.executor_process import make_runner
from services.flags import add_flags, from_flags, to_flags
from services.grpc_options import link_options
from services.link_service import ExecutorLinkService
from services.model_store import resolve
from tests.benchmarks import machine

_GREEDY: Final = SamplingParams(temperature=0.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """One turn of one side."""

    batch: int
    prompt_tokens: int
    output_tokens: int
    seed: int

    def prompts(self, vocab_size: int) -> list[list[int]]:
        """New ones for every seed, so that no prefix is found in the cache."""
        draw = random.Random(self.seed)
        return [draw.choices(range(vocab_size), k=self.prompt_tokens) for _ in range(self.batch)]

    @property
    def stop(self) -> StopConditions:
        """As long as asked, whatever the model says."""
        return StopConditions(max_tokens=self.output_tokens, ignore_eos=True)


@dataclass(frozen=True, slots=True, kw_only=True)
class Turn:
    """What one side needed for a step."""

    step_ms: float
    idle: float  # share of the time that the executor waited for a plan
    tokens: str  # a digest of all tokens, step by step

    @classmethod
    def of(cls, results: Sequence[tuple[int, StepResult]], batch: int) -> Self:
        """From the results, each with the nanosecond in which it was there."""
        full = [(at_ns, result) for at_ns, result in results if len(result.refs) == batch]
        (first_ns, _), (last_ns, _) = full[0], full[-1]
        idle_ns = sum(result.idle_ns for _, result in full[1:])
        tokens = json.dumps([list(map(int, result.tokens)) for _, result in results if result.tokens])
        return cls(
            step_ms=(last_ns - first_ns) / (len(full) - 1) / 1e6,
            idle=idle_ns / (last_ns - first_ns),
            tokens=hashlib.sha256(tokens.encode()).hexdigest(),
        )


def _core(model: ModelFolder) -> Scheduler:
    return Scheduler(
        SchedulerLimits(), model=model.digest, eos=set(model.eos_token_ids), secret=secrets.token_bytes(32)
    )


# ---- one process


def serve_whole(config: ExecutorConfig) -> None:
    """The whole side: a turn for every line on standard input, until that ends."""
    model = read_model_folder(Path(config.model))
    runner = make_runner(config, model, "whole")
    core = _core(model)
    core.join(0, runner.load(lambda stage, done, total: None), 0)
    runner.begin_session()
    for line in iter(sys.stdin.readline, ""):
        work = Work(**json.loads(line))
        for prompt in work.prompts(model.vocab_size):
            core.add(prompt, _GREEDY, work.stop, time.monotonic_ns())
        results = []
        while (plan := core.schedule(0, time.monotonic_ns())) is not None:
            result = execute(runner, plan)
            core.update(0, result, time.monotonic_ns())
            results.append((time.perf_counter_ns(), result))
        print(json.dumps(asdict(Turn.of(results, work.batch))), flush=True)


@asynccontextmanager
async def whole(config: ExecutorConfig) -> AsyncIterator[asyncio.subprocess.Process]:
    """The whole side in a process of its own."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "tests.benchmarks.bench_split", "--whole", *to_flags(config)),
        cwd=ROOT,
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
    )
    try:
        yield process
    finally:
        assert process.stdin is not None
        process.stdin.close()
        await process.wait()


async def take_whole_turn(process: asyncio.subprocess.Process, work: Work) -> Turn:
    """One turn of the whole side."""
    assert process.stdin is not None and process.stdout is not None
    process.stdin.write(json.dumps(asdict(work)).encode() + b"\n")
    await process.stdin.drain()
    line = await process.stdout.readline()
    if not line:
        raise RuntimeError("the process that is the whole side has ended; its log is above")
    return Turn(**json.loads(line))


# ---- two processes


class TimedEngine(Engine):
    """Notes when each result arrived."""

    def __init__(self, scheduler: Scheduler) -> None:
        super().__init__(scheduler)
        self.results: list[tuple[int, StepResult]] = []

    def answered(self, session: int, result: StepResult) -> None:
        """A result arrived."""
        self.results.append((time.perf_counter_ns(), result))
        super().answered(session, result)


@asynccontextmanager
async def split(config: ExecutorConfig) -> AsyncIterator[TimedEngine]:
    """The split side: the engine here, the executor in a process that has joined."""
    model = read_model_folder(Path(config.model))
    engine = TimedEngine(_core(model))
    with tempfile.TemporaryDirectory(prefix="pagewire-") as folder:
        link = f"unix:{folder}/link"
        server = aio.server(options=link_options())
        server.add_generic_rpc_handlers((ExecutorLinkService(engine, model).handler(),))
        server.add_insecure_port(link)
        await server.start()
        loop = asyncio.create_task(engine.run())
        executor = Child("executor", ["executor", *to_flags(replace(config, scheduler=link)), "--log-level=warning"])
        try:
            await executor.start()
            yield engine
        finally:
            await executor.stop(10)
            loop.cancel()
            await asyncio.gather(loop, return_exceptions=True)
            await server.stop(grace=1)


async def take_split_turn(engine: TimedEngine, work: Work, vocab_size: int) -> Turn:
    """One turn of the split side."""
    engine.results.clear()
    for prompt in work.prompts(vocab_size):
        engine.submit(prompt, _GREEDY, work.stop)
    await engine.idle()
    return Turn.of(engine.results, work.batch)


# ---- both


@dataclass(frozen=True, slots=True, kw_only=True)
class Pair:
    """Both sides, one right after the other."""

    batch: int
    whole: Turn
    split: Turn
    foreign: float  # share of the machine that others used meanwhile

    @property
    def cost(self) -> float:
        """How much longer a step takes over the border: 0.03 is 3%."""
        return self.split.step_ms / self.whole.step_ms - 1


async def measure(
    config: ExecutorConfig, *, batches: Sequence[int], rounds: int, prompt_tokens: int, output_tokens: int
) -> list[Pair]:
    """All pairs of turns, told as they come. The first pair of each batch only warms up."""
    vocab_size = read_model_folder(Path(config.model)).vocab_size
    pairs: list[Pair] = []
    async with whole(config) as process, split(config) as engine:
        for turn in range(-1, rounds):
            for batch in batches:
                work = Work(
                    batch=batch, prompt_tokens=prompt_tokens, output_tokens=output_tokens, seed=turn * 1000 + batch
                )
                before = machine.Reading.now(os.getpid())
                if turn % 2:  # who goes first changes
                    first = await take_whole_turn(process, work)
                    second = await take_split_turn(engine, work, vocab_size)
                else:
                    second = await take_split_turn(engine, work, vocab_size)
                    first = await take_whole_turn(process, work)
                account = machine.Reading.now(os.getpid()).since(before)
                pair = Pair(batch=batch, whole=first, split=second, foreign=account.foreign)
                if turn >= 0:
                    pairs.append(pair)
                    print(f"round {turn + 1} of {rounds}: {_told(pair)}", flush=True)
    return pairs


def _told(pair: Pair) -> str:
    text = f"batch {pair.batch}: {pair.whole.step_ms:.2f} ms whole, {pair.split.step_ms:.2f} ms split, {pair.cost:+.1%}"
    if pair.foreign > machine.FOREIGN_SHARE:
        text += f", disturbed: others took {pair.foreign:.0%} of the machine"
    return text


def table(pairs: Sequence[Pair]) -> str:
    """Medians for each batch, over the pairs that nobody disturbed where there are such."""
    lines = [
        "| batch | whole ms | split ms | cost | lowest and highest | executor idle | same tokens | pairs |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for batch in dict.fromkeys(pair.batch for pair in pairs):
        everything = [pair for pair in pairs if pair.batch == batch]
        trusted = [pair for pair in everything if pair.foreign <= machine.FOREIGN_SHARE]
        chosen = trusted or everything
        costs = [pair.cost for pair in chosen]
        same = all(pair.whole.tokens == pair.split.tokens for pair in everything)
        lines.append(
            f"| {batch} | {statistics.median(pair.whole.step_ms for pair in chosen):.2f} "
            f"| {statistics.median(pair.split.step_ms for pair in chosen):.2f} "
            f"| {statistics.median(costs):+.1%}{'' if trusted else '*'} | {min(costs):+.1%} to {max(costs):+.1%} "
            f"| {statistics.median(pair.split.idle for pair in chosen):.1%} | {'yes' if same else 'NO'} "
            f"| {len(chosen)} of {len(everything)} |"
        )
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print; fails when the two sides made different tokens."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--batches", default="1,32")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--prompt-tokens", type=int, default=64)
    parser.add_argument("--output-tokens", type=int, default=129)
    parser.add_argument("--out", type=Path, default=Path("build/bench/split.json"))
    parser.add_argument("--whole", action="store_true", help=argparse.SUPPRESS)
    add_flags(parser, ExecutorConfig)
    parsed = parser.parse_args(arguments)
    config = from_flags(ExecutorConfig, parsed)
    if parsed.whole:
        serve_whole(config)
        return 0
    config = replace(config, model=str(resolve(config.model)), threads=config.threads or os.cpu_count() or 1)
    pairs = uvloop.run(
        measure(
            config,
            batches=[int(batch) for batch in parsed.batches.split(",")],
            rounds=parsed.rounds,
            prompt_tokens=parsed.prompt_tokens,
            output_tokens=parsed.output_tokens,
        )
    )
    parsed.out.parent.mkdir(parents=True, exist_ok=True)
    parsed.out.write_text(json.dumps([asdict(pair) for pair in pairs], indent=1))
    print(f"\n{table(pairs)}")
    return 0 if all(pair.whole.tokens == pair.split.tokens for pair in pairs) else 1


if __name__ == "__main__":
    sys.exit(main())
