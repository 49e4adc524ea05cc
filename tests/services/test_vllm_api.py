"""vllm.grpc.engine over a socket, with the stubs that SMG publishes: what it makes of requests and of answers."""

from __future__ import annotations

import asyncio
import hashlib
import io
import struct
import zipfile
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.rpc import error_details_pb2, status_pb2
from grpc import aio
from smg_grpc_proto.generated import vllm_engine_pb2_grpc

from common.errors import InvalidRequest
from common.model_folder import ModelFolder, read_model_folder
from common.sampling import RequestLimits
from executor.fake_runner import FakeRunner, digests_of, fake_vector, position_token
from protos import inference_pb2
from scheduler.scheduler import Scheduler, SchedulerLimits
from services.admission import Admission, AdmissionLimits
from services.answering import Answerer
from services.caller import Caller, let_in
from services.chat_template import ChatTemplate
from services.engine import Engine
from services.grammar_checker import GrammarChecker
from services.handlers import service_handler
from services.scheduler_service import SchedulerService
from services.status import DETAILS_KEY
from services.text import Tokenizer
from services.vllm_api.requests import request_from_vllm
from services.vllm_api.service import VllmEngine
from services.vllm_api.stubs import common_pb2 as common
from services.vllm_api.stubs import vllm_pb2 as vllm
from services.vllm_api.tokenizer_zip import TokenizerZip
from tests.e2e import fake_model
from tests.services.instant_link import InstantLink
from tests.services.served import HANG_S, served, until

PROMPT = [65, 66, 67]  # the fake model goes on 3, 4, 5, …
NOTHING = vllm.GenerateRequest()


class Server:
    """A scheduler on a socket, whose executors answer when the test allows."""

    def __init__(self, stub: Any, engine: Engine, service: VllmEngine) -> None:
        self.stub = stub
        self.engine = engine
        self.service = service

    def join(self, *, steps: int | None = None, session: int = 1) -> InstantLink:
        runner = FakeRunner(vocab_size=fake_model.VOCAB_SIZE, next_token=position_token, max_model_len=512)
        link = InstantLink(self.engine, session, steps=steps, runner=runner)
        self.engine.join(session, link.facts, link)
        return link

    async def generate(self, request: vllm.GenerateRequest) -> list[vllm.GenerateResponse]:
        return [message async for message in self.stub.Generate(request)]

    async def whole(self, **sampling: Any) -> vllm.GenerateComplete:
        """The one choice of an answer that is asked for whole."""
        (message,) = await self.generate(asked(**sampling))
        return message.complete


def asked(*, stream: bool = False, request_id: str = "", **sampling: Any) -> vllm.GenerateRequest:
    return vllm.GenerateRequest(
        request_id=request_id,
        tokenized=vllm.TokenizedInput(input_ids=PROMPT),
        sampling_params=vllm.SamplingParams(**{"temperature": 0.0, "max_tokens": 4, "ignore_eos": True, **sampling}),
        stream=stream,
    )


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> ModelFolder:
    return read_model_folder(fake_model.write(tmp_path_factory.mktemp("model") / "fake"))


@asynccontextmanager
async def serving(model: ModelFolder, *, max_waiting: int = 100, max_kv_streams: int = 16) -> AsyncIterator[Server]:
    core = Scheduler(SchedulerLimits(), model=model.digest, eos=set(model.eos_token_ids), secret=b"test")
    engine = Engine(core, admission=Admission(AdmissionLimits(max_waiting=max_waiting)))
    grammars = GrammarChecker(model)
    answerer = Answerer(
        engine, model, Tokenizer(model.path / "tokenizer.json"), ChatTemplate.of(model), grammars=grammars
    )  # fmt: skip
    ours = SchedulerService(answerer, RequestLimits(), lambda: 0)
    service = VllmEngine(ours.start, ours.Embed, answerer, engine, max_kv_streams=max_kv_streams)
    server = aio.server(interceptors=(ByHeader(),))
    server.add_generic_rpc_handlers((service_handler(service.name, service.file, service.methods()),))
    try:
        async with served(server, engine) as channel:
            yield Server(vllm_engine_pb2_grpc.VllmEngineStub(channel), engine, service)
    finally:
        await grammars.close()


