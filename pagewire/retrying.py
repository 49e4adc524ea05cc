"""When to try again, and where. No clock and no sleep: time comes in, delays go out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from pagewire.borrowed import borrow
from pagewire.failures import Failure

if TYPE_CHECKING:
    from common import errors
else:
    errors = borrow("common.errors")

FIRST_DELAY_S = 0.05
MAX_DELAY_S = 2.0  # between calls that a server refuses
MAX_ABSENCE_DELAY_S = 0.5  # between those that find none: it may be back any moment, and is not there to be burdened


class RetryBudget:
    """Keeps a client's retries to a tenth of its calls, and one a second, when servers refuse: a storm helps nobody.

    A retry that is over the budget is not given up, it is put off, by `max_wait_s` at most, and by less where a request
    has less patience left: it would end otherwise because others were refused. Connections that could not be made cost
    nothing.
    """

    def __init__(
        self, *, ratio: float = 0.1, per_s: float = 1.0, reserve: float = 10.0, max_wait_s: float = 10.0
    ) -> None:
        self._ratio = ratio
        self._per_s = per_s
        self._reserve = reserve
        self._max_debt = max_wait_s * per_s
        self._left = reserve
        self._since_s: float | None = None

    def call(self) -> None:
        """A call that is no retry."""
        self._left = min(self._reserve, self._left + self._ratio)

    def retry(self, now_s: float) -> float:
        """A retry that is made: how long it must be put off."""
        wait_s = self.wait_s(now_s)
        self._left = max(-self._max_debt, self._left - 1)
        return wait_s

    def wait_s(self, now_s: float) -> float:
        """How long a retry must be put off; it is none yet."""
        if self._since_s is not None:
            self._left = min(self._reserve, self._left + (now_s - self._since_s) * self._per_s)
        self._since_s = now_s
        return min(self._max_debt, max(0.0, 1 - self._left)) / self._per_s


class Attempts:
    """The calls of one request: which server is next, and after what delay."""

    def __init__(
        self,
        addresses: Sequence[str],
        budget: RetryBudget,
        *,
        first: str,
        began_s: float,
        deadline_s: float,
        patience_s: float,
        jitter: Callable[[], float],
        begin_patience_s: float | None = None,
    ) -> None:
        """`jitter` gives a factor around 1; `patience_s` is how long calls may fail without telling anything new.

        With `begin_patience_s`, a request that no server has begun with ends when each was asked once and refused it,
        or when none was there for so long: whoever passes it on for somebody else tells him, and he asks again.
        """
        self._not_before = dict.fromkeys((first, *addresses), began_s)  # in the order they are tried
        self._budget = budget
        self._deadline_s = deadline_s
        self._patience_s = patience_s
        self._begin_patience_s = begin_patience_s  # None: it has begun, or is as patient before
        self._jitter = jitter
        self._failing_since_s: float | None = None  # None: the last call told something new
        self._taken_s: float | None = None  # the call that runs now was taken then: its failure is no refusal
        self._delay_s = FIRST_DELAY_S
        self.address = first
        budget.call()

    def remaining_s(self, now_s: float) -> float:
        """Time to the deadline."""
        return max(0.001, self._deadline_s - now_s)

    def taken(self, now_s: float) -> None:
        """The server has begun with the call. When it ends it, to send the request elsewhere, that is no refusal.

        While it runs nothing fails, however long it waits and computes before it tells anything new.
        """
        if self._taken_s is None:
            self._taken_s = now_s
        self._begin_patience_s = None

    def heard(self) -> None:
        """Something new came: what was before is forgotten."""
        self._failing_since_s = None
        self._delay_s = FIRST_DELAY_S

    def failed(self, failure: Failure, now_s: float, *, worked_s: float = 0.0) -> float:
        """The call to `address` failed: how long to wait before the next one, to the `address` of then.

        `worked_s` is how long its server worked on it, where that is not known by `taken`.

        Raises the failure's error when trying again is no use, or no time is left.
        """
        if not failure.may_pass:
            raise failure.error
        taken_s, self._taken_s = self._taken_s, None
        if self._failing_since_s is None:
            self._failing_since_s = now_s
        else:
            self._failing_since_s += worked_s if taken_s is None else now_s - taken_s
        delay_s = self._delay_s * self._jitter()
        self._delay_s = min(MAX_DELAY_S if failure.answered else MAX_ABSENCE_DELAY_S, 2 * self._delay_s)
        if failure.retry_after_s is not None:
            delay_s = max(delay_s, failure.retry_after_s * (0.5 + 0.5 * self._jitter()))
        self._not_before[self.address] = now_s + delay_s
        self.address = min(self._not_before, key=self._not_before.__getitem__)
        wait_s = max(0.0, self._not_before[self.address] - now_s)
        # At the beginning each server is asked once, whatever the others of this client were told.
        costs = failure.answered and taken_s is None and self._begin_patience_s is None
        if costs:
            # What others were told is a reason to come later, and none to give up: there is time for a last try.
            left_s = min(self._failing_since_s + self._patience_s, self._deadline_s) - now_s
            wait_s = max(wait_s, min(self._budget.wait_s(now_s), left_s * (0.25 + 0.5 * self._jitter())))
        if now_s + wait_s >= self._deadline_s:
            raise errors.DeadlineExceeded(f"no time is left to try again: {failure.error}") from failure.error
        if self._begin_patience_s is None:
            is_over = now_s + wait_s > self._failing_since_s + self._patience_s
        elif failure.answered:
            is_over = wait_s > 0  # nobody is left who was not asked
        else:
            is_over = now_s + wait_s > self._failing_since_s + self._begin_patience_s
        if is_over:
            raise failure.error
        if costs:
            self._budget.retry(now_s)
        return wait_s
