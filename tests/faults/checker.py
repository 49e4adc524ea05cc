"""What one stream may show its reader, and what it must have shown at its end.

The rules have the numbers of the design: I2 indices without gap or repeat, I3 no token differs from the undisturbed
run's, I4 one end for each choice and nothing after it, I12 usage counts what was delivered, once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Final

from common.sampling import SamplingParams, StopConditions
from common.types import FinishReason
from executor.fake_runner import NextToken, fake_logprobs
from pagewire.answers import Delta, Finish, TokenLogprob
from protos import inference_pb2 as pb
from services.text import IncrementalDecoder, Tokenizer
from tests.scheduler.witness import alone

_MARKS: Final = (FinishReason.EOS, FinishReason.STOP_TOKEN)  # their token ends the text and is not part of it


class Violation(AssertionError):
    """An invariant does not hold. Begins with its number."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Expected:
    """What one choice generates when nothing is disturbed."""

    tokens: Sequence[int]
    reason: FinishReason
    text: str | None = None  # None: the reader does not look
    matched_stop: str | None = None
    logprobs: int | None = None  # so many of the likeliest are told with each token; None: nothing is


def undisturbed(
    prompt: Sequence[int],
    sampling: SamplingParams,
    choice: int,
    stop: StopConditions,
    *,
    model: NextToken,
    tokenizer: Tokenizer,
    vocab_size: int,
    eos: frozenset[int],
) -> Expected:
    """The fake model alone, its text decoded token by token, its stop strings looked for in the whole text."""
    run = alone(prompt, sampling, choice, stop, model=model, vocab_size=vocab_size, eos=eos)
    decoder = IncrementalDecoder(tokenizer, list(prompt), skip_special_tokens=True)
    words = run.tokens[:-1] if run.reason in _MARKS else run.tokens
    text = ""
    for n, token in enumerate(words, start=1):
        text += decoder.push([token])
        if (found := _first(text, stop.stop_strings)) is not None:
            at, matched = found
            return Expected(
                tokens=run.tokens[:n], reason=FinishReason.STOP_STRING, text=text[:at], matched_stop=matched
            )
    if run.reason is FinishReason.ERROR:  # not complete, and neither is its last character
        return Expected(tokens=run.tokens, reason=run.reason)
    text += decoder.finish()
    if (found := _first(text, stop.stop_strings)) is not None:
        at, matched = found
        return Expected(tokens=run.tokens, reason=FinishReason.STOP_STRING, text=text[:at], matched_stop=matched)
    return Expected(tokens=run.tokens, reason=run.reason, text=text)


def _first(text: str, stops: Sequence[str]) -> tuple[int, str] | None:
    """Where the first stop string begins, and which it is: complete first, then longest."""
    found = [(text.index(stop) + len(stop), -len(stop), stop) for stop in stops if stop in text]
    if not found:
        return None
    end, _, stop = min(found)
    return end - len(stop), stop


_Logprobs = tuple[tuple[int, float | None], list[tuple[int, float | None]]]


def _told(delta: pb.Delta | Delta) -> list[_Logprobs]:
    """How likely its tokens were, and the likeliest."""
    return [(_pair(each.token), [(top.token_id, top.logprob) for top in each.top]) for each in delta.logprobs]


def _pair(token: pb.TokenLogprob | TokenLogprob) -> tuple[int, float | None]:
    if isinstance(token, pb.TokenLogprob) and not token.HasField("logprob"):
        return token.token_id, None
    return token.token_id, token.logprob


def _to_tell(tokens: Sequence[int], num_top: int | None) -> list[_Logprobs]:
    """What the fake model says of them."""
    if num_top is None:
        return []
    said = [(token, fake_logprobs(token, num_top)) for token in tokens]
    return [((token, each.token), list(zip(each.top_ids, each.top, strict=True))) for token, each in said]


@dataclass(slots=True)
class _Choice:
    tokens: list[int] = field(default_factory=list[int])
    text: list[str] = field(default_factory=list[str])
    ended: bool = False


