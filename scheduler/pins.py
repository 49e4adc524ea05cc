"""Pinned prefixes: promises that a prompt's blocks are the last to be reused, for a while.

A pin is the scheduler's, and holds no block. Executors come and go; wherever blocks of a pinned prefix are in the
cache, or are computed again, they are *kept*: taken for something else only when no other block is free
(`BlockPool.keep`). So a pin never keeps a sequence waiting, has none preempted and fails none: before any of that the
blocks of pins are taken, the oldest pin's first, and the end of a prefix before its beginning. What was lost that way
is computed again by the next request that has the prefix, and is kept again.

What pins do cost others is cache: blocks that are not pinned are reused sooner. So the tokens that one tenant may have
pinned are limited, and all together to a share of the smallest executor.
"""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Final

from common.errors import InvalidRequest, Overloaded
from scheduler.block_pool import Rank
from scheduler.prefix_cache import BlockKey, KeyChain

_RETRY_NS: Final = 10_000_000_000
"""When a tenant without pins may ask again: when those of others end is nothing that it may learn."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PinLimits:
    """How much may be pinned. Tokens of pins that share a beginning count in each."""

    max_tokens_per_tenant: int = 16_384
    max_pins_per_tenant: int = 64  # each costs the scheduler some memory, however short it is
    max_share: float = 0.25  # of the tokens that the smallest executor holds: all tenants' pins together


@dataclass(slots=True, eq=False, kw_only=True)
class Pin:
    """One promise: the first tokens of a prompt, under their root, which stands for model, tenant and salt."""

    id: str
    tenant: str
    root: BlockKey
    tokens: array[int]
    order: int  # when it was last asked for, among pins
    until_ns: int
    keys: dict[int, list[BlockKey]] = field(default_factory=dict[int, list[BlockKey]])  # of whole blocks, by block size


class Pins:
    """All that were made and are not over. Time is an argument."""

    def __init__(self, chain: KeyChain, limits: PinLimits) -> None:
        self._chain = chain
        self._limits = limits
        self._pins: dict[str, Pin] = {}
        self._tokens_of: Counter[str] = Counter()  # by tenant; none is left at 0
        self._num_of: Counter[str] = Counter()
        self._holders: dict[BlockKey, dict[Pin, int]] = {}  # of each pinned block: its pins, and its place in them
        self._block_sizes: set[int] = set()
        self._next_order = 0  # by now, how many were made or renewed
        self._over_ns = 0  # no pin is over before

    def __len__(self) -> int:
        return len(self._pins)

    def __iter__(self) -> Iterator[Pin]:
        """All pins, in no order that means anything."""
        return iter(self._pins.values())

    @property
    def num_tokens(self) -> int:
        """Of all pins, each counted whole."""
        return self._tokens_of.total()

    @property
    def tokens_by_tenant(self) -> dict[str, int]:
        """Tokens that each tenant has pinned."""
        return dict(self._tokens_of)

    @property
    def num_made(self) -> int:
        """How many were ever made or renewed."""
        return self._next_order

    def rank(self, key: BlockKey) -> Rank | None:
        """When the block with this key is reused, among those that are kept; None when it is not pinned."""
        holders = self._holders.get(key)
        if not holders:
            return None
        pin = max(holders, key=lambda pin: pin.order)
        return Rank(pin.order, -holders[pin])

    # ---- pins that come and go

    def check(self, tenant: str, root: BlockKey, tokens: Sequence[int], now_ns: int, *, room: int | None) -> None:
        """Raise what keeps the tenant from pinning these tokens, if anything does.

        `room`: tokens that the smallest executor holds; None while there is none. Raises InvalidRequest where they are
        more than may ever be pinned, Overloaded where they are too many beside those that are pinned already.
        """
        if self._id(root, tokens) in self._pins:
            return  # it goes on
        limits, num_tokens = self._limits, len(tokens)
        most, share = limits.max_tokens_per_tenant, None if room is None else int(limits.max_share * room)
        if num_tokens > most:
            raise InvalidRequest("pin_tokens", f"at most {most} tokens of a tenant may be pinned, got {num_tokens}")
        if share is not None and num_tokens > share:
            raise InvalidRequest("pin_tokens", f"at most {share}, a share of the KV cache, got {num_tokens}")
        own = [pin for pin in self._pins.values() if pin.tenant == tenant]
        held = self._tokens_of[tenant]
        if held + num_tokens > most:
            problem = f"{held} tokens of this tenant are pinned, {num_tokens} more would be over the limit of {most}"
            raise _full("pin_tokens", problem, own, now_ns)
        if self._num_of[tenant] >= limits.max_pins_per_tenant:
            problem = f"this tenant has {self._num_of[tenant]} pins, which is the limit"
            raise _full("pin_seconds", problem, own, now_ns)
        if share is not None and self.num_tokens + num_tokens > share:
            problem = f"{num_tokens} tokens are more than all tenants together may still pin"
            raise _full("pin_tokens", problem, own, now_ns)  # of others' pins it says nothing, nor when they end

    def add(self, tenant: str, root: BlockKey, tokens: Sequence[int], until_ns: int) -> Pin:
        """Make a promise, or renew one: it lasts until then at least, and counts as the youngest. `check` was asked."""
        id = self._id(root, tokens)
        pin = self._pins.get(id)
        if pin is None:
            pin = Pin(id=id, tenant=tenant, root=root, tokens=array("I", tokens), order=0, until_ns=until_ns)
            self._pins[id] = pin
            self._tokens_of[tenant] += len(tokens)
            self._num_of[tenant] += 1
            for block_size in self._block_sizes:
                self._hold(pin, block_size)
        pin.order = self._next_order
        self._next_order += 1
        pin.until_ns = max(pin.until_ns, until_ns)
        self._over_ns = min(self._over_ns, pin.until_ns) if len(self._pins) > 1 else pin.until_ns
        return pin

    def find(self, tenant: str, id: str | None) -> list[Pin]:
        """The tenant's pin of that id, if there is one; all of the tenant's without an id."""
        return [pin for pin in self._pins.values() if pin.tenant == tenant and id in (None, pin.id)]

    def expired(self, now_ns: int) -> list[Pin]:
        """Those whose time is over. Quick while there are none."""
        if not self._pins or now_ns < self._over_ns:
            return []
        over = [pin for pin in self._pins.values() if pin.until_ns <= now_ns]
        self._over_ns = min((pin.until_ns for pin in self._pins.values() if pin.until_ns > now_ns), default=0)
        return over

    def remove(self, pin: Pin) -> None:
        """The promise is over."""
        del self._pins[pin.id]
        for counter, count in ((self._tokens_of, len(pin.tokens)), (self._num_of, 1)):
            counter[pin.tenant] -= count
            if not counter[pin.tenant]:
                del counter[pin.tenant]
        for keys in pin.keys.values():
            for key in keys:
                holders = self._holders[key]
                del holders[pin]
                if not holders:
                    del self._holders[key]

    # ---- blocks

    def know(self, block_size: int) -> None:
        """There is an executor with blocks of that size."""
        if block_size not in self._block_sizes:
            self._block_sizes.add(block_size)
            for pin in self._pins.values():
                self._hold(pin, block_size)

    def _hold(self, pin: Pin, block_size: int) -> None:
        keys = pin.keys[block_size] = self._chain.keys(pin.root, pin.tokens, block_size)
        for place, key in enumerate(keys):
            self._holders.setdefault(key, {})[pin] = place

    def _id(self, root: BlockKey, tokens: Sequence[int]) -> str:
        """The same for the same prefix of the same tenant, and nobody else can tell it."""
        return self._chain.child(root, array("I", tokens)).hex()[:32]


def _full(field: str, problem: str, pins: Sequence[Pin], now_ns: int) -> Overloaded:
    """There may be room when the first of these, the tenant's own, is over or is released."""
    until_ns = min((pin.until_ns for pin in pins), default=now_ns + _RETRY_NS)
    return Overloaded(f"{field}: {problem}; it ends with Unpin, or with time", max(0, until_ns - now_ns) / 1e9)
