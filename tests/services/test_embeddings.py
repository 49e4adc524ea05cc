"""Embed over an engine with fake executors: what comes back, what is refused, and what becomes of it when they die."""

from __future__ import annotations

import asyncio
import json
import math
import struct
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any, cast

import pytest

from common.errors import DeadlineExceeded, InvalidRequest, Overloaded, PagewireError, RequestFailed
from common.model_folder import read_model_folder
from common.sampling import RequestLimits
from common.tenant import TenantLimits
from executor.fake_runner import FakeRunner, digests_of, fake_vector
from protos import inference_pb2 as pb
from scheduler.scheduler import Scheduler, SchedulerLimits
from scheduler.suspicion import End
from services import codec_public, embedding
from services.admission import Admission, AdmissionLimits
from services.answering import Answerer
from services.caller import Caller, let_in
from services.embedding import shortened
from services.engine import Engine
from services.handlers import Context
from services.scheduler_service import SchedulerService
from services.text import Tokenizer
from tests.e2e import fake_model
from tests.services.instant_link import InstantLink
from tests.services.served import HANG_S, until

IDS = [[5, 9, 13, 21], [7], [5, 9, 13, 21, 34, 55, 8, 1, 2]]


class Time:
    """As much of a call's context as the methods ask for."""

    def __init__(self, left_s: float | None) -> None:
        self._left_s = left_s

    def time_remaining(self) -> float | None:
        return self._left_s


class World:
    """A service, and the engine behind it."""

    def __init__(
        self, folder: Path, *, max_waiting: int = 100, limits: RequestLimits | None = None, rate: float = 0.0
    ) -> None:
        core = Scheduler(SchedulerLimits(), model="fake", eos=set(), secret=b"test")
        self.engine = Engine(
            core,
            admission=Admission(AdmissionLimits(max_waiting=max_waiting), default=TenantLimits(tokens_per_s=rate)),
        )
        model = read_model_folder(folder)
        answerer = Answerer(self.engine, model, Tokenizer(model.path / "tokenizer.json"), None)
        self.service = SchedulerService(answerer, limits or RequestLimits(), lambda: 0)

    def join(self, session: int = 1, *, steps: int | None = None, runner: FakeRunner | None = None) -> InstantLink:
        link = InstantLink(self.engine, session, steps=steps, num_blocks=256, runner=runner)
        self.engine.join(session, link.facts, link)
        return link

    async def embed(self, *inputs: str | Sequence[int], left_s: float | None = None, **asked: Any) -> pb.EmbedResponse:
        made = [
            pb.EmbedInput(text=each) if isinstance(each, str) else pb.EmbedInput(token_ids=pb.TokenIds(ids=each))
            for each in inputs
        ]
        return await self.service.Embed(pb.EmbedRequest(inputs=made, **asked), cast("Context", Time(left_s)))


def run(world: World, test: Callable[[], Awaitable[None]]) -> None:
    async def main() -> None:
        let_in(Caller(tenant="t"))
        loop = asyncio.create_task(world.engine.run())
        async with asyncio.timeout(HANG_S):
            await test()
        assert not world.engine.num_requests
        loop.cancel()
        await asyncio.gather(loop, return_exceptions=True)

    asyncio.run(main())


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return fake_model.add_vectors(fake_model.write(tmp_path / "fake"))


def expected(ids: Sequence[int], dimensions: int = 8) -> list[float]:
    """The fake model's vector, its length made 1."""
    values = struct.unpack("<8f", fake_vector(digests_of(ids)[-1], 8))[:dimensions]
    return [value / math.hypot(*values) for value in values]


def told(answer: pb.EmbedResponse) -> list[list[float]]:
    return [list(struct.unpack(f"<{answer.dimensions}f", each.values)) for each in answer.embeddings]


def check(answer: pb.EmbedResponse, *prompts: Sequence[int], dimensions: int = 8) -> None:
    assert answer.dimensions == dimensions
    assert told(answer) == [pytest.approx(expected(prompt, dimensions), abs=1e-6) for prompt in prompts]
    assert [each.prompt_tokens for each in answer.embeddings] == [len(prompt) for prompt in prompts]


def test_every_input_has_its_vector_in_order_with_its_tokens_counted(folder: Path) -> None:
    world = World(folder)

    async def test() -> None:
        world.join()
        answer = await world.embed(*IDS, request_id="mine")
        check(answer, *IDS)
        assert (answer.request_id, answer.model) == ("mine", "fake")
        again = await world.embed(IDS[2])
        check(again, IDS[2])
        assert again.embeddings[0].cached_prompt_tokens == 8

    run(world, test)
    assert world.engine.scheduler.counters.output_tokens == 0


