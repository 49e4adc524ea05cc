"""The public methods over an engine, without a socket."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from contextlib import aclosing
from pathlib import Path
from typing import Any, cast

import pytest

from common.model_folder import read_model_folder
from common.sampling import RequestLimits
from protos import inference_pb2 as pb
from scheduler.scheduler import Scheduler, SchedulerLimits
from services.answering import Answerer
from services.engine import Engine
from services.handlers import Context
from services.scheduler_service import SchedulerService
from services.text import Tokenizer
from tests.e2e import fake_model


class NoDeadline:
    """As much of a call's context as the methods ask for."""

    def time_remaining(self) -> None:
        return None


CONTEXT = cast("Context", NoDeadline())


@pytest.fixture
def engine() -> Engine:
    """An engine that no executor has joined: every request waits."""
    return Engine(Scheduler(SchedulerLimits(), model="fake", eos=set(), secret=b"test"))


@pytest.fixture
def service(engine: Engine, tmp_path: Path) -> SchedulerService:
    model = read_model_folder(fake_model.write(tmp_path / "fake"))
    answerer = Answerer(engine, model, Tokenizer(model.path / "tokenizer.json"), None)
    return SchedulerService(answerer, RequestLimits(), lambda: 0)


def run(test: Awaitable[Any]) -> None:
    async def main() -> None:
        async with asyncio.timeout(20):
            await test

    asyncio.run(main())


def test_a_caller_who_leaves_before_the_first_message_arrives_leaves_nothing_running(
    engine: Engine, service: SchedulerService
) -> None:
    async def leave_at_once() -> None:
        async with aclosing(service.GenerateStream(pb.GenerateStreamRequest(text="x"), CONTEXT)) as messages:
            assert (await anext(messages)).WhichOneof("event") == "prompt"
            assert engine.num_requests == 1
        assert engine.num_requests == 0

    run(leave_at_once())


def test_a_call_that_is_cancelled_leaves_nothing_running(engine: Engine, service: SchedulerService) -> None:
    async def cancel() -> None:
        call = asyncio.ensure_future(
            service.Generate(pb.GenerateRequest(text="x", sampling=pb.SamplingParams(n=2)), CONTEXT)
        )
        while not engine.num_requests:
            await asyncio.sleep(0)
        call.cancel()
        await asyncio.wait({call})
        assert engine.num_requests == 0

    run(cancel())
