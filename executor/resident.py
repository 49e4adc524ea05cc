"""What the executor holds of each sequence between steps, kept current by the plans' deltas.

Tables of numpy columns, one line per slot, so that a batch is gathered and never looped over. Knows no tensor and no
model: `apply` makes a plan true and says which rows run, `advance` folds in what the forward produced. Where steps
follow each other on a device before the host has read a token, `advance` comes in two halves: `reserve` when a step is
launched, for the next plan builds on its numbers, and `settle` when its tokens are there.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final

import numpy as np
from numpy.typing import NDArray

from common.blocks import blocks_for
from common.step import NewSequence, StepPlan
from common.types import MAX_SLOTS, BlockId, SlotRef, generation_of, slot_of
from executor.guide import Grammars, Guide
from executor.token_rules import TokenRules, rules_of

_FREE: Final = -1
_NONE: Final = -1


def spread(
    slots: NDArray[np.int64], starts: NDArray[np.int64], counts: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Write out ranges of positions: [starts, starts + counts) of each slot, as columns slot and position."""
    first = np.cumsum(counts) - counts
    return np.repeat(slots, counts), np.arange(counts.sum()) + np.repeat(starts - first, counts)


class PlanError(Exception):
    """A plan does not fit what is resident here. The two sides have drifted apart: drop the link."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rows:
    """The rows of one step that really run. N rows; the rows of finished sequences are gone."""

    slots: NDArray[np.int64]  # (N,) line in the resident tables
    starts: NDArray[np.int64]  # (N,) first position this step computes
    stops: NDArray[np.int64]  # (N,) one past the last
    samples: NDArray[np.bool_]  # (N,) True where the row reaches the end of the known tokens
    max_drafts: NDArray[np.int64] | None = None  # (N,) drafts that the plan allows each; None: nobody has any
    num_drafts: NDArray[np.int64] | None = None  # (N,) how many of its positions are drafts, the last ones

    @property
    def counts(self) -> NDArray[np.int64]:
        """(N,) tokens that each row computes."""
        return self.stops - self.starts

    @property
    def known_stops(self) -> NDArray[np.int64]:
        """(N,) one past the last position of a known token."""
        return self.stops if self.num_drafts is None else self.stops - self.num_drafts

    def each_token(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return slot and position of every token this step computes, row after row: two columns (T,)."""
        return spread(self.slots, self.starts, self.counts)


@dataclass(slots=True, kw_only=True, eq=False)
class Reserved:
    """The rows of one step that sample, their tokens still to come. S rows, in the order of the plan."""

    slots: NDArray[np.int64]  # (S,) line in the resident tables
    refs: NDArray[np.int64]  # (S,) who lived there when the step was launched
    places: NDArray[np.int64]  # (S,) position of the token in its sequence
    indices: NDArray[np.int64]  # (S,) its output index: 0 is the first after the prompt
    ended: set[SlotRef]  # whose end was seen in an earlier step since: nothing of them counts
    unready: list[SlotRef]  # for which nothing is chosen in this step
    ranked: frozenset[int] = frozenset()  # which of the rows are beams, or embed: they have no token


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampled:
    """What became known in one step. S sampled rows, in the order of the plan."""

    refs: list[SlotRef]  # (S,)
    tokens: list[int]  # (S,)
    indices: list[int]  # (S,) output index of each token: 0 is the first after the prompt
    failed: list[SlotRef]  # rows for which no token could be chosen
    unready: list[SlotRef]  # rows for which none can be chosen yet


