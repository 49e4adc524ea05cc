"""KServe's Open Inference Protocol over an engine: what is understood, what is refused, and streams of requests."""

from __future__ import annotations

import asyncio
import json
import random
import struct
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from functools import partial
from typing import Any, NamedTuple

import grpc
import pytest
from google.protobuf.message import DecodeError
from grpc import aio

from common.errors import InvalidRequest, Overloaded, PagewireError, Unavailable, UnknownModel
from common.model_folder import ModelFolder, read_model_folder
from common.sampling import RequestLimits
from common.types import Priority
from executor.fake_runner import FakeRunner
from protos import open_inference_pb2 as pb
from protos import open_inference_pb2_grpc
from scheduler.scheduler import Scheduler, SchedulerLimits
from services import codec_public
from services.admission import Admission, AdmissionLimits
from services.answering import Answerer
from services.engine import Engine
from services.handlers import Arrivals
from services.open_inference import stream
from services.open_inference.asked import Asked, read
from services.open_inference.serving import open_inference
from services.open_inference.stream import Streams
from services.open_inference.tensors import DATATYPES
from services.open_inference.words import INPUTS, OUTPUTS, PROTOCOL
from services.request import GenerateSpec
from services.slow_readers import SlowReaders
from services.status import from_rpc_error
from services.text import Tokenizer
from tests.e2e import fake_model
from tests.faults.fuzz import Draw
from tests.services.instant_link import InstantLink
from tests.services.served import HANG_S, PatientAtFirst, served, until
from tests.services.served import run as run_within

run = partial(run_within, limit_s=2 * HANG_S)

TEXT = "hello"
ANSWER = "&'()*+,-./"  # of the fake model to TEXT: its token is how many there are before, and its letters follow "!"

Call = aio.StreamStreamCall[pb.ModelInferRequest, pb.ModelStreamInferResponse]


def tensor(name: str, datatype: str, shape: list[int], **contents: Any) -> pb.ModelInferRequest.InferInputTensor:
    return pb.ModelInferRequest.InferInputTensor(
        name=name, datatype=datatype, shape=shape, contents=pb.InferTensorContents(**contents)
    )


def parameter(value: Any) -> pb.InferParameter:
    match value:
        case bool():
            return pb.InferParameter(bool_param=value)
        case int():
            return pb.InferParameter(int64_param=value)
        case float():
            return pb.InferParameter(double_param=value)
        case _:
            return pb.InferParameter(string_param=value)


def asking(text: str = TEXT, *more: pb.ModelInferRequest.InferInputTensor, **parameters: Any) -> pb.ModelInferRequest:
    """A request; what is not a tensor is a parameter."""
    return pb.ModelInferRequest(
        model_name="fake",
        id="r1",
        inputs=[tensor("text_input", "BYTES", [1], bytes_contents=[text.encode()]), *more],
        parameters={name: parameter(value) for name, value in parameters.items()},
    )


def bytes_of(*elements: bytes) -> bytes:
    """Elements of BYTES, raw."""
    return b"".join(struct.pack("<I", len(element)) + element for element in elements)


# ---- what is understood


def spec_of(asked: Asked) -> GenerateSpec:
    return codec_public.request_from_pb(asked.request, RequestLimits(), vocab_size=fake_model.VOCAB_SIZE)


SETTINGS: dict[str, Any] = {
    "max_tokens": 7,
    "min_tokens": 2,
    "temperature": 0.5,
    "top_p": 0.75,
    "top_k": 40,
    "min_p": 0.125,
    "typical_p": 0.5,
    "repetition_penalty": 1.25,
    "presence_penalty": -0.5,
    "frequency_penalty": 0.25,
    "seed": 12,
    "ignore_eos": True,
    "include_stop": True,
}
TENSORS = {
    "UINT64": "uint64_contents",
    "INT32": "int_contents",
    "FP32": "fp32_contents",
    "BOOL": "bool_contents",
}


def as_parameters() -> pb.ModelInferRequest:
    return asking(TEXT, **SETTINGS, stop="\n\n")


def typed_tensor(name: str, datatype: str, value: Any) -> pb.ModelInferRequest.InferInputTensor:
    return tensor(name, datatype, [1, 1], **{TENSORS[datatype]: [value]})


