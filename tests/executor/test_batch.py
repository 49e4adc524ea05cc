"""The columns of one forward pass, for a batch small enough to write out."""

from __future__ import annotations

from common.sampling import SamplingParams
from common.step import NewSequence, StepPlan
from common.types import BlockId, SlotRef, slot_ref
from executor.batch import build_batch
from executor.resident import Resident


def sequence(ref: SlotRef, tokens: int, computed: int, blocks: list[int], committed: int = 0) -> NewSequence:
    return NewSequence(
        ref=ref,
        attempt=0,
        token_ids=list(range(tokens)),
        num_prompt=tokens - committed,
        num_computed=computed,
        block_table=[BlockId(block) for block in blocks],
        sampling=SamplingParams(),
        choice=0,
        max_tokens=50,
        stop_token_ids=(),
    )


def test_a_mixed_step_lays_its_decode_rows_first_and_samples_in_the_plans_order() -> None:
    held = Resident(num_blocks=16, block_size=4, max_sequences=4, max_step_tokens=64, max_model_len=20, vocab_size=100)
    chunk, whole, decode = slot_ref(0, 0), slot_ref(1, 0), slot_ref(2, 0)
    rows = held.apply(
        StepPlan(
            step=0,
            refs=[chunk, whole, decode],
            num_scheduled=[2, 3, 1],
            new=[
                sequence(chunk, 10, 3, [5, 6]),
                sequence(whole, 3, 0, [9]),
                sequence(decode, 6, 5, [2, 3], committed=2),
            ],
        )
    )

    batch = build_batch(held, rows)

    assert batch.num_decodes == 1
    assert batch.query_start_loc.tolist() == [0, 1, 3, 6]
    assert batch.positions.tolist() == [5, 3, 4, 0, 1, 2]
    assert batch.token_places.tolist() == [45, 3, 4, 20, 21, 22]
    assert batch.slot_mapping.tolist() == [13, 23, 24, 36, 37, 38]
    assert batch.seq_lens.tolist() == [6, 5, 3]
    assert batch.block_tables.tolist() == [[2, 3], [5, 6], [9, 0]]
    assert batch.logits_indices.tolist() == [5, 0]  # the whole prompt, then the decode row, as in the plan
    assert batch.sampled_slots.tolist() == [1, 2]
    assert batch.sampled_places.tolist() == [23, 46]
    assert batch.sampled_indices.tolist() == [0, 2]


def test_drafts_follow_their_row_and_what_is_sampled_behind_them_comes_place_by_place() -> None:
    held = Resident(num_blocks=16, block_size=4, max_sequences=4, max_step_tokens=64, max_model_len=20, vocab_size=100)
    first, plain, second = slot_ref(0, 0), slot_ref(1, 0), slot_ref(2, 0)
    new = [sequence(first, 3, 0, [5, 6]), sequence(plain, 6, 5, [2, 3]), sequence(second, 2, 1, [9])]
    plan = StepPlan(step=0, refs=[first, plain, second], num_scheduled=[3, 1, 1], new=new, max_drafts=[2, 0, 2])
    rows = held.draft(held.apply(plan), [[70, 71], [], [80, 81]])

    batch = build_batch(held, rows)

    assert batch.num_decodes == 1
    assert batch.positions.tolist() == [5, 0, 1, 2, 3, 4, 1, 2, 3]
    assert held.token_ids.reshape(-1)[batch.token_places].tolist() == [5, 0, 1, 2, 70, 71, 1, 80, 81]
    assert batch.seq_lens.tolist() == [6, 5, 4]
    assert batch.slot_mapping.tolist() == [13, 20, 21, 22, 23, 24, 37, 38, 39]
    assert batch.logits_indices.tolist() == [3, 0, 6, 4, 7, 5, 8]  # behind what is known, then each row's first draft
    assert batch.sampled_indices.tolist() == [0, 0, 0]
    assert batch.draft_rows.tolist() == [0, 2, 0, 2]
    assert batch.draft_places.tolist() == [1, 1, 2, 2]
