"""What happened to a request, for whoever asks why it took so long: its timeline.

It hears what happens a few times in the life of a request: for what it waits, where it is admitted, which parts of its
prompt are computed in which step, its first token, what threw it back, its ends. A step of decoding tells it nothing:
tokens are counted at the end. It holds numbers, the names of executors and words of ours; no token and no text.
`scheduler/recorder.py` tells it.
"""

from __future__ import annotations

import enum
from typing import Final, Literal, NamedTuple

from common.types import FinishReason

LEAST_EVENTS: Final = 16
"""That a timeline keeps, where it keeps any."""

Wait = Literal[
    "no_executor",  # none is joined that stays
    "too_large",  # none that is joined could ever hold it
    "behind_others",  # they came before it, or their tenants were served less
    "no_slot",  # every slot is taken
    "token_budget",  # the step's tokens were given to others
    "memory",  # too few blocks are free
    "reserve",  # what is left is kept for tenants that run less
    "siblings",  # the first choice computes the prompt that it shares
    "better_elsewhere",  # another executor is the better place, and has room
    "quarantine",  # this executor sent rows that could not be used
    "replays",  # others that lost their executor go before it
    "runs_alone",  # executors died with it: it waits for one of its own
    "deadline",  # it has passed
]
"""For what a sequence waits."""


class Kind(enum.IntEnum):
    """What happened. The numbers are those of the wire."""

    RECEIVED = 1  # num_tokens: of the prompt; number: choices
    RESUMED = 2  # num_tokens: of the answer, which its caller has
    QUEUED = 3  # why: a Wait; number: sequences that waited already
    ADMITTED = 4  # executor, step; num_tokens: found in the prefix cache; why: "alone", or nothing
    PREFILL = 5  # step; positions [position, position + num_tokens) are computed
    FIRST_TOKEN = 6
    PREEMPTED = 7  # executor; why: "memory", "tenant_share", "trial"
    MOVED = 8  # executor: the one that it lost; why: how that ended, or "unusable_row"
    SUSPECTED = 9  # executor; executors died with it: it runs alone from now on
    PUT_OFF = 10  # its grammar said nothing yet; number: times in a row
    ATTACHED = 11  # another reader came; num_tokens: that it has
    SPECULATED = 12  # number: guesses; num_tokens: those that were right
    FINISHED = 13  # why: a FinishReason; num_tokens: of its output, made here
    REFUSED = 14  # why: the limit that it met


class Event(NamedTuple):
    """One thing that happened. Kind says what the fields mean; those that it does not name are empty."""

    at_ns: int  # since the request was received
    kind: Kind
    choice: int
    executor: str
    why: str
    step: int
    position: int
    num_tokens: int
    number: int


class Controls(NamedTuple):
    """How an answer was to be made, with the defaults of what was not asked for."""

    max_tokens: int
    temperature: float
    top_p: float
    top_k: int  # 0: every token
    seed: int
    presence_penalty: float
    frequency_penalty: float


