"""The resident tables: a plan is applied in the order of the contract, and a wrong plan is refused by name."""

from __future__ import annotations

from dataclasses import replace

import pytest

from common.blocks import slot_mapping
from common.sampling import SamplingParams
from common.step import NewSequence, StepPlan
from common.types import BlockId, SlotRef, slot_ref
from executor.resident import PlanError, Resident, Rows

A, B = slot_ref(0, 0), slot_ref(1, 5)


def resident() -> Resident:
    return Resident(num_blocks=16, block_size=4, max_sequences=4, max_step_tokens=32, max_model_len=20, vocab_size=100)


def sequence(
    ref: SlotRef = A, tokens: int = 6, blocks: tuple[int, ...] = (3, 1), max_tokens: int = 10, **changes: object
) -> NewSequence:
    told = NewSequence(
        ref=ref,
        attempt=0,
        token_ids=list(range(tokens)),
        num_prompt=tokens,
        num_computed=0,
        block_table=[BlockId(b) for b in blocks],
        sampling=SamplingParams(temperature=0.5, top_k=3, top_p=0.9, min_p=0.1, seed=(1 << 64) - 1),
        choice=2,
        max_tokens=max_tokens,
        stop_token_ids=(99,),
    )
    return replace(told, **changes)  # type: ignore[arg-type]


def plan(*rows: tuple[SlotRef, int], **columns: object) -> StepPlan:
    told = StepPlan(step=0, refs=[ref for ref, _ in rows], num_scheduled=[count for _, count in rows])
    return replace(told, **columns)  # type: ignore[arg-type]


def blocks(held: Resident, slot: int) -> list[int]:
    return [int(block) for block in held.block_tables[slot, : held.num_blocks[slot]]]


def shape(rows: Rows) -> list[tuple[int, int, int, bool]]:
    return list(zip(rows.slots.tolist(), rows.starts.tolist(), rows.stops.tolist(), rows.samples.tolist(), strict=True))


def test_a_row_samples_when_it_reaches_the_end_of_the_known_tokens() -> None:
    held = resident()

    first = held.apply(plan((A, 4), new=[sequence()]))
    assert shape(first) == [(0, 0, 4, False)]
    assert held.advance(first, []).tokens == []

    second = held.apply(plan((A, 2)))
    assert shape(second) == [(0, 4, 6, True)]
    sampled = held.advance(second, [42])
    assert (sampled.refs, sampled.tokens, sampled.indices) == ([A], [42], [0])

    third = held.apply(plan((A, 1)))  # the sampled token is known here: it feeds the next row
    assert shape(third) == [(0, 6, 7, True)]
    assert held.token_ids[0, 6] == 42
    assert held.advance(third, [43]).indices == [1]


def test_a_beam_samples_nothing_and_goes_on_from_what_it_is_told() -> None:
    held = resident()
    first = held.apply(plan((A, 6), (B, 3), new=[sequence(num_candidates=4), sequence(B, 3, (5,))]))
    assert shape(first) == [(0, 0, 6, True), (1, 0, 3, True)]
    sampled = held.advance(first, [41, 42])
    assert (sampled.refs, sampled.tokens, sampled.failed) == ([B], [42], [])

    told = plan((A, 1), told_refs=[A], told_tokens=[7])
    assert shape(held.apply(told)) == [(0, 6, 7, True)]
    assert held.token_ids[0, :7].tolist() == [0, 1, 2, 3, 4, 5, 7]
    assert held.told_places(told).tolist() == [6]


def test_a_beam_that_failed_is_told_as_any_row() -> None:
    held = resident()
    rows = held.apply(plan((A, 6), new=[sequence(num_candidates=4)]))

    sampled = held.advance(rows, [0], failed=[0])

    assert (sampled.refs, sampled.failed) == ([], [A])


@pytest.mark.parametrize(
    ("ref", "token", "says"),
    [
        (A, 100, "told a token outside the vocabulary of 100"),
        (B, 7, "is told a token, and is no beam that waits for one"),
        (slot_ref(2, 0), 7, "not resident"),
    ],
)
def test_a_token_that_cannot_be_told_is_refused(ref: SlotRef, token: int, says: str) -> None:
    held = resident()
    held.advance(held.apply(plan((A, 6), (B, 3), new=[sequence(num_candidates=4), sequence(B, 3, (5,))])), [0, 0])
    with pytest.raises(PlanError, match=says):
        held.apply(plan(told_refs=[ref], told_tokens=[token]))


def test_a_token_is_not_told_twice_in_one_place() -> None:
    held = resident()
    held.advance(held.apply(plan((A, 6), new=[sequence(num_candidates=4)])), [0])
    held.apply(plan(told_refs=[A], told_tokens=[7]))
    with pytest.raises(PlanError, match="no beam that waits for one"):
        held.apply(plan(told_refs=[A], told_tokens=[7]))