class Resident:
    """Every sequence resident in this session. L slots, P positions (max_model_len), M blocks in the longest table."""

    def __init__(
        self,
        *,
        num_blocks: int,
        block_size: int,
        max_sequences: int,
        max_step_tokens: int,
        max_model_len: int,
        vocab_size: int,
        grammars: Grammars | None = None,
    ) -> None:
        """Without `grammars` nobody is guided: for runners that have no logits."""
        assert 0 < max_sequences <= MAX_SLOTS, f"{max_sequences} sequences in at most {MAX_SLOTS} slots"
        self.num_slab_blocks = num_blocks
        self.block_size = block_size
        self.max_step_tokens = max_step_tokens
        self.max_model_len = max_model_len
        self.vocab_size = vocab_size
        self._grammars = grammars

        slots = max_sequences
        self.refs = np.full(slots, _FREE, np.int64)  # (L,) who lives in the slot, or -1
        self.token_ids = np.zeros((slots, max_model_len), np.int32)  # (L, P) the known tokens: the token pool
        # (L,) known tokens: prompt, committed before, sampled here or about to be; too many once it is finished
        self.num_tokens = np.zeros(slots, np.int64)
        self.num_prompt = np.zeros(slots, np.int64)  # (L,)
        self.num_computed = np.zeros(slots, np.int64)  # (L,) tokens whose K and V are in the slab
        self.block_tables = np.zeros((slots, blocks_for(max_model_len, block_size)), np.int32)  # (L, M)
        self.num_blocks = np.zeros(slots, np.int64)  # (L,) entries of the table that are granted
        self.finished = np.zeros(slots, np.bool_)  # (L,) met a token stop condition, or failed: rows are skipped
        self.max_tokens = np.zeros(slots, np.int64)  # (L,) output tokens, counted from the prompt's end
        self.stop_token_ids: list[frozenset[int]] = [frozenset()] * slots  # (L,)

        self.temperature = np.zeros(slots, np.float64)  # (L,) 0 is greedy
        self.top_k = np.zeros(slots, np.int64)  # (L,) 0 keeps every token
        self.top_p = np.ones(slots, np.float64)  # (L,)
        self.min_p = np.zeros(slots, np.float64)  # (L,)
        self.typical_p = np.ones(slots, np.float64)  # (L,)
        self.seed = np.zeros(slots, np.uint64)  # (L,)
        self.choice = np.zeros(slots, np.int64)  # (L,)

        self.repetition_penalty = np.ones(slots, np.float64)  # (L,)
        self.presence_penalty = np.zeros(slots, np.float64)  # (L,)
        self.frequency_penalty = np.zeros(slots, np.float64)  # (L,)
        self.rules: list[TokenRules | None] = [None] * slots  # (L,)
        self.guides: list[Guide | None] = [None] * slots  # (L,) of those whose answer has a grammar
        self.logprobs = np.full(slots, _NONE, np.int64)  # (L,) likeliest tokens beside each sampled one, or -1
        self.prompt_logprobs = np.full(slots, _NONE, np.int64)  # (L,) beside each one of the prompt, or -1
        # plain sets: most batches have nobody in them, and ask for next to nothing
        self.controlled: set[int] = set()  # slots with a penalty, rules or a guide: their logits are edited
        self.scored: set[int] = set()  # slots whose sampled tokens are scored
        self.scored_prompts: set[int] = set()  # slots whose prompts are scored
        self.num_candidates = np.zeros(slots, np.int64)  # (L,) continuations that are ranked of a beam; 0: it is none
        self.beams: set[int] = set()  # slots of beams
        self.embeds: set[int] = set()  # slots of sequences that embed
        self._reserved: deque[Reserved] = deque()  # steps that are launched and not settled

    def clear(self) -> None:
        """Forget every sequence."""
        self.refs.fill(_FREE)
        self.guides[:] = [None] * len(self.guides)
        self._reserved.clear()
        self.controlled.clear()
        self.scored.clear()
        self.scored_prompts.clear()
        self.beams.clear()
        self.embeds.clear()

    def slot_mapping(self, slots: NDArray[np.int64], positions: NDArray[np.int64]) -> NDArray[np.int64]:
        """Place in the slab of each (slot, position): common.blocks.slot_mapping over columns."""
        blocks = self.block_tables[slots, positions // self.block_size].astype(np.int64)
        return blocks * self.block_size + positions % self.block_size

    def apply(self, plan: StepPlan) -> Rows:
        """Release, admit, tell, append and replace, in this order. Returns the rows that run. Copies are the caller's.

        Raises PlanError for an unknown sequence, a wrong generation, a block outside the slab or a position outside
        its table. The tables are then half changed: only `clear` makes them good again.
        """
        for ref in plan.released:
            self._release(ref)
        for sequence in plan.new:
            self._admit(sequence)
        for ref, token in zip(plan.told_refs, plan.told_tokens, strict=True):
            self._tell(ref, token)
        for ref, block in zip(plan.append_refs, plan.append_blocks, strict=True):
            self._append(ref, block)
        for ref, index, block in zip(plan.replace_refs, plan.replace_indices, plan.replace_blocks, strict=True):
            self._replace(ref, index, block)
        for source, destination in plan.copies:
            self._check_blocks((source, destination), "a copy")
        return self._rows(plan)

    def advance(
        self,
        rows: Rows,
        tokens: Sequence[int],
        failed: Iterable[int] = (),
        *,
        unready: Sequence[int] = (),
        more: Mapping[SlotRef, Sequence[int]] | None = None,
    ) -> Sampled:
        """Record that `rows` were computed, and the token of each row that samples; finish what is complete.

        `tokens` has one entry per sampling row, in row order. `failed` are indices into `tokens` for which there is
        none: the sequence ends there. `unready` are those for which there is none yet. `more` are the tokens that
        follow the first one of a row whose drafts were right: all but the last of the row's tokens are drafts, and
        computed.
        """
        sampled = self.settle(self.reserve(rows, unready), tokens, failed)
        return self._go_on(sampled, more) if more else sampled

    def reserve(self, rows: Rows, unready: Sequence[int] = ()) -> Reserved:
        """Record that `rows` are computed, and that those that sample have one token more, which is not known yet.

        The next plan may name them again. A row that is as long now as it may be is finished: its length needs no
        token. Of the sampling rows at `unready` no token will come: their last one is computed again by their next
        row, whose logits are the same. What is reserved is settled in the same order, or forgotten by `clear`.
        """
        self.num_computed[rows.slots] = rows.known_stops
        slots = rows.slots[rows.samples]
        refs, places = self.refs[slots], self.num_tokens[slots]
        indices = places - self.num_prompt[slots]
        late = list(unready)
        ranked = frozenset[int]()
        if self.beams or self.embeds:
            ranked = frozenset(n for n, slot in enumerate(slots.tolist()) if slot in self.beams or slot in self.embeds)
        reserved = Reserved(
            slots=slots,
            refs=refs,
            places=places,
            indices=indices,
            ended=set(),
            unready=refs[late].tolist(),
            ranked=ranked,
        )
        if late:
            self.num_computed[slots[late]] -= 1
            slots, places, indices = (np.delete(column, late) for column in (slots, places, indices))
        self.num_tokens[slots] = places + 1
        self.finished[slots] = (indices + 1 >= self.max_tokens[slots]) | (places + 1 >= self.max_model_len)
        if ranked:  # the tokens of beams, and their end, are told
            without = reserved.slots[sorted(ranked.difference(late))]
            self.num_tokens[without] -= 1
            self.finished[without] = [slot in self.embeds for slot in without.tolist()]
        self._reserved.append(reserved)
        return reserved

    def settle(self, reserved: Reserved, tokens: Sequence[int], failed: Iterable[int] = ()) -> Sampled:
        """Record the tokens of the oldest step that is reserved; finish rows that met a stop token, or failed.

        `tokens` and `failed` as in `advance`. What comes behind the end of its sequence is dropped: the step was
        launched before that was seen. A row whose slot has been released since is told all the same (a sequence that
        was preempted takes its tokens with it), but no table knows it any more.
        """
        oldest = self._reserved.popleft()
        assert reserved is oldest, "steps are settled in the order in which they were reserved"
        slots, refs, places, indices = reserved.slots, reserved.refs, reserved.places, reserved.indices
        assert len(tokens) == len(slots), f"{len(tokens)} tokens for {len(slots)} rows that sample"
        kept_tokens, over = list(tokens), list[SlotRef]()
        without, ended = set(failed), reserved.ended.union(reserved.unready)
        if without or ended or reserved.ranked:
            named = refs.tolist()
            over = [named[n] for n in sorted(without) if named[n] not in ended]
            without |= reserved.ranked
            kept = [n for n, ref in enumerate(named) if n not in without and ref not in ended]
            slots, refs, places, indices = slots[kept], refs[kept], places[kept], indices[kept]
            kept_tokens = [kept_tokens[n] for n in kept]
        sampled = Sampled(
            refs=refs.tolist(),
            tokens=kept_tokens,
            indices=indices.tolist(),
            failed=over[:],
            unready=reserved.unready,
        )

        here = self.refs[slots] == refs
        if not here.all():
            kept_tokens = [token for token, is_here in zip(kept_tokens, here.tolist(), strict=True) if is_here]
            slots, places = slots[here], places[here]
        self.token_ids[slots, places] = kept_tokens
        stops = self.stop_token_ids
        met = [slot for slot, token in zip(slots.tolist(), kept_tokens, strict=True) if token in stops[slot]]
        if met or over:
            self._end([*over, *self.refs[met].tolist()])
        return sampled

    def most_drafts(self, rows: Rows) -> NDArray[np.int64]:
        """Return how many drafts each row may carry (N,): what is allowed, and could still be tokens of its answer."""
        if rows.max_drafts is None:
            return np.zeros(len(rows.slots), np.int64)
        known = self.num_tokens[rows.slots]
        ends = np.minimum(self.num_prompt[rows.slots] + self.max_tokens[rows.slots], self.max_model_len)
        return np.where(rows.samples, np.clip(ends - known - 1, 0, rows.max_drafts), 0)

    def draft(self, rows: Rows, drafts: Sequence[Sequence[int]]) -> Rows:
        """Write each row's drafts behind its known tokens, where the forward reads them; return the longer rows.

        They are no known tokens: whatever comes to stand there is written over them. At most `most_drafts`.
        """
        for slot, tokens in zip(rows.slots.tolist(), drafts, strict=True):
            known = self.num_tokens[slot]
            self.token_ids[slot, known : known + len(tokens)] = tokens
        num_drafts = np.array([len(tokens) for tokens in drafts], np.int64)
        return replace(rows, stops=rows.stops + num_drafts, num_drafts=num_drafts)

    def _go_on(self, sampled: Sampled, more: Mapping[SlotRef, Sequence[int]]) -> Sampled:
        """Record the tokens behind the first ones, each up to where its sequence ends."""
        refs, tokens, indices = list[SlotRef](), list[int](), list[int]()
        for ref, first, index in zip(sampled.refs, sampled.tokens, sampled.indices, strict=True):
            refs.append(ref)
            tokens.append(first)
            indices.append(index)
            slot = slot_of(ref)
            for later, token in enumerate(more.get(ref, ()), start=index + 1):
                if self.finished[slot]:
                    break
                place = int(self.num_tokens[slot])
                self.token_ids[slot, place] = token
                self.num_tokens[slot] = place + 1
                self.num_computed[slot] = place
                is_last = later + 1 >= self.max_tokens[slot] or place + 1 >= self.max_model_len
                self.finished[slot] = is_last or token in self.stop_token_ids[slot]
                refs.append(ref)
                tokens.append(token)
                indices.append(later)
        return replace(sampled, refs=refs, tokens=tokens, indices=indices)

    def _end(self, refs: list[SlotRef]) -> None:
        """Skip later rows of these, and drop what steps in flight will still bring of them."""
        for ref in refs:
            if self.refs[slot_of(ref)] == ref:
                self.finished[slot_of(ref)] = True
        for later in self._reserved:
            later.ended.update(refs)

    def _release(self, ref: SlotRef) -> None:
        slot = self._slot(ref)
        self.refs[slot] = _FREE
        self.guides[slot] = None
        self.controlled.discard(slot)
        self.scored.discard(slot)
        self.scored_prompts.discard(slot)
        self.beams.discard(slot)
        self.embeds.discard(slot)

    def _admit(self, sequence: NewSequence) -> None:
        slot, known, table = slot_of(sequence.ref), len(sequence.token_ids), len(sequence.block_table)
        name = _named(sequence.ref)
        if slot >= len(self.refs):
            raise PlanError(f"{name} is admitted to slot {slot} of {len(self.refs)}")
        if self.refs[slot] != _FREE:
            raise PlanError(f"{name} is admitted to the place of {_named(SlotRef(int(self.refs[slot])))}")
        if not 0 < sequence.num_prompt <= known:
            raise PlanError(f"{name} has {known} tokens, {sequence.num_prompt} of them prompt")
        if not 0 <= sequence.num_computed < known:
            raise PlanError(f"{name} has {known} tokens, {sequence.num_computed} of them computed")
        if known >= self.max_model_len or known - sequence.num_prompt >= sequence.max_tokens:
            raise PlanError(
                f"{name} has nothing left to generate: {known} tokens, {sequence.num_prompt} of them prompt, "
                f"max_tokens {sequence.max_tokens}, max_model_len {self.max_model_len}"
            )
        if table > self.block_tables.shape[1]:
            raise PlanError(f"{name} has {table} blocks, a table holds {self.block_tables.shape[1]}")
        tokens = np.asarray(sequence.token_ids, np.int64)
        if tokens.min() < 0 or tokens.max() >= self.vocab_size:
            raise PlanError(f"{name} has a token outside the vocabulary of {self.vocab_size}")
        self._check_blocks(sequence.block_table, name)
        sampling = sequence.sampling
        ends = [token for token in sequence.stop_token_ids if token < self.vocab_size]
        rules = rules_of(sampling, ends, sequence.min_tokens)
        if rules is not None and any(not 0 <= token < self.vocab_size for token in rules.mentioned()):
            raise PlanError(f"{name} has a rule for a token outside the vocabulary of {self.vocab_size}")

        self.refs[slot] = sequence.ref
        self.token_ids[slot, :known] = tokens
        self.num_tokens[slot] = known
        self.num_prompt[slot] = sequence.num_prompt
        self.num_computed[slot] = sequence.num_computed
        self.block_tables[slot, :table] = sequence.block_table
        self.num_blocks[slot] = table
        self.finished[slot] = False
        self.max_tokens[slot] = sequence.max_tokens
        self.stop_token_ids[slot] = frozenset(sequence.stop_token_ids)
        self.temperature[slot] = sampling.temperature
        self.top_k[slot] = min(sampling.top_k, self.vocab_size)
        self.top_p[slot] = sampling.top_p
        self.min_p[slot] = sampling.min_p
        self.typical_p[slot] = sampling.typical_p
        self.seed[slot] = sampling.seed
        self.choice[slot] = sequence.choice
        self.repetition_penalty[slot] = sampling.repetition_penalty
        self.presence_penalty[slot] = sampling.presence_penalty
        self.frequency_penalty[slot] = sampling.frequency_penalty
        self.rules[slot] = rules
        if sampling.grammar is not None and self._grammars is not None:
            output = tokens[sequence.num_prompt :].tolist()
            self.guides[slot] = self._grammars.guide(sampling.grammar, sequence.domain, ends, output)
        self.num_candidates[slot] = sequence.num_candidates
        self.logprobs[slot] = _NONE if sampling.logprobs is None else sampling.logprobs
        self.prompt_logprobs[slot] = _NONE if sampling.prompt_logprobs is None else sampling.prompt_logprobs
        penalised = sampling.repetition_penalty != 1 or sampling.presence_penalty or sampling.frequency_penalty
        for slots, belongs in (
            (self.controlled, rules is not None or self.guides[slot] is not None or penalised),
            (self.scored, sampling.logprobs is not None),
            (self.scored_prompts, sampling.prompt_logprobs is not None),
            (self.beams, sequence.num_candidates > 0),
            (self.embeds, sequence.embeds),
        ):
            if belongs:
                slots.add(slot)

    def _tell(self, ref: SlotRef, token: int) -> None:
        slot = self._slot(ref)
        known = self.num_tokens[slot]
        if slot not in self.beams or self.num_computed[slot] != known:
            raise PlanError(f"{_named(ref)} is told a token, and is no beam that waits for one")
        if not 0 <= token < self.vocab_size:
            raise PlanError(f"{_named(ref)} is told a token outside the vocabulary of {self.vocab_size}")
        if known >= self.max_model_len:
            raise PlanError(f"{_named(ref)} is told more than {self.max_model_len} tokens")
        self.token_ids[slot, known] = token
        self.num_tokens[slot] = known + 1

    def told_places(self, plan: StepPlan) -> NDArray[np.int64]:
        """(B,) where in the flattened token pool the tokens lie that `plan`, which was applied, told."""
        slots = np.asarray(plan.told_refs, np.int64) & (MAX_SLOTS - 1)
        places: NDArray[np.int64] = slots * self.max_model_len + self.num_tokens[slots] - 1
        return places

    def _append(self, ref: SlotRef, block: BlockId) -> None:
        slot = self._slot(ref)
        self._check_blocks((block,), _named(ref))
        index = self.num_blocks[slot]
        if index >= self.block_tables.shape[1]:
            raise PlanError(f"{_named(ref)} grows past the {self.block_tables.shape[1]} blocks that a table holds")
        self.block_tables[slot, index] = block
        self.num_blocks[slot] = index + 1

    def _replace(self, ref: SlotRef, index: int, block: BlockId) -> None:
        slot = self._slot(ref)
        self._check_blocks((block,), _named(ref))
        if not 0 <= index < self.num_blocks[slot]:
            raise PlanError(f"{_named(ref)} replaces block {index} of {self.num_blocks[slot]}")
        self.block_tables[slot, index] = block

    def _rows(self, plan: StepPlan) -> Rows:
        refs = np.asarray(plan.refs, np.int64)
        granted = np.asarray(plan.num_scheduled, np.int64)
        if len(refs) != len(granted):
            raise PlanError(f"{len(refs)} rows, {len(granted)} grants")
        slots = refs & (MAX_SLOTS - 1)
        known = slots < len(self.refs)
        known[known] = self.refs[slots[known]] == refs[known]
        if not known.all():
            raise PlanError(f"{_named(SlotRef(int(refs[~known][0])))} has a row but is not resident")
        if len(set(plan.refs)) != len(slots):  # of one slot there is one reference
            raise PlanError("a sequence has two rows in one step")
        if granted.sum() > self.max_step_tokens:
            raise PlanError(f"{granted.sum()} tokens in a step of at most {self.max_step_tokens}")

        max_drafts = self._max_drafts(plan, int(granted.sum()))
        finished = self.finished[slots]
        if finished.any():
            slots, granted = slots[~finished], granted[~finished]
            max_drafts = None if max_drafts is None else max_drafts[~finished]
        starts = self.num_computed[slots]
        stops = starts + granted
        wrong = (granted < 1) | (stops > self.num_tokens[slots]) | (stops > self.num_blocks[slots] * self.block_size)
        if wrong.any():
            n = int(np.flatnonzero(wrong)[0])
            slot = slots[n]
            raise PlanError(
                f"{_named(SlotRef(int(self.refs[slot])))} is granted positions [{starts[n]}, {stops[n]}) of "
                f"{self.num_tokens[slot]} known tokens in {self.num_blocks[slot]} blocks of {self.block_size}"
            )
        samples = stops == self.num_tokens[slots]
        if max_drafts is not None:
            beyond = stops + max_drafts > self.num_blocks[slots] * self.block_size
            ranks = self.num_candidates[slots] > 0  # a beam has no token that a draft could be
            wrong = (max_drafts > 0) & (beyond | ~samples | ranks)
            if wrong.any():
                n = int(np.flatnonzero(wrong)[0])
                name = _named(SlotRef(int(self.refs[slots[n]])))
                raise PlanError(
                    f"{name} may carry {max_drafts[n]} drafts behind position {stops[n]} of "
                    f"{self.num_tokens[slots[n]]} known tokens in {self.num_blocks[slots[n]]} blocks"
                )
        return Rows(slots=slots, starts=starts, stops=stops, samples=samples, max_drafts=max_drafts)

    def _max_drafts(self, plan: StepPlan, granted: int) -> NDArray[np.int64] | None:
        """The column (R,); None where nobody has any."""
        if not len(plan.max_drafts):
            return None
        if len(plan.max_drafts) != len(plan.refs):
            raise PlanError(f"{len(plan.refs)} rows, {len(plan.max_drafts)} numbers of drafts")
        column = np.asarray(plan.max_drafts, np.int64)
        if granted + column.sum() > self.max_step_tokens:
            raise PlanError(f"{granted} tokens and {column.sum()} drafts in a step of at most {self.max_step_tokens}")
        return column

    def _slot(self, ref: SlotRef) -> int:
        slot = slot_of(ref)
        if slot >= len(self.refs) or self.refs[slot] != ref:
            raise PlanError(f"{_named(ref)} is not resident")
        return slot

    def _check_blocks(self, blocks: Sequence[BlockId], who: str) -> None:
        for block in blocks:
            if not 0 <= block < self.num_slab_blocks:
                raise PlanError(f"{who} names block {block} of a slab of {self.num_slab_blocks}")


def _named(ref: SlotRef) -> str:
    return f"sequence in slot {slot_of(ref)}, generation {generation_of(ref)},"
