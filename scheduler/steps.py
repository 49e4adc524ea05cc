"""A step of one executor as the scheduler knows it: in the making, as it is sent, and until it is answered."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from typing import NamedTuple

from common.step import NewSequence, StepPlan
from common.types import BlockId, SlotRef
from scheduler.sequence import Sequence


class Row(NamedTuple):
    """What one outstanding step computes for one sequence."""

    sequence: Sequence
    attempt: int
    num_scheduled: int
    samples: bool
    stop: int  # one past the last position that it computes, drafts aside
    max_drafts: int = 0  # tokens that it may guess behind that, and then brings as many more as were right

    @property
    def is_current(self) -> bool:
        """Its sequence goes on, and was not placed anew since: what the row brings is the sequence's next token."""
        return self.attempt == self.sequence.attempt and not self.sequence.reason


class Outstanding(NamedTuple):
    """A step that was sent and is not answered yet."""

    step: int
    rows: dict[SlotRef, Row]
    num_tokens: int  # at most
    sent_ns: int
    had_work: bool  # one of its sequences was there when the step before it was answered
    max_drafts: int = 0  # of all its rows
    held_since_ns: int = 0  # its plan could have been made then, and was held back; 0 is not

    @property
    def is_current(self) -> bool:
        """One of its rows is. Else it takes no time, where the executor ended them all itself."""
        return any(row.is_current for row in self.rows.values())


class Admission(NamedTuple):
    """A sequence that the plan tells whole."""

    sequence: Sequence
    num_computed: int  # tokens that a prefix hit had
    stop_token_ids: tuple[int, ...]


@dataclass(slots=True)
class Draft:
    """A step plan in the making: the same columns, growing."""

    step: int
    budget: int
    replay_budget: int = 0  # of it, what replays may have before the others were served
    num_drafts: int = 0  # that all its rows may carry
    rows: dict[SlotRef, Row] = field(default_factory=dict[SlotRef, Row])
    num_scheduled: list[int] = field(default_factory=list[int])
    append_refs: list[SlotRef] = field(default_factory=list[SlotRef])
    append_blocks: list[BlockId] = field(default_factory=list[BlockId])
    replace_refs: list[SlotRef] = field(default_factory=list[SlotRef])
    replace_indices: list[int] = field(default_factory=list[int])
    replace_blocks: list[BlockId] = field(default_factory=list[BlockId])
    new: list[Admission] = field(default_factory=list[Admission])
    copies: list[tuple[BlockId, BlockId]] = field(default_factory=list[tuple[BlockId, BlockId]])
    told_refs: list[SlotRef] = field(default_factory=list[SlotRef])
    told_tokens: list[int] = field(default_factory=list[int])
    chunks: dict[SlotRef, None] = field(default_factory=dict[SlotRef, None])  # rows that are no step of decoding

    def plan(self, released: Seq[SlotRef]) -> StepPlan:
        """The plan as it goes out; the sequences of `released` are told to have left."""
        return StepPlan(
            step=self.step,
            refs=list(self.rows),
            num_scheduled=self.num_scheduled,
            append_refs=self.append_refs,
            append_blocks=self.append_blocks,
            replace_refs=self.replace_refs,
            replace_indices=self.replace_indices,
            replace_blocks=self.replace_blocks,
            new=[_told_whole(new) for new in self.new],
            released=released,
            copies=self.copies,
            told_refs=self.told_refs,
            told_tokens=self.told_tokens,
            max_drafts=[row.max_drafts for row in self.rows.values()] if self.num_drafts else [],
        )

    def sent(self, now_ns: int, *, had_work: bool, held_since_ns: int) -> Outstanding:
        """The step, now that its plan goes out."""
        num_tokens = sum(self.num_scheduled) + self.num_drafts
        return Outstanding(self.step, self.rows, num_tokens, now_ns, had_work, self.num_drafts, held_since_ns)


def _told_whole(new: Admission) -> NewSequence:
    """All that the executor must know of the sequence; its table as it is when the plan is complete."""
    sequence = new.sequence
    timeline = sequence.request.timeline
    return NewSequence(
        ref=sequence.ref,
        attempt=sequence.attempt,
        token_ids=sequence.tokens[:],
        num_prompt=sequence.num_prompt,
        num_computed=new.num_computed,
        block_table=list(sequence.block_table),
        sampling=sequence.told_sampling,
        choice=sequence.choice,
        max_tokens=sequence.stop.max_tokens,
        stop_token_ids=new.stop_token_ids,
        min_tokens=sequence.stop.min_tokens,
        domain=sequence.domain,
        num_candidates=sequence.beams.search.num_kept if sequence.beams is not None else 0,
        trace=timeline.trace if timeline is not None and timeline.is_recorded else "",
        embeds=sequence.dimensions > 0,
    )