def test_the_tables_follow_the_plan_in_the_order_release_admit_append_replace() -> None:
    held = resident()
    held.advance(held.apply(plan((A, 6), new=[sequence()])), [7])
    again = slot_ref(0, 1)

    held.apply(
        plan(
            released=[A],
            new=[sequence(again, blocks=(5,)), sequence(B, blocks=(6,))],
            append_refs=[again, B, again],
            append_blocks=[7, 8, 9],
            replace_refs=[again],
            replace_indices=[1],
            replace_blocks=[10],
        )
    )

    assert blocks(held, 0) == [5, 10, 9]
    assert blocks(held, 1) == [6, 8]


def test_sampling_parameters_reach_their_columns_unchanged() -> None:
    held = resident()

    held.apply(plan(new=[sequence(B)]))

    assert held.temperature[1] == 0.5
    assert held.top_k[1] == 3
    assert held.top_p[1] == 0.9
    assert held.min_p[1] == 0.1
    assert held.seed[1] == (1 << 64) - 1
    assert held.choice[1] == 2


def test_a_resumed_sequence_counts_its_output_from_the_prompt() -> None:
    held = resident()
    resumed = sequence(tokens=6, num_prompt=4, num_computed=4, max_tokens=3)

    sampled = held.advance(held.apply(plan((A, 2), new=[resumed])), [50])

    assert sampled.indices == [2]
    assert held.finished[0]  # two tokens were committed before, this was the third


@pytest.mark.parametrize(
    ("told", "tokens"),
    [
        (sequence(), [99]),  # a stop token id
        (sequence(max_tokens=2), [1, 2]),
        (sequence(max_tokens=1000, tokens=18, blocks=(0, 1, 2, 3, 4)), [1, 2]),  # the model's context is 20
    ],
)
def test_a_finished_sequence_is_skipped_until_it_is_released(told: NewSequence, tokens: list[int]) -> None:
    held = resident()
    rows = held.apply(plan((A, told.num_prompt), new=[told]))
    for n, token in enumerate(tokens):
        assert not held.finished[0]
        held.advance(rows, [token])
        if n + 1 < len(tokens):
            rows = held.apply(plan((A, 1)))

    follower = sequence(B, blocks=(5, 6))
    late = held.apply(plan((A, 1), (B, 6), new=[follower], replace_refs=[A], replace_indices=[0], replace_blocks=[9]))

    assert shape(late) == [(1, 0, 6, True)]
    held.apply(plan(released=[A]))
    with pytest.raises(PlanError, match="not resident"):
        held.apply(plan((A, 1)))


def test_a_row_without_finite_logits_ends_and_disturbs_no_other() -> None:
    held = resident()
    rows = held.apply(plan((A, 6), (B, 6), new=[sequence(), sequence(B, blocks=(5, 6))]))

    sampled = held.advance(rows, [1, 2], failed=[0])

    assert sampled.failed == [A]
    assert (sampled.refs, sampled.tokens, sampled.indices) == ([B], [2], [0])
    assert shape(held.apply(plan((A, 1), (B, 1)))) == [(1, 6, 7, True)]


def test_a_row_runs_again_before_its_token_is_known() -> None:
    held = resident()
    first = held.reserve(held.apply(plan((A, 6), new=[sequence()])))
    rows = held.apply(plan((A, 1)))
    assert shape(rows) == [(0, 6, 7, True)]
    second = held.reserve(rows)

    told = [held.settle(step, [token]) for step, token in ((first, 41), (second, 42))]

    assert [(sampled.refs, sampled.tokens, sampled.indices) for sampled in told] == [([A], [41], [0]), ([A], [42], [1])]
    assert held.token_ids[0, 6:8].tolist() == [41, 42]
    assert shape(held.apply(plan((A, 1)))) == [(0, 7, 8, True)]


def test_a_row_that_is_as_long_as_it_may_be_is_not_run_again_though_its_token_is_unknown() -> None:
    held = resident()
    step = held.reserve(held.apply(plan((A, 6), new=[sequence(max_tokens=1)])))

    assert shape(held.apply(plan((A, 1)))) == []
    assert held.settle(step, [42]).tokens == [42]


@pytest.mark.parametrize("fails", [False, True])
def test_what_was_launched_before_a_sequences_end_was_seen_is_dropped(fails: bool) -> None:
    held = resident()
    follower = sequence(B, blocks=(5, 6, 7))
    first = held.reserve(held.apply(plan((A, 6), (B, 6), new=[sequence(), follower])))
    second = held.reserve(held.apply(plan((A, 1), (B, 1))))
    third = held.reserve(held.apply(plan((A, 1), (B, 1))))

    ended = held.settle(first, [0 if fails else 99, 1], failed=[0] if fails else [])
    assert (ended.refs, ended.failed) == (([B], [A]) if fails else ([A, B], []))
    late = held.settle(second, [99, 2])
    assert (late.refs, late.tokens, late.indices, late.failed) == ([B], [2], [1], [])
    late = held.settle(third, [0, 3], failed=[0])  # what comes behind a last token may well be none
    assert (late.refs, late.tokens, late.indices, late.failed) == ([B], [3], [2], [])
    assert shape(held.apply(plan((A, 1), (B, 1)))) == [(1, 8, 9, True)]


