"""The deterministic core: requests, aborts, executors and results go in; step plans and tokens come out.

No clock (time is an argument), thread, socket, tensor or message inside. The same calls give the same answers, so a
recorded log replays and a thousand crashes can be simulated in one thread.

There is no prefill phase and no decode phase. A sequence has tokens that are known and tokens that are computed, and
each step lets the second catch up with the first under one token budget; the idea is vLLM's. Chunked prefill, decode,
prefix hits, preemption and the move to another executor are all that one rule.
"""

from __future__ import annotations

import bisect
from array import array
from collections.abc import Iterator, Mapping, Set
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from typing import NamedTuple

from common import failpoints
from common.blocks import blocks_for
from common.errors import InvalidRequest
from common.sampling import SamplingParams, StopConditions
from common.step import ExecutorFacts, StepPlan, StepResult
from common.types import FinishReason, Priority, SequenceId
from scheduler import policy
from scheduler.block_pool import Reclaim
from scheduler.line import Line
from scheduler.prefix_cache import KeyChain
from scheduler.reputation import Patience, Reputations
from scheduler.sequence import Begun, Request, Sequence, Status
from scheduler.session import Draft, Match, Outstanding, Session
from scheduler.stopping import finish_reason, stop_tokens
from scheduler.suspicion import End, Suspects, blamed, runs_alone


class ProtocolError(Exception):
    """An executor answered what it was not asked. Its session cannot go on; its sequences can.

    `culprit` is the sequence whose row was wrong, where it was one row's token or index.
    """

    def __init__(self, message: str, culprit: Sequence | None = None) -> None:
        super().__init__(message)
        self.culprit = culprit


class TokenOutput(NamedTuple):
    """One committed token, or the end of a sequence without one (token is None)."""

    id: SequenceId
    token: int | None
    reason: FinishReason


class Losses(NamedTuple):
    """What ended with an executor. Everything else that it held goes on elsewhere."""

    ended: list[TokenOutput]  # choices that end alone
    given_up: list[Request]  # executors died with them, again and again


@dataclass(frozen=True, slots=True, kw_only=True)
class SchedulerLimits:
    """How the core shares what there is."""

    token_budget: int = 2048  # tokens per step over all sequences
    max_running: int = 256  # sequences resident on one executor
    patience_ns: int = 1_000_000_000  # nobody is kept waiting for an executor that answered nothing for so long
    watermark: float = 0.01  # share of the blocks that admissions leave to running sequences
    reserve: float = 1 / 16  # of an executor: kept for tenants that run less than it there, or were served too little
    prefix_caching: bool = True
    patience: Patience = field(default_factory=Patience)  # with executors that die young or send what cannot be used


@dataclass(slots=True)
class Counters:
    """What happened so far. Only ever counted up."""

    steps: int = 0
    preemptions: int = 0
    moved: int = 0  # sequences that lost their executor
    rows_dropped: int = 0  # result rows of another attempt or index
    results_fenced: int = 0  # results of a session that is over, dropped whole
    unclean_ends: int = 0  # sessions that ended otherwise than by leaving
    suspected: int = 0  # requests that were in a step that an executor may have died of, each time
    trials: int = 0  # requests that had an executor to themselves for that
    given_up: int = 0  # requests that ended because executors died with them
    rows_unusable: int = 0  # result rows that had no token, or one that cannot be
    quarantines: int = 0  # of executors that sent too many of those
    prompt_tokens: int = 0
    cached_prompt_tokens: int = 0
    output_tokens: int = 0
    finished: dict[FinishReason, int] = field(default_factory=dict[FinishReason, int])


