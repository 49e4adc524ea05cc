"""From a request to its events: prompt to token ids, tokens to text, stop strings. What both Generate calls share."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

from common.errors import InvalidRequest, UnknownModel
from common.model_folder import ModelFolder
from common.sampling import StopConditions
from common.types import FinishReason
from scheduler.sequence import Sequence
from services.admission import Ask
from services.chat_template import ChatTemplate
from services.engine import ChoiceEvent, Engine, RequestStream
from services.request import Chat, GenerateSpec, Input, Text, TokenIds
from services.text import IncrementalDecoder, StopMatcher, Tokenizer

_ENOUGH_TEXT = 8  # characters a token: more than plain text has
_TORN_TOKENS = 64  # tokens that the end of a text that was cut short may have more than the whole
_LONG_CHAT = 64  # messages
_LONG_TEXT = 4096  # characters; above, tokenising would hold up other streams for a millisecond


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    """What one choice cost. Times in nanoseconds."""

    prompt_tokens: int
    cached_prompt_tokens: int
    completion_tokens: int
    queue_ns: int
    prefill_ns: int
    decode_ns: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Delta:
    """New tokens and text of one choice; the text may lag behind the tokens."""

    choice: int
    index: int
    token_ids: list[int]
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Finish:
    """The end of one choice."""

    choice: int
    reason: FinishReason
    matched_stop: str | None
    matched_token_id: int | None
    usage: Usage


class Answer:
    """One request that is being answered. Whoever started it closes it, also where no event was ever asked for."""

    def __init__(self, spec: GenerateSpec, prompt: list[int], stream: RequestStream, tokenizer: Tokenizer) -> None:
        self.spec = spec
        self.num_prompt_tokens = len(prompt)
        self._stream = stream
        self._choices = [_Choice(s, spec, prompt, tokenizer) for s in stream.sequences]

    @property
    def is_open(self) -> bool:
        """Some choice has not had its Finish."""
        return self._stream.is_open

    async def next(self) -> list[Delta | Finish]:
        """Wait for what comes next of any choice: deltas, and a Finish for each choice that ended."""
        out: list[Delta | Finish] = []
        for event in await self._stream.take():
            out += self._choices[event.choice].take(event, self._stream)
        return out

    def close(self) -> None:
        """The caller is served, or has left: what still runs is aborted."""
        self._stream.close()


class Answerer:
    """Starts answers: knows the model's tokenizer, its chat template and its limits."""

    def __init__(
        self,
        engine: Engine,
        model: ModelFolder,
        tokenizer: Tokenizer,
        template: ChatTemplate | None,
        *,
        default_max_tokens: int = 0,
    ) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self._engine = engine
        self._template = template
        self._default_max_tokens = default_max_tokens

    def check_model(self, name: str) -> None:
        """Raise UnknownModel unless `name` is empty or the served model's."""
        if name not in ("", self.model.name):
            raise UnknownModel(f"model: {name!r} is not served here; {self.model.name!r} is")

    async def prompt(
        self, source: Input, *, add_special_tokens: bool = True, max_tokens: int | None = None
    ) -> list[int]:
        """Token ids of an input. Raises InvalidRequest when it has none, or when the model cannot chat.

        With `max_tokens`, a text that must have more is refused after its beginning, not after megabytes of work.
        """
        match source:
            case TokenIds():
                return list(source.ids)
            case Chat():
                if self._template is None:
                    raise InvalidRequest("chat", f"{self.model.name} has no chat template; send text instead")
                render, add_special_tokens = self._template.render, False
                if len(source.messages) > _LONG_CHAT:
                    text = await asyncio.to_thread(render, source.messages)
                else:
                    text = render(source.messages)
            case Text():
                text = source.text
        if max_tokens is not None and len(text) > _ENOUGH_TEXT * max_tokens:
            head = await self._encode(text[: _ENOUGH_TEXT * max_tokens], add_special_tokens)
            if len(head) > max_tokens + _TORN_TOKENS:
                raise InvalidRequest(source.field, f"more than {max_tokens} tokens, which is all the context has")
        ids = await self._encode(text, add_special_tokens)
        if not ids:
            raise InvalidRequest(source.field, "the prompt has no tokens")
        return ids

    async def text(self, ids: tuple[int, ...], *, skip_special_tokens: bool) -> str:
        """The text of token ids. Raises InvalidRequest when there are more than a sequence can have."""
        if len(ids) > self.model.max_model_len:
            raise InvalidRequest("token_ids", f"at most {self.model.max_model_len}, got {len(ids)}")
        return await asyncio.to_thread(self.tokenizer.decode, ids, skip_special_tokens)

    async def _encode(self, text: str, add_special_tokens: bool) -> list[int]:
        if len(text) > _LONG_TEXT:  # the tokenizer works without the interpreter lock: streams go on meanwhile
            return await asyncio.to_thread(self.tokenizer.encode, text, add_special_tokens)
        return self.tokenizer.encode(text, add_special_tokens)

    @property
    def max_length(self) -> int:
        """Tokens that one sequence can have, prompt and answer together."""
        return min(self._engine.scheduler.max_length or self.model.max_model_len, self.model.max_model_len)

    async def start(
        self, spec: GenerateSpec, *, tenant: str, weight: float = 1.0, time_left_s: float | None = None
    ) -> Answer:
        """Queue the request of a tenant. Raises every PagewireError that a request can meet before its first token.

        Where there is no room, it is refused before its prompt is tokenised: by the fewest tokens that it can have.
        """
        self.check_model(spec.model)
        deadline_ns = self._engine.deadline_after(time_left_s)
        self._engine.check_room(
            Ask(
                tenant=tenant,
                priority=spec.priority,
                prompt_tokens=_fewest_tokens(spec.input),
                max_tokens=spec.max_tokens or 1,
                choices=spec.n,
                deadline_ns=deadline_ns,
            )
        )
        prompt = await self.prompt(spec.input, max_tokens=self.max_length)
        room = self.max_length - len(prompt)
        if room < 1:
            problem = f"{len(prompt)} tokens leave no room in the context of {self.max_length}"
            raise InvalidRequest(spec.input.field, problem)
        max_tokens = spec.max_tokens or min(self._default_max_tokens or room, room)
        if max_tokens > room:
            problem = f"at most {room} after a prompt of {len(prompt)} tokens, got {max_tokens}"
            raise InvalidRequest("max_tokens", problem)
        stop = StopConditions(
            max_tokens=max_tokens,
            stop_token_ids=spec.stop_token_ids,
            stop_strings=spec.stop_strings,
            ignore_eos=spec.ignore_eos,
        )
        stream = self._engine.submit(
            prompt,
            spec.sampling,
            stop,
            choices=spec.n,
            tenant=tenant,
            weight=weight,
            priority=spec.priority,
            deadline_ns=deadline_ns,
        )
        return Answer(spec, prompt, stream, self.tokenizer)


