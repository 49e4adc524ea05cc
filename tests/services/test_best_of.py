"""The best of several choices over sockets: which they are, when they come, and what a resumed stream does."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from common.errors import TicketStale
from common.model_folder import ModelFolder, read_model_folder
from executor.fake_runner import NextToken, Prefix, fake_logprobs, prefix_hash_token
from protos import inference_pb2 as pb
from services import best_of
from tests.e2e import fake_model
from tests.services.heard import Heard
from tests.services.served import run, until
from tests.services.test_resuming import heard_of, refused, request, serving, told, undisturbed

MAX_TOKENS = 12


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> ModelFolder:
    return read_model_folder(fake_model.write(tmp_path_factory.mktemp("model") / "fake"))


def asking(n: int, best_of: int, **changes: Any) -> pb.GenerateStreamRequest:
    asked = request(MAX_TOKENS, n=n, **changes)
    asked.sampling.best_of, asked.sampling.seed = best_of, 5
    return asked


async def all_of(model: ModelFolder, asked: pb.GenerateStreamRequest) -> list[tuple[list[int], str, pb.Finish]]:
    """Every choice that `best_of` makes, as `n` makes them, the best first."""
    plain = pb.GenerateStreamRequest()
    plain.CopyFrom(asked)
    plain.sampling.n = asked.sampling.best_of
    plain.sampling.ClearField("best_of")
    heard = await undisturbed(model, pb.PromptInfo(seed=asked.sampling.seed), plain)
    choices = [(heard.tokens[k], heard.text[k], heard.ends[k]) for k in range(plain.sampling.n)]
    return sorted(choices, key=lambda choice: sum(choice[0]) / len(choice[0]))  # a fake token's is minus itself


@pytest.mark.parametrize(("n", "best_of"), [(1, 2), (2, 5), (3, 3), (1, 8)])
def test_the_likeliest_choices_are_told_the_best_first(model: ModelFolder, n: int, best_of: int) -> None:
    async def test() -> None:
        heard = Heard(asking(n, best_of))
        async with serving(model) as server:
            server.join()
            await heard.rest(server.generate(heard.request))
            assert server.engine.scheduler.counters.output_tokens == best_of * MAX_TOKENS
        best = await all_of(model, heard.request)

        assert [(heard.tokens[place], heard.text[place]) for place in range(n)] == [each[:2] for each in best[:n]]
        assert not any(heard.logprobs.values()), "nobody has asked for them"
        usage = [heard.ends[place].usage for place in range(n)]
        assert [each.completion_tokens for each in usage] == [MAX_TOKENS] * n
        assert [each.discarded_tokens for each in usage] == [(best_of - n) * MAX_TOKENS] + [0] * (n - 1)
        assert all(heard.ends[place].exact for place in range(n))

    run(test())


def test_the_unary_answer_is_the_same(model: ModelFolder) -> None:
    async def test() -> None:
        asked = asking(2, 4)
        unary = pb.GenerateRequest(token_ids=asked.token_ids, sampling=asked.sampling, stopping=asked.stopping)
        unary.sampling.logprobs = 2
        async with serving(model) as server:
            server.join()
            answer = await server.stub.Generate(unary)
        best = await all_of(model, asked)

        assert [choice.index for choice in answer.choices] == [0, 1]
        assert [(list(choice.token_ids), choice.text) for choice in answer.choices] == [each[:2] for each in best[:2]]
        for choice in answer.choices:
            assert heard_of(list(choice.logprobs)) == told(list(choice.token_ids), 2)

    run(test())


def test_nothing_is_told_before_all_have_ended(model: ModelFolder) -> None:
    async def test() -> None:
        heard = Heard(asking(1, 3))
        async with serving(model) as server:
            link = server.join(steps=MAX_TOKENS)  # the other choices begin one step later
            call = server.generate(heard.request)
            message = await call.read()
            assert isinstance(message, pb.GenerateStreamResponse) and message.HasField("prompt")
            heard.hear(message)
            await until(lambda: server.engine.num_requests == 2)
            assert heard.tokens[0] == []
            link.allow(100)
            await heard.rest(call)
        assert len(heard.tokens[0]) == MAX_TOKENS

    run(test())


@pytest.mark.parametrize("stop", ["&", "+", "\x00"])
def test_what_a_stop_string_or_token_ended_is_compared_as_it_is_told(model: ModelFolder, stop: str) -> None:
    """Choices of several lengths: some end by the string, some by a token, some by their length."""

    async def test() -> None:
        asked = asking(4, 8)
        asked.stopping.stop.append(stop)
        asked.stopping.stop_token_ids.extend(range(0, 300, 11))
        heard = Heard(asked)
        async with serving(model) as server:
            server.join()
            await heard.rest(server.generate(asked))
        best = await all_of(model, asked)

        assert len({len(tokens) for tokens, _, _ in best}) > 2
        for place, (tokens, text, end) in enumerate(best[:4]):
            assert (heard.tokens[place], heard.text[place]) == (tokens, text)
            assert heard.ends[place].reason == end.reason
            assert heard.ends[place].matched_stop == end.matched_stop
        assert heard.ends[0].usage.discarded_tokens == sum(len(tokens) for tokens, _, _ in best[4:])

    run(test())


def test_a_stop_string_in_the_last_character_is_found_again(model: ModelFolder) -> None:
    """One that ends the text only as the last bytes are told: at max_tokens."""

    async def test() -> None:
        asked = asking(2, 2)
        asked.stopping.stop.append("\N{REPLACEMENT CHARACTER}")
        heard = Heard(asked)
        async with serving(model) as server:
            server.join()
            await heard.rest(server.generate(asked))
        best = await all_of(model, asked)
        assert [(heard.tokens[p], heard.text[p], heard.ends[p].reason) for p in range(2)] == [
            (tokens, text, end.reason) for tokens, text, end in best
        ]

    run(test())


def test_a_choice_that_fails_is_told_only_where_there_is_no_other(model: ModelFolder) -> None:
    def fails(prefix: Prefix) -> int | None:
        return None if prefix.choice != 2 and prefix.num_tokens > 5 else prefix_hash_token(prefix)

    async def test() -> None:
        heard = Heard(asking(2, 3))
        async with serving(model) as server:
            server.join(next_token=fails)
            await heard.rest(server.generate(heard.request))
        assert heard.ends[0].reason == pb.FINISH_REASON_LENGTH
        assert heard.ends[1].reason == pb.FINISH_REASON_ERROR

    run(test())


def test_a_part_of_the_best_is_gone_on_with_before_what_is_asked_anew(
    model: ModelFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All choices are made again, so none of them has begun; and yet half of the answer is with its reader."""
    monkeypatch.setattr(best_of, "_PART", 4)

    async def test() -> None:
        whole, heard = Heard(asking(1, 3)), Heard(asking(1, 3))
        async with serving(model) as first:
            first.join()
            await whole.rest(first.generate(whole.request))
            call = first.generate(heard.request)
            await heard.until(call, 4)
            call.cancel()
        async with serving(model) as second:
            link = second.join(steps=1)
            call = second.resume(heard.to_resume())
            (session,) = second.engine.scheduler.sessions
            await until(lambda: len(session.running) == 3)
            assert all(sequence.request.resumed for sequence in session.running)
            link.allow(1000)
            await heard.rest(call)
        assert heard.tokens == whole.tokens

    run(test())