def as_tensors() -> pb.ModelInferRequest:
    typed = [typed_tensor(name, INPUTS[name].datatype, value) for name, value in SETTINGS.items()]
    return asking(TEXT, *typed, tensor("stop", "BYTES", [1], bytes_contents=[b"\n\n"]))


def as_strings() -> pb.ModelInferRequest:
    return asking(**{name: str(value) for name, value in SETTINGS.items()}, stop="\n\n")


def as_document() -> pb.ModelInferRequest:
    document = json.dumps({**SETTINGS, "stop": ["\n\n"]}).encode()
    return asking(TEXT, tensor("sampling_parameters", "BYTES", [1], bytes_contents=[document]))


def as_raw_contents() -> pb.ModelInferRequest:
    request = as_tensors()
    codes = {"INT32": "<i", "UINT64": "<Q", "FP32": "<f", "BOOL": "<?"}
    for each in request.inputs:
        if each.datatype == "BYTES":
            request.raw_input_contents.append(bytes_of(*each.contents.bytes_contents))
        else:
            request.raw_input_contents.append(struct.pack(codes[each.datatype], SETTINGS[each.name]))
        each.ClearField("contents")
    return request


@pytest.mark.parametrize("written", [as_parameters, as_tensors, as_strings, as_document, as_raw_contents])
def test_a_setting_is_the_same_in_whichever_way_it_is_said(written: Callable[[], pb.ModelInferRequest]) -> None:
    spec = spec_of(read(written()))

    sampling = {name: getattr(spec.sampling, name) for name in SETTINGS if hasattr(spec.sampling, name)}
    told = sampling | {
        "max_tokens": spec.max_tokens,
        "min_tokens": spec.min_tokens,
        "ignore_eos": spec.ignore_eos,
        "include_stop": spec.include_stop,
    }
    assert told == SETTINGS
    assert spec.stop_strings == ("\n\n",)
    assert spec.request_id == "r1"


def test_several_stop_strings_are_a_tensor_of_several_elements() -> None:
    shape: list[int]
    for shape in ([2], [1, 2]):
        asked = read(asking(TEXT, tensor("stop", "BYTES", shape, bytes_contents=[b"one", "zwö".encode()])))
        assert list(asked.request.stopping.stop) == ["one", "zwö"]


def test_what_the_answer_must_be_can_be_asked_for() -> None:
    assert spec_of(read(asking(regex="a+"))).sampling.grammar is not None
    with pytest.raises(InvalidRequest, match=r"^parameters.regex: must not be set with json_schema$"):
        read(asking(regex="a+", json_schema="{}"))


def test_priority_and_timeout_are_the_protocols_own() -> None:
    asked = read(asking(priority=1, timeout=2_500_000))

    assert spec_of(asked).priority is Priority.HIGH
    assert asked.timeout_s == 2.5
    assert read(asking(timeout=0)).timeout_s is None


# ---- what is refused


def raw(*contents: bytes, inputs: list[pb.ModelInferRequest.InferInputTensor]) -> pb.ModelInferRequest:
    return pb.ModelInferRequest(inputs=inputs, raw_input_contents=contents)


def named(name: str, datatype: str, *shape: int) -> pb.ModelInferRequest.InferInputTensor:
    return pb.ModelInferRequest.InferInputTensor(name=name, datatype=datatype, shape=shape)


PROMPT = named("text_input", "BYTES", 1)

