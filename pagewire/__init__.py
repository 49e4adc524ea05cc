"""Pagewire, installed: the `pagewire` command, and the client for Python.

>>> from pagewire import Client
>>> with Client("127.0.0.1:50051") as client:
...     for delta in client.stream("The sea is", max_tokens=8):
...         print(delta.text, end="")

The server itself is in the five packages that the launcher finds.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from pagewire.borrowed import borrow

if TYPE_CHECKING:
    from common.errors import (
        DeadlineExceeded,
        InvalidRequest,
        Overloaded,
        PagewireError,
        TicketRefused,
        TicketStale,
        Unauthenticated,
        Unavailable,
        UnknownModel,
    )
    from pagewire.aio import AsyncClient, AsyncStream
    from pagewire.answers import (
        Answer,
        Choice,
        Delta,
        Finish,
        FinishReason,
        PinnedPrefix,
        TokenLogprob,
        TokenLogprobs,
        Usage,
    )
    from pagewire.client import Client, Stream
    from pagewire.embeddings import Embedding
    from pagewire.tokens import Model
    from pagewire.tools import ToolCall, ToolCallDelta

_HOMES = {
    "AsyncClient": "aio",
    "AsyncStream": "aio",
    "Answer": "answers",
    "Choice": "answers",
    "Delta": "answers",
    "Embedding": "embeddings",
    "Finish": "answers",
    "FinishReason": "answers",
    "Model": "tokens",
    "PinnedPrefix": "answers",
    "TokenLogprob": "answers",
    "TokenLogprobs": "answers",
    "Usage": "answers",
    "Client": "client",
    "Stream": "client",
    "ToolCall": "tools",
    "ToolCallDelta": "tools",
}
_ERRORS = frozenset({
    "DeadlineExceeded",
    "InvalidRequest",
    "Overloaded",
    "PagewireError",
    "TicketRefused",
    "TicketStale",
    "Unauthenticated",
    "Unavailable",
    "UnknownModel",
})  # fmt: skip

__all__ = [
    "Answer",
    "AsyncClient",
    "AsyncStream",
    "Choice",
    "Client",
    "DeadlineExceeded",
    "Delta",
    "Embedding",
    "Finish",
    "FinishReason",
    "InvalidRequest",
    "Model",
    "Overloaded",
    "PagewireError",
    "PinnedPrefix",
    "Stream",
    "TicketRefused",
    "TicketStale",
    "TokenLogprob",
    "TokenLogprobs",
    "ToolCall",
    "ToolCallDelta",
    "Unauthenticated",
    "Unavailable",
    "UnknownModel",
    "Usage",
]


def __getattr__(name: str) -> Any:
    """Import what is asked for: the command's launcher, which is here too, needs none of it, and no gRPC."""
    if name in _ERRORS:
        return getattr(borrow("common.errors"), name)
    if name in _HOMES:
        return getattr(import_module(f"pagewire.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'pagewire' has no attribute {name!r}")