def test_a_sequence_gets_no_token_of_the_one_that_had_its_slot_before() -> None:
    held = resident()
    again = slot_ref(0, 1)
    first = held.reserve(held.apply(plan((A, 6), new=[sequence()])))
    second = held.reserve(held.apply(plan((A, 1))))
    third = held.reserve(held.apply(plan((again, 6), released=[A], new=[sequence(again, blocks=(7, 8))])))

    told = held.settle(first, [41])  # it may only have been preempted: then this is its next token
    assert (told.refs, told.tokens, told.indices) == ([A], [41], [0])
    assert held.settle(second, [0], failed=[0]).failed == [A]
    assert held.token_ids[0, :6].tolist() == list(range(6))
    sampled = held.settle(third, [43])
    assert (sampled.refs, sampled.tokens, sampled.indices) == ([again], [43], [0])
    assert shape(held.apply(plan((again, 1)))) == [(0, 6, 7, True)]


def test_a_session_that_is_over_leaves_nothing_to_settle() -> None:
    held = resident()
    held.reserve(held.apply(plan((A, 6), new=[sequence()])))

    held.clear()

    assert held.advance(held.apply(plan((A, 6), new=[sequence()])), [42]).tokens == [42]


def test_the_places_in_the_slab_are_those_of_the_shared_formula() -> None:
    held = resident()
    rows = held.apply(plan((B, 3), (A, 6), new=[sequence(), sequence(B, blocks=(5, 6))]))

    slots, positions = rows.each_token()

    assert slots.tolist() == [1, 1, 1, 0, 0, 0, 0, 0, 0]
    assert positions.tolist() == [0, 1, 2, 0, 1, 2, 3, 4, 5]
    assert held.slot_mapping(slots, positions).tolist() == [
        *slot_mapping([BlockId(5), BlockId(6)], 0, 3, 4),
        *slot_mapping([BlockId(3), BlockId(1)], 0, 6, 4),
    ]


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        (plan((B, 1)), "generation 5, has a row but is not resident"),
        (plan((slot_ref(0, 1), 1)), "generation 1, has a row but is not resident"),
        (plan((slot_ref(9, 0), 1)), "slot 9, .* not resident"),
        (plan((A, 1), (A, 1)), "two rows in one step"),
        (plan((A, 7)), r"positions \[0, 7\) of 6 known tokens"),
        (plan((A, 0)), r"positions \[0, 0\)"),
        (plan(new=[sequence(A)]), "admitted to the place of"),
        (plan(new=[sequence(slot_ref(4, 0))]), "slot 4 of 4"),
        (plan(new=[sequence(B, blocks=(16,))]), "block 16 of a slab of 16"),
        (plan(new=[sequence(B, num_computed=6)]), "6 tokens, 6 of them computed"),
        (plan(new=[sequence(B, tokens=20)]), "nothing left to generate"),
        (plan(new=[sequence(B, num_prompt=4, max_tokens=2)]), "nothing left to generate"),
        (plan(new=[sequence(B, token_ids=[100], num_prompt=1)]), "outside the vocabulary"),
        (plan(new=[sequence(B, blocks=(0, 1, 2, 3, 4, 5))]), "6 blocks, a table holds 5"),
        (plan((B, 6), new=[sequence(B, blocks=(4,))]), "6 known tokens in 1 blocks of 4"),
        (plan(append_refs=[A], append_blocks=[-1]), "block -1"),
        (plan(append_refs=[A] * 4, append_blocks=[4, 5, 6, 7]), "past the 5 blocks"),
        (plan(append_refs=[B], append_blocks=[4]), "not resident"),
        (plan(replace_refs=[A], replace_indices=[2], replace_blocks=[4]), "replaces block 2 of 2"),
        (plan(released=[B]), "not resident"),
        (plan(copies=[(0, 16)]), "a copy names block 16"),
        (plan((A, 6), (B, 18), (slot_ref(2, 0), 18), new=[
            sequence(B, tokens=18, blocks=(4, 5, 6, 7, 8)),
            sequence(slot_ref(2, 0), tokens=18, blocks=(9, 10, 11, 12, 13)),
        ]), "42 tokens in a step of at most 32"),
    ],
)  # fmt: skip
def test_a_plan_that_does_not_fit_is_refused_by_name(wrong: StepPlan, says: str) -> None:
    held = resident()
    held.apply(plan(new=[sequence()]))

    with pytest.raises(PlanError, match=says):
        held.apply(wrong)


def test_a_new_session_starts_from_nothing() -> None:
    held = resident()
    held.advance(held.apply(plan((A, 6), new=[sequence()])), [99])

    held.clear()

    assert shape(held.apply(plan((A, 6), new=[sequence()]))) == [(0, 0, 6, True)]
