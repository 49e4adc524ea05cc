"""Which scheduler the gateway asks, over real connections to some that are played."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, cast

import pytest
from grpc import aio

from common.errors import DeadlineExceeded, PagewireError, Unavailable
from protos import inference_pb2 as pb
from services.gateway import upstream
from services.gateway.upstream import Upstream
from services.handlers import Context, service_handler
from tests.services.served import HANG_S

_SERVICE = pb.DESCRIPTOR.services_by_name["InferenceService"].full_name


class Played:
    """A scheduler that serves the model `name`, refuses, or stands still."""

    def __init__(self, name: str = "", refusal: PagewireError | None = None) -> None:
        self.name = name
        self.refusal = refusal
        self.num_asked = 0

    async def GetModel(self, request: pb.GetModelRequest, context: Context) -> pb.GetModelResponse:  # noqa: N802
        self.num_asked += 1
        if self.refusal is not None:
            raise self.refusal
        if not self.name:
            await asyncio.Event().wait()
        return pb.GetModelResponse(model=self.name)

    async def none(self, request: Any, context: Context) -> Any:
        raise AssertionError

    GenerateStream = Resume = Generate = Embed = Tokenize = Detokenize = Cancel = Unpin = none


@asynccontextmanager
async def asking(*schedulers: Played) -> AsyncIterator[Upstream]:
    servers = [aio.server() for _ in schedulers]
    channels: list[aio.Channel] = []
    for server, scheduler in zip(servers, schedulers, strict=True):
        server.add_generic_rpc_handlers((service_handler(_SERVICE, pb.DESCRIPTOR, scheduler),))
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        channels.append(aio.insecure_channel(f"127.0.0.1:{port}"))
    try:
        yield Upstream(cast("Any", None), channels, begin_patience_s=0)
    finally:
        for channel in channels:
            await channel.close()
        for server in servers:
            await server.stop(None)


def test_the_next_scheduler_answers_where_the_first_stands_still_and_is_the_first_from_then_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def ask(limit_s: float) -> tuple[int, int]:
        """How often the one that stands still was asked, and the other one."""
        still, other = Played(), Played("m")
        async with asking(still, other) as schedulers:
            monkeypatch.setattr(upstream, "_UNARY_S", limit_s)
            first = asyncio.ensure_future(schedulers.model("", ""))
            await asyncio.sleep(0)  # now the one that stands still is asked, and all others have time to answer
            monkeypatch.setattr(upstream, "_UNARY_S", HANG_S)
            assert [(await answer).model for answer in (first, *(schedulers.model("", "") for _ in range(2)))] == [
                "m"
            ] * 3
        return still.num_asked, other.num_asked

    limits_s = iter((0.3, 1.0, 3.0, 10.0, 30.0))  # a busy machine may not reach it within the first
    num_asked = 0, 3
    while num_asked == (0, 3):
        num_asked = asyncio.run(ask(next(limits_s)))
    assert num_asked == (1, 3)


def test_no_scheduler_answers_where_all_stand_still(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(upstream, "_UNARY_S", 0.1)

    async def test() -> None:
        async with asking(Played(), Played()) as schedulers:
            with pytest.raises(Unavailable, match="did not answer in time"):
                await schedulers.model("", "")

    asyncio.run(test())


@pytest.mark.parametrize(("refusal", "num_others"), [(Unavailable("draining"), 1), (DeadlineExceeded("over"), 0)])
def test_what_a_scheduler_itself_refuses_is_asked_elsewhere_only_where_that_may_help(
    refusal: PagewireError, num_others: int
) -> None:
    async def test() -> None:
        other = Played("m")
        async with asking(Played(refusal=refusal), other) as schedulers:
            if num_others:
                assert (await schedulers.model("", "")).model == "m"
            else:
                with pytest.raises(type(refusal), match=str(refusal)):
                    await schedulers.model("", "")
        assert other.num_asked == num_others

    asyncio.run(test())
