"""One sequence and its life. What it has committed is the truth; everything else can be recomputed from it."""

from __future__ import annotations

import enum
from array import array
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from common.sampling import SamplingParams, StopConditions
from common.types import BlockId, FinishReason, SequenceId, SlotRef
from scheduler.prefix_cache import BlockKey

if TYPE_CHECKING:
    from scheduler.session import Session


class Status(enum.Enum):
    """Where a sequence is in its life."""

    WAITING = enum.auto()
    RUNNING = enum.auto()
    FINISHED = enum.auto()


_NEXT = {
    Status.WAITING: frozenset({Status.RUNNING, Status.FINISHED}),  # admitted | aborted, or its last token came late
    Status.RUNNING: frozenset({Status.WAITING, Status.FINISHED}),  # preempted, executor lost | stopped, aborted
    Status.FINISHED: frozenset[Status](),
}


@dataclass(slots=True, eq=False, kw_only=True)
class Request:
    """What the choices of one request share: whether it may have killed executors (scheduler/suspicion.py)."""

    id: SequenceId  # of its first choice; the others' follow it
    num_choices: int = 1
    deaths: set[int] = field(default_factory=set[int])  # sessions that died with it since it was last trusted
    # those of its sequences that were there -> tokens that must be computed before that one is trusted again
    doubts: dict[Sequence, int] = field(default_factory=dict["Sequence", int])


@dataclass(slots=True, eq=False, kw_only=True)
class Sequence:
    """A prompt and what was generated after it."""

    id: SequenceId
    request: Request
    order: int  # arrival; who came first goes first, who came last is preempted first
    tokens: array[int]  # prompt, then committed output: the only truth. No list: the garbage collector would walk it
    num_prompt: int
    root: BlockKey  # parent of its first block's key
    sampling: SamplingParams
    stop: StopConditions
    choice: int
    fork_of: Sequence | None = None  # shares this one's prompt blocks, if it still runs by then

    status: Status = Status.WAITING
    reason: FinishReason = FinishReason.NONE  # not NONE: FINISHED
    attempt: int = 0  # placements so far
    preemptions: int = 0
    replay_until: int = 0  # tokens that were known when it lost its executor: until then it computes them again
    unusable_at: int = -1  # tokens that were known when its row last came back without a usable token
    avoid: str = ""  # the executor that sent such a row: the next try is elsewhere, if there is another
    keys: dict[int, list[BlockKey]] = field(default_factory=dict[int, list[BlockKey]])  # of full blocks, by block size

    # while RUNNING; void otherwise
    session: Session | None = None
    ref: SlotRef = field(default=SlotRef(0))
    block_table: list[BlockId] = field(default_factory=list[BlockId])
    num_computed: int = 0  # tokens whose K and V results have confirmed
    num_remembered: int = 0  # leading blocks of the table that were offered to the prefix cache

    # nanoseconds on the caller's clock, 0 until it happened
    arrived_ns: int = 0
    admitted_ns: int = 0
    first_token_ns: int = 0
    last_token_ns: int = 0
    num_cached_prompt: int = 0  # prompt tokens that needed no computing at the first admission

    max_length: int = field(init=False)  # tokens it may come to hold: prompt and all it may generate

    def __post_init__(self) -> None:
        self.max_length = self.num_prompt + self.stop.max_tokens

    @property
    def num_output(self) -> int:
        """Committed output tokens; the index of the next one."""
        return len(self.tokens) - self.num_prompt

    def become(self, status: Status) -> None:
        """Move on in the table of lives."""
        assert status in _NEXT[self.status], f"sequence {self.id}: {self.status.name} cannot become {status.name}"
        self.status = status
