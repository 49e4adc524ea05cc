"""The deterministic core: requests, aborts, executors and results go in; step plans and tokens come out.

No clock (time is an argument), thread, socket, tensor or message inside. The same calls give the same answers, so a
recorded log replays and a thousand crashes can be simulated in one thread.

There is no prefill phase and no decode phase. A sequence has tokens that are known and tokens that are computed, and
each step lets the second catch up with the first under one token budget; the idea is vLLM's. Chunked prefill, decode,
prefix hits, preemption and the move to another executor are all that one rule.
"""

from __future__ import annotations

from array import array
from collections import deque
from collections.abc import Iterator, Mapping, Set
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field, replace
from typing import Final, NamedTuple

from common.errors import InvalidRequest
from common.sampling import BeamParams, SamplingParams, StopConditions
from common.step import ExecutorFacts, Ranked, StepPlan, StepResult
from common.types import FinishReason, Priority, SequenceId, SlotRef
from scheduler.beam_search import BeamSearch
from scheduler.beams import BeamGroup, TextFollower
from scheduler.counters import Counters
from scheduler.line import Line
from scheduler.moves import Moves
from scheduler.pins import PinLimits
from scheduler.planning import Planner
from scheduler.prefixes import Prefixes
from scheduler.recorder import Recorder
from scheduler.replays import Replays
from scheduler.reputation import Patience, Reputations
from scheduler.results import ProtocolError, read_drafts, read_embedded, read_ranked, read_result, read_scores
from scheduler.sequence import Begun, Request, Sequence, Status, any_begun
from scheduler.session import Session
from scheduler.steps import Outstanding, Row
from scheduler.stopping import finish_reason, stop_tokens
from scheduler.suspicion import End, Suspects, blamed, runs_alone
from scheduler.timeline import Timeline, Wait


class TokenOutput(NamedTuple):
    """One committed token, or the end of a sequence without one (token is None)."""

    id: SequenceId
    token: int | None
    reason: FinishReason


_FIRST_TOKENS: Final = 256  # that are remembered

