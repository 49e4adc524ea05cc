"""What a client's user gets: deltas as they come, and the whole answer."""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import Any

from pagewire.tools import ToolCall, ToolCallDelta


class FinishReason(enum.Enum):
    """Why a choice ended."""

    EOS = "eos"  # the model's end-of-sequence token
    STOP_TOKEN = "stop_token"  # noqa: S105 - one of stop_token_ids
    STOP_STRING = "stop_string"  # one of the stop strings
    LENGTH = "length"  # max_tokens, or the model's context, is used up
    ABORTED = "aborted"  # it was cancelled
    ERROR = "error"  # this choice failed
    TOOL_CALLS = "tool_calls"  # the model's end-of-sequence token, behind calls that are complete
    OTHER = "other"  # a later server has a reason that this client does not know


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenLogprob:
    """How likely a token was, by the model's own distribution."""

    token_id: int
    logprob: float | None  # natural logarithm; None for the first token of a prompt, which has nothing before it
    text: bytes  # may be half a character


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenLogprobs:
    """A token, and the likeliest ones in its place, the best first."""

    token: TokenLogprob
    top: tuple[TokenLogprob, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Delta:
    """New tokens of one choice. The text may lag behind them: half a character is never told."""

    choice: int
    index: int  # output index of the first token
    token_ids: tuple[int, ...]
    text: str
    logprobs: tuple[TokenLogprobs, ...] = ()  # one a token, where they were asked for
    tool_calls: tuple[ToolCallDelta, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    """What one choice cost."""

    prompt_tokens: int
    cached_prompt_tokens: int
    completion_tokens: int
    queue_s: float  # from arrival to the first admission, on the server that told the end; so the next two
    prefill_s: float
    decode_s: float
    discarded_tokens: int = 0  # with the first choice of best_of: tokens of the choices that were not told
    drafted_tokens: int = 0  # guessed ahead, right or wrong
    accepted_tokens: int = 0  # of completion_tokens, those that took no step of their own for that


@dataclass(frozen=True, slots=True, kw_only=True)
class Finish:
    """The end of one choice."""

    choice: int
    reason: FinishReason
    matched_stop: str | None  # which stop string
    matched_token_id: int | None  # which stop or EOS token
    usage: Usage
    exact: bool  # bit for bit what an undisturbed run with this seed gives
    score: float | None = None  # of an answer of a beam search; None where an earlier server made it


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """One whole choice."""

    index: int
    text: str
    token_ids: tuple[int, ...]
    finish: Finish
    logprobs: tuple[TokenLogprobs, ...] = ()  # one a token, where they were asked for
    tool_calls: tuple[ToolCall, ...] = ()

    @property
    def message(self) -> dict[str, Any]:
        """The assistant's message, for the chat to go on with."""
        message: dict[str, Any] = {"role": "assistant", "content": self.text}
        return {**message, "tool_calls": self.tool_calls} if self.tool_calls else message


@dataclass(frozen=True, slots=True, kw_only=True)
class PinnedPrefix:
    """What of the prompt stays in the prefix cache of the scheduler that answered."""

    pin_id: str  # for `unpin`
    tokens: int
    expires_s: int  # Unix time


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """A whole answer. What is not a tuple speaks of the first choice."""

    request_id: str
    model: str
    seed: int
    choices: tuple[Choice, ...]
    prompt_logprobs: tuple[TokenLogprobs, ...] = ()  # one a token of the prompt, where they were asked for
    pinned: PinnedPrefix | None = None  # where that was asked for

    @property
    def text(self) -> str:
        """The words."""
        return self.choices[0].text

    @property
    def tool_calls(self) -> tuple[ToolCall, ...]:
        """What it calls."""
        return self.choices[0].tool_calls

    @property
    def message(self) -> dict[str, Any]:
        """The assistant's message, for the chat to go on with."""
        return self.choices[0].message

    @property
    def token_ids(self) -> tuple[int, ...]:
        """The tokens."""
        return self.choices[0].token_ids

    @property
    def logprobs(self) -> tuple[TokenLogprobs, ...]:
        """How likely the tokens were, where that was asked for."""
        return self.choices[0].logprobs

    @property
    def finish(self) -> Finish:
        """How it ended."""
        return self.choices[0].finish

    @property
    def usage(self) -> Usage:
        """What it cost."""
        return self.choices[0].finish.usage
