"""One executor as the scheduler sees it: its blocks, what is cached in them, who runs there, and what is in flight.

A session begins empty when an executor joins and is thrown away whole when it is lost; nothing in it is needed to go
on elsewhere. What is in flight is never counted: it is read off the outstanding steps.
"""

from __future__ import annotations

import heapq
from collections import Counter, deque
from collections.abc import Iterable, Iterator

from common import failpoints
from common.blocks import blocks_for
from common.step import EMBEDS, ExecutorFacts, StepPlan, StepResult
from common.types import BlockId, SlotRef, slot_of, slot_ref
from scheduler import policy
from scheduler.beams import BeamGroup
from scheduler.block_pool import BlockPool
from scheduler.lead import Lead
from scheduler.occupancy import Occupancy
from scheduler.pace import Pace
from scheduler.pins import Pin, Pins
from scheduler.prefix_cache import BlockKey, CacheWatchers, KeyChain, Match, PrefixCache
from scheduler.reputation import Reputation
from scheduler.sequence import Request, Sequence
from scheduler.steps import Admission, Draft, Outstanding, Row


class Session:
    """The scheduler's half of one link. Mutated only by Scheduler."""

    def __init__(
        self,
        id: int,
        facts: ExecutorFacts,
        chain: KeyChain,
        pins: Pins,
        watchers: CacheWatchers,
        *,
        reputation: Reputation | None = None,
        joined_ns: int = 0,
        held_until_ns: int = 0,
        prefix_caching: bool,
        max_running: int,
        watermark: int,
        reserve: float,
    ) -> None:
        self.id = id
        self.facts = facts
        self.block_size = facts.block_size
        self.pool = BlockPool(facts.num_blocks)
        self.cache = PrefixCache(facts.block_size, watchers)
        self.running: list[Sequence] = []  # best band first, and oldest first within it
        self.tenants: Counter[str] = Counter()  # how many run of each; none is left at 0
        self.groups: dict[BeamGroup, None] = {}  # those whose beams run here
        self.outstanding: deque[Outstanding] = deque()
        self.leaving = False  # takes no new work
        self.silent = False  # nothing was heard for a while: gets no plan until it speaks again
        self.trial: Request | None = None  # the request that has this executor to itself
        self.reputation = reputation or Reputation()  # of its name
        self.joined_ns = joined_ns
        self.held_until_ns = held_until_ns  # takes no work before: it died young too often
        self.pace = Pace()
        self._lead = Lead()
        self.due_ns = 0  # the next plan is not made before
        self._held_since_ns = 0  # when it was asked for too early; 0 while it was not
        self.full = False  # the first in the line that fits here waits for room
        self.occupancy = Occupancy()
        self.num_promised = 0  # blocks that the known tokens of running sequences still need
        self._chain = chain
        self._pins = pins
        self._prefix_caching = prefix_caching
        self._watermark = watermark
        self._reserve_blocks = int(reserve * facts.num_blocks)
        self._next_step = 0
        self._answered_ns = -1  # when the last result came; -1 before the first
        self._num_slots = min(facts.max_sequences, max_running)
        self._free_slots = list(range(self._num_slots))
        # sequences that may become resident: groups keep a slot for each beam that they may come to have
        self.num_free_slots = self._num_slots
        self._reserve_slots = int(reserve * self._num_slots)
        self._generations = [0] * self._num_slots
        self._released: list[SlotRef] = []
        self._returning: deque[tuple[int, list[BlockId]]] = deque()  # (last step that may write them, blocks)

    # ---- what there is

    @property
    def max_length(self) -> int:
        """Tokens that one sequence can have here."""
        return min(self.facts.max_model_len, self.facts.num_blocks * self.block_size)

    @property
    def has_credit(self) -> bool:
        """Another step may be sent."""
        return len(self.outstanding) < self.facts.credit

    def holds_plan(self, now_ns: int) -> bool:
        """Whether the next plan is made later: what is in flight keeps the executor busy until after `due_ns`."""
        if now_ns >= self.due_ns:
            return False
        self._held_since_ns = self._held_since_ns or now_ns
        return True

    def nothing_to_plan(self) -> None:
        """There was no plan to make: the next one is not late because it was held back."""
        self._held_since_ns = 0

    def _next_due_ns(self) -> int:
        """When the next plan is due, now that other steps are in flight than before; 0 is at once.

        What comes behind drafts, or next of beams, is known with the answer alone, and so is whose turn it is in a
        trial: then there is nothing to wait for but that.
        """
        if not self.has_credit or self.speculates or self.groups or self.trial is not None:
            return 0
        shortest_ns = [self.pace.shortest_ns(flight.num_tokens) for flight in self.outstanding if flight.is_current]
        if not shortest_ns or not all(shortest_ns):
            return 0  # nobody knows: it may end at any moment
        held_ns = self._lead.held_ns(sum(shortest_ns))
        return self.unanswered()[1] + held_ns if held_ns else 0

    def could_hold(self, sequence: Sequence) -> bool:
        """Whether all that the sequence, or its group of beams, may come to need fits when nothing else is here."""
        if sequence.max_length > self.max_length or (sequence.dimensions and EMBEDS not in self.facts.capabilities):
            return False
        group = sequence.request.beams
        if group is None:
            return True
        return group.width <= self._num_slots and group.most_blocks(self.block_size) <= self.facts.num_blocks

    @property
    def has_slot(self) -> bool:
        """Another sequence may become resident."""
        return self.num_free_slots > 0

    def is_quarantined(self, now_ns: int) -> bool:
        """It sent too many rows that could not be used: what it computes is not to be trusted."""
        return now_ns < self.reputation.quarantined_until_ns

    def takes_work(self, now_ns: int) -> bool:
        """New sequences may be placed here, as far as the executor itself goes and quarantine aside."""
        return not self.leaving and not self.silent and self.trial is None and now_ns >= self.held_until_ns

    def tokens_of(self, step: int) -> int | None:
        """Tokens of an outstanding step; None when it is answered, or was never sent."""
        return next((flight.num_tokens for flight in self.outstanding if flight.step == step), None)

    def unanswered(self) -> tuple[int, int]:
        """The oldest outstanding step, and when the executor could begin with it at the earliest; (0, 0) for none."""
        if not self.outstanding:
            return 0, 0
        return self.outstanding[0].step, max(self.outstanding[0].sent_ns, self._answered_ns)

    def silent_since(self, time_ns: int) -> bool:
        """A step that was sent before then, or could have been, is not answered."""
        if not self.outstanding:
            return False
        flight = self.outstanding[0]
        return (flight.held_since_ns or flight.sent_ns) < time_ns

    @property
    def last_step(self) -> int:
        """The step that was sent last; -1 before the first."""
        return self._next_step - 1

    @property
    def speculates(self) -> bool:
        """Rows with drafts are in flight: how many tokens they bring, and so what comes next of them, is not known."""
        return any(flight.max_drafts for flight in self.outstanding)

    def in_flight(self, sequence: Sequence) -> tuple[int, int]:
        """(tokens computed, tokens sampled) for the sequence by the outstanding steps."""
        computed = sampled = 0
        for flight in self.outstanding:
            row = flight.rows.get(sequence.ref)
            if row is not None:
                computed += row.num_scheduled
                sampled += row.samples
        return computed, sampled

    def num_planned(self, sequence: Sequence) -> int:
        """Tokens of the sequence that are computed once the outstanding steps are done."""
        return sequence.num_computed + self.in_flight(sequence)[0]

    def returning(self) -> Iterator[Iterable[BlockId]]:
        """Released tables that come free when the outstanding steps are answered."""
        return (blocks for _, blocks in self._returning)

    def held(self) -> Iterator[Iterable[BlockId]]:
        """Every block table and everything on its way back; for checks."""
        yield from (sequence.block_table for sequence in self.running)
        yield from self.returning()

    # ---- matching prefixes

    def match(self, sequence: Sequence) -> Match:
        """What is cached here of the sequence. Its last known token is always left to compute: it makes the logits."""
        if not self._prefix_caching or not sequence.caches:
            return Match([], None, 0)
        size = self.block_size
        usable = sequence.num_cacheable
        blocks: list[BlockId] = []
        for i in range(usable // size):
            block = self.cache.find(self._keys_of(sequence, i + 1)[i])  # no key is made beyond the first miss
            if block is None:
                break
            blocks.append(block)
        start = len(blocks) * size
        parent = self._parent_of(sequence, len(blocks))
        tail = self.cache.find_tail(parent, sequence.tokens[start : min(start + size, usable)], self._next_step)
        return Match(blocks, tail, start + (tail.num_tokens if tail else 0))

    def _keys_of(self, sequence: Sequence, num_blocks: int) -> list[BlockKey]:
        """Keys of the sequence's full blocks, the first `num_blocks` at least. They never change, so they are kept."""
        size = self.block_size
        keys = sequence.keys.setdefault(size, [])
        parent = keys[-1] if keys else sequence.root
        for i in range(len(keys), num_blocks):
            parent = self._chain.child(parent, sequence.tokens[i * size : (i + 1) * size])
            keys.append(parent)
        return keys

    def _parent_of(self, sequence: Sequence, index: int) -> BlockKey:
        """What stands before the block at `index`."""
        return self._keys_of(sequence, index)[index - 1] if index else sequence.root

    def remember(self, sequence: Sequence, num_written: int, step: int) -> None:
        """Offer the sequence's full blocks to the prefix cache: `num_written` tokens are written once `step` is done.

        Executors work in order, so a later step may read what an outstanding one still has to write.
        """
        if not self._prefix_caching or not sequence.caches:
            return
        size = self.block_size
        num_full = min(num_written, len(sequence.tokens)) // size
        if num_full <= sequence.num_remembered:
            return
        keys = self._keys_of(sequence, num_full)
        parent = self._parent_of(sequence, sequence.num_remembered)
        for i in range(sequence.num_remembered, num_full):
            tokens = sequence.tokens[i * size : (i + 1) * size]
            self.cache.remember(keys[i], parent, tokens, sequence.block_table[i], step, sequence.root)
            if self._pins:
                self._keep(keys[i])
            parent = keys[i]
        sequence.num_remembered = num_full

    def keep(self, pin: Pin) -> None:
        """The pin's blocks are kept from now on, or are not any more.

        Only by the keys of this executor's own size of blocks: one of another size may be that of a tail here.
        """
        for key in pin.keys[self.block_size]:
            self._keep(key)

    def _keep(self, key: BlockKey) -> None:
        block = self.cache.find(key)
        if block is not None:
            self.pool.keep(block, self._pins.rank(key))

    def check_kept(self) -> None:
        """Assert that what is kept is what is pinned and cached here, and that the free slots add up; for checks."""
        reserved = sum(group.width - group.num_resident for group in self.groups)
        assert self.num_free_slots == len(self._free_slots) - reserved, "a slot is lost, or counted twice"
        if not self._pins and not self.pool.num_kept:
            return
        pinned = {self.cache.find(key) for pin in self._pins for key in pin.keys[self.block_size]} - {None}
        assert set(self.pool.kept()) == pinned, "what is kept is not what is pinned and cached"

    def _remember_tail(self, sequence: Sequence) -> None:
        """Offer the last, partly filled block of a sequence that leaves."""
        size = self.block_size
        # the last token does not count: if it ended the sequence, the executor skips the row that would write it
        planned = min(self.num_planned(sequence), len(sequence.tokens) - 1)
        full = planned // size
        if not self._prefix_caching or not sequence.caches:
            return
        if planned % size == 0 or full != sequence.num_remembered:
            return
        parent = self._parent_of(sequence, full)
        tokens = sequence.tokens[full * size : planned]
        block = sequence.block_table[full]
        if self.pool.ref_count(block) == 1:
            key = self._chain.child(parent, tokens)
            self.cache.remember(key, parent, tokens, block, self.last_step, sequence.root)

    def forget_prefixes(self, root: BlockKey) -> Iterator[int]:
        """Let no prefix of this root be found before it is computed again. Yields how many blocks are forgotten."""
        for blocks in self.cache.forget_all(root):
            for block in blocks:
                self.pool.keep(block, None)
            yield len(blocks)

    def can_admit(self, sequence: Sequence, match: Match) -> bool:
        """Whether there is room for the sequence's known tokens."""
        return self._admits(sequence, match, self._watermark)

    def leaves_reserve(self, sequence: Sequence, match: Match) -> bool:
        """Whether enough would be left for tenants that run little here: one that sends without end takes the rest.

        Only tenants with a name make room for each other, and what has begun is not held up.
        """
        if sequence.account is not None or not self._runs_much(sequence.tenant):
            return True
        slots_left = self.num_free_slots - sequence.num_slots >= self._reserve_slots
        return slots_left and self._admits(sequence, match, self._watermark + self._reserve_blocks)

    def tenants_of_much(self) -> list[str]:
        """Those for whom the reserve is not."""
        return [tenant for tenant in self.tenants if self._runs_much(tenant)]

    def _runs_much(self, tenant: str) -> bool:
        """It has a name, and as many slots as the reserve."""
        return bool(tenant) and self.tenants[tenant] >= max(1, self._reserve_slots)

    def _admits(self, sequence: Sequence, match: Match, watermark: int) -> bool:
        return policy.admits(
            num_needed=self._blocks_needed(sequence, match),
            num_free=self.pool.num_free,
            num_promised=self.num_promised,
            watermark=watermark,
            idle=not self.running,
        )

    def _blocks_needed(self, sequence: Sequence, match: Match) -> int:
        """Free blocks that the sequence's known tokens will use up, those included that a match wakes."""
        held = sum(self.pool.ref_count(b) > 0 for b in match.blocks)
        copied = len(match.blocks) * self.block_size > match.num_tokens  # a fork writes into a copy of its last block
        beside = sequence.beams.blocks_beside(self.block_size) if sequence.beams is not None else 0
        return blocks_for(len(sequence.tokens), self.block_size) - held + copied + beside

    # ---- making a plan

    def draft(self, token_budget: int) -> Draft:
        """An empty plan for the next step."""
        return Draft(self._next_step, min(token_budget, self.facts.max_step_tokens))

    def take_block(self) -> BlockId:
        """A free block; what was remembered of it is forgotten."""
        failpoints.hit("before_block_alloc")
        block = self.pool.take()
        self.cache.forget(block)
        return block

    def admit(
        self, sequence: Sequence, match: Match, draft: Draft, num_tokens: int, stop_token_ids: tuple[int, ...]
    ) -> None:
        """Give the sequence a slot, the matched blocks and room for `num_tokens`, and tell it whole in the plan."""
        needed, num_free = self._blocks_needed(sequence, match), self.pool.num_free
        self._take_slot(sequence)
        sequence.num_computed = match.num_tokens
        sequence.num_remembered = match.num_tokens // self.block_size
        table = sequence.block_table = list(match.blocks)
        for block in table:
            self.pool.hold(block)
        if match.tail is not None:
            block = self.take_block()
            table.append(block)
            if block != match.tail.block:  # the source itself, when it was the next to be reused
                draft.copies.append((match.tail.block, block))
        self.make_room(sequence, match.num_tokens, num_tokens, draft, whole=True)
        self.num_promised += needed - (num_free - self.pool.num_free)
        draft.new.append(Admission(sequence, match.num_tokens, stop_token_ids))
        sequence.num_told = len(sequence.tokens)

    def _take_slot(self, sequence: Sequence) -> None:
        slot = heapq.heappop(self._free_slots)
        self._generations[slot] += 1
        sequence.session = self
        self.tenants[sequence.tenant] += 1
        sequence.ref = slot_ref(slot, self._generations[slot])
        group = sequence.beams
        if group is None:
            self.num_free_slots -= 1
            return
        if group not in self.groups:  # the slots of all its beams are its own from now on
            self.groups[group] = None
            self.num_free_slots -= group.width
        group.num_resident += 1

    def take_in(self, beam: Sequence, parent: Sequence | None = None) -> None:
        """Give a beam a slot, and what it shares with the beam that it was forked from. The executor hears of it later.

        Without a parent it has no block yet: it gets those that it shares with `share_prefix`.
        """
        self._take_slot(beam)
        beam.num_told = 0
        beam.is_pending = parent is None
        if parent is not None:
            self._share(beam, parent.block_table, parent.num_computed)

    def share_prefix(self, group: BeamGroup) -> None:
        """Once the first beam's row was planned for what all have in common, the others go on from there."""
        pending = [beam for beam in group.beams if beam.is_pending]
        if not pending:
            return
        leader, common = group.leader, group.num_common()
        if self.num_planned(leader) < common:
            return
        for beam in pending:
            match = self.match(beam)  # after a preemption, more of it may still be there
            blocks, num_tokens = match.blocks, len(match.blocks) * self.block_size
            if num_tokens < common:
                blocks, num_tokens = leader.block_table[: blocks_for(common, self.block_size)], common
            self._share(beam, blocks, num_tokens)

    def _share(self, beam: Sequence, blocks: list[BlockId], num_tokens: int) -> None:
        beam.block_table = list(blocks)
        for block in blocks:
            self.pool.hold(block)
        beam.num_computed = num_tokens
        beam.num_remembered = num_tokens // self.block_size
        beam.is_pending = False

    def _tell(self, beam: Sequence, num_computed: int, draft: Draft) -> None:
        """What the executor does not know of a beam that gets a row: the token that was chosen, or all of it."""
        group = beam.beams
        assert group is not None
        if not beam.num_told:
            draft.new.append(Admission(beam, num_computed, tuple(sorted(group.ends))))
        for token in beam.tokens[beam.num_told :] if beam.num_told else ():
            draft.told_refs.append(beam.ref)
            draft.told_tokens.append(token)
        beam.num_told = len(beam.tokens)

    def add_row(self, sequence: Sequence, num_planned: int, num_tokens: int, num_known: int, draft: Draft) -> None:
        """A row of the plan: compute positions [num_planned, num_planned + num_tokens). The blocks are there.

        `num_known` counts tokens that are sampled in flight, too.
        """
        stop = num_planned + num_tokens
        if sequence.beams is not None:
            self._tell(sequence, num_planned, draft)
        samples = stop == num_known and sequence.beams is None
        draft.rows[sequence.ref] = Row(sequence, sequence.attempt, num_tokens, samples, stop)
        draft.num_scheduled.append(num_tokens)
        if num_tokens > 1 or not (samples or sequence.beams is not None):
            draft.chunks[sequence.ref] = None
        draft.budget -= num_tokens
        if stop // self.block_size > sequence.num_remembered:
            self.remember(sequence, stop, draft.step)

    def extend_row(self, sequence: Sequence, num_tokens: int, num_known: int, draft: Draft) -> int:
        """Let the sequence's row compute up to `num_tokens` more, as far as there are free blocks. Returns how many."""
        row = draft.rows.get(sequence.ref)
        start = row.stop if row else self.num_planned(sequence)
        index = start // self.block_size
        table = sequence.block_table
        copied = index < len(table) and self.pool.ref_count(table[index]) > 1
        if copied and not self.pool.num_free:
            return 0
        room = (len(table) + self.pool.num_free - copied) * self.block_size - start
        tokens = min(num_tokens, room)
        if tokens <= 0:
            return 0
        num_free = self.pool.num_free
        whole = any(new.sequence is sequence for new in draft.new)
        self.make_room(sequence, start, tokens, draft, whole=whole)
        self.num_promised -= num_free - self.pool.num_free
        if row is None:
            self.add_row(sequence, start, tokens, num_known, draft)
        else:
            stop = start + tokens
            draft.rows[sequence.ref] = row._replace(
                num_scheduled=row.num_scheduled + tokens,
                samples=stop == num_known and sequence.beams is None,
                stop=stop,
            )
            draft.num_scheduled[list(draft.rows).index(sequence.ref)] += tokens
            draft.chunks[sequence.ref] = None
            draft.budget -= tokens
            self.remember(sequence, stop, draft.step)
        return tokens

    def add_drafts(self, row: Row, most: int, num_spare: int, draft: Draft) -> int:
        """Let the row carry up to `most` drafts, in its blocks and `num_spare` free ones; return how many it took."""
        sequence, table = row.sequence, row.sequence.block_table
        num_drafts = min(most, (len(table) + num_spare) * self.block_size - row.stop)
        if num_drafts <= 0:
            return 0
        num_blocks = len(table)
        whole = any(new.sequence is sequence for new in draft.new)
        self.make_room(sequence, row.stop, num_drafts, draft, whole=whole)
        draft.rows[sequence.ref] = row._replace(max_drafts=num_drafts)
        draft.num_drafts += num_drafts
        draft.budget -= num_drafts
        return len(table) - num_blocks

    def make_room(self, sequence: Sequence, start: int, num_tokens: int, draft: Draft, *, whole: bool = False) -> None:
        """Blocks for positions [start, start + num_tokens), none of them shared where it will be written.

        `whole`: the table is told whole in this plan, so its changes need no columns of their own.
        """
        whole = whole or sequence.is_untold
        table = sequence.block_table
        index = start // self.block_size
        if index < len(table) and self.pool.ref_count(table[index]) > 1:  # copy on write
            source, block = table[index], self.take_block()
            if start % self.block_size:
                draft.copies.append((source, block))
            self.pool.give_back(source, worth_keeping=True)
            table[index] = block
            if not whole:
                draft.replace_refs.append(sequence.ref)
                draft.replace_indices.append(index)
                draft.replace_blocks.append(block)
        for _ in range(blocks_for(start + num_tokens, self.block_size) - len(table)):
            block = self.take_block()
            table.append(block)
            if not whole:
                draft.append_refs.append(sequence.ref)
                draft.append_blocks.append(block)

    def send(self, draft: Draft, now_ns: int) -> StepPlan:
        """The plan, which is outstanding from now on."""
        first = next(iter(draft.rows.values())).sequence  # the first of those that go on
        had_work = first.arrived_ns < self._answered_ns
        held_since_ns = self._held_since_ns and max(self._held_since_ns, first.arrived_ns)
        self.outstanding.append(draft.sent(now_ns, had_work=had_work, held_since_ns=held_since_ns))
        self._held_since_ns = 0
        self.due_ns = self._next_due_ns()
        self._next_step += 1
        released, self._released = self._released, []
        return draft.plan(released)

    # ---- giving back

    def release(self, sequence: Sequence, *, forget: bool = False) -> None:
        """The sequence leaves: its blocks come free, after the last outstanding step that may write them.

        With `forget`, nothing it held is found again: its content is not to be trusted.
        """
        failpoints.hit("before_block_free")
        if forget:
            for block in sequence.block_table:
                self.cache.forget(block)
                self.pool.keep(block, None)
        else:
            self._remember_tail(sequence)
        last = max((f.step for f in self.outstanding if sequence.ref in f.rows), default=-1)
        blocks = sequence.block_table[::-1]  # the end of a prefix is worth less than its start: reused first
        if last < 0:
            self._free(blocks)
        else:
            self._returning.append((last, blocks))
        self.running.remove(sequence)
        self.tenants[sequence.tenant] -= 1
        if not self.tenants[sequence.tenant]:
            del self.tenants[sequence.tenant]
        if not sequence.is_untold:
            self._released.append(sequence.ref)
        heapq.heappush(self._free_slots, slot_of(sequence.ref))
        sequence.session = None
        sequence.is_pending = False
        group = sequence.beams
        if group is None:
            self.num_free_slots += 1
        else:
            group.num_resident -= 1
            if not group.num_resident:
                del self.groups[group]
                self.num_free_slots += group.width
        sequence.block_table = []
        sequence.num_computed = sequence.num_remembered = 0

    def timed(self, flight: Outstanding, result: StepResult, now_ns: int) -> None:
        """The step was answered now; the executor says how long it took, and how long it had waited for it."""
        self._answered_ns = now_ns
        if result.refs or result.embedded or result.ranked or not all(row.samples for row in flight.rows.values()):
            self.pace.add(flight.num_tokens, result.compute_ns)  # else all its rows had ended: it computed nothing
        self._lead.add(result.idle_ns, was_held=flight.held_since_ns > 0)
        self.occupancy.add(compute_ns=result.compute_ns, idle_ns=result.idle_ns if flight.had_work else 0)
        self.due_ns = self._next_due_ns()

    def fall_behind(self, refs: Iterable[SlotRef], answered: Outstanding) -> None:
        """What was answered for these, and is in flight, computes one position less far than it was planned to."""
        for flight in (answered, *self.outstanding):
            for ref in refs:
                row = flight.rows.get(ref)
                if row is not None:
                    flight.rows[ref] = row._replace(stop=row.stop - 1)

    @property
    def num_spare_blocks(self) -> int:
        """Free blocks that are nobody's soon: what drafts may take, which never take a block from a token."""
        return self.pool.num_free - self._watermark - max(0, self.num_promised) - len(self.running)

    def answered(self, step: int) -> None:
        """The step is done: blocks that waited for it come free."""
        waiting = self._returning
        self._returning = deque[tuple[int, list[BlockId]]]()
        for last, blocks in waiting:
            if last <= step:
                self._free(blocks)
            else:
                self._returning.append((last, blocks))

    def _free(self, blocks: Iterable[BlockId]) -> None:
        for block in blocks:
            self.pool.give_back(block, worth_keeping=block in self.cache)