_DOMAIN_BYTES: Final = 16  # of the key of a tenant's prefixes without a salt, which it shares with nobody


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
    pins: PinLimits = field(default_factory=PinLimits)
    patience: Patience = field(default_factory=Patience)  # with executors that die young or send what cannot be used


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
        self._eos = frozenset(eos)
        self._line = Line(weights)
        self._sequences: dict[SequenceId, Sequence] = {}
        self._sessions: dict[int, Session] = {}
        self.prefixes = Prefixes(
            self._sessions, model=model, secret=secret, limits=limits.pins, caching=limits.prefix_caching
        )
        self._suspects = Suspects()
        self._reputations = Reputations()
        self._replays = Replays()
        self._next_id = 0
        self._next_resumed = -(1 << 62)  # their order: before all that is new here, and among themselves as they come
        self.counters = Counters()
        # the latest, for who looks on: (when it was, nanoseconds since the arrival)
        self.first_tokens: deque[tuple[int, int]] = deque(maxlen=_FIRST_TOKENS)
        self._recorder = Recorder()
        self._moves = Moves(self._line, self._suspects, self._replays, self.counters, self._recorder, eos=self._eos)
        self._planner = Planner(
            self._sessions,
            self._line,
            self._moves,
            self._suspects,
            self._replays,
            self.counters,
            self._recorder,
            token_budget=limits.token_budget,
            patience_ns=limits.patience_ns,
        )

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
        return any(s.could_hold(sequence) and not s.leaving for s in self._sessions.values())

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
        caches: bool = True,
        priority: Priority = Priority.NORMAL,
        expected_output: int | None = None,
        deadline_ns: int = 0,
        follow: TextFollower | None = None,
        max_drafts: int | None = None,
        resumed: bool | None = None,
        timeline: Timeline | None = None,
        dimensions: int = 0,
    ) -> list[Sequence]:
        """Queue one request: `choices` sequences that share the prompt.

        Or with `begun`, by choice, those that go on behind what another scheduler made of them, and only those. None of
        them may have ended: what they begin with is not looked at again. `resumed` requests go before what their tenant
        asks anew; unless told, those of which a token was made.

        `salt`: it shares a prefix with those of the same tenant and salt. Without `caches`, with none, and leaves none.

        `expected_output`: tokens that each is expected to generate; max_tokens unless told. From `deadline_ns` on, if
        that is not 0, it is not begun: whoever set the deadline then finishes it. `follow`: where the text of a beam
        search ends, besides its tokens; it stands behind the prompt. `max_drafts`: that one row may carry; as many as
        pay unless told. `timeline` hears what happens to the request. With `dimensions` nothing is generated: each ends
        with its prompt, in a vector of so many numbers; max_tokens is 1 then.

        Raises InvalidRequest when it could never run: the prompt, or prompt and max_tokens together, are longer than
        the largest joined executor can hold.
        """
        self._recorder.now_ns = now_ns
        limit = self.max_length
        if limit is not None:
            if len(prompt) >= limit:
                raise InvalidRequest("prompt", f"{len(prompt)} tokens leave no room in the context of {limit}")
            if len(prompt) + stop.max_tokens > limit:
                room = limit - len(prompt)
                problem = f"at most {room} after a prompt of {len(prompt)} tokens, got {stop.max_tokens}"
                raise InvalidRequest("max_tokens", problem)
        root = self.prefixes.root(tenant, salt)
        resumed = any_begun(begun) if resumed is None else resumed
        domain = self.prefixes.root(tenant)[:_DOMAIN_BYTES] if sampling.grammar is not None else b""
        num_choices = choices if begun is None else len(begun)
        request = Request(id=SequenceId(self._next_id), num_choices=num_choices, resumed=resumed, timeline=timeline)
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
                domain=domain,
                sampling=sampling,
                stop=stop,
                choice=choice,
                tenant=tenant,
                caches=caches,
                priority=priority,
                cost=_cost(sampling, len(prompt), output, is_first=not made),
                deadline_ns=deadline_ns,
                max_drafts=max_drafts,
                fork_of=made[0] if made and begun is None else None,
                determinism=before.determinism if before.tokens else None,
                logprobs_from=len(before.tokens),
                scores_prompt=sampling.prompt_logprobs is not None and choice == 0 and not before.tokens,
                arrived_ns=now_ns,
                dimensions=dimensions,
            )
            is_whole = sequence.num_output >= stop.max_tokens  # an answer of a search may be: it is only read
            assert sampling.beams or not is_whole, f"choice {choice} has ended with {sequence.num_output} tokens"
            self._next_id += 1
            made.append(sequence)
        waiting = made if sampling.beams is None else self._add_beams(sampling.beams, made, follow)
        self._sequences.update((sequence.id, sequence) for sequence in made)
        if timeline is not None:
            why, num_before = self._why_it_waits(made[0])
            num_resumed = sum(len(each.tokens) for each in begun.values()) if begun else 0
            self._recorder.received(made, num_resumed=num_resumed, why=why, num_before=num_before)
        self._line.add(waiting)
        self.counters.prompt_tokens += len(prompt) * len(made)
        return made

    def _add_beams(self, params: BeamParams, answers: list[Sequence], follow: TextFollower | None) -> list[Sequence]:
        """The beam that the search begins with. Raises InvalidRequest if no executor could hold all of them."""
        first = answers[0]
        ends = frozenset(stop_tokens(first.stop, self._eos))
        group = BeamGroup(
            width=params.width,
            search=BeamSearch(params, num_ends=len(ends), max_tokens=first.stop.max_tokens),
            ends=ends,
            answers=answers,
        )
        first.request.beams = group
        if self.max_length is not None and not self.fits_somewhere(first):
            problem = f"{params.width} beams of up to {first.max_length} tokens are more than any executor can hold"
            problem += ": ask for fewer, or for fewer max_tokens"
            raise InvalidRequest("beams.width", problem)
        root = replace(
            first,
            tokens=first.tokens[: first.num_prompt],
            num_begun=0,
            beams=group,
            keys={},
            choice=0,
            determinism=None,
            logprobs=[],
        )
        group.beams.append(root)
        if follow is not None:
            group.texts[root] = follow
        return [root]

    def _why_it_waits(self, sequence: Sequence) -> tuple[Wait | None, int]:
        """For what a sequence waits that is about to join the line, and how many are in it; None: for the next step."""
        if self.max_length is None:
            return "no_executor", 0
        if not self.fits_somewhere(sequence):
            return "too_large", 0
        if len(self._line):
            return "behind_others", len(self._line)
        return (None if any(s.has_slot for s in self._sessions.values()) else "no_slot"), 0

    def finish(self, id: SequenceId, reason: FinishReason = FinishReason.ABORTED, now_ns: int = 0) -> None:
        """End a sequence now: its caller left, its deadline passed, or a stop string matched. Twice is harmless.

        `now_ns` is for its timeline; 0 is the time of the last call that had one.
        """
        self._recorder.now_ns = max(self._recorder.now_ns, now_ns)
        sequence = self._sequences.get(id)
        if sequence is not None:
            self._end(sequence, reason)

    # ---- executors

    def join(self, session_id: int, facts: ExecutorFacts, now_ns: int) -> None:
        """An executor is there, empty. One that died young again and again gets no work for a while."""
        assert session_id not in self._sessions, f"session {session_id} joined twice"
        reputation = self._reputations.of(facts.name)
        self.prefixes.pins.know(facts.block_size)
        self._sessions[session_id] = Session(
            session_id,
            facts,
            self.prefixes.keys,
            self.prefixes.pins,
            self.prefixes.watchers,
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
        self._recorder.now_ns = now_ns
        session = self._sessions.pop(session_id, None)
        losses = Losses([], [])
        if session is None:
            return losses
        flights = list(session.outstanding)
        session.outstanding.clear()  # nothing in flight will ever be answered
        for sequence in list(session.running):
            if sequence.session is session:  # else it went with others of its group
                self._recorder.moved(sequence, session, end)
                self._moves.displace(session, sequence)
                self.counters.moved += 1
        session.cache.lost()
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
        """The next step of an executor, or None when there is nothing to do, no credit, or time until it is due."""
        session = self._sessions[session_id]
        self._recorder.now_ns = now_ns
        if session.silent:
            session.nothing_to_plan()
        if session.silent or not session.has_credit:
            return None
        if self.prefixes.pins:
            self.prefixes.end_pins(now_ns)
        if session.holds_plan(now_ns):
            return None
        plan = self._planner.plan(session, now_ns)
        if plan is None:
            session.nothing_to_plan()
        return plan

    def update(self, session_id: int, result: StepResult, now_ns: int) -> list[TokenOutput]:
        """Fold the answer of the oldest outstanding step back in, and say what was committed.

        A row of a sequence that ended or was placed anew meanwhile is dropped and counted. Raises ProtocolError, with
        nothing committed, when the executor answers another step than the oldest, a row that was not asked for, an
        index that is not the next one, or leaves a row out: the caller then loses the session.
        """
        self._recorder.now_ns = now_ns
        session = self._sessions.get(session_id)
        if session is None:
            self.fenced(len(result.refs))
            return []
        if not session.outstanding or session.outstanding[0].step != result.step:
            raise ProtocolError(f"result of step {result.step}, expected {[f.step for f in session.outstanding][:1]}")
        flight = session.outstanding[0]
        tokens, failed = read_result(flight, result, session.facts.vocab_size)
        scores = read_scores(flight, result) if result.scored else ()
        ranked = read_ranked(flight, result, session.facts.vocab_size) if session.groups or result.ranked else ()
        drafted = read_drafts(flight, result) if flight.max_drafts else ()
        vectors = read_embedded(flight, result) if result.embedded else ()
        session.outstanding.popleft()
        for ref, (sequence, _, num_scheduled, _, _, _) in flight.rows.items():
            if sequence.ref == ref and sequence.session is session:
                sequence.num_computed += num_scheduled
        if result.unready:
            self._put_off(session, result.unready, flight)
        for row, num_drafted, num_accepted in drafted:
            self._learn(session, row, num_drafted, num_accepted)
        if self._suspects:
            self._suspects.answered(flight)
        for scored, logprobs in scores:
            scored.append(logprobs)
        # the executor ends a row where it ends; should it know better, what comes behind the end is dropped
        outputs = [self._commit(sequence, token, now_ns) for sequence, token in tokens if not sequence.reason]
        self.counters.output_tokens += len(outputs)
        self.counters.rows_dropped += len(result.refs) - len(outputs)
        for sequence in failed:
            if sequence.beams is None or sequence.session is session:  # else it went with others of its group
                outputs += self._unusable(session, sequence, now_ns)
        for sequence, likeliest in ranked:
            outputs += self._rank(sequence, likeliest, now_ns)
        for sequence, vector in vectors:
            sequence.vector, sequence.last_token_ns = vector, now_ns
            self._end(sequence, FinishReason.EMBEDDED)
            outputs.append(TokenOutput(sequence.id, None, FinishReason.EMBEDDED))
        session.timed(flight, result, now_ns)
        session.answered(flight.step)
        return outputs

    def fenced(self, num_rows: int) -> None:
        """A result came of a session that is over."""
        self.counters.results_fenced += 1
        self.counters.rows_dropped += num_rows

    # ---- inside

    def _commit(self, sequence: Sequence, token: int, now_ns: int) -> TokenOutput:
        tokens, session = sequence.tokens, sequence.session
        tokens.append(token)
        account = sequence.account
        if account is not None:
            account.counter += account.per_output
        if not sequence.first_token_ns:
            sequence.first_token_ns = now_ns
            self.first_tokens.append((now_ns, now_ns - sequence.arrived_ns))
            self._recorder.first_token(sequence)
        sequence.last_token_ns = now_ns
        reason = finish_reason(token, len(tokens) - sequence.num_prompt, sequence.stop, self._eos)
        if reason:
            self._end(sequence, reason)
        elif session is not None and len(tokens) % session.block_size == 0:
            session.remember(sequence, session.num_planned(sequence), session.last_step)
        return TokenOutput(sequence.id, token, reason)

    def _rank(self, beam: Sequence, ranked: Ranked, now_ns: int) -> list[TokenOutput]:
        """A beam was ranked; with the last one of its group the search goes on, or is over."""
        group = beam.beams
        if group is None or beam.session is None:  # set aside by another row of this result
            return []
        group.ranked[beam] = ranked
        if not group.is_ranked:
            return []
        if not group.num_generated:
            self._recorder.first_token(group.answers[0])
        if group.grow(self._moves, now_ns):
            return []
        return [output for answer in group.open_answers for output in self._tell_answer(answer, group, now_ns)]

    def _tell_answer(self, answer: Sequence, group: BeamGroup, now_ns: int) -> list[TokenOutput]:
        """The search is over: all tokens of one of its answers, at once; ERROR where it found none that this may be."""
        found = group.found(answer)
        if found is None:
            self._end(answer, FinishReason.ERROR)
            return [TokenOutput(answer.id, None, FinishReason.ERROR)]
        answer.score = found.score
        answer.placed(group.leader.determinism or "")
        answer.last_token_ns = now_ns
        new = found.tokens[answer.num_output :]
        answer.tokens.extend(new)
        answer.logprobs.extend(group.told(found)[answer.num_begun :])
        self.counters.output_tokens += len(new)
        reason = finish_reason(answer.tokens[-1], answer.num_output, answer.stop, self._eos) or FinishReason.STOP_STRING
        self._end(answer, reason)
        outputs = [TokenOutput(answer.id, token, FinishReason.NONE) for token in new[:-1]]
        return [*outputs, TokenOutput(answer.id, new[-1] if new else None, reason)]

    def _learn(self, session: Session, row: Row, num_drafted: int, num_accepted: int) -> None:
        """A row carried drafts. Those that were right are computed, too."""
        sequence = row.sequence
        self.counters.speculating_rows += 1
        self.counters.drafted_tokens += num_drafted
        self.counters.accepted_tokens += num_accepted
        sequence.acceptance.learn(num_drafted, num_accepted)
        if sequence.session is session and row.is_current:
            sequence.num_computed += num_accepted

    def _end(self, sequence: Sequence, reason: FinishReason, *, forget: bool = False) -> None:
        self._moves.end(sequence, reason, forget=forget)
        del self._sequences[sequence.id]

    def _unusable(self, session: Session, sequence: Sequence, now_ns: int) -> list[TokenOutput]:
        """No token can be had of the sequence's row. It is tried once more, elsewhere if it can be; then it ends alone.

        Whatever it still has in flight is void: the executor ended it, or goes on from a token that cannot be.
        """
        patience = self._limits.patience
        self.counters.rows_unusable += 1
        name, request = session.facts.name, sequence.request.id
        if sequence.unusable_at == len(sequence.tokens):  # twice in the same place: it is the request
            self._reputations.excuse(request, patience)
            ended = [sequence] if sequence.beams is None else sequence.beams.open_answers
            for each in ended:
                self._end(each, FinishReason.ERROR, forget=True)
            return [TokenOutput(each.id, None, FinishReason.ERROR) for each in ended]
        for each in [sequence] if sequence.beams is None else sequence.beams.beams:
            each.unusable_at = len(each.tokens)
            each.avoid = name
            each.attempt += 1
        if sequence.session is not None:
            self._recorder.moved(sequence, sequence.session)
            self._moves.displace(sequence.session, sequence, forget=True)
        if sequence.sampling.grammar is None:  # else it may be the grammar, and nothing is said against the executor
            self.counters.quarantines += session.reputation.sent_unusable(request, now_ns, patience)
            self._reputations.keep(name, session.reputation)
        return []

    def _put_off(self, session: Session, unready: Seq[SlotRef], flight: Outstanding) -> None:
        """These rows were computed, and no token was chosen: their last one makes the logits again. Nothing is lost.

        Rows in flight behind them, planned for the token that did not come, are that second try already: an executor
        goes on from where it is.
        """
        self.counters.rows_unready += len(unready)
        for ref in unready:
            sequence = flight.rows[ref].sequence
            if sequence.ref == ref and sequence.session is session:
                sequence.num_computed -= 1
                sequence.put_off_at = len(sequence.tokens)
                self._recorder.put_off(sequence)
        session.fall_behind(unready, flight)

    def _sequences_of(self, request: Request) -> list[Sequence]:
        """Its choices that have not ended."""
        ids = range(request.id, request.id + request.num_choices)
        return [self._sequences[id] for id in map(SequenceId, ids) if id in self._sequences]

    def _withdraw(self, request: Request) -> None:
        """It runs alone from now on: take it out of every crowd. Its blocks are kept as long as nobody needs them."""
        for sequence in self._sequences_of(request) if request.beams is None else [request.beams.leader]:
            if sequence.session is not None:
                self._recorder.suspected(sequence, sequence.session)
                self._moves.set_aside(sequence.session, sequence)

    def check(self) -> None:
        """Assert what must always hold. For tests: walks everything."""
        for session in self._sessions.values():
            session.pool.check(session.held())
            session.check_kept()
            for sequence in session.running:
                assert sequence.session is session and sequence.status is Status.RUNNING
        self._line.check()
        assert all(s.session is None and s.status is Status.WAITING for s in self._line)
        alive = [*(s for session in self._sessions.values() for s in session.running), *self._line]
        told = {each.id for s in alive for each in ([s] if s.beams is None else s.beams.open_answers)}
        assert set(self._sequences) == told, "a sequence is lost"
        for group in {s.beams: None for s in alive if s.beams is not None}:
            assert group.num_resident in (0, len(group.beams)), "a part of a group is elsewhere"
            assert len({beam.session for beam in group.beams}) == 1, "a group is on two executors"

    def __iter__(self) -> Iterator[Sequence]:
        return iter(list(self._sequences.values()))


def _cost(sampling: SamplingParams, num_prompt: int, output: int, *, is_first: bool) -> int:
    """Tokens that a choice is expected to be computed for. All beams of a search are computed for its first answer."""
    if sampling.beams is None:
        return output + num_prompt * is_first
    return (num_prompt + sampling.beams.width * output) * is_first
