"""What the gateway costs: the same streams over gRPC and over HTTP, by turns, on the same servers.

Run it with `python -m tests.benchmarks.bench_gateway [--streams 32] [--step-ms 20] [--rounds 5] [--seconds 6]`, and
`--beside FOLDER` for turns of another checkout's gateway, before the same scheduler.

A scheduler, an executor and a gateway run as processes of their own; the executor's model is the fake one, which takes
`--step-ms` for a step, so tokens come at the pace of a real model and what is measured is what lies before it. This
process is the client: every stream asks for an answer of 32 to 96 tokens, reads it and asks for the next: over
gRPC without any client of ours in one turn, over HTTP in the next. Tokens are counted by the scheduler, the same
for both. With all of it on one small machine the client's own work counts too, and it is not the same for both.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import math
import random
import statistics
import tempfile
import time
from collections.abc import Awaitable, Callable
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final

import uvloop
from grpc import aio

from pagewire.answers import Delta
from pagewire.continuation import Continuation
from protos import inference_pb2 as pb
from services.client import status
from services.event_loop import EventLoop
from services.gateway.answers import Answers, Piece
from services.gateway.asked import Asked, Manner
from services.gateway.chat import Chunks
from tests.benchmarks.bench_streaming import METHOD, cpu_s
from tests.e2e import fake_model
from tests.e2e.cluster import cluster
from tests.e2e.gateways import Gateway

PROMPT: Final = 32
TOKENS: Final = (32, 96)  # of an answer, as chance has it: so that streams do not all begin anew at once
WARM_UP_S: Final = 1.5
_GOLDEN: Final = 0.6180339887  # its multiples fill a step evenly, with less noise than chance

BESIDE: Final = "HTTP beside"  # another checkout's

Ask = Callable[[list[int], Callable[[], None]], Awaitable[None]]
"""One answer to a prompt; calls what it is given when the first token is there."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Turn:
    """One way of asking, for a while."""

    way: str
    tokens_per_s: float
    ttft_mean_ms: float
    ttft_p50_ms: float
    ttft_p99_ms: float
    gateway_us: float  # CPU time of the gateway's process, a token
    scheduler_us: float  # of the scheduler's
    client_us: float  # of this one's


def over_grpc(channel: aio.Channel) -> Ask:
    """The API itself, without a client of ours."""
    stream = channel.unary_stream(
        METHOD,
        request_serializer=pb.GenerateStreamRequest.SerializeToString,
        response_deserializer=pb.GenerateStreamResponse.FromString,
    )

    async def ask(prompt: list[int], first: Callable[[], None]) -> None:
        request = pb.GenerateStreamRequest(
            token_ids=pb.TokenIds(ids=prompt),
            sampling=pb.SamplingParams(temperature=0.0),
            stopping=pb.StopConditions(max_tokens=random.randint(*TOKENS), ignore_eos=True),
        )
        begun = False
        async for message in stream(request):
            if not begun and message.WhichOneof("event") == "delta":
                begun = True
                first()

    return ask


