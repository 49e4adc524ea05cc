"""The public methods over an engine, without a socket."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable
from contextlib import aclosing, asynccontextmanager
from pathlib import Path
from typing import Any, cast

import pytest

from common.errors import InvalidRequest, Overloaded
from common.model_folder import read_model_folder
from common.sampling import RequestLimits
from protos import inference_pb2 as pb
from scheduler.scheduler import Scheduler, SchedulerLimits
from scheduler.timeline import Controls, Kind
from services import codec_public
from services.admission import Admission, AdmissionLimits
from services.answering import Answerer
from services.engine import Engine
from services.handlers import Context
from services.scheduler_service import SchedulerService
from services.text import Tokenizer
from tests.e2e import fake_model
from tests.services.served import HANG_S


class NoDeadline:
    """As much of a call's context as the methods ask for."""

    def time_remaining(self) -> None:
        return None


CONTEXT = cast("Context", NoDeadline())


@pytest.fixture
def engine() -> Engine:
    """An engine that no executor has joined: every request waits, and three may."""
    admission = Admission(AdmissionLimits(max_waiting=3))
    return Engine(Scheduler(SchedulerLimits(), model="fake", eos=set(), secret=b"test"), admission=admission)


@pytest.fixture
def service(engine: Engine, tmp_path: Path) -> SchedulerService:
    model = read_model_folder(fake_model.write(tmp_path / "fake"))
    answerer = Answerer(engine, model, Tokenizer(model.path / "tokenizer.json"), None)
    return SchedulerService(answerer, RequestLimits(), lambda: 0)


def run(test: Awaitable[Any]) -> None:
    async def main() -> None:
        async with asyncio.timeout(HANG_S):
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


async def ask(service: SchedulerService, request: pb.GenerateRequest | pb.GenerateStreamRequest) -> None:
    """Hear its answer, which has no end here."""
    if isinstance(request, pb.GenerateRequest):
        await service.Generate(request, CONTEXT)
    else:
        async with aclosing(service.GenerateStream(request, CONTEXT)) as messages:
            async for _ in messages:
                pass


@asynccontextmanager
async def filled(engine: Engine, service: SchedulerService) -> AsyncIterator[None]:
    """As many wait as may."""
    missing = range(3 - engine.num_requests)
    waiting = [asyncio.create_task(ask(service, pb.GenerateRequest(text="x"))) for _ in missing]
    while engine.num_requests < 3:
        await asyncio.sleep(0)
    try:
        yield
    finally:
        for task in waiting:
            task.cancel()
        await asyncio.wait(waiting)


@pytest.mark.parametrize(
    "request_of",
    [
        lambda kind: kind(text="word " * 100_000),
        lambda kind: kind(token_ids=pb.TokenIds(ids=[1] * 100_000)),
        lambda kind: kind(chat=pb.ChatMessages(messages=[pb.ChatMessage(role="user", content="word ")] * 10_000)),
        lambda kind: kind(text="x", sampling=pb.SamplingParams(n=2, top_p=7.0)),
        lambda kind: kind(),
    ],
    ids=["text", "token ids", "chat", "bad parameters", "nothing"],
)
@pytest.mark.parametrize("kind", [pb.GenerateRequest, pb.GenerateStreamRequest])
def test_a_request_for_which_there_is_no_room_is_refused_before_it_is_looked_at(
    kind: Any, request_of: Any, engine: Engine, service: SchedulerService, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def test() -> None:
        async with filled(engine, service):

            def look(*_: object, **__: object) -> None:
                raise AssertionError("it was looked at")

            monkeypatch.setattr(codec_public, "request_from_pb", look)
            monkeypatch.setattr(Tokenizer, "encode", look)
            with pytest.raises(Overloaded, match=r"no room for \d more; 3 may wait in all") as refusal:
                await ask(service, request_of(kind))
            assert refusal.value.retry_after_s > 0

    run(test())


@pytest.mark.parametrize(
    ("field", "request_"),
    [
        ("n", pb.GenerateRequest(text="x", sampling=pb.SamplingParams(n=1_000_000))),
        ("n", pb.GenerateRequest(text="x", sampling=pb.SamplingParams(n=0))),
        ("max_tokens", pb.GenerateRequest(text="x", stopping=pb.StopConditions(max_tokens=2**32 - 1))),
        ("max_tokens", pb.GenerateRequest(text="x", stopping=pb.StopConditions(max_tokens=0))),
        ("priority", pb.GenerateRequest(text="x", priority=cast("Any", 77))),
        ("token_ids", pb.GenerateRequest(token_ids=pb.TokenIds(ids=[1] * 10_000))),
        ("input", pb.GenerateRequest()),
    ],
)
def test_where_there_is_room_for_something_what_is_wrong_is_told(
    field: str, request_: pb.GenerateRequest, service: SchedulerService
) -> None:
    async def test() -> None:
        with pytest.raises(InvalidRequest) as problem:
            await ask(service, request_)
        assert problem.value.field == field

    run(test())


def test_what_runs_here_already_needs_no_room(engine: Engine, service: SchedulerService) -> None:
    async def test() -> None:
        async with aclosing(
            service.GenerateStream(pb.GenerateStreamRequest(text="x", request_id="r", resumable=True), CONTEXT)
        ) as first:
            told = (await anext(first)).prompt
            again = pb.GenerateStreamRequest(
                text="x", request_id="r", resumable=True, sampling=pb.SamplingParams(seed=told.seed)
            )
            async with filled(engine, service), aclosing(service.GenerateStream(again, CONTEXT)) as second:
                with pytest.raises(Overloaded):
                    await ask(service, pb.GenerateRequest(text="x"))
                assert (await anext(second)).prompt.request_id == "r"

    run(test())


def test_one_that_is_refused_is_remembered_with_the_limit_that_it_met(
    engine: Engine, service: SchedulerService
) -> None:
    async def test() -> None:
        async with filled(engine, service):
            with pytest.raises(Overloaded):
                await ask(service, pb.GenerateRequest(text="x", request_id="refused"))
        (event,) = engine.timelines.find("refused").events
        assert (event.kind, event.why) == (Kind.REFUSED, "waiting_sequences")

    run(test())


def test_how_an_answer_is_to_be_made_is_remembered_with_the_defaults_of_what_was_not_said(
    engine: Engine, service: SchedulerService
) -> None:
    async def test() -> None:
        request = pb.GenerateStreamRequest(request_id="r", text="x", sampling=pb.SamplingParams(top_p=0.9, seed=5))
        async with aclosing(service.GenerateStream(request, CONTEXT)) as messages:
            prompt = (await anext(messages)).prompt
        assert engine.timelines.find("r").controls == Controls(
            max_tokens=prompt.max_tokens,
            temperature=1.0,
            top_p=0.9,
            top_k=0,
            seed=5,
            presence_penalty=0.0,
            frequency_penalty=0.0,
        )

    run(test())
