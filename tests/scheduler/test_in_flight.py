"""Executors that launch a step before they know the last one's tokens: what follows a sequence's end is nobody's."""

from __future__ import annotations

from collections import deque

import pytest

from common.sampling import SamplingParams
from common.step import StepPlan, StepResult
from common.types import FinishReason
from executor.fake_runner import Prefix, prefix_hash_token
from executor.runner import Launched
from tests.late_runner import LateRunner
from tests.scheduler.world import World


class LateWorld(World):
    """A world whose executors launch at once and answer later."""

    runner_class = LateRunner

    def __init__(self, **settings: object) -> None:
        self._launched: dict[int, deque[Launched]] = {}
        super().__init__(**settings)  # type: ignore[arg-type]

    def send(self, session: int = 0) -> StepPlan | None:
        plan = super().send(session)
        if plan is not None:
            self._launched.setdefault(session, deque()).append(self.runners[session].launch(plan))
        return plan

    def _result(self, session: int) -> StepResult:
        self.sent[session].popleft()
        return self._launched[session].popleft().result()


def test_a_stop_token_ends_a_sequence_that_has_two_more_steps_in_flight() -> None:
    world = LateWorld(credit=3)
    num_free = world.num_free
    world.add("a", prompt=5, stop_token_ids=(6,))
    for _ in range(3):
        world.send()

    world.answer()
    world.answer()
    assert (world.tokens["a"], world.reasons["a"]) == ([5, 6], FinishReason.STOP_TOKEN)
    assert world.num_free < num_free, "a step in flight writes into its blocks"
    assert world.answer().refs == []
    assert world.num_free == num_free


def test_a_slot_is_given_away_while_steps_of_the_sequence_before_are_in_flight() -> None:
    world = LateWorld(credit=3, max_sequences=1)
    world.add("a", prompt=5, stop_token_ids=(5,))
    for _ in range(3):
        world.send()
    world.answer()
    world.add("b", prompt=3, max_tokens=2)

    assert world.send() is not None, "b has the slot"
    assert [world.answer().refs for _ in range(2)] == [[], []], "a's"
    world.run()
    assert world.tokens == {"a": [5], "b": [3, 4]}


def test_a_row_that_fails_is_tried_again_when_what_was_in_flight_behind_it_is_dropped() -> None:
    failures = [True]

    def next_token(prefix: Prefix) -> int | None:
        return None if prefix.num_tokens == 6 and failures and failures.pop() else prefix.num_tokens

    world = LateWorld(credit=3, next_token=next_token)
    world.add("a", prompt=5, max_tokens=5)
    world.run()

    assert (world.tokens["a"], world.reasons["a"]) == ([5, 6, 7, 8, 9], FinishReason.LENGTH)


@pytest.mark.parametrize("num_blocks", [64, 11], ids=["with room", "in memory that is too small"])
def test_steps_in_flight_change_no_token(num_blocks: int) -> None:
    """Forks, stop tokens, preemption and shared prefixes, beside the same in lockstep."""

    def tokens(world: World) -> dict[str, list[int]]:
        for i in range(8):
            world.add(
                f"r{i}",
                prompt=[1, 2, 3, 4, 5, i // 2],
                max_tokens=5 + i,
                n=1 + i % 2,
                sampling=SamplingParams(temperature=i % 3, seed=i),
                stop_token_ids=tuple(range(i, 1000, 9)),
            )
        world.run()
        return world.tokens

    shape = {"num_blocks": num_blocks, "max_sequences": 6, "next_token": prefix_hash_token}
    world = LateWorld(credit=3, **shape)
    in_flight = tokens(world)
    assert (world.scheduler.counters.preemptions > 0) == (num_blocks == 11)
    assert in_flight == tokens(World(credit=1, **shape))  # type: ignore[arg-type]
