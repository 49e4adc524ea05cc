"""The resumable requests that run here, by tenant and id: for a reader who comes back, or comes twice.

A request whose connection broke goes on without a reader for a while. It holds memory on an executor meanwhile, so
there may only be so many of those; the one that has waited longest makes room.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence

from common.errors import RequestFailed
from services.request_stream import RequestStream
from services.tickets import Scope


class LiveRequest:
    """A request that runs, and the stream of its newest reader."""

    def __init__(self, key: tuple[str, str], scope: Scope, stream: RequestStream) -> None:
        self.key = key
        self.scope = scope
        self.stream = stream
        self.expiring: asyncio.TimerHandle | None = None  # runs while nobody reads

    def holds(self, begun: Mapping[int, Sequence[int]]) -> bool:
        """Whether each of these choices is here, began with these tokens, and was not aborted while nobody read.

        An abort is no end of an answer: the rest is to be made anew. Raises RequestFailed when it was given up.
        """
        if isinstance(self.stream.error, RequestFailed):
            raise self.stream.error
        if self.stream.error is not None:
            return False
        for choice, tokens in begun.items():
            sequence = self.stream.sequences.get(choice)
            if sequence is None:
                return False
            start = sequence.num_prompt
            if sequence.tokens[start : start + len(tokens)].tolist() != list(tokens):
                return False
        return True

    def stop_waiting(self) -> None:
        """Nobody is waited for any more."""
        if self.expiring is not None:
            self.expiring.cancel()
            self.expiring = None


class LiveRequests:
    """All of them. `linger_s`: how long one goes on without a reader; `max_lingering`: how many may."""

    def __init__(self, *, linger_s: float = 5.0, max_lingering: int = 256) -> None:
        self._linger_s = linger_s
        self._max_lingering = max_lingering
        self._all: dict[tuple[str, str], LiveRequest] = {}
        self._lingering: dict[LiveRequest, None] = {}  # longest first

    def __len__(self) -> int:
        return len(self._all)

    def get(self, tenant: str, request_id: str) -> LiveRequest | None:
        """The request of that id, if it runs. It must be taken over or ended before this loop's next turn."""
        return self._all.get((tenant, request_id))

    def add(self, tenant: str, request_id: str, scope: Scope, stream: RequestStream) -> LiveRequest:
        """A request that begins to run, and has a reader."""
        live = LiveRequest((tenant, request_id), scope, stream)
        assert live.key not in self._all, "two requests of one id"
        self._all[live.key] = live
        return live

    def linger(self, live: LiveRequest) -> None:
        """Its reader is gone; another may come."""
        while len(self._lingering) >= max(1, self._max_lingering):
            self.end(next(iter(self._lingering)))
        self._lingering[live] = None
        live.expiring = asyncio.get_running_loop().call_later(self._linger_s, self.end, live)

    def take_over(self, live: LiveRequest, stream: RequestStream) -> None:
        """Another reader has come, with a stream of its own."""
        self._lingering.pop(live, None)
        live.stop_waiting()
        live.stream = stream

    def end(self, live: LiveRequest) -> None:
        """It is over: what still runs of it is aborted. Twice is harmless."""
        self._lingering.pop(live, None)
        live.stop_waiting()
        live.stream.close()
        if self._all.get(live.key) is live:
            del self._all[live.key]
