"""What a scheduler does with more than it can serve: who is served, who is refused, how soon, and what it costs.

    python -m tests.faults.load burst      [--streams 10000]               that many streams opened at once
    python -m tests.faults.load overload   [--minutes 5] [--factor 10]     more than can be served, for long
    python -m tests.faults.load fairness   [--factor 100]                  one tenant against another, in virtual time

Scheduler and executor are processes on loopback; the executor's model is the fake one, whose steps take as long as they
are told, or with `overload --model smollm2` a real one. This process is all the clients, and shares the machine with
both. Each command prints a Markdown table.
"""

from __future__ import annotations

import argparse
import asyncio
import math
import os
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
from services.status import DETAILS_KEY, PUSHBACK_KEY, from_rpc_error
from tests.benchmarks.bench_scheduler import Answerer
from tests.benchmarks.bench_streaming import resident_mib
from tests.e2e import fake_model
from tests.e2e.cluster import Cluster, cluster
from tests.faults.raw_client import DEADLINE_EXCEEDED, OK, RESOURCE_EXHAUSTED, Call, Connections, messages_of

METHOD: Final = "/pagewire.v1.InferenceService/GenerateStream"
_S: Final = 1_000_000_000

_BELOW_128: Final = bytes(i % 128 for i in range(256))

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
def servers(*flags: str, step_s: float, max_running: int = 256, model: str = "") -> Iterator[Cluster]:
    """A scheduler and an executor, with the fake model or `model`."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(model) if model else fake_model.write(Path(folder) / "fake")
        with cluster(path, Path(folder), executors=0, flags=flags) as running:
            size = f"--max-sequences={max_running}"
            if model:
                running.start_executor(size, fake=False)
            else:
                running.start_executor(f"--fake-step-s={step_s}", "--num-blocks=16384", size)
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
    late_s: list[float]  # how late each request was sent
    cores: dict[str, float]  # of each process, the share of a core that it took


def overload(
    running: Cluster,
    *,
    seconds: float,
    factor: float,
    peak_s: float = 15.0,
    streams: int = 64,
    deadline_s: float = 5.0,
    prompt: int = 32,
    output: int = 32,
    check: bool = True,
) -> Overload:
    """Measure the peak with `streams` that ask again and again; then send `factor` times as many requests a second.

    Whatever comes back, the next request is sent when it is due. With `check` the tokens of some answers are looked at,
    which must be the fake model's.
    """
    request = Request(prompt, output)
    with Connections(running.address, METHOD, 4) as connections:
        peak = _peak(connections, request, seconds=peak_s, streams=streams, output=output)
    tally, draw, rate = Tally(), random.Random(0), factor * peak / output
    late_s: list[float] = []
    rss: list[float] = []
    pids = {
        "clients": os.getpid(),
        "scheduler": running.scheduler.popen.pid,
        "executor": running.executors[0].popen.pid,
    }
    with Connections(running.address, METHOD, 4, timeout_s=deadline_s) as connections:

        def ended(call: Call) -> None:
            _count(tally, call, prompt, output)

        began = due = time.monotonic()
        before = {name: _cpu_s(pid) for name, pid in pids.items()}
        warm_s = min(deadline_s, seconds / 4)
        tokens, warm_at = 0, 0.0  # after the line has filled
        sent = 0
        while (now := time.monotonic()) < began + seconds:
            if not warm_at and now >= began + warm_s:
                tokens, warm_at = tally.tokens, now
            if now - began >= len(rss) * seconds / 20:
                rss.append(resident_mib(running.scheduler.popen.pid))
            while due <= now:
                late_s.append(now - due)
                keep = check and sent % 20 == 0
                connections.all[sent % 4].start(request.draw(), keep=keep)
                sent += 1
                due += draw.expovariate(rate)
            connections.poll(ended, min(due - time.monotonic(), 0.1))
        goodput = (tally.tokens - tokens) / (time.monotonic() - warm_at)
        took = time.monotonic() - began
        cores = {name: (_cpu_s(pid) - before[name]) / took for name, pid in pids.items()}
        rss.append(resident_mib(running.scheduler.popen.pid))
        while connections.num_open:
            connections.poll(ended, 0.1)
    return Overload(
        peak=peak, goodput=goodput, offered_per_s=rate, tally=tally, rss_mib=rss, late_s=late_s, cores=cores
    )


class Request:
    """A request, serialised once; its prompt is drawn anew each time, so that no answer is cached."""

    def __init__(self, prompt: int, output: int) -> None:
        message = pb.GenerateStreamRequest(
            token_ids=pb.TokenIds(ids=[1] * prompt),
            sampling=pb.SamplingParams(temperature=0.0),
            stopping=pb.StopConditions(max_tokens=output, ignore_eos=True),
        )
        self._before, self._ids, self._after = message.SerializeToString().partition(b"\1" * prompt)
        assert self._ids, "each token below 128 is a byte of its own"

    def draw(self) -> bytes:
        """It, with another prompt."""
        return self._before + random.randbytes(len(self._ids)).translate(_BELOW_128) + self._after


def _count(tally: Tally, call: Call, prompt: int, output: int) -> None:
    """What became of the call. A refusal says when to come back, in its trailers; anything less is something else."""
    seconds = call.ended_s - call.began_s
    if call.status == OK:
        tally.ends[SERVED] += 1
        tally.tokens += output  # which is what it asked for: nothing else ends an answer
        tally.first_tokens_s.append(call.second_s - call.began_s)  # after the first message, which has no token
        if call.messages is not None:
            messages = [pb.GenerateStreamResponse.FromString(message) for message in messages_of(call)]
            ids = [id for message in messages for id in message.delta.token_ids]
            assert ids == list(range(prompt, prompt + output)), "an answer is not what it must be"
    elif call.status == RESOURCE_EXHAUSTED:
        tally.refusals_s.append(seconds)
        pushback = call.trailers.get(PUSHBACK_KEY.encode(), b"0")
        told = DETAILS_KEY.encode() in call.trailers and int(pushback) > 0
        tally.ends[REFUSED if told else "refused without a time to come back"] += 1
    elif call.status == DEADLINE_EXCEEDED:
        tally.ends[EXPIRED] += 1
    else:
        tally.ends[f"status {call.status}"] += 1


def _cpu_s(pid: int) -> float:
    """Time that a process had a core, in seconds."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _peak(connections: Connections, request: Request, *, seconds: float, streams: int, output: int) -> float:
    """Tokens a second of complete answers, as many streams ask as run at once and as many again wait."""
    served = 0

    def ended(call: Call) -> None:
        nonlocal served
        assert call.status == OK, f"status {call.status} at the peak"
        served += 1

    def run(until: float) -> None:
        while (now := time.monotonic()) < until:
            for connection in connections.all:
                while len(connection.calls) < streams // len(connections.all):
                    connection.start(request.draw())
            connections.poll(ended, min(until - now, 0.1))

    run(time.monotonic() + seconds / 4)
    served, began = 0, time.monotonic()
    run(began + seconds)
    peak = served * output / (time.monotonic() - began)
    assert peak > 0, "nothing was served"
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
            ("refusal p50 / p99", _both(tally.refusals_s)),
            ("first token of those served p50 / p99", _both(tally.first_tokens_s)),
            ("sent late by p50 / p99", _both(result.late_s)),
            ("cores taken", ", ".join(f"{name} {share:.2f}" for name, share in result.cores.items())),
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


