"""What streaming costs the scheduler's process: CPU time a token, messages a token, memory under load.

Run it with `python -m tests.benchmarks.bench_streaming [--streams 1,32,128] [--step-ms 0,30] [--minutes 5]`.

A scheduler and an executor run as processes of their own; the executor's model is the fake one, which costs nothing
that counts here and takes `--step-ms` for a step. This process is the client: every stream asks for an answer, reads
it to its end, checks every token and asks for the next. At 0 ms the scheduler is never idle, so tokens share messages;
at 30 ms it is idle most of the time, as behind a real model, and every token goes out alone and at once. With `--real`
the executor computes the default model on all cores: what a process costs that finds its caches full of weights.
`--minutes` prints the memory of both processes every quarter of a minute; with `--real`, of a real executor.
`--structured 5` takes five turns without and five with a JSON schema for every answer, one after the other: with
`--real`, what structured output costs the whole server.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Final

import uvloop
from grpc import aio

from protos import inference_pb2 as pb
from protos import monitoring_pb2
from services.client import status
from services.event_loop import EventLoop
from services.model_store import find
from tests.e2e import fake_model
from tests.e2e.cluster import Cluster, cluster

METHOD: Final = "/pagewire.v1.InferenceService/GenerateStream"
PROMPT: Final = 32
# an answer of it does not end before it has thousands of tokens
SCHEMA: Final = json.dumps(
    {
        "type": "array",
        "minItems": 1000,
        "items": {
            "type": "object",
            "properties": {"name": {"type": "string"}, "age": {"type": "integer"}, "kind": {"enum": ["one", "other"]}},
            "required": ["name", "age", "kind"],
            "additionalProperties": False,
        },
    }
)
_TICKS_PER_S: Final = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """One measurement. With more than one connection, streams take turns in choosing one."""

    streams: int
    step_ms: float | None  # None: a real model
    max_tokens: int = 256
    connections: int = 1
    structured: bool = False
    warm_up_s: float = 2.0
    seconds: float = 8.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """What one load cost. CPU times in microseconds."""

    streams: int
    step_ms: float | None
    connections: int
    structured: bool
    tokens_per_s: float
    messages_per_token: float
    scheduler_user_us: float  # a token
    scheduler_system_us: float  # a token
    scheduler_share: float  # of one core
    executor_us: float  # a token
    executor_idle: float  # share of its time between steps
    client_us: float  # a token


class Tally:
    """What all streams received so far."""

    def __init__(self) -> None:
        self.tokens = 0
        self.messages = 0
        self.answers = 0


async def ask_for_ever(channel: aio.Channel, load: Load, tally: Tally) -> None:
    """One stream: answer after answer, each token checked against what the fake model must have said."""
    fake = load.step_ms is not None
    stream = channel.unary_stream(
        METHOD,
        request_serializer=pb.GenerateStreamRequest.SerializeToString,
        response_deserializer=pb.GenerateStreamResponse.FromString,
    )
    while True:
        request = pb.GenerateStreamRequest(
            token_ids=pb.TokenIds(ids=random.choices(range(256), k=PROMPT)),
            sampling=pb.SamplingParams(
                temperature=0.0, structured=pb.StructuredOutput(json_schema=SCHEMA) if load.structured else None
            ),
            stopping=pb.StopConditions(max_tokens=load.max_tokens, ignore_eos=not load.structured),
        )
        count = 0
        async for message in stream(request):
            kind = message.WhichOneof("event")
            if kind == "delta":
                tokens = list(message.delta.token_ids)
                first = PROMPT + count
                assert message.delta.index == count, f"index {message.delta.index} after {count} tokens"
                assert not fake or tokens == list(range(first, first + len(tokens))), f"{tokens} after {count} tokens"
                count += len(tokens)
                tally.tokens += len(tokens)
                tally.messages += 1
        assert count == load.max_tokens, f"{count} of {load.max_tokens} tokens"
        tally.answers += 1


@contextmanager
def servers(model: Path, step_ms: float | None) -> Iterator[Cluster]:
    """A scheduler with one executor: a fake one whose steps take so long, or a real one."""
    with tempfile.TemporaryDirectory() as folder, cluster(model, Path(folder), executors=0) as running:
        if step_ms is None:
            running.start_executor(fake=False)
        else:
            running.start_executor(f"--fake-step-s={step_ms / 1000}", "--num-blocks=16384")
        yield running


async def measure(running: Cluster, load: Load) -> Report:
    """Run a load on servers that are up."""
    scheduler, executor = running.scheduler.popen.pid, running.executors[0].popen.pid
    tally = Tally()
    channels = [
        aio.insecure_channel(running.address, options=[("grpc.use_local_subchannel_pool", 1)])
        for _ in range(load.connections)
    ]
    streams = [
        asyncio.create_task(ask_for_ever(channels[i % load.connections], load, tally)) for i in range(load.streams)
    ]
    try:
        await _while_well(streams, load.warm_up_s)
        began = time.monotonic()
        tokens, messages = tally.tokens, tally.messages
        before = [cpu_s(pid) for pid in (scheduler, executor, os.getpid())]
        was = await _executor_status(running.admin)
        await _while_well(streams, load.seconds)
        tokens, messages, seconds = tally.tokens - tokens, tally.messages - messages, time.monotonic() - began
        after = [cpu_s(pid) for pid in (scheduler, executor, os.getpid())]
        now = await _executor_status(running.admin)
    finally:
        for stream in streams:
            stream.cancel()
        await asyncio.gather(*streams, return_exceptions=True)
        for channel in channels:
            await channel.close()
    compute_ns, idle_ns = now.compute_ns - was.compute_ns, now.idle_ns - was.idle_ns
    user, system = (after[0][i] - before[0][i] for i in range(2))
    return Report(
        streams=load.streams,
        step_ms=load.step_ms,
        connections=load.connections,
        structured=load.structured,
        tokens_per_s=tokens / seconds,
        messages_per_token=messages / tokens,
        scheduler_user_us=1e6 * user / tokens,
        scheduler_system_us=1e6 * system / tokens,
        scheduler_share=(user + system) / seconds,
        executor_us=1e6 * (sum(after[1]) - sum(before[1])) / tokens,
        executor_idle=idle_ns / (compute_ns + idle_ns),
        client_us=1e6 * (sum(after[2]) - sum(before[2])) / tokens,
    )


async def _executor_status(admin: str) -> monitoring_pb2.ExecutorStatus:
    return (await status(admin)).executors[0]


async def _while_well(streams: list[asyncio.Task[None]], seconds: float) -> None:
    """Wait; raise what a stream raised."""
    done, _ = await asyncio.wait(streams, timeout=seconds, return_when=asyncio.FIRST_EXCEPTION)
    for stream in done:
        stream.result()


def cpu_s(pid: int) -> tuple[float, float]:
    """User and system time of a process so far, all its threads."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return int(fields[11]) / _TICKS_PER_S, int(fields[12]) / _TICKS_PER_S


