"""Somebody who does nothing wrong while others are attacked: streams answers on end, and checks every token."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Final

from grpc import aio

from protos import inference_pb2 as pb
from protos import inference_pb2_grpc
from services.grpc_options import client_options
from tests.e2e.fake_model import VOCAB_SIZE

_PROMPT: Final = (1, 2, 3)
_MAX_TOKENS: Final = 400


class Bystander:
    """Reads answers of the fake model whose token is its position."""

    def __init__(self, address: str) -> None:
        self.num_tokens = 0
        self._address = address
        self._more = asyncio.Event()

    async def read(self) -> None:
        """Ask and read, until cancelled."""
        request = pb.GenerateStreamRequest(
            token_ids=pb.TokenIds(ids=_PROMPT),
            sampling=pb.SamplingParams(temperature=0),
            stopping=pb.StopConditions(max_tokens=_MAX_TOKENS, ignore_eos=True),
        )
        async with aio.insecure_channel(self._address, options=client_options()) as channel:
            stub: inference_pb2_grpc.InferenceServiceAsyncStub = inference_pb2_grpc.InferenceServiceStub(channel)
            while True:
                told: list[int] = []
                async for message in stub.GenerateStream(request):
                    told += message.delta.token_ids
                    self.num_tokens += len(message.delta.token_ids)
                    self._more.set()
                assert told == [(len(_PROMPT) + n) % VOCAB_SIZE for n in range(_MAX_TOKENS)], "another answer"

    async def more(self) -> None:
        """Return when it has read something more."""
        self._more.clear()
        await self._more.wait()


@asynccontextmanager
async def bystander(address: str) -> AsyncIterator[Bystander]:
    """One whose stream has begun. What goes wrong with it is raised at the end, and ends the test before that."""
    it = Bystander(address)
    async with asyncio.TaskGroup() as group:
        reading = group.create_task(it.read())
        await it.more()
        yield it
        reading.cancel()


def rss_mib(pid: int) -> float:
    """Memory that the process holds."""
    (line,) = [line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("VmRSS")]
    return int(line.split()[1]) / 1024


def num_descriptors(pid: int) -> int:
    """Files and sockets that the process has open."""
    return len(list(Path(f"/proc/{pid}/fd").iterdir()))
