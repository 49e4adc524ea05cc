"""What a scheduler does with more than it can serve: who is served, who is refused, how soon, and what it costs.

    python -m tests.faults.load burst      [--streams 10000]               that many streams opened at once
    python -m tests.faults.load overload   [--minutes 5] [--factor 10]     more than can be served, for long
    python -m tests.faults.load fairness   [--factor 100]                  one tenant against another, in virtual time

Scheduler and executor are processes on loopback; the executor's model is the fake one, whose steps take as long as they
are told. This process is all the clients, and shares the machine with both. Each command prints a Markdown table.
"""

from __future__ import annotations

import argparse
import asyncio
import math
import random
import tempfile
import time
from collections import Counter, deque
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import grpc
import uvloop
from grpc import aio

from common.errors import Overloaded
from common.sampling import SamplingParams, StopConditions
from common.step import ExecutorFacts, StepPlan
from common.types import Priority
from protos import inference_pb2 as pb
from scheduler.scheduler import Scheduler, SchedulerLimits
from scheduler.sequence import Sequence as CoreSequence
from services.admission import Admission, AdmissionLimits, Ask
from services.status import PUSHBACK_KEY, from_rpc_error
from tests.benchmarks.bench_scheduler import Answerer
from tests.benchmarks.bench_streaming import resident_mib
from tests.e2e import fake_model
from tests.e2e.cluster import Cluster, cluster

METHOD: Final = "/pagewire.v1.InferenceService/GenerateStream"
_S: Final = 1_000_000_000

SERVED, REFUSED, EXPIRED = "served", "refused", "expired"


@dataclass(slots=True)
class Tally:
    """What became of every stream. Times in seconds."""

    ends: Counter[str] = field(default_factory=Counter[str])
    tokens: int = 0  # of answers that were complete
    refusals_s: list[float] = field(default_factory=list[float])  # from the call to its status
    first_tokens_s: list[float] = field(default_factory=list[float])

    @property
    def others(self) -> Counter[str]:
        """Ends that there should be none of."""
        return Counter({end: n for end, n in self.ends.items() if end not in (SERVED, REFUSED, EXPIRED)})


async def ask(channel: aio.Channel, tally: Tally, *, prompt: int, output: int, timeout_s: float | None) -> None:
    """One stream to its end, whatever that is."""
    stream = channel.unary_stream(
        METHOD,
        request_serializer=pb.GenerateStreamRequest.SerializeToString,
        response_deserializer=pb.GenerateStreamResponse.FromString,
    )
    request = pb.GenerateStreamRequest(
        token_ids=pb.TokenIds(ids=random.choices(range(256), k=prompt)),
        sampling=pb.SamplingParams(temperature=0.0),
        stopping=pb.StopConditions(max_tokens=output, ignore_eos=True),
    )
    began, count, first = time.monotonic(), 0, 0.0
    try:
        async for message in stream(request, timeout=timeout_s):
            ids = message.delta.token_ids
            if ids and not count:
                first = time.monotonic() - began
            assert list(ids) == list(range(prompt + count, prompt + count + len(ids))), "a token is not what it must be"
            count += len(ids)
    except aio.AioRpcError as error:
        tally.ends[_kind(error)] += 1
        if error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED:
            tally.refusals_s.append(time.monotonic() - began)
        return
    whole = count == output
    tally.ends[SERVED if whole else f"an answer of {count} tokens"] += 1
    tally.tokens += count if whole else 0
    tally.first_tokens_s.append(first)


def _kind(error: aio.AioRpcError) -> str:
    """A refusal says when to come back, in its details and in its trailers; anything less is something else."""
    ours = from_rpc_error(error)
    pushback = dict(error.trailing_metadata() or ()).get(PUSHBACK_KEY)
    if isinstance(ours, Overloaded) and pushback and int(pushback) == round(ours.retry_after_s * 1000) > 0:
        return REFUSED
    if error.code() is grpc.StatusCode.DEADLINE_EXCEEDED:
        return EXPIRED
    return f"{error.code().name}: {error.details()}"


@asynccontextmanager
async def connections(running: Cluster, count: int) -> AsyncIterator[list[aio.Channel]]:
    """So many connections, each its own."""
    options = [("grpc.use_local_subchannel_pool", 1)]
    channels = [aio.insecure_channel(running.address, options=options) for _ in range(count)]
    try:
        await asyncio.gather(*(channel.channel_ready() for channel in channels))
        yield channels
    finally:
        for channel in channels:
            await channel.close()