class ByHeader(aio.ServerInterceptor):
    """A gate that believes what it is told: who calls is in the header `tenant`."""

    async def intercept_service(self, continuation: Any, handler_call_details: grpc.HandlerCallDetails) -> Any:
        metadata: Mapping[str, Any] = dict(handler_call_details.invocation_metadata)
        let_in(Caller(tenant=metadata.get("tenant", "")))
        return await continuation(handler_call_details)


def run(model: ModelFolder, test: Callable[[Server], Awaitable[None]], *, joined: bool = True, **how: Any) -> None:
    async def main() -> None:
        async with asyncio.timeout(HANG_S), serving(model, **how) as server:
            if joined:
                server.join()
            await test(server)

    asyncio.run(main())


async def refused(call: Awaitable[Any]) -> aio.AioRpcError:
    try:
        await call
    except aio.AioRpcError as error:
        return error
    raise AssertionError("it was not refused")


def field_of(error: aio.AioRpcError) -> str:
    """Which field the details of a refusal name."""
    details = dict(error.trailing_metadata() or ())[DETAILS_KEY]
    assert isinstance(details, bytes)
    violation = error_details_pb2.BadRequest()
    assert any(each.Unpack(violation) for each in status_pb2.Status.FromString(details).details)
    return str(violation.field_violations[0].field)


# ---- answers


def test_a_whole_answer_is_one_message_a_choice_with_all_of_it(model: ModelFolder) -> None:
    async def test(server: Server) -> None:
        first, second = await server.generate(asked(n=2, logprobs=2))
        for index, message in enumerate((first, second)):
            told = message.complete
            assert (told.index, list(told.output_ids), told.finish_reason) == (index, [3, 4, 5, 6], "length")
            assert (told.prompt_tokens, told.completion_tokens, told.cached_tokens) == (3, 4, 0)
            assert list(told.output_logprobs.token_ids) == [3, 4, 5, 6]
            assert list(told.output_logprobs.token_logprobs) == [-3.0, -4.0, -5.0, -6.0]
            assert list(told.output_logprobs.top_logprobs[3].token_ids) == [0, 1]

    run(model, test)


def test_how_likely_the_prompt_was_comes_with_the_answer_or_its_first_chunk(model: ModelFolder) -> None:
    async def test(server: Server) -> None:
        told = (await server.whole(prompt_logprobs=0)).input_logprobs
        assert list(told.token_ids) == PROMPT
        assert [each.HasField("value") for each in told.token_logprobs] == [False, True, True]
        chunks = [m.chunk for m in await server.generate(asked(stream=True, prompt_logprobs=1)) if m.HasField("chunk")]
        assert [list(chunk.input_logprobs.token_ids) for chunk in chunks if chunk.HasField("input_logprobs")] == [
            PROMPT
        ]
        assert chunks[0].HasField("input_logprobs")

    run(model, test)


def test_a_stream_is_new_tokens_and_an_end_for_each_choice(model: ModelFolder) -> None:
    async def test(server: Server) -> None:
        tokens: dict[int, list[int]] = {0: [], 1: []}
        scores: list[float] = []
        ends: dict[int, vllm.GenerateComplete] = {}
        for message in await server.generate(asked(stream=True, n=2, logprobs=0)):
            if message.HasField("complete"):
                ends[message.complete.index] = message.complete
                continue
            chunk = message.chunk
            assert chunk.index not in ends and chunk.completion_tokens == len(chunk.token_ids) > 0
            tokens[chunk.index] += chunk.token_ids
            if not chunk.index:
                scores += chunk.output_logprobs.token_logprobs
        assert tokens == {0: [3, 4, 5, 6], 1: [3, 4, 5, 6]}
        assert scores == [-3.0, -4.0, -5.0, -6.0]
        assert [(end.finish_reason, end.completion_tokens) for end in ends.values()] == [("length", 4)] * 2
        assert not any(end.output_ids for end in ends.values()), "they were told"

    run(model, test)


