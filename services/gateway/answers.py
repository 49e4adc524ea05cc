"""The answers to one HTTP request as they are made: of several prompts side by side, without what was told before."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any, Final, NamedTuple, Self

from common.errors import InvalidRequest, RequestFailed, TicketRefused, TicketStale, Unavailable
from pagewire.aio import AsyncStream
from pagewire.answers import Delta, Finish, FinishReason, TokenLogprobs, Usage
from pagewire.tools import ToolCallDelta
from protos import inference_pb2 as pb
from services.gateway.held_scores import Share
from services.gateway.positions import MAX_CHOICES, Digest, Heard, Position, Writer, pack_heard, pack_prompt
from services.gateway.upstream import Upstream

_OF_PROMPTS: Final = ("text", "token_ids", "prompt")  # what the scheduler calls the prompt of each
_AHEAD: Final = 64  # pieces of several prompts that may wait for their reader


class Piece(NamedTuple):
    """What is new of one choice: tokens and text, or its end."""

    choice: int  # over all prompts: those of the first come first
    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprobs, ...]
    finish: Finish | None
    tool_calls: tuple[ToolCallDelta, ...] = ()


class _Read(NamedTuple):
    """What was read of one of several streams; None is its end."""

    prompt: int
    stream: AsyncStream
    new: Delta | Finish | Exception | None
    ticket: bytes = b""  # of the choice behind it: by the time that it is told, the stream has gone on


class Answers:
    """Pieces of any choice in the order in which they come. Leave it with `async with`, and the schedulers stop."""

    def __init__(
        self,
        upstream: Upstream,
        requests: Sequence[pb.GenerateStreamRequest],
        key: str,
        *,
        created: int,
        position: Position | None = None,
        tokens: Sequence[Sequence[int]] = (),
        on_first: Callable[[], None] = lambda: None,
        has_ids: bool = True,
        keeps_logprobs: bool = True,
        share: Share | None = None,
    ) -> None:
        """The requests are alike but for their prompts, and have a request id and a seed.

        With `position` what was told before is left out; with the `tokens` of each choice, too, it is not made again
        either. `on_first` is called with the first piece. Without `has_ids` no event has one. Without
        `keeps_logprobs` only pieces have those of the answer: of twenty tokens beside each they are kilobytes a token.
        What is kept of them is taken from `share`, and given back when this is closed.

        Raises InvalidRequest for tokens that do not fit.
        """
        self.n = requests[0].sampling.n if requests[0].sampling.HasField("n") else 1
        self._upstream = upstream
        self._requests = requests
        self._key = key
        self._goes_on = position is not None
        self._keeps_logprobs = keeps_logprobs
        self._share = share
        self.streams = [self._ask(prompt) for prompt in range(len(requests))]
        self.created = created
        self.linger = False  # whether what still runs when the reader has left waits for him
        self._told = [
            [_Told(heard, again=not tokens) for heard in (position.choices[i] if position else (Heard(),) * self.n)]
            for i in range(len(requests))
        ]
        if position is not None and tokens:
            self._go_on(tokens)
        self.begins_at = position.event + 1 if position else 0  # number of the first event that is told now
        self.next_event = self.begins_at  # where events are numbered: the number of the next one
        self._writer: Writer | None = None
        if has_ids and len(requests) * self.n <= MAX_CHOICES:
            first = requests[0]
            self._writer = Writer(first.request_id, first.sampling.seed, created, prompts=len(requests), choices=self.n)
        self._queue: asyncio.Queue[_Read] = asyncio.Queue(_AHEAD)
        self._on_first: Callable[[], None] | None = on_first
        self._asked_anew: set[int] = set()
        self._num_ended = 0  # streams that were read to their end through the queue
        self._readers: list[asyncio.Task[None]] = []

    @property
    def model(self) -> str:
        """What answers; known with the first piece, of whichever prompt that is."""
        return next((model for stream in self.streams if (model := stream.continuation.model)), "")

    @property
    def determinism(self) -> str:
        """The class of the executors that answer; empty where they promise nothing, or none is known yet."""
        return next((told for stream in self.streams if (told := stream.continuation.determinism)), "")

    async def next(self) -> Piece | None:
        """What comes next; None when all choices have ended. Raises PagewireErrors."""
        while (read := await self._read()) is not None:
            prompt, new, ticket = read
            if self._on_first is not None:
                self._on_first()
                self._on_first = None
            told = self._told[prompt][new.choice]
            choice = prompt * self.n + new.choice
            if isinstance(new, Finish):
                if new.reason is FinishReason.ERROR:
                    raise RequestFailed("this choice failed; do not send it again")
                if new.reason is FinishReason.ABORTED:
                    await self._ask_again(prompt)
                    continue
                if not told.end():
                    continue
                return Piece(choice, "", (), (), new)
            if (piece := told.add(new, choice, ticket)) is not None:
                return piece
        return None

    def id(self, number: int, *, done: bool = False) -> str:
        """The id of the event with this number, which tells what came last; empty where events have none."""
        if self._writer is None:
            return ""
        parts: list[bytes] = []
        for stream, of_prompt in zip(self.streams, self._told, strict=True):
            heard = stream.continuation
            parts.append(pack_prompt(heard.max_tokens))
            parts += [told.packed(heard.prompt_ticket) for told in of_prompt]
        return self._writer.id(number, b"".join(parts), done=done)

    def characters(self, choice: int) -> int:
        """How much of a choice's text was told, before this call too."""
        return self._told[choice // self.n][choice % self.n].characters_told

    def calls(self, choice: int) -> int:
        """How many calls of tools have begun in a choice, before this call too."""
        return self._told[choice // self.n][choice % self.n].calls

    def has_begun(self, choice: int) -> bool:
        """Whether any token or the end of a choice was told, before this call too: also one that had no text yet."""
        told = self._told[choice // self.n][choice % self.n]
        return told.tokens_told > 0 or told.ended

    def was_told(self, choice: int) -> bool:
        """Whether any text, call or end of a choice was told, before this call too."""
        told = self._told[choice // self.n][choice % self.n]
        return told.characters_told > 0 or told.calls > 0 or told.ended

    def usage(self) -> Usage:
        """What all of it cost. A prompt counts once, however many choices it has. Known when all have ended."""
        ends = [[stream.continuation.finishes[n].usage for n in range(self.n)] for stream in self.streams]
        return Usage(
            prompt_tokens=sum(max(end.prompt_tokens for end in of_prompt) for of_prompt in ends),
            cached_prompt_tokens=sum(max(end.cached_prompt_tokens for end in of_prompt) for of_prompt in ends),
            completion_tokens=sum(
                end.completion_tokens + end.discarded_tokens for of_prompt in ends for end in of_prompt
            ),
            queue_s=0.0,
            prefill_s=0.0,
            decode_s=0.0,
        )

    def told_of(self, prompt: int) -> dict[str, Any]:
        """What is told of a prompt beside its answers, by our names: what of it is pinned, where that was asked for."""
        pinned = self.streams[prompt].continuation.pinned
        if pinned is None:
            return {}
        return {"pinned": {"id": pinned.pin_id, "tokens": pinned.tokens, "expires": pinned.expires_s}}

    async def close(self) -> None:
        """Read no more."""
        try:
            for reader in self._readers:
                reader.cancel()
            await asyncio.gather(*self._readers, return_exceptions=True)
            await asyncio.gather(*(stream.close(linger=self.linger) for stream in self.streams))
        finally:
            if self._share is not None:
                self._share.give_back()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None
    ) -> None:
        await self.close()

    def _ask(self, prompt: int) -> AsyncStream:
        stream = self._upstream.ask(self._requests[prompt], self._key)
        stream.continuation.keeps_logprobs = self._keeps_logprobs
        if self._share is not None:
            stream.continuation.on_kept = self._share.take
        return stream

    async def _ask_again(self, prompt: int) -> None:
        """A stream that goes on was ended: its reader left, and the word of that came behind him coming back.

        Raises Unavailable where that is not how it was.
        """
        if not self._goes_on or prompt in self._asked_anew:
            raise Unavailable("the request was ended on the server")
        self._asked_anew.add(prompt)
        ended = self.streams[prompt]
        self._told[prompt] = [
            _Told(told.heard(ended.continuation.prompt_ticket), again=True) for told in self._told[prompt]
        ]
        self.streams[prompt] = self._ask(prompt)
        if self._readers:
            self._read_ahead(prompt)
        await ended.close(linger=True)

    async def _read(self) -> tuple[int, Delta | Finish, bytes] | None:
        try:
            if len(self.streams) > 1:
                return await self._read_any()
            stream = self.streams[0]
            new = await stream.next()
            return None if new is None else (0, new, stream.continuation.ticket(new.choice))
        except (TicketRefused, TicketStale) as error:
            if self._goes_on:
                raise  # of a caller who has sent none they are the schedulers' business, and not his mistake
            raise Unavailable(f"no scheduler goes on with the answer that another one began: {error}") from error

    async def _read_any(self) -> tuple[int, Delta | Finish, bytes] | None:
        """What comes first of several streams."""
        if not self._readers:
            for prompt in range(len(self.streams)):
                self._read_ahead(prompt)
        while self._num_ended < len(self.streams):
            read = await self._queue.get()
            if read.stream is not self.streams[read.prompt]:  # that was asked anew
                continue
            if isinstance(read.new, InvalidRequest):
                raise of_prompt(read.new, read.prompt)
            if isinstance(read.new, Exception):  # half of a batch is of no use to anybody
                raise read.new
            if read.new is not None:
                return read.prompt, read.new, read.ticket
            self._num_ended += 1
        return None

    def _read_ahead(self, prompt: int) -> None:
        self._readers.append(asyncio.create_task(self._pass_on(prompt, self.streams[prompt])))

    async def _pass_on(self, prompt: int, stream: AsyncStream) -> None:
        try:
            while (new := await stream.next()) is not None:
                await self._queue.put(_Read(prompt, stream, new, stream.continuation.ticket(new.choice)))
            await self._queue.put(_Read(prompt, stream, None))
        except Exception as error:  # noqa: BLE001  raised where it is read
            await self._queue.put(_Read(prompt, stream, error))

    def _go_on(self, tokens: Sequence[Sequence[int]]) -> None:
        """Begin each choice behind the tokens that its caller brings."""
        total = len(self.streams) * self.n
        if len(tokens) != total:
            raise InvalidRequest("resume_token_ids", f"must have a list for each of {total} choices, got {len(tokens)}")
        for i, (stream, of_prompt) in enumerate(zip(self.streams, self._told, strict=True)):
            points: dict[int, tuple[bytes, Sequence[int]]] = {}
            calls: dict[int, int] = {}
            ended: list[Finish] = []
            for n, told in enumerate(of_prompt):
                told.bring(tokens[i * self.n + n], f"resume_token_ids[{i * self.n + n}]")
                if told.ended:
                    ended.append(_ended(n, told.tokens))
                else:
                    points[n] = (told.ticket, tokens[i * self.n + n])
                    calls[n] = told.calls
            stream.continuation.go_on(points, ended, calls)


class _Told:
    """What the caller was told of one choice, and what of that comes again."""

    __slots__ = (
        "_again",
        "_arguments",
        "_begun",
        "_digest",
        "_heard",
        "calls",
        "characters",
        "ended",
        "ticket",
        "tokens",
    )

    def __init__(self, heard: Heard, *, again: bool) -> None:
        """With `again` all of it comes from the beginning, and what was heard is left out."""
        self.tokens = 0 if again else heard.tokens
        self.characters = 0 if again else heard.characters
        self.calls = heard.calls  # that have begun; a part of one of these that comes again is not its first
        self._begun = 0 if again else heard.calls  # the same, of those that came
        self._arguments = 0 if again else heard.arguments
        self.ended = heard.ended
        self.ticket = heard.ticket  # of what was told
        self._heard = heard
        self._again = again and heard.tokens > 0
        self._digest = Digest()

    @property
    def tokens_told(self) -> int:
        """Tokens that the caller has."""
        return max(self.tokens, self._heard.tokens)

    @property
    def characters_told(self) -> int:
        """Characters that the caller has."""
        return max(self.characters, self._heard.characters)

    @property
    def has_begun(self) -> bool:
        """Whether the caller has a token."""
        return self.tokens > 0 or self._heard.tokens > 0

    def bring(self, tokens: Sequence[int], path: str) -> None:
        """The caller says what he was told. Raises InvalidRequest, TicketRefused."""
        if len(tokens) != self.tokens:
            raise InvalidRequest(path, f"{self.tokens} tokens were told up to that event, got {len(tokens)}")
        if self.calls > len(tokens):  # each is held from now on, and anybody can write a number into an id
            raise TicketRefused(f"{path}: {len(tokens)} tokens cannot have begun {self.calls} calls")
        self._digest.add(tokens)
        if tokens and self._digest.value() != self._heard.digest:
            raise TicketRefused(f"{path}: these are not the tokens that were told")

    def add(self, delta: Delta, choice: int, ticket: bytes) -> Piece | None:
        """What is new in a delta; None where that is nothing. Raises TicketRefused where it is not as it was told.

        `ticket` is the one behind it.
        """
        self.ticket = ticket
        tokens, text, logprobs = delta.token_ids, delta.text, delta.logprobs
        calls = self._new_calls(delta.tool_calls) if delta.tool_calls else ()
        if self._again:
            known = max(0, min(len(tokens), self._heard.tokens - self.tokens))
            self._digest.add(tokens[:known])
            if known and self.tokens + known == self._heard.tokens and self._digest.value() != self._heard.digest:
                raise _not_the_same()
            known_text = max(0, min(len(text), self._heard.characters - self.characters))
            self.tokens += known
            self.characters += known_text
            tokens, text, logprobs = tokens[known:], text[known_text:], logprobs[known:]
        self._digest.add(tokens)
        self.tokens += len(tokens)
        self.characters += len(text)
        if self.ended or not (tokens or text or calls):
            return None
        return Piece(choice, text, tokens, logprobs, None, calls)

    def end(self) -> bool:
        """It has ended; False where its caller knows. Raises TicketRefused where more was told than there is."""
        if self.tokens < self._heard.tokens or self._begun < self._heard.calls:
            raise _not_the_same()
        known, self.ended = self.ended, True
        return not known

    def packed(self, prompt_ticket: bytes) -> bytes:
        """The same, as it stands in an id."""
        if self._heard.ended or self.tokens < self._heard.tokens:
            return self._heard.packed()
        digest = self._digest.value()
        ticket = self._ticket(prompt_ticket)
        return pack_heard(
            self.tokens, self.characters, self.ended, digest, ticket, calls=self.calls, arguments=self._arguments
        )

    def heard(self, prompt_ticket: bytes) -> Heard:
        """For the id of an event that tells all up to here."""
        if self._heard.ended or self.tokens < self._heard.tokens:  # of this choice nothing new was told
            return self._heard
        return Heard(
            tokens=self.tokens,
            characters=self.characters,
            calls=self.calls,
            arguments=self._arguments,
            ended=self.ended,
            digest=self._digest.value(),
            ticket=self._ticket(prompt_ticket),
        )

    def _ticket(self, prompt_ticket: bytes) -> bytes:
        return self.ticket if self.tokens else prompt_ticket or self.ticket

    def _new_calls(self, parts: Sequence[ToolCallDelta]) -> tuple[ToolCallDelta, ...]:
        """Parts of calls without what was told of them: they come one call after the other, so a count tells."""
        new: list[ToolCallDelta] = []
        for part in parts:
            begins = part.index >= self.calls
            self.calls = max(self.calls, part.index + 1)
            self._begun = max(self._begun, part.index + 1)
            known = max(0, min(len(part.arguments), self._heard.arguments - self._arguments))
            self._arguments += len(part.arguments)
            if begins:
                new.append(part)
            elif known < len(part.arguments):
                new.append(ToolCallDelta(index=part.index, id="", name="", arguments=part.arguments[known:]))
        return tuple(new)


def of_prompt(error: InvalidRequest, number: int) -> InvalidRequest:
    """What is wrong with one of several prompts, by its number."""
    return InvalidRequest(f"prompt[{number}]", error.problem) if error.field in _OF_PROMPTS else error


def _ended(choice: int, tokens: int) -> Finish:
    """The end of a choice that was told already; what it cost is known but for its prompt."""
    usage = Usage(
        prompt_tokens=0, cached_prompt_tokens=0, completion_tokens=tokens, queue_s=0.0, prefill_s=0.0, decode_s=0.0
    )
    return Finish(
        choice=choice,
        reason=FinishReason.LENGTH,
        matched_stop=None,
        matched_token_id=None,
        usage=usage,
        exact=False,
    )


def _not_the_same() -> TicketRefused:
    return TicketRefused(
        "the answer came out otherwise than before the stream broke: ask anew, or bring resume_token_ids"
    )