def _both(values: Sequence[float]) -> str:
    return f"{_ms(values, 0.5)} / {_ms(values, 0.99)} ms"


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
    one.add_argument("--deadline-s", type=float, default=5)
    one.add_argument("--model", default="", help="smollm2, or whatever --model of the server takes; the fake one")
    one = commands.add_parser("fairness", help="one tenant against another, in virtual time")
    one.add_argument("--factor", type=float, default=100)
    one.add_argument("--light", type=float, default=2, help="requests a second of the other; all are about 52")
    one.add_argument("--seconds", type=float, default=60, help="of virtual time")
    options = parser.parse_args()
    if options.command == "burst":
        with servers(step_s=options.step_ms / 1000) as running:
            print(burst_table(options.streams, uvloop.run(burst(running, streams=options.streams))))
    elif options.command == "overload":
        with servers(step_s=options.step_ms / 1000, max_running=options.running, model=options.model) as running:
            result = overload(
                running,
                seconds=60 * options.minutes,
                factor=options.factor,
                streams=2 * options.running,
                deadline_s=options.deadline_s,
                check=not options.model,
            )
            print(overload_table(result))
    else:
        print(fairness_table(fairness(options.factor, light_per_s=options.light, seconds=options.seconds)))


if __name__ == "__main__":
    main()