REFUSED: dict[str, tuple[pb.ModelInferRequest, str]] = {
    "no text": (pb.ModelInferRequest(), "text_input: is missing: a tensor of BYTES with the shape [1]"),
    "two texts": (
        pb.ModelInferRequest(inputs=[tensor("text_input", "BYTES", [2], bytes_contents=[b"a", b"b"])]),
        "text_input: shape must be [1] or [1, 1], got [2]",
    ),
    "no UTF-8": (
        pb.ModelInferRequest(inputs=[tensor("text_input", "BYTES", [1], bytes_contents=[b"\xff"])]),
        "text_input: must be UTF-8",
    ),
    "text as a parameter": (
        pb.ModelInferRequest(parameters={"text_input": parameter("x")}),
        "parameters: must be of stream, ",
    ),
    "an unknown tensor": (
        asking("x", named("texts", "BYTES", 1)),
        "inputs[1].name: must be one of text_input, stream, ",
    ),
    "an unknown parameter": (asking(temprature=1.0), "parameters: must be of stream, "),
    "a parameter without a value": (
        pb.ModelInferRequest(parameters={"seed": pb.InferParameter()}),
        "parameters.seed: has no value",
    ),
    "a tensor twice": (asking("x", *asking("y").inputs), "text_input: is there twice"),
    "a setting twice": (
        asking("x", tensor("seed", "INT64", [1], int64_contents=[1]), seed=1),
        "parameters.seed: is said already, as seed",
    ),
    "an unknown datatype": (asking("x", named("seed", "STRING", 1)), "seed: datatype must be one of BOOL, INT8, "),
    "a shape of three": (asking("x", named("seed", "INT32", 1, 1, 1)), "seed: shape must be [n] or [1, n]"),
    "a negative shape": (asking("x", named("seed", "INT32", -1)), "seed: shape must be [n] or [1, n]"),
    "a batch": (
        asking("x", tensor("stop", "BYTES", [2, 1], bytes_contents=[b"a", b"b"])),
        "stop: shape must be [n] or [1, n], got [2, 1]",
    ),
    "too many elements": (
        asking("x", named("stop", "BYTES", 1025)),
        "stop: at most 1024 elements, its shape is [1025]",
    ),
    "missing contents": (
        asking("x", named("seed", "INT32", 1)),
        "seed: its shape [1] has 1 elements, contents.int_contents has 0",
    ),
    "contents of another type": (
        asking("x", tensor("seed", "INT64", [1], int_contents=[1])),
        "seed: its shape [1] has 1 elements, contents.int64_contents has 0",
    ),
    "FP16 that is not raw": (asking("x", named("top_p", "FP16", 1)), "top_p: FP16 must be sent as raw_input_contents"),
    "shared memory": (
        pb.ModelInferRequest(
            inputs=[
                pb.ModelInferRequest.InferInputTensor(
                    name="text_input",
                    datatype="BYTES",
                    shape=[1],
                    parameters={"shared_memory_region": parameter("region")},
                )
            ]
        ),
        "text_input: a tensor has no parameters here; its contents come with the request",
    ),
    "raw contents too few": (
        raw(b"", inputs=[PROMPT, named("seed", "INT32", 1)]),
        "raw_input_contents: must be one for each of 2 inputs, got 1",
    ),
    "raw contents and typed ones": (
        raw(bytes_of(b"x"), inputs=list(asking().inputs)),
        "text_input: contents must not be set with raw_input_contents",
    ),
    "raw number too short": (
        raw(bytes_of(b"x"), b"\0", inputs=[PROMPT, named("seed", "INT32", 1)]),
        "seed: 1 elements have 4 raw bytes, got 1",
    ),
    "raw text cut": (
        raw(b"\x09\0\0\0short", inputs=[PROMPT]),
        "text_input: each of 1 elements is its length, as UINT32, and its bytes; got 9 bytes",
    ),
    "raw text without a length": (
        raw(b"\x01", inputs=[PROMPT]),
        "text_input: each of 1 elements is its length, as UINT32, and its bytes; got 1 bytes",
    ),
    "raw text and more": (
        raw(bytes_of(b"x", b"y"), inputs=[PROMPT]),
        "text_input: 1 elements have 5 raw bytes, got 10",
    ),
    "a fraction": (asking(max_tokens=1.5), "parameters.max_tokens: must be a whole number in [0, 4294967295], got 1.5"),
    "a negative number": (
        asking(seed=-1),
        "parameters.seed: must be a whole number in [0, 18446744073709551615], got -1",
    ),
    "a word": (asking(temperature="warm"), "parameters.temperature: must be a number, got 'warm'"),
    "no flag": (asking(stream="perhaps"), "parameters.stream: must be true or false, got 'perhaps'"),
    "a number that is true": (
        asking(top_k=True),
        "parameters.top_k: must be a whole number in [0, 4294967295], got True",
    ),
    "no JSON": (asking(sampling_parameters="{"), "sampling_parameters: must be a JSON object"),
    "JSON without an object": (asking(sampling_parameters="[1]"), "sampling_parameters: must be a JSON object"),
    "JSON that is too deep": (asking(sampling_parameters="[" * 60_000), "sampling_parameters: must be a JSON object"),
    "JSON that is too long": (
        asking(sampling_parameters=" " * 65_537),
        "sampling_parameters: at most 65536 characters, got 65537",
    ),
    "an unknown member": (
        asking(sampling_parameters='{"stream": true}'),
        "sampling_parameters: its members must be of ",
    ),
    "a list for one": (
        asking(sampling_parameters='{"seed": [1, 2]}'),
        "sampling_parameters.seed: must be one value, got 2",
    ),
    "an object": (
        asking(sampling_parameters='{"temperature": {}}'),
        "sampling_parameters.temperature: must be a number, got dict",
    ),
    "half a surrogate pair": (
        asking(sampling_parameters=r'{"stop": "\ud800"}'),
        "sampling_parameters.stop: must be text that UTF-8 can encode",
    ),
    "a number beyond all": (
        asking(sampling_parameters='{"temperature": 1' + "0" * 400 + "}"),
        "sampling_parameters.temperature: must be a number, got int",
    ),
    "an unknown output": (
        pb.ModelInferRequest(inputs=asking().inputs, outputs=[{"name": "logits"}]),  # type: ignore[list-item]
        "outputs[0].name: must be one of text_output, finish_reason, num_input_tokens, num_output_tokens, got 'logits'",
    ),
    "the prompt again in a stream": (
        asking(exclude_input_in_output=False, stream=True),
        "parameters.exclude_input_in_output: must be true, or not set, with stream",
    ),
}


