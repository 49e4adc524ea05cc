"""The waiting line: who is looked at first when there is room.

Three rules, in this order:

1. **What has begun goes first**, by arrival: sequences that lost their executor or were preempted, and the other
   choices of a request of which one runs. What they have computed before is the server's debt, so nobody is charged
   for it again.
2. **Bands.** A request of higher priority goes before one of lower. After each `AGING_NS` of waiting it counts as one
   band better, so a low one is among the best after two of them, and nothing waits for ever behind better ones.
3. **Within a band the tenant goes first that was served least**, by the virtual token counter of Sheng et al. (OSDI
   2024): a counter for each tenant, charged `W_IN` for each prompt token that an admission has to compute and `W_OUT`
   for each output token as it is made, over the tenant's weight. A tenant that comes back is lifted to the least
   counter of those that wait, so being away saves nothing up. Between two tenants that both wait all the time, service
   over weight differs by at most 2 · max(W_IN · longest prompt, W_OUT · tokens that fit into the executors), over the
   smaller weight, whatever they send. Within a tenant, what another scheduler began goes first, then who came first;
   the choices of a request stay together.

*Nobody overtakes.* The scheduler stops at the first sequence for which an executor has no room, so a large request is
not starved by small ones behind it: neither its tenant's own, nor those of others. A tenant passes it only while it has
been served less, and each admission charges it; a better band passes it until it has aged into the best. There is one
exception: the last part of an executor is kept for tenants that run less than it there (`Session.leaves_reserve`), and
for those that were served less than their share lately (scheduler/shares.py); they then pass the others, and where no
slot is left, one of the others makes way (`Planner`). So a tenant that asks for no more than its share hardly ever
waits, whatever the others send.

The head is found in the logarithm of the number of tenants, and who takes it out moves nothing but its tenant. Counters
only grow, so a tenant's place in its band is mended when somebody looks at it and not with every token.
"""

from __future__ import annotations

import bisect
import heapq
from collections import OrderedDict, deque
from collections.abc import Iterator, Mapping, Set
from dataclasses import dataclass
from itertools import islice
from typing import Final, NamedTuple

from common.types import Priority, SequenceId
from scheduler.account import Account
from scheduler.sequence import Sequence
from scheduler.shares import Shares

AGING_NS: Final = 10_000_000_000
"""Waiting time after which a request counts as one band better."""

_Entry = tuple[float, int, "_Queue"]
"""(counter when it was listed, arrival of its head, the queue). No two heads arrive alike, so queues never compare."""