def resident_mib(pid: int) -> float:
    """Resident memory of a process."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / (1 << 20)


async def watch_memory(running: Cluster, load: Load, minutes: float, every_s: float = 15.0) -> None:
    """Print the memory of each process while the load runs."""
    pids = {"scheduler": running.scheduler.popen.pid, "executor": running.executors[0].popen.pid}
    tally = Tally()
    async with aio.insecure_channel(running.address) as channel:
        streams = [asyncio.create_task(ask_for_ever(channel, load, tally)) for _ in range(load.streams)]
        began = time.monotonic()
        print(f"{'s':>6} {'answers':>9} {'tokens':>11}  " + "  ".join(f"{name + ' MiB':>14}" for name in pids))
        while (elapsed := time.monotonic() - began) < 60 * minutes:
            sizes = "  ".join(f"{resident_mib(pid):14.1f}" for pid in pids.values())
            print(f"{elapsed:6.0f} {tally.answers:9} {tally.tokens:11}  {sizes}", flush=True)
            await _while_well(streams, every_s)
        for stream in streams:
            stream.cancel()
        await asyncio.gather(*streams, return_exceptions=True)


_COLUMNS: Final = (
    ("streams", "streams", "d"),
    ("step ms", "step_ms", "g"),
    ("conns", "connections", "d"),
    ("schema", "structured", "d"),
    ("tokens/s", "tokens_per_s", ".0f"),
    ("messages/token", "messages_per_token", ".3f"),
    ("user µs/token", "scheduler_user_us", ".1f"),
    ("system µs/token", "scheduler_system_us", ".1f"),
    ("share of a core", "scheduler_share", ".3f"),
    ("executor µs/token", "executor_us", ".1f"),
    ("executor idle", "executor_idle", ".1%"),
    ("client µs/token", "client_us", ".1f"),
)


def _line(report: Report) -> str:
    values = [(head, getattr(report, field), form) for head, field, form in _COLUMNS]
    return "  ".join(("real" if value is None else f"{value:{form}}").rjust(len(head)) for head, value, form in values)


def _numbers(text: str) -> list[float]:
    return [float(part) for part in text.split(",")]


def main() -> None:
    """Print a line for each load; write all numbers where asked."""
    parser = argparse.ArgumentParser(description="What streaming costs the scheduler's process.")
    parser.add_argument("--streams", type=_numbers, default=[1, 32, 128], help="streams at once, e.g. 1,32,128")
    parser.add_argument("--step-ms", type=_numbers, default=[0, 30], help="what a step of the fake model takes")
    parser.add_argument("--real", action="store_true", help="compute the model instead")
    parser.add_argument("--connections", type=int, default=1, help="connections that the streams share")
    parser.add_argument("--max-tokens", type=int, default=256, help="length of each answer")
    parser.add_argument("--seconds", type=float, default=8.0, help="measured time of each load")
    parser.add_argument("--structured", type=int, default=0, help="turns of each load without and with a JSON schema")
    parser.add_argument("--minutes", type=float, default=0, help="instead, watch memory for so long")
    parser.add_argument("--model", default="smollm2", help="whose tokenizer is used; a tiny one where it is not here")
    parser.add_argument("--json", type=Path, help="write all numbers to this file")
    options = parser.parse_args()
    reports: list[Report] = []
    with tempfile.TemporaryDirectory() as folder:
        model = find(options.model) or fake_model.write(Path(folder) / "fake")
        if options.minutes:
            step_ms = None if options.real else options.step_ms[0]
            load = Load(streams=int(options.streams[0]), step_ms=step_ms, max_tokens=options.max_tokens)
            with servers(model, load.step_ms) as running:
                uvloop.run(watch_memory(running, load, options.minutes), loop_factory=EventLoop)
            return
        print(f"tokenizer of {model.name}; the scheduler's CPU time, client and executor on the same cores")
        print("  ".join(head for head, _, _ in _COLUMNS))
        for step_ms in [None] if options.real else options.step_ms:
            with servers(model, step_ms) as running:
                turns = [False, True] * options.structured or [False]
                for count, structured in product(options.streams, turns):
                    load = Load(
                        streams=int(count),
                        step_ms=step_ms,
                        max_tokens=options.max_tokens,
                        connections=min(options.connections, int(count)),
                        structured=structured,
                        seconds=options.seconds,
                    )
                    reports.append(uvloop.run(measure(running, load), loop_factory=EventLoop))
                    print(_line(reports[-1]), flush=True)
    if options.json:
        options.json.write_text(json.dumps([asdict(report) for report in reports], indent=2) + "\n")


if __name__ == "__main__":
    main()
