"""The fake runner: tokens by hand, and a slab in which every mistake about blocks is found at once."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace

import pytest

from common.sampling import SamplingParams
from common.step import NewSequence, StepPlan, StepResult
from common.types import BlockId, SlotRef, slot_ref
from executor.fake_runner import FakeRunner, Prefix, SlabMismatch, digests_of, prefix_hash_token
from executor.runner import execute

A, B = slot_ref(0, 0), slot_ref(1, 0)


def sequence(
    ref: SlotRef, tokens: list[int], blocks: list[int], *, computed: int = 0, **changes: object
) -> NewSequence:
    told = NewSequence(
        ref=ref,
        attempt=0,
        token_ids=tokens,
        num_prompt=len(tokens),
        num_computed=computed,
        block_table=[BlockId(block) for block in blocks],
        sampling=SamplingParams(temperature=0.0),
        choice=0,
        max_tokens=100,
        stop_token_ids=(),
    )
    return replace(told, **changes)  # type: ignore[arg-type]


class World:
    """A fake runner and the number of the next step."""

    def __init__(self, **settings: object) -> None:
        self.runner = FakeRunner(**{"block_size": 4, "num_blocks": 16, "vocab_size": 1000, **settings})  # type: ignore[arg-type]
        self.next_step = 0

    def step(self, *rows: tuple[SlotRef, int], **columns: object) -> StepResult:
        told = StepPlan(step=self.next_step, refs=[r for r, _ in rows], num_scheduled=[n for _, n in rows])
        self.next_step += 1
        return execute(self.runner, replace(told, **columns))  # type: ignore[arg-type]


def test_the_next_token_is_the_number_of_tokens_before_it() -> None:
    world = World()

    assert world.step((A, 2), new=[sequence(A, [7, 8, 9], [5])]).tokens == []
    assert world.step((A, 1)).tokens == [3]
    result = world.step((A, 1))

    assert (result.step, result.refs, result.tokens, result.indices, result.failed) == (2, [A], [4], [1], [])


def test_a_token_is_taken_modulo_the_vocabulary() -> None:
    world = World(vocab_size=5)

    assert world.step((A, 6), new=[sequence(A, [1] * 6, [5, 6])]).tokens == [1]


def test_a_step_in_flight_skips_a_sequence_that_met_its_stop_token() -> None:
    world = World()
    world.step((A, 3), new=[sequence(A, [7, 8, 9], [5], stop_token_ids=(3,))])

    assert world.step((A, 1)).refs == []


def test_a_row_whose_model_gives_no_finite_logits_fails_alone() -> None:
    world = World(next_token=lambda prefix: None if prefix.num_tokens == 2 else 11)

    result = world.step((A, 2), (B, 3), new=[sequence(A, [1, 2], [5]), sequence(B, [1, 2, 3], [6])])

    assert result.failed == [A]
    assert (result.refs, result.tokens) == ([B], [11])


def test_a_prefix_hit_reads_what_another_sequence_wrote_also_in_the_same_step() -> None:
    world = World()
    prompt = [1, 2, 3, 4, 5]

    result = world.step((B, 1), (A, 5), new=[sequence(A, prompt, [8, 9]), sequence(B, prompt, [8, 10], computed=4)])

    assert result.tokens == [5, 5]


def test_a_copied_block_holds_the_prefix_it_was_copied_with() -> None:
    world = World()
    world.step((A, 6), new=[sequence(A, [1, 2, 3, 4, 5, 6], [8, 9])])

    forked = sequence(B, [1, 2, 3, 4, 5, 7], [8, 10], computed=5)
    assert world.step((B, 1), new=[forked], copies=[(9, 10)]).tokens == [6]


@pytest.mark.parametrize(
    ("story", "second"),
    [
        ("the copy is forgotten", sequence(B, [1, 2, 3, 4, 5, 7], [8, 10], computed=5)),
        ("the hit is one token too long", sequence(B, [1, 2, 3, 4, 5, 9, 7], [8, 9], computed=6)),
        ("the block holds other tokens", sequence(B, [1, 2, 9, 4, 7], [8, 10], computed=4)),
        ("the block stands after another prefix", sequence(B, [5, 6, 7, 8, 9, 10, 11, 12, 1], [11, 9, 12], computed=8)),
        ("two sequences own a block", sequence(B, [1, 2, 3, 7], [8])),
    ],
)
def test_a_mistake_about_blocks_is_found_at_once(story: str, second: NewSequence) -> None:
    world = World()
    world.step((A, 5), new=[sequence(A, [1, 2, 3, 4, 5, 6], [8, 9])])

    with pytest.raises(SlabMismatch):
        world.step((B, len(second.token_ids) - second.num_computed), (A, 1), new=[second])


def test_the_same_tokens_after_another_prefix_are_not_the_same_cell() -> None:
    world = World()
    world.step((A, 8), new=[sequence(A, [1, 2, 3, 4, 5, 6, 7, 8], [8, 9])])
    world.step((B, 4), new=[sequence(B, [4, 3, 2, 1], [10])])

    wrong_hit = sequence(slot_ref(2, 0), [4, 3, 2, 1, 5, 6, 7, 8, 9], [10, 9, 11], computed=8)
    with pytest.raises(SlabMismatch, match="position 4"):
        world.step((slot_ref(2, 0), 1), new=[wrong_hit])


def test_a_new_session_reads_nothing_of_the_old_one() -> None:
    world = World()
    world.step((A, 4), new=[sequence(A, [1, 2, 3, 4], [8])])

    world.runner.begin_session()

    with pytest.raises(SlabMismatch):
        world.step((A, 1), new=[sequence(A, [1, 2, 3, 4, 5], [8, 9], computed=4)])


def test_a_hashed_token_depends_on_prefix_seed_and_choice_and_greedy_on_the_prefix_alone() -> None:
    def token(tokens: list[int], *, greedy: bool = False, seed: int = 1, choice: int = 0) -> int:
        digest = digests_of(tokens)[-1]
        return prefix_hash_token(Prefix(num_tokens=len(tokens), digest=digest, greedy=greedy, seed=seed, choice=choice))

    sampled = {token([1, 2]), token([2, 1]), token([1, 2], seed=2), token([1, 2], choice=1), token([1, 2], greedy=True)}
    assert len(sampled) == 5
    assert token([1, 2], greedy=True) == token([1, 2], greedy=True, seed=9, choice=3)


def test_the_tokens_do_not_depend_on_chunks_blocks_or_company() -> None:
    prompt = [5, 3, 8, 1, 9, 2, 7]
    alone = World(next_token=prefix_hash_token)
    expected = [*alone.step((A, 7), new=[sequence(A, prompt, [1, 2])]).tokens, *alone.step((A, 1)).tokens]

    crowded = World(next_token=prefix_hash_token)
    crowded.step((B, 3), new=[sequence(B, [1, 1, 1], [4])])
    crowded.step((A, 3), (B, 1), new=[sequence(A, prompt, [9])])
    second = crowded.step((B, 1), (A, 4), append_refs=[A, B], append_blocks=[3, 5])
    third = crowded.step((A, 1), (B, 1))

    assert [second.tokens[second.refs.index(A)], third.tokens[third.refs.index(A)]] == expected


def test_the_fake_runner_needs_neither_torch_nor_transformers() -> None:
    modules = "executor.batch, executor.fake_runner, executor.runner, sys"
    said = subprocess.run(
        [sys.executable, "-c", f"import {modules}; print({{'torch', 'transformers'}} & set(sys.modules))"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert said.stdout.strip() == "set()"
