"""pagewire.v1.InferenceService: messages in, messages out. The thinking is in answering.py and the engine."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import closing, contextmanager

from common import failpoints
from common.errors import Overloaded
from common.sampling import RequestLimits
from protos import inference_pb2 as pb
from services import codec_public
from services.answering import Answer, Answerer, Delta
from services.handlers import Context


class SchedulerService:
    """The public API of one scheduler."""

    def __init__(
        self,
        answerer: Answerer,
        limits: RequestLimits,
        num_executors: Callable[[], int],
        *,
        max_streams: int = 4096,
    ) -> None:
        self._answerer = answerer
        self._limits = limits
        self._max_streams = max_streams
        self._num_open = 0
        self._num_executors = num_executors

    async def Generate(self, request: pb.GenerateRequest, context: Context) -> pb.GenerateResponse:  # noqa: N802
        """The whole answer at once."""
        with self._open_call(), closing(await self._start(request)) as answer:
            choices = [pb.Choice(index=i) for i in range(answer.spec.n)]
            while answer.is_open:
                for event in await answer.next():
                    choice = choices[event.choice]
                    if isinstance(event, Delta):
                        choice.token_ids.extend(event.token_ids)
                        choice.text += event.text
                    else:
                        codec_public.fill_finish(choice, event)
        return pb.GenerateResponse(prompt=self._prompt_info(answer), choices=choices)

    async def GenerateStream(  # noqa: N802
        self, request: pb.GenerateStreamRequest, context: Context
    ) -> AsyncGenerator[pb.GenerateStreamResponse, None]:
        """The answer as it is made."""
        with self._open_call(), closing(await self._start(request)) as answer:
            yield pb.GenerateStreamResponse(prompt=self._prompt_info(answer))
            while answer.is_open:
                for event in await answer.next():
                    if isinstance(event, Delta):
                        failpoints.hit("after_outbox_before_write")
                        yield pb.GenerateStreamResponse(delta=codec_public.delta_pb(event))
                    else:
                        failpoints.hit("before_end_chunk")
                        yield pb.GenerateStreamResponse(finish=codec_public.finish_pb(event))

    async def Tokenize(self, request: pb.TokenizeRequest, context: Context) -> pb.TokenizeResponse:  # noqa: N802
        """Text or chat to token ids."""
        self._answerer.check_model(request.model)
        source = codec_public.input_from_pb(
            request, vocab_size=self._answerer.model.vocab_size, max_messages=self._limits.max_messages
        )
        special = request.add_special_tokens if request.HasField("add_special_tokens") else True
        return pb.TokenizeResponse(token_ids=await self._answerer.prompt(source, add_special_tokens=special))

    async def Detokenize(self, request: pb.DetokenizeRequest, context: Context) -> pb.DetokenizeResponse:  # noqa: N802
        """Token ids to text."""
        self._answerer.check_model(request.model)
        ids = codec_public.token_ids("token_ids", tuple(request.token_ids), self._answerer.model.vocab_size)
        skip = request.skip_special_tokens if request.HasField("skip_special_tokens") else True
        return pb.DetokenizeResponse(text=await self._answerer.text(ids, skip_special_tokens=skip))

    async def GetModel(self, request: pb.GetModelRequest, context: Context) -> pb.GetModelResponse:  # noqa: N802
        """What is served, and its limits."""
        self._answerer.check_model(request.model)
        model = self._answerer.model
        return pb.GetModelResponse(
            model=model.name,
            digest=model.digest,
            vocab_size=model.vocab_size,
            max_model_len=self._answerer.max_length,
            max_choices=self._limits.max_choices,
            chat=model.has_chat_template,
            num_executors=self._num_executors(),
        )

    @contextmanager
    def _open_call(self) -> Iterator[None]:
        """Count the call while it is open. Raises Overloaded for one too many."""
        if self._num_open >= self._max_streams:
            raise Overloaded(f"{self._num_open} calls are open already, which is all there may be")
        self._num_open += 1
        try:
            yield
        finally:
            self._num_open -= 1

    async def _start(self, request: pb.GenerateRequest | pb.GenerateStreamRequest) -> Answer:
        spec = codec_public.request_from_pb(request, self._limits, vocab_size=self._answerer.model.vocab_size)
        return await self._answerer.start(spec)

    def _prompt_info(self, answer: Answer) -> pb.PromptInfo:
        return pb.PromptInfo(
            request_id=answer.spec.request_id,
            model=self._answerer.model.name,
            prompt_tokens=answer.num_prompt_tokens,
            seed=answer.spec.sampling.seed,
        )