def test_text_is_tokenised_here_and_what_is_cached_is_told(model: ModelFolder) -> None:
    async def test(server: Server) -> None:
        request = asked()
        request.text = "ABCDEFGHI"
        (cold,) = await server.generate(request)
        (warm,) = await server.generate(request)
        assert list(cold.complete.output_ids) == list(warm.complete.output_ids) == [9, 10, 11, 12]
        assert (cold.complete.cached_tokens, warm.complete.cached_tokens) == (0, 8)

    run(model, test)


def test_an_end_says_what_ended_it_where_the_caller_had_asked_for_that(model: ModelFolder) -> None:
    async def test(server: Server) -> None:
        by_token = await server.whole(stop_token_ids=[5])
        by_text = await server.whole(stop=["%"], max_tokens=100, skip_special_tokens=True)
        by_model = await server.whole(ignore_eos=False, max_tokens=400)
        assert (by_token.finish_reason, by_token.matched_token_id) == ("stop", 5)
        assert (by_text.finish_reason, by_text.matched_stop_str) == ("stop", "%")
        assert (by_model.finish_reason, by_model.WhichOneof("matched_stop")) == ("stop", None)
        assert by_model.output_ids[-1] == fake_model.EOS

    run(model, test)


# ---- requests


def test_zero_means_not_set_where_theirs_cannot_tell_and_all_else_means_what_it_says() -> None:
    plain = request_from_vllm(vllm.GenerateRequest(text="x", sampling_params=vllm.SamplingParams()))
    assert plain.sampling == inference_pb2.SamplingParams()
    assert not plain.stopping.HasField("max_tokens") and not plain.skip_special_tokens

    everything = vllm.SamplingParams(
        temperature=0.5,
        top_p=0.75,
        top_k=3,
        min_p=0.25,
        seed=-1,
        n=1,
        logprobs=0,
        frequency_penalty=0.5,
        presence_penalty=-0.5,
        repetition_penalty=1.5,
        prompt_logprobs=3,
        max_tokens=9,
        min_tokens=2,
        stop=["a"],
        stop_token_ids=[4],
        ignore_eos=True,
        include_stop_str_in_output=True,
        logit_bias={5: -1.0},
        skip_special_tokens=True,
    )
    assert request_from_vllm(vllm.GenerateRequest(text="x", sampling_params=everything)) == (
        inference_pb2.GenerateRequest(
            text="x",
            sampling=inference_pb2.SamplingParams(
                temperature=0.5,
                top_p=0.75,
                top_k=3,
                min_p=0.25,
                seed=2**64 - 1,
                n=1,
                frequency_penalty=0.5,
                presence_penalty=-0.5,
                repetition_penalty=1.5,
                logprobs=0,
                prompt_logprobs=3,
                logit_bias={5: -1.0},
            ),
            stopping=inference_pb2.StopConditions(
                max_tokens=9, stop=["a"], stop_token_ids=[4], ignore_eos=True, min_tokens=2, include_stop=True
            ),
            skip_special_tokens=True,
        )
    )


