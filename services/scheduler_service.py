"""pagewire.v1.InferenceService: messages in, messages out. The thinking is in answering.py and the engine."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import closing

from common import failpoints, log
from common.sampling import RequestLimits
from protos import inference_pb2 as pb
from services import codec_public
from services.answer import Answer, Delta, PromptLogprobs
from services.answering import Answerer
from services.caller import current_caller
from services.embedding import Embedder
from services.handlers import Context
from services.tools.codec import add_calls


class SchedulerService:
    """The public API of one scheduler."""

    def __init__(
        self,
        answerer: Answerer,
        limits: RequestLimits,
        num_executors: Callable[[], int],
    ) -> None:
        self._answerer = answerer
        self._embedder = Embedder(answerer, max_bytes=limits.max_embedding_bytes)
        self._limits = limits
        self._num_executors = num_executors
        self._spell = answerer.tokenizer.bytes_of

    async def Generate(self, request: pb.GenerateRequest, context: Context) -> pb.GenerateResponse:  # noqa: N802
        """The whole answer at once."""
        with closing(await self.start(request, context)) as answer:
            choices = [pb.Choice(index=i) for i in range(answer.spec.n)]
            prompt_logprobs: list[pb.TokenLogprobs] = []
            while answer.is_open:
                for event in await answer.next():
                    if isinstance(event, PromptLogprobs):
                        prompt_logprobs.extend(codec_public.prompt_logprobs_pb(event, self._spell).logprobs)
                        await asyncio.sleep(0)  # others have their turn
                        continue
                    choice = choices[event.choice]
                    if isinstance(event, Delta):
                        choice.token_ids.extend(event.token_ids)
                        choice.text += event.text
                        if event.logprobs:
                            choice.logprobs.extend(
                                codec_public.logprobs_pb(event.token_ids, event.logprobs, self._spell)
                            )
                        add_calls(choice.tool_calls, event.calls)
                    else:
                        codec_public.fill_finish(choice, event)
        return pb.GenerateResponse(
            prompt=self._prompt_info(answer), choices=choices, prompt_logprobs=prompt_logprobs
        )  # fmt: skip

    def GenerateStream(  # noqa: N802
        self, request: pb.GenerateStreamRequest, context: Context
    ) -> AsyncGenerator[pb.GenerateStreamResponse, None]:
        """The answer as it is made."""
        return self._tell(self.start(request, context), context)

    def Resume(  # noqa: N802
        self, request: pb.ResumeRequest, context: Context
    ) -> AsyncGenerator[pb.GenerateStreamResponse, None]:
        """The rest of an answer."""
        return self._tell(self._resume(request, context), context)

    async def Embed(self, request: pb.EmbedRequest, context: Context) -> pb.EmbedResponse:  # noqa: N802
        """A vector for each text."""
        answerer, tenant = self._answerer, current_caller().tenant
        size = codec_public.embed_size_from_pb(request, self._limits, max_length=answerer.max_length)
        answerer.check_room(size, tenant, time_left_s=context.time_remaining())
        spec = codec_public.embed_from_pb(request, self._limits, vocab_size=answerer.model.vocab_size)
        log.about(request_id=spec.request_id)
        vectors = await self._embedder.embed(spec, current_caller(), time_left_s=context.time_remaining())
        return pb.EmbedResponse(
            request_id=spec.request_id,
            model=answerer.model.name,
            dimensions=len(vectors[0].values) // 4,
            embeddings=[
                pb.Embedding(
                    values=vector.values,
                    prompt_tokens=vector.prompt_tokens,
                    cached_prompt_tokens=vector.cached_prompt_tokens,
                )
                for vector in vectors
            ],
        )

    async def Cancel(self, request: pb.CancelRequest, context: Context) -> pb.CancelResponse:  # noqa: N802
        """End a resumable request now."""
        return pb.CancelResponse(found=self._answerer.cancel(request.request_id, tenant=current_caller().tenant))

    async def Unpin(self, request: pb.UnpinRequest, context: Context) -> pb.UnpinResponse:  # noqa: N802
        """End pins of the caller's tenant."""
        id = codec_public.pin_id_from_pb(request)
        return pb.UnpinResponse(tokens=self._answerer.unpin(id, tenant=current_caller().tenant))

    async def Tokenize(self, request: pb.TokenizeRequest, context: Context) -> pb.TokenizeResponse:  # noqa: N802
        """Text or chat to token ids."""
        self._answerer.check_model(request.model)
        source = codec_public.input_from_pb(request, self._limits, vocab_size=self._answerer.model.vocab_size)
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
            embedding_dimensions=0 if isinstance(model.embedding, str) else model.embedding.dimensions,
        )

    async def start(self, request: pb.GenerateRequest | pb.GenerateStreamRequest, context: Context) -> Answer:
        """Check the request, and queue it. Whoever is given the answer closes it."""
        self._check_room(request, context)
        spec = codec_public.request_from_pb(request, self._limits, vocab_size=self._answerer.model.vocab_size)
        log.about(request_id=spec.request_id)
        return await self._answerer.start(spec, current_caller(), time_left_s=context.time_remaining())

    async def _resume(self, request: pb.ResumeRequest, context: Context) -> Answer:
        self._check_room(request, context)
        vocab_size = self._answerer.model.vocab_size
        spec, points = codec_public.resume_from_pb(request, self._limits, vocab_size=vocab_size)
        log.about(request_id=spec.request_id)
        return await self._answerer.resume(spec, points, current_caller(), time_left_s=context.time_remaining())

    def _check_room(
        self, request: pb.GenerateRequest | pb.GenerateStreamRequest | pb.ResumeRequest, context: Context
    ) -> None:
        """Refuse a request for which there is no room before anything else is done for it, even before it is checked.

        Where more is asked for than can be served, most of all calls end here.
        """
        size = codec_public.size_from_pb(request, self._limits, max_length=self._answerer.max_length)
        self._answerer.check_room(size, current_caller().tenant, time_left_s=context.time_remaining())

    async def _tell(
        self, starting: Awaitable[Answer], context: Context
    ) -> AsyncGenerator[pb.GenerateStreamResponse, None]:
        """Every message of the answer. Where the caller is lost before the end, a resumable request goes on."""
        answer = await starting
        try:
            yield pb.GenerateStreamResponse(prompt=self._prompt_info(answer))
            while answer.is_open:
                for event in await answer.next():
                    if isinstance(event, Delta):
                        failpoints.hit("after_outbox_before_write")
                        message = pb.GenerateStreamResponse()
                        codec_public.fill_delta(message.delta, event, self._spell)
                        yield message
                    elif isinstance(event, PromptLogprobs):
                        part = codec_public.prompt_logprobs_pb(event, self._spell)
                        yield pb.GenerateStreamResponse(prompt_logprobs=part)
                    else:
                        failpoints.hit("before_end_chunk")
                        yield pb.GenerateStreamResponse(finish=codec_public.finish_pb(event))
        except (asyncio.CancelledError, GeneratorExit):
            if (
                answer.is_resumable and context.time_remaining() != 0
            ):  # it waits for nobody once its deadline has passed
                answer.let_go()
            raise
        finally:
            answer.close()

    def _prompt_info(self, answer: Answer) -> pb.PromptInfo:
        return pb.PromptInfo(
            request_id=answer.spec.request_id,
            model=self._answerer.model.name,
            prompt_tokens=answer.num_prompt_tokens,
            seed=answer.spec.sampling.seed,
            max_tokens=answer.spec.max_tokens or 0,
            ticket=answer.ticket,
            resumed=answer.resumed,
            determinism=self._answerer.determinism,
            pinned=codec_public.pinned_pb(answer.pinned),
        )