def test_a_text_is_stripped_and_ends_as_the_tokenizer_ends_it(tmp_path: Path) -> None:
    plain, ending, told_to = (fake_model.write(tmp_path / name) for name in ("plain", "ending", "told_to"))
    fake_model.add_vectors(plain)
    fake_model.add_vectors(ending, ends_texts=True)
    fake_model.add_vectors(told_to)
    config = json.loads((told_to / "tokenizer_config.json").read_text())
    (told_to / "tokenizer_config.json").write_text(json.dumps({**config, "add_eos_token": True}))
    text = Tokenizer(plain / "tokenizer.json").encode("hi there")

    for folder, ids in ((plain, text), (ending, [*text, fake_model.EOS]), (told_to, [*text, fake_model.EOS])):
        world = World(folder)

        async def test(world: World = world, ids: list[int] = ids) -> None:
            world.join()
            check(await world.embed(" hi there\n"), ids)
            check(await world.embed(ids), ids)  # tokens are taken as they are

        run(world, test)


def test_fewer_dimensions_are_the_first_ones_made_one_long_again(folder: Path) -> None:
    world = World(folder)

    async def test() -> None:
        world.join()
        check(await world.embed(*IDS, dimensions=3), *IDS, dimensions=3)

    run(world, test)


def test_a_vector_is_cut_before_it_is_normalised_and_only_where_the_folder_says_so() -> None:
    vector = struct.pack("<4f", 3.0, 4.0, 12.0, 0.0)

    assert struct.unpack("<2f", shortened(vector, 2, normalizes=True)) == pytest.approx((0.6, 0.8))
    assert struct.unpack("<3f", shortened(vector, 3, normalizes=True)) == pytest.approx((3 / 13, 4 / 13, 12 / 13))
    assert struct.unpack("<2f", shortened(vector, 2, normalizes=False)) == (3.0, 4.0)
    assert struct.unpack("<1f", shortened(bytes(4), 1, normalizes=True)) == (0.0,)


@pytest.mark.parametrize(
    ("inputs", "asked", "problem"),
    [
        ([], {}, "inputs: must be 1 to 4 texts, got 0"),
        ([[1]] * 5, {}, "inputs: must be 1 to 4 texts, got 5"),
        ([[1], " \n"], {}, r"inputs\[1\]: is empty"),
        ([[1], []], {}, r"inputs\[1\]: is empty"),
        ([[1], [320]], {}, r"inputs\[1\]: must be in \[0, 320\), got 320"),
        ([[1] * 256], {}, r"inputs\[0\]: 256 tokens, and at most 255 are embedded in the context of 256"),
        (["hi", "x" * 5000], {}, r"inputs\[1\]: more than 255 tokens, which is all the context has"),
        ([[1]], {"dimensions": 0}, "dimensions: must be at least 1, or not set, got 0"),
        ([[1]], {"dimensions": 9}, r"dimensions: must be in \[1, 8\], got 9"),
        ([[1]], {"model": "other"}, "model: 'other' is not served here"),
        ([[1]], {"request_id": "a b"}, "request_id: must be printable ASCII"),
        ([[1]], {"priority": 9}, "priority: must be one of"),
        ([[1]], {"cache": pb.CacheControl(pin_seconds=5)}, "pin_seconds: must not be set"),
    ],
)
def test_what_is_wrong_is_told_by_its_field_and_limit_before_anything_runs(
    folder: Path, inputs: list[Any], asked: dict[str, Any], problem: str
) -> None:
    world = World(folder, limits=RequestLimits(max_embedding_inputs=4))

    async def test() -> None:
        world.join()
        with pytest.raises(PagewireError, match=problem):
            await world.embed(*inputs, **asked)

    run(world, test)
    assert not world.engine.scheduler.counters.prompt_tokens


def test_vectors_that_are_too_large_together_are_refused_before_any_is_computed(folder: Path) -> None:
    world = World(folder, limits=RequestLimits(max_embedding_bytes=3 * 32))

    async def test() -> None:
        world.join()
        with pytest.raises(InvalidRequest, match=r"inputs: at most 3 of vectors of 8 numbers, got 4"):
            await world.embed(*IDS, [1, 2])
        assert not world.engine.scheduler.counters.prompt_tokens
        assert len((await world.embed(*IDS)).embeddings) == 3
        assert len((await world.embed(*IDS, [1, 2], dimensions=4)).embeddings) == 4

    run(world, test)


def test_an_input_that_says_nothing_is_refused(folder: Path) -> None:
    with pytest.raises(InvalidRequest, match=r"inputs\[0\]: one of text or token_ids must be set"):
        codec_public.embed_from_pb(pb.EmbedRequest(inputs=[pb.EmbedInput()]), RequestLimits(), vocab_size=320)


