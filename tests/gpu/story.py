"""Random stories of plans, told as a scheduler would that hears of results only some steps later."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from common.blocks import blocks_for
from common.sampling import SamplingParams
from common.step import NewSequence, StepPlan, StepResult
from common.types import BlockId, SlotRef, slot_ref

BLOCK_SIZE = 4
NUM_SLOTS = 6
NUM_BLOCKS = 96
MAX_STEP_TOKENS = 48


@dataclass
class _Living:
    told: NewSequence
    blocks: list[BlockId]
    num_computed: int
    num_known: int  # planned ones included


@dataclass
class Story:
    """Plans of one session. `samplings` are what sequences may ask for; results are heard `lag` steps late."""

    seed: int
    samplings: Sequence[SamplingParams]
    lag: int
    vocab_size: int
    num_slots: int = NUM_SLOTS
    max_step_tokens: int = MAX_STEP_TOKENS
    num_blocks: int = NUM_BLOCKS
    _rng: random.Random = field(init=False)
    _living: dict[int, _Living] = field(default_factory=dict)
    _generations: dict[int, int] = field(default_factory=dict)
    _free: list[BlockId] = field(init=False)
    _results: list[StepResult] = field(default_factory=list)
    _over: set[SlotRef] = field(default_factory=set)
    _next_step: int = 0

    def __post_init__(self) -> None:
        self._rng = random.Random(self.seed)
        self._free = [BlockId(block) for block in range(1, self.num_blocks)]
        self._rng.shuffle(self._free)

    def hear(self, result: StepResult) -> None:
        """Take the result of the next step, for later."""
        self._results.append(result)

    def plan(self) -> StepPlan:
        """The next plan."""
        rng = self._rng
        columns: dict[str, list[Any]] = {
            name: []
            for name in (
                *("refs", "num_scheduled", "append_refs", "append_blocks", "new", "released", "copies"),
                *("replace_refs", "replace_indices", "replace_blocks"),
            )
        }
        for result in self._results[: max(0, self._next_step - self.lag)]:
            self._note(result)
        for slot, living in list(self._living.items()):
            if living.told.ref in self._over or rng.random() < 0.02:
                columns["released"].append(living.told.ref)
                self._free = living.blocks + self._free if rng.random() < 0.5 else self._free + living.blocks
                del self._living[slot]
        budget = self.max_step_tokens
        for slot in range(self.num_slots):
            if slot not in self._living and rng.random() < 0.5:
                self._admit(slot, columns)
        order = list(self._living.items())
        rng.shuffle(order)
        for _, living in order:
            wanted = living.num_known - living.num_computed
            granted = min(budget, wanted if rng.random() < 0.6 else rng.randint(1, wanted))
            if granted and rng.random() < 0.95 and self._grow(living, granted, columns):
                budget -= granted
                columns["refs"].append(living.told.ref)
                columns["num_scheduled"].append(granted)
                living.num_computed += granted
                living.num_known += living.num_computed == living.num_known
        plan = StepPlan(step=self._next_step, **columns)
        self._next_step += 1
        return plan

    def _note(self, result: StepResult) -> None:
        self._over.update(result.failed)
        for ref, token, index in zip(result.refs, result.tokens, result.indices, strict=True):
            for living in self._living.values():
                told = living.told
                if told.ref == ref and (token in told.stop_token_ids or index + 1 >= told.max_tokens):
                    self._over.add(ref)

    def _admit(self, slot: int, columns: dict[str, list[Any]]) -> None:
        rng = self._rng
        ref = slot_ref(slot, self._generations.get(slot, -1) + 1)
        sources = [each for each in self._living.values() if each.num_computed >= len(each.told.token_ids)]
        source = rng.choice(sources) if sources and rng.random() < 0.4 else None
        tokens = (
            source.told.token_ids if source else [rng.randrange(3, self.vocab_size) for _ in range(rng.randint(1, 24))]
        )
        num_blocks = blocks_for(len(tokens), BLOCK_SIZE)
        if len(self._free) < num_blocks + 4:
            return
        blocks = [self._free.pop(0) for _ in range(num_blocks)]
        num_computed = 0
        if source:
            num_computed = rng.randrange(len(tokens))
            copied = blocks_for(num_computed, BLOCK_SIZE)
            columns["copies"] += zip(source.blocks[:copied], blocks[:copied], strict=True)
        num_prompt = rng.randint(1, len(tokens))
        told = NewSequence(
            ref=ref,
            attempt=0,
            token_ids=tokens,
            num_prompt=num_prompt,
            num_computed=num_computed,
            block_table=list(blocks),
            sampling=rng.choice(self.samplings),
            choice=rng.randrange(3),
            max_tokens=len(tokens) - num_prompt + rng.randint(1, 12),
            stop_token_ids=tuple(rng.sample(range(3, self.vocab_size), 8)),
        )
        self._generations[slot] = self._generations.get(slot, -1) + 1
        self._living[slot] = _Living(told=told, blocks=blocks, num_computed=num_computed, num_known=len(tokens))
        columns["new"].append(told)

    def _grow(self, living: _Living, granted: int, columns: dict[str, list[Any]]) -> bool:
        """Give it the blocks for so many tokens; once in a while, move one that it has."""
        rng, is_new = self._rng, living.told in columns["new"]
        needed = blocks_for(living.num_computed + granted, BLOCK_SIZE) - len(living.blocks)
        if needed > 0 and (is_new or len(self._free) < needed):
            return False
        for _ in range(needed):
            block = self._free.pop(0)
            living.blocks.append(block)
            columns["append_refs"].append(living.told.ref)
            columns["append_blocks"].append(block)
        if self._free and not is_new and rng.random() < 0.1:
            index, block = rng.randrange(len(living.blocks)), self._free.pop(0)
            columns["copies"].append((living.blocks[index], block))
            columns["replace_refs"].append(living.told.ref)
            columns["replace_indices"].append(index)
            columns["replace_blocks"].append(block)
            self._free.append(living.blocks[index])
            living.blocks[index] = block
        return True
