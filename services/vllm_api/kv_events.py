"""What of a tenant's prefixes is cached, told as it changes: for a router that sends a prompt to where its prefix is.

Every stream, and every stream that fell behind, begins with an event that says "forget what you know" and goes on with
all that is there. So it may begin anywhere: nobody has to remember for a reader who may come back. To the engine a
change costs an entry in a list, and a beginning a list of references to all blocks, at most once a second for a tenant.
All else is done in the reader's own turns, of which each looks at a few hundred blocks, however many a change concerns.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections import deque
from collections.abc import AsyncGenerator, Callable, Iterable, Iterator, Sequence
from contextlib import aclosing, contextmanager
from typing import Final

from common.errors import InvalidRequest, Overloaded, Unavailable
from scheduler.prefix_cache import BlockKey, CachedBlock
from scheduler.scheduler import Scheduler
from services.vllm_api.cache_view import CacheView
from services.vllm_api.stubs import common_pb2 as pb

MAX_CHANGES: Final = 65_536
"""That may wait for one reader: seconds of the busiest executor. With one more, the reader starts over."""

_AT_ONCE: Final = 512  # changes, and blocks that are told, between two turns of others: a millisecond or two
_BEGIN_EVERY_S: Final = 1.0
_MAX_BLOCKS: Final = 2048  # of one message, which then has some 200 KB
_MAX_NUMBER: Final = 1 << 63  # that a batch may have
_COME_BACK_S: Final = 5.0


_OVER: Final = Unavailable("the scheduler is shutting down")


class Changes:
    """A CacheWatcher that keeps what it hears until it is taken, or until that is too much."""

    def __init__(self, most: int) -> None:
        self.missed = False  # it was too much: nothing is kept any more
        self._most = most
        self._there: Iterator[list[CachedBlock]] | None = None  # what was, and was not taken yet
        self._kept = deque[CachedBlock | BlockKey]()
        self._news = asyncio.Event()
        self._is_over = False

    def begin(self, there: Iterator[list[CachedBlock]]) -> None:
        """What was there before anything was heard, in parts, however much that is."""
        self._there = there
        self._news.set()

    def stored(self, block: CachedBlock) -> None:
        """The block is there."""
        self._keep(block)

    def removed(self, key: BlockKey) -> None:
        """It is gone."""
        self._keep(key)

    async def take(self, most: int) -> Sequence[CachedBlock | BlockKey]:
        """Wait until there is something to hear, and take up to so many changes. Raises Unavailable once closed.

        A part of what was there may be empty.
        """
        await self._news.wait()
        if self._is_over:
            raise _OVER
        if self._there is not None:
            part = next(self._there, None)
            if part is not None:
                return part
            self._there = None
        taken = [self._kept.popleft() for _ in range(min(most, len(self._kept)))]
        if not self._kept:
            self._news.clear()
        return taken

    def close(self) -> None:
        """There is nothing more to hear."""
        self._is_over = True
        self._news.set()

    def _keep(self, change: CachedBlock | BlockKey) -> None:
        if len(self._kept) >= self._most:
            self.missed = True
            self._kept.clear()
        if not self.missed:
            self._kept.append(change)
        self._news.set()


class Batches:
    """Events, a batch to each `max_blocks` blocks. Blocks that follow each other in a chain share an event."""

    def __init__(self, root: BlockKey, max_blocks: int = _MAX_BLOCKS) -> None:
        self._root = root
        self._max_blocks = max_blocks
        self._done: list[pb.KvEventBatch] = []
        self._open = pb.KvEventBatch()
        self._num_blocks = 0  # of the batch that is open
        self._stored: pb.KvBlocksStored | None = None  # the event that is open, if it is of this kind
        self._last: BlockKey | None = None  # the block that it ends with
        self._removed: pb.KvBlocksRemoved | None = None

    def forget_all(self) -> None:
        """Nothing that was told before is true any more."""
        self._open.events.add().cleared.SetInParent()

    def store(self, blocks: Iterable[CachedBlock]) -> None:
        """These can be found now."""
        for key, parent, tokens in blocks:
            self._make_room()
            if self._stored is None or self._last != parent:
                self._removed, self._stored = None, self._open.events.add().stored
                if parent != self._root:
                    self._stored.parent_block_hash = block_hash(parent)
            self._stored.blocks.add(block_hash=block_hash(key), token_ids=tokens, block_size=len(tokens))
            self._last = key

    def remove(self, keys: Iterable[BlockKey]) -> None:
        """These cannot any more."""
        for key in keys:
            self._make_room()
            if self._removed is None:
                self._stored, self._removed = None, self._open.events.add().removed
            self._removed.block_hashes.append(block_hash(key))

    def take(self) -> list[pb.KvEventBatch]:
        """Those that there are."""
        self._close()
        done, self._done = self._done, []
        return done

    def _make_room(self) -> None:
        if self._num_blocks >= self._max_blocks:
            self._close()
        self._num_blocks += 1

    def _close(self) -> None:
        if self._open.events:
            self._done.append(self._open)
        self._open, self._num_blocks = pb.KvEventBatch(), 0
        self._stored = self._last = self._removed = None


class KvEvents:
    """The streams of all who listen. A tenant that has a name may have as many of `max_streams` as are still free.

    Each remembers which blocks there are, so that is what a stream costs.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        *,
        max_streams: int = 16,
        max_changes: int = MAX_CHANGES,
        begin_every_s: float = _BEGIN_EVERY_S,
        clock_s: Callable[[], float] = time.time,
    ) -> None:
        """A tenant's streams begin, and start over, at least `begin_every_s` apart."""
        self._scheduler = scheduler
        self._max_streams = max_streams
        self._max_changes = max_changes
        self._clock_s = clock_s
        self._begin_every_s = begin_every_s
        self._streams: list[str] = []  # the tenant of each that is open
        self._heard: set[Changes] = set()
        self._begun_s: dict[str, float] = {}  # when a tenant's last stream began, on the loop's clock
        self._is_over = False

    async def stream(self, tenant: str, *, after: int = 0) -> AsyncGenerator[pb.KvEventBatch, None]:
        """Batches, numbered from behind `after` on, for as long as they are read.

        Raises InvalidRequest for a number that is none, Overloaded for one stream too many, Unavailable once closed.
        """
        if after >= _MAX_NUMBER:
            raise InvalidRequest("start_sequence_number", f"must be below {_MAX_NUMBER}, got {after}")
        free = self._max_streams - len(self._streams)
        if free <= 0 or (tenant and self._streams.count(tenant) >= free):
            raise Overloaded(f"{len(self._streams)} streams of cache events are open already", _COME_BACK_S)
        root = self._scheduler.prefixes.root(tenant)
        number, num_events = after, 0
        self._streams.append(tenant)
        try:
            while True:
                await self._may_begin(tenant)
                async with aclosing(self._from_the_beginning(tenant, root)) as batches:
                    async for batch in batches:
                        number += 1
                        batch.sequence_number, batch.timestamp = number, self._clock_s()
                        for told in batch.events:
                            num_events += 1
                            told.event_id = num_events
                        yield batch
        finally:
            self._streams.remove(tenant)

    def close(self) -> None:
        """End all of them, and have no new ones."""
        self._is_over = True
        for changes in self._heard:
            changes.close()

    async def _may_begin(self, tenant: str) -> None:
        """Return when the tenant's last beginning is long enough ago. Raises Unavailable once closed."""
        loop = asyncio.get_running_loop()
        while not self._is_over:
            wait_s = self._begun_s.get(tenant, -math.inf) + self._begin_every_s - loop.time()
            if wait_s <= 0:
                break
            await asyncio.sleep(wait_s)  # another of the tenant's may have been first
        if self._is_over:
            raise _OVER
        recent_s = loop.time() - self._begin_every_s
        self._begun_s = {each: s for each, s in self._begun_s.items() if s > recent_s}
        self._begun_s[tenant] = loop.time()

    async def _from_the_beginning(self, tenant: str, root: BlockKey) -> AsyncGenerator[pb.KvEventBatch, None]:
        """All that is there and what becomes of it, until that cannot be told without a gap."""
        view, batches = CacheView(root), Batches(root)
        batches.forget_all()
        with self._listening(tenant) as changes:
            while not (changes.missed or view.is_outdated):
                for _ in _look(await changes.take(_AT_ONCE), view, batches):
                    for batch in batches.take():
                        yield batch
                    await asyncio.sleep(0)  # others have their turn

    @contextmanager
    def _listening(self, tenant: str) -> Iterator[Changes]:
        """What is there, and what becomes of it until this ends."""
        changes = Changes(self._max_changes)
        changes.begin(self._scheduler.prefixes.watch(tenant, changes))
        self._heard.add(changes)
        try:
            yield changes
        finally:
            self._heard.remove(changes)
            self._scheduler.prefixes.unwatch(tenant, changes)


def _look(changes: Iterable[CachedBlock | BlockKey], view: CacheView, batches: Batches) -> Iterator[None]:
    """Put into the batches what the changes come to. A pause comes at the end, and after each so many blocks."""
    num_blocks = 0
    for change in changes:
        if isinstance(change, CachedBlock):
            for block in view.stored(change):
                batches.store((block,))
                num_blocks += 1
                if num_blocks % _AT_ONCE == 0:
                    yield
        else:
            for key in view.removed(change):
                batches.remove((key,))
                num_blocks += 1
                if num_blocks % _AT_ONCE == 0:
                    yield
    yield


def block_hash(key: BlockKey) -> int:
    """What a router calls the block: 64 bits of its key, which has more. It identifies, and proves nothing."""
    return int.from_bytes(key[:8], "big", signed=True)
