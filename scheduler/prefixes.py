"""What is kept of prompts when they are over, over all executors: whose it is, what is pinned, and who hears of it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import chain

from common.errors import InvalidRequest
from scheduler.pins import Pin, PinLimits, Pins
from scheduler.prefix_cache import BlockKey, CachedBlock, CacheWatcher, KeyChain
from scheduler.session import Session


class Prefixes:
    """Of the executors in `sessions`; with `caching` off nothing is kept, and nothing can be pinned."""

    def __init__(
        self, sessions: Mapping[int, Session], *, model: str, secret: bytes, limits: PinLimits, caching: bool
    ) -> None:
        self._sessions = sessions
        self._model = model
        self._caching = caching
        self.keys = KeyChain(secret)
        self.pins = Pins(self.keys, limits)
        """Prefixes that are to stay, and those that `end_pins` will find to be over."""
        self.watchers: dict[BlockKey, list[CacheWatcher]] = {}
        """By the root of the blocks that they hear of."""

    def root(self, tenant: str, salt: str = "") -> BlockKey:
        """What the chains of a tenant's blocks begin with."""
        return self.keys.root(self._model, tenant, salt)

    # ---- pins

    def check_pin(self, tokens: Sequence[int], now_ns: int, *, tenant: str = "", salt: str = "") -> None:
        """Raise what `pin` must not be asked for: InvalidRequest, or Overloaded where too much is pinned already."""
        if not self._caching:
            raise InvalidRequest("pin_seconds", "there is no prefix cache here: it is switched off")
        self.end_pins(now_ns)
        sizes = [s.facts.num_blocks * s.block_size for s in self._sessions.values() if not s.leaving]
        self.pins.check(tenant, self.root(tenant, salt), tokens, now_ns, room=min(sizes, default=None))

    def pin(self, tokens: Sequence[int], until_ns: int, *, tenant: str = "", salt: str = "") -> Pin:
        """Keep the blocks of this prefix until then, wherever there are any or will be. Nothing is computed for it."""
        pin = self.pins.add(tenant, self.root(tenant, salt), tokens, until_ns)
        for session in self._sessions.values():
            session.keep(pin)
        return pin

    def unpin(self, tenant: str, id: str | None = None) -> int:
        """End the tenant's pin of that id, or all of them. Returns the tokens that were pinned."""
        pins = self.pins.find(tenant, id)
        for pin in pins:
            self._end_pin(pin)
        return sum(len(pin.tokens) for pin in pins)

    def end_pins(self, now_ns: int) -> None:
        """Let go of those whose time is over. Planning does so before anything else."""
        for pin in self.pins.expired(now_ns):
            self._end_pin(pin)

    def _end_pin(self, pin: Pin) -> None:
        self.pins.remove(pin)
        for session in self._sessions.values():
            session.keep(pin)

    # ---- what is cached

    def watch(self, tenant: str, watcher: CacheWatcher) -> Iterator[list[CachedBlock]]:
        """Let the watcher hear of the tenant's blocks from now on. Returns those that are there, once an executor.

        They are those of this moment, whenever they are looked at, in parts that cost little each (`snapshot`).
        What was asked with a salt is left out: who hears of it could tell what others with that salt ask.
        """
        root = self.root(tenant)
        self.watchers.setdefault(root, []).append(watcher)
        return chain.from_iterable([session.cache.snapshot(root) for session in self._sessions.values()])

    def unwatch(self, tenant: str, watcher: CacheWatcher) -> None:
        """The watcher hears of nothing more."""
        root = self.root(tenant)
        self.watchers[root].remove(watcher)
        if not self.watchers[root]:
            del self.watchers[root]

    def forget(self, tenant: str) -> Iterator[int]:
        """Let nothing be found again that the tenant asked without a salt; what runs goes on.

        Done as it is iterated over, in parts that cost little each: how many blocks are forgotten.
        """
        root = self.root(tenant)
        for session in list(self._sessions.values()):
            yield from session.forget_prefixes(root)
