"""Beam searches over a socket: their answers come at once, the best first, and go on wherever a stream was lost."""

from __future__ import annotations

from typing import Any

import pytest

from common.errors import InvalidRequest, Overloaded
from common.model_folder import ModelFolder, read_model_folder
from common.sampling import BeamParams, SamplingParams, StopConditions
from common.tenant import TenantLimits
from protos import inference_pb2 as pb
from scheduler.scheduler import Scheduler, SchedulerLimits
from services.admission import Admission
from services.engine import Engine
from tests.e2e import fake_model
from tests.services.heard import Heard
from tests.services.served import run
from tests.services.test_resuming import PROMPT, refused, serving

BEAMS = pb.BeamSearch(width=4, length_penalty=0.5)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> ModelFolder:
    return read_model_folder(fake_model.write(tmp_path_factory.mktemp("model") / "fake"))


def asked(n: int = 3, *, stop: str = "", **sampling: Any) -> pb.GenerateStreamRequest:
    return pb.GenerateStreamRequest(
        token_ids=pb.TokenIds(ids=PROMPT),
        sampling=pb.SamplingParams(**{"n": n, "seed": 1, "beams": BEAMS, **sampling}),
        stopping=pb.StopConditions(max_tokens=12, stop=[stop] if stop else []),
    )


def test_answers_come_at_once_and_in_order_with_their_scores(model: ModelFolder) -> None:
    async def test() -> None:
        heard = Heard(asked())
        order: list[tuple[str, int]] = []
        async with serving(model) as server:
            server.join()
            async for message in server.generate(heard.request):
                heard.hear(message)
                kind = message.WhichOneof("event")
                assert kind is not None
                if kind != "prompt":
                    order.append((kind, getattr(message, kind).choice))

        assert order == [(kind, choice) for choice in range(3) for kind in ("delta", "finish")]
        scores = [heard.ends[choice].score for choice in range(3)]
        assert scores == sorted(scores, reverse=True)
        assert len({*map(tuple, heard.tokens.values())}) == 3
        for choice, end in heard.ends.items():
            assert (end.usage.prompt_tokens, end.usage.completion_tokens) == (3, len(heard.tokens[choice]))
            assert end.usage.decode_ns > 0

    run(test())


def test_a_unary_answer_has_the_scores(model: ModelFolder) -> None:
    async def test() -> None:
        streamed = Heard(asked())
        async with serving(model) as server:
            server.join()
            await streamed.rest(server.generate(streamed.request))
            whole = await server.stub.Generate(
                pb.GenerateRequest(
                    token_ids=streamed.request.token_ids,
                    sampling=streamed.request.sampling,
                    stopping=streamed.request.stopping,
                )
            )

        assert [list(choice.token_ids) for choice in whole.choices] == list(streamed.tokens.values())
        assert [choice.score for choice in whole.choices] == [end.score for end in streamed.ends.values()]

    run(test())


def test_a_stream_goes_on_elsewhere_wherever_it_was_lost(model: ModelFolder) -> None:
    async def test() -> None:
        alone = Heard(asked())
        async with serving(model) as server:
            server.join()
            await alone.rest(server.generate(alone.request))
        for num_messages in range(1, 7):
            heard = Heard(asked())
            async with serving(model) as first:
                first.join()
                call = first.generate(heard.request)
                for _ in range(num_messages):
                    message = await call.read()
                    assert isinstance(message, pb.GenerateStreamResponse)
                    heard.hear(message)
                call.cancel()
            async with serving(model) as second:
                second.join()
                await heard.rest(second.resume(heard.to_resume()))

            assert (heard.tokens, heard.text) == (alone.tokens, alone.text), f"lost after {num_messages} messages"
            for choice, end in heard.ends.items():
                assert end.reason == alone.ends[choice].reason
                assert end.score == alone.ends[choice].score, f"lost after {num_messages} messages"

    run(test())


def test_a_stream_that_still_runs_is_taken_over(model: ModelFolder) -> None:
    async def test() -> None:
        alone, heard = Heard(asked()), Heard(asked())
        heard.request.resumable = True
        heard.request.request_id = "taken"
        async with serving(model) as server:
            link = server.join(steps=4)
            call = server.generate(heard.request)
            message = await call.read()
            assert isinstance(message, pb.GenerateStreamResponse)
            heard.hear(message)
            call.cancel()
            taken = server.resume(heard.to_resume())
            await taken.read()
            link.allow(1000)
            await heard.rest(taken)
            await alone.rest(server.generate(alone.request))

        assert heard.tokens == alone.tokens
        assert [end.score for end in heard.ends.values()] == [end.score for end in alone.ends.values()]

    run(test())