class Scheduler:
    """Queues, sequences and sessions. Every method is quick and never waits.

    `weights`: the shares of the tenants while there is not room for all; 1 where none is given.
    """

    def __init__(
        self,
        limits: SchedulerLimits,
        *,
        model: str,
        eos: Set[int],
        secret: bytes,
        weights: Mapping[str, float] | None = None,
    ) -> None:
        self._limits = limits
        self._model = model
        self._eos = frozenset(eos)
        self._keys = KeyChain(secret)
        self._line = Line(weights)
        self._sequences: dict[SequenceId, Sequence] = {}
        self._sessions: dict[int, Session] = {}
        self._suspects = Suspects()
        self._reputations = Reputations()
        self._replays: dict[Sequence, None] = {}  # those that compute again what a lost executor had
        self._next_id = 0
        self._next_resumed = -(1 << 62)  # their order: before all that is new here, and among themselves as they come
        self.counters = Counters()

    # ---- what there is

    @property
    def sessions(self) -> Seq[Session]:
        """The executors that are joined."""
        return list(self._sessions.values())

    @property
    def waiting(self) -> Line:
        """Sequences that no executor holds."""
        return self._line

    @property
    def num_sequences(self) -> int:
        """Sequences that are not finished."""
        return len(self._sequences)

    @property
    def num_suspects(self) -> int:
        """Requests that executors may have died of."""
        return len(self._suspects)

    @property
    def max_length(self) -> int | None:
        """Tokens that one sequence can have on the largest executor; None while there is none."""
        return max((s.max_length for s in self._sessions.values() if not s.leaving), default=None)

    def session(self, session_id: int) -> Session:
        """The session of an executor that is joined."""
        return self._sessions[session_id]

    def sequence(self, id: SequenceId) -> Sequence:
        """A sequence that is not finished."""
        return self._sequences[id]

    def fits_somewhere(self, sequence: Sequence) -> bool:
        """Whether an executor that is joined now could ever hold the sequence whole."""
        return any(sequence.max_length <= s.max_length and not s.leaving for s in self._sessions.values())

    # ---- requests

    def weigh(self, tenant: str, weight: float) -> None:
        """The tenant's share, while there is not room for all; 1 until it is told."""
        self._line.weigh(tenant, weight)

    def add(
        self,
        prompt: Seq[int],
        sampling: SamplingParams,
        stop: StopConditions,
        now_ns: int,
        *,
        choices: int = 1,
        begun: Mapping[int, Begun] | None = None,
        tenant: str = "",
        salt: str = "",
        priority: Priority = Priority.NORMAL,
        expected_output: int | None = None,
        deadline_ns: int = 0,
    ) -> list[Sequence]:
        """Queue one request: `choices` sequences that share the prompt.

        Or with `begun`, by choice, those that go on behind what another scheduler made of them, and only those: if that
        was a token at least, before what their tenant asks anew. None of them may have ended: what they begin with is
        not looked at again.

        `expected_output`: tokens that each is expected to generate; max_tokens unless told. From `deadline_ns` on, if
        that is not 0, it is not begun: whoever set the deadline then finishes it.

        Raises InvalidRequest when it could never run: the prompt, or prompt and max_tokens together, are longer than
        the largest joined executor can hold.
        """
        limit = self.max_length
        if limit is not None:
            if len(prompt) >= limit:
                raise InvalidRequest("prompt", f"{len(prompt)} tokens leave no room in the context of {limit}")
            if len(prompt) + stop.max_tokens > limit:
                room = limit - len(prompt)
                problem = f"at most {room} after a prompt of {len(prompt)} tokens, got {stop.max_tokens}"
                raise InvalidRequest("max_tokens", problem)
        root = self._keys.root(self._model, tenant, salt)
        resumed = any(before.tokens for before in begun.values()) if begun is not None else False
        num_choices = choices if begun is None else len(begun)
        request = Request(id=SequenceId(self._next_id), num_choices=num_choices, resumed=resumed)
        made: list[Sequence] = []
        output = stop.max_tokens if expected_output is None else min(expected_output, stop.max_tokens)
        for choice in range(choices) if begun is None else begun:
            id = SequenceId(self._next_id)
            before = begun[choice] if begun else Begun((), "")
            tokens = array("I", prompt)
            tokens.extend(before.tokens)
            order = self._next_id
            if resumed:
                order = self._next_resumed
                self._next_resumed += 1
            sequence = Sequence(
                id=id,
                request=request,
                order=order,
                tokens=tokens,
                num_prompt=len(prompt),
                num_begun=len(before.tokens),
                root=root,
                sampling=sampling,
                stop=stop,
                choice=choice,
                tenant=tenant,
                priority=priority,
                cost=output if made else output + len(prompt),
                deadline_ns=deadline_ns,
                fork_of=made[0] if made and begun is None else None,
                determinism=before.determinism if before.tokens else None,
                arrived_ns=now_ns,
            )
            assert sequence.num_output < stop.max_tokens, f"choice {choice} has ended with {sequence.num_output} tokens"
            self._next_id += 1
            self._sequences[id] = sequence
            made.append(sequence)
        self._line.add(made)
        self.counters.prompt_tokens += len(prompt) * len(made)
        return made

    def finish(self, id: SequenceId, reason: FinishReason = FinishReason.ABORTED) -> None:
        """End a sequence now: its caller left, its deadline passed, or a stop string matched. Twice is harmless."""
        sequence = self._sequences.get(id)
        if sequence is not None:
            self._end(sequence, reason)

    # ---- executors

    def join(self, session_id: int, facts: ExecutorFacts, now_ns: int) -> None:
        """An executor is there, empty. One that died young again and again gets no work for a while."""
        assert session_id not in self._sessions, f"session {session_id} joined twice"
        reputation = self._reputations.of(facts.name)
        self._sessions[session_id] = Session(
            session_id,
            facts,
            self._keys,
            reputation=reputation,
            joined_ns=now_ns,
            held_until_ns=now_ns + reputation.hold_ns(self._limits.patience),
            prefix_caching=self._limits.prefix_caching,
            max_running=self._limits.max_running,
            watermark=int(self._limits.watermark * facts.num_blocks),
            reserve=self._limits.reserve,
        )

    def leave(self, session_id: int) -> None:
        """The executor takes no new sequences; those it holds go on there until it is lost."""
        session = self._sessions.get(session_id)
        if session is not None:
            session.leaving = True

    def fell_silent(self, session_id: int) -> None:
        """Nothing was heard of the executor for a while: it gets no plan until it speaks again, or is lost."""
        session = self._sessions.get(session_id)
        if session is not None:
            session.silent = True

    def spoke(self, session_id: int) -> None:
        """The executor that fell silent is heard again."""
        session = self._sessions.get(session_id)
        if session is not None:
            session.silent = False

    def lose(self, session_id: int, now_ns: int, end: End, *, step: int = 0, culprit: Sequence | None = None) -> Losses:
        """The executor is gone, with all it held. Its sequences wait again at their old place in the line.

        `step` is the one it was in by its own word, or had not passed. `culprit` is the sequence of a wrong row: a
        second one in the same place ends that choice, so that it cannot cost one session after the other.
        """
        session = self._sessions.pop(session_id, None)
        losses = Losses([], [])
        if session is None:
            return losses
        flights = list(session.outstanding)
        session.outstanding.clear()  # nothing in flight will ever be answered
        for sequence in list(session.running):
            session.release(sequence)
            self._wait_again(sequence)
            self._replay(sequence)
            self.counters.moved += 1
        if end is End.CLEAN:
            session.reputation.young_deaths = 0
            self._reputations.keep(session.facts.name, session.reputation)
            return losses
        self.counters.unclean_ends += 1
        session.reputation.died(now_ns - session.joined_ns, self._limits.patience)
        self._reputations.keep(session.facts.name, session.reputation)
        accused, given_up = self._suspects.accuse(session_id, blamed(end, flights, step))
        self.counters.suspected += len(accused)
        for request in given_up:
            self.counters.given_up += 1
            for sequence in self._sequences_of(request):
                self._end(sequence, FinishReason.ERROR)
            losses.given_up.append(request)
        for request in accused:
            if runs_alone(request):
                self._withdraw(request)
        if culprit is not None and not culprit.reason:
            losses.ended.extend(self._unusable(session, culprit, now_ns))
        return losses

    def acquit(self, session_id: int, name: str) -> None:
        """The process behind a session that was lost is alive: it was the link that broke, and no request broke it."""
        self._suspects.acquit(session_id)
        reputation = self._reputations.of(name)
        reputation.young_deaths = max(0, reputation.young_deaths - 1)
        self._reputations.keep(name, reputation)

    def held_back_ns(self, now_ns: int) -> int:
        """Time until the first of the executors that are held back may take work; 0 while there is none."""
        untils = [max(s.held_until_ns, s.reputation.quarantined_until_ns) for s in self._sessions.values()]
        return min((until - now_ns for until in untils if until > now_ns), default=0)

    # ---- steps

    def schedule(self, session_id: int, now_ns: int) -> StepPlan | None:
        """The next step of an executor, or None when there is nothing to do or no credit."""
        session = self._sessions[session_id]
        if session.silent or not session.has_credit:
            return None
        if self._suspects or session.trial:
            trial = session.trial = self._trial_here(session, now_ns)
            if trial is not None:
                return self._schedule_trial(session, trial, now_ns)
        draft = session.draft(self._limits.token_budget)
        self._grant_running(session, draft)
        if session.takes_work(now_ns):
            self._admit_waiting(session, draft, now_ns)
        if self._replays and draft.budget:  # nobody else wanted it
            self._top_up(session, draft)
            if session.takes_work(now_ns) and not session.full:
                draft.replay_budget = draft.budget
                self._admit_waiting(session, draft, now_ns)
        if not draft.rows:
            assert session.outstanding or not session.running or self._suspects, (
                "sequences run, and nothing will ever wake them"
            )
            return None
        self.counters.steps += 1
        return session.send(draft, now_ns)

    def update(self, session_id: int, result: StepResult, now_ns: int) -> list[TokenOutput]:
        """Fold the answer of the oldest outstanding step back in, and say what was committed.

        A row of a sequence that ended or was placed anew meanwhile is dropped and counted. Raises ProtocolError, with
        nothing committed, when the executor answers another step than the oldest, a row that was not asked for, an
        index that is not the next one, or leaves a row out: the caller then loses the session.
        """
        session = self._sessions.get(session_id)
        if session is None:
            self.fenced(len(result.refs))
            return []
        if not session.outstanding or session.outstanding[0].step != result.step:
            raise ProtocolError(f"result of step {result.step}, expected {[f.step for f in session.outstanding][:1]}")
        flight = session.outstanding[0]
        tokens, failed = self._read_result(session, flight, result)
        session.outstanding.popleft()
        for ref, (sequence, _, num_scheduled, _, _) in flight.rows.items():
            if sequence.ref == ref and sequence.session is session:
                sequence.num_computed += num_scheduled
        if self._suspects:
            self._suspects.answered(flight)
        outputs = [self._commit(sequence, token, now_ns) for sequence, token in tokens]
        for sequence in failed:
            outputs += self._unusable(session, sequence, now_ns)
        self.counters.output_tokens += len(tokens)
        self.counters.rows_dropped += len(result.refs) - len(tokens)
        session.timed(flight, result, now_ns)
        session.answered(flight.step)
        return outputs

    def fenced(self, num_rows: int) -> None:
        """A result came of a session that is over."""
        self.counters.results_fenced += 1
        self.counters.rows_dropped += num_rows

    # ---- inside

    def _read_result(
        self, session: Session, flight: Outstanding, result: StepResult
    ) -> tuple[list[tuple[Sequence, int]], list[Sequence]]:
        """Tokens to commit and sequences that failed. All is checked before any is committed, so none is half taken."""
        rows, vocab_size = flight.rows, session.facts.vocab_size
        answered = {*result.refs, *result.failed}
        if len(answered) != len(result.refs) + len(result.failed):
            raise ProtocolError(f"step {result.step}: a row is answered twice")
        tokens: list[tuple[Sequence, int]] = []
        for ref, token, index in zip(result.refs, result.tokens, result.indices, strict=True):
            row = rows.get(ref)
            if row is None or not row.samples:
                raise ProtocolError(f"step {result.step}: row {ref:#x} was not asked for a token")
            if not 0 <= token < vocab_size:
                problem = f"step {result.step}: row {ref:#x} has a token that is none of {vocab_size}"
                raise ProtocolError(problem, row.sequence if row.is_current else None)
            if row.is_current:
                expected = row.sequence.num_output
                if index != expected:
                    problem = f"step {result.step}: output {index} of row {ref:#x}, not {expected}"
                    raise ProtocolError(problem, row.sequence)
                tokens.append((row.sequence, token))
        for ref in result.failed:
            if ref not in rows:
                raise ProtocolError(f"step {result.step}: row {ref:#x} failed but was not asked for")
        if len(answered) < len(rows):
            for ref, row in rows.items():
                if row.samples and ref not in answered and row.is_current:
                    raise ProtocolError(f"step {result.step}: no token for row {ref:#x}")
        return tokens, [rows[ref].sequence for ref in result.failed if rows[ref].is_current]

    def _commit(self, sequence: Sequence, token: int, now_ns: int) -> TokenOutput:
        sequence.tokens.append(token)
        account = sequence.account
        if account is not None:
            account.counter += account.per_output
        if not sequence.first_token_ns:
            sequence.first_token_ns = now_ns
        sequence.last_token_ns = now_ns
        reason = finish_reason(token, sequence.num_output, sequence.stop, self._eos)
        if reason:
            self._end(sequence, reason)
        elif sequence.session is not None and len(sequence.tokens) % sequence.session.block_size == 0:
            session = sequence.session
            session.remember(sequence, session.num_planned(sequence), session.last_step)
        return TokenOutput(sequence.id, token, reason)

    def _end(self, sequence: Sequence, reason: FinishReason, *, forget: bool = False) -> None:
        assert reason, f"sequence {sequence.id} ends without a reason"
        if sequence.session is not None:
            sequence.session.release(sequence, forget=forget)
        else:
            self._line.remove(sequence)
        sequence.become(Status.FINISHED)
        sequence.reason = reason
        del self._sequences[sequence.id]
        if self._suspects:
            self._suspects.forget(sequence)
        if self._replays:
            self._replays.pop(sequence, None)
        self.counters.finished[reason] = self.counters.finished.get(reason, 0) + 1

    def _unusable(self, session: Session, sequence: Sequence, now_ns: int) -> list[TokenOutput]:
        """No token can be had of the sequence's row. It is tried once more, elsewhere if it can be; then it ends alone.

        Whatever it still has in flight is void: the executor ended it, or goes on from a token that cannot be.
        """
        patience = self._limits.patience
        self.counters.rows_unusable += 1
        name, request = session.facts.name, sequence.request.id
        if sequence.unusable_at == len(sequence.tokens):  # twice in the same place: it is the request
            self._reputations.excuse(request, patience)
            self._end(sequence, FinishReason.ERROR, forget=True)
            return [TokenOutput(sequence.id, None, FinishReason.ERROR)]
        sequence.unusable_at = len(sequence.tokens)
        sequence.avoid = name
        sequence.attempt += 1
        if sequence.session is not None:
            sequence.session.release(sequence, forget=True)
            self._wait_again(sequence)
            self._replay(sequence)
        self.counters.quarantines += session.reputation.sent_unusable(request, now_ns, patience)
        self._reputations.keep(name, session.reputation)
        return []

    def _replay(self, sequence: Sequence) -> None:
        """What it had is lost: it computes again all that is known of it."""
        sequence.replay_until = len(sequence.tokens)
        self._replays[sequence] = None

    def _sequences_of(self, request: Request) -> list[Sequence]:
        """Its choices that have not ended."""
        ids = range(request.id, request.id + request.num_choices)
        return [self._sequences[id] for id in map(SequenceId, ids) if id in self._sequences]

    def _withdraw(self, request: Request) -> None:
        """It runs alone from now on: take it out of every crowd. Its blocks are kept as long as nobody needs them."""
        for sequence in self._sequences_of(request):
            if sequence.session is not None:
                sequence.session.release(sequence)
                self._wait_again(sequence)

    def _wait_again(self, sequence: Sequence) -> None:
        sequence.become(Status.WAITING)
        sequence.fork_of = None
        self._line.add_again(sequence)

    def _preempt(self, session: Session, sequence: Sequence) -> None:
        failpoints.hit("on_preempt")
        session.release(sequence)
        sequence.preemptions += 1
        self.counters.preemptions += 1
        self._wait_again(sequence)

    def _trial_here(self, session: Session, now_ns: int) -> Request | None:
        """The request that has this executor to itself now, if one must run alone and this is the place for it."""
        trial = session.trial
        if trial is not None and runs_alone(trial) and not (session.leaving and self._has_left(session, trial)):
            return trial
        session.trial = None
        if not session.takes_work(now_ns) or session.is_quarantined(now_ns):
            return None
        on_trial = {s.trial for s in self._sessions.values()}
        for request in self._suspects:
            if not runs_alone(request) or request in on_trial:
                continue
            longest = max(sequence.max_length for sequence in request.doubts)
            able = [
                s
                for s in self._sessions.values()
                if s.takes_work(now_ns)
                and not s.is_quarantined(now_ns)
                and s.max_length >= longest
                and (s is session or not s.silent_since(now_ns - self._limits.patience_ns))
            ]
            if able and min(able, key=lambda s: (len(s.running), s.id)) is session:
                self.counters.trials += 1
                return request
        return None

    @staticmethod
    def _has_left(session: Session, trial: Request) -> bool:
        """Nothing of the trial is on this executor, nor in flight there."""
        return not session.outstanding and all(sequence.session is not session for sequence in trial.doubts)

    def _schedule_trial(self, session: Session, trial: Request, now_ns: int) -> StepPlan | None:
        """The next step of an executor that one request has to itself.

        Who else is resident pauses, and keeps what it has while there is room. What others have in flight is answered
        before anything of the trial is sent.
        """
        if any(row.sequence not in trial.doubts for flight in session.outstanding for row in flight.rows.values()):
            return None
        draft = session.draft(self._limits.token_budget)
        self._grant_running(session, draft, trial)
        draft.replay_budget = draft.budget
        for sequence in sorted(trial.doubts, key=_rank):
            if sequence.session is None and draft.budget and not session.leaving:
                match = self._make_way(session, sequence, trial)
                if match is not None:
                    self._admit(sequence, session, match, draft, now_ns)
        if not draft.rows:
            return None
        self.counters.steps += 1
        return session.send(draft, now_ns)

    def _make_way(self, session: Session, sequence: Sequence, trial: Request) -> Match | None:
        """Preempt who pauses, the youngest first, until the sequence fits. None while its siblings fill the room."""
        while True:
            match = session.match(sequence)
            if session.has_slot and session.can_admit(sequence, match):
                return match
            paused = [other for other in session.running if other not in trial.doubts]
            if not paused:
                return None
            self._preempt(session, paused[-1])

    def _grant_running(self, session: Session, draft: Draft, trial: Request | None = None) -> None:
        """Rows for the running sequences; with a trial, for those on trial alone."""
        running = list(session.running)
        if trial is not None:
            running.sort(key=lambda sequence: sequence not in trial.doubts)  # those that pause count as younger
        block_size, ref_count = session.block_size, session.pool.ref_count
        rows: list[policy.Running] = []
        known: list[int] = []
        for sequence in running:
            computed, sampled = session.in_flight(sequence)
            planned = sequence.num_computed + computed
            num_known = len(sequence.tokens) + sampled
            table = sequence.block_table
            # nothing follows the last token it may have, nor is that token's K and V ever needed
            num_uncomputed = num_known - planned if num_known < sequence.max_length else 0
            index = planned // block_size
            shared = index < len(table) and ref_count(table[index]) > 1
            rows.append(policy.Running(num_uncomputed, planned, len(table), shared))
            known.append(num_known)
        if self._suspects:
            for i, sequence in enumerate(running):
                if sequence not in trial.doubts if trial else runs_alone(sequence.request):
                    rows[i] = rows[i]._replace(num_uncomputed=0)  # pauses
        replays = self._replays_among(running, rows) if self._replays else ()
        reclaim = Reclaim(session.pool)
        decision = policy.decide(
            rows,
            token_budget=draft.budget,
            num_free=session.pool.num_free,
            num_returning=sum(reclaim.add(table, late=True)[1] for table in session.returning()),
            block_size=block_size,
            yield_of=lambda i: reclaim.add(running[i].block_table, late=rows[i].num_planned > running[i].num_computed),
            replays=replays,
            replays_waiting=self._replays_waiting(draft.budget) if self._replays and session.has_slot else 0,
        )
        for i in decision.preempted:
            self._preempt(session, running[i])
        num_promised = 0
        for sequence, row, num_known, tokens, blocks in zip(
            running, rows, known, decision.grants, decision.blocks, strict=True
        ):
            if blocks:
                session.make_room(sequence, row.num_planned, tokens, draft)
            if tokens:
                session.add_row(sequence, row.num_planned, tokens, num_known, draft)
            if tokens < row.num_uncomputed and sequence.session is session:
                num_promised += blocks_for(num_known, block_size) - len(sequence.block_table)
        session.num_promised = num_promised  # blocks that what is known of them will still need
        draft.replay_budget = decision.replay_budget_left

    def _replays_among(self, running: list[Sequence], rows: list[policy.Running]) -> set[int]:
        """Which of the rows compute again what a lost executor had."""
        found: set[int] = set()
        for i, (sequence, row) in enumerate(zip(running, rows, strict=True)):
            if sequence in self._replays:
                if row.num_planned < sequence.replay_until:
                    found.add(i)
                else:
                    del self._replays[sequence]
        return found

    def _replays_waiting(self, at_most: int) -> int:
        """Tokens of replays that no executor holds yet; `at_most` is as good as more."""
        tokens = 0
        for sequence in self._replays:
            if sequence.session is None and not runs_alone(sequence.request):
                tokens += len(sequence.tokens)
                if tokens >= at_most:
                    break
        return tokens

    def _top_up(self, session: Session, draft: Draft) -> None:
        """What of the budget was kept for others, and not wanted, goes to the rows that could use more."""
        for sequence in session.running:
            if not draft.budget:
                return
            if runs_alone(sequence.request):
                continue
            row = draft.rows.get(sequence.ref)
            sampled = session.in_flight(sequence)[1]
            planned = row.stop if row else session.num_planned(sequence)
            num_known = len(sequence.tokens) + sampled
            if planned < num_known < sequence.max_length:
                session.extend_row(sequence, min(num_known - planned, draft.budget), num_known, draft)

    def _admit_waiting(self, session: Session, draft: Draft, now_ns: int) -> None:
        session.full = False
        if draft.budget == 0 or not session.has_slot:
            return  # before anybody is looked at
        quarantined = session.is_quarantined(now_ns)
        passed_over: set[str] = set()
        for sequence in self._line.walk(now_ns, passed_over):
            if draft.budget == 0 or not session.has_slot:
                return
            if 0 < sequence.deadline_ns <= now_ns:
                continue  # nobody waits for its answer
            if (quarantined or sequence.avoid) and not self._may_come(sequence, session, now_ns, quarantined):
                continue
            if self._suspects and runs_alone(sequence.request):
                continue  # it is tried when an executor can be its own
            if self._replays and not draft.replay_budget and sequence in self._replays:
                continue  # the replays before it have their share
            parent = self._fork_parent(sequence, now_ns)
            if parent is not None:
                match = self._fork_match(session, parent)
                if match is None:
                    continue  # its turn comes when the prompt is computed
            elif sequence.max_length > session.max_length:
                continue
            else:
                match = session.match(sequence)
                if not self._belongs_here(sequence, session, match, now_ns):
                    continue
            if not (session.leaves_reserve(sequence, match) or self._line.owes(sequence.tenant)):
                passed_over.update(t for t in session.tenants_of_much() if not self._line.owes(t))
                continue  # what is left is for the others
            if not session.can_admit(sequence, match):
                session.full = True
                return  # nobody overtakes: small requests must not starve a large one
            self._admit(sequence, session, match, draft, now_ns)

    def _admit(self, sequence: Sequence, session: Session, match: Match, draft: Draft, now_ns: int) -> None:
        self._line.admit(sequence, len(sequence.tokens) - match.num_tokens, now_ns)
        sequence.become(Status.RUNNING)
        sequence.attempt += 1
        sequence.placed(session.facts.determinism)
        if not sequence.admitted_ns:
            sequence.admitted_ns = now_ns
            sequence.num_cached_prompt = min(match.num_tokens, sequence.num_prompt)
            self.counters.cached_prompt_tokens += sequence.num_cached_prompt
        bisect.insort(session.running, sequence, key=_rank)
        sequence.avoid = ""
        if match.num_tokens:
            failpoints.hit("on_prefix_hit")
        tokens = min(len(sequence.tokens) - match.num_tokens, draft.budget)
        if self._replays and sequence in self._replays:
            tokens = min(tokens, draft.replay_budget)
            draft.replay_budget -= tokens
        session.admit(sequence, match, draft, tokens, stop_tokens(sequence.stop, self._eos))
        session.add_row(sequence, match.num_tokens, tokens, len(sequence.tokens), draft)

    def _may_come(self, sequence: Sequence, session: Session, now_ns: int, quarantined: bool) -> bool:
        """Whether it may run here although this executor is in quarantine, or sent an unusable row for it before.

        Where there is no other executor, the second try is here, too: it shows whose fault the first was.
        """
        if sequence.avoid != session.facts.name:
            return not quarantined
        return not any(
            other is not session
            and other.takes_work(now_ns)
            and not other.is_quarantined(now_ns)
            and sequence.max_length <= other.max_length
            for other in self._sessions.values()
        )

    def _fork_parent(self, sequence: Sequence, now_ns: int) -> Sequence | None:
        """The first choice of the request, while its prompt's blocks are there or will be."""
        parent = sequence.fork_of
        if parent is None:
            return None
        if parent.status is Status.FINISHED or parent.attempt > 1 or (parent.attempt and parent.session is None):
            sequence.fork_of = None
            return None
        there = parent.session
        if there is not None and (not there.takes_work(now_ns) or there.is_quarantined(now_ns) or not there.has_slot):
            return None  # another executor, or a prefix hit, may serve it sooner
        return parent

    def _fork_match(self, session: Session, parent: Sequence) -> Match | None:
        """All of the prompt but its last token, which makes the logits; None until that is computed or sent."""
        shared = parent.num_prompt - 1
        if parent.session is not session or session.num_planned(parent) < shared:
            return None
        return Match(parent.block_table[: blocks_for(shared, session.block_size)], None, shared)

    def _belongs_here(self, sequence: Sequence, session: Session, match: Match, now_ns: int) -> bool:
        """Whether this executor is the best of those that could take the sequence now."""
        if len(self._sessions) == 1:
            return True
        places = [policy.Place(match.num_tokens, len(session.running))]
        for other in self._sessions.values():
            if other is session or other.full or not other.has_slot:
                continue
            if not other.takes_work(now_ns) or other.is_quarantined(now_ns) or other.facts.name == sequence.avoid:
                continue
            if sequence.max_length > other.max_length or other.silent_since(now_ns - self._limits.patience_ns):
                continue
            there = other.match(sequence)
            reserved = not (other.leaves_reserve(sequence, there) or self._line.owes(sequence.tenant))
            if other.can_admit(sequence, there) and not reserved:
                places.append(policy.Place(there.num_tokens, len(other.running)))
        return policy.place(places) == 0

    def check(self) -> None:
        """Assert what must always hold. For tests: walks everything."""
        for session in self._sessions.values():
            session.pool.check(session.held())
            for sequence in session.running:
                assert sequence.session is session and sequence.status is Status.RUNNING
        self._line.check()
        assert all(s.session is None and s.status is Status.WAITING for s in self._line)
        running = {s.id for session in self._sessions.values() for s in session.running}
        assert set(self._sequences) == running | {s.id for s in self._line}, "a sequence is lost"

    def __iter__(self) -> Iterator[Sequence]:
        return iter(list(self._sequences.values()))


def _rank(sequence: Sequence) -> tuple[int, int]:
    """Who keeps its blocks when they run out: the better band, then who came first."""
    return sequence.band, sequence.order
