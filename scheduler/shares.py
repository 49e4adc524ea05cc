"""Which tenants were served less than their share lately: the reserve of an executor is for them.

*Virtual time* is what that tenant was served, over its weight, that was served least of those that wait and are owed
nothing. Whoever waits all the time keeps up with it. Who waits only now and then falls behind, and is owed the
difference, but never more than virtual time went on in the last `CREDIT_NS`: to be away for an hour saves no more up
than that. While nobody waits there is room for all, and it goes on with whoever was served most.

So a tenant that asks for no more than its share on the whole is owed something nearly always, also at moments at which
it runs more than half of everything; one that sends without end never is.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Final

CREDIT_NS: Final = 10_000_000_000
"""How long a tenant keeps the part of its share that it did not use."""

_LOOK_EVERY_NS: Final = CREDIT_NS // 100


class Shares:
    """`served` is what a tenant was served so far, over its weight; it only ever grows."""

    def __init__(self, served: Callable[[str], float]) -> None:
        self._served = served
        self._waiting: dict[str, int] = {}  # tenants, and how many queues each has in the line
        self._forgone: dict[str, float] = {}  # of each that ever came, what it did not ask for in time
        self._time = 0.0  # virtual
        self._past: deque[tuple[int, float]] = deque([(0, 0.0)])  # (real, virtual); the first is CREDIT_NS old

    def wait(self, tenant: str) -> None:
        """A queue of the tenant's enters the line. If it is the first, the tenant was away."""
        if tenant not in self._waiting:
            behind = self._past[0][1] - self._counter(tenant)
            self._forgone[tenant] = self._forgone.get(tenant, 0.0) + max(0.0, behind)
        self._waiting[tenant] = self._waiting.get(tenant, 0) + 1

    def leave(self, tenant: str) -> None:
        """A queue of the tenant's is empty."""
        self._waiting[tenant] -= 1
        if not self._waiting[tenant]:
            del self._waiting[tenant]

    def look(self, now_ns: int) -> None:
        """Let virtual time go on. To be called often: it is quick while nothing is to be done."""
        if now_ns < self._past[-1][0] + _LOOK_EVERY_NS:
            return
        if self._waiting:
            counters = map(self._counter, self._waiting)
            self._time = min((counter for counter in counters if counter >= self._time), default=self._time)
        else:
            self._time = max(map(self._counter, self._forgone), default=0.0)
        self._past.append((now_ns, self._time))
        while self._past[1][0] <= now_ns - CREDIT_NS:
            self._past.popleft()

    def owes(self, tenant: str) -> bool:
        """Whether the tenant was served less than its share."""
        return self._counter(tenant) < self._time

    def _counter(self, tenant: str) -> float:
        return self._served(tenant) + self._forgone.get(tenant, 0.0)