_Passed = tuple[float, int, deque[list[Sequence]], "_Queue"]
"""(counter, arrival, requests not looked at yet, their queue): a queue whose head a walk has passed over."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Standing:
    """The line as a tenant's next request would find it. Tokens are expected costs: `Sequence.cost`.

    What other schedulers began is counted apart: it was taken long ago, and takes nobody's room.
    """

    num_waiting: int
    num_tokens: int
    own_waiting: int  # of these, the tenant's own
    own_tokens: int
    own_resumed: int  # sequences of the tenant that another scheduler began, which is none of the above
    tokens_before: int  # of all, those that would go before the request


class Waiting(NamedTuple):
    """What waits of one tenant in one priority, for a person who looks on."""

    tenant: str
    priority: Priority
    num_sequences: int
    num_tokens: int  # expected costs
    begun: bool  # it ran before, and goes before all that has not
    arrived_ns: int  # of the first


class _Queue:
    """What waits of one tenant in one priority: what others began, then the rest; first come first in each."""

    __slots__ = (
        "account",
        "aging",
        "band",
        "entry",
        "num_resumed",
        "num_tokens",
        "num_waiting",
        "priority",
        "requests",
        "resumed",
        "resumed_tokens",
        "tenant",
    )

    def __init__(self, tenant: str, priority: Priority) -> None:
        self.tenant = tenant
        self.priority = priority
        # both by id of the request's first choice
        self.resumed: OrderedDict[SequenceId, list[Sequence]] = OrderedDict()
        self.requests: OrderedDict[SequenceId, list[Sequence]] = OrderedDict()
        self.num_waiting = self.num_resumed = 0
        self.num_tokens = self.resumed_tokens = 0
        # while it is listed, which is while it is not empty
        self.band: _Band | None = None
        self.entry: _Entry | None = None
        self.account: Account | None = None
        self.aging: _Entry | None = None  # when its head counts as a band better

    def __iter__(self) -> Iterator[list[Sequence]]:
        """Its requests in order: of each, the choices that wait."""
        yield from self.resumed.values()
        yield from self.requests.values()

    @property
    def head(self) -> list[Sequence] | None:
        """Its first request."""
        return next(iter(self), None)

    def find(self, id: SequenceId) -> list[Sequence] | None:
        """The request of that id, if it waits."""
        return self.requests.get(id) or self.resumed.get(id)

    def drop(self, id: SequenceId) -> None:
        """The request waits no more."""
        del (self.requests if id in self.requests else self.resumed)[id]


class _Band:
    """The tenants that compete with each other, least served first."""

    def __init__(self, weights: Mapping[str, float]) -> None:
        self.listed: list[_Entry] = []
        self._weights = weights
        # kept for ever: a tenant is one of the operator's, not a caller's choice
        self._accounts: dict[str, Account] = {}
        self._last: Account | None = None  # left last

    def weigh(self, tenant: str, weight: float) -> None:
        """What the tenant is served counts by this weight from now on."""
        account = self._accounts.get(tenant)
        if account is not None:
            account.weigh(weight)

    def served(self, tenant: str) -> float:
        """What the tenant was served in this band, over its weight."""
        account = self._accounts.get(tenant)
        return account.served if account is not None else 0.0

    def list(self, queue: _Queue, order: int) -> None:
        """Enter a queue whose head arrived at `order`. A tenant that was away is lifted to the least served one."""
        account = self._accounts.get(queue.tenant)
        if account is None:
            account = self._accounts[queue.tenant] = Account(self._weights.get(queue.tenant, 1.0))
        if not account.num_listed:
            account.lift(self._floor())
        account.num_listed += 1
        queue.band, queue.account, queue.entry = self, account, (account.counter, order, queue)
        bisect.insort(self.listed, queue.entry)

    def relist(self, queue: _Queue, order: int) -> None:
        """The queue has another head, and stays."""
        account = queue.account
        assert account is not None
        self._drop(queue)
        queue.entry = (account.counter, order, queue)
        bisect.insort(self.listed, queue.entry)

    def unlist(self, queue: _Queue) -> None:
        """The queue leaves: it is empty, or its head has aged into a better band."""
        assert queue.account is not None
        self._drop(queue)
        queue.account.num_listed -= 1
        self._last = queue.account
        queue.band = queue.account = queue.entry = None

    def at(self, place: int) -> _Entry | None:
        """Who stands there by what was served until now; None past the end. Looked at from the front on."""
        while place < len(self.listed):
            counter, order, queue = self.listed[place]
            assert queue.account is not None
            if counter == queue.account.counter:
                return self.listed[place]
            del self.listed[place]  # it was charged since, so its place is here or later
            queue.entry = (queue.account.counter, order, queue)
            bisect.insort(self.listed, queue.entry, lo=place)
        return None

    def _drop(self, queue: _Queue) -> None:
        assert queue.entry is not None
        index = bisect.bisect_left(self.listed, queue.entry)
        assert self.listed[index] is queue.entry, f"a queue of {queue.num_waiting} is not where it was listed"
        del self.listed[index]

    def _floor(self) -> float:
        least = self.at(0)
        account = least[2].account if least is not None else self._last
        return account.counter if account is not None else 0.0


class Line:
    """Sequences that no executor holds. `weights`: shares of a band are in proportion; 1 where none is given."""

    def __init__(self, weights: Mapping[str, float] | None = None, *, aging_ns: int = AGING_NS) -> None:
        self._weights = dict(weights or {})
        assert all(weight > 0 for weight in self._weights.values()), "a tenant without a share would wait for ever"
        self._aging_ns = aging_ns
        self._begun: list[Sequence] = []  # by arrival
        self._bands = {priority: _Band(self._weights) for priority in Priority}
        self._queues: dict[tuple[str, Priority], _Queue] = {}  # those that are not empty
        self._aging: list[_Entry] = []  # (when its head ages, arrival of its head, queue)
        self._num_waiting = self._num_tokens = 0
        self._num_resumed = self._resumed_tokens = 0
        self._begun_tokens = 0
        self._tokens_of = dict.fromkeys(Priority, 0)
        self._weight_of = dict.fromkeys(Priority, 0.0)  # of the tenants that wait
        self._shares = Shares(lambda tenant: sum(band.served(tenant) for band in self._bands.values()))
        self._now_ns = 0
        self.tokens_admitted = 0  # only ever counted up

    # ---- what there is

    def __len__(self) -> int:
        return self._num_waiting

    def __iter__(self) -> Iterator[Sequence]:
        """All that wait, in no order that means anything."""
        yield from self._begun
        for queue in self._queues.values():
            for request in queue:
                yield from request

    @property
    def num_tokens(self) -> int:
        """Expected cost of all that wait."""
        return self._num_tokens

    @property
    def has_new(self) -> bool:
        """Somebody waits whose request has not begun."""
        return bool(self._queues)

    def standing(self, tenant: str, priority: Priority) -> Standing:
        """What the tenant's next request of that priority would find.

        Before it goes all that has begun or is better. Of its own band, what its tenant has there already, and what the
        others are served meanwhile: as much each, by weight, and no more than they have.
        """
        queues = [queue for p in Priority if (queue := self._queues.get((tenant, p)))]
        before = self._begun_tokens + sum(tokens for p, tokens in self._tokens_of.items() if p < priority)
        own = self._queues.get((tenant, priority))
        if own is not None:
            share = self._weight_of[priority] / self._weights.get(tenant, 1.0)
            before += min(self._tokens_of[priority], int(own.num_tokens * share))
        return Standing(
            num_waiting=self._num_waiting - self._num_resumed,
            num_tokens=self._num_tokens - self._resumed_tokens,
            own_waiting=sum(queue.num_waiting - queue.num_resumed for queue in queues),
            own_tokens=sum(queue.num_tokens - queue.resumed_tokens for queue in queues),
            own_resumed=sum(queue.num_resumed for queue in queues),
            tokens_before=before,
        )

    def queues(self) -> Iterator[Waiting]:
        """All that wait, by tenant and priority: what has begun, then the rest."""
        begun: dict[tuple[str, Priority], Waiting] = {}
        for sequence in self._begun:
            key = (sequence.tenant, sequence.priority)
            known = begun.get(key, Waiting(*key, 0, 0, begun=True, arrived_ns=sequence.arrived_ns))
            begun[key] = known._replace(
                num_sequences=known.num_sequences + 1,
                num_tokens=known.num_tokens + sequence.cost,
                arrived_ns=min(known.arrived_ns, sequence.arrived_ns),
            )
        yield from begun.values()
        for (tenant, priority), queue in self._queues.items():
            arrived_ns = queue.head[0].arrived_ns if queue.head else self._now_ns
            yield Waiting(tenant, priority, queue.num_waiting, queue.num_tokens, begun=False, arrived_ns=arrived_ns)

    def owes(self, tenant: str) -> bool:
        """Whether the tenant was served less than its share lately: an executor's reserve is for it."""
        return self._shares.owes(tenant)

    def first_owed(self, now_ns: int) -> Sequence | None:
        """Who waits longest of the tenants with a name that were served less than their share."""
        self._shares.look(now_ns)
        queues = [queue for queue in self._queues.values() if queue.tenant and self._shares.owes(queue.tenant)]
        return min((queue.head[0] for queue in queues if queue.head), key=_order, default=None)

    # ---- who comes and goes

    def weigh(self, tenant: str, weight: float) -> None:
        """The tenant's share is this from now on; one that waits keeps its share until nothing of it waits."""
        assert weight > 0, f"{tenant} would wait for ever"
        if self._weights.get(tenant, 1.0) == weight or any((tenant, p) in self._queues for p in Priority):
            return
        self._weights[tenant] = weight
        for band in self._bands.values():
            band.weigh(tenant, weight)

    def add(self, request: list[Sequence]) -> None:
        """A request, new here: all its choices. The `order` of one that is resumed is before that of others."""
        first = request[0]
        self._now_ns = max(self._now_ns, first.arrived_ns)
        key = (first.tenant, first.priority)
        queue = self._queues.get(key)
        if queue is None:
            queue = self._queues[key] = _Queue(*key)
            self._weight_of[first.priority] += self._weights.get(first.tenant, 1.0)
            self._shares.wait(first.tenant)
        (queue.resumed if first.request.resumed else queue.requests)[first.id] = list(request)
        for sequence in request:
            self._count(sequence, 1, queue)
        if queue.band is None or queue.head == request:
            self._place(queue)

    def add_again(self, sequence: Sequence) -> None:
        """A sequence that lost its executor or was preempted: it keeps its place."""
        bisect.insort(self._begun, sequence, key=_order)
        self._count(sequence, 1, None)

    def remove(self, sequence: Sequence) -> None:
        """A sequence ended while it waited."""
        queue, request = self._find(sequence)
        self._count(sequence, -1, queue)
        if queue is None or request is None:
            del self._begun[self._index(sequence)]
            return
        request.remove(sequence)
        if not request:
            was_head = queue.head is request
            queue.drop(sequence.request.id)
            if was_head:
                self._place(queue)

    def admit(self, sequence: Sequence, num_tokens: int, now_ns: int) -> None:
        """A sequence leaves to run; its executor has to compute `num_tokens` that are known. Its band is settled now.

        The first time, they are charged to its tenant in the band that it stood in, as its output will be.
        """
        queue, request = self._find(sequence)
        self._count(sequence, -1, queue)
        if queue is None or request is None:
            del self._begun[self._index(sequence)]
        else:
            self._begin(queue, request, sequence)
        assert sequence.account is not None, f"sequence {sequence.id} was never in a band"
        if not sequence.attempt:
            sequence.account.counter += num_tokens * sequence.account.per_input
        sequence.band = self._band_of(sequence.priority, sequence.arrived_ns, now_ns)
        self.tokens_admitted += sequence.cost

    def walk(self, now_ns: int, passed_over: Set[str] = frozenset()) -> Iterator[Sequence]:
        """All that wait, in the order in which they go. Whoever walks may admit the one it was given, and no other.

        An admission counts at once: what comes next is what should come next after it. Tenants in `passed_over`, which
        may change meanwhile, are left out, but for what has begun.
        """
        self._age(now_ns)
        yield from self._begun[:]
        for band in self._bands.values():
            yield from self._walk(band, passed_over)

    # ---- inside

    def _walk(self, band: _Band, passed_over: Set[str]) -> Iterator[Sequence]:
        passed: list[_Passed] = []  # least served first
        place = 0
        while True:
            entry = band.at(place)
            if passed and (entry is None or passed[0][:2] < entry[:2]):
                counter, order, requests, queue = heapq.heappop(passed)
                assert queue.account is not None
                if queue.tenant in passed_over:
                    continue
                if counter != queue.account.counter:  # charged since
                    heapq.heappush(passed, (queue.account.counter, order, requests, queue))
                    continue
                yield from list(requests.popleft())
                self._pass(passed, queue, requests)
            elif entry is None:
                return
            else:
                queue = entry[2]
                if queue.tenant in passed_over:
                    place += 1
                    continue
                request = queue.head
                assert request, "a queue is listed and empty"
                yield from list(request)  # all choices: the first one taken leaves the others among what has begun
                if queue.band is band and queue.head is request:
                    place += 1
                    self._pass(passed, queue, deque(islice(queue, 1, None)))

    def _pass(self, passed: list[_Passed], queue: _Queue, requests: deque[list[Sequence]]) -> None:
        if requests and queue.account is not None:
            heapq.heappush(passed, (queue.account.counter, requests[0][0].order, requests, queue))

    def _begin(self, queue: _Queue, request: list[Sequence], sequence: Sequence) -> None:
        """One choice runs: the others wait among what has begun, in the same account."""
        was_head = queue.head is request
        queue.drop(sequence.request.id)
        for other in request:
            other.account = queue.account
            if other is not sequence:
                self._count(other, -1, queue)
                self.add_again(other)
        if was_head:
            self._place(queue)

    def _place(self, queue: _Queue) -> None:
        """List the queue where its head belongs by now, or nowhere when it is empty."""
        if queue.aging is not None:
            del self._aging[bisect.bisect_left(self._aging, queue.aging)]
            queue.aging = None
        request = queue.head
        if request is None:
            if queue.band is not None:
                queue.band.unlist(queue)
            del self._queues[queue.tenant, queue.priority]
            self._shares.leave(queue.tenant)
            self._weight_of[queue.priority] -= self._weights.get(queue.tenant, 1.0)
            return
        head = request[0]
        priority = self._band_of(queue.priority, head.arrived_ns, self._now_ns)
        band = self._bands[priority]
        if queue.band is band:
            band.relist(queue, head.order)
        else:
            if queue.band is not None:
                queue.band.unlist(queue)
            band.list(queue, head.order)
        if priority is not Priority.HIGH:
            due_ns = head.arrived_ns + self._aging_ns * (queue.priority - priority + 1)
            queue.aging = (due_ns, head.order, queue)
            bisect.insort(self._aging, queue.aging)

    def _age(self, now_ns: int) -> None:
        """Only heads count: whoever stands behind one is younger, so its turn to age comes later."""
        self._now_ns = max(self._now_ns, now_ns)
        self._shares.look(self._now_ns)
        while self._aging and self._aging[0][0] <= self._now_ns:
            self._place(self._aging[0][2])

    def _band_of(self, priority: Priority, arrived_ns: int, now_ns: int) -> Priority:
        return Priority(max(Priority.HIGH, priority - (now_ns - arrived_ns) // self._aging_ns))

    def _find(self, sequence: Sequence) -> tuple[_Queue, list[Sequence]] | tuple[None, None]:
        """The queue and the request that it waits in; none where it has begun."""
        queue = self._queues.get((sequence.tenant, sequence.priority))
        request = queue.find(sequence.request.id) if queue is not None else None
        return (queue, request) if queue is not None and request is not None else (None, None)

    def _index(self, sequence: Sequence) -> int:
        index = bisect.bisect_left(self._begun, sequence.order, key=_order)
        assert self._begun[index : index + 1] == [sequence], f"sequence {sequence.id} does not wait"
        return index

    def _count(self, sequence: Sequence, change: int, queue: _Queue | None) -> None:
        cost = change * sequence.cost
        self._num_waiting += change
        self._num_tokens += cost
        if queue is None:
            self._begun_tokens += cost
        else:
            queue.num_waiting += change
            queue.num_tokens += cost
            if sequence.request.resumed:
                queue.num_resumed += change
                queue.resumed_tokens += cost
                self._num_resumed += change
                self._resumed_tokens += cost
            self._tokens_of[queue.priority] += cost

    def check(self) -> None:
        """Assert what must always hold. For tests: walks everything."""
        waiting = list(self)
        assert len(waiting) == len(set(waiting)) == self._num_waiting, "the line has lost count"
        assert sum(s.cost for s in waiting) == self._num_tokens == self._begun_tokens + sum(self._tokens_of.values())
        assert [s.order for s in self._begun] == sorted(s.order for s in self._begun), "the line is out of order"
        listed = [entry for band in self._bands.values() for entry in band.listed]
        assert {id(q) for _, _, q in listed} == {id(q) for q in self._queues.values()}, "a queue is not listed"
        assert len(listed) == len(self._queues), "a queue is listed twice"
        for band in self._bands.values():
            assert band.listed == sorted(band.listed), "a band is out of order"
            for counter, order, queue in band.listed:
                assert queue.account is not None and queue.head, "a queue is listed and empty"
                assert counter <= queue.account.counter and order <= queue.head[0].order
                orders = [s.order for request in queue for s in request]
                assert orders == sorted(orders), "a tenant's requests are out of order"


def _order(sequence: Sequence) -> int:
    return sequence.order