@pytest.mark.parametrize(
    ("constraint", "means"),
    [
        ({"json_schema": "{}"}, {"json_schema": "{}"}),
        ({"regex": "a+"}, {"regex": "a+"}),
        ({"grammar": 'start: "a"'}, {"grammar": 'start: "a"'}),
        ({"json_object": True}, {"json_object": True}),
        (
            {"choice": vllm.ChoiceConstraint(choices=["yes", "no"])},
            {"choices": inference_pb2.StringList(values=["yes", "no"])},
        ),
    ],
    ids=lambda each: next(iter(each)),
)
def test_every_constraint_has_its_counterpart(constraint: dict[str, Any], means: dict[str, Any]) -> None:
    asked = vllm.GenerateRequest(text="x", sampling_params=vllm.SamplingParams(**constraint))

    assert request_from_vllm(asked).sampling.structured == inference_pb2.StructuredOutput(**means)


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"mm_inputs": vllm.MultimodalInputs(im_token_id=1)}, "mm_inputs"),
        ({"kv_transfer_params_json": "{}"}, "kv_transfer_params_json"),
        ({"data_parallel_rank": 1}, "data_parallel_rank"),
        ({"sampling_params": vllm.SamplingParams(structural_tag="{}")}, "structural_tag"),
        ({"sampling_params": vllm.SamplingParams(truncate_prompt_tokens=3)}, "truncate_prompt_tokens"),
        ({"sampling_params": vllm.SamplingParams(logprobs=-1)}, "logprobs"),
        ({"sampling_params": vllm.SamplingParams(prompt_logprobs=-1)}, "prompt_logprobs"),
        ({"sampling_params": vllm.SamplingParams(prompt_logprobs=0, n=2)}, "prompt_logprobs"),  # a copy for each
        ({"sampling_params": vllm.SamplingParams(logit_bias={-1: 1.0})}, "logit_bias"),
    ],
    ids=lambda each: each if isinstance(each, str) else "",
)
def test_what_is_not_served_is_refused_by_its_name(change: dict[str, Any], field: str) -> None:
    request = vllm.GenerateRequest(text="x")
    request.MergeFrom(vllm.GenerateRequest(**change))
    with pytest.raises(InvalidRequest) as caught:
        request_from_vllm(request)
    assert caught.value.field == field


@pytest.mark.parametrize(
    ("request_of", "field"),
    [
        (lambda: NOTHING, "tokenized"),
        (lambda: vllm.GenerateRequest(tokenized=vllm.TokenizedInput()), "tokenized.input_ids"),
        (lambda: vllm.GenerateRequest(tokenized=vllm.TokenizedInput(input_ids=[999])), "tokenized.input_ids"),
        (lambda: asked(top_p=7.0), "top_p"),
        (lambda: asked(n=99), "n"),
        (lambda: asked(max_tokens=0), "max_tokens"),
        (lambda: asked(logprobs=99), "logprobs"),
        (lambda: asked(json_schema='{"type": 7}', ignore_eos=False), "json_schema"),
        (lambda: asked(grammar='root ::= "a"', ignore_eos=False), "grammar"),
        (lambda: asked(choice=vllm.ChoiceConstraint(), ignore_eos=False), "choice"),
    ],
)
def test_what_is_wrong_is_told_by_the_name_it_has_there(
    model: ModelFolder, request_of: Callable[[], vllm.GenerateRequest], field: str
) -> None:
    async def test(server: Server) -> None:
        error = await refused(server.generate(request_of()))
        assert (error.code(), field_of(error)) == (grpc.StatusCode.INVALID_ARGUMENT, field)

    run(model, test)


def test_where_there_is_no_room_it_is_refused_as_ours_is_and_told_when_there_will_be(model: ModelFolder) -> None:
    async def test(server: Server) -> None:
        waiting = server.stub.Generate(asked(request_id="first"))
        await until(lambda: bool(server.engine.num_requests))
        error = await refused(server.generate(asked()))
        assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert "grpc-retry-pushback-ms" in dict(error.trailing_metadata() or ())
        waiting.cancel()

    run(model, test, joined=False, max_waiting=1)


# ---- the end of requests


