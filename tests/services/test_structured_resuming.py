"""Structured streams that are resumed: what was let in once never waits again to be let in."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from common.errors import AlreadyRunning, Overloaded, Superseded
from common.model_folder import ModelFolder, read_model_folder
from common.sampling import Grammar
from protos import inference_pb2 as pb
from services.grammar_checker import GrammarChecker
from tests.e2e import fake_model
from tests.services.heard import Heard
from tests.services.served import run, until
from tests.services.test_resuming import refused, request, serving, undisturbed


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> ModelFolder:
    return read_model_folder(fake_model.write(tmp_path_factory.mktemp("model") / "fake"))


class Gatekeeper(GrammarChecker):
    """Lets in at once, until it hangs."""

    def __init__(self, model: ModelFolder) -> None:
        super().__init__(model)
        self.asked: list[Grammar] = []
        self.open = asyncio.Event()
        self.open.set()

    async def check(self, field: str, grammar: Grammar, tenant: str) -> None:
        self.asked.append(grammar)
        await self.open.wait()


class Busy(GrammarChecker):
    """Has no room for another one."""

    async def check(self, field: str, grammar: Grammar, tenant: str) -> None:
        raise Overloaded("too many wait to be compiled")


def structured(max_tokens: int = 20, **changes: Any) -> pb.GenerateStreamRequest:
    asked = request(max_tokens, **changes)
    asked.stopping.ignore_eos = False
    asked.sampling.seed = 3
    asked.sampling.structured.regex = "a+"
    return asked


def test_a_ticket_lets_a_stream_go_on_where_the_worker_is_busy(model: ModelFolder) -> None:
    async def test() -> None:
        heard = Heard(structured())
        async with serving(model, grammars=Gatekeeper(model)) as first:
            first.join(steps=5)
            await heard.until(first.generate(heard.request), 4)
        async with serving(model, grammars=Busy(model)) as second:
            second.join()
            assert isinstance(await refused(second.generate(structured())), Overloaded)
            await heard.rest(second.resume(heard.to_resume()))

        plain = structured()
        plain.sampling.ClearField("structured")  # the fake model knows no grammar
        assert heard.tokens == (await undisturbed(model, heard.first, plain)).tokens

    run(test())


@pytest.mark.parametrize("resumes", [False, True])
def test_a_running_stream_is_attached_to_while_the_worker_hangs(model: ModelFolder, resumes: bool) -> None:
    async def test() -> None:
        grammars = Gatekeeper(model)
        heard = Heard(structured(request_id="r", resumable=True))
        async with serving(model, grammars=grammars) as server:
            link = server.join(steps=5)
            await heard.until(server.generate(heard.request), 4)
            grammars.open.clear()
            if resumes:
                call = server.resume(heard.to_resume())
            else:
                heard = Heard(heard.request)
                call = server.generate(heard.request)
            await heard.until(call, 4)
            link.allow(100)
            await heard.rest(call)

        assert len(grammars.asked) == 1
        assert heard.ends[0].usage.completion_tokens == len(heard.tokens[0]) > 4

    run(test())


def test_of_two_calls_of_one_request_that_wait_for_the_worker_the_later_one_takes_over(model: ModelFolder) -> None:
    async def test() -> None:
        grammars = Gatekeeper(model)
        grammars.open.clear()
        asked = structured(request_id="r", resumable=True)
        heard = Heard(asked)
        async with serving(model, grammars=grammars) as server:
            link = server.join(steps=0)
            earlier = server.generate(asked)
            await until(lambda: len(grammars.asked) == 1)
            later = server.generate(asked)
            await until(lambda: len(grammars.asked) == 2)
            grammars.open.set()
            assert isinstance(await refused(earlier), Superseded)
            assert server.engine.num_requests == 1
            link.allow(100)
            await heard.rest(later)

        assert heard.ends[0].usage.completion_tokens == len(heard.tokens[0]) > 0

    run(test())


def test_another_request_of_an_id_that_runs_is_refused_before_the_worker_is_asked(model: ModelFolder) -> None:
    async def test() -> None:
        grammars = Gatekeeper(model)
        heard = Heard(structured(request_id="r", resumable=True))
        other = structured(request_id="r", resumable=True)
        other.sampling.structured.regex = "b+"
        async with serving(model, grammars=grammars) as server:
            server.join(steps=5)
            await heard.until(server.generate(heard.request), 4)
            grammars.open.clear()
            assert isinstance(await refused(server.generate(other)), AlreadyRunning)

        assert len(grammars.asked) == 1

    run(test())
