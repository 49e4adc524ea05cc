"""The tests that guard the core, guarded: each bug planted here must be caught by the same short crowd.

A checker that never complains proves nothing. Every mutation is a mistake that somebody could make in good faith.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import pytest

from common.step import StepPlan
from common.types import BlockId, SlotRef
from executor.fake_runner import SlabMismatch
from executor.resident import PlanError
from scheduler import scheduler as scheduler_module
from scheduler import session as session_module
from scheduler import suspicion
from scheduler.block_pool import BlockPool
from scheduler.moves import Moves
from scheduler.pins import PinLimits, Pins
from scheduler.planning import Planner
from scheduler.prefix_cache import BlockKey, KeyChain, Match, PrefixCache, Tail
from scheduler.prefixes import Prefixes
from scheduler.results import ProtocolError
from scheduler.scheduler import Scheduler, TokenOutput
from scheduler.sequence import Request
from scheduler.sequence import Sequence as Running
from scheduler.session import Session
from scheduler.steps import Draft, Outstanding, Row
from scheduler.suspicion import End, Suspects
from tests.scheduler.crowd import stories

Plant = Callable[[pytest.MonkeyPatch], None]


def a_block_is_freed_although_a_step_in_flight_writes_it(monkeypatch: pytest.MonkeyPatch) -> None:
    release = Session.release

    def at_once(self: Session, sequence: Running, *, forget: bool = False) -> None:
        release(self, sequence, forget=forget)
        self.answered(self.last_step)

    monkeypatch.setattr(Session, "release", at_once)


def a_fork_shares_its_last_block_without_a_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    make_room = Session.make_room

    def without_copies(self: Session, *args: Any, **kwargs: Any) -> None:
        draft: Draft = args[3]
        before = len(draft.copies)
        make_room(self, *args, **kwargs)
        del draft.copies[before:]

    monkeypatch.setattr(Session, "make_room", without_copies)


def a_shared_block_is_written_in_place(monkeypatch: pytest.MonkeyPatch) -> None:
    def as_if_alone(
        self: Session, sequence: Running, start: int, num: int, draft: Draft, *, whole: bool = False
    ) -> None:
        while len(sequence.block_table) * self.block_size < start + num:
            block = self.take_block()
            sequence.block_table.append(block)
            if not whole:
                draft.append_refs.append(sequence.ref)
                draft.append_blocks.append(block)

    monkeypatch.setattr(Session, "make_room", as_if_alone)


def a_tail_is_shared_without_a_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    admit = Session.admit

    def without_tail_copy(self: Session, sequence: Running, match: Match, draft: Draft, *args: Any) -> None:
        admit(self, sequence, match, draft, *args)
        if match.tail is not None:
            draft.copies[:] = [copy for copy in draft.copies if copy[0] != match.tail.block]

    monkeypatch.setattr(Session, "admit", without_tail_copy)


def a_key_does_not_name_what_stands_before(monkeypatch: pytest.MonkeyPatch) -> None:
    child = KeyChain.child
    monkeypatch.setattr(KeyChain, "child", lambda self, parent, tokens: child(self, BlockKey(b"any"), tokens))


def a_key_does_not_name_the_tenant(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(KeyChain, "root", lambda self, *parts: BlockKey(b"everybody"))


def a_slot_keeps_its_generation(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session_module, "slot_ref", lambda slot, generation: SlotRef(slot))


def a_reused_block_is_not_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Session, "take_block", lambda self: self.pool.take())


def a_block_counts_as_written_one_step_too_early(monkeypatch: pytest.MonkeyPatch) -> None:
    find_tail = PrefixCache.find_tail

    def too_early(self: PrefixCache, parent: BlockKey, tokens: Sequence[int], before_step: int) -> Tail | None:
        return find_tail(self, parent, tokens, before_step + 1)

    monkeypatch.setattr(PrefixCache, "find_tail", too_early)


def a_prefix_hit_is_not_held(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(BlockPool, "hold", lambda self, block: None)


def a_block_is_given_back_twice_when_it_is_shared(monkeypatch: pytest.MonkeyPatch) -> None:
    give_back = BlockPool.give_back

    def whole(self: BlockPool, block: BlockId, *, worth_keeping: bool) -> None:
        for _ in range(self.ref_count(block)):
            give_back(self, block, worth_keeping=worth_keeping)

    monkeypatch.setattr(BlockPool, "give_back", whole)


def a_token_that_ended_a_sequence_counts_as_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    remember_tail = Session._remember_tail

    def with_the_last(self: Session, sequence: Running) -> None:
        sequence.tokens.append(0)
        remember_tail(self, sequence)
        sequence.tokens.pop()

    monkeypatch.setattr(Session, "_remember_tail", with_the_last)


def a_token_of_an_earlier_placement_is_committed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Row, "is_current", property(lambda row: not row.sequence.reason))


def a_plan_forgets_what_is_in_flight(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Session, "in_flight", lambda self, sequence: (0, 0))


def a_moved_sequence_loses_its_last_token(monkeypatch: pytest.MonkeyPatch) -> None:
    wait_again = Moves.wait_again

    def shorter(self: Moves, sequence: Running) -> None:
        if sequence.num_output:
            sequence.tokens.pop()
        wait_again(self, sequence)

    monkeypatch.setattr(Moves, "wait_again", shorter)


def a_suspect_is_never_trusted_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Suspects, "answered", lambda self, flight: None)


def a_chunk_before_the_place_clears_a_suspect(monkeypatch: pytest.MonkeyPatch) -> None:
    def by_any_row(self: Suspects, flight: Outstanding) -> None:
        for row in flight.rows.values():
            self.forget(row.sequence)

    monkeypatch.setattr(Suspects, "answered", by_any_row)


def only_the_oldest_step_is_blamed(monkeypatch: pytest.MonkeyPatch) -> None:
    blamed = suspicion.blamed
    monkeypatch.setattr(scheduler_module, "blamed", lambda end, flights, step: blamed(end, flights, step)[:1])


def every_step_in_flight_is_blamed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scheduler_module, "blamed", lambda end, flights, step: flights if end is End.LOST else [])


def wrong_answers_accuse_requests(monkeypatch: pytest.MonkeyPatch) -> None:
    blamed = suspicion.blamed
    monkeypatch.setattr(
        scheduler_module,
        "blamed",
        lambda end, flights, step: flights[:1] if end is End.WRONG else blamed(end, flights, step),
    )


def a_request_is_given_up_at_its_second_death(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(suspicion, "GIVEN_UP_AT", 2)


def nobody_is_ever_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(suspicion, "GIVEN_UP_AT", 10**6)


def a_request_that_must_run_alone_is_admitted_like_all_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(suspicion, "ALONE_AT", 10**6)


def a_trial_does_not_wait_for_what_is_in_flight(monkeypatch: pytest.MonkeyPatch) -> None:
    plan_trial = Planner._plan_trial

    def at_once(self: Planner, session: Session, trial: Request, now_ns: int) -> StepPlan | None:
        outstanding, session.outstanding = session.outstanding, deque()
        try:
            plan = plan_trial(self, session, trial, now_ns)
        finally:
            outstanding.extend(session.outstanding)
            session.outstanding = outstanding
        return plan

    monkeypatch.setattr(Planner, "_plan_trial", at_once)


def others_do_not_pause_during_a_trial(monkeypatch: pytest.MonkeyPatch) -> None:
    grant = Planner._grant_running
    monkeypatch.setattr(Planner, "_grant_running", lambda self, session, draft, trial=None: grant(self, session, draft))


def a_row_without_a_token_ends_its_choice_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    unusable = Scheduler._unusable

    def at_once(self: Scheduler, session: Session, sequence: Running, now_ns: int) -> list[TokenOutput]:
        sequence.unusable_at = len(sequence.tokens)
        return unusable(self, session, sequence, now_ns)

    monkeypatch.setattr(Scheduler, "_unusable", at_once)


def what_is_in_flight_of_a_row_without_a_token_still_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    unusable = Scheduler._unusable

    def as_before(self: Scheduler, session: Session, sequence: Running, now_ns: int) -> list[TokenOutput]:
        attempt = sequence.attempt
        outputs = unusable(self, session, sequence, now_ns)
        sequence.attempt = attempt
        return outputs

    monkeypatch.setattr(Scheduler, "_unusable", as_before)


def an_acquittal_is_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Suspects, "acquit", lambda self, session_id: None)


def a_row_is_topped_up_from_the_wrong_place(monkeypatch: pytest.MonkeyPatch) -> None:
    extend = Session.extend_row

    def from_its_start(self: Session, sequence: Running, num_tokens: int, num_known: int, draft: Draft) -> int:
        row = draft.rows.get(sequence.ref)
        if row is not None:
            draft.rows[sequence.ref] = row._replace(stop=row.stop - 1)
        return extend(self, sequence, num_tokens, num_known, draft)

    monkeypatch.setattr(Session, "extend_row", from_its_start)


def a_key_does_not_name_the_salt(monkeypatch: pytest.MonkeyPatch) -> None:
    root = KeyChain.root
    monkeypatch.setattr(KeyChain, "root", lambda self, model, tenant, salt: root(self, model, tenant))


def who_wants_nothing_of_the_cache_leaves_something_there(monkeypatch: pytest.MonkeyPatch) -> None:
    remember = Session.remember

    def always(self: Session, sequence: Running, num_written: int, step: int) -> None:
        caches, sequence.caches = sequence.caches, True
        remember(self, sequence, num_written, step)
        sequence.caches = caches

    monkeypatch.setattr(Session, "remember", always)


def a_pin_that_is_over_keeps_its_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Prefixes, "_end_pin", lambda self, pin: self.pins.remove(pin))


def a_pin_keeps_only_what_is_cached_when_it_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    remember = Session.remember

    def unpinned(self: Session, sequence: Running, num_written: int, step: int) -> None:
        pins, self._pins = self._pins, Pins(self._chain, PinLimits())
        remember(self, sequence, num_written, step)
        self._pins = pins

    monkeypatch.setattr(Session, "remember", unpinned)


def a_block_that_is_not_to_be_trusted_stays_pinned(monkeypatch: pytest.MonkeyPatch) -> None:
    keep = BlockPool.keep
    monkeypatch.setattr(BlockPool, "keep", lambda self, block, rank: keep(self, block, rank) if rank else None)


MUTATIONS: list[Plant] = [
    a_key_does_not_name_the_salt,
    who_wants_nothing_of_the_cache_leaves_something_there,
    a_pin_that_is_over_keeps_its_blocks,
    a_pin_keeps_only_what_is_cached_when_it_is_made,
    a_block_that_is_not_to_be_trusted_stays_pinned,
    a_block_is_freed_although_a_step_in_flight_writes_it,
    a_fork_shares_its_last_block_without_a_copy,
    a_shared_block_is_written_in_place,
    a_tail_is_shared_without_a_copy,
    a_key_does_not_name_what_stands_before,
    a_key_does_not_name_the_tenant,
    a_slot_keeps_its_generation,
    a_reused_block_is_not_forgotten,
    a_block_counts_as_written_one_step_too_early,
    a_prefix_hit_is_not_held,
    a_block_is_given_back_twice_when_it_is_shared,
    a_token_that_ended_a_sequence_counts_as_computed,
    a_token_of_an_earlier_placement_is_committed,
    a_plan_forgets_what_is_in_flight,
    a_moved_sequence_loses_its_last_token,
    a_suspect_is_never_trusted_again,
    a_chunk_before_the_place_clears_a_suspect,
    only_the_oldest_step_is_blamed,
    every_step_in_flight_is_blamed,
    wrong_answers_accuse_requests,
    a_request_is_given_up_at_its_second_death,
    nobody_is_ever_given_up,
    a_request_that_must_run_alone_is_admitted_like_all_others,
    a_trial_does_not_wait_for_what_is_in_flight,
    others_do_not_pause_during_a_trial,
    a_row_without_a_token_ends_its_choice_at_once,
    what_is_in_flight_of_a_row_without_a_token_still_counts,
    an_acquittal_is_forgotten,
    a_row_is_topped_up_from_the_wrong_place,
]


@pytest.mark.parametrize("plant", MUTATIONS, ids=lambda plant: plant.__name__)
def test_the_crowd_notices_when(plant: Plant, monkeypatch: pytest.MonkeyPatch) -> None:
    plant(monkeypatch)
    # an IndexError is a block table that is shorter than what the scheduler believes is in it
    with pytest.raises((AssertionError, SlabMismatch, PlanError, ProtocolError, IndexError)):
        for _ in stories(num_seeds=120, num_events=120):
            pass