def test_who_aborts_a_request_ends_it_and_its_reader_hears_so(model: ModelFolder) -> None:
    async def test(server: Server) -> None:
        server.join(steps=3)
        call = server.stub.Generate(asked(stream=True, request_id="a", max_tokens=50))
        heard = aiter(call)
        assert (await anext(heard)).chunk.token_ids[0] == 3
        await server.stub.Abort(vllm.AbortRequest(request_ids=["unknown", "a"]))
        messages = [message async for message in heard]
        assert messages[-1].complete.finish_reason == "abort"
        assert server.engine.num_requests == 0
        await server.stub.Abort(vllm.AbortRequest(request_ids=["a"]))  # twice is harmless

    run(model, test, joined=False)


def test_a_tenant_aborts_none_but_its_own(model: ModelFolder) -> None:
    async def test(server: Server) -> None:
        call = server.stub.Generate(asked(request_id="a", stream=True), metadata=[("tenant", "one")])
        await until(lambda: bool(server.engine.num_requests))
        await server.stub.Abort(vllm.AbortRequest(request_ids=["a"]), metadata=[("tenant", "other")])
        assert server.engine.num_requests == 1
        await server.stub.Abort(vllm.AbortRequest(request_ids=["a"]), metadata=[("tenant", "one")])
        assert [message.complete.finish_reason async for message in call] == ["abort"]

    run(model, test, joined=False)


def test_who_leaves_leaves_nothing_running(model: ModelFolder) -> None:
    async def test(server: Server) -> None:
        call = server.stub.Generate(asked(request_id="a"))
        await until(lambda: bool(server.engine.num_requests))
        error = await refused(server.generate(asked(request_id="a")))
        assert error.code() is grpc.StatusCode.ALREADY_EXISTS
        call.cancel()
        await until(lambda: not server.engine.num_requests)

    run(model, test, joined=False)


# ---- what it says of itself


def test_it_is_healthy_while_an_executor_is_there(model: ModelFolder) -> None:
    async def test(server: Server) -> None:
        before = await server.stub.HealthCheck(vllm.HealthCheckRequest())
        server.join()
        after = await server.stub.HealthCheck(vllm.HealthCheckRequest())
        assert (before.healthy, after.healthy) == (False, True) and "executor" in before.message
        server.engine.drain()
        draining = await server.stub.HealthCheck(vllm.HealthCheckRequest())
        assert not draining.healthy and "stops" in draining.message

    run(model, test, joined=False)


def test_the_model_is_described(model: ModelFolder) -> None:
    async def test(server: Server) -> None:
        info = await server.stub.GetModelInfo(vllm.GetModelInfoRequest())
        assert (info.served_model_name, info.model_path, info.tokenizer_path) == ("fake", "fake", "fake")
        assert (info.max_context_length, info.vocab_size, list(info.eos_token_ids)) == (512, 320, [fake_model.EOS])
        assert info.is_generation and not info.supports_vision

    run(model, test)


def test_loads_are_counted_and_a_tenant_hears_of_its_own_alone(model: ModelFolder) -> None:
    async def test(server: Server) -> None:
        server.join(steps=0)

        def ask(tenant: str) -> Any:
            return server.stub.Generate(asked(stream=True, max_tokens=50), metadata=[("tenant", tenant)])

        calls = [ask("")]
        await until(lambda: len(server.engine.scheduler.sessions[0].running) == 1)
        calls += [ask("one"), ask("one")]
        await until(lambda: server.engine.num_requests == 3)
        (all_of_it,) = (await server.stub.GetLoads(vllm.GetLoadsRequest())).loads
        (own,) = (await server.stub.GetLoads(vllm.GetLoadsRequest(), metadata=[("tenant", "one")])).loads
        assert all_of_it.num_total_reqs == 1 and all_of_it.num_used_tokens > 0 and all_of_it.token_usage > 0
        assert (own.num_total_reqs, own.num_used_tokens) == (2, 0)
        info = await server.stub.GetServerInfo(vllm.GetServerInfoRequest())
        assert (info.active_requests, info.data_parallel_size, info.block_size) == (1, 1, 4)
        for call in calls:
            call.cancel()

    run(model, test, joined=False)


