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
from collections.abc import Iterator, Set
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from typing import NamedTuple

from common import failpoints
from common.blocks import blocks_for
from common.errors import InvalidRequest
from common.sampling import SamplingParams, StopConditions
from common.step import ExecutorFacts, StepPlan, StepResult
from common.types import FinishReason, SequenceId
from scheduler import policy
from scheduler.block_pool import Reclaim
from scheduler.prefix_cache import KeyChain
from scheduler.sequence import Sequence, Status
from scheduler.session import Draft, Match, Outstanding, Session
from scheduler.stopping import finish_reason, stop_tokens


class ProtocolError(Exception):
    """An executor answered what it was not asked. Its session cannot go on; its sequences can."""


class TokenOutput(NamedTuple):
    """One committed token, or the end of a sequence without one (token is None)."""

    id: SequenceId
    token: int | None
    reason: FinishReason


@dataclass(frozen=True, slots=True, kw_only=True)
class SchedulerLimits:
    """How the core shares what there is."""

    token_budget: int = 2048  # tokens per step over all sequences
    max_running: int = 256  # sequences resident on one executor
    patience_ns: int = 1_000_000_000  # nobody is kept waiting for an executor that answered nothing for so long
    watermark: float = 0.01  # share of the blocks that admissions leave to running sequences
    prefix_caching: bool = True


@dataclass(slots=True)
class Counters:
    """What happened so far. Only ever counted up."""

    steps: int = 0
    preemptions: int = 0
    moved: int = 0  # sequences that lost their executor
    rows_dropped: int = 0  # result rows of another attempt or index
    prompt_tokens: int = 0
    cached_prompt_tokens: int = 0
    output_tokens: int = 0
    finished: dict[FinishReason, int] = field(default_factory=dict[FinishReason, int])


