"""A generate request as a value: checked, with its defaults filled in. services/codec_public.py makes it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Final

from common.cache_control import CacheControl
from common.sampling import SamplingParams
from common.types import Priority
from services.tools.values import ToolCall, Tools

CHARACTERS_A_TOKEN: Final = 8
"""More than plain text has."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Text:
    """A prompt in words."""

    field: ClassVar[str] = "text"
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenIds:
    """A prompt that is tokenised already."""

    field: ClassVar[str] = "token_ids"
    ids: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Message:
    """One message of a chat."""

    role: str
    content: str
    tool_calls: tuple[ToolCall, ...] = ()  # an assistant's
    tool_call_id: str = ""  # a tool's: which call this is the result of
    name: str = ""  # a tool's


@dataclass(frozen=True, slots=True, kw_only=True)
class Chat:
    """A conversation; the model's template makes the prompt."""

    field: ClassVar[str] = "chat"
    messages: tuple[Message, ...]
    tools: Tools | None = None


Input = Text | TokenIds | Chat


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerateSpec:
    """What one request asks for."""

    request_id: str
    model: str  # empty is the one that is served
    input: Input
    sampling: SamplingParams
    n: int
    max_tokens: int | None  # None: the server's default
    stop_token_ids: tuple[int, ...]
    stop_strings: tuple[str, ...]
    ignore_eos: bool
    skip_special_tokens: bool
    bad_words: tuple[str, ...] = ()  # as they were asked for; `sampling` has their tokens once those are known
    min_tokens: int = 0
    include_stop: bool = False
    structured: str = ""  # the field that says what the answer must be, which is `sampling.grammar`
    priority: Priority = Priority.NORMAL
    max_drafts: int | None = None  # tokens guessed ahead in one step; None: as many as pay
    resumable: bool = False
    cache: CacheControl | None = None  # None: nothing is said of it
    best_of: int = 0  # choices that are made, of which the best n are told; 0: n, and each is told as it is made

    @property
    def num_made(self) -> int:
        """Choices that are made."""
        return self.best_of or self.n


@dataclass(frozen=True, slots=True, kw_only=True)
class EmbedSpec:
    """What one request for embeddings asks for."""

    request_id: str
    model: str  # empty is the one that is served
    inputs: tuple[Text | TokenIds, ...]
    dimensions: int | None  # None: all that the model makes
    priority: Priority = Priority.NORMAL
    cache: CacheControl | None = None  # None: nothing is said of it


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestSize:
    """What one request asks for, as far as it matters whether there is room: not checked, but nowhere impossible.

    Taking it costs next to nothing, so that a request is refused before anything is done for it. A number that may not
    be asked for stands for the least: its caller hears of that, unless there is no room even so.
    """

    request_id: str
    resumable: bool  # it may run here already
    resumed: bool  # its caller has some of its answer
    priority: Priority
    num_sequences: int  # that are computed: choices, or beams
    max_tokens: int
    fewest_tokens: int  # that the prompt can have


@dataclass(frozen=True, slots=True, kw_only=True)
class ResumePoint:
    """Where one choice of a request goes on: what the caller has of it, and the proof that it was given that."""

    choice: int
    ticket: bytes
    token_ids: tuple[int, ...]
