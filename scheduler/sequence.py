"""One sequence and its life. What it has committed is the truth; everything else can be recomputed from it."""

from __future__ import annotations

import enum
from array import array
from collections.abc import Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, NamedTuple

from common.sampling import SamplingParams, StopConditions
from common.step import Logprobs
from common.types import BlockId, FinishReason, Priority, SequenceId, SlotRef
from scheduler.account import Account
from scheduler.prefix_cache import BlockKey
from scheduler.speculation import Acceptance
from scheduler.timeline import Timeline

if TYPE_CHECKING:
    from scheduler.beams import BeamGroup
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


class Begun(NamedTuple):
    """The beginning of a choice that another scheduler made."""

    tokens: Seq[int]  # output, in order
    determinism: str  # the class that computed them; empty when it was none, or several


def any_begun(begun: Mapping[int, Begun] | None) -> bool:
    """Whether a reader has a token of any of these choices."""
    return begun is not None and any(before.tokens for before in begun.values())


@dataclass(slots=True, eq=False, kw_only=True)
class Request:
    """What the choices of one request share: where it began, and whether it may have killed executors."""

    id: SequenceId  # of its first choice; the others' follow it
    num_choices: int = 1
    num_cached_prompt: int | None = None  # prompt tokens that the first of them to be admitted found in a prefix cache
    resumed: bool = False  # another scheduler made the first tokens of it
    beams: BeamGroup | None = None  # its choices are the answers of a beam search
    timeline: Timeline | None = None  # hears what happens to it
    # scheduler/suspicion.py
    deaths: set[int] = field(default_factory=set[int])  # sessions that died with it since it was last trusted
    # those of its sequences that were there -> tokens that must be computed before that one is trusted again
    doubts: dict[Sequence, int] = field(default_factory=dict["Sequence", int])


