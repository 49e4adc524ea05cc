"""Streams that are resumed, over sockets: where they still run, and where nobody ever heard of them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace

import grpc
import pytest
from grpc import aio

from common.errors import (
    AlreadyRunning,
    InvalidRequest,
    PagewireError,
    RequestFailed,
    SlowReader,
    Superseded,
    Unavailable,
)
from common.model_folder import ModelFolder, read_model_folder
from common.sampling import RequestLimits
from common.types import FinishReason
from executor.fake_runner import FakeRunner, NextToken, fake_logprobs, position_token, prefix_hash_token
from pagewire import AsyncClient
from protos import inference_pb2 as pb
from protos import inference_pb2_grpc
from scheduler.scheduler import Scheduler, SchedulerLimits
from services.answering import Answerer
from services.engine import Engine
from services.grammar_checker import GrammarChecker
from services.handlers import Context, Write, service_handler
from services.live_requests import LiveRequests
from services.scheduler_service import SchedulerService
from services.slow_readers import SlowReaders
from services.status import from_rpc_error
from services.text import Tokenizer
from services.ticket_keys import new_key
from services.tickets import TicketKey, Tickets
from tests.e2e import fake_model
from tests.services.heard import Call, Heard
from tests.services.instant_link import InstantLink
from tests.services.served import run, served, until

SERVICE = pb.DESCRIPTOR.services_by_name["InferenceService"].full_name
KEY = new_key()
PROMPT = [1, 2, 3]


class Server:
    """A scheduler on a socket, with an executor whose steps the test allows, or that needs no leave."""

    def __init__(self, stub: object, engine: Engine, live: LiveRequests, address: str) -> None:
        self.stub: inference_pb2_grpc.InferenceServiceAsyncStub = stub  # type: ignore[assignment]
        self.engine = engine
        self.live = live
        self.address = address

    def join(
        self, *, steps: int | None = None, digest: str = "fake", next_token: NextToken = prefix_hash_token
    ) -> InstantLink:
        """An executor. `digest` goes into its determinism class."""
        runner = FakeRunner(
            vocab_size=fake_model.VOCAB_SIZE, next_token=next_token, model_digest=digest, max_model_len=512
        )
        link = InstantLink(self.engine, 1, steps=steps, runner=runner)
        self.engine.join(1, link.facts, link)
        return link

    def generate(self, request: pb.GenerateStreamRequest) -> Call:
        return self.stub.GenerateStream(request)

    def resume(self, request: pb.ResumeRequest) -> Call:
        return self.stub.Resume(request)


def request(max_tokens: int = 12, *, n: int = 1, **changes: object) -> pb.GenerateStreamRequest:
    return pb.GenerateStreamRequest(
        token_ids=pb.TokenIds(ids=PROMPT),
        sampling=pb.SamplingParams(n=n),
        stopping=pb.StopConditions(max_tokens=max_tokens, ignore_eos=True),
        **changes,  # type: ignore[arg-type]
    )


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> ModelFolder:
    return read_model_folder(fake_model.write(tmp_path_factory.mktemp("model") / "fake"))


@asynccontextmanager
async def serving(
    model: ModelFolder,
    *,
    key: TicketKey = KEY,
    linger_s: float = 30.0,
    now_s: float = 0.0,
    write: Write | None = None,
    grammars: GrammarChecker | None = None,
    limits: SchedulerLimits | None = None,
) -> AsyncIterator[Server]:
    core = Scheduler(limits or SchedulerLimits(), model=model.digest, eos=set(model.eos_token_ids), secret=b"test")
    engine, live = Engine(core), LiveRequests(linger_s=linger_s, max_lingering=2)
    answerer = Answerer(
        engine,
        model,
        Tokenizer(model.path / "tokenizer.json"),
        None,
        tickets=Tickets([key], lifetime_s=100),
        live=live,
        grammars=grammars,
        clock_s=lambda: now_s,
    )
    server = aio.server()
    service = SchedulerService(answerer, RequestLimits(), lambda: len(core.sessions))
    server.add_generic_rpc_handlers((service_handler(SERVICE, pb.DESCRIPTOR, service, write=write),))
    port = server.add_insecure_port("127.0.0.1:0")
    async with served(server, engine) as channel:
        yield Server(inference_pb2_grpc.InferenceServiceStub(channel), engine, live, f"127.0.0.1:{port}")


async def undisturbed(model: ModelFolder, first: pb.PromptInfo, asked: pb.GenerateStreamRequest) -> Heard:
    """The same request with the same seed, alone."""
    again = pb.GenerateStreamRequest()
    again.CopyFrom(asked)
    again.sampling.seed = first.seed
    heard = Heard(again)
    async with serving(model) as server:
        server.join()
        await heard.rest(server.generate(again))
    return heard


async def refused(call: Call) -> PagewireError:
    with pytest.raises(aio.AioRpcError) as failure:
        await Heard(request()).rest(call)
    error = from_rpc_error(failure.value)
    assert isinstance(error, PagewireError)
    return error


def test_a_lost_stream_goes_on_on_a_server_that_never_heard_of_it(model: ModelFolder) -> None:
    async def test() -> None:
        heard = Heard(request(20, n=2))
        async with serving(model) as first:
            first.join(steps=8)
            await heard.until(first.generate(heard.request), 4)
        assert 4 <= len(heard.tokens[0]) < 20
        async with serving(model) as second:
            second.join()
            await heard.rest(second.resume(heard.to_resume()))

        alone = await undisturbed(model, heard.first, heard.request)
        assert heard.tokens == alone.tokens
        assert heard.text == alone.text
        assert [heard.ends[n].usage.completion_tokens for n in (0, 1)] == [20, 20]
        assert all(end.exact for end in heard.ends.values())

    run(test())


def test_choices_that_have_ended_are_not_asked_for_again_and_the_others_keep_their_numbers(model: ModelFolder) -> None:
    async def test() -> None:
        heard = Heard(request(6, n=3))
        async with serving(model) as first:
            first.join()
            await heard.rest(first.generate(heard.request))
        whole = heard.tokens[2]
        del heard.ends[2]  # as if that had been lost on the way, with every token
        heard.tokens[2], heard.text[2], heard.tickets[2] = [], "", heard.first.ticket
        async with serving(model) as second:
            second.join()
            await heard.rest(second.resume(heard.to_resume()))
        assert heard.tokens[2] == whole
        assert sorted(heard.ends) == [0, 1, 2]

    run(test())


def test_a_stream_whose_every_token_arrived_needs_only_its_end(model: ModelFolder) -> None:
    async def test() -> None:
        heard = Heard(request(6))
        async with serving(model) as first:
            first.join()
            await heard.rest(first.generate(heard.request))
        end = heard.ends.pop(0)
        async with serving(model) as second:  # without an executor: nothing is to be computed
            await heard.rest(second.resume(heard.to_resume()))
        assert heard.ends[0].reason == end.reason == pb.FINISH_REASON_LENGTH
        assert (heard.ends[0].usage.prompt_tokens, heard.ends[0].usage.completion_tokens) == (3, 6)
        assert heard.ends[0].exact

    run(test())


def test_the_stop_string_is_found_across_the_cut(model: ModelFolder) -> None:
    async def test() -> None:
        plain = Heard(request(30))
        async with serving(model) as server:
            server.join()
            await plain.rest(server.generate(plain.request))
        text = plain.text[0]
        stop = next(
            text[i : i + 3] for i in range(10, len(text) - 3) if "\N{REPLACEMENT CHARACTER}" not in text[i : i + 3]
        )
        asked = request(30)
        asked.stopping.stop.append(stop)
        alone = await undisturbed(model, plain.first, asked)
        assert alone.ends[0].matched_stop == stop
        for at in range(1, len(alone.tokens[0])):
            asked.sampling.seed = plain.first.seed
            heard = Heard(asked)
            async with serving(model) as first:
                first.join(steps=at)
                await heard.until(first.generate(asked), at)
            async with serving(model) as second:
                second.join()
                await heard.rest(second.resume(heard.to_resume()))
            assert (heard.tokens, heard.text) == (alone.tokens, alone.text)
            assert heard.ends[0].matched_stop == stop

    run(test())


def test_on_the_server_that_runs_it_a_stream_is_taken_over_and_nothing_is_computed_twice(model: ModelFolder) -> None:
    async def test() -> None:
        heard = Heard(request(20, resumable=True))
        async with serving(model) as server:
            link = server.join(steps=4)
            call = server.generate(heard.request)
            await heard.until(call, 2)
            call.cancel()
            await until(lambda: len(server.live) == 1 and server.engine.num_requests == 1)
            link.allow(100)
            await heard.rest(server.resume(heard.to_resume()))
            assert server.engine.scheduler.counters.output_tokens == 20
            assert len(server.live) == 0
        assert heard.tokens == (await undisturbed(model, heard.first, heard.request)).tokens

    run(test())


def test_a_second_reader_fences_the_first(model: ModelFolder) -> None:
    async def test() -> None:
        heard = Heard(request(20, resumable=True))
        async with serving(model) as server:
            link = server.join(steps=4)
            first = server.generate(heard.request)
            await heard.until(first, 2)
            second = server.resume(heard.to_resume())
            message = await second.read()
            assert isinstance(message, pb.GenerateStreamResponse) and message.prompt.resumed
            with pytest.raises(aio.AioRpcError) as failure:
                await Heard(heard.request, tokens={0: list(heard.tokens[0])}, text={0: ""}).rest(first)
            assert failure.value.code() is grpc.StatusCode.ABORTED
            link.allow(100)
            await heard.rest(second)
        assert heard.tokens == (await undisturbed(model, heard.first, heard.request)).tokens

    run(test())


def test_a_request_that_is_sent_again_before_anything_was_heard_of_it_is_the_same_request(model: ModelFolder) -> None:
    async def test() -> None:
        asked = request(9, resumable=True, request_id="once")
        asked.sampling.seed = 5
        async with serving(model) as server:
            link = server.join(steps=0)
            lost = server.generate(asked)
            await until(lambda: server.engine.num_requests == 1)
            heard = Heard(asked)
            again = server.generate(asked)
            assert isinstance(await refused(lost), Superseded)
            link.allow(100)
            await heard.rest(again)
            assert server.engine.scheduler.counters.output_tokens == 9
        assert len(heard.tokens[0]) == 9

    run(test())


def test_another_request_of_the_same_id_is_refused_while_the_first_runs(model: ModelFolder) -> None:
    async def test() -> None:
        async with serving(model) as server:
            server.join(steps=0)
            server.generate(request(9, resumable=True, request_id="once"))
            await until(lambda: server.engine.num_requests == 1)
            other = server.generate(request(10, resumable=True, request_id="once"))
            await refused(other)
            assert await other.code() is grpc.StatusCode.ALREADY_EXISTS
            assert server.engine.num_requests == 1

    run(test())


def test_a_client_that_is_refused_an_id_leaves_the_request_alone_that_has_it(model: ModelFolder) -> None:
    async def test() -> None:
        async with serving(model) as server, AsyncClient(server.address) as client:
            link = server.join(steps=2)
            running = client.send(request(9, request_id="once"))
            await anext(running)
            for other, error in ((request(10), AlreadyRunning), (request(0), InvalidRequest)):
                other.request_id = "once"
                with pytest.raises(error):
                    async with client.send(other) as stream:
                        await anext(stream)
            link.allow(100)
            async for _ in running:
                pass
            assert len(running.answer.token_ids) == 9
            assert running.answer.finish.reason.value == "length"

    run(test())


def test_a_request_without_a_reader_ends_after_a_while(model: ModelFolder) -> None:
    async def test() -> None:
        async with serving(model, linger_s=0.01) as server:
            server.join(steps=2)
            call = server.generate(request(20, resumable=True))
            await Heard(request()).until(call, 1)
            call.cancel()
            await until(lambda: len(server.live) == 0)
            assert server.engine.num_requests == 0

    run(test())


def test_only_so_many_requests_may_be_without_a_reader(model: ModelFolder) -> None:
    async def test() -> None:
        async with serving(model) as server:
            server.join(steps=0)
            calls = [server.generate(request(20, resumable=True)) for _ in range(4)]
            await until(lambda: server.engine.num_requests == 4)
            for call in calls:
                call.cancel()
            await until(lambda: server.engine.num_requests == 2)
            assert len(server.live) == 2

    run(test())


def test_a_request_that_is_not_resumable_ends_with_its_call(model: ModelFolder) -> None:
    async def test() -> None:
        async with serving(model) as server:
            server.join(steps=2)
            call = server.generate(request(20))
            await Heard(request()).until(call, 1)
            call.cancel()
            await until(lambda: server.engine.num_requests == 0)

    run(test())


def test_a_request_whose_deadline_has_passed_waits_for_no_other_reader(model: ModelFolder) -> None:
    async def test() -> None:
        async with serving(model) as server:
            server.join(steps=0)
            call = server.stub.GenerateStream(request(20, resumable=True), timeout=0.2)
            with pytest.raises(aio.AioRpcError):
                await Heard(request()).rest(call)
            await until(lambda: server.engine.num_requests == 0 and len(server.live) == 0)

    run(test())


def test_cancel_ends_a_request_at_once_and_its_reader_hears_so(model: ModelFolder) -> None:
    async def test() -> None:
        async with serving(model) as server:
            server.join(steps=2)
            heard = Heard(request(20, resumable=True, request_id="r"))
            call = server.generate(heard.request)
            await heard.until(call, 1)
            assert (await server.stub.Cancel(pb.CancelRequest(request_id="r"))).found
            await heard.rest(call)
            assert heard.ends[0].reason == pb.FINISH_REASON_ABORTED
            assert server.engine.num_requests == len(server.live) == 0
            assert not (await server.stub.Cancel(pb.CancelRequest(request_id="r"))).found

    run(test())


def test_what_runs_here_ends_when_its_reader_comes_back_with_other_tokens(model: ModelFolder) -> None:
    """It had gone on elsewhere meanwhile; what it has seen there is the truth."""

    async def test() -> None:
        heard = Heard(request(20, resumable=True))
        async with serving(model) as here, serving(model) as there:
            link = here.join(steps=1)
            await heard.until(here.generate(heard.request), 1)
            (left,) = here.engine.scheduler
            link.allow(2)
            await until(lambda: left.num_output == 3)
            there.join(steps=4, next_token=position_token)
            await heard.until(there.resume(heard.to_resume()), 3)
            assert heard.tokens[0] != left.tokens[len(PROMPT) :].tolist()
            seen = list(heard.tokens[0])
            again = here.resume(heard.to_resume())
            await until(lambda: left.reason is FinishReason.ABORTED)
            link.allow(100)
            await heard.rest(again)
        assert heard.tokens[0][: len(seen)] == seen
        assert len(heard.tokens[0]) == 20
        assert not heard.ends[0].exact

    run(test())


def test_another_class_of_executors_makes_the_stream_inexact_for_good(model: ModelFolder) -> None:
    async def test() -> None:
        heard = Heard(request(20))
        for digest, upto in (("a", 3), ("b", 6), ("a", 20)):
            async with serving(model) as server:
                server.join(steps=upto - len(heard.tokens.get(0, ())), digest=digest)
                call = server.resume(heard.to_resume()) if heard.tokens else server.generate(heard.request)
                await (heard.until(call, upto) if upto < 20 else heard.rest(call))
        assert not heard.ends[0].exact

    run(test())


def test_an_executor_that_promises_nothing_makes_no_exact_stream(model: ModelFolder) -> None:
    async def test() -> None:
        heard = Heard(request(5))
        async with serving(model) as server:
            server.join()
            session = server.engine.scheduler.session(1)
            session.facts = replace(session.facts, determinism="")
            await heard.rest(server.generate(heard.request))
        assert not heard.ends[0].exact
        assert heard.first.determinism == ""

    run(test())


def test_a_ticket_for_other_tokens_is_refused_before_anything_runs(model: ModelFolder) -> None:
    async def test() -> None:
        heard = Heard(request(20))
        async with serving(model) as server:
            server.join(steps=3)
            await heard.until(server.generate(heard.request), 3)
        heard.tokens[0][1] += 1
        async with serving(model) as server:
            call = server.resume(heard.to_resume())
            await refused(call)
            assert await call.code() is grpc.StatusCode.PERMISSION_DENIED
            assert server.engine.num_requests == 0

    run(test())


def test_a_server_with_another_key_refuses(model: ModelFolder) -> None:
    async def test() -> None:
        heard = Heard(request(20))
        async with serving(model) as server:
            server.join(steps=3)
            await heard.until(server.generate(heard.request), 3)
        async with serving(model, key=new_key()) as server:
            call = server.resume(heard.to_resume())
            assert "key" in str(await refused(call))
            assert await call.code() is grpc.StatusCode.PERMISSION_DENIED

    run(test())


def test_an_expired_ticket_is_told_from_a_wrong_one(model: ModelFolder) -> None:
    async def test() -> None:
        heard = Heard(request(20))
        async with serving(model) as server:
            server.join(steps=3)
            await heard.until(server.generate(heard.request), 3)
        async with serving(model, now_s=100) as server:
            call = server.resume(heard.to_resume())
            assert "expired" in str(await refused(call))
            assert await call.code() is grpc.StatusCode.FAILED_PRECONDITION

    run(test())


@pytest.mark.parametrize(
    ("spoil", "field"),
    [
        (lambda r: r.request.ClearField("request_id"), "request.request_id"),
        (lambda r: r.request.sampling.ClearField("seed"), "request.sampling.seed"),
        (lambda r: r.ClearField("choices"), "choices"),
        (lambda r: r.choices.add(choice=1), "choices[1].choice"),
        (lambda r: r.choices.add(choice=0), "choices[1].choice"),
        (lambda r: r.choices[0].token_ids.append(320), "choices[0].token_ids"),
    ],
)
def test_what_is_missing_or_out_of_range_is_named(
    spoil: Callable[[pb.ResumeRequest], object], field: str, model: ModelFolder
) -> None:
    async def test() -> None:
        heard = Heard(request(20))
        async with serving(model) as server:
            server.join(steps=3)
            await heard.until(server.generate(heard.request), 3)
            asked = heard.to_resume()
            spoil(asked)
            call = server.resume(asked)
            assert str(await refused(call)).startswith(f"{field}: ")
            assert await call.code() is grpc.StatusCode.INVALID_ARGUMENT

    run(test())


def test_a_stream_that_fails_with_the_server_keeps_what_was_told_and_can_be_resumed(model: ModelFolder) -> None:
    async def test() -> None:
        heard = Heard(request(20))
        async with serving(model) as server:
            server.join(steps=3)
            call = server.generate(heard.request)
            await heard.until(call, 3)
            server.engine.fail_all(Unavailable("shutting down"))
            with pytest.raises(aio.AioRpcError) as failure:
                await heard.rest(call)
            assert failure.value.code() is grpc.StatusCode.UNAVAILABLE
            assert heard.ends == {}
            assert server.engine.num_requests == 0
        async with serving(model) as server:
            server.join()
            await heard.rest(server.resume(heard.to_resume()))
        assert heard.tokens == (await undisturbed(model, heard.first, heard.request)).tokens

    run(test())


class Full:
    """The call of a reader who reads nothing: what is written to it stays."""

    async def write(self, message: bytes, /) -> None:
        await asyncio.Event().wait()


@pytest.mark.parametrize("resumable", [True, False])
def test_a_reader_who_took_nothing_for_too_long_comes_back_with_its_last_ticket(
    model: ModelFolder, resumable: bool
) -> None:
    async def test() -> None:
        heard, readers = Heard(request(20, resumable=resumable)), SlowReaders(0.05)
        num_written = 0

        async def write(context: Context, message: bytes) -> None:
            nonlocal num_written
            num_written += 1
            link.allow(1)  # for the next message: tokens that are there together would share one
            await (readers.write(Full(), message) if num_written == 4 else context.write(message))

        async with serving(model, write=write) as server:
            link = server.join(steps=0)
            assert isinstance(await refused_after(heard, server.generate(heard.request)), SlowReader)
            await until(lambda: server.engine.num_requests == resumable)
            link.allow(100)
            await heard.rest(server.resume(heard.to_resume()))
            assert len(server.live) == 0
        assert heard.tokens == (await undisturbed(model, heard.first, heard.request)).tokens

    run(test())


async def refused_after(heard: Heard, call: Call) -> PagewireError:
    """What the call failed with, once all of it was heard."""
    with pytest.raises(aio.AioRpcError) as failure:
        await heard.rest(call)
    error = from_rpc_error(failure.value)
    assert isinstance(error, PagewireError)
    return error


def test_what_was_aborted_while_nobody_read_is_no_end_of_the_answer(model: ModelFolder) -> None:
    """The scheduler leaves, or its deadline passes: whoever comes back is sent on, or gets the rest made anew."""

    async def test() -> None:
        heard = Heard(request(20, resumable=True))
        async with serving(model) as server:
            server.join(steps=3)
            call = server.generate(heard.request)
            await heard.until(call, 2)
            call.cancel()
            (live,) = server.live._all.values()
            await until(lambda: live.expiring is not None)
            server.engine.drain()
            server.engine.fail_all(Unavailable("shutting down"))
            assert isinstance(await refused(server.resume(heard.to_resume())), Unavailable)
        async with serving(model) as server:
            server.join()
            await heard.rest(server.resume(heard.to_resume()))
        assert heard.tokens == (await undisturbed(model, heard.first, heard.request)).tokens
        assert heard.ends[0].reason == pb.FINISH_REASON_LENGTH

    run(test())


@pytest.mark.parametrize("resumes", [False, True])
def test_a_request_that_was_given_up_while_nobody_read_is_not_tried_again(model: ModelFolder, resumes: bool) -> None:
    async def test() -> None:
        async with serving(model) as server:
            server.join(steps=3)
            heard = Heard(request(20, resumable=True, request_id="r"))
            call = server.generate(heard.request)
            await heard.until(call, 2)
            call.cancel()
            (live,) = server.live._all.values()
            await until(lambda: live.expiring is not None)
            live.stream.fail(RequestFailed("given up", "00ff"))
            live.stream.close()
            asked = heard.to_resume()
            again = server.resume(asked) if resumes else server.generate(asked.request)
            assert isinstance(await refused(again), RequestFailed)
            assert server.engine.num_requests == 0

    run(test())


def scored(max_tokens: int, *, n: int = 1, prompt: list[int] = PROMPT, **changes: object) -> pb.GenerateStreamRequest:
    asked = request(max_tokens, n=n, **changes)
    asked.token_ids.ids[:] = prompt
    asked.sampling.logprobs, asked.sampling.prompt_logprobs = 2, 1
    return asked


def told(tokens: list[int], num_top: int, *, first: bool = False) -> list[tuple[float | None, list[int]]]:
    """What the fake model says of each token; with `first`, nothing of the first."""
    return [
        (None, []) if first and not n else (fake_logprobs(token, num_top).token, list(range(num_top)))
        for n, token in enumerate(tokens)
    ]


def heard_of(logprobs: list[pb.TokenLogprobs]) -> list[tuple[float | None, list[int]]]:
    return [
        (each.token.logprob if each.token.HasField("logprob") else None, [top.token_id for top in each.top])
        for each in logprobs
    ]


@pytest.mark.parametrize("length", [1, 3, 300])
def test_each_token_comes_with_its_log_probability_and_the_prompt_before_them(model: ModelFolder, length: int) -> None:
    async def test() -> None:
        prompt = [n % 100 for n in range(length)]
        heard = Heard(scored(10, n=2, prompt=prompt))
        async with serving(model) as server:
            server.join()
            await heard.rest(server.generate(heard.request))

        assert heard_of(heard.prompt_logprobs) == told(prompt, 1, first=True)
        assert [each.token.token_id for each in heard.prompt_logprobs] == prompt
        for choice in range(2):
            assert heard_of(heard.logprobs[choice]) == told(heard.tokens[choice], 2)

    run(test())


def test_a_stream_that_goes_on_elsewhere_tells_of_its_new_tokens(model: ModelFolder) -> None:
    async def test() -> None:
        heard = Heard(scored(20, n=2))
        async with serving(model) as first:
            first.join(steps=8)
            await heard.until(first.generate(heard.request), 4)
        assert 4 <= len(heard.tokens[0]) < 20
        before = len(heard.prompt_logprobs)
        async with serving(model) as second:
            second.join()
            await heard.rest(second.resume(heard.to_resume()))

        assert before == len(heard.prompt_logprobs) == len(PROMPT)
        for choice in range(2):
            assert heard_of(heard.logprobs[choice]) == told(heard.tokens[choice], 2)

    run(test())


def test_who_takes_a_running_request_over_from_its_beginning_is_told_all_of_it_again(model: ModelFolder) -> None:
    async def test() -> None:
        asked = scored(12, request_id="r", resumable=True)
        asked.sampling.seed = 1
        first, second = Heard(asked), Heard(asked)
        async with serving(model) as server:
            link = server.join(steps=5)
            await first.until(server.generate(asked), 4)
            call = server.generate(asked)
            await second.until(call, 4)
            link.allow(100)
            await second.rest(call)

        assert heard_of(second.prompt_logprobs) == told(PROMPT, 1, first=True)
        assert heard_of(second.logprobs[0]) == told(second.tokens[0], 2)
        assert len(second.tokens[0]) == 12

    run(test())


def test_a_stop_string_cuts_the_log_probabilities_with_its_tokens(model: ModelFolder) -> None:
    async def test() -> None:
        heard = Heard(scored(12))
        heard.request.stopping.stop.append("&")  # position 5, in the tokenizer of the fake model
        async with serving(model) as server:
            server.join(next_token=position_token)
            await heard.rest(server.generate(heard.request))

        assert heard.tokens[0] == [3, 4, 5]
        assert heard_of(heard.logprobs[0]) == told([3, 4, 5], 2)
        assert [each.token.text for each in heard.logprobs[0]] == [b"$", b"%", b"&"]

    run(test())
