"""One answer as a reader gets it: tokens to deltas with text and a ticket, ends to finishes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from common.errors import TicketStale
from common.step import Logprobs
from common.types import FinishReason
from scheduler.sequence import Sequence as CoreSequence
from services.choice_text import ChoiceText, Piece
from services.live_requests import LiveRequest, LiveRequests
from services.request import GenerateSpec
from services.request_stream import ChoiceEvent, RequestStream
from services.tickets import TicketWriter
from services.tools.calling import CallReader
from services.tools.values import CallPiece

_PART: Final = 256  # tokens of a prompt in one message: a millisecond or two of work


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    """What one choice cost. Times in nanoseconds; those of a choice that ended elsewhere are 0."""

    prompt_tokens: int
    cached_prompt_tokens: int = 0
    completion_tokens: int
    queue_ns: int = 0
    prefill_ns: int = 0
    decode_ns: int = 0
    discarded_tokens: int = 0  # of choices that are not told
    drafted_tokens: int = 0
    accepted_tokens: int = 0


@dataclass(slots=True, kw_only=True)  # not frozen: one is made for each message, and freezing took most of that
class Delta:
    """New tokens and text of one choice; the text may lag behind the tokens."""

    choice: int
    index: int
    token_ids: list[int]
    text: str
    ticket: bytes = b""
    logprobs: Sequence[Logprobs | None] = ()  # one a token, where the request asks for them
    calls: Sequence[CallPiece] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptLogprobs:
    """How likely a part of the prompt was. Nothing is before the first token, so that has none."""

    index: int  # of the first token, in the prompt
    token_ids: list[int]
    logprobs: Sequence[Logprobs | None]  # one a token


@dataclass(frozen=True, slots=True, kw_only=True)
class PinnedPrefix:
    """What of the prompt stays in the prefix cache."""

    pin_id: str
    tokens: int
    expires_s: int  # Unix time


@dataclass(frozen=True, slots=True, kw_only=True)
class Finish:
    """The end of one choice."""

    choice: int
    reason: FinishReason
    matched_stop: str | None
    matched_token_id: int | None
    usage: Usage
    exact: bool = False
    score: float | None = None  # of an answer that a beam search found


class Choice:
    """One choice: its text and tickets so far, all of it a function of its tokens."""

    def __init__(
        self, number: int, num_prompt: int, text: ChoiceText, writer: TicketWriter, calls: CallReader | None = None
    ) -> None:
        """`calls` reads the text of a choice that may call tools."""
        self._number = number
        self._num_prompt = num_prompt
        self._text = text
        self._writer = writer
        self._calls = calls
        self._finish: Finish | None = None
        self._complete: Piece | None = None  # the reader has all tokens, and what else its end says is not known yet
        self.num_tokens = 0

    @property
    def has_ended(self) -> bool:
        """What the reader has of it is all there is."""
        return self._finish is not None

    @property
    def finish(self) -> Finish:
        """Its end, which is there."""
        assert self._finish is not None, f"choice {self._number} has not ended"
        return self._finish

    def begin(self, tokens: list[int], reason: FinishReason, *, exact: bool, is_scored: bool = False) -> bool:
        """Go through what the reader has; `reason` is why that is all, if it is. Returns whether it has ended.

        One that `is_scored`, by a beam search, ends when that search has found it again: its end tells the score.
        """
        piece, _ = self._push(tokens, reason)
        if piece.reason and is_scored:
            self._complete = piece
        elif piece.reason:
            usage = Usage(prompt_tokens=self._num_prompt, completion_tokens=self.num_tokens)
            self._finish = self._end(piece, usage, exact=exact)
        return self.has_ended

    def take(self, event: ChoiceEvent, sequence: CoreSequence, expiry_s: int) -> tuple[Delta | None, Finish | None]:
        """What the reader is told of these tokens. Raises TicketStale where its answer came out otherwise this time."""
        if self._complete is not None:
            return None, self._end_complete(self._complete, event, sequence)
        index = self.num_tokens
        piece, calls = self._push(event.tokens, event.reason)
        delta = None
        if piece.tokens:
            ticket = self._writer.ticket(expiry_s, sequence.determinism or "")
            delta = Delta(
                choice=self._number,
                index=index,
                token_ids=piece.tokens,
                text=piece.text,
                ticket=ticket,
                logprobs=event.logprobs[: len(piece.tokens)],
                calls=calls,
            )
        if piece.reason:
            exact = bool(sequence.determinism)
            self._finish = self._end(piece, self._usage(sequence), exact=exact, score=sequence.score)
        return delta, self._finish

    def _end_complete(self, piece: Piece, event: ChoiceEvent, sequence: CoreSequence) -> Finish:
        if event.tokens or event.reason is FinishReason.ERROR:
            raise TicketStale("the answer did not come out as before, so that it cannot go on; ask anew")
        self._finish = self._end(
            piece, self._usage(sequence), exact=bool(sequence.determinism), score=sequence.score
        )  # fmt: skip
        return self._finish

    def _push(self, tokens: list[int], reason: FinishReason) -> tuple[Piece, Sequence[CallPiece]]:
        piece = self._text.push(tokens, reason)
        assert piece.tokens or not piece.text, "text without a token: it would have no ticket"
        self._writer.add(piece.tokens)
        self.num_tokens += len(piece.tokens)
        return (piece, ()) if self._calls is None else self._calls.read(piece)

    def _end(self, piece: Piece, usage: Usage, *, exact: bool, score: float | None = None) -> Finish:
        return Finish(
            choice=self._number,
            reason=piece.reason,
            matched_stop=piece.matched_stop,
            matched_token_id=piece.matched_token_id,
            usage=usage,
            exact=exact,
            score=score,
        )

    def _usage(self, s: CoreSequence) -> Usage:
        return Usage(
            prompt_tokens=s.num_prompt,
            cached_prompt_tokens=s.num_cached_prompt,
            completion_tokens=self.num_tokens,
            queue_ns=max(0, s.admitted_ns - s.arrived_ns),
            prefill_ns=max(0, s.first_token_ns - s.admitted_ns),
            decode_ns=max(0, s.last_token_ns - s.first_token_ns),
            drafted_tokens=s.acceptance.drafted,
            accepted_tokens=s.acceptance.accepted,
        )


class Answer:
    """One request that is being answered. Whoever started it closes it, also where no event was ever asked for."""

    def __init__(
        self,
        spec: GenerateSpec,
        choices: Mapping[int, Choice],
        stream: RequestStream | None,
        kept: LiveRequest | None,
        all_kept: LiveRequests,
        *,
        num_prompt_tokens: int,
        ticket: bytes,
        resumed: bool,
        expiry_s: Callable[[], int],
        pinned: PinnedPrefix | None = None,
    ) -> None:
        """`stream` is None where every choice has ended already; `kept` is there for a resumable request."""
        self.spec = spec
        self.num_prompt_tokens = num_prompt_tokens
        self.ticket = ticket  # of a choice that has no token yet
        self.resumed = resumed
        self.pinned = pinned
        self._choices = choices
        self._stream = stream
        self._kept = kept
        self._all_kept = all_kept
        self._expiry_s = expiry_s
        self._ended: list[PromptLogprobs | Delta | Finish] = [
            c.finish for c in choices.values() if c.has_ended
        ]  # not told yet

    @property
    def is_open(self) -> bool:
        """Some choice has not had its Finish."""
        return bool(self._ended) or (self._stream is not None and self._stream.is_open)

    @property
    def is_resumable(self) -> bool:
        """It may go on without a reader for a while."""
        return self._kept is not None

    async def next(self) -> list[PromptLogprobs | Delta | Finish]:
        """Wait for what comes next of any choice: deltas, and a Finish for each choice that ended.

        Where the request asks how likely its prompt was, that comes before the first delta of choice 0.
        """
        if self._ended:
            out, self._ended = self._ended, []
            return out
        assert self._stream is not None, "every choice has ended"
        out = []
        expiry_s = self._expiry_s()
        for event in await self._stream.take():
            choice, sequence = self._choices[event.choice], self._stream.sequences[event.choice]
            if sequence.scores_prompt and event.tokens and not choice.num_tokens:
                out += _prompt_logprobs(sequence)
            delta, finish = choice.take(event, sequence, expiry_s)
            if delta is not None:
                out.append(delta)
            if finish is not None:
                if finish.reason is FinishReason.STOP_STRING:
                    self._stream.end_choice(event.choice, FinishReason.STOP_STRING)
                out.append(finish)
        return out

    def let_go(self) -> None:
        """The caller is gone, and may come back: a resumable request goes on for a while, any other one ends."""
        if self._kept is not None and self._kept.stream is self._stream and self.is_open:
            self._all_kept.linger(self._kept)
            self._kept = self._stream = None
        self.close()

    def abort(self) -> None:
        """Somebody else than its reader ends it: the reader hears of each choice that it was aborted."""
        if self._stream is not None:
            self._stream.abort()

    def close(self) -> None:
        """The caller is served, or has left for good: what still runs is aborted."""
        if self._stream is not None:
            self._stream.close()
            if self._kept is not None and self._kept.stream is self._stream:
                self._all_kept.end(self._kept)


def _prompt_logprobs(sequence: CoreSequence) -> Iterator[PromptLogprobs]:
    """The scores of the prompt, which are there, in parts."""
    tokens = sequence.tokens[: sequence.num_prompt].tolist()
    logprobs = [None, *sequence.prompt_logprobs]
    for index in range(0, len(tokens), _PART):
        part = slice(index, index + _PART)
        yield PromptLogprobs(index=index, token_ids=tokens[part], logprobs=logprobs[part])
