"""Whether a request is taken, before anything is done for it: what does not fit is refused now and told when to return.

A request is measured in tokens: its prompt, and the answer that is to be expected. It is refused while its tenant's
rate is used up, while too much waits already, and when its answer would not be complete by the time that its caller
has: whoever is let in then would only keep others from being served in time. Nothing here knows a clock, a socket or a
message.

*Nobody fills the line for the others.* A tenant with a name may have as much waiting as is still free: alone it gets
half of the line, and there is always room for whoever comes next. As the line moves, k tenants that send without end
come to 1/(k + 1) of it each.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Final, Literal, NoReturn

from common.errors import InvalidRequest, Overloaded
from common.tenant import TenantLimits
from common.types import Priority
from scheduler.line import Standing
from services.estimates import AnswerLengths, AnswerPace, DrainRate, TokenBucket

Refusal = Literal[
    "calls", "waiting_sequences", "waiting_tokens", "tenant_share", "tenant_rate", "predicted_wait", "pins"
]
"""The limit that a refused request met."""

_UNKNOWN_S: Final = 1.0  # when to come back, while it is unknown how fast the line moves
_SOONEST_S: Final = 0.05
_LATEST_S: Final = 60.0
_BURST_S: Final = 10.0  # of a tenant's rate, where no burst is set
_WAIT_MARGIN: Final = (
    1.5  # a wait may turn out so many times as long: an answer that comes too late was computed for nobody
)


def _spread() -> float:
    return random.uniform(0.8, 1.2)


@dataclass(frozen=True, slots=True, kw_only=True)
class AdmissionLimits:
    """How much may be open and wait."""

    max_calls: int = 4096
    max_waiting: int = 2048  # sequences
    max_waiting_tokens: int = 1_000_000
    max_ttft_s: float = 0.0  # longest wait for a first token that is taken on; 0: as long as the caller's deadline


@dataclass(frozen=True, slots=True, kw_only=True)
class Ask:
    """A request, as far as it matters whether there is room."""

    tenant: str
    priority: Priority
    prompt_tokens: int  # or, before it is tokenised, the fewest that it can have
    max_tokens: int
    choices: int
    deadline_ns: int  # 0: none
    resumed: bool = False  # another scheduler made its first tokens


class Admission:
    """Takes requests or refuses them, and remembers what it takes to decide.

    `tenants` says what one may have, `default` what those may whom it does not know. `jitter` spreads those that come
    back.
    """

    def __init__(
        self,
        limits: AdmissionLimits | None = None,
        *,
        tenants: Callable[[str], TenantLimits | None] | None = None,
        default: TenantLimits | None = None,
        jitter: Callable[[], float] = _spread,
    ) -> None:
        self.rate = DrainRate()
        self.pace = AnswerPace()
        self.refusals: Counter[Refusal] = Counter()
        self._limits = limits or AdmissionLimits()
        self._tenants = tenants
        self._default = default or TenantLimits()
        self._jitter = jitter
        self._num_calls = 0
        # one for each tenant that ever asked: they are the operator's, so they are few
        self._buckets: dict[str, TokenBucket] = {}
        self._lengths: dict[str, AnswerLengths] = {}

    @contextmanager
    def open_call(self) -> Iterator[None]:
        """Count a call while it is open. Raises Overloaded for one too many."""
        if self._num_calls >= self._limits.max_calls:
            problem = f"{self._num_calls} may be open, and so many are (--max-streams)"
            self._refuse("calls", problem, _UNKNOWN_S)
        self._num_calls += 1
        try:
            yield
        finally:
            self._num_calls -= 1

    def expected_output(self, ask: Ask) -> int:
        """Tokens that each choice is expected to generate, by what its tenant's answers took lately."""
        lengths = self._lengths.get(ask.tenant)
        return lengths.expect(ask.max_tokens) if lengths else ask.max_tokens

    def check(self, ask: Ask, line: Standing, now_ns: int) -> None:
        """Raise Overloaded when the request must not be queued now, InvalidRequest for a priority it may never have.

        What is resumed was taken once, and half of it is with its reader: it is not refused because others wait, nor
        for what its tenant has asked for since. Only of those there may not wait more than may wait at all.
        """
        if ask.resumed:
            self._check_resumed(ask, line)
            return
        tenant = self._limits_of(ask.tenant)
        if ask.priority < tenant.max_priority:
            best = tenant.max_priority.name.lower()
            raise InvalidRequest("priority", f"{best} is the best that may be asked for here")
        self._check_sequences(ask, line)
        self._check_tokens(ask, line)
        bucket = self._bucket(ask.tenant, now_ns)
        wait_s = bucket.wait_s(self._cost(ask), now_ns) if bucket else 0.0
        if wait_s:
            problem = f"your {tenant.tokens_per_s:g} tokens a second are used up (tokens_per_s, --tenant-tokens-per-s)"
            self._refuse("tenant_rate", problem, wait_s)
        self._check_wait(ask, line, now_ns)

    def take(self, ask: Ask, now_ns: int) -> None:
        """The request was queued: its tenant pays what is expected, or for what is resumed later, as it is made."""
        bucket = self._bucket(ask.tenant, now_ns)
        if bucket is not None and not ask.resumed:
            bucket.take(self._cost(ask), now_ns)

    def refuse_pin(self, error: Overloaded) -> NoReturn:
        """Refuse a request for what it wants pinned. Raises Overloaded, with a time to come back like all of them."""
        self._refuse("pins", str(error), error.retry_after_s)

    def settle(self, tenant: str, *, expected: int, used: int, num_output: int, now_ns: int) -> None:
        """A sequence ended: its tenant pays what was used in the end, and the next answer is expected by this one."""
        bucket = self._bucket(tenant, now_ns)
        if bucket is not None:
            bucket.take(used - expected, now_ns)
        if num_output:
            self._lengths.setdefault(tenant, AnswerLengths()).add(num_output)

    # ---- inside

    def _cost(self, ask: Ask) -> int:
        return ask.prompt_tokens + ask.choices * self.expected_output(ask)

    def _limits_of(self, tenant: str) -> TenantLimits:
        known = self._tenants(tenant) if self._tenants is not None else None
        return known or self._default

    def _bucket(self, tenant: str, now_ns: int) -> TokenBucket | None:
        limits = self._limits_of(tenant)
        if not limits.tokens_per_s:
            self._buckets.pop(tenant, None)
            return None
        burst = limits.burst_tokens or _BURST_S * limits.tokens_per_s
        bucket = self._buckets.get(tenant)
        if bucket is None or (bucket.tokens_per_s, bucket.burst_tokens) != (limits.tokens_per_s, burst):
            bucket = TokenBucket(tokens_per_s=limits.tokens_per_s, burst_tokens=burst, now_ns=now_ns)
            self._buckets[tenant] = bucket
        return bucket

    def _check_resumed(self, ask: Ask, line: Standing) -> None:
        most = self._limits.max_waiting
        if line.own_resumed + ask.choices > most:
            problem = f"{_wait(line.own_resumed)} to go on; {most} may (--max-waiting)"
            self._refuse("waiting_sequences", problem, _UNKNOWN_S)

    def _check_sequences(self, ask: Ask, line: Standing) -> None:
        most = self._limits.max_waiting
        over = line.num_waiting + ask.choices - most
        each = line.num_tokens / line.num_waiting if line.num_waiting else 0.0
        if over > 0:
            problem = f"there is no room for {ask.choices} more; {most} may wait in all (--max-waiting)"
            self._refuse("waiting_sequences", problem, self._drained_in_s(over * each))
        over = line.own_waiting + ask.choices - (most - line.num_waiting)
        if ask.tenant and line.own_waiting and over > 0:
            problem = f"{_wait(line.own_waiting)} already; {most} may wait in all (--max-waiting), others' among them"
            self._refuse("tenant_share", problem, self._drained_in_s(over * each))

    def _check_tokens(self, ask: Ask, line: Standing) -> None:
        most, cost = self._limits.max_waiting_tokens, self._cost(ask)
        over = line.num_tokens + cost - most
        if line.num_tokens and over > 0:  # whatever fits into an executor may wait alone
            problem = f"there is no room for {cost} tokens more; {most} may wait in all (--max-waiting-tokens)"
            self._refuse("waiting_tokens", problem, self._drained_in_s(over))
        over = line.own_tokens + cost - (most - line.num_tokens)
        if ask.tenant and line.own_tokens and over > 0:
            problem = (
                f"{line.own_tokens} of your tokens wait already, and this needs {cost}; {most} may wait in all "
                f"(--max-waiting-tokens), others' among them"
            )
            self._refuse("tenant_share", problem, self._drained_in_s(over))

    def _check_wait(self, ask: Ask, line: Standing, now_ns: int) -> None:
        rate = self.rate.tokens_per_s
        if rate is None or not line.tokens_before:
            return
        wait_s = line.tokens_before / rate
        longest_s = self._limits.max_ttft_s
        if longest_s and wait_s > longest_s:
            problem = f"it would wait for about {wait_s:.1f} s, and {longest_s:g} s is the longest (--max-ttft-s)"
            self._refuse("predicted_wait", problem, wait_s - longest_s)
        if ask.deadline_ns:
            left_s = max(0.0, (ask.deadline_ns - now_ns) / 1e9)
            answer_s = self.pace.seconds_for(self.expected_output(ask))
            over_s = wait_s + (answer_s - left_s) / _WAIT_MARGIN
            if over_s > 0:
                problem = (
                    f"it would wait for about {wait_s:.1f} s and then take {answer_s:.1f} s, and has {left_s:.1f} s"
                )
                self._refuse("predicted_wait", problem, over_s)

    def _drained_in_s(self, tokens: float) -> float:
        rate = self.rate.tokens_per_s
        return tokens / rate if rate else _UNKNOWN_S

    def _refuse(self, limit: Refusal, problem: str, retry_after_s: float) -> NoReturn:
        self.refusals[limit] += 1
        raise Overloaded(f"{limit}: {problem}", min(max(retry_after_s, _SOONEST_S), _LATEST_S) * self._jitter(), limit)


def _wait(count: int) -> str:
    """How many of the tenant's own wait. Of those of others nothing is told: their number is nobody's business."""
    return f"{count} of your sequences wait{'s' if count == 1 else ''}"
