"""Who runs next. Pure: reads numbers, returns a decision, touches nothing."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from common.blocks import blocks_for


class Running(NamedTuple):
    """One running sequence, in numbers. Rows are given by rank: better bands first, and the oldest within one."""

    num_uncomputed: int  # tokens that could be computed now; 0 when it only waits for results
    num_planned: int  # tokens computed once the steps in flight are done
    num_blocks: int  # in its table, which may be longer than what is planned: drafts needed it
    copy_on_write: bool  # its next token goes into a block that others hold too
    group: int = -1  # rows of one group stand side by side, and are preempted together; -1 is none


Yield = Callable[[int], tuple[int, int]]
"""Blocks that come free by preempting a row after all below it: (now, once the steps in flight are answered)."""


@dataclass(slots=True)
class Decision:
    """What the running sequences get in this step."""

    grants: list[int]  # tokens for each row; 0 is a pause
    blocks: list[int]  # blocks that each grant takes
    preempted: list[int]  # rows that give their blocks back, the last first
    budget_left: int
    replay_budget_left: int  # of that, what replays may still have while others might want it


def replay_share(prefill_budget: int) -> int:
    """Tokens of a step's prefill budget that replays get while others may want it: half, rounded up.

    After the loss of an executor its sequences come first, but not alone: requests that are new do not wait until the
    last of hundreds was computed again.
    """
    return (prefill_budget + 1) // 2


def decide(
    rows: Sequence[Running],
    *,
    token_budget: int,
    num_free: int,
    num_returning: int,
    block_size: int,
    yield_of: Yield,
    replays: Collection[int] = (),
    replays_waiting: int = 0,
) -> Decision:
    """Share the token budget and the free blocks among the running sequences.

    Rows that need one token go before rows that need many, so a long prompt never delays a stream by more than one
    step; among equals the first goes first. When blocks run out the last gives its own back, so the first always
    finishes; a row never preempts itself, its group or one before it, it waits and keeps what it has. `num_returning`
    blocks come free when the steps in flight are answered: with enough of those in sight a row waits instead of
    preempting.

    What rows of one token leave is the prefill budget. `replays` are rows that compute again what a lost executor had,
    and `replays_waiting` tokens of such are not admitted yet. Together they get their share, and the others the rest;
    what either cannot use is for the caller to hand out, who knows who else waits.
    """
    grants, blocks = [0] * len(rows), [0] * len(rows)
    preempted: list[int] = []
    singles = [i for i, row in enumerate(rows) if row.num_uncomputed == 1]
    others = [i for i, row in enumerate(rows) if row.num_uncomputed > 1]
    last = len(rows) - 1  # all after it are preempted
    shares: dict[bool, int] = {}  # what replays, and what others may still have; empty while singles are served
    for place, i in enumerate(singles + others):
        if token_budget == 0:
            break
        if i > last:
            continue
        num_uncomputed, num_planned, num_blocks, copy_on_write, _ = rows[i]
        tokens = min(num_uncomputed, token_budget)
        if place >= len(singles):
            if not shares:
                shares = _shares(token_budget, sum(rows[j].num_uncomputed for j in replays) + replays_waiting)
            tokens = min(tokens, shares[i in replays])
            if tokens == 0:
                continue
        need = max(0, blocks_for(num_planned + tokens, block_size) - num_blocks) + copy_on_write
        while need > num_free + num_returning and last > i and not _together(rows[last], rows[i]):
            first = last
            while _together(rows[first - 1], rows[last]):  # row i ends this: it is none of them
                first -= 1
            for row in range(last, first - 1, -1):
                preempted.append(row)
                token_budget += grants[row]
                if shares:
                    shares[row in replays] += grants[row]
                now, later = yield_of(row)
                num_free += blocks[row] + now
                num_returning += later
                grants[row] = blocks[row] = 0
            last = first - 1
        if need > num_free:  # take what fits now, if anything
            room = (num_blocks + num_free - copy_on_write) * block_size - num_planned
            tokens = min(tokens, room) if num_free >= copy_on_write else 0
            if tokens <= 0:
                continue
            need = max(0, blocks_for(num_planned + tokens, block_size) - num_blocks) + copy_on_write
        grants[i] = tokens
        if need > 0:
            blocks[i] = need
            num_free -= need
        token_budget -= tokens
        if place >= len(singles):
            shares[i in replays] -= tokens
    left = shares[True] if shares else replay_share(token_budget)
    return Decision(grants, blocks, preempted, token_budget, min(left, token_budget))


def _together(one: Running, other: Running) -> bool:
    return 0 <= one.group == other.group


def _shares(prefill_budget: int, replays_want: int) -> dict[bool, int]:
    """Tokens for replays (True) and for all others (False)."""
    share = replay_share(prefill_budget)
    return {True: share, False: prefill_budget - min(share, replays_want)}


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
