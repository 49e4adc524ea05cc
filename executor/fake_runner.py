"""A runner without a model: tokens that can be computed by hand, and a slab that remembers what was written where.

Its forward writes one cell per token and then reads every row's whole prefix back through the row's block table. A
cell names the token, its position and the digest of everything before it, just as K and V depend on the whole prefix.
So a block with two owners, a block reused too early, a copy that was forgotten or a wrong prefix hit is found in the
step in which it would first have changed a token.
"""

from __future__ import annotations

import struct
import threading
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Final

import numpy as np

from common import failpoints
from common.determinism import determinism_class
from common.step import EMBEDS, Embedded, ExecutorFacts, Logprobs, Ranked, Scored, StepPlan, StepResult
from common.types import BlockId, SlotRef, slot_of
from executor.resident import Resident, Rows, Sampled, spread
from executor.runner import Done, Launched, Report
from executor.speculation import drafted, possible

_CELL: Final = np.dtype([("position", np.int64), ("token", np.int64), ("digest", np.uint64)])
_POISON: Final = -1
_MASK: Final = (1 << 64) - 1


class SlabMismatch(AssertionError):
    """A row read something else than its own prefix: a block was lost, shared or reused wrongly."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Prefix:
    """What the fake model knows when it chooses a token."""

    num_tokens: int
    digest: int  # 64 bits over all tokens of the prefix, as read from the slab
    greedy: bool
    seed: int
    choice: int


NextToken = Callable[[Prefix], int | None]
"""The fake model: any integer (the vocabulary size is taken modulo), or None for logits that are not finite."""


def position_token(prefix: Prefix) -> int:
    """The number of tokens before it: [7, 8, 9] goes on 3, 4, 5."""
    return prefix.num_tokens


def prefix_hash_token(prefix: Prefix) -> int:
    """A hash of the prefix; when sampled, also of seed and choice. Any gap, repeat or wrong token shows in the rest."""
    if prefix.greedy:
        return prefix.digest >> 32
    return _mix(_mix(prefix.digest, prefix.seed), prefix.choice) >> 32


def digests_of(tokens: Iterable[int], digest: int = 0) -> list[int]:
    """The digest of each prefix that ends with one of `tokens`, where `digest` is that of everything before."""
    digests: list[int] = []
    for token in tokens:
        digest = _mix(digest, token)
        digests.append(digest)
    return digests


def fake_candidates(digest: int, count: int, vocab_size: int) -> list[tuple[int, float]]:
    """The likeliest continuations (token, log-probability) of a prefix: a hash of it. In 64ths, so sums are exact."""
    found: dict[int, float] = {}
    while len(found) < min(count, vocab_size):
        digest = _mix(digest, len(found))
        found.setdefault((digest >> 32) % vocab_size, -(1 + (digest & 0xFF)) / 64)
    return sorted(found.items(), key=lambda each: (-each[1], each[0]))


def fake_logprobs(token: int, num_top: int) -> Logprobs:
    """What the fake model says of a token."""
    return Logprobs(-float(token), tuple(range(num_top)), tuple(-float(id) for id in range(num_top)))


def fake_vector(digest: int, dimensions: int) -> bytes:
    """The vector of a prefix, float32: a hash of it. In 64ths between -2 and 2, and never all of them 0."""
    values: list[float] = []
    for place in range(dimensions):
        digest = _mix(digest, place)
        values.append(((digest >> 32) % 255 - 127) / 64 or 1.0)
    return struct.pack(f"<{dimensions}f", *values)


@dataclass(frozen=True, slots=True, kw_only=True)
class Computed:
    """What a step left on the device. S sampled rows."""

    rows: Rows
    tokens: list[int]  # (S,)
    failed: list[int]  # which of them are none
    unready: list[int]  # which of them are none yet
    more: dict[SlotRef, list[int]]  # behind drafts that were right
    scored: list[Scored]
    ranked: list[Ranked]
    drafted: list[tuple[SlotRef, int]]
    embedded: list[Embedded]


class FakeRunner:
    """A Runner that needs no torch and no model. `step_time_s` makes a demo look alive; tests leave it at 0.

    It keeps no grammar, but puts rows off for one: the first `compile_rows` that a sequence would be sampled in, as if
    it was compiled meanwhile, and once each place that `left_out_every` divides, as if there was no time for its mask.
    """

    def __init__(
        self,
        *,
        name: str = "fake",
        model: str = "fake",
        model_digest: str = "fake",
        num_blocks: int = 256,
        block_size: int = 4,
        max_sequences: int = 64,
        max_step_tokens: int = 256,
        max_model_len: int = 256,
        vocab_size: int = 1000,
        credit: int = 2,
        next_token: NextToken = position_token,
        step_time_s: float = 0.0,
        compile_rows: int = 0,
        left_out_every: int = 0,
        guess: NextToken | None = None,
        max_drafts: int = 4,
        step_overhead_tokens: int = 64,
        embedding_dimensions: int = 8,
    ) -> None:
        """With `guess`, rows may carry drafts: what it says of a prefix, or None for no guess."""
        self._facts = ExecutorFacts(
            name=name,
            model=model,
            model_digest=model_digest,
            vocab_size=vocab_size,
            max_model_len=max_model_len,
            num_blocks=num_blocks,
            block_size=block_size,
            max_sequences=max_sequences,
            max_step_tokens=max_step_tokens,
            credit=credit,
            dtype="none",
            device="none",
            max_drafts=max_drafts if guess is not None else 0,
            step_overhead_tokens=step_overhead_tokens,
            capabilities=(EMBEDS,),
            determinism=determinism_class("fake", model_digest, next_token.__qualname__, str(vocab_size)),
        )
        self._embedding_dimensions = embedding_dimensions
        self._resident = Resident(
            num_blocks=num_blocks,
            block_size=block_size,
            max_sequences=max_sequences,
            max_step_tokens=max_step_tokens,
            max_model_len=max_model_len,
            vocab_size=vocab_size,
        )
        # what the device knows: every token at once, also those that the host has not read yet
        self._token_ids = np.zeros((max_sequences, max_model_len), np.int32)
        self._digests = np.zeros((max_sequences, max_model_len), np.uint64)  # what each row must read back
        self._next_token = next_token
        self._guess = guess
        self._step_time_s = step_time_s
        self._compile_rows = compile_rows
        self._left_out_every = left_out_every
        self._compiling: Counter[int] = Counter()  # rows that each slot's grammar still takes
        self._left_out: dict[int, int] = {}  # of slots with a grammar, the place that was left out last
        self._cells = np.zeros(num_blocks * block_size, _CELL)  # the slab: one cell a token
        self.begin_session()

    def load(self, report: Report) -> ExecutorFacts:
        """Report that there is nothing to load."""
        report("fake model", 1, 1)
        return self._facts

    def begin_session(self) -> None:
        """Forget every sequence and poison the slab."""
        self._resident.clear()
        self._cells["position"] = _POISON

    def idle(self) -> bool:
        """Nothing is left for idle moments."""
        return False

    def launch(self, plan: StepPlan) -> Launched:
        """Run one step. Raises PlanError for a plan that does not fit, SlabMismatch for blocks with other tokens."""
        computed = self._compute(plan)
        sampled = self._resident.advance(
            computed.rows, computed.tokens, computed.failed, unready=computed.unready, more=computed.more
        )
        if self._step_time_s:
            threading.Event().wait(self._step_time_s)
        return Done(result_of(plan, sampled, computed))

    def _compute(self, plan: StepPlan) -> Computed:
        """What the device does: all of the step but for what the host makes of its tokens."""
        rows = self._resident.apply(plan)
        for sequence in plan.new:
            slot, num_known = slot_of(sequence.ref), len(sequence.token_ids)
            self._token_ids[slot, :num_known] = sequence.token_ids
            digests = digests_of(int(token) for token in sequence.token_ids)
            self._digests[slot, :num_known] = np.array(digests, np.uint64)
            self._compiling[slot] = 0
            self._left_out.pop(slot, None)
            if sequence.sampling.grammar is not None:
                self._compiling[slot] = self._compile_rows
                self._left_out[slot] = -1
        for ref, token in zip(plan.told_refs, plan.told_tokens, strict=True):
            slot = slot_of(ref)
            self._know(slot, int(self._resident.num_tokens[slot]) - 1, token)
        if plan.copies:
            failpoints.hit("before_block_copy")
        for source, destination in plan.copies:
            self._cells[self._block(destination)] = self._cells[self._block(source)]
        if rows.max_drafts is not None:
            rows = self._draft(rows)
        self._store(rows)
        self._read_back(rows)
        sampled = rows.slots[rows.samples].tolist()
        unready = [n for n, slot in enumerate(sampled) if self._is_put_off(slot)]
        runs: list[list[int | None]] = [[None]] * len(sampled)
        if failpoints.hit("after_forward_before_sample") != "nan":
            num_drafts = np.zeros_like(rows.slots) if rows.num_drafts is None else rows.num_drafts
            counts = num_drafts[rows.samples].tolist()
            runs = [
                [None] if n in unready else self._choose_run(slot, count)
                for n, (slot, count) in enumerate(zip(sampled, counts, strict=True))
            ]
        refs = [SlotRef(ref) for ref in self._resident.refs[sampled].tolist()]
        tokens = [run[0] for run in runs]
        return Computed(
            rows=rows,
            tokens=[token or 0 for token in tokens],
            failed=[n for n, token in enumerate(tokens) if token is None and n not in unready],
            unready=unready,
            more={ref: [token or 0 for token in run[1:]] for ref, run in zip(refs, runs, strict=True) if run[1:]},
            scored=self._score(rows, runs),
            ranked=self._rank(rows, tokens),
            drafted=drafted(self._resident, rows),
            embedded=self._embed(rows, tokens),
        )

    def _is_put_off(self, slot: int) -> bool:
        """Whether the slot's grammar cannot say yet what comes next. Asked once a row."""
        if self._compiling[slot]:
            self._compiling[slot] -= 1
            return True
        place = int(self._resident.num_tokens[slot])
        if self._left_out_every and self._left_out.get(slot, place) != place and place % self._left_out_every == 0:
            self._left_out[slot] = place
            return True
        return False

    def _draft(self, rows: Rows) -> Rows:
        """Guess behind the rows that may carry drafts, each guess from the ones before it."""
        held, most = self._resident, self._resident.most_drafts(rows)
        drafts: list[list[int]] = [[] for _ in rows.slots]
        for n in np.flatnonzero(most).tolist() if self._guess is not None else ():
            slot = int(rows.slots[n])
            known, digest = int(held.num_tokens[slot]), int(self._digests[slot, held.num_tokens[slot] - 1])
            guessed: list[int] = []
            while len(guessed) < most[n] and self._guess is not None:
                token = self._guess(self._prefix(slot, known + len(guessed), digest))
                if token is None:
                    break
                guessed.append(token % self._facts.vocab_size)
                digest = _mix(digest, guessed[-1])
            drafts[n] = possible(held, slot, guessed)
            end = known + len(drafts[n])
            self._token_ids[slot, known:end] = drafts[n]
            digests = digests_of(drafts[n], int(self._digests[slot, known - 1]))
            self._digests[slot, known:end] = np.array(digests, np.uint64)
        return held.draft(rows, drafts) if any(drafts) else rows

    def _choose_run(self, slot: int, num_drafts: int) -> list[int | None]:
        """The tokens of a row: the next one, and those behind its drafts as long as they are right."""
        known = int(self._resident.num_tokens[slot])
        drafts = self._token_ids[slot, known : known + num_drafts].tolist()
        tokens = [self._choose(slot, 0)]
        for place, guess in enumerate(drafts, start=1):
            if tokens[-1] != guess or guess in self._resident.stop_token_ids[slot]:
                break
            token = self._choose(slot, place)
            if token is None:
                break
            tokens.append(token)
        return tokens

    def _score(self, rows: Rows, runs: list[list[int | None]]) -> list[Scored]:
        """Log-probabilities by hand: a token's is minus itself, and the likeliest are 0, 1, 2 and so on."""
        held, scored = self._resident, list[Scored]()
        for slot, start, stop in zip(rows.slots.tolist(), rows.starts.tolist(), rows.stops.tolist(), strict=True):
            if (num_top := int(held.prompt_logprobs[slot])) >= 0:
                for position in range(start + 1, min(stop + 1, int(held.num_prompt[slot]))):
                    logprobs = fake_logprobs(int(held.token_ids[slot, position]), num_top)
                    scored.append(Scored(SlotRef(int(held.refs[slot])), position, logprobs))
        for slot, run in zip(rows.slots[rows.samples].tolist(), runs, strict=True):
            if slot not in held.beams and (num_top := int(held.logprobs[slot])) >= 0:
                ref, known = SlotRef(int(held.refs[slot])), int(held.num_tokens[slot])
                scored += [
                    Scored(ref, position, fake_logprobs(token, num_top))
                    for position, token in enumerate(run, start=known)
                    if token is not None
                ]
        return scored

    def _rank(self, rows: Rows, tokens: list[int | None]) -> list[Ranked]:
        """The continuations of beams, but of those for which there is no token."""
        held, ranked = self._resident, list[Ranked]()
        for slot, token in zip(rows.slots[rows.samples].tolist(), tokens, strict=True):
            if slot in held.beams and token is not None:
                known, count = int(held.num_tokens[slot]), int(held.num_candidates[slot])
                best = fake_candidates(int(self._digests[slot, known - 1]), count, self._facts.vocab_size)
                index = known - int(held.num_prompt[slot])
                ids, logprobs = zip(*best, strict=True)
                row = Ranked(SlotRef(int(held.refs[slot])), index, ids, logprobs)
                if (num_top := int(held.logprobs[slot])) >= 0:
                    _, top_ids, top = fake_logprobs(0, num_top)
                    row = row._replace(raw=[-float(id) for id in ids], top_ids=top_ids, top=top)
                ranked.append(row)
        return ranked

    def _embed(self, rows: Rows, tokens: list[int | None]) -> list[Embedded]:
        """The vectors of prefixes, but of those for which there is no token."""
        held = self._resident
        return [
            Embedded(
                SlotRef(int(held.refs[slot])),
                fake_vector(int(self._digests[slot, held.num_prompt[slot] - 1]), self._embedding_dimensions),
            )
            for slot, token in zip(rows.slots[rows.samples].tolist(), tokens, strict=True)
            if slot in held.embeds and token is not None
        ]

    def _block(self, block: BlockId) -> slice:
        return slice(block * self._facts.block_size, (block + 1) * self._facts.block_size)

    def _store(self, rows: Rows) -> None:
        """Write the cells of every row before any row reads. No two rows may write the same cell."""
        slots, positions = rows.each_token()
        places = self._resident.slot_mapping(slots, positions)
        if len(np.unique(places)) != len(places):
            raise SlabMismatch("two rows of one step write the same place in the slab")
        self._cells["position"][places] = positions
        self._cells["token"][places] = self._token_ids[slots, positions]
        self._cells["digest"][places] = self._digests[slots, positions]

    def _read_back(self, rows: Rows) -> None:
        """Read the whole prefix of each row through its block table and compare it with what is known."""
        slots, positions = spread(rows.slots, np.zeros_like(rows.stops), rows.stops)
        places = self._resident.slot_mapping(slots, positions)
        cells = self._cells[places]
        right = (
            (cells["position"] == positions)
            & (cells["token"] == self._token_ids[slots, positions])
            & (cells["digest"] == self._digests[slots, positions])
        )
        if not right.all():
            n = int(np.flatnonzero(~right)[0])
            raise SlabMismatch(
                f"slot {slots[n]} position {positions[n]} is in block {places[n] // self._facts.block_size}, "
                f"which holds token {cells['token'][n]} of position {cells['position'][n]}; wanted token "
                f"{self._token_ids[slots[n], positions[n]]}, after the same prefix"
            )

    def _prefix(self, slot: int, num_tokens: int, digest: int) -> Prefix:
        held = self._resident
        return Prefix(
            num_tokens=num_tokens,
            digest=digest,
            greedy=bool(held.temperature[slot] == 0),
            seed=int(held.seed[slot]),
            choice=int(held.choice[slot]),
        )

    def _choose(self, slot: int, ahead: int) -> int | None:
        """Choose the token behind the known ones and `ahead` drafts, which were read back; remember its digest."""
        stop = int(self._resident.num_tokens[slot]) + ahead
        digest = int(self._digests[slot, stop - 1])
        token = self._next_token(self._prefix(slot, stop, digest))
        if token is None:
            return None
        token %= self._facts.vocab_size
        if slot not in self._resident.beams:
            self._know(slot, stop, token)
        return token

    def _know(self, slot: int, position: int, token: int) -> None:
        """The device has another token of the sequence, and the digest that it will have in the slab."""
        self._token_ids[slot, position] = token
        self._digests[slot, position] = _mix(int(self._digests[slot, position - 1]), token)


def result_of(plan: StepPlan, sampled: Sampled, computed: Computed) -> StepResult:
    """What the host makes of a step."""
    return StepResult(
        step=plan.step,
        refs=sampled.refs,
        tokens=sampled.tokens,
        indices=sampled.indices,
        failed=sampled.failed,
        unready=sampled.unready,
        scored=computed.scored,
        ranked=computed.ranked,
        drafted=computed.drafted,
        embedded=computed.embedded,
    )


def _mix(state: int, value: int) -> int:
    """One round of splitmix64 over both: cheap, and no two short inputs are known to meet."""
    state = (state + 0x9E3779B97F4A7C15 + value) & _MASK
    state = (state ^ (state >> 30)) * 0xBF58476D1CE4E5B9 & _MASK
    state = (state ^ (state >> 27)) * 0x94D049BB133111EB & _MASK
    return state ^ (state >> 31)