def test_a_stream_that_is_lost_is_made_anew_elsewhere_and_goes_on_behind_what_was_told(model: ModelFolder) -> None:
    async def test() -> None:
        whole = Heard(asking(2, 4))
        async with serving(model) as first:
            first.join()
            await whole.rest(first.generate(whole.request))
        for lost in ((0, 1), (1,)):  # with every token, and its end: what of a stream comes in one message is not cut
            heard = Heard(whole.request, first=whole.first)
            for choice in (0, 1):
                heard.tokens[choice], heard.text[choice] = [], ""
                heard.tickets[choice] = whole.first.ticket
                if choice not in lost:
                    heard.tokens[choice], heard.text[choice] = whole.tokens[choice], whole.text[choice]
                    heard.ends[choice] = whole.ends[choice]
            async with serving(model) as second:
                second.join()
                await heard.rest(second.resume(heard.to_resume()))
                assert second.engine.scheduler.counters.output_tokens == 4 * MAX_TOKENS
            assert (heard.tokens, heard.text) == (whole.tokens, whole.text)
            assert heard.ends[1].usage.completion_tokens == MAX_TOKENS

    run(test())


def test_a_part_that_was_told_is_not_told_again_and_only_the_same_answer_goes_on(
    model: ModelFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("services.best_of._PART", 5)

    def other(prefix: Prefix) -> int:
        return prefix_hash_token(replace(prefix, seed=prefix.seed + 1))

    async def test() -> None:
        whole, heard = Heard(asking(1, 3)), Heard(asking(1, 3))
        async with serving(model) as first:
            first.join()
            await whole.rest(first.generate(whole.request))
            await heard.until(first.generate(heard.request), 5)
        assert len(heard.tokens[0]) == 5
        asked = heard.to_resume()
        async with serving(model) as second:
            second.join(next_token=other)
            assert isinstance(await refused(second.resume(asked)), TicketStale)
        async with serving(model) as third:
            third.join()
            await heard.rest(third.resume(asked))
        assert (heard.tokens, heard.text) == (whole.tokens, whole.text)

    run(test())


def test_a_choice_that_was_told_whole_needs_only_its_end(model: ModelFolder) -> None:
    async def test() -> None:
        heard = Heard(asking(1, 3))
        async with serving(model) as first:
            first.join()
            await heard.rest(first.generate(heard.request))
        end = heard.ends.pop(0)
        async with serving(model) as second:  # without an executor
            await heard.rest(second.resume(heard.to_resume()))
        assert heard.ends[0].reason == end.reason

    run(test())


@pytest.mark.parametrize("resumes", [False, True])
def test_who_comes_back_while_it_runs_takes_it_over_and_nothing_is_computed_twice(
    model: ModelFolder, resumes: bool
) -> None:
    async def test() -> None:
        asked = asking(2, 4, resumable=True, request_id="r")
        asked.stopping.stop.append("+")
        heard = Heard(asked)
        async with serving(model) as server:
            link = server.join(steps=4)
            call = server.generate(asked)
            message = await call.read()
            assert isinstance(message, pb.GenerateStreamResponse)
            heard.hear(message)
            call.cancel()
            (live,) = server.live._all.values()
            await until(lambda: live.expiring is not None)
            again = server.resume(heard.to_resume()) if resumes else server.generate(asked)
            link.allow(100)
            await heard.rest(again)
            assert len(server.live) == 0
            assert server.engine.scheduler.counters.output_tokens <= 4 * MAX_TOKENS
        best = await all_of(model, asked)
        assert [(heard.tokens[place], heard.text[place]) for place in (0, 1)] == [each[:2] for each in best[:2]]

    run(test())


def test_the_prompt_is_scored_once_and_told_before(model: ModelFolder) -> None:
    async def test() -> None:
        asked = asking(2, 3)
        asked.sampling.prompt_logprobs = 1
        heard = Heard(asked)
        async with serving(model) as server:
            server.join()
            await heard.rest(server.generate(asked))
        assert heard_of(heard.prompt_logprobs) == told([1, 2, 3], 1, first=True)

    run(test())


def test_one_of_one_is_told_as_it_is_made(model: ModelFolder) -> None:
    async def test() -> None:
        heard = Heard(asking(1, 1))
        async with serving(model) as server:
            server.join(steps=3)
            await heard.until(server.generate(heard.request), 2)

    run(test())


def hashes_below(limit: int) -> NextToken:
    def token(prefix: Prefix) -> int:
        return prefix_hash_token(prefix) % limit

    return token


def test_of_equal_choices_the_first_is_the_better(model: ModelFolder) -> None:
    async def test() -> None:
        heard = Heard(asking(2, 4))
        async with serving(model) as server:
            server.join(next_token=hashes_below(1))
            await heard.rest(server.generate(heard.request))
        assert fake_logprobs(0, 0).token == 0
        assert heard.tokens[0] == heard.tokens[1] == [0] * MAX_TOKENS

    run(test())
