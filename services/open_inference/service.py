"""inference.GRPCInferenceService: the protocol's methods, by the Answerer that answers our own."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing, closing
from importlib.metadata import PackageNotFoundError, version
from typing import Final

from common.errors import InvalidRequest, UnknownModel
from common.sampling import RequestLimits
from protos import open_inference_pb2 as pb
from services import codec_public
from services.answer import Answer
from services.answering import Answerer
from services.caller import current_caller
from services.handlers import Context
from services.open_inference.answers import FINAL, pieces, response_of
from services.open_inference.asked import Asked, read
from services.open_inference.words import INPUTS, OUTPUTS, VERSION, Word

SERVICE: Final = pb.DESCRIPTOR.services_by_name["GRPCInferenceService"].full_name

_PLATFORM: Final = "pagewire"
_EXTENSIONS: Final = ("binary_tensor_data", "model_configuration", "parameters", "schedule_policy")


class OpenInferenceService:
    """The methods of one scheduler; ModelStreamInfer, which streams requests, is services/open_inference/stream.py."""

    def __init__(self, answerer: Answerer, limits: RequestLimits, is_ready: Callable[[], bool]) -> None:
        self._answerer = answerer
        self._limits = limits
        self._is_ready = is_ready

    @property
    def model(self) -> str:
        """The name of the model that is served."""
        return self._answerer.model.name

    async def ServerLive(self, request: pb.ServerLiveRequest, context: Context) -> pb.ServerLiveResponse:  # noqa: N802
        """True, as whoever can say it is."""
        return pb.ServerLiveResponse(live=True)

    async def ServerReady(self, request: pb.ServerReadyRequest, context: Context) -> pb.ServerReadyResponse:  # noqa: N802
        """Whether an executor is there that stays."""
        return pb.ServerReadyResponse(ready=self._is_ready())

    async def ModelReady(self, request: pb.ModelReadyRequest, context: Context) -> pb.ModelReadyResponse:  # noqa: N802
        """The same, of this model; a model that is not served is not ready."""
        try:
            self._check_model("name", request.name, "version", request.version)
        except UnknownModel:
            return pb.ModelReadyResponse(ready=False)
        return pb.ModelReadyResponse(ready=self._is_ready())

    async def ServerMetadata(  # noqa: N802
        self, request: pb.ServerMetadataRequest, context: Context
    ) -> pb.ServerMetadataResponse:
        """Who this is, and what of Triton's protocol is served."""
        return pb.ServerMetadataResponse(name="pagewire", version=_version(), extensions=_EXTENSIONS)

    async def ModelMetadata(  # noqa: N802
        self, request: pb.ModelMetadataRequest, context: Context
    ) -> pb.ModelMetadataResponse:
        """The tensors that go in and come out."""
        self._check_model("name", request.name, "version", request.version)
        tensor = pb.ModelMetadataResponse.TensorMetadata
        return pb.ModelMetadataResponse(
            name=self.model,
            versions=[VERSION],
            platform=_PLATFORM,
            inputs=[tensor(name=name, datatype=word.datatype, shape=_dims(word)) for name, word in INPUTS.items()],
            outputs=[tensor(name=name, datatype=datatype, shape=[1]) for name, datatype in OUTPUTS.items()],
        )

    async def ModelConfig(self, request: pb.ModelConfigRequest, context: Context) -> pb.ModelConfigResponse:  # noqa: N802
        """The same in Triton's words. A request has no batch dimension: the scheduler makes the batches."""
        self._check_model("name", request.name, "version", request.version)
        config = pb.ModelConfig(
            name=self.model,
            platform=_PLATFORM,
            backend=_PLATFORM,
            max_batch_size=0,
            input=[
                pb.ModelInput(
                    name=name, data_type=_type(word.datatype), dims=_dims(word), optional=name != "text_input"
                )
                for name, word in INPUTS.items()
            ],
            output=[
                pb.ModelOutput(name=name, data_type=_type(datatype), dims=[1]) for name, datatype in OUTPUTS.items()
            ],
            model_transaction_policy=pb.ModelTransactionPolicy(decoupled=True),
        )
        return pb.ModelConfigResponse(config=config)

    async def ModelInfer(self, request: pb.ModelInferRequest, context: Context) -> pb.ModelInferResponse:  # noqa: N802
        """The whole answer at once."""
        asked = self._read(request)
        if asked.stream:
            problem = "must be false in ModelInfer, which answers once; ModelStreamInfer tells an answer as it is made"
            raise InvalidRequest("stream", problem)
        async with aclosing(self._responses(asked, context.time_remaining())) as responses:
            return await anext(responses)

    async def responses(
        self, request: pb.ModelInferRequest, time_left_s: float | None
    ) -> AsyncGenerator[pb.ModelInferResponse, None]:
        """The responses of one request of ModelStreamInfer: one, or with `stream` as many as come of it.

        Each says whether it is the final one. Raises every PagewireError that a request can meet.
        """
        asked = self._read(request)
        async with aclosing(self._responses(asked, time_left_s)) as responses:
            async for response in responses:
                yield response

    async def _responses(self, asked: Asked, time_left_s: float | None) -> AsyncGenerator[pb.ModelInferResponse, None]:
        with closing(await self._start(asked, time_left_s)) as answer:
            async with aclosing(pieces(answer, at_once=not asked.stream)) as told:
                async for piece in told:
                    response = response_of(asked, piece, self.model, num_prompt_tokens=answer.num_prompt_tokens)
                    response.parameters[FINAL].bool_param = bool(piece.finish_reason)
                    yield response

    def _read(self, request: pb.ModelInferRequest) -> Asked:
        self._check_model("model_name", request.model_name, "model_version", request.model_version)
        return read(request)

    async def _start(self, asked: Asked, time_left_s: float | None) -> Answer:
        """As services/scheduler_service.py starts one: first asked whether there is room, then checked and queued."""
        if asked.timeout_s is not None:
            time_left_s = asked.timeout_s if time_left_s is None else min(time_left_s, asked.timeout_s)
        caller, answerer = current_caller(), self._answerer
        size = codec_public.size_from_pb(asked.request, self._limits, max_length=answerer.max_length)
        answerer.check_room(size, caller.tenant, time_left_s=time_left_s)
        with asked.called_as_asked():
            spec = codec_public.request_from_pb(asked.request, self._limits, vocab_size=answerer.model.vocab_size)
            return await answerer.start(spec, caller, time_left_s=time_left_s)

    def _check_model(self, name_field: str, name: str, version_field: str, version: str) -> None:
        if name not in ("", self.model):
            raise UnknownModel(f"{name_field}: {name!r} is not served here; {self.model!r} is")
        if version not in ("", VERSION):
            raise UnknownModel(f"{version_field}: {version!r} is not served here; {VERSION!r} is")


def _dims(word: Word) -> list[int]:
    return [-1] if word.kind == "texts" else [1]


def _type(datatype: str) -> pb.DataType.ValueType:
    return pb.DataType.Value("TYPE_STRING" if datatype == "BYTES" else f"TYPE_{datatype}")


def _version() -> str:
    try:
        return version("pagewire")
    except PackageNotFoundError:  # a checkout that was never installed
        return "0"
