"""What an admission expects: how fast the line moves, how long an answer will be, what a tenant may still ask for.

Pure: time is an argument, in nanoseconds on one monotonic clock.
"""

from __future__ import annotations

from typing import Final

_ENOUGH_ANSWERS: Final = 20  # before that, an answer is expected to be as long as it may be
_FORGET_AT: Final = 1000  # answers; then all of them count half
_KEEP_OF_PACE: Final = 63 / 64  # with each answer


class DrainRate:
    """Tokens a second that leave the line to run, over the time in which there was more than could be run.

    Idle time says nothing of what could be done, so it does not count, nor does a line that is emptied with each step.
    Time that counts is forgotten by half after `half_life_s` more of it.
    """

    def __init__(self, *, half_life_s: float = 5.0, least_s: float = 1.0) -> None:
        self._half_life_s = half_life_s
        self._least_s = least_s
        self._tokens = 0.0
        self._seconds = 0.0
        self._last: tuple[int, int] | None = None  # time and tokens when it was last seen waiting

    def observe(self, now_ns: int, tokens_admitted: int, *, waiting: bool) -> None:
        """The state after a step was planned: all tokens that ever left the line, and whether somebody still waits."""
        if waiting and self._last is not None:
            last_ns, last_tokens = self._last
            seconds = (now_ns - last_ns) / 1e9
            keep = 0.5 ** (seconds / self._half_life_s)
            self._tokens = self._tokens * keep + tokens_admitted - last_tokens
            self._seconds = self._seconds * keep + seconds
        self._last = (now_ns, tokens_admitted) if waiting else None

    @property
    def tokens_per_s(self) -> float | None:
        """None while it is unknown: too little time counted yet, or nothing has moved."""
        if self._seconds < self._least_s or self._tokens <= 0:
            return None
        return self._tokens / self._seconds


class AnswerLengths:
    """How long answers were lately, in powers of two: what 95 of 100 do not exceed."""

    def __init__(self) -> None:
        self._counts = [0.0] * 40  # by the bits of a length
        self._total = 0.0

    def add(self, num_tokens: int) -> None:
        """An answer ended."""
        self._counts[min(num_tokens.bit_length(), 39)] += 1
        self._total += 1
        if self._total >= _FORGET_AT:
            self._counts = [count / 2 for count in self._counts]
            self._total /= 2

    def expect(self, max_tokens: int) -> int:
        """The length to reckon with, of an answer that may have `max_tokens`."""
        if self._total < _ENOUGH_ANSWERS:
            return max_tokens
        longer = 0.05 * self._total
        for bits in range(len(self._counts) - 1, 0, -1):
            longer -= self._counts[bits]
            if longer < 0:
                return min(max_tokens, (1 << bits) - 1)
        return min(max_tokens, 1)


class AnswerPace:
    """Seconds that a token of an answer takes once it runs, its prompt's share included, as it was lately."""

    def __init__(self) -> None:
        self._seconds = 0.0
        self._tokens = 0.0

    def add(self, num_tokens: int, run_ns: int) -> None:
        """So many tokens were made in this time."""
        self._seconds = self._seconds * _KEEP_OF_PACE + run_ns / 1e9
        self._tokens = self._tokens * _KEEP_OF_PACE + num_tokens

    def seconds_for(self, num_tokens: int) -> float:
        """What an answer of that length takes; 0 while that is unknown."""
        return num_tokens * self._seconds / self._tokens if self._tokens else 0.0


class TokenBucket:
    """A rate with a burst. What costs more than the burst may go when it is full, and is paid for afterwards."""

    def __init__(self, *, tokens_per_s: float, burst_tokens: float, now_ns: int) -> None:
        assert tokens_per_s > 0 and burst_tokens > 0, f"a bucket of {burst_tokens} tokens at {tokens_per_s} a second"
        self.tokens_per_s = tokens_per_s
        self.burst_tokens = burst_tokens
        self._level = burst_tokens
        self._at_ns = now_ns

    def wait_s(self, tokens: int, now_ns: int) -> float:
        """Seconds until so many may be taken; 0 when they may be now."""
        return max(0.0, (min(tokens, self.burst_tokens) - self._level_at(now_ns)) / self.tokens_per_s)

    def take(self, tokens: int, now_ns: int) -> None:
        """They are spent, whether or not they were there; a negative number gives some back."""
        self._level = min(self.burst_tokens, self._level_at(now_ns) - tokens)
        self._at_ns = max(self._at_ns, now_ns)

    def _level_at(self, now_ns: int) -> float:
        return min(self.burst_tokens, self._level + max(0, now_ns - self._at_ns) / 1e9 * self.tokens_per_s)