class StreamChecker:
    """One stream, message by message. Raises Violation at the first that is wrong."""

    def __init__(
        self,
        name: str,
        expected: Sequence[Expected],
        *,
        num_prompt: int,
        may_fail: Callable[[], bool] = lambda: False,
        must_be_exact: bool = False,
        may_resume: bool = False,
    ) -> None:
        """`may_fail`: whether a choice may end with an error now, although nothing that it computes is one.

        `must_be_exact`: all executors are of one class, so every end that is none of an error says so. `may_resume`:
        log-probabilities may have been told to the reader before this one, by a server that is gone.
        """
        self.name = name
        self._may_fail = may_fail
        self._must_be_exact = must_be_exact
        self._may_resume = may_resume
        self.num_tokens = 0
        self._expected = expected
        self._num_prompt = num_prompt
        self._choices = [_Choice() for _ in expected]
        self._begun = False

    @property
    def is_complete(self) -> bool:
        """Every choice has ended."""
        return all(choice.ended for choice in self._choices)

    def hear(self, message: pb.GenerateStreamResponse) -> None:
        """The next message."""
        kind = message.WhichOneof("event")
        if kind == "prompt":
            self._rule("I4", not self._begun, "a second beginning")
            self._rule("I12", message.prompt.prompt_tokens == self._num_prompt, "a prompt of another length")
            self._begun = True
            return
        self._rule("I4", self._begun, f"{kind} before the beginning")
        if kind == "delta":
            self._delta(message.delta)
        elif kind == "finish":
            self._finish(message.finish)

    def goes_on(self) -> None:
        """Another call takes the stream up where it is: its messages begin like those of any call."""
        self._begun = False

    def tell(self, piece: Delta | Finish) -> None:
        """The next delta or end, as the client for Python tells it; it keeps the beginning to itself."""
        self._begun = True
        if isinstance(piece, Delta):
            self._delta(piece)
        else:
            reason = pb.FinishReason.Value(f"FINISH_REASON_{piece.reason.name}")
            usage = pb.Usage(prompt_tokens=piece.usage.prompt_tokens, completion_tokens=piece.usage.completion_tokens)
            self._finish(
                pb.Finish(
                    choice=piece.choice, reason=reason, matched_stop=piece.matched_stop, usage=usage, exact=piece.exact
                )
            )

    def end(self) -> None:
        """The stream ended well."""
        self._rule("I4", self.is_complete, "the stream ended without an end of every choice")

    def _delta(self, delta: pb.Delta | Delta) -> None:
        choice, expected = self._choices[delta.choice], self._expected[delta.choice]
        self._rule("I4", not choice.ended, f"choice {delta.choice} goes on after its end")
        start, stop = len(choice.tokens), len(choice.tokens) + len(delta.token_ids)
        if delta.token_ids or delta.text:
            self._rule("I2", delta.index == start, f"choice {delta.choice}: index {delta.index}, not {start}")
        right = list(delta.token_ids) == list(expected.tokens[start:stop])
        self._rule("I3", right, f"choice {delta.choice}: other tokens from index {start} on")
        told, to_tell = _told(delta), _to_tell(delta.token_ids, expected.logprobs)
        right = len(told) == len(to_tell) and all(map(self._may_tell, told, to_tell))
        self._rule("I3", right, f"choice {delta.choice}: other log-probabilities from index {start} on")
        choice.tokens.extend(delta.token_ids)
        choice.text.append(delta.text)
        self.num_tokens += len(delta.token_ids)

    def _may_tell(self, told: _Logprobs, to_tell: _Logprobs) -> bool:
        token = to_tell[0][0]
        return told == to_tell or (self._may_resume and told == ((token, None), []))

    def _finish(self, finish: pb.Finish) -> None:
        choice, expected = self._choices[finish.choice], self._expected[finish.choice]
        self._rule("I4", not choice.ended, f"choice {finish.choice} ends twice")
        choice.ended = True
        got, wanted = FinishReason(finish.reason), expected.reason
        count, total = len(choice.tokens), len(expected.tokens)
        failed = got is FinishReason.ERROR and self._may_fail()
        self._rule("I3", got is wanted or failed, f"choice {finish.choice} ended by {got.name}, not {wanted.name}")
        self._rule("I2", count == total or failed, f"choice {finish.choice}: {count} tokens of {total}")
        if expected.text is not None and got is not FinishReason.ERROR:
            self._rule("I3", "".join(choice.text) == expected.text, f"choice {finish.choice}: another text")
            stop = finish.matched_stop if finish.HasField("matched_stop") else None
            self._rule("I3", stop == expected.matched_stop, f"choice {finish.choice}: another stop string")
            exact = finish.exact or not self._must_be_exact
            self._rule("P2", exact, f"choice {finish.choice} is not exact")
        usage = finish.usage
        self._rule("I12", usage.completion_tokens == count, f"usage says {usage.completion_tokens} of {count} tokens")
        self._rule("I12", usage.prompt_tokens == self._num_prompt, "usage has another prompt")

    def _rule(self, number: str, holds: bool, problem: str) -> None:
        if not holds:
            raise Violation(f"{number}: {self.name}: {problem}")
