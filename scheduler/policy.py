"""Who runs next. Pure: reads numbers, returns a decision, touches nothing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from common.blocks import blocks_for


class Running(NamedTuple):
    """One running sequence, in numbers. Rows are given oldest first."""

    num_uncomputed: int  # tokens that could be computed now; 0 when it only waits for results
    num_planned: int  # tokens computed once the steps in flight are done
    num_blocks: int  # in its table
    copy_on_write: bool  # its next token goes into a block that others hold too
    num_exclusive: int  # blocks that nobody else holds: what preempting it yields
    in_flight: bool  # a step that is not answered yet may write its blocks


@dataclass(slots=True)
class Decision:
    """What the running sequences get in this step."""

    grants: list[int]  # tokens for each row; 0 is a pause
    preempted: list[int]  # rows that give their blocks back, youngest first
    budget_left: int


def decide(
    rows: Sequence[Running], *, token_budget: int, num_free: int, num_returning: int, block_size: int
) -> Decision:
    """Share the token budget and the free blocks among the running sequences.

    Rows that need one token go before rows that need many, so a long prompt never delays a stream by more than one
    step; among equals the oldest goes first. When blocks run out the youngest gives its own back, so the oldest always
    finishes. `num_returning` blocks come free when the steps in flight are answered: with those in sight a row waits
    instead of preempting.
    """
    decision = Decision(grants=[0] * len(rows), preempted=[], budget_left=token_budget)
    grants = decision.grants
    taken = [0] * len(rows)  # blocks this decision hands to each row
    gone: set[int] = set()
    youngest = len(rows) - 1
    for single in (True, False):
        for i, row in enumerate(rows):
            if decision.budget_left == 0:
                return decision
            if row.num_uncomputed == 0 or (row.num_uncomputed == 1) is not single or i in gone:
                continue
            tokens = min(row.num_uncomputed, decision.budget_left)
            need = blocks_for(row.num_planned + tokens, block_size) - row.num_blocks + row.copy_on_write
            while need > num_free and need > num_free + num_returning and i not in gone:
                while youngest in gone:
                    youngest -= 1
                gone.add(youngest)
                decision.preempted.append(youngest)
                decision.budget_left += grants[youngest]
                grants[youngest] = 0
                num_free += taken[youngest]
                if rows[youngest].in_flight:
                    num_returning += rows[youngest].num_exclusive
                else:
                    num_free += rows[youngest].num_exclusive
            if i in gone:
                continue
            if need > num_free:  # some come back soon: take what fits now, if anything
                room = (row.num_blocks + num_free - row.copy_on_write) * block_size - row.num_planned
                tokens = max(0, min(tokens, room)) if num_free >= row.copy_on_write else 0
                need = max(0, blocks_for(row.num_planned + tokens, block_size) - row.num_blocks + row.copy_on_write)
                if tokens == 0:
                    continue
            grants[i] = tokens
            taken[i] = max(0, need)
            num_free -= taken[i]
            decision.budget_left -= tokens
    return decision


def admits(*, num_needed: int, num_free: int, num_promised: int, watermark: int, idle: bool) -> bool:
    """Whether a waiting sequence may start: its known tokens must fit beside what running ones are still owed.

    The watermark keeps some blocks for the next tokens of those that run, so that an admission is not undone at once.
    An idle executor takes anything that fits.
    """
    return num_needed <= num_free if idle else num_needed + num_promised + watermark <= num_free


class Place(NamedTuple):
    """One executor that could take a sequence now."""

    num_cached: int  # tokens of its prefix found there
    num_running: int


def place(places: Sequence[Place]) -> int:
    """Index of the executor to use: longest cached prefix, then least load.

    A popular prefix must not pull everything to one executor: those with over twice the running sequences of the
    least loaded one, and eight more, are left out.
    """
    least = min(p.num_running for p in places)
    sane = [i for i, p in enumerate(places) if p.num_running <= 2 * least + 8]
    return max(sane, key=lambda i: (places[i].num_cached, -places[i].num_running, -i))
