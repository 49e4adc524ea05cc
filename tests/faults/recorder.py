"""Clients that write down all they hear, and when. One history serves the checker, the figures and a later doubt."""

from __future__ import annotations

import bisect
import itertools
import json
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, Protocol, Self

from protos import inference_pb2 as pb
from protos import inference_pb2_grpc
from services.grpc_options import client_options
from tests.faults.checker import Expected, StreamChecker


class Source(Protocol):
    """What a recorder listens to: the public API as it is, or a client that resumes by itself."""

    def stream(self, request: pb.GenerateStreamRequest) -> AsyncIterator[pb.GenerateStreamResponse]:
        """The messages of one answer. Raises what ends it badly."""
        ...


class RawSource:
    """The generated stub, as any language has it."""

    def __init__(self, address: str) -> None:
        from grpc import aio  # noqa: PLC0415 - who only checks a history needs no gRPC

        self._channel = aio.insecure_channel(address, options=client_options())
        self._stub = inference_pb2_grpc.InferenceServiceStub(self._channel)

    async def stream(self, request: pb.GenerateStreamRequest) -> AsyncIterator[pb.GenerateStreamResponse]:
        async for message in self._stub.GenerateStream(request):
            yield message

    async def close(self) -> None:
        await self._channel.close()


class History:
    """Everything that happened, one JSON object a line, in seconds since the beginning."""

    def __init__(self, file: Path) -> None:
        self._began_s = time.monotonic()
        self._out = file.open("w")
        self.file = file
        self.token_times: list[float] = []  # one for each token of any stream
        self.heard: dict[str, list[float]] = {}  # stream → when it heard something

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
        self._out.write(json.dumps({"t": round(now_s, 4), "event": event, **facts}) + "\n")
        return now_s

    def hear(self, stream: str, message: pb.GenerateStreamResponse) -> None:
        """One message of a stream."""
        kind = message.WhichOneof("event")
        if kind == "prompt":
            at = self.write("prompt", stream=stream, seed=message.prompt.seed)
        elif kind == "delta":
            delta = message.delta
            ids = list(delta.token_ids)
            at = self.write("delta", stream=stream, choice=delta.choice, index=delta.index, ids=ids, text=delta.text)
            self.token_times.extend([at] * len(ids))
        else:
            finish = message.finish
            reason = pb.FinishReason.Name(finish.reason)
            at = self.write("finish", stream=stream, choice=finish.choice, reason=reason)
        self.heard.setdefault(stream, []).append(at)

    def tokens_between(self, start_s: float, stop_s: float) -> int:
        """Tokens that all streams together heard in that time."""
        return bisect.bisect_right(self.token_times, stop_s) - bisect.bisect_left(self.token_times, start_s)

    def longest_pause_s(self, start_s: float, stop_s: float) -> float:
        """The longest time without a word of any stream that was open then, of pauses that touch that time."""
        longest = 0.0
        for times in self.heard.values():
            first = bisect.bisect_left(times, start_s)
            last = bisect.bisect_right(times, stop_s)
            around = times[max(0, first - 1) : last + 1]
            longest = max([longest, *(later - sooner for sooner, later in itertools.pairwise(around))])
        return longest


async def record(
    history: History,
    source: Source,
    name: str,
    request: pb.GenerateStreamRequest,
    expected: list[Expected],
    *,
    num_prompt: int,
) -> int:
    """Read one answer to its end and check it all the way. Returns its tokens. Raises Violation, or what ended it."""
    checker = StreamChecker(name, expected, num_prompt=num_prompt)
    history.write("open", stream=name, prompt=list(request.token_ids.ids), max_tokens=request.stopping.max_tokens)
    async for message in source.stream(request):
        history.hear(name, message)
        checker.hear(message)
    checker.end()
    history.write("end", stream=name)
    return checker.num_tokens