@contextmanager
def servers(*flags: str, step_s: float, max_running: int = 256) -> Iterator[Cluster]:
    """A scheduler and a fake executor."""
    with tempfile.TemporaryDirectory() as folder:
        model = fake_model.write(Path(folder) / "fake")
        with cluster(model, Path(folder), executors=0, flags=flags) as running:
            running.start_executor(f"--fake-step-s={step_s}", "--num-blocks=16384", f"--max-sequences={max_running}")
            yield running


# ---- many streams at once


@dataclass(frozen=True, slots=True, kw_only=True)
class Burst:
    """What became of streams that were opened at once."""

    tally: Tally
    seconds: float  # until the last one had its end
    rss_mib: float  # of the scheduler, at the end


async def burst(
    running: Cluster, *, streams: int, num_connections: int = 4, prompt: int = 32, output: int = 8
) -> Burst:
    """Open all streams at once and read each to its end."""
    tally = Tally()
    async with connections(running, num_connections) as channels:
        began = time.monotonic()
        await asyncio.gather(
            *(
                ask(channels[i % num_connections], tally, prompt=prompt, output=output, timeout_s=None)
                for i in range(streams)
            )
        )
        seconds = time.monotonic() - began
    rss = resident_mib(running.scheduler.popen.pid)
    return Burst(tally=tally, seconds=seconds, rss_mib=rss)


def burst_table(streams: int, result: Burst) -> str:
    """The burst, for RESULTS.md."""
    tally = result.tally
    return markdown(
        (
            "opened at once",
            "served",
            "refused, with push-back",
            "anything else",
            "all ended after",
            "scheduler's memory",
        ),
        [
            (
                f"{streams}",
                f"{tally.ends[SERVED]}",
                f"{tally.ends[REFUSED]}",
                f"{streams - tally.ends[SERVED] - tally.ends[REFUSED]}",
                f"{result.seconds:.1f} s",
                f"{result.rss_mib:.0f} MiB",
            )
        ],
    )


# ---- more than can be served


@dataclass(frozen=True, slots=True, kw_only=True)
class Overload:
    """Goodput in tokens a second of complete answers."""

    peak: float
    goodput: float
    offered_per_s: float  # requests
    tally: Tally
    rss_mib: list[float]  # over time, evenly spaced


async def overload(
    running: Cluster,
    *,
    seconds: float,
    factor: float,
    peak_s: float = 15.0,
    streams: int = 64,
    deadline_s: float = 5.0,
    prompt: int = 32,
    output: int = 32,
) -> Overload:
    """Measure the peak with `streams` that ask again and again; then send `factor` times as many requests a second."""
    async with connections(running, 4) as channels:
        peak = await _peak(channels, seconds=peak_s, streams=streams, prompt=prompt, output=output)
        rate = factor * peak / output
        tally, draw = Tally(), random.Random(0)
        rss: list[float] = []
        tasks: set[asyncio.Task[None]] = set()
        began = time.monotonic()
        due, warm_s = began, min(deadline_s, seconds / 4)
        tokens, warm_at = 0, 0.0  # after the line has filled
        while (now := time.monotonic()) < began + seconds:
            if not warm_at and now >= began + warm_s:
                tokens, warm_at = tally.tokens, now
            if now - began >= len(rss) * seconds / 20:
                rss.append(resident_mib(running.scheduler.popen.pid))
            while due <= now:
                due += draw.expovariate(rate)
                one = ask(channels[len(tasks) % 4], tally, prompt=prompt, output=output, timeout_s=deadline_s)
                task = asyncio.create_task(one)
                tasks.add(task)
                task.add_done_callback(tasks.discard)
            await asyncio.sleep(0.002)
        goodput = (tally.tokens - tokens) / (time.monotonic() - warm_at)
        rss.append(resident_mib(running.scheduler.popen.pid))
        await asyncio.gather(*tasks)
    return Overload(peak=peak, goodput=goodput, offered_per_s=rate, tally=tally, rss_mib=rss)