def over_http(address: str) -> Ask:
    """OpenAI's API, by hand: a connection for each stream, kept for its next answers."""
    host, _, port = address.rpartition(":")
    connections: list[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = []

    async def ask(prompt: list[int], first: Callable[[], None]) -> None:
        reader, writer = connections.pop() if connections else await asyncio.open_connection(host, int(port))
        asked = {
            "prompt": prompt,
            "max_tokens": random.randint(*TOKENS),
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
        }
        body = json.dumps(asked).encode()
        head = (
            f"POST /v1/completions HTTP/1.1\r\nhost: {address}\r\ncontent-type: application/json\r\n"
            f"accept: text/event-stream\r\ncontent-length: {len(body)}\r\n\r\n"
        )
        writer.write(head.encode() + body)
        begun = False
        while (line := await reader.readline()) != b"data: [DONE]\n":
            assert line, "the gateway ended the connection"
            if not begun and line.startswith(b"data: "):
                begun = True
                first()
        await reader.readuntil(b"0\r\n\r\n")
        connections.append((reader, writer))

    return ask


async def take_turn(
    way: str, ask: Ask, *, streams: int, seconds: float, admin: str, pids: tuple[int, int], spread_s: float = 0.0
) -> Turn:
    """Ask in this way for a while; each stream waits up to `spread_s` before it asks again."""
    ttft_s: list[float] = []
    measuring = False

    phases = itertools.accumulate(itertools.repeat(_GOLDEN), lambda phase, step: (phase + step) % 1)

    async def ask_for_ever() -> None:
        while True:
            if spread_s:
                await asyncio.sleep(next(phases) * spread_s)
            began = time.perf_counter()
            counts = measuring

            def first(began: float = began, counts: bool = counts) -> None:
                if counts:
                    ttft_s.append(time.perf_counter() - began)

            await ask(random.choices(range(256), k=PROMPT), first)

    asking = [asyncio.create_task(ask_for_ever()) for _ in range(streams)]
    try:
        await _while_well(asking, WARM_UP_S)
        measuring = True
        began, tokens = time.monotonic(), (await status(admin)).scheduler.output_tokens
        cpu = [sum(cpu_s(pid)) for pid in pids] + [time.process_time()]
        await _while_well(asking, seconds)
        tokens, wall_s = (await status(admin)).scheduler.output_tokens - tokens, time.monotonic() - began
        cpu = [
            after - before
            for after, before in zip([*(sum(cpu_s(pid)) for pid in pids), time.process_time()], cpu, strict=True)
        ]
    finally:
        for task in asking:
            task.cancel()
        await asyncio.gather(*asking, return_exceptions=True)
    ordered = sorted(ttft_s)
    return Turn(
        way=way,
        tokens_per_s=tokens / wall_s,
        ttft_mean_ms=1e3 * statistics.mean(ordered) if ordered else math.nan,
        ttft_p50_ms=1e3 * statistics.median(ordered) if ordered else math.nan,  # too little time for so many streams
        ttft_p99_ms=1e3 * ordered[round(0.99 * (len(ordered) - 1))] if ordered else math.nan,
        gateway_us=1e6 * cpu[0] / tokens,
        scheduler_us=1e6 * cpu[1] / tokens,
        client_us=1e6 * cpu[2] / tokens,
    )


async def _while_well(tasks: list[asyncio.Task[None]], seconds: float) -> None:
    done, _ = await asyncio.wait(tasks, timeout=seconds, return_when=asyncio.FIRST_EXCEPTION)
    for task in done:
        task.result()


def serialising_us(count: int = 20_000) -> dict[str, float]:
    """Microseconds that an event of a stream takes: put together from text, as most are, and by way of objects."""
    request = pb.GenerateStreamRequest(request_id="0123456789abcdef01234567")
    request.sampling.seed = 7

    class Nowhere:
        def ask(self, request: pb.GenerateStreamRequest, key: str) -> object:
            class Stream:
                continuation = Continuation(request)

            return Stream()

    asked = Asked(requests=[request], manner=Manner())
    found: dict[str, float] = {}
    for name, has_ids in (("from text, with an id", True), ("from text, without", False)):
        answers = Answers(Nowhere(), [request], "", created=1_800_000_000, has_ids=has_ids)  # type: ignore[arg-type]
        told = answers._told[0][0]
        chunks = Chunks(answers, asked, "chatcmpl", "chunk")
        piece = Piece(0, " word", (42,), (), None)
        began = time.process_time()
        for number in range(count):
            told.add(Delta(choice=0, index=number, token_ids=(42,), text=" word"), 0, b"")
            chunks.plain(piece)
        found[name] = 1e6 * (time.process_time() - began) / count
        choice = {"index": 0, "delta": {"content": " word"}, "logprobs": None, "finish_reason": None}
        began = time.process_time()
        for _ in range(count):
            chunks.chunk([choice])
        found[name.replace("text", "objects")] = 1e6 * (time.process_time() - began) / count
    return found


async def compare(
    model: Path,
    folder: Path,
    *,
    streams: int,
    step_ms: float,
    rounds: int,
    seconds: float,
    beside: Path | None = None,
    spread: bool = False,
) -> list[Turn]:
    """Turns of each way, one after the other; of the two gateways either is first in every second round."""
    turns: list[Turn] = []
    with ExitStack() as stack:
        running = stack.enter_context(cluster(model, folder, executors=0))
        running.start_executor(f"--fake-step-s={step_ms / 1000}", "--num-blocks=32768")
        gateways = {"HTTP": stack.enter_context(Gateway(running.address, folder / "gateway.log"))}
        if beside is not None:
            gateways[BESIDE] = stack.enter_context(Gateway(running.address, folder / "beside.log", root=beside))
        async with aio.insecure_channel(running.address) as channel:
            ways = {"gRPC": over_grpc(channel)} | {way: over_http(gateway.http) for way, gateway in gateways.items()}
            for number in range(rounds):
                for way in ("gRPC", *(reversed(gateways) if number % 2 else gateways)):
                    gateway = gateways.get(way, gateways["HTTP"])
                    turns.append(
                        await take_turn(
                            way,
                            ways[way],
                            streams=streams,
                            seconds=seconds,
                            admin=running.admin,
                            pids=(gateway.process.popen.pid, running.scheduler.popen.pid),
                            spread_s=step_ms / 1000 if spread else 0.0,
                        )
                    )
                    print(_line(turns[-1]), flush=True)
    return turns


def _line(turn: Turn) -> str:
    return (
        f"{turn.way}: {turn.tokens_per_s:8.1f} tokens/s, first token {turn.ttft_mean_ms:6.2f} ms (mean), "
        f"{turn.ttft_p50_ms:6.2f} (p50), {turn.ttft_p99_ms:6.2f} (p99); µs of CPU a token: "
        f"gateway {turn.gateway_us:5.1f}, scheduler {turn.scheduler_us:5.1f}, client {turn.client_us:5.1f}"
    )


def _summary(turns: list[Turn]) -> str:
    def median(way: str, field: str) -> float:
        return float(statistics.median(getattr(turn, field) for turn in turns if turn.way == way))

    share = median("HTTP", "tokens_per_s") / median("gRPC", "tokens_per_s")

    def later(way: str) -> str:
        found = (median(way, field) - median("gRPC", field) for field in ("ttft_p50_ms", "ttft_mean_ms"))
        return "{:+.2f} ms later (by means {:+.2f})".format(*found)

    told = f"HTTP has {share:.1%} of the tokens a second, and its first token comes {later('HTTP')}: medians of turns"
    if any(turn.way == BESIDE for turn in turns):
        here, there = median("HTTP", "gateway_us"), median(BESIDE, "gateway_us")
        told += f"\nthe gateway takes {here:.1f} µs of CPU a token, the other checkout's {there:.1f} (medians)"
        told += f"\nthe other checkout's first token comes {later(BESIDE)}"
    return told


def main() -> None:
    """Measure, and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--streams", type=int, default=32)
    parser.add_argument("--step-ms", type=float, default=20.0)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=6.0)
    parser.add_argument("--beside", type=Path, default=None, metavar="FOLDER")
    parser.add_argument("--spread", action="store_true", help="wait up to a step before asking again")
    parser.add_argument("--json", type=Path, default=None)
    asked = parser.parse_args()
    for name, us in serialising_us().items():
        print(f"an event {name}: {us:.1f} µs")
    with tempfile.TemporaryDirectory() as folder:
        model = fake_model.write(Path(folder, "fake"))
        turns = uvloop.run(
            compare(
                model,
                Path(folder),
                streams=asked.streams,
                step_ms=asked.step_ms,
                rounds=asked.rounds,
                seconds=asked.seconds,
                beside=asked.beside,
                spread=asked.spread,
            ),
            loop_factory=EventLoop,
        )
    print(_summary(turns))
    if asked.json:
        told = {"asked": vars(asked), "turns": [asdict(turn) for turn in turns]}
        asked.json.write_text(json.dumps(told, indent=1, default=str))


if __name__ == "__main__":
    main()