def _fewest_tokens(source: Input) -> int:
    match source:
        case TokenIds():
            return len(source.ids)
        case Chat():
            return sum(len(message.content) for message in source.messages) // _ENOUGH_TEXT
        case Text():
            return len(source.text) // _ENOUGH_TEXT


class _Choice:
    """Text and usage of one choice."""

    def __init__(self, sequence: Sequence, spec: GenerateSpec, prompt: list[int], tokenizer: Tokenizer) -> None:
        self._sequence = sequence
        self._decoder = IncrementalDecoder(tokenizer, prompt, skip_special_tokens=spec.skip_special_tokens)
        self._stops = StopMatcher(spec.stop_strings) if spec.stop_strings else None
        self._num_tokens = 0

    def take(self, event: ChoiceEvent, stream: RequestStream) -> list[Delta | Finish]:
        """What the client is told of these tokens."""
        last_is_mark = event.reason in (FinishReason.EOS, FinishReason.STOP_TOKEN)  # ends the text, is not part of it
        ended = event.reason is not FinishReason.NONE
        words = event.tokens[:-1] if last_is_mark else event.tokens
        if self._stops is None:
            matched, tokens = None, event.tokens
            text = self._decoder.push(words) + (self._decoder.finish() if ended else "")
        else:
            text, matched, used = self._up_to_stop(self._stops, words, ended=ended)
            tokens = event.tokens[:used]
        out: list[Delta | Finish] = []
        if tokens or text:
            out.append(Delta(choice=event.choice, index=self._num_tokens, token_ids=tokens, text=text))
        self._num_tokens += len(tokens)
        if matched is not None:
            stream.end_choice(event.choice, FinishReason.STOP_STRING)
            out.append(self._finish(event.choice, FinishReason.STOP_STRING, matched, None))
        elif ended:
            out.append(self._finish(event.choice, event.reason, None, tokens[-1] if last_is_mark else None))
        return out

    def _up_to_stop(self, stops: StopMatcher, words: list[int], *, ended: bool) -> tuple[str, str | None, int | None]:
        """Text before a stop string, the stop string, and how many tokens that took; None is all there are."""
        text = ""
        for used, token in enumerate(words, start=1):  # one by one: a stop ends at its token
            piece, matched = stops.push(self._decoder.push([token]))
            text += piece
            if matched is not None:
                return text, matched, used
        if not ended:
            return text, None, None
        piece, matched = stops.push(self._decoder.finish())
        return text + piece + ("" if matched else stops.flush()), matched, None

    def _finish(self, choice: int, reason: FinishReason, stop: str | None, token: int | None) -> Finish:
        s = self._sequence
        return Finish(
            choice=choice,
            reason=reason,
            matched_stop=stop,
            matched_token_id=token,
            usage=Usage(
                prompt_tokens=s.num_prompt,
                cached_prompt_tokens=s.num_cached_prompt,
                completion_tokens=self._num_tokens,
                queue_ns=max(0, s.admitted_ns - s.arrived_ns),
                prefill_ns=max(0, s.first_token_ns - s.admitted_ns),
                decode_ns=max(0, s.last_token_ns - s.first_token_ns),
            ),
        )
