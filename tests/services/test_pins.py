"""Pinned prefixes over sockets: what is told of them, who is refused, and what a resumed request does."""

from __future__ import annotations

import pytest
from grpc import aio

from common.errors import InvalidRequest, Overloaded
from common.model_folder import ModelFolder, read_model_folder
from protos import inference_pb2 as pb
from scheduler.pins import PinLimits
from scheduler.scheduler import SchedulerLimits
from services.status import from_rpc_error
from tests.e2e import fake_model
from tests.services.heard import Heard
from tests.services.served import run
from tests.services.test_resuming import Server, refused, request, serving

LIMITS = SchedulerLimits(pins=PinLimits(max_tokens_per_tenant=20, max_share=1))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> ModelFolder:
    return read_model_folder(fake_model.write(tmp_path_factory.mktemp("model") / "fake"))


def pinning(*tokens: int, seconds: int = 60, pin_tokens: int | None = None) -> pb.GenerateStreamRequest:
    asked = request(2)
    asked.token_ids.ids[:] = tokens
    asked.cache.pin_seconds = seconds
    if pin_tokens is not None:
        asked.cache.pin_tokens = pin_tokens
    return asked


async def heard_of(server: Server, asked: pb.GenerateStreamRequest) -> pb.PromptInfo:
    heard = Heard(asked)
    await heard.rest(server.generate(asked))
    return heard.first


def test_a_pin_is_told_before_the_answer_and_the_same_one_when_it_is_renewed(model: ModelFolder) -> None:
    async def test() -> None:
        async with serving(model, now_s=1000.0, limits=LIMITS) as server:
            server.join()
            pinned = (await heard_of(server, pinning(*range(8)))).pinned
            assert (pinned.tokens, len(pinned.pin_id)) == (8, 32)
            assert 1000 < pinned.expires_s <= 1060
            again = (await heard_of(server, pinning(*range(12), pin_tokens=8))).pinned
            assert again.pin_id == pinned.pin_id
            assert not (await heard_of(server, request(2))).HasField("pinned")

            unary = pb.GenerateRequest(token_ids=pb.TokenIds(ids=[1, 2]), stopping=pb.StopConditions(max_tokens=1))
            unary.cache.pin_seconds = 5
            assert (await server.stub.Generate(unary)).prompt.pinned.tokens == 2
            assert (await server.stub.Unpin(pb.UnpinRequest(pin_id=pinned.pin_id))).tokens == 8
            assert (await server.stub.Unpin(pb.UnpinRequest(pin_id=pinned.pin_id))).tokens == 0
            assert (await server.stub.Unpin(pb.UnpinRequest(all=True))).tokens == 2
            with pytest.raises(aio.AioRpcError) as failure:
                await server.stub.Unpin(pb.UnpinRequest())
            assert isinstance(from_rpc_error(failure.value), InvalidRequest)

    run(test())


def test_who_asks_for_too_much_is_refused_by_name_and_others_are_not(model: ModelFolder) -> None:
    async def test() -> None:
        async with serving(model, limits=LIMITS) as server:
            server.join()
            error = await refused(server.generate(pinning(*range(8), pin_tokens=9)))
            assert str(error) == "pin_tokens: at most 8, which are the tokens of the prompt, got 9"
            error = await refused(server.generate(pinning(*range(21))))
            assert str(error) == "pin_tokens: at most 20 tokens of a tenant may be pinned, got 21"
            await heard_of(server, pinning(*range(12)))
            error = await refused(server.generate(pinning(*range(50, 59))))
            assert isinstance(error, Overloaded) and "pin_tokens: 12 tokens of this tenant are pinned" in str(error)
            assert error.retry_after_s > 0
            assert server.engine.admission.refusals["pins"] == 1
            assert server.engine.num_requests == 0
            await heard_of(server, request(2))

    run(test())


def test_a_request_that_is_refused_for_want_of_room_pins_nothing(model: ModelFolder) -> None:
    async def test() -> None:
        async with serving(model, limits=LIMITS) as server:
            server.engine.drain()
            await refused(server.generate(pinning(*range(8))))
            assert not server.engine.scheduler.prefixes.pins

    run(test())


def test_a_request_that_is_resumed_elsewhere_pins_there_and_is_not_refused_for_it(model: ModelFolder) -> None:
    async def test() -> None:
        for num_pinned in (0, 15):
            asked = pinning(*range(8))
            asked.stopping.max_tokens = 12
            heard = Heard(asked)
            async with serving(model, limits=LIMITS) as first:
                first.join(steps=4)
                await heard.until(first.generate(asked), 3)
            async with serving(model, limits=LIMITS) as second:
                second.join()
                if num_pinned:
                    await heard_of(second, pinning(*range(100, 100 + num_pinned)))
                await heard.rest(second.resume(heard.to_resume()))
                assert second.engine.scheduler.prefixes.pins.num_tokens == (num_pinned or 8)
            assert len(heard.tokens[0]) == 12

    run(test())


def test_who_takes_a_running_request_over_is_told_what_it_pinned(model: ModelFolder) -> None:
    async def test() -> None:
        asked = pinning(*range(8))
        asked.request_id, asked.resumable, asked.sampling.seed, asked.stopping.max_tokens = "r", True, 1, 12
        first, second = Heard(asked), Heard(asked)
        async with serving(model, limits=LIMITS) as server:
            link = server.join(steps=5)
            await first.until(server.generate(asked), 4)
            call = server.generate(asked)
            await second.until(call, 4)
            assert second.first.pinned == first.first.pinned and second.first.pinned.tokens == 8
            link.allow(100)
            await second.rest(call)

    run(test())


def test_a_ticket_is_for_a_request_with_the_same_salt(model: ModelFolder) -> None:
    async def test() -> None:
        heard = Heard(request(12))
        heard.request.cache.cache_salt = "mine"
        async with serving(model) as first:
            first.join(steps=4)
            await heard.until(first.generate(heard.request), 3)
        async with serving(model) as second:
            second.join()
            asked = heard.to_resume()
            asked.request.cache.cache_salt = "yours"
            assert "does not belong to this request" in str(await refused(second.resume(asked)))
            await heard.rest(second.resume(heard.to_resume()))
        assert len(heard.tokens[0]) == 12

    run(test())
