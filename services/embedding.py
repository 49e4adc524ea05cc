"""Vectors of texts: each is a request of its own to the engine, which ends with its prompt.

Nothing of it is resumed: whoever is not answered asks again, and gets the same.
"""

from __future__ import annotations

import asyncio
import math
import struct
from collections import deque
from dataclasses import dataclass
from typing import Final

from common.cache_control import CacheControl
from common.errors import InvalidRequest, Overloaded, RequestFailed
from common.sampling import SamplingParams, StopConditions
from common.sentence_folder import Embedding
from common.types import FinishReason
from services.admission import Ask
from services.answering import Answerer
from services.caller import Caller
from services.request import EmbedSpec, Text
from services.request_stream import RequestStream

_AT_ONCE: Final = 256  # texts of one request that wait or run
_SAMPLING: Final = SamplingParams(temperature=0.0)
_STOP: Final = StopConditions(max_tokens=1, ignore_eos=True)  # of the one step behind the prompt, no token is made


@dataclass(frozen=True, slots=True, kw_only=True)
class TextVector:
    """The vector of one text. D numbers."""

    values: bytes  # (D,) float32, little-endian
    prompt_tokens: int
    cached_prompt_tokens: int


class Embedder:
    """Answers requests for embeddings, where the model makes any."""

    def __init__(self, answerer: Answerer, *, max_bytes: int) -> None:
        """`max_bytes` is what the vectors of one answer may have together."""
        self._answerer = answerer
        self._max_bytes = max_bytes
        self._eos = _appended_eos(answerer)

    async def embed(self, spec: EmbedSpec, caller: Caller, *, time_left_s: float | None = None) -> list[TextVector]:
        """The vectors of all inputs, in their order.

        Raises UnknownModel, InvalidRequest naming the field and the limit, and whatever `Engine.submit` and its streams
        do; RequestFailed where a text has no vector of finite numbers. Nothing of it runs on then.
        """
        self._answerer.check_model(spec.model)
        embedding = self._embedding()
        dimensions = embedding.dimensions if spec.dimensions is None else spec.dimensions
        if dimensions > embedding.dimensions:
            raise InvalidRequest("dimensions", f"must be in [1, {embedding.dimensions}], got {dimensions}")
        if len(spec.inputs) > (most := max(1, self._max_bytes // (4 * dimensions))):
            raise InvalidRequest("inputs", f"at most {most} of vectors of {dimensions} numbers, got {len(spec.inputs)}")
        engine, deadline_ns = self._answerer.engine, self._answerer.engine.deadline_after(time_left_s)
        prompts = await self._prompts(spec)
        ask = Ask(
            tenant=caller.tenant,
            priority=spec.priority,
            prompt_tokens=sum(map(len, prompts)),
            max_tokens=_STOP.max_tokens,
            choices=min(len(prompts), _AT_ONCE),
            deadline_ns=deadline_ns,
        )
        with self._answerer.refusals(spec.request_id, caller.tenant):
            engine.check_room(ask)  # for all of them, before the first is computed
        vectors: list[TextVector] = []
        streams: deque[RequestStream] = deque()  # of those that wait or run, in order

        async def take_oldest() -> None:
            vectors.append(await _vector(streams[0], dimensions, normalizes=embedding.normalizes))
            streams.popleft().close()

        try:
            for i, prompt in enumerate(prompts):
                if len(streams) == _AT_ONCE:
                    await take_oldest()
                while True:
                    try:
                        streams.append(self._submit(spec, i, prompt, caller, deadline_ns, embedding.dimensions))
                        break
                    except Overloaded:
                        if not streams:
                            raise
                    await take_oldest()  # there may be room then
            while streams:
                await take_oldest()
        finally:
            for stream in streams:
                stream.close()
        return vectors

    def _embedding(self) -> Embedding:
        model = self._answerer.model
        if isinstance(model.embedding, str):
            raise InvalidRequest("model", f"{model.name} makes text, and no embeddings: {model.embedding}")
        return model.embedding

    async def _prompts(self, spec: EmbedSpec) -> list[list[int]]:
        """The tokens of all inputs: whatever is wrong with one is told before any is computed."""
        most = self._answerer.max_length - 1  # the place behind a prompt is the sampler's
        prompts: list[list[int]] = []
        for i, each in enumerate(spec.inputs):
            try:
                tokens = await self._answerer.prompt(each, max_tokens=most)
            except InvalidRequest as error:
                raise InvalidRequest(f"inputs[{i}]", error.problem) from error
            if not tokens:
                raise InvalidRequest(f"inputs[{i}]", "is empty")
            if isinstance(each, Text) and self._eos is not None and tokens[-1] != self._eos:
                tokens.append(self._eos)
            if len(tokens) > most:
                problem = f"{len(tokens)} tokens, and at most {most} are embedded in the context of {most + 1}"
                raise InvalidRequest(f"inputs[{i}]", problem)
            prompts.append(tokens)
            await asyncio.sleep(0)  # others have their turn
        return prompts

    def _submit(
        self, spec: EmbedSpec, number: int, prompt: list[int], caller: Caller, deadline_ns: int, dimensions: int
    ) -> RequestStream:
        engine, name = self._answerer.engine, f"{spec.request_id}-{number}" if number else spec.request_id
        with self._answerer.refusals(name, caller.tenant):
            return engine.submit(
                prompt,
                _SAMPLING,
                _STOP,
                tenant=caller.tenant,
                weight=caller.weight,
                priority=spec.priority,
                deadline_ns=deadline_ns,
                cache=spec.cache or CacheControl(),
                timeline=engine.timeline(name, tenant=caller.tenant, operation="embeddings"),
                dimensions=dimensions,
            )


async def _vector(stream: RequestStream, dimensions: int, *, normalizes: bool) -> TextVector:
    """What the request came to, when it has ended."""
    while stream.is_open:
        await stream.take()
    sequence = stream.sequences[0]
    if sequence.reason is not FinishReason.EMBEDDED:
        raise RequestFailed(f"a text of {sequence.num_prompt} tokens has no vector of finite numbers")
    return TextVector(
        values=shortened(sequence.vector, dimensions, normalizes=normalizes),
        prompt_tokens=sequence.num_prompt,
        cached_prompt_tokens=sequence.num_cached_prompt,
    )


def shortened(vector: bytes, dimensions: int, *, normalizes: bool) -> bytes:
    """The first `dimensions` numbers, then made 1 long: as sentence-transformers does with truncate_dim, and OpenAI.

    (There it is `encode(normalize_embeddings=True)`; its Normalize alone, which is before the cut, leaves less.)
    """
    kept = vector[: 4 * dimensions]
    if not normalizes:
        return kept
    values = struct.unpack(f"<{dimensions}f", kept)
    length = max(math.hypot(*values), 1e-12)
    return struct.pack(f"<{dimensions}f", *(value / length for value in values))


def _appended_eos(answerer: Answerer) -> int | None:
    """The token that a text must end with where tokenizer_config.json says so, and tokenizer.json may not do it."""
    model = answerer.model
    if isinstance(model.embedding, str) or not model.embedding.appends_eos:
        return None
    return answerer.tokenizer.added.get(model.special_tokens.get("eos_token", ""))
