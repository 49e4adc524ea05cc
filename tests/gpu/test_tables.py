"""The mirrored tables: after every plan they are what the resident tables are."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from common.sampling import SamplingParams
from common.step import NewSequence, StepPlan
from common.types import BlockId, SlotRef, slot_ref
from executor.gpu.tables import MirroredTables
from executor.resident import Resident

A, B, C = slot_ref(0, 0), slot_ref(1, 0), slot_ref(2, 0)
SLOTS, POSITIONS, BLOCK_SIZE = 3, 18, 4


def told(ref: SlotRef, num_tokens: int = 5, blocks: Sequence[int] = (3, 1), **sampling: Any) -> NewSequence:
    return NewSequence(
        ref=ref,
        attempt=0,
        token_ids=list(range(10, 10 + num_tokens)),
        num_prompt=num_tokens,
        num_computed=0,
        block_table=[BlockId(block) for block in blocks],
        sampling=SamplingParams(**{"temperature": 0.0, **sampling}),
        choice=0,
        max_tokens=12,
        stop_token_ids=(),
    )


class Mirror:
    """Resident tables, and their mirror on the CPU."""

    def __init__(self) -> None:
        self.held = Resident(
            num_blocks=16,
            block_size=BLOCK_SIZE,
            max_sequences=SLOTS,
            max_step_tokens=64,
            max_model_len=POSITIONS,
            vocab_size=100,
        )
        self.mirror = MirroredTables(self.held, torch.device("cpu"))
        self.tables = self.mirror.tables
        self.next_step = 0

    def apply(self, **columns: Any) -> int:
        """Apply a plan without rows to both; return the number of entries that were sent."""
        plan = StepPlan(step=self.next_step, refs=[], num_scheduled=[], **columns)
        self.next_step += 1
        self.held.apply(plan)
        updates = self.mirror.updates(plan)
        assert updates.places.dtype == updates.values.dtype == np.int32
        self.mirror.apply(torch.from_numpy(updates.places), torch.from_numpy(updates.values))
        return len(updates.places)

    def check(self, *refs: SlotRef) -> None:
        """Hold every known token, granted block and sampling column of these against the mirror."""
        held, tables = self.held, self.tables
        for slot in [int(ref) & 0xFFFF for ref in refs]:
            known, granted = int(held.num_tokens[slot]), int(held.num_blocks[slot])
            assert tables.token_ids[slot, :known].tolist() == held.token_ids[slot, :known].tolist()
            assert tables.block_tables[slot, :granted].tolist() == held.block_tables[slot, :granted].tolist()
            for name in ("temperature", "top_p", "min_p"):
                assert getattr(tables, name)[slot].item() == np.float32(getattr(held, name)[slot])
            for name in ("top_k", "choice"):
                assert getattr(tables, name)[slot].item() == getattr(held, name)[slot]
            low, high = (int(half) & 0xFFFFFFFF for half in tables.seed[slot])
            assert high << 32 | low == int(held.seed[slot])


def test_an_admitted_sequence_is_mirrored_whole() -> None:
    both = Mirror()
    first = told(A, temperature=0.7, top_k=40, top_p=0.9, min_p=0.05, seed=0xFEDC_BA98_7654_3210)

    both.apply(new=[first, told(C, num_tokens=9, blocks=(7, 8, 9), seed=5)])

    both.check(A, C)


def test_a_table_that_grows_by_several_blocks_is_mirrored() -> None:
    both = Mirror()
    both.apply(new=[told(A), told(B, blocks=(5,))])

    sent = both.apply(append_refs=[B, A, B], append_blocks=[BlockId(9), BlockId(10), BlockId(11)])

    both.check(A, B)
    assert both.tables.block_tables[1].tolist()[:3] == [5, 9, 11]
    assert sent == 3


def test_a_block_that_is_appended_and_replaced_at_once_is_the_replaced_one() -> None:
    both = Mirror()
    both.apply(new=[told(A)])

    both.apply(
        append_refs=[A], append_blocks=[BlockId(9)], replace_refs=[A], replace_indices=[2], replace_blocks=[BlockId(4)]
    )

    both.check(A)
    assert both.tables.block_tables[0].tolist()[:3] == [3, 1, 4]


def test_a_slot_that_is_taken_anew_is_the_new_ones() -> None:
    both = Mirror()
    both.apply(new=[told(A, num_tokens=9, blocks=(7, 8, 9), temperature=1.0, seed=3)])
    again = slot_ref(0, 1)

    both.apply(released=[A], new=[told(again, num_tokens=2, blocks=(2,))])

    both.check(again)


def test_a_plan_that_changes_nothing_sends_nothing() -> None:
    both = Mirror()
    both.apply(new=[told(A)])

    assert both.apply() == 0
    assert both.apply(released=[A]) == 0


def test_the_line_of_nobody_is_never_written() -> None:
    both = Mirror()
    for turn in range(3):
        both.apply(new=[told(slot_ref(slot, turn), seed=7, temperature=1.0) for slot in range(SLOTS)])
        both.apply(released=[slot_ref(slot, turn) for slot in range(SLOTS)])

    assert not both.tables.token_ids[SLOTS].any() and not both.tables.block_tables[SLOTS].any()
    assert both.tables.temperature[SLOTS] == 0 and not both.tables.seed[SLOTS].any()


def test_any_story_is_mirrored() -> None:
    both, rng = Mirror(), random.Random(5)
    living: dict[int, int] = {}  # slot to generation
    for turn in range(60):
        columns: dict[str, Any] = {}
        gone = [slot for slot in living if rng.random() < 0.2]
        columns["released"] = [slot_ref(slot, living.pop(slot)) for slot in gone]
        grown = [slot for slot in living if both.held.num_blocks[slot] < 4 and rng.random() < 0.5]
        columns["append_refs"] = [slot_ref(slot, living[slot]) for slot in grown]
        columns["append_blocks"] = [BlockId(rng.randrange(16)) for _ in grown]
        changed = [slot for slot in living if rng.random() < 0.3]
        columns["replace_refs"] = [slot_ref(slot, living[slot]) for slot in changed]
        columns["replace_indices"] = [rng.randrange(int(both.held.num_blocks[slot])) for slot in changed]
        columns["replace_blocks"] = [BlockId(rng.randrange(16)) for _ in changed]
        come = [slot for slot in range(SLOTS) if slot not in living and rng.random() < 0.5]
        living |= dict.fromkeys(come, turn)
        columns["new"] = [
            told(slot_ref(slot, turn), num_tokens=rng.randrange(1, 8), seed=rng.getrandbits(64), top_p=rng.random())
            for slot in come
        ]

        both.apply(**columns)

        both.check(*(slot_ref(slot, generation) for slot, generation in living.items()))