@dataclass(slots=True, eq=False, kw_only=True)
class Sequence:
    """A prompt and what was generated after it."""

    id: SequenceId
    request: Request
    order: int  # arrival; within a band who came first goes first, and who came last is preempted first
    tokens: array[int]  # prompt, then committed output: the only truth. No list: the garbage collector would walk it
    num_prompt: int
    num_begun: int = 0  # tokens after that which another scheduler made
    root: BlockKey  # parent of its first block's key
    domain: bytes = b""  # with a grammar: what executors keep of it is kept for its tenant, who shares this with nobody
    put_off_at: int = -1  # tokens that it had when its grammar last said nothing yet
    sampling: SamplingParams
    stop: StopConditions
    choice: int
    tenant: str = ""
    priority: Priority = Priority.NORMAL
    cost: int = 0  # tokens that it is expected to be computed for: its share of the prompt, and its answer
    deadline_ns: int = 0  # on the caller's clock; it is not begun from then on. 0: none
    fork_of: Sequence | None = None  # shares this one's prompt blocks, if it still runs by then
    caches: bool = True  # it reads the prefix cache, and leaves there what it computes
    beams: BeamGroup | None = None  # it is one of these beams: computed, and never read (scheduler/beams.py)
    score: float | None = None  # of an answer that a beam search found
    dimensions: int = 0  # numbers of the vector that it is computed for; 0: it generates
    vector: bytes = b""  # that vector, float32, once it is EMBEDDED

    status: Status = Status.WAITING
    reason: FinishReason = FinishReason.NONE  # not NONE: FINISHED
    attempt: int = 0  # placements so far
    preemptions: int = 0
    # class of all executors that it ran on; "" for none or several, None before the first
    determinism: str | None = None
    replay_until: int = 0  # tokens that were known when it lost its executor: until then it computes them again
    unusable_at: int = -1  # tokens that were known when its row last came back without a usable token
    avoid: str = ""  # the executor that sent such a row: the next try is elsewhere, if there is another
    logprobs: list[Logprobs] = field(default_factory=list[Logprobs])  # of its output, from `logprobs_from` on
    logprobs_from: int = 0  # output tokens that another scheduler told of
    prompt_logprobs: list[Logprobs] = field(default_factory=list[Logprobs])  # of its prompt, from the second token on
    scores_prompt: bool = False  # it is the one of its request whose prompt is scored
    keys: dict[int, list[BlockKey]] = field(default_factory=dict[int, list[BlockKey]])  # of full blocks, by block size

    account: Account | None = None  # who is charged for it, once its request has begun
    band: Priority = Priority.NORMAL  # what its priority had aged to at its last admission

    # while RUNNING; void otherwise
    session: Session | None = None
    num_told: int = 0  # of a beam: tokens that the executor was told; 0: it was not told of it yet
    is_pending: bool = False  # of a beam: it waits until what its group has in common was planned
    ref: SlotRef = field(default=SlotRef(0))
    block_table: list[BlockId] = field(default_factory=list[BlockId])
    num_computed: int = 0  # tokens whose K and V results have confirmed
    num_remembered: int = 0  # leading blocks of the table that were offered to the prefix cache

    # nanoseconds on the caller's clock, 0 until it happened
    arrived_ns: int = 0
    admitted_ns: int = 0
    first_token_ns: int = 0
    last_token_ns: int = 0

    max_drafts: int | None = None  # that one row may carry; None: as many as the executor may
    acceptance: Acceptance = field(default_factory=Acceptance)

    max_length: int = field(init=False)  # tokens it may come to hold: prompt and all it may generate

    def __post_init__(self) -> None:
        self.max_length = self.num_prompt + self.stop.max_tokens

    @property
    def num_output(self) -> int:
        """Committed output tokens; the index of the next one."""
        return len(self.tokens) - self.num_prompt

    @property
    def num_cached_prompt(self) -> int:
        """Prompt tokens that its request found in a prefix cache."""
        return self.request.num_cached_prompt or 0

    @property
    def num_cacheable(self) -> int:
        """Tokens that may be found in a prefix cache: not the last one, which makes logits, nor what must score."""
        if self.scores_prompt and len(self.prompt_logprobs) < self.num_prompt - 1:
            return len(self.prompt_logprobs)
        return len(self.tokens) - 1

    @property
    def told_sampling(self) -> SamplingParams:
        """What an executor is asked for: prompts that are scored already, or in another sequence, are not again."""
        if self.sampling.prompt_logprobs is None or self.num_cacheable < self.num_prompt - 1:
            return self.sampling
        return replace(self.sampling, prompt_logprobs=None)

    @property
    def is_untold(self) -> bool:
        """A beam of which its executor does not know yet."""
        return self.beams is not None and not self.num_told

    @property
    def num_slots(self) -> int:
        """That an executor must have free to take it, or the group that it stands for."""
        return 1 if self.beams is None else self.beams.width

    @property
    def num_used(self) -> int:
        """Output tokens that were computed for it: what all beams of a search took is its first answer's."""
        beams = self.request.beams
        if beams is None:
            return self.num_output
        return beams.num_generated if self is beams.answers[0] else 0

    def expire_at(self, deadline_ns: int) -> None:
        """It is not begun from then on."""
        self.deadline_ns = deadline_ns
        for beam in self.request.beams.beams if self.request.beams is not None else ():
            beam.deadline_ns = deadline_ns

    def logprobs_of(self, first: int, count: int) -> list[Logprobs | None]:
        """Those of output tokens [first, first + count); None for what another scheduler told of."""
        places = range(first - self.logprobs_from, first - self.logprobs_from + count)
        return [self.logprobs[place] if 0 <= place < len(self.logprobs) else None for place in places]

    def placed(self, determinism: str) -> None:
        """An executor of that class computes the rest."""
        self.determinism = determinism if self.determinism in (None, determinism) else ""

    def become(self, status: Status) -> None:
        """Move on in the table of lives."""
        assert status in _NEXT[self.status], f"sequence {self.id}: {self.status.name} cannot become {status.name}"
        self.status = status
