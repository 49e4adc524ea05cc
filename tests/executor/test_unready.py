"""Rows whose grammar says nothing yet: put off, at no cost to anybody, and then what they would have been at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from common.sampling import Grammar, SamplingParams
from common.step import NewSequence, StepPlan, StepResult
from common.types import BlockId, SlotRef, slot_ref
from executor import choosing, controls, guide
from executor.grammar import compile_grammar
from executor.guide import Grammars
from executor.model_runner import ModelRunner
from executor.resident import Resident, Rows
from executor.runner import execute
from tests.executor.guides import held_up, save_letters, until_compiled
from tests.executor.tiny_models import save_tiny

A, B = slot_ref(0, 0), slot_ref(1, 0)
PROMPT = [5, 9, 13, 21, 34, 55, 8]
FREE = SamplingParams(temperature=1.0, seed=4, logprobs=1, prompt_logprobs=0)
GUIDED = replace(FREE, grammar=Grammar("regex", "[0-9]{4}[A-F]{2,9}"))


class World:
    """A runner with a tiny model, and the number of the next step."""

    def __init__(self, folder: Path) -> None:
        self.runner = ModelRunner(
            name="tiny",
            model_folder=folder,
            dtype="float32",
            block_size=16,
            num_blocks=16,
            max_sequences=8,
            num_threads=1,
        )
        self.runner.load(lambda stage, done, total: None)
        self.next_step = 0

    @property
    def grammars(self) -> Grammars:
        found = self.runner._resident._grammars
        assert found is not None
        return found

    def step(self, *rows: tuple[SlotRef, int], new: tuple[NewSequence, ...] = (), max_drafts: int = 0) -> StepResult:
        """`max_drafts`: that each row may carry."""
        plan = StepPlan(
            step=self.next_step,
            refs=[r for r, _ in rows],
            num_scheduled=[n for _, n in rows],
            new=new,
            max_drafts=[max_drafts] * len(rows) if max_drafts else (),
        )
        self.next_step += 1
        return execute(self.runner, plan)

    def until_compiled(self) -> None:
        until_compiled(self.runner._resident)


class Knowing:
    """A proposer that knows the answer to PROMPT."""

    def __init__(self, held: Resident, answer: list[int]) -> None:
        self._held = held
        self._answer = answer

    def begin_session(self) -> None: ...

    def begin_step(self, rows: Rows, copies: Sequence[tuple[BlockId, BlockId]]) -> None: ...

    def propose(self, slots: NDArray[np.int64], most: NDArray[np.int64]) -> list[list[int]]:
        starts = (self._held.num_tokens[slots] - len(PROMPT)).tolist()
        return [self._answer[start : start + count] for start, count in zip(starts, most.tolist(), strict=True)]


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> World:
    folder = save_tiny("llama", tmp_path_factory.mktemp("llama"))
    save_letters(folder)
    return World(folder)


@pytest.fixture
def world(loaded: World) -> World:
    loaded.runner.begin_session()
    return loaded


def told(ref: SlotRef, sampling: SamplingParams, **changes: Any) -> NewSequence:
    new = NewSequence(
        ref=ref,
        attempt=0,
        token_ids=PROMPT,
        num_prompt=len(PROMPT),
        num_computed=0,
        block_table=[BlockId(2 * ref), BlockId(2 * ref + 1)],
        sampling=sampling,
        choice=0,
        max_tokens=9,
        stop_token_ids=(2,),
    )
    return replace(new, **changes)


def undisturbed(world: World, ref: SlotRef, sampling: SamplingParams, count: int) -> list[StepResult]:
    """What each step brings a sequence that is alone, and whose grammar is there when it is needed."""
    world.runner.begin_session()
    found = [world.step((ref, 3), new=(told(ref, sampling),))]
    world.until_compiled()
    found.append(world.step((ref, 4)))
    found += [world.step((ref, 1)) for _ in range(count - 1)]
    assert not any(result.unready for result in found)
    world.runner.begin_session()
    return found


def of(results: list[StepResult], ref: SlotRef) -> tuple[list[int], list[Any]]:
    """The tokens of a row and all its scores."""
    tokens = [t for result in results for r, t in zip(result.refs, result.tokens, strict=True) if r == ref]
    scored = [each for result in results for each in result.scored if each.ref == ref]
    return tokens, sorted(scored, key=lambda each: each.position)


def test_who_is_not_ready_gets_no_token_and_then_the_one_that_it_would_have_had(world: World) -> None:
    alone = {ref: undisturbed(world, ref, sampling, 5) for ref, sampling in ((A, GUIDED), (B, FREE))}

    with held_up(world.grammars):
        found = [world.step((A, 7), (B, 7), new=(told(A, GUIDED), told(B, FREE)))]
        found += [world.step((A, 1), (B, 1)) for _ in range(2)]
    late = found[:]
    world.until_compiled()
    found += [world.step((A, 1), (B, 1)) for _ in range(2)]
    found += [world.step((A, 1)) for _ in range(3)]

    assert [result.unready for result in late] == [[A]] * 3
    assert [result.refs for result in late] == [[B]] * 3
    assert not any(result.failed for result in found)
    assert of(found, A) == of(alone[A], A)
    assert of(found, B) == of(alone[B], B)


def test_the_only_token_of_an_answer_may_be_late_too(world: World) -> None:
    with held_up(world.grammars):
        late = world.step((A, 7), new=(told(A, GUIDED, max_tokens=1),))
    world.until_compiled()
    found = world.step((A, 1))

    assert (late.unready, late.refs, found.refs, found.indices) == ([A], [], [A], [0])
    assert world.step((A, 1)).refs == [], "it has ended"


def test_a_sequence_that_comes_with_output_goes_on_where_it_is(world: World) -> None:
    whole, _ = of(undisturbed(world, A, GUIDED, 6), A)

    moved = told(A, GUIDED, token_ids=[*PROMPT, *whole[:4]])
    with held_up(world.grammars):
        assert world.step((A, 11), new=(moved,)).unready == [A]
    world.until_compiled()

    assert [world.step((A, 1)).tokens for _ in range(2)] == [[token] for token in whole[4:6]]


def test_a_moment_is_waited_for_a_grammar_only_where_nobody_else_is_in_the_step(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    waited: list[int] = []
    monkeypatch.setattr(controls, "wait_for_one", lambda guides: waited.append(len(guides)))

    with held_up(world.grammars):
        world.step((A, 7), new=(told(A, GUIDED),))
        assert waited == [1]
        world.step((A, 1), (B, 3), new=(told(B, FREE),))  # it samples nothing, and does not wait either
        world.step((A, 1), (B, 4))
        assert waited == [1]


def test_rows_take_turns_where_a_step_has_no_time_for_all_their_grammars(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = {slot_ref(slot, 0): replace(GUIDED, seed=slot) for slot in range(3)}
    alone = {ref: undisturbed(world, ref, sampling, 4) for ref, sampling in asked.items()}
    monkeypatch.setattr(controls, "MASKS_S", -1.0)

    new = tuple(told(ref, sampling) for ref, sampling in asked.items())
    found = [world.step(*((ref, 3) for ref in asked), (slot_ref(3, 0), 7), new=(*new, told(slot_ref(3, 0), FREE)))]
    world.until_compiled()
    found.append(world.step(*((ref, 4) for ref in asked)))
    found += [world.step(*((ref, 1) for ref in asked), (slot_ref(3, 0), 1)) for _ in range(11)]

    guided = [[ref for ref in result.refs if ref in asked] for result in found[1:]]
    assert [len(refs) for refs in guided] == [1] * 12
    assert all({ref for refs in guided[n : n + 3] for ref in refs} == set(asked) for n in range(10))
    assert of(found, slot_ref(3, 0))[0], "the free one goes on"
    for ref in asked:
        assert of(found, ref) == of(alone[ref], ref)


def test_a_row_that_is_put_off_brings_nothing_of_its_drafts(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    alone = of(undisturbed(world, A, GUIDED, 5), A)
    monkeypatch.setattr(world.runner, "_proposer", Knowing(world.runner._resident, alone[0]))

    with held_up(world.grammars):
        found = [world.step((A, 7), new=(told(A, GUIDED),), max_drafts=2)]
        found.append(world.step((A, 1), max_drafts=2))
    assert [(result.refs, result.unready) for result in found] == [([], [A])] * 2
    assert all(each.position < len(PROMPT) for result in found for each in result.scored)
    world.until_compiled()
    found += [world.step((A, 1), max_drafts=2), world.step((A, 1), max_drafts=1)]

    assert [len(result.refs) for result in found] == [0, 0, 3, 2]
    assert of(found, A) == alone


def test_a_run_ends_where_a_step_has_no_time_for_its_masks(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    alone = of(undisturbed(world, A, GUIDED, 5), A)
    free = of(undisturbed(world, B, FREE, 5), B)
    monkeypatch.setattr(world.runner, "_proposer", Knowing(world.runner._resident, alone[0]))
    monkeypatch.setattr(choosing, "MASKS_S", -1.0)

    found = [world.step((A, 3), new=(told(A, GUIDED),))]
    world.until_compiled()
    found.append(world.step((A, 4), max_drafts=4))
    found += [world.step((A, 1), max_drafts=4) for _ in range(4)]

    assert [len(result.refs) for result in found] == [0, 1, 1, 1, 1, 1]
    assert of(found, A) == alone
    world.runner.begin_session()
    monkeypatch.setattr(world.runner, "_proposer", Knowing(world.runner._resident, free[0]))
    assert len(world.step((B, 7), new=(told(B, FREE),), max_drafts=4).refs) == 5, "who has no grammar needs no mask"


def test_a_grammar_that_is_not_compiled_for_very_long_fails_its_row(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(guide, "_LATE_S", -1.0)

    with held_up(world.grammars):
        result = world.step((A, 7), (B, 7), new=(told(A, GUIDED), told(B, FREE)))

    assert (result.failed, result.unready, result.refs) == ([A], [], [B])


def test_whatever_a_compilation_ends_with_fails_its_row_alone(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    class Panic(BaseException):
        """As a library's bug ends."""

    def panic(*_: object) -> None:
        raise Panic

    monkeypatch.setattr(guide, "compile_grammar", panic)
    unknown = replace(GUIDED, grammar=Grammar("regex", "never seen"))
    world.step((A, 3), (B, 3), new=(told(A, unknown), told(B, FREE)))
    world.until_compiled()
    result = world.step((A, 4), (B, 4))

    assert (result.failed, result.refs) == ([A], [B])


def test_a_grammar_is_compiled_anew_for_each_domain_and_once_for_all_of_one(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled: list[Grammar] = []

    def counted(tokenizer: Any, asked: Grammar) -> Any:
        compiled.append(asked)
        return compile_grammar(tokenizer, asked)

    monkeypatch.setattr(guide, "compile_grammar", counted)
    asked = replace(GUIDED, grammar=Grammar("regex", "[a-c]{3}"))
    for slot, domain in enumerate([b"north", b"south", b"north", b"south"]):
        ref = slot_ref(slot, 0)
        world.step((ref, 3), new=(told(ref, asked, domain=domain, block_table=[BlockId(slot)]),))
    world.until_compiled()

    assert len(compiled) == 2