class Scheduler:
    """Queues, sequences and sessions. Every method is quick and never waits."""

    def __init__(self, limits: SchedulerLimits, *, model: str, eos: Set[int], secret: bytes) -> None:
        self._limits = limits
        self._model = model
        self._eos = frozenset(eos)
        self._keys = KeyChain(secret)
        self._waiting: list[Sequence] = []  # by order: who came first is looked at first
        self._sequences: dict[SequenceId, Sequence] = {}
        self._sessions: dict[int, Session] = {}
        self._next_id = 0
        self.counters = Counters()

    # ---- what there is

    @property
    def sessions(self) -> Seq[Session]:
        """The executors that are joined."""
        return list(self._sessions.values())

    @property
    def waiting(self) -> Seq[Sequence]:
        """Sequences that no executor holds, in the order they will be looked at."""
        return self._waiting

    @property
    def num_sequences(self) -> int:
        """Sequences that are not finished."""
        return len(self._sequences)

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

    def add(
        self,
        prompt: Seq[int],
        sampling: SamplingParams,
        stop: StopConditions,
        now_ns: int,
        *,
        choices: int = 1,
        tenant: str = "",
        salt: str = "",
    ) -> list[Sequence]:
        """Queue one request: `choices` sequences that share the prompt.

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
        made: list[Sequence] = []
        for choice in range(choices):
            id = SequenceId(self._next_id)
            sequence = Sequence(
                id=id,
                order=self._next_id,
                tokens=array("I", prompt),
                num_prompt=len(prompt),
                root=root,
                sampling=sampling,
                stop=stop,
                choice=choice,
                fork_of=made[0] if made else None,
                arrived_ns=now_ns,
            )
            self._next_id += 1
            self._sequences[id] = sequence
            self._waiting.append(sequence)
            made.append(sequence)
        self.counters.prompt_tokens += len(prompt) * choices
        return made

    def finish(self, id: SequenceId, reason: FinishReason = FinishReason.ABORTED) -> None:
        """End a sequence now: its caller left, its deadline passed, or a stop string matched. Twice is harmless."""
        sequence = self._sequences.get(id)
        if sequence is not None:
            self._end(sequence, reason)

    # ---- executors

    def join(self, session_id: int, facts: ExecutorFacts) -> None:
        """An executor is there, empty."""
        assert session_id not in self._sessions, f"session {session_id} joined twice"
        self._sessions[session_id] = Session(
            session_id,
            facts,
            self._keys,
            prefix_caching=self._limits.prefix_caching,
            max_running=self._limits.max_running,
            watermark=int(self._limits.watermark * facts.num_blocks),
        )

    def leave(self, session_id: int) -> None:
        """The executor takes no new sequences; those it holds go on there until it is lost."""
        session = self._sessions.get(session_id)
        if session is not None:
            session.leaving = True

    def lose(self, session_id: int) -> None:
        """The executor is gone, with all it held. Its sequences wait again at their old place in the line."""
        session = self._sessions.pop(session_id, None)
        if session is None:
            return
        session.outstanding.clear()  # nothing in flight will ever be answered
        for sequence in list(session.running):
            session.release(sequence)
            self._wait_again(sequence)
            self.counters.moved += 1

    # ---- steps

    def schedule(self, session_id: int, now_ns: int) -> StepPlan | None:
        """The next step of an executor, or None when there is nothing to do or no credit."""
        session = self._sessions[session_id]
        if not session.has_credit:
            return None
        draft = session.draft(self._limits.token_budget)
        session.num_promised = self._grant_running(session, draft)
        if not session.leaving:
            self._admit_waiting(session, draft, now_ns)
        if not draft.rows:
            assert session.outstanding or not session.running, "sequences run, and nothing will ever wake them"
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
            self.counters.rows_dropped += len(result.refs)
            return []
        if not session.outstanding or session.outstanding[0].step != result.step:
            raise ProtocolError(f"result of step {result.step}, expected {[f.step for f in session.outstanding][:1]}")
        flight = session.outstanding[0]
        tokens, failed = self._read_result(session, flight, result)
        session.outstanding.popleft()
        for ref, (sequence, _, num_scheduled, _) in flight.rows.items():
            if sequence.ref == ref and sequence.session is session:
                sequence.num_computed += num_scheduled
        outputs = [self._commit(sequence, token, now_ns) for sequence, token in tokens]
        for sequence in failed:
            self._end(sequence, FinishReason.ERROR, forget=True)
            outputs.append(TokenOutput(sequence.id, None, FinishReason.ERROR))
        self.counters.output_tokens += len(tokens)
        self.counters.rows_dropped += len(result.refs) - len(tokens)
        session.timed(flight, result, now_ns)
        session.answered(flight.step)
        return outputs

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
            if row is None or not row.samples or not 0 <= token < vocab_size:
                raise ProtocolError(f"step {result.step}: row {ref:#x} with token {token} was not asked for")
            if row.is_current:
                expected = row.sequence.num_output
                if index != expected:
                    raise ProtocolError(f"step {result.step}: output {index} of row {ref:#x}, not {expected}")
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
            self._leave_line(sequence)
        sequence.become(Status.FINISHED)
        sequence.reason = reason
        del self._sequences[sequence.id]
        self.counters.finished[reason] = self.counters.finished.get(reason, 0) + 1

    def _leave_line(self, sequence: Sequence) -> None:
        index = bisect.bisect_left(self._waiting, sequence.order, key=_order)
        assert self._waiting[index] is sequence, f"sequence {sequence.id} does not wait"
        del self._waiting[index]

    def _wait_again(self, sequence: Sequence) -> None:
        sequence.become(Status.WAITING)
        sequence.fork_of = None
        bisect.insort(self._waiting, sequence, key=_order)

    def _preempt(self, session: Session, sequence: Sequence) -> None:
        failpoints.hit("on_preempt")
        session.release(sequence)
        sequence.preemptions += 1
        self.counters.preemptions += 1
        self._wait_again(sequence)

    def _grant_running(self, session: Session, draft: Draft) -> int:
        """Rows for the running sequences. Returns the blocks that what is known of them will still need."""
        running = list(session.running)
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
        reclaim = Reclaim(session.pool)
        decision = policy.decide(
            rows,
            token_budget=draft.budget,
            num_free=session.pool.num_free,
            num_returning=sum(reclaim.add(table, late=True)[1] for table in session.returning()),
            block_size=block_size,
            yield_of=lambda i: reclaim.add(running[i].block_table, late=rows[i].num_planned > running[i].num_computed),
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
        return num_promised

    def _admit_waiting(self, session: Session, draft: Draft, now_ns: int) -> None:
        session.full = False
        if draft.budget == 0 or not session.has_slot:
            return  # before the line is copied: it may be long
        for sequence in list(self._waiting):
            if draft.budget == 0 or not session.has_slot:
                return
            parent = self._fork_parent(sequence)
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
            if not session.can_admit(sequence, match):
                session.full = True
                return  # nobody overtakes: small requests must not starve a large one
            self._admit(sequence, session, match, draft, now_ns)

    def _admit(self, sequence: Sequence, session: Session, match: Match, draft: Draft, now_ns: int) -> None:
        self._leave_line(sequence)
        sequence.become(Status.RUNNING)
        sequence.attempt += 1
        if not sequence.admitted_ns:
            sequence.admitted_ns = now_ns
            sequence.num_cached_prompt = match.num_tokens
            self.counters.cached_prompt_tokens += match.num_tokens
        if match.num_tokens:
            failpoints.hit("on_prefix_hit")
        bisect.insort(session.running, sequence, key=_order)
        tokens = min(len(sequence.tokens) - match.num_tokens, draft.budget)
        session.admit(sequence, match, draft, tokens, stop_tokens(sequence.stop, self._eos))
        session.add_row(sequence, match.num_tokens, tokens, len(sequence.tokens), draft)

    def _fork_parent(self, sequence: Sequence) -> Sequence | None:
        """The first choice of the request, while its prompt's blocks are there or will be."""
        parent = sequence.fork_of
        if parent is None:
            return None
        if parent.status is Status.FINISHED or parent.attempt > 1 or (parent.attempt and parent.session is None):
            sequence.fork_of = None
            return None
        if parent.session is not None and (parent.session.leaving or not parent.session.has_slot):
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
            if other is session or other.leaving or other.full or not other.has_slot:
                continue
            if sequence.max_length > other.max_length or other.silent_since(now_ns - self._limits.patience_ns):
                continue
            there = other.match(sequence)
            if other.can_admit(sequence, there):
                places.append(policy.Place(there.num_tokens, len(other.running)))
        return policy.place(places) == 0

    def check(self) -> None:
        """Assert what must always hold. For tests: walks everything."""
        for session in self._sessions.values():
            session.pool.check(session.held())
            for sequence in session.running:
                assert sequence.session is session and sequence.status is Status.RUNNING
        assert all(s.session is None and s.status is Status.WAITING for s in self._waiting)
        assert [s.order for s in self._waiting] == sorted(s.order for s in self._waiting), "the line is out of order"
        running = {s.id for session in self._sessions.values() for s in session.running}
        assert set(self._sequences) == running | {s.id for s in self._waiting}, "a sequence is lost"

    def __iter__(self) -> Iterator[Sequence]:
        return iter(list(self._sequences.values()))


def _order(sequence: Sequence) -> int:
    return sequence.order
