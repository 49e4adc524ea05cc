"""pagewire.v1.InferenceService: messages in, messages out. The thinking is in answering.py and the engine."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable
from contextlib import closing

from common.sampling import RequestLimits
from protos import inference_pb2 as pb
from services import codec_public
from services.answering import Answer, Answerer, Delta
from services.caller import current_caller
from services.handlers import Context


class SchedulerService:
    """The public API of one scheduler."""

    def __init__(
        self,
        answerer: Answerer,
        limits: RequestLimits,
        num_executors: Callable[[], int],
    ) -> None:
        self._answerer = answerer
        self._limits = limits
        self._num_executors = num_executors

    async def Generate(self, request: pb.GenerateRequest, context: Context) -> pb.GenerateResponse:  # noqa: N802
        """The whole answer at once."""
        with closing(await self._start(request, context)) as answer:
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
        with closing(await self._start(request, context)) as answer:
            yield pb.GenerateStreamResponse(prompt=self._prompt_info(answer))
            while answer.is_open:
                for event in await answer.next():
                    if isinstance(event, Delta):
                        yield pb.GenerateStreamResponse(delta=codec_public.delta_pb(event))
                    else:
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

    async def _start(self, request: pb.GenerateRequest | pb.GenerateStreamRequest, context: Context) -> Answer:
        spec = codec_public.request_from_pb(request, self._limits, vocab_size=self._answerer.model.vocab_size)
        caller = current_caller()
        return await self._answerer.start(
            spec, tenant=caller.tenant, weight=caller.weight, time_left_s=context.time_remaining()
        )

    def _prompt_info(self, answer: Answer) -> pb.PromptInfo:
        return pb.PromptInfo(
            request_id=answer.spec.request_id,
            model=self._answerer.model.name,
            prompt_tokens=answer.num_prompt_tokens,
            seed=answer.spec.sampling.seed,
        )