async def _peak(channels: list[aio.Channel], *, seconds: float, streams: int, prompt: int, output: int) -> float:
    """Tokens a second of complete answers, as many streams ask as run at once and as many again wait."""
    tally = Tally()

    async def again_and_again(channel: aio.Channel) -> None:
        while True:
            await ask(channel, tally, prompt=prompt, output=output, timeout_s=None)

    tasks = [asyncio.create_task(again_and_again(channels[i % len(channels)])) for i in range(streams)]
    await asyncio.sleep(seconds / 4)
    tokens, began = tally.tokens, time.monotonic()
    await asyncio.sleep(seconds)
    peak = (tally.tokens - tokens) / (time.monotonic() - began)
    for task in tasks:
        task.cancel()
    for result in await asyncio.gather(*tasks, return_exceptions=True):
        assert isinstance(result, asyncio.CancelledError), result
    assert peak > 0 and not tally.others, tally.ends
    return peak


def overload_table(result: Overload) -> str:
    """The overload, for RESULTS.md."""
    tally, rss = result.tally, result.rss_mib
    asked = sum(tally.ends.values())
    return markdown(
        ("measure", "value"),
        [
            ("peak", f"{result.peak:.0f} tokens/s"),
            ("offered", f"{result.offered_per_s:.0f} requests/s, {asked} in all"),
            ("goodput", f"{result.goodput:.0f} tokens/s, {100 * result.goodput / result.peak:.1f}% of the peak"),
            ("served", f"{tally.ends[SERVED]}"),
            ("refused, with push-back", f"{tally.ends[REFUSED]}"),
            ("taken, and expired", f"{tally.ends[EXPIRED]}"),
            ("anything else", f"{sum(tally.others.values())} {dict(tally.others) or ''}"),
            ("refusal p50 / p99", f"{_ms(tally.refusals_s, 0.5)} / {_ms(tally.refusals_s, 0.99)} ms"),
            ("scheduler's memory", " → ".join(f"{mib:.0f}" for mib in rss[:: max(1, len(rss) // 5)]) + " MiB"),
        ],
    )


# ---- one tenant against another, in virtual time


@dataclass(frozen=True, slots=True, kw_only=True)
class Fairness:
    """Seconds of virtual time until the light tenant's first tokens, and what everybody was served."""

    first_tokens_s: list[float]
    tokens: dict[str, int]
    refused: dict[str, int]


def play(
    loads: dict[str, float],
    *,
    named: bool = True,
    seconds: float = 60.0,
    max_running: int = 64,
    step_s: float = 0.02,
    token_s: float = 0.00002,
    prompt: int = 64,
    output: int = 64,
) -> Fairness:
    """One executor with two plans in flight; `loads` are the requests that each tenant sends a second.

    A step takes `step_s` and `token_s` more for each of its tokens. Tenants without a name are all the same one.
    """
    draw = random.Random(0)
    arrivals = sorted(
        (at, tenant) for tenant, rate in loads.items() for at in _poisson(random.Random(tenant), rate, seconds)
    )
    core = Scheduler(SchedulerLimits(max_running=max_running), model="fake", eos=frozenset(), secret=b"load")
    core.join(0, _facts(max_running, prompt + output), 0)
    doorman = Admission(AdmissionLimits(max_waiting=512), jitter=lambda: 1.0)
    executor, in_flight = Answerer(), deque[StepPlan]()
    owners: dict[int, tuple[str, CoreSequence]] = {}
    tokens, refused = Counter[str](), Counter[str]()
    done = math.inf  # when the first plan in flight will be
    position, now_ns = 0, 0
    while position < len(arrivals) or in_flight:
        next_arrival = arrivals[position][0] if position < len(arrivals) else math.inf
        now = min(done, next_arrival)
        now_ns = int(now * _S)
        if now > seconds:
            break
        if done <= next_arrival:
            done = math.inf
            for made in core.update(0, executor.execute(in_flight.popleft()), now_ns):
                tokens[owners[made.id][0]] += 1
            doorman.rate.observe(now_ns, core.waiting.tokens_admitted, waiting=core.waiting.has_new)
        else:
            tenant = arrivals[position][1]
            position += 1
            name = tenant if named else ""
            answer = draw.randint(output // 2, output)
            request = Ask(
                tenant=name,
                priority=Priority.NORMAL,
                prompt_tokens=prompt,
                max_tokens=answer,
                choices=1,
                deadline_ns=0,
            )
            try:
                doorman.check(request, core.waiting.standing(name, Priority.NORMAL), now_ns)
            except Overloaded:
                refused[tenant] += 1
                continue
            ids = [draw.randrange(1000) for _ in range(prompt)]
            stop = StopConditions(max_tokens=answer)
            (sequence,) = core.add(ids, SamplingParams(), stop, now_ns, tenant=name)
            owners[sequence.id] = (tenant, sequence)
        while (plan := core.schedule(0, now_ns)) is not None:
            in_flight.append(plan)
        if in_flight and done == math.inf:
            done = now + step_s + token_s * in_flight[0].num_tokens
    light = [s for tenant, s in owners.values() if tenant == "light" and s.first_token_ns]
    return Fairness(
        first_tokens_s=[(s.first_token_ns - s.arrived_ns) / _S for s in light],
        tokens=dict(tokens),
        refused=dict(refused),
    )


def _poisson(draw: random.Random, rate: float, seconds: float) -> Iterator[float]:
    at = draw.expovariate(rate)
    while at < seconds:
        yield at
        at += draw.expovariate(rate)


def _facts(max_sequences: int, length: int) -> ExecutorFacts:
    return ExecutorFacts(
        name="fake",
        model="fake",
        model_digest="fake",
        vocab_size=50_000,
        max_model_len=4096,
        num_blocks=max_sequences * (length // 16 + 2),
        block_size=16,
        max_sequences=max_sequences,
        max_step_tokens=1024,
    )


SHARE_PER_S: Final = 26.0  # half of what the executor of `play` can serve: what each of two tenants may expect


def fairness(factor: float, *, light_per_s: float = 2.0, seconds: float = 60.0) -> dict[str, Fairness]:
    """The light tenant alone; beside one that sends `factor` times its share; both without names, for comparison."""
    both = {"light": light_per_s, "heavy": factor * SHARE_PER_S}
    return {
        "alone": play({"light": light_per_s}, seconds=seconds),
        f"beside one that sends {factor:g} times its share": play(both, seconds=seconds),
        "the same, without tenants": play(both, named=False, seconds=seconds),
    }


def fairness_table(results: dict[str, Fairness]) -> str:
    """The tenants, for RESULTS.md."""
    alone = results["alone"].first_tokens_s
    return markdown(
        ("light tenant", "first token p50 / p99", "against alone", "its requests refused", "tokens light / heavy"),
        [
            (
                name,
                f"{_ms(r.first_tokens_s, 0.5)} / {_ms(r.first_tokens_s, 0.99)} ms",
                " / ".join(f"{quantile(r.first_tokens_s, q) / quantile(alone, q):.2f}" for q in (0.5, 0.99)),
                f"{r.refused.get('light', 0)}",
                f"{r.tokens.get('light', 0)} / {r.tokens.get('heavy', 0)}",
            )
            for name, r in results.items()
        ],
    )


# ---- figures


def quantile(values: Sequence[float], share: float) -> float:
    """The least value that `share` of all do not exceed; not a number where there is none."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)] if ordered else math.nan


def _ms(values: Sequence[float], share: float) -> str:
    return f"{1000 * quantile(values, share):.1f}"


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def main() -> None:
    """Run one of them and print its table."""
    parser = argparse.ArgumentParser(description="What a scheduler does with more than it can serve.")
    commands = parser.add_subparsers(dest="command", required=True)
    one = commands.add_parser("burst", help="many streams at once")
    one.add_argument("--streams", type=int, default=10_000)
    one.add_argument("--step-ms", type=float, default=10)
    one = commands.add_parser("overload", help="more than can be served, for long")
    one.add_argument("--minutes", type=float, default=5)
    one.add_argument("--factor", type=float, default=10)
    one.add_argument("--step-ms", type=float, default=20)
    one.add_argument("--running", type=int, default=32, help="sequences that run at once")
    one = commands.add_parser("fairness", help="one tenant against another, in virtual time")
    one.add_argument("--factor", type=float, default=100)
    one.add_argument("--light", type=float, default=2, help="requests a second of the other; all are about 52")
    one.add_argument("--seconds", type=float, default=60, help="of virtual time")
    options = parser.parse_args()
    if options.command == "burst":
        with servers(step_s=options.step_ms / 1000) as running:
            print(burst_table(options.streams, uvloop.run(burst(running, streams=options.streams))))
    elif options.command == "overload":
        with servers(step_s=options.step_ms / 1000, max_running=options.running) as running:
            test = overload(running, seconds=60 * options.minutes, factor=options.factor, streams=2 * options.running)
            print(overload_table(uvloop.run(test)))
    else:
        print(fairness_table(fairness(options.factor, light_per_s=options.light, seconds=options.seconds)))


if __name__ == "__main__":
    main()
