"""A world that doubts everything: each plan is checked against its own book of blocks, each token against an oracle.

The book is kept from the plans alone, so it knows nothing of how the scheduler counts. The oracle is the fake model run
alone on the whole prompt. The docket knows which requests executors died with. None of them may ever disagree with the
scheduler, whatever happens and in whichever order.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Sequence, Set
from dataclasses import dataclass, field
from typing import Final, NamedTuple

from common.blocks import blocks_for
from common.errors import InvalidRequest, Overloaded
from common.sampling import SamplingParams, StopConditions
from common.step import StepPlan, StepResult
from common.types import BlockId, FinishReason, Priority, SequenceId, SlotRef, slot_of
from executor.fake_runner import NextToken, Prefix, digests_of, fake_vector, prefix_hash_token
from executor.runner import execute
from scheduler.pins import PinLimits
from scheduler.prefix_cache import BlockKey, CachedBlock
from scheduler.results import ProtocolError
from scheduler.scheduler import Losses
from scheduler.session import Session
from scheduler.suspicion import End
from tests.scheduler.world import GREEDY, World

VOCAB_SIZE: Final = 32
DIMENSIONS: Final = 8
EOS: Final = frozenset({0})


def next_token(prefix: Prefix) -> int | None:
    """A hash of everything that may matter; now and then the logits are not finite."""
    token = prefix_hash_token(prefix)
    return None if token % 128 == 77 else token


@dataclass(frozen=True, slots=True)
class Alone:
    """What a sequence generates when nothing else exists."""

    tokens: list[int]
    reason: FinishReason


def alone(
    prompt: Sequence[int],
    sampling: SamplingParams,
    choice: int,
    stop: StopConditions,
    *,
    model: NextToken = next_token,
    vocab_size: int = VOCAB_SIZE,
    eos: Set[int] = EOS,
) -> Alone:
    """Run the fake model on one sequence, without blocks, steps or scheduler."""
    digest = digests_of(prompt)[-1]
    tokens: list[int] = []
    while True:
        prefix = Prefix(
            num_tokens=len(prompt) + len(tokens),
            digest=digest,
            greedy=sampling.greedy,
            seed=sampling.seed,
            choice=choice,
        )
        token = model(prefix)
        if token is None:
            return Alone(tokens, FinishReason.ERROR)
        token %= vocab_size
        tokens.append(token)
        digest = digests_of([token], digest)[-1]
        if token in eos and not stop.ignore_eos:
            return Alone(tokens, FinishReason.EOS)
        if token in stop.stop_token_ids:
            return Alone(tokens, FinishReason.STOP_TOKEN)
        if len(tokens) == stop.max_tokens:
            return Alone(tokens, FinishReason.LENGTH)


@dataclass(slots=True)
class Seat:
    """What the plans have told of one resident sequence."""

    name: str
    scope: str
    table: list[BlockId]
    position: int  # tokens that the plans so far compute


@dataclass(slots=True)
class Book:
    """What the plans have told of one executor."""

    seats: dict[SlotRef, Seat]
    writes: deque[dict[BlockId, SlotRef]]  # for each unanswered step, who writes which block
    scopes: dict[BlockId, str]  # whose content the block holds
    rows: deque[dict[str, Witnessed]]  # for each unanswered step, by name


class Witnessed(NamedTuple):
    """One row of a plan."""

    ref: SlotRef
    stop: int  # one past its positions
    placement: int


@dataclass(slots=True)
class Docket:
    """Which requests executors died with, by the plans alone."""

    deaths: dict[str, set[int]] = field(default_factory=dict[str, set[int]])  # request -> sessions
    until: dict[str, int] = field(default_factory=dict[str, int])  # sequence -> positions to be computed again
    placement: Counter[str] = field(default_factory=Counter[str])  # times a sequence was placed, or its row was void
    given_up: set[str] = field(default_factory=set[str])

    def died(self, session: int, steps: list[dict[str, Witnessed]], ended: set[str]) -> set[str]:
        """An executor died in one of these steps. Returns the requests that are to be given up."""
        everybody = {request_of(name) for step in steps for name in step}
        accused: set[str] = set()
        for step in steps:
            for name, row in step.items():
                if name not in ended:
                    self.until[name] = max(self.until.get(name, 0), row.stop)
                    self.deaths.setdefault(request_of(name), set()).add(session)
                    accused.add(request_of(name))
        found = {r for r in accused if len(self.deaths[r]) >= 3 and len(everybody) == 1}
        self.given_up |= found
        return found

    def passed(self, name: str) -> None:
        """Nothing is left to doubt of this sequence."""
        self.until.pop(name, None)
        request = request_of(name)
        if not any(request_of(other) == request for other in self.until):
            self.deaths.pop(request, None)

    def acquit(self, session: int) -> None:
        """It was the link."""
        for request, deaths in list(self.deaths.items()):
            deaths.discard(session)
            if not deaths:
                for name in [name for name in self.until if request_of(name) == request]:
                    self.passed(name)

    def is_alone(self, request: str) -> bool:
        """Nobody may be in a step with it."""
        return len(self.deaths.get(request, ())) >= 2


def request_of(name: str) -> str:
    """The request that a sequence belongs to."""
    return name.partition(":")[0]


class Listener:
    """Hears of the blocks of one tenant: how many executors have each."""

    def __init__(self) -> None:
        self.blocks = Counter[BlockKey]()

    def stored(self, block: CachedBlock) -> None:
        self.blocks[block.key] += 1

    def removed(self, key: BlockKey) -> None:
        self.blocks[key] -= 1
        assert self.blocks[key] >= 0, "a block is gone that was never there"


class Witness(World):
    """A World over many executors, small and different, that are joined and lost at any moment."""

    def __init__(self, *, token_budget: int = 24, prefix_caching: bool = True, watermark: float = 0.0) -> None:
        self.books: dict[int, Book] = {}
        self.oracles: dict[str, Alone] = {}
        self.tenants: dict[SequenceId, str] = {}
        self.scopes: dict[SequenceId, str] = {}  # within which blocks may be shared: tenant and salt, or one request
        self.prompts: dict[str, list[int]] = {}
        self.aborted: set[str] = set()
        self.last_result: dict[int, StepResult] = {}
        self.docket = Docket()
        self.dead: list[tuple[int, str]] = []  # sessions whose link broke, and the executor's name
        self._glitches: set[tuple[int, int, int]] = set()
        super().__init__(
            executors=0,
            token_budget=token_budget,
            prefix_caching=prefix_caching,
            watermark=watermark,
            max_model_len=64,
            vocab_size=VOCAB_SIZE,
            eos=EOS,
            next_token=next_token,
            pins=PinLimits(max_tokens_per_tenant=60, max_share=1),
        )
        self.listeners = {tenant: Listener() for tenant in ("a", "b")}
        for tenant, listener in self.listeners.items():
            assert not any(self.scheduler.prefixes.watch(tenant, listener))

    # ---- events

    def join(self, *, name: str | None = None, next_token: NextToken | None = None, **changes: int) -> int:
        session = super().join(name=name, next_token=next_token, **changes)
        self.books[session] = Book({}, deque(), {}, deque())
        return session

    def glitch(self, prefix: Prefix) -> int | None:
        """A model whose logits are sometimes not finite, and are when they are computed again."""
        key = (prefix.digest, prefix.seed, prefix.choice)
        if prefix.digest % 8 == 3 and key not in self._glitches:
            self._glitches.add(key)
            return None
        return next_token(prefix)

    def lose(self, session: int, end: End = End.LOST, *, step: int = 0) -> Losses:
        steps = [] if end in (End.CLEAN, End.WRONG) else list(self.books[session].rows)
        steps = steps[:1] if end in (End.STUCK, End.FAILED) else steps[:2]
        oldest = self.sent[session][0].step if self.sent[session] else 0
        found = self.docket.died(session, steps, self.ended)
        if end is End.LOST:
            self.dead.append((session, self.session(session).facts.name))
        late = [execute(self.runners[session], plan) for plan in self.sent[session]]
        losses = super().lose(session, end, step=oldest if end in (End.STUCK, End.FAILED) else step)
        del self.books[session]
        assert {request_of(self.names[request.id]) for request in losses.given_up} == found
        ended = self.ended
        for name in list(self.docket.until):
            if name in ended:
                self.docket.passed(name)
        self.check_heard()
        for result in late:  # a zombie: its answers come after its end
            assert self.scheduler.update(session, result, self.now_ns) == []
        self.check()
        return losses

    def acquit(self) -> None:
        """The last executor whose link broke dials again: the process had not died."""
        session, name = self.dead.pop()
        self.scheduler.acquit(session, name)
        self.docket.acquit(session)
        self.check()

    def request(
        self,
        prompt: list[int],
        *,
        n: int,
        stop: StopConditions,
        sampling: SamplingParams = GREEDY,
        tenant: str = "",
        priority: Priority = Priority.NORMAL,
        salt: str = "",
        caches: bool = True,
        embeds: bool = False,
    ) -> None:
        """A request by the name of its number, with what each choice must generate, or that it ends in a vector."""
        name = f"{len(self.names)}:"
        try:
            made = self.add(
                name if n > 1 else f"{name}0",
                prompt,
                n=n,
                tenant=tenant,
                priority=priority,
                sampling=sampling,
                salt=salt,
                caches=caches,
                stop=stop,
                dimensions=DIMENSIONS if embeds else 0,
            )
        except InvalidRequest:
            return
        for choice, id in enumerate(made):
            label = self.names[id]
            self.tenants[id] = tenant
            self.scopes[id] = f"{tenant} and {salt}" if caches else f"{name} alone"
            self.prompts[label] = prompt
            self.oracles[label] = alone(prompt, sampling, choice, stop)
            if embeds and self.oracles[label].tokens:
                self.oracles[label] = Alone([], FinishReason.EMBEDDED)
        self.check()

    def pin(self, tokens: list[int], *, tenant: str, salt: str, seconds: int) -> None:
        """Somebody wants these to stay. That changes no token, and holds no block."""
        try:
            self.scheduler.prefixes.check_pin(tokens, self.now_ns, tenant=tenant, salt=salt)
        except (InvalidRequest, Overloaded):
            return
        self.scheduler.prefixes.pin(tokens, self.now_ns + seconds * 1_000_000_000, tenant=tenant, salt=salt)
        self.check()

    def unpin(self, tenant: str) -> None:
        """And no more."""
        self.scheduler.prefixes.unpin(tenant)
        self.check()

    def flush(self, tenant: str) -> None:
        """Nothing of the tenant's is to be found again. Its tokens stay the same."""
        for _ in self.scheduler.prefixes.forget(tenant):
            pass
        self.check()
        self.check_heard()

    def abort(self, name: str) -> None:
        super().abort(name)
        self.aborted.add(name)
        self.docket.passed(name)
        self.check()

    def leave(self, session: int) -> None:
        """The executor finishes what it has."""
        self.scheduler.leave(session)
        self.check()

    def send(self, session: int = 0) -> StepPlan | None:
        plan = super().send(session)
        if plan is not None:
            self._witness(self.session(session), plan)
        self.check()
        return plan

    def answer(self, session: int = 0, *, compute_ns: int = 0, idle_ns: int = 0) -> StepResult:
        book = self.books[session]
        result = super().answer(session, compute_ns=compute_ns, idle_ns=idle_ns)
        book.writes.popleft()
        ended = self.ended
        for name, row in book.rows.popleft().items():
            current = row.placement == self.docket.placement[name]
            passed = row.stop - (row.ref in result.unready)  # nothing was chosen at the last place of such a row
            if name in ended or (current and passed >= self.docket.until.get(name, passed + 1)):
                self.docket.passed(name)
            if current and row.ref in result.failed:
                self.docket.placement[name] += 1
        self._fall_behind(book, result.unready)
        self.last_result[session] = result
        self.check()
        return result

    def _fall_behind(self, book: Book, unready: Sequence[SlotRef]) -> None:
        """These have computed one token less than their plans said, and so have their rows in flight."""
        for ref in unready:
            if ref in book.seats:
                book.seats[ref].position -= 1
            for step in book.rows:
                for name, row in step.items():
                    if row.ref == ref:
                        step[name] = row._replace(stop=row.stop - 1)

    def answer_twice(self, session: int) -> None:
        """The last answer once more: refused, nothing committed."""
        before = self.scheduler.counters.output_tokens
        try:
            self.scheduler.update(session, self.last_result[session], self.now_ns)
        except ProtocolError:
            assert self.scheduler.counters.output_tokens == before
        else:
            raise AssertionError("an answer was taken twice")

    def answer_wrongly(self, session: int) -> None:
        """An index that is not the next one is refused, and the right answer is still taken after it."""
        step = self.sent[session][0].step
        flight = self.session(session).outstanding[0]
        wrong = [(ref, row) for ref, row in flight.rows.items() if row.samples and row.sequence.id in self.alive]
        if wrong and wrong[0][1].attempt == wrong[0][1].sequence.attempt:
            ref, row = wrong[0]
            result = StepResult(step=step, refs=[ref], tokens=[1], indices=[row.sequence.num_output + 1])
            try:
                self.scheduler.update(session, result, self.now_ns)
            except ProtocolError:
                self.check()
            else:
                raise AssertionError("an index with a gap was taken")

    # ---- looking

    @property
    def ended(self) -> set[str]:
        """Names of sequences that have ended."""
        alive = set(self.alive)
        return {name for id, name in self.names.items() if id not in alive}

    @property
    def alive(self) -> list[SequenceId]:
        """Sequences that have not ended."""
        return [sequence.id for sequence in self.scheduler]

    @property
    def takers(self) -> list[int]:
        """Executors that take new sequences."""
        return [s.id for s in self.scheduler.sessions if not s.leaving and not s.silent]

    def session(self, id: int) -> Session:
        """The scheduler's half of the link."""
        return next(s for s in self.scheduler.sessions if s.id == id)

    # ---- what must always hold

    def check(self) -> None:
        """Blocks conserved, reference counts exact, every stream the start of what its sequence generates alone."""
        self.scheduler.check()
        for sequence in self.scheduler:
            known = self.docket.deaths.get(request_of(self.names[sequence.id]), set())
            assert sequence.request.deaths == known, "executors died with other requests than are suspected"
        for name, tokens in self.tokens.items():
            assert tokens == self.oracles[name].tokens[: len(tokens)], f"{name} generated other tokens than alone"

    def check_heard(self) -> None:
        """Who listens knows which blocks are cached, and how often."""
        for tenant, listener in self.listeners.items():
            root = self.scheduler.prefixes.root(tenant)
            cached = (block.key for s in self.scheduler.sessions for part in s.cache.snapshot(root) for block in part)
            assert +listener.blocks == Counter(cached), "who listens knows other blocks than there are"

    def check_end(self) -> None:
        """Nothing is left, nothing is missing."""
        self.check()
        self.check_heard()
        assert self.scheduler.num_sequences == 0 and not self.scheduler.waiting
        for name, oracle in self.oracles.items():
            if request_of(name) in self.docket.given_up:
                assert self.reasons[name] in (FinishReason.ERROR, FinishReason.ABORTED, oracle.reason)
            elif name not in self.aborted:
                assert Alone(self.tokens[name], self.reasons[name]) == oracle
                if oracle.reason is FinishReason.EMBEDDED:
                    vector = fake_vector(digests_of(self.prompts[name])[-1], DIMENSIONS)
                    assert self.embedded[name].vector == vector, f"{name} has another vector than alone"
        for session in self.scheduler.sessions:
            if not session.outstanding:
                assert session.pool.num_free == session.pool.num_blocks, "blocks are lost"
                assert session.has_slot

    def settle(self) -> None:
        """Everything admitted ends, given one healthy executor."""
        for session in self.scheduler.sessions:
            self.scheduler.spoke(session.id)
        if not any(self.session(id).max_length >= 64 for id in self.takers):
            self.join(num_blocks=20, block_size=4, max_sequences=6, credit=2)
        self.run(max_steps=3000)
        self.check_end()

    def _witness(self, session: Session, plan: StepPlan) -> None:
        """Enter the plan in the book. Every block that is written has one writer, now and in every unanswered step."""
        book = self.books[session.id]
        self._enter_changes(book, session, plan)
        writers = self._enter_rows(book, session, plan)
        self._enter_suspects(book, plan)
        for source, destination in plan.copies:
            assert destination in writers, f"block {destination} is copied to for nobody"
            assert book.scopes.get(source) == book.seats[writers[destination]].scope, "a block of another is copied"
            book.scopes[destination] = book.scopes[source]
        for block, ref in writers.items():
            book.scopes[block] = book.seats[ref].scope
        for new in plan.new:
            for block in new.block_table[: blocks_for(new.num_computed, session.block_size)]:
                assert book.scopes.get(block) == book.seats[new.ref].scope, f"block {block} is another's"
        for earlier in book.writes:
            for block, ref in writers.items():
                assert earlier.get(block, ref) == ref, f"block {block} is reused while an unanswered step may write it"
        book.writes.append(writers)

    def _enter_changes(self, book: Book, session: Session, plan: StepPlan) -> None:
        """Who leaves, who comes, and how the tables change."""
        for ref in plan.released:
            assert book.seats.pop(ref, None) is not None, f"{ref:#x} is released but was not there"
        taken = {slot_of(ref) for ref in book.seats}
        ids = {sequence.ref: sequence.id for sequence in session.running}
        for new in plan.new:
            assert slot_of(new.ref) not in taken, f"slot {slot_of(new.ref)} has two owners"
            assert slot_of(new.ref) < session.facts.max_sequences
            taken.add(slot_of(new.ref))
            id = ids[new.ref]
            self.docket.placement[self.names[id]] += 1
            book.seats[new.ref] = Seat(self.names[id], self.scopes[id], list(new.block_table), new.num_computed)
        for ref, block in zip(plan.append_refs, plan.append_blocks, strict=True):
            book.seats[ref].table.append(block)
        for ref, index, block in zip(plan.replace_refs, plan.replace_indices, plan.replace_blocks, strict=True):
            assert book.seats[ref].table[index] != block
            book.seats[ref].table[index] = block

    def _enter_suspects(self, book: Book, plan: StepPlan) -> None:
        """Who may have killed an executor is in no step with others, nor in flight beside theirs."""
        seats = [book.seats[ref] for ref in plan.refs]
        book.rows.append(
            {
                seat.name: Witnessed(ref, seat.position, self.docket.placement[seat.name])
                for ref, seat in zip(plan.refs, seats, strict=True)
            }
        )
        together = {request_of(name) for step in book.rows for name in step}
        assert len(together) == 1 or not any(map(self.docket.is_alone, {request_of(s.name) for s in seats})), (
            "a request that must run alone has company"
        )

    def _enter_rows(self, book: Book, session: Session, plan: StepPlan) -> dict[BlockId, SlotRef]:
        """The blocks that the rows write, and which row does."""
        assert 0 < plan.num_tokens <= session.facts.max_step_tokens
        assert len(set(plan.refs)) == len(plan.refs), "a sequence has two rows"
        size = session.block_size
        writers: dict[BlockId, SlotRef] = {}
        for ref, count in zip(plan.refs, plan.num_scheduled, strict=True):
            seat = book.seats[ref]
            stop = seat.position + count
            assert stop <= len(seat.table) * size, f"position {stop} is in no block"
            for index in range(seat.position // size, blocks_for(stop, size)):
                block = seat.table[index]
                assert block not in writers, f"block {block} is written by two rows of one step"
                writers[block] = ref
                # others may hold it only to read it, from this step on: then it is full after this step
                shared = session.pool.ref_count(block) > 1
                assert not shared or stop >= (index + 1) * size, f"shared block {block} is written"
            seat.position = stop
        return writers
