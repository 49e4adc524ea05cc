"""One request over any number of calls: what to send next, and what of that which comes is new. No socket inside."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Final

from pagewire.answers import (
    Answer,
    Choice,
    Delta,
    Finish,
    FinishReason,
    PinnedPrefix,
    TokenLogprobs,
    Usage,
)
from pagewire.borrowed import borrow
from pagewire.scores import Scores, of_message
from pagewire.tools import ToolCall, ToolCallDelta, add_to, fits

if TYPE_CHECKING:
    from common import errors, failpoints
    from protos import inference_pb2 as pb
else:
    errors = borrow("common.errors")
    failpoints = borrow("common.failpoints")
    pb = borrow("protos.inference_pb2")


MAX_CHOICES: Final = 1 << 16
"""More than any server makes; the state of each is kept from the beginning."""

_REASONS = {
    pb.FinishReason.Value(f"FINISH_REASON_{reason.name}"): reason
    for reason in FinishReason
    if reason is not FinishReason.OTHER
}


class OutOfStep(Exception):
    """A message that cannot come next. The call is of no use any more; another one may be."""


class Continuation:
    """What was heard of a request so far, which is all that is needed to go on with it."""

    def __init__(self, request: pb.GenerateStreamRequest) -> None:
        """Take a copy, and fix in it what the server would draw: it is the same request, however often it is sent.

        Raises InvalidRequest for a number of choices that no server makes.
        """
        self._request = pb.GenerateStreamRequest()
        self._request.CopyFrom(request)
        self._request.resumable = True
        if not self._request.request_id:
            self._request.request_id = secrets.token_hex(16)
        if not self._request.sampling.HasField("seed"):
            self._request.sampling.seed = secrets.randbits(63)
        n = self._request.sampling.n if self._request.sampling.HasField("n") else 1
        if not 1 <= n <= MAX_CHOICES:
            raise errors.InvalidRequest("n", f"must be in [1, {MAX_CHOICES}], got {n}")
        self._tokens: list[list[int]] = [[] for _ in range(n)]
        self._texts: list[list[str]] = [[] for _ in range(n)]
        self._tickets = [b""] * n
        self._logprobs = [Scores() for _ in range(n)]
        self.keeps_logprobs = True  # those of the answer, until its end; who has told them needs them no more
        self._prompt_logprobs = Scores()
        self.on_kept: Callable[[int], None] = lambda num_bytes: None
        """Hears how many bytes more, or fewer, are kept for log-probabilities. What it raises ends the answer."""

        self._tool_calls: list[list[ToolCall]] = [[] for _ in range(n)]
        self.finishes: dict[int, Finish] = {}
        self.model = ""
        self.max_tokens = request.stopping.max_tokens  # 0 where the server chooses it and has said nothing yet
        self.prompt_ticket = b""  # of a choice that has no token yet; empty before it has come
        self.pinned: PinnedPrefix | None = None
        self.determinism = ""  # the class of the executors that were there when a call last began
        self.num_prompt = 0

    @property
    def request(self) -> pb.GenerateStreamRequest:
        """As it is sent."""
        return self._request

    @property
    def request_id(self) -> str:
        """What the server knows it by."""
        return self._request.request_id

    @property
    def seed(self) -> int:
        """The one that is used."""
        return self._request.sampling.seed

    @property
    def prompt_logprobs(self) -> Scores:
        """Those of the prompt, where they were asked for: whole with the first delta of choice 0."""
        return self._prompt_logprobs

    def forget_prompt_logprobs(self) -> None:
        """They were told."""
        self.on_kept(-self._prompt_logprobs.clear())

    def ticket(self, choice: int) -> bytes:
        """The newest one of a choice; empty before its first."""
        return self._tickets[choice]

    def token_ids(self, choice: int) -> Sequence[int]:
        """The tokens of a choice so far."""
        return self._tokens[choice]

    @property
    def num_heard(self) -> int:
        """Tokens of all choices so far."""
        return sum(map(len, self._tokens))

    def heard(self, choice: int) -> tuple[str, Scores, Sequence[ToolCall]]:
        """Text, log-probabilities and calls of a choice so far."""
        return "".join(self._texts[choice]), self._logprobs[choice], self._tool_calls[choice]

    def go_on(
        self,
        points: Mapping[int, tuple[bytes, Sequence[int]]],
        ended: Iterable[Finish],
        calls: Mapping[int, int] | None = None,
    ) -> None:
        """Begin behind what another client heard: of each choice its newest ticket and its tokens, or its end.

        `calls`: how many calls of tools have begun in it.
        """
        for choice, (ticket, tokens) in points.items():
            self._choice(choice)[:] = tokens
            self._tickets[choice] = ticket
            self._tool_calls[choice] = [ToolCall(id="", name="", arguments="")] * (calls or {}).get(choice, 0)
        self.finishes.update({finish.choice: finish for finish in ended})

    @property
    def is_done(self) -> bool:
        """Every choice has ended."""
        return len(self.finishes) == len(self._tokens)

    def next_call(self) -> pb.GenerateStreamRequest | pb.ResumeRequest:
        """What is to be sent now: the request, or once anything of its answer is here, where it goes on."""
        if not self.finishes and not any(self._tokens):
            return self._request
        failpoints.hit("before_resume")
        return pb.ResumeRequest(
            request=self._request,
            choices=[
                pb.ResumePoint(choice=n, ticket=self._tickets[n], token_ids=tokens)
                for n, tokens in enumerate(self._tokens)
                if n not in self.finishes
            ],
        )

    def hear(self, message: pb.GenerateStreamResponse) -> Delta | Finish | None:
        """Take a message; return what is new in it. Raises OutOfStep for one that leaves a gap."""
        match message.WhichOneof("event"):
            case "prompt":
                self._begin(message.prompt)
            case "delta":
                new = self._add(message.delta)
                failpoints.hit("after_recv_before_deliver")
                return new
            case "finish":
                return self._end(message.finish)
            case "prompt_logprobs":
                part = message.prompt_logprobs
                self.on_kept(self._prompt_logprobs.put(part.index, part.logprobs))  # a part may come again
            case _:  # of a later version of the API
                pass
        return None

    def answer(self) -> Answer:
        """The whole answer, which is there."""
        assert self.is_done, "the answer is not complete"
        return Answer(
            request_id=self._request.request_id,
            model=self.model,
            seed=self._request.sampling.seed,
            choices=tuple(
                Choice(
                    index=n,
                    text="".join(self._texts[n]),
                    token_ids=tuple(tokens),
                    finish=self.finishes[n],
                    logprobs=tuple(self._logprobs[n]),
                    tool_calls=tuple(self._tool_calls[n]),
                )
                for n, tokens in enumerate(self._tokens)
            ),
            prompt_logprobs=tuple(self._prompt_logprobs),
            pinned=self.pinned,
        )

    def _begin(self, prompt: pb.PromptInfo) -> None:
        self.model = prompt.model
        if prompt.HasField("pinned"):
            told = prompt.pinned
            self.pinned = PinnedPrefix(pin_id=told.pin_id, tokens=told.tokens, expires_s=told.expires_s)
        self.determinism = prompt.determinism
        self.num_prompt = prompt.prompt_tokens
        if not self._request.stopping.HasField("max_tokens") and prompt.max_tokens:
            self.max_tokens = self._request.stopping.max_tokens = prompt.max_tokens
        if prompt.ticket:
            self.prompt_ticket = prompt.ticket
            for n, tokens in enumerate(self._tokens):
                if not tokens:
                    self._tickets[n] = prompt.ticket
        if prompt.resumed:
            failpoints.hit("mid_resume")

    def _add(self, delta: pb.Delta) -> Delta | None:
        # each look into a message makes an object anew, and this is done for every token: look once
        choice, index, text, logprobs = delta.choice, delta.index, delta.text, delta.logprobs
        token_ids = tuple(delta.token_ids)
        tokens = self._choice(choice)
        if token_ids and index + len(token_ids) <= len(tokens):
            return None  # told already
        if index != len(tokens) or choice in self.finishes:
            raise OutOfStep(f"choice {choice} has {len(tokens)} tokens, and more came from {index} on")
        calls: tuple[ToolCallDelta, ...] = ()
        if parts := delta.tool_calls:
            calls = tuple(
                ToolCallDelta(index=each.index, id=each.id, name=each.name, arguments=each.arguments) for each in parts
            )
            if not fits(self._tool_calls[choice], calls):
                raise OutOfStep(f"choice {choice} has a part of a call that never began")
        tokens += token_ids
        self._texts[choice].append(text)
        self._tickets[choice] = delta.ticket
        told: tuple[TokenLogprobs, ...] = ()
        if logprobs:
            if self.keeps_logprobs:
                kept = self._logprobs[choice]
                self.on_kept(kept.put(len(kept), logprobs))
            told = tuple(map(of_message, logprobs))
        if calls:
            add_to(self._tool_calls[choice], calls)
        return Delta(choice=choice, index=index, token_ids=token_ids, text=text, logprobs=told, tool_calls=calls)

    def _end(self, finish: pb.Finish) -> Finish | None:
        self._choice(finish.choice)
        if finish.choice in self.finishes:
            return None
        usage = finish.usage
        ended = Finish(
            choice=finish.choice,
            reason=_REASONS.get(finish.reason, FinishReason.OTHER),
            matched_stop=finish.matched_stop if finish.HasField("matched_stop") else None,
            matched_token_id=finish.matched_token_id if finish.HasField("matched_token_id") else None,
            usage=Usage(
                prompt_tokens=usage.prompt_tokens,
                cached_prompt_tokens=usage.cached_prompt_tokens,
                completion_tokens=usage.completion_tokens,
                queue_s=usage.queue_ns / 1e9,
                prefill_s=usage.prefill_ns / 1e9,
                decode_s=usage.decode_ns / 1e9,
                discarded_tokens=usage.discarded_tokens,
                drafted_tokens=usage.drafted_tokens,
                accepted_tokens=usage.accepted_tokens,
            ),
            exact=finish.exact,
            score=finish.score if finish.HasField("score") else None,
        )
        self.finishes[finish.choice] = ended
        return ended

    def _choice(self, number: int) -> list[int]:
        if number >= len(self._tokens):
            raise OutOfStep(f"choice {number} was not asked for")
        return self._tokens[number]
