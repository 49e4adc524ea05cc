"""The next step of one executor: rows for those that run there, then for those that are admitted.

`scheduler/policy.py` decides over numbers; here the numbers are read off, and the decision becomes moves and blocks.
"""

from __future__ import annotations

from collections.abc import Mapping

from common.blocks import blocks_for
from common.step import StepPlan
from scheduler import policy, speculation
from scheduler.block_pool import Reclaim
from scheduler.counters import Counters
from scheduler.line import Line
from scheduler.moves import Moves, rank
from scheduler.placement import Placement, fork_match, fork_parent
from scheduler.prefix_cache import Match
from scheduler.recorder import Recorder
from scheduler.replays import Replays
from scheduler.sequence import Request, Sequence
from scheduler.session import Session
from scheduler.steps import Draft, Row
from scheduler.suspicion import Suspects, is_on_trial, runs_alone, who_waits
from scheduler.trials import Trials


class Planner:
    """Makes step plans, and the moves that they take.

    `token_budget`: of a step, over all its sequences. `patience_ns`: nobody is kept waiting for an executor that left a
    step unanswered for so long.
    """

    def __init__(
        self,
        sessions: Mapping[int, Session],
        line: Line,
        moves: Moves,
        suspects: Suspects,
        replays: Replays,
        counters: Counters,
        recorder: Recorder,
        *,
        token_budget: int,
        patience_ns: int,
    ) -> None:
        self._line = line
        self._moves = moves
        self._placement = Placement(sessions, line, patience_ns=patience_ns)
        self._trials = Trials(sessions, suspects, counters, patience_ns=patience_ns)
        self._suspects = suspects
        self._replays = replays
        self._counters = counters
        self._recorder = recorder
        self._token_budget = token_budget

    def plan(self, session: Session, now_ns: int) -> StepPlan | None:
        """The executor's next step, which has credit for it; None when there is nothing to do."""
        if session.speculates:  # what comes next of those rows is not known; the others alone are not worth a step
            return None
        if self._suspects or session.trial:
            trial = session.trial = self._trials.here(session, now_ns)
            if trial is not None:
                return self._plan_trial(session, trial, now_ns)
        owed = self._yield_slot(session, now_ns)
        draft = session.draft(self._token_budget)
        self._grant_running(session, draft)
        if session.takes_work(now_ns):
            self._admit_waiting(session, draft, now_ns, only=owed)
        if self._replays and draft.budget:  # nobody else wanted it
            self._top_up(session, draft)
            if session.takes_work(now_ns) and not session.full:
                draft.replay_budget = draft.budget
                self._admit_waiting(session, draft, now_ns)
        if session.facts.max_drafts and draft.rows:
            self._add_drafts(session, draft)
        if not draft.rows:
            assert session.outstanding or not session.running or self._suspects, (
                "sequences run, and nothing will ever wake them"
            )
            return None
        self._counters.steps += 1
        self._recorder.planned(draft)
        return session.send(draft, now_ns)

    def _plan_trial(self, session: Session, trial: Request, now_ns: int) -> StepPlan | None:
        """The next step of an executor that one request has to itself.

        Who else is resident pauses, and keeps what it has while there is room. What others have in flight is answered
        before anything of the trial is sent.
        """
        if any(not is_on_trial(row.sequence, trial) for flight in session.outstanding for row in flight.rows.values()):
            return None
        draft = session.draft(self._token_budget)
        self._grant_running(session, draft, trial)
        draft.replay_budget = draft.budget
        for sequence in sorted(dict.fromkeys(map(who_waits, trial.doubts)), key=rank):
            if sequence.session is None and draft.budget and not session.leaving:
                match = self._make_way(session, sequence, trial)
                if match is not None:
                    self._moves.admit(sequence, session, match, draft, now_ns)
        if not draft.rows:
            return None
        self._counters.steps += 1
        self._recorder.planned(draft)
        return session.send(draft, now_ns)

    def _make_way(self, session: Session, sequence: Sequence, trial: Request) -> Match | None:
        """Preempt who pauses, the youngest first, until the sequence fits. None while its siblings fill the room."""
        while True:
            match = session.match(sequence)
            if session.num_free_slots >= sequence.num_slots and session.can_admit(sequence, match):
                return match
            paused = [other for other in session.running if not is_on_trial(other, trial)]
            if not paused:
                return None
            self._moves.preempt(session, paused[-1], "trial")

    def _grant_running(self, session: Session, draft: Draft, trial: Request | None = None) -> None:
        """Rows for the running sequences; with a trial, for those on trial alone."""
        for group in session.groups:
            session.share_prefix(group)
        running = list(session.running)
        if trial is not None:
            running.sort(key=lambda sequence: not is_on_trial(sequence, trial))  # those that pause count as younger
        block_size, ref_count = session.block_size, session.pool.ref_count
        rows: list[policy.Running] = []
        known: list[int] = []
        for sequence in running:
            computed, sampled = session.in_flight(sequence)
            planned = sequence.num_computed + computed
            num_known = len(sequence.tokens) + sampled
            table = sequence.block_table
            # nothing follows the last token it may have, nor is that token's K and V ever needed
            num_uncomputed = num_known - planned if num_known < sequence.max_length and not sequence.is_pending else 0
            index = planned // block_size
            shared = index < len(table) and ref_count(table[index]) > 1
            group_id = -1 if sequence.beams is None else sequence.request.id
            rows.append(policy.Running(num_uncomputed, planned, len(table), shared, group_id))
            known.append(num_known)
        if self._suspects:
            for i, sequence in enumerate(running):
                if not is_on_trial(sequence, trial) if trial else runs_alone(sequence.request):
                    rows[i] = rows[i]._replace(num_uncomputed=0)  # pauses
        replays = self._replays.among(running, rows) if self._replays else ()
        reclaim = Reclaim(session.pool)
        decision = policy.decide(
            rows,
            token_budget=draft.budget,
            num_free=session.pool.num_free,
            num_returning=sum(reclaim.add(table, late=True)[1] for table in session.returning()),
            block_size=block_size,
            yield_of=lambda i: reclaim.add(running[i].block_table, late=rows[i].num_planned > running[i].num_computed),
            replays=replays,
            replays_waiting=self._replays.num_tokens_waiting(draft.budget) if self._replays and session.has_slot else 0,
        )
        for i in decision.preempted:
            if running[i].session is session:  # else it went with others of its group
                self._moves.preempt(session, running[i])
        num_promised = sum(group.blocks_pending(session.block_size) for group in session.groups)
        for sequence, row, num_known, tokens, blocks in zip(
            running, rows, known, decision.grants, decision.blocks, strict=True
        ):
            if blocks:
                session.make_room(sequence, row.num_planned, tokens, draft)
            if tokens:
                session.add_row(sequence, row.num_planned, tokens, num_known, draft)
            if tokens < row.num_uncomputed and sequence.session is session:
                num_promised += max(0, blocks_for(num_known, block_size) - len(sequence.block_table))
        session.num_promised = num_promised  # blocks that what is known of them will still need
        draft.replay_budget = decision.replay_budget_left

    def _top_up(self, session: Session, draft: Draft) -> None:
        """What of the budget was kept for others, and not wanted, goes to the rows that could use more."""
        for sequence in session.running:
            if not draft.budget:
                return
            if runs_alone(sequence.request) or sequence.is_pending:
                continue
            row = draft.rows.get(sequence.ref)
            sampled = session.in_flight(sequence)[1]
            planned = row.stop if row else session.num_planned(sequence)
            num_known = len(sequence.tokens) + sampled
            if planned < num_known < sequence.max_length:
                session.extend_row(sequence, min(num_known - planned, draft.budget), num_known, draft)

    def _add_drafts(self, session: Session, draft: Draft) -> None:
        """What the step has left may go to guesses: behind rows that reach the end of what is known."""
        facts = session.facts
        rows: list[Row] = []
        candidates: list[speculation.Candidate] = []
        for row in draft.rows.values():
            sequence = row.sequence
            if not row.samples or sequence.max_drafts == 0 or sequence.put_off_at == len(sequence.tokens):
                continue
            most = facts.max_drafts if sequence.max_drafts is None else min(sequence.max_drafts, facts.max_drafts)
            rows.append(row)
            candidates.append(
                speculation.Candidate(
                    chance=sequence.acceptance.chance(draft.step),
                    most=min(most, sequence.max_length - row.stop - 1),  # the row brings one token in any case
                )
            )
        drafts = speculation.share(
            candidates,
            num_tokens=sum(draft.num_scheduled),
            overhead=facts.step_overhead_tokens,
            room=draft.budget,
            draft_cost=facts.draft_cost,
        )
        num_spare = session.num_spare_blocks
        for row, most in zip(rows, drafts, strict=True):
            if most:
                num_spare -= session.add_drafts(row, most, max(0, num_spare), draft)

    def _yield_slot(self, session: Session, now_ns: int) -> Sequence | None:
        """While all slots are taken, the one that was let in last makes way for a tenant that was served too little.

        Returns for whom. One in each step, and never one whose tenant is owed something itself, or has no name.
        """
        if session.has_slot or self._suspects or self._replays:
            return None
        if not session.takes_work(now_ns) or session.is_quarantined(now_ns):
            return None
        owed = self._line.first_owed(now_ns)
        if owed is None or owed.avoid or not session.could_hold(owed) or 0 < owed.deadline_ns <= now_ns:
            return None
        if owed.num_slots > 1:
            return None  # one slot is of no use to it
        if not session.can_admit(owed, session.match(owed)) or self._placement.has_slot_elsewhere(session, now_ns):
            return None
        for sequence in reversed(session.running):
            if sequence.tenant and not self._line.owes(sequence.tenant):
                self._moves.preempt(session, sequence, "tenant_share")
                return owed
        return None

    def _admit_waiting(self, session: Session, draft: Draft, now_ns: int, *, only: Sequence | None = None) -> None:
        session.full = False
        if draft.budget == 0 or not session.has_slot:
            return  # before anybody is looked at
        quarantined = session.is_quarantined(now_ns)
        passed_over: set[str] = set()
        # a slot that somebody gave up is for one alone: the rest of the line need not be looked at
        for sequence in self._line.walk(now_ns, passed_over) if only is None else (only,):
            if draft.budget == 0 or not session.has_slot:
                self._recorder.waits(sequence, "token_budget" if session.has_slot else "no_slot")
                return
            if 0 < sequence.deadline_ns <= now_ns:
                self._recorder.waits(sequence, "deadline")
                continue  # nobody waits for its answer
            if (quarantined or sequence.avoid) and not self._placement.may_come(
                sequence, session, now_ns, quarantined=quarantined
            ):
                self._recorder.waits(sequence, "quarantine")
                continue
            if self._suspects and runs_alone(sequence.request):
                self._recorder.waits(sequence, "runs_alone")
                continue  # it is tried when an executor can be its own
            if self._replays and not draft.replay_budget and sequence in self._replays:
                self._recorder.waits(sequence, "replays")
                continue  # the replays before it have their share
            parent = fork_parent(sequence, now_ns)
            if parent is not None:
                match = fork_match(session, parent)
                if match is None:
                    self._recorder.waits(sequence, "siblings")
                    continue  # its turn comes when the prompt is computed
            elif not session.could_hold(sequence):
                self._recorder.waits(sequence, "too_large")
                continue
            else:
                match = session.match(sequence)
                if not self._placement.belongs_here(sequence, session, match, now_ns):
                    self._recorder.waits(sequence, "better_elsewhere")
                    continue
            if not (session.leaves_reserve(sequence, match) or self._line.owes(sequence.tenant)):
                passed_over.update(t for t in session.tenants_of_much() if not self._line.owes(t))
                self._recorder.waits(sequence, "reserve")
                continue  # what is left is for the others
            if session.num_free_slots < sequence.num_slots or not session.can_admit(sequence, match):
                session.full = True
                self._recorder.waits(sequence, "memory" if session.num_free_slots >= sequence.num_slots else "no_slot")
                return  # nobody overtakes: small requests must not starve a large one
            self._moves.admit(sequence, session, match, draft, now_ns)