@pytest.mark.parametrize(("request_", "problem"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_understood_is_refused_with_its_name(request_: pb.ModelInferRequest, problem: str) -> None:
    with pytest.raises(InvalidRequest) as refusal:
        read(request_)
    assert str(refusal.value).startswith(problem)


def test_too_many_of_anything_is_refused() -> None:
    many = {f"p{i}": parameter(1) for i in range(65)}
    for request, problem in (
        (pb.ModelInferRequest(inputs=[named("seed", "INT32", 1)] * 65), "inputs: at most 64, got 65"),
        (pb.ModelInferRequest(parameters=many), "parameters: at most 64, got 65"),
        (pb.ModelInferRequest(inputs=asking().inputs, outputs=[{}] * 5), "outputs: at most 4, got 5"),  # type: ignore[list-item]
    ):
        with pytest.raises(InvalidRequest) as refusal:
            read(request)
        assert str(refusal.value) == problem


@pytest.mark.parametrize(
    ("asked", "problem"),
    [
        (asking(temperature=-1.0), "parameters.temperature: must be in [0, 100], got -1.0"),
        (asking(sampling_parameters='{"top_p": "7"}'), "sampling_parameters.top_p: must be in (0, 1], got 7.0"),
        (asking(max_tokens=0), "parameters.max_tokens: must be at least 1, got 0"),
        (asking(""), "text_input: is empty"),
        (asking("x" * 600), "text_input: 600 tokens leave no room in the context of 512"),
        (pb.ModelInferRequest(id="a b", inputs=asking().inputs), "id: must be printable ASCII without spaces"),
    ],
)
def test_limits_are_those_of_our_own_api_and_named_as_the_caller_named_them(
    asked: pb.ModelInferRequest, problem: str, model: ModelFolder
) -> None:
    async def test() -> None:
        async with serving(model) as server:
            with pytest.raises(aio.AioRpcError) as failure:
                await server.stub.ModelInfer(asked)
            error = from_rpc_error(failure.value)
            assert isinstance(error, InvalidRequest)
            assert str(error) == problem

    run(test())


def test_whatever_is_sent_is_a_value_or_names_what_is_wrong() -> None:
    good = 0
    for seed in range(1000):
        draw = random.Random(seed)
        try:
            request = pb.ModelInferRequest.FromString(Draw(draw).data(strange(draw)))
        except DecodeError:
            continue
        try:
            asked = read(request)
            codec_public.size_from_pb(asked.request, RequestLimits(), max_length=512)
            with asked.called_as_asked():
                spec_of(asked)
            good += 1
        except InvalidRequest as error:
            wrong = error
            assert all((wrong.field, wrong.problem)), seed
    assert good > 20


def strange(draw: random.Random) -> pb.ModelInferRequest:
    """A request of which little fits together, by names that are known."""
    make = Draw(draw)
    request = asking()
    for name in draw.sample(list(INPUTS), draw.randrange(4)):
        shape = draw.choice(([1], [1, 1], [2], [], [0], [1, 3], [-1], [1 << 40]))
        contents = make.message(pb.InferTensorContents)
        request.inputs.add(name=name, datatype=draw.choice(DATATYPES), shape=shape, contents=contents)
    for name in draw.sample([*INPUTS, *PROTOCOL], draw.randrange(4)):
        request.parameters[name].CopyFrom(make.message(pb.InferParameter))
    if draw.random() < 0.3:
        for each in request.inputs:
            each.ClearField("contents")
            request.raw_input_contents.append(draw.choice((make.column(), bytes_of(b"x"), bytes(4), bytes(8))))
    if draw.random() < 0.3:
        document: dict[str, Any] = {
            name: draw.choice((1, -1, 0.5, "1", "x", None, [], [1], {}, True, 1e400)) for name in INPUTS
        }
        few = dict(draw.sample(list(document.items()), 3))
        request.parameters["sampling_parameters"].string_param = json.dumps(few)
    return request


# ---- over a socket


class Server(NamedTuple):
    stub: Any  # open_inference_pb2_grpc.GRPCInferenceServiceAsyncStub
    engine: Engine
    streams: Streams
    link: InstantLink
    channel: aio.Channel

    def stream(self, *requests: pb.ModelInferRequest, **settings: Any) -> Call:
        """A call that says this and no more."""
        call: Call = self.stub.ModelStreamInfer(iter(requests), **settings)
        return call


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> ModelFolder:
    return read_model_folder(fake_model.write(tmp_path_factory.mktemp("model") / "fake"))


@asynccontextmanager
async def serving(
    model: ModelFolder,
    *,
    steps: int | None = None,
    admission: AdmissionLimits | None = None,
    idle: Arrivals | None = None,
    write: Any = None,
) -> AsyncIterator[Server]:
    """The service on a socket, and an executor whose steps the test allows, or that needs no leave."""
    core = Scheduler(SchedulerLimits(), model=model.digest, eos=set(model.eos_token_ids), secret=b"test")
    admitting = Admission(admission)
    engine = Engine(core, admission=admitting)
    answerer = Answerer(engine, model, Tokenizer(model.path / "tokenizer.json"), None)
    handler, streams = open_inference(
        answerer,
        RequestLimits(),
        is_ready=lambda: engine.can_serve,
        open_call=admitting.open_call,
        arrivals=Arrivals(),
        idle=Arrivals() if idle is None else idle,
        write=write or SlowReaders(0).write,
    )
    server = aio.server()
    server.add_generic_rpc_handlers((handler,))
    link = InstantLink(engine, 1, steps=steps, runner=FakeRunner(vocab_size=fake_model.VOCAB_SIZE, max_model_len=512))
    engine.join(1, link.facts, link)
    async with served(server, engine) as channel:
        stub = open_inference_pb2_grpc.GRPCInferenceServiceStub(channel)
        yield Server(stub, engine, streams, link, channel)


def text_of(response: pb.ModelInferResponse) -> str:
    (element,) = response.outputs[0].contents.bytes_contents
    return element.decode()


def is_final(response: pb.ModelInferResponse) -> bool:
    return response.parameters["triton_final_response"].bool_param


async def rest_of(call: Any) -> None:
    while await call.read() is not aio.EOF:
        pass


async def error_of(call: Any) -> PagewireError:
    with pytest.raises(aio.AioRpcError) as failure:
        await rest_of(call)
    error = from_rpc_error(failure.value)
    assert isinstance(error, PagewireError)
    return error


def test_an_answer_comes_whole_with_the_outputs_that_were_asked_for(model: ModelFolder) -> None:
    async def test() -> None:
        async with serving(model) as server:
            plain = await server.stub.ModelInfer(asking(max_tokens=4))
            assert (plain.model_name, plain.model_version, plain.id) == ("fake", "1", "r1")
            (output,) = plain.outputs
            assert (output.name, output.datatype, list(output.shape)) == ("text_output", "BYTES", [1])
            assert text_of(plain) == ANSWER[:4]

            request = asking(max_tokens=4)
            request.inputs[0].shape[:] = [1, 1]
            for name in OUTPUTS:
                request.outputs.add(name=name)
            told = (await server.stub.ModelInfer(request)).outputs
            assert [output.name for output in told] == list(OUTPUTS)
            assert all(output.shape == [1, 1] for output in told)
            assert told[1].contents.bytes_contents == [b"length"]
            assert (told[2].contents.uint_contents, told[3].contents.uint_contents) == ([5], [4])

            stopped = await server.stub.ModelInfer(asking(max_tokens=9, stop="*", exclude_input_in_output=False))
            assert text_of(stopped) == TEXT + "&'()"

    run(test())


def test_who_sends_raw_contents_is_sent_raw_contents(model: ModelFolder) -> None:
    async def test() -> None:
        async with serving(model) as server:
            request = raw(bytes_of(TEXT.encode()), inputs=[PROMPT])
            request.parameters["max_tokens"].int64_param = 3
            request.outputs.add(name="text_output")
            request.outputs.add(name="num_output_tokens")
            response = await server.stub.ModelInfer(request)
            assert list(response.raw_output_contents) == [bytes_of(ANSWER[:3].encode()), b"\3\0\0\0"]
            assert not any(output.HasField("contents") for output in response.outputs)

    run(test())


def test_the_model_is_described_and_nobody_elses_is(model: ModelFolder) -> None:
    async def test() -> None:
        async with serving(model) as server:
            stub = server.stub
            metadata = await stub.ModelMetadata(pb.ModelMetadataRequest(name="fake", version="1"))
            assert [each.name for each in metadata.inputs] == list(INPUTS)
            assert {each.name: each.datatype for each in metadata.outputs} == OUTPUTS
            config = (await stub.ModelConfig(pb.ModelConfigRequest(name="fake"))).config
            assert config.model_transaction_policy.decoupled
            assert [each.name for each in config.input if not each.optional] == ["text_input"]
            assert (await stub.ServerMetadata(pb.ServerMetadataRequest())).name == "pagewire"
            assert (await stub.ServerLive(pb.ServerLiveRequest())).live

            for call in (
                stub.ModelMetadata(pb.ModelMetadataRequest(name="other")),
                stub.ModelConfig(pb.ModelConfigRequest(name="fake", version="2")),
                stub.ModelInfer(pb.ModelInferRequest(model_name="other")),
            ):
                with pytest.raises(aio.AioRpcError) as failure:
                    await call
                assert isinstance(from_rpc_error(failure.value), UnknownModel)

    run(test())


def test_ready_is_who_has_an_executor(model: ModelFolder) -> None:
    async def test() -> None:
        async with serving(model) as server:
            asked = [pb.ModelReadyRequest(name="fake"), pb.ModelReadyRequest(name="other")]
            assert [(await server.stub.ModelReady(each)).ready for each in asked] == [True, False]
            assert (await server.stub.ServerReady(pb.ServerReadyRequest())).ready
            server.engine.leave(1)
            assert not (await server.stub.ModelReady(asked[0])).ready
            assert not (await server.stub.ServerReady(pb.ServerReadyRequest())).ready

    run(test())


def test_a_unary_answer_is_not_streamed_and_says_where_it_is(model: ModelFolder) -> None:
    async def test() -> None:
        async with serving(model) as server:
            with pytest.raises(aio.AioRpcError, match="stream: must be false in ModelInfer"):
                await server.stub.ModelInfer(asking(stream=True))

    run(test())


# ---- streams of requests


def test_a_stream_tells_an_answer_as_it_is_made_and_says_which_response_is_its_last(model: ModelFolder) -> None:
    async def test() -> None:
        async with serving(model, steps=0) as server:
            call: Any = server.stream(asking(max_tokens=6, stream=True))
            texts: list[str] = []
            server.link.allow(4)  # a prompt and some tokens
            while True:
                message = await call.read()
                assert not message.error_message and message.infer_response.id == "r1"
                texts.append(text_of(message.infer_response))
                if is_final(message.infer_response):
                    break
                server.link.allow(1)
            assert "".join(texts) == ANSWER[:6]
            assert len(texts) > 1
            assert await call.read() is aio.EOF
            assert await call.code() is grpc.StatusCode.OK

    run(test())


def test_without_stream_the_answer_is_one_response(model: ModelFolder) -> None:
    async def test() -> None:
        async with serving(model) as server:
            (message,) = [message async for message in server.stream(asking(max_tokens=6))]
            assert is_final(message.infer_response)
            assert text_of(message.infer_response) == ANSWER[:6]

    run(test())


def test_requests_of_one_call_are_answered_side_by_side(model: ModelFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream, "AT_ONCE", 8)

    async def test() -> None:
        async with serving(model) as server:
            requests = []
            for i in range(40):  # more than are looked after at a time
                requests.append(asking("a" * (1 + i % 5), max_tokens=2 + i % 3, stream=bool(i % 2)))
                requests[-1].id = str(i)
            told: dict[str, str] = {}
            ended: list[str] = []
            async for message in server.stream(*requests):
                response = message.infer_response
                assert response.id not in ended
                told[response.id] = told.get(response.id, "") + text_of(response)
                if is_final(response):
                    ended.append(response.id)
            assert len(ended) == 40
            letters = "".join(map(chr, range(33, 127)))
            assert told == {str(i): letters[1 + i % 5 :][: 2 + i % 3] for i in range(40)}
            assert server.engine.num_requests == 0

    run(test())


def test_a_request_that_is_refused_says_so_and_the_others_go_on(model: ModelFolder) -> None:
    async def test() -> None:
        async with serving(model) as server:
            bad = asking(temperature=-1.0)
            bad.id = "bad"
            told = {m.infer_response.id: m async for m in server.stream(bad, asking(max_tokens=3))}
            assert text_of(told["r1"].infer_response) == ANSWER[:3]
            assert told["bad"].error_message == "parameters.temperature: must be in [0, 100], got -1.0"
            parameters = told["bad"].infer_response.parameters
            assert parameters["grpc_status"].string_param == "INVALID_ARGUMENT"
            assert parameters["field"].string_param == "parameters.temperature"
            assert parameters["triton_final_response"].bool_param

    run(test())


def test_a_refusal_says_when_to_come_back(model: ModelFolder) -> None:
    async def test() -> None:
        async with serving(model, admission=AdmissionLimits(max_waiting=0)) as server:
            (told,) = [message async for message in server.stream(asking())]
            assert told.infer_response.parameters["grpc_status"].string_param == "RESOURCE_EXHAUSTED"
            assert told.infer_response.parameters["retry_after_ms"].int64_param > 0

    run(test())


def test_a_caller_who_wants_a_status_gets_it_with_its_details(model: ModelFolder) -> None:
    async def test() -> None:
        async with serving(model, steps=0) as server:
            other, bad = asking(), asking(temperature=-1.0)
            call = server.stream(other, bad, metadata=(("triton_grpc_error", "true"),))
            error = await error_of(call)
            assert isinstance(error, InvalidRequest) and error.field == "parameters.temperature"
            await until(lambda: server.engine.num_requests == 0)  # the other one's

    run(test())


def test_a_message_that_is_none_ends_the_call(model: ModelFolder) -> None:
    async def test() -> None:
        async with serving(model, steps=0) as server:
            method: Any = server.channel.stream_stream("/inference.GRPCInferenceService/ModelStreamInfer")
            error = await error_of(method(iter([b"\xff"])))
            assert isinstance(error, InvalidRequest)
            assert str(error) == "inference.ModelInferRequest: the message is malformed"

    run(test())


def test_who_leaves_ends_its_requests(model: ModelFolder) -> None:
    async def test() -> None:
        async with serving(model, steps=0) as server:
            call = server.stream(asking(stream=True), asking())
            await until(lambda: server.engine.num_requests == 2)
            call.cancel()
            await until(lambda: server.engine.num_requests == 0)

    run(test())


def test_each_request_counts_as_a_call_and_its_stream_does_not(model: ModelFolder) -> None:
    async def test() -> None:
        async with serving(model, steps=0, admission=AdmissionLimits(max_calls=1)) as server:
            idle, busy = server.stub.ModelStreamInfer(), server.stub.ModelStreamInfer()
            await idle.wait_for_connection()
            await busy.write(asking())
            await until(lambda: server.engine.num_requests == 1)
            await idle.write(asking())
            refused = await idle.read()
            assert refused.error_message == "calls: 1 may be open, and so many are (--max-streams)"
            for call in (idle, busy):
                call.cancel()

    run(test())


def test_a_stream_may_rest_for_a_while_and_not_for_ever(model: ModelFolder) -> None:
    async def test() -> None:
        async with serving(model, steps=0, idle=PatientAtFirst()) as server:
            busy = server.stub.ModelStreamInfer()
            await busy.write(asking(max_tokens=2))
            await until(lambda: server.engine.num_requests == 1)
            error = await error_of(server.stub.ModelStreamInfer())
            assert isinstance(error, Unavailable) and str(error) == "no message came within 0.05 s"

            assert not busy.done()  # something is answered there
            server.link.allow(4)
            assert text_of((await busy.read()).infer_response) == ANSWER[:2]
            assert isinstance(await error_of(busy), Unavailable)

    run(test())


def test_of_too_many_streams_that_rest_the_longest_makes_room(model: ModelFolder) -> None:
    async def test() -> None:
        idle = Arrivals(at_once=1)
        async with serving(model, idle=idle) as server:
            first = server.stub.ModelStreamInfer()
            await first.wait_for_connection()
            await until(lambda: len(idle) == 1)
            second = server.stub.ModelStreamInfer()
            await second.wait_for_connection()
            assert isinstance(await error_of(first), Overloaded)
            await second.write(asking(max_tokens=2))
            assert text_of((await second.read()).infer_response) == ANSWER[:2]
            second.cancel()

    run(test())


def test_a_scheduler_that_leaves_ends_its_streams(model: ModelFolder) -> None:
    async def test() -> None:
        async with serving(model) as server:
            call = server.stub.ModelStreamInfer()
            await call.write(asking(max_tokens=2))
            assert text_of((await call.read()).infer_response) == ANSWER[:2]
            server.streams.close()
            error = await error_of(call)
            assert isinstance(error, Unavailable) and str(error) == "the scheduler is shutting down"

    run(test())


def test_a_timeout_of_the_protocol_is_a_deadline(model: ModelFolder) -> None:
    async def test() -> None:
        async with serving(model, steps=0) as server:
            (told,) = [message async for message in server.stream(asking(timeout=1000))]
            assert told.infer_response.parameters["grpc_status"].string_param == "DEADLINE_EXCEEDED"

    run(test())


def test_a_reader_that_takes_nothing_is_ended(model: ModelFolder) -> None:
    readers = SlowReaders(0.05)

    class Full:
        async def write(self, message: bytes, /) -> None:
            await asyncio.Event().wait()

    async def write(context: object, message: bytes) -> None:
        await readers.write(Full(), message)

    async def test() -> None:
        async with serving(model, write=write) as server:
            call = server.stream(asking(max_tokens=2))
            with pytest.raises(aio.AioRpcError) as failure:
                async for _ in call:
                    pass
            assert failure.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
            await until(lambda: server.engine.num_requests == 0)

    run(test())


def test_a_bug_costs_one_request_and_tells_nothing(
    model: ModelFolder, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    real = Tokenizer.encode

    def encode(self: Tokenizer, text: str, *rest: Any) -> list[int]:
        if text == "boom":
            raise ZeroDivisionError(text)
        return real(self, text, *rest)

    monkeypatch.setattr(Tokenizer, "encode", encode)

    async def test() -> None:
        async with serving(model) as server:
            bad = asking("boom")
            bad.id = "bad"
            told = {m.infer_response.id: m async for m in server.stream(bad, asking(max_tokens=2))}
            assert text_of(told["r1"].infer_response) == ANSWER[:2]
            assert told["bad"].error_message.startswith("internal error ")
            assert told["bad"].infer_response.parameters["grpc_status"].string_param == "INTERNAL"
            assert "boom" not in told["bad"].error_message + caplog.text

    run(test())