def test_a_model_that_makes_text_says_what_it_would_need(tmp_path: Path) -> None:
    world = World(fake_model.write(tmp_path / "fake"))

    async def test() -> None:
        world.join()
        with pytest.raises(InvalidRequest, match="fake makes text, and no embeddings: modules") as no:
            await world.embed("hi")
        assert no.value.field == "model"

    run(world, test)


def test_a_model_that_makes_vectors_alone_makes_no_text(tmp_path: Path) -> None:
    world = World(fake_model.add_vectors(fake_model.write(tmp_path / "fake"), makes_text=False))

    async def test() -> None:
        world.join()
        check(await world.embed(IDS[0]), IDS[0])
        with pytest.raises(InvalidRequest, match="model: fake makes vectors alone, and no text"):
            await world.service.Generate(pb.GenerateRequest(text="hi"), cast("Context", Time(None)))

    run(world, test)


def test_of_many_inputs_some_wait_or_run_at_once_and_the_order_stays(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(embedding, "_AT_ONCE", 2)
    world = World(folder)
    most = 0

    async def test() -> None:
        nonlocal most
        link = world.join(steps=0)
        call = asyncio.ensure_future(world.embed(*IDS, *IDS))
        while not call.done():
            most = max(most, world.engine.num_requests)
            link.allow(1)
            await asyncio.sleep(0)
        check(await call, *IDS, *IDS)

    run(world, test)
    assert most == 2


def test_where_there_is_room_for_one_they_go_one_after_the_other(folder: Path) -> None:
    world = World(folder, max_waiting=3)

    async def test() -> None:
        link = world.join(steps=0)
        busy = [asyncio.ensure_future(world.embed([n + 100] * 9)) for n in range(2)]
        await until(lambda: len(world.engine.scheduler.session(1).running) == 2)  # else there is room for none
        call = asyncio.ensure_future(world.embed(*IDS[:2]))
        await until(lambda: world.engine.num_requests >= 3)
        link.allow(100)
        check(await call, *IDS[:2])
        await asyncio.gather(*busy)

    run(world, test)


def test_one_for_which_there_is_no_room_is_refused_before_it_is_looked_at(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = World(folder, max_waiting=1)

    async def test() -> None:
        waiting = asyncio.ensure_future(world.embed(IDS[0]))
        await until(lambda: world.engine.num_requests == 1)

        def look(*_: object, **__: object) -> None:
            raise AssertionError("it was looked at")

        with monkeypatch.context() as changed:
            changed.setattr(codec_public, "embed_from_pb", look)
            with pytest.raises(Overloaded, match=r"waiting_sequences: .* 1 more; 1 may wait in all \(--max-waiting\)"):
                await world.embed(*IDS)
        world.join()
        check(await waiting, IDS[0])

    run(world, test)


def test_a_tenant_pays_for_all_of_it_before_any_is_computed(folder: Path) -> None:
    world = World(folder, rate=1.0)  # so at most ten at once

    async def test() -> None:
        world.join()
        check(await world.embed(IDS[0]), IDS[0])
        with pytest.raises(Overloaded, match="tenant_rate: your 1 tokens a second are used up"):
            await world.embed(IDS[1], IDS[2])

    run(world, test)
    assert world.engine.scheduler.counters.prompt_tokens == len(IDS[0])


def test_what_a_lost_executor_was_computing_is_computed_anew_and_answered_once(folder: Path) -> None:
    world = World(folder)

    async def test() -> None:
        dying = world.join(1, steps=1, runner=FakeRunner(name="dies", max_step_tokens=6))
        call = asyncio.ensure_future(world.embed(*IDS))
        await until(lambda: len(dying.held) == 1)  # one step is answered, the next is not
        dying.closed = "killed"
        world.engine.lose(1, End.LOST)
        world.join(2)
        check(await call, *IDS)

    run(world, test)


def test_a_call_that_is_cancelled_leaves_nothing_running(folder: Path) -> None:
    world = World(folder)

    async def test() -> None:
        call = asyncio.ensure_future(world.embed(*IDS))
        await until(lambda: world.engine.num_requests == 3)
        call.cancel()
        await asyncio.wait({call})

    run(world, test)


def test_a_deadline_ends_all_of_it(folder: Path) -> None:
    world = World(folder)

    async def test() -> None:
        with pytest.raises(DeadlineExceeded):
            await world.embed(*IDS, left_s=0.05)

    run(world, test)


def test_a_text_without_finite_numbers_fails_the_call_and_nothing_else(folder: Path) -> None:
    world = World(folder)

    async def test() -> None:
        world.join(runner=FakeRunner(next_token=lambda prefix: None if prefix.num_tokens == 1 else 1))
        with pytest.raises(RequestFailed, match="a text of 1 tokens has no vector of finite numbers"):
            await world.embed(*IDS)
        check(await world.embed(IDS[0], IDS[2]), IDS[0], IDS[2])

    run(world, test)