class Timeline:
    """One request's. `trace` says whose trace it is part of, `operation` and `controls` what it is there.

    None of them matters here.

    Of more than `max_events` the middle is left out: how it began and how it ended is always there.
    """

    __slots__ = (
        "_max_events",
        "_waits",
        "admitted_ns",
        "controls",
        "ended_ns",
        "error",
        "events",
        "first_token_ns",
        "is_recorded",
        "last_token_ns",
        "num_accepted",
        "num_cached",
        "num_choices",
        "num_drafted",
        "num_left_out",
        "num_open",
        "num_output",
        "num_preemptions",
        "num_prompt",
        "operation",
        "reason",
        "received_ns",
        "request_id",
        "tenant",
        "trace",
    )

    def __init__(
        self,
        request_id: str,
        received_ns: int,
        *,
        tenant: str = "",
        trace: str = "",
        operation: str = "text_completion",
        max_events: int = 64,
    ) -> None:
        self.request_id = request_id
        self.tenant = tenant
        self.trace = trace
        self.is_recorded = False  # by whoever keeps that trace: executors are told of it
        self.operation = operation
        self.controls: Controls | None = None  # of what makes an answer, once all of it is known
        self.received_ns = received_ns
        # on the caller's clock, 0 until it happened
        self.admitted_ns = 0
        self.first_token_ns = 0
        self.last_token_ns = 0
        self.ended_ns = 0
        self.num_choices = 0
        self.num_open = 0  # choices that have not ended
        self.num_prompt = 0
        self.num_cached = 0  # of the prompt, by the first choice that was admitted
        self.num_output = 0  # tokens that were made here, of the choices that ended
        self.num_preemptions = 0
        self.num_drafted = 0
        self.num_accepted = 0
        self.num_left_out = 0
        self.reason = FinishReason.NONE  # of the choice that ended last
        self.error = ""  # the kind of error that all of it failed with
        self.events: list[Event] = []
        self._max_events = max(LEAST_EVENTS, max_events) if max_events else 0
        self._waits: set[tuple[int, Wait]] = set()  # told since the choice last ran

    @property
    def is_over(self) -> bool:
        """Nothing more will happen."""
        return self.ended_ns > 0

    def add(
        self,
        kind: Kind,
        now_ns: int,
        *,
        choice: int = 0,
        executor: str = "",
        why: str = "",
        step: int = 0,
        position: int = 0,
        num_tokens: int = 0,
        number: int = 0,
    ) -> None:
        """It happened now. Time never goes back in a timeline, whoever tells it."""
        events = self.events
        if not self._max_events:
            return
        at_ns = max(0, now_ns - self.received_ns, events[-1].at_ns if events else 0)
        if len(events) >= self._max_events:
            del events[self._max_events // 2]
            self.num_left_out += 1
        events.append(Event(at_ns, kind, choice, executor, why, step, position, num_tokens, number))

    def waits(self, why: Wait, now_ns: int, *, choice: int = 0, before: int = 0) -> None:
        """A choice waits for this. Each reason is told once until it runs: they may take turns from step to step."""
        if (choice, why) not in self._waits:
            self._waits.add((choice, why))
            self.add(Kind.QUEUED, now_ns, choice=choice, why=why, number=before)

    def runs(self, choice: int) -> None:
        """A choice waits no more."""
        self._waits = {told for told in self._waits if told[0] != choice}

    def put_off(self, choice: int, now_ns: int) -> None:
        """A row of a choice brought nothing. Times in a row are one event."""
        last = self.events[-1] if self.events else None
        if last is not None and last.kind is Kind.PUT_OFF and last.choice == choice:
            self.events[-1] = last._replace(number=last.number + 1)
        else:
            self.add(Kind.PUT_OFF, now_ns, choice=choice, number=1)

    def refuse(self, limit: str, now_ns: int) -> None:
        """It was never queued."""
        self.add(Kind.REFUSED, now_ns, why=limit)
        self.ended_ns = max(1, now_ns)

    def check(self) -> None:
        """Assert what must hold of one that is over and was queued. For tests."""
        name, events = self.request_id, self.events
        times = [event.at_ns for event in events]
        assert times == sorted(times), f"{name}: not in order: {times}"
        assert self.is_over and not self.num_open, f"{name}: {self.num_open} choices have not ended"
        ends = [event.choice for event in events if event.kind is Kind.FINISHED]
        assert len(ends) == len(set(ends)), f"{name}: a choice ended twice: {ends}"
        assert events[0].kind is Kind.RECEIVED, f"{name}: begins with {events[0].kind.name}"
        assert events[-1].kind is Kind.FINISHED, f"{name}: ends with {events[-1].kind.name}"
        if not self.num_left_out:
            assert len(ends) == self.num_choices, f"{name}: {len(ends)} ends of {self.num_choices} choices"
