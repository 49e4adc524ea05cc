"""What a kill run does to processes and links: one strike, and decks of them that leave no failpoint out."""

from __future__ import annotations

import random
from typing import Final, Literal, NamedTuple

from common.failpoints import EXECUTOR, NAMES, SCHEDULER

CLIENT: Final = tuple(sorted(NAMES - set(EXECUTOR) - set(SCHEDULER)))

AS_IT_STARTS: Final = frozenset({"mid_load", "before_ready", "before_hello"})
"""Places that an executor passes before it serves."""

_CANNOT_RAISE: Final = frozenset({"before_ready"})
"""Raised there, a process would stay and never join: that is a program that does not work, and no fault."""

_RARE: Final = frozenset({
    *AS_IT_STARTS, "before_block_copy", "on_drain", "in_heartbeat", "mid_drain", "before_welcome", "on_preempt",
    "on_prefix_hit", "before_admit", "after_admit", "before_block_free", "before_end_chunk", "on_resume_verify",
    "before_resume", "mid_resume",
})  # fmt: skip
"""Places that are passed about once a second, or once: who waits for the twentieth time waits long."""


class Strike(NamedTuple):
    """Who is struck and how. Without a failpoint it is at a random moment, from outside."""

    victim: Literal["executor", "scheduler", "client", "executor link", "client link"]
    action: Literal["kill", "freeze", "raise", "dark", "reset", "kill for good"]
    failpoint: str = ""
    passage: int = 1

    @property
    def kind(self) -> str:
        """What the table calls it."""
        if self.victim == "client":
            return "client killed, gone" if self.action == "kill for good" else "client killed, resumed"
        done = {"kill": "killed", "freeze": "frozen", "raise": "raised"}.get(self.action, self.action)
        return f"{self.victim} {done}" + (" as it starts" if self.failpoint in AS_IT_STARTS else "")

    @property
    def rule(self) -> str:
        """What the process is armed with."""
        return f"{self.failpoint}={self.action}@{self.passage}"


def with_standby(draw: random.Random) -> list[Strike]:
    """For one scheduler with several executors: everything."""
    deck = [_at(draw, "executor", action, place) for place in EXECUTOR for action in ("kill", "raise")]
    deck += [_at(draw, "executor", "freeze", place) for place in draw.sample(sorted(set(EXECUTOR) - _RARE), 2)]
    deck += [Strike("executor", "kill")] * 30 + [Strike("executor", "freeze")] * 3
    deck += [Strike("executor link", "dark")] * 2 + [Strike("executor link", "reset")] * 5
    deck += [_at(draw, "scheduler", "kill", place) for place in SCHEDULER] + [Strike("scheduler", "kill")] * 8
    deck += [Strike("scheduler", "freeze")]
    deck += [Strike("client link", "dark")] * 2 + [Strike("client link", "reset")] * 5
    deck += [_at(draw, "client", "kill", place) for place in CLIENT]
    deck += [Strike("client", "kill")] * 4 + [Strike("client", "kill for good")] * 2
    return _shuffled(draw, deck)


def alone(draw: random.Random) -> list[Strike]:
    """For one scheduler with one executor: whatever happens to that one."""
    places = sorted(set(EXECUTOR) - AS_IT_STARTS)
    deck = [_at(draw, "executor", "kill", place) for place in places]
    deck += [_at(draw, "executor", "raise", place) for place in draw.sample(places, 4)]
    deck += [Strike("executor", "kill")] * 8 + [Strike("executor", "freeze")]
    deck += [Strike("executor link", "reset")] * 2
    return _shuffled(draw, deck)


def two_schedulers(draw: random.Random) -> list[Strike]:
    """For two schedulers with executors of their own, both known to the clients."""
    # on_preempt and before_welcome need more than what readers do by themselves, and are struck elsewhere
    places = sorted(set(SCHEDULER) - {"on_preempt"})
    deck = [_at(draw, "scheduler", "kill", place) for place in places]
    deck += [Strike("scheduler", "kill")] * 10 + [Strike("scheduler", "freeze")] * 2
    return _shuffled(draw, deck)


def of_a_real_model(draw: random.Random) -> list[Strike]:
    """As with_standby, without what takes longest: executors take seconds to start."""
    deck = [_at(draw, "executor", "kill", place) for place in EXECUTOR]
    deck += [Strike("executor", "kill")] * 8 + [Strike("executor", "freeze")] * 2
    deck += [Strike("scheduler", "kill")] * 6 + [Strike("client", "kill")] * 2 + [Strike("executor link", "reset")] * 2
    return _shuffled(draw, deck)


def _at(
    draw: random.Random,
    victim: Literal["executor", "scheduler", "client"],
    action: Literal["kill", "freeze", "raise"],
    place: str,
) -> Strike:
    if action == "raise" and place in _CANNOT_RAISE:
        action = "kill"
    return Strike(victim, action, place, 1 if place in _RARE else draw.choice([1, 2, 5, 20]))


def _shuffled(draw: random.Random, deck: list[Strike]) -> list[Strike]:
    draw.shuffle(deck)
    return deck