def test_the_tokenizer_comes_as_an_archive_whose_digest_is_at_its_end(model: ModelFolder) -> None:
    async def test(server: Server) -> None:
        chunks = [chunk async for chunk in server.stub.GetTokenizer(common.GetTokenizerRequest())]
        data = b"".join(chunk.data for chunk in chunks)
        assert [bool(chunk.sha256) for chunk in chunks] == [False] * (len(chunks) - 1) + [True]
        assert chunks[-1].sha256 == hashlib.sha256(data).hexdigest()
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            assert {"tokenizer.json", "tokenizer_config.json", "config.json"} == set(archive.namelist())
            assert archive.read("tokenizer.json") == (model.path / "tokenizer.json").read_bytes()

    run(model, test)


def test_the_cache_is_told_and_flushed(model: ModelFolder) -> None:
    async def test(server: Server) -> None:
        events = server.stub.SubscribeKvEvents(common.SubscribeKvEventsRequest())
        assert (await events.read()).events[0].HasField("cleared")
        request = asked()
        request.text = "ABCDEFGHI"
        await server.generate(request)
        stored = (await events.read()).events[0].stored
        assert [list(block.token_ids) for block in stored.blocks][:1] == [[32, 33, 34, 35]]
        flushed = await server.stub.FlushCache(common.FlushCacheRequest())
        assert flushed.success
        (again,) = await server.generate(request)
        assert again.complete.cached_tokens == 0
        events.cancel()

    run(model, test)


def test_an_archive_that_could_not_be_made_is_tried_again(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    async def main() -> None:
        archive = TokenizerZip(tmp_path)
        with monkeypatch.context() as changed:
            changed.setattr(zipfile, "ZipFile", failing)
            with pytest.raises(OSError, match="too many open files"):
                await anext(archive.chunks())
        assert (await anext(archive.chunks())).sha256

    def failing(*_: object) -> None:
        raise OSError("too many open files")

    asyncio.run(main())


def test_cache_events_can_be_switched_off(model: ModelFolder) -> None:
    async def test(server: Server) -> None:
        error = await refused(server.stub.SubscribeKvEvents(common.SubscribeKvEventsRequest()).read())
        assert error.code() is grpc.StatusCode.UNIMPLEMENTED

    run(model, test, max_kv_streams=0)


def test_methods_that_are_not_served_say_so(model: ModelFolder) -> None:
    async def test(server: Server) -> None:
        error = await refused(server.stub.StartProfile(common.StartProfileRequest()))
        assert error.code() is grpc.StatusCode.UNIMPLEMENTED
        assert "StartProfile is not served here" in (error.details() or "")

    run(model, test)


def test_a_vector_is_made_of_tokens_where_the_model_makes_any(model: ModelFolder, tmp_path: Path) -> None:
    vectors = read_model_folder(fake_model.add_vectors(fake_model.write(tmp_path / "fake"), normalizes=False))
    asked = vllm.EmbedRequest(request_id="a", tokenized=vllm.TokenizedInput(input_ids=PROMPT))

    async def makes(server: Server) -> None:
        told = await server.stub.Embed(asked)
        assert struct.pack("<8f", *told.embedding) == fake_vector(digests_of(PROMPT)[-1], 8)
        assert (told.prompt_tokens, told.embedding_dim) == (len(PROMPT), 8)
        error = await refused(server.stub.Embed(vllm.EmbedRequest()))
        assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert "tokenized.input_ids: is empty" in (error.details() or "")

    async def makes_none(server: Server) -> None:
        error = await refused(server.stub.Embed(asked))
        assert error.code() is grpc.StatusCode.INVALID_ARGUMENT and "no embeddings" in (error.details() or "")

    run(vectors, makes)
    run(model, makes_none)