def test_a_stop_string_ends_a_beam(model: ModelFolder) -> None:
    async def test() -> None:
        free, stopped = Heard(asked(4)), Heard(asked(4))
        async with serving(model) as server:
            server.join()
            await free.rest(server.generate(free.request))
            letter = next(text[3] for text in free.text.values() if text[3:4].isascii() and text[3:4].isalnum())
            stopped = Heard(asked(4, stop=letter))
            await stopped.rest(server.generate(stopped.request))

        ends = [end for end in stopped.ends.values() if end.reason == pb.FINISH_REASON_STOP_STRING]
        assert ends and all(end.matched_stop == letter for end in ends)
        assert not any(letter in text for text in stopped.text.values())
        scores = [end.score for end in stopped.ends.values()]
        assert scores == sorted(scores, reverse=True)

    run(test())


def test_log_probabilities_come_with_the_answers_and_those_of_the_prompt_before(model: ModelFolder) -> None:
    async def test() -> None:
        heard = Heard(asked(2, logprobs=1, prompt_logprobs=0))
        async with serving(model) as server:
            server.join()
            await heard.rest(server.generate(heard.request))

        assert len(heard.prompt_logprobs) == len(PROMPT)
        for choice, tokens in heard.tokens.items():
            told = heard.logprobs[choice]
            assert [each.token.token_id for each in told] == tokens
            assert [each.token.logprob for each in told] == [-float(token) for token in tokens]
            assert all(len(each.top) == 1 for each in told)

    run(test())


def test_a_search_counts_for_all_its_beams_where_requests_are_admitted() -> None:
    async def test() -> None:
        core = Scheduler(SchedulerLimits(), model="fake", eos=set(), secret=b"test")
        engine = Engine(core, admission=Admission(default=TenantLimits(tokens_per_s=0.001, burst_tokens=60)))
        sampling, stop = SamplingParams(temperature=0.0, beams=BeamParams(4)), StopConditions(max_tokens=12)
        stream = engine.submit(PROMPT, sampling, stop)  # 3 + 4 * 12

        with pytest.raises(Overloaded, match="tenant_rate: "):
            engine.submit(PROMPT, SamplingParams(), stop)  # 3 + 12
        assert core.waiting.num_tokens == 51
        stream.close()
        engine.submit(PROMPT, SamplingParams(), stop).close()  # it was never begun, and cost nothing

    run(test())


REFUSED: list[tuple[dict[str, Any], str, str]] = [
    ({"beams": pb.BeamSearch(width=1)}, "beams.width", r"must be in \[2, 8\], got 1"),
    ({"beams": pb.BeamSearch(width=9)}, "beams.width", r"must be in \[2, 8\], got 9"),
    ({"beams": pb.BeamSearch(width=2, length_penalty=5.1)}, "beams.length_penalty", r"must be in \[-5, 5\], got 5.1"),
    ({"beams": pb.BeamSearch(width=2, length_penalty=float("nan"))}, "beams.length_penalty", "got nan"),
    (
        {"beams": pb.BeamSearch(width=2, early_stopping=pb.EarlyStopping.ValueType(9))},
        "beams.early_stopping",
        "must be one of .*, got 9",
    ),
    ({"n": 5}, "n", "must be at most beams.width, 4, got 5"),
    ({"best_of": 4}, "best_of", "must not be set with beams"),
    ({"temperature": 0.7}, "temperature", "must be 0, or not set, with beams, which draw nothing; got 0.7"),
    ({"top_k": 3}, "top_k", "with beams"),
    ({"top_p": 0.5}, "top_p", "with beams"),
    ({"min_p": 0.5}, "min_p", "with beams"),
    ({"typical_p": 0.5}, "typical_p", "with beams"),
]


@pytest.mark.parametrize(("sampling", "field", "problem"), REFUSED, ids=[field for _, field, _ in REFUSED])
def test_what_cannot_be_had_with_beams_is_refused_by_name(
    model: ModelFolder, sampling: dict[str, Any], field: str, problem: str
) -> None:
    async def test() -> None:
        async with serving(model) as server:
            server.join()
            error = await refused(server.generate(asked(**sampling)))

        assert isinstance(error, InvalidRequest)
        with pytest.raises(InvalidRequest, match=f"^{field}: .*{problem}"):
            raise error

    run(test())
