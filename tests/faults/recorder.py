"""Clients that write down all they hear, and when. One history serves the checker, the figures and a later doubt."""

from __future__ import annotations

import bisect
import itertools
import json
import math
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, Self

from grpc import aio

from pagewire import AsyncClient, AsyncStream
from protos import inference_pb2 as pb
from protos import inference_pb2_grpc
from services.grpc_options import client_options
from tests.faults.checker import Expected, StreamChecker


class Source(Protocol):
    """What a recorder listens to: one way of reading an answer."""

    def stream(self, request: pb.GenerateStreamRequest) -> AsyncGenerator[pb.GenerateStreamResponse, None]:
        """The messages of one answer. Raises what ends it badly."""
        ...

    async def close(self) -> None:
        """Listen no more."""
        ...


class ClientSource:
    """The Python client as its users have it, which resumes by itself: to them a dead server is a pause."""

    def __init__(self, addresses: str) -> None:
        self._client = AsyncClient(addresses)

    async def stream(self, request: pb.GenerateStreamRequest) -> AsyncGenerator[pb.GenerateStreamResponse, None]:
        """What its user gets, in the words of the API; the client keeps the beginning to itself."""
        yield pb.GenerateStreamResponse(prompt=pb.PromptInfo(prompt_tokens=len(request.token_ids.ids)))
        told: set[int] = set()
        async with self._client.send(request) as stream:
            async for delta in stream:
                for message in _finishes(stream, told):
                    yield message
                told_now = pb.Delta(choice=delta.choice, index=delta.index, token_ids=delta.token_ids, text=delta.text)
                yield pb.GenerateStreamResponse(delta=told_now)
            for message in _finishes(stream, told):
                yield message

    async def close(self) -> None:
        await self._client.close()


class RawSource:
    """The generated stub, as any language has it: a server that dies is the end of the stream."""

    def __init__(self, address: str) -> None:
        self._channel = aio.insecure_channel(address, options=client_options())
        self._stub: inference_pb2_grpc.InferenceServiceAsyncStub = inference_pb2_grpc.InferenceServiceStub(
            self._channel
        )

    async def stream(self, request: pb.GenerateStreamRequest) -> AsyncGenerator[pb.GenerateStreamResponse, None]:
        """The messages as they come."""
        async for message in self._stub.GenerateStream(request):
            yield message

    async def close(self) -> None:
        await self._channel.close()


def _finishes(stream: AsyncStream, told: set[int]) -> list[pb.GenerateStreamResponse]:
    """The ends that are known since."""
    messages: list[pb.GenerateStreamResponse] = []
    for choice, finish in stream.finishes.items():
        if choice not in told:
            told.add(choice)
            usage = pb.Usage(prompt_tokens=finish.usage.prompt_tokens, completion_tokens=finish.usage.completion_tokens)
            reason = pb.FinishReason.Value(f"FINISH_REASON_{finish.reason.name}")
            message = pb.Finish(
                choice=choice, reason=reason, matched_stop=finish.matched_stop, usage=usage, exact=finish.exact
            )
            messages.append(pb.GenerateStreamResponse(finish=message))
    return messages


@dataclass(slots=True)
class Heard:
    """When one stream heard something. Seconds since the beginning of the history."""

    times: list[float]  # the first is when it was asked for
    ended_s: float = math.inf

    def is_open_at(self, now_s: float) -> bool:
        """It was asked for, and its end had not come."""
        return self.times[0] <= now_s < self.ended_s

    def words_since(self, now_s: float) -> int:
        """How often it heard something after that."""
        return len(self.times) - bisect.bisect_right(self.times, now_s)


class History:
    """Everything that happened, one JSON object a line, in seconds since the beginning."""

    def __init__(self, file: Path) -> None:
        self._began_s = time.monotonic()
        self._out = file.open("w")
        self.file = file
        self.num_exact = 0  # choices whose end said that an undisturbed run gives the same, bit for bit
        self.num_inexact = 0
        self.token_times: list[float] = []  # one for each token of any stream
        self.heard: dict[str, Heard] = {}  # those that were not forgotten

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._out.close()

    @property
    def now_s(self) -> float:
        """Seconds since the beginning."""
        return time.monotonic() - self._began_s

    def write(self, event: str, **facts: Any) -> float:
        """Add a line; returns its time."""
        now_s = self.now_s
        line = {"t": round(now_s, 4), "event": event, **facts}
        self._out.write(json.dumps(line, separators=(",", ":")) + "\n")
        return now_s

    def open(self, stream: str, **facts: Any) -> None:
        """A stream is asked for."""
        self.heard[stream] = Heard([self.write("open", stream=stream, **facts)])

    def end(self, stream: str, **facts: Any) -> None:
        """It has ended, well or badly."""
        self.heard[stream].ended_s = self.write("end", stream=stream, **facts)

    def hear(self, stream: str, message: pb.GenerateStreamResponse) -> None:
        """One message of a stream."""
        kind = message.WhichOneof("event")
        if kind == "prompt":
            return
        if kind == "delta":
            delta = message.delta
            ids = list(delta.token_ids)
            at = self.write("delta", stream=stream, choice=delta.choice, index=delta.index, ids=ids, text=delta.text)
            self.token_times.extend([at] * len(ids))
        else:
            finish = message.finish
            reason = pb.FinishReason.Name(finish.reason)
            at = self.write("finish", stream=stream, choice=finish.choice, reason=reason, exact=finish.exact)
            self.num_exact += finish.exact
            self.num_inexact += not finish.exact
        self.heard[stream].times.append(at)

    def open_at(self, now_s: float) -> list[Heard]:
        """The streams that were open then."""
        return [heard for heard in self.heard.values() if heard.is_open_at(now_s)]

    def tokens_between(self, start_s: float, stop_s: float) -> int:
        """Tokens that all streams together heard in that time."""
        return bisect.bisect_right(self.token_times, stop_s) - bisect.bisect_left(self.token_times, start_s)

    def longest_pause_s(self, start_s: float, stop_s: float) -> float:
        """The longest time without a word of any stream that was open then, of pauses that touch that time.

        Waiting for the first word is one, and so is a silence that lasts at `stop_s`.
        """
        longest = 0.0
        for heard in self.heard.values():
            if heard.times[0] > stop_s or heard.ended_s < start_s:
                continue
            times = heard.times
            first = max(0, bisect.bisect_left(times, start_s) - 1)
            around = times[first : bisect.bisect_right(times, stop_s) + 1]
            if heard.ended_s > stop_s and around[-1] < stop_s:
                around.append(stop_s)
            longest = max([longest, *(later - sooner for sooner, later in itertools.pairwise(around))])
        return longest

    def forget(self, before_s: float) -> None:
        """Keep nothing in memory of streams that had ended then."""
        self.heard = {name: heard for name, heard in self.heard.items() if heard.ended_s >= before_s}
        del self.token_times[: bisect.bisect_left(self.token_times, before_s)]


async def record(
    history: History,
    source: Source,
    name: str,
    request: pb.GenerateStreamRequest,
    expected: list[Expected],
) -> int:
    """Read one answer to its end and check it all the way. Returns its tokens. Raises Violation, or what ended it."""
    num_prompt = len(request.token_ids.ids)
    checker = StreamChecker(name, expected, num_prompt=num_prompt)
    history.open(name, prompt=list(request.token_ids.ids), max_tokens=request.stopping.max_tokens)
    try:
        async with aclosing(source.stream(request)) as messages:
            async for message in messages:
                history.hear(name, message)
                checker.hear(message)
        checker.end()
    finally:
        history.end(name, complete=checker.is_complete)
    return checker.num_tokens
