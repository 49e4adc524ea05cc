"""Rows whose logits are not finite: one more try, elsewhere if it can be, then the end of one choice. Quarantine."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest

from common.sampling import Grammar
from common.step import StepResult
from common.types import FinishReason
from executor.fake_runner import Prefix, position_token
from executor.runner import execute
from scheduler.reputation import Patience
from scheduler.results import ProtocolError
from scheduler.suspicion import End
from tests.scheduler.world import GREEDY, World

MINUTE_NS = 60_000_000_000


def broken(prefix: Prefix) -> int | None:
    """An executor whose every row is not finite."""
    return None


def broken_once() -> Callable[[Prefix], int | None]:
    """An executor whose first row is not finite."""
    rows = iter([None])

    def next_token(prefix: Prefix) -> int | None:
        return next(rows, position_token(prefix))

    return next_token


def poisoned(prefix: Prefix) -> int | None:
    """A model that cannot go on from eight tokens."""
    return None if prefix.num_tokens == 8 else position_token(prefix)


def test_a_row_that_was_not_finite_is_tried_once_more() -> None:
    world = World(executors=0)
    world.join(next_token=broken_once())
    world.add("a", prompt=4, max_tokens=3)
    world.run()

    assert world.tokens["a"] == [4, 5, 6]
    assert world.scheduler.counters.rows_unusable == 1


def test_the_second_time_in_the_same_place_that_choice_ends_and_no_other() -> None:
    world = World(next_token=poisoned, credit=2)
    world.add("bad", prompt=6, max_tokens=9)
    world.add("good", prompt=9, max_tokens=9)
    world.run()

    assert world.reasons == {"bad": FinishReason.ERROR, "good": FinishReason.LENGTH}
    assert world.tokens["bad"] == [6, 7]
    assert world.scheduler.counters.rows_unusable == 2


def test_a_place_further_on_is_tried_anew() -> None:
    world = World(executors=0)
    seen: set[int] = set()

    def each_place_once(prefix: Prefix) -> int | None:
        if prefix.num_tokens in (5, 7) and prefix.num_tokens not in seen:
            seen.add(prefix.num_tokens)
            return None
        return position_token(prefix)

    world.join(next_token=each_place_once)
    world.add("a", prompt=4, max_tokens=6)
    world.run()

    assert world.tokens["a"] == [4, 5, 6, 7, 8, 9]
    assert world.scheduler.counters.rows_unusable == 2


def test_the_second_try_is_elsewhere_where_there_is_another_executor() -> None:
    world = World(executors=0)
    bad = world.join(next_token=broken)
    good = world.join()
    world.add("a", prompt=4, max_tokens=3)
    world.step(bad)

    assert world.send(bad) is None
    assert world.step(good) == {"a": 4}


def test_the_second_try_is_here_where_every_other_executor_takes_nothing() -> None:
    world = World(executors=0)
    bad = world.join(next_token=broken_once())
    other = world.join()
    world.add("a", prompt=4, max_tokens=3)
    world.step(bad)
    world.scheduler.leave(other)

    assert world.step(bad) == {"a": 4}


def test_what_a_row_that_was_not_finite_left_behind_is_never_found_again() -> None:
    world = World(executors=0)
    world.join(next_token=broken_once())
    world.add("a", prompt=9, max_tokens=3)
    world.step()

    assert world.step() == {"a": 9}, "no block of it is taken for cached"


def quarantined(*, executors: int = 1) -> World:
    """The first executor sent three rows of three requests that were not finite."""
    world = World(executors=0)
    world.join(next_token=broken)
    for _ in range(executors - 1):
        world.join()
    for session in range(1, executors):
        world.scheduler.fell_silent(session)
    for name in "abc":
        world.add(name, prompt=4, max_tokens=3)
    world.step()
    for session in range(1, executors):
        world.scheduler.spoke(session)
    return world


def test_an_executor_with_three_such_requests_in_a_minute_gets_nothing_new_for_a_while() -> None:
    world = quarantined(executors=2)
    assert world.scheduler.counters.quarantines == 1
    world.add("new", prompt=4, max_tokens=3)

    assert world.send(0) is None
    assert set(world.step(1)) == {"a", "b", "c", "new"}
    world.run()
    world.add("later", prompt=4, max_tokens=1)
    world.now_ns += MINUTE_NS
    assert world.send(0) is not None


def test_answers_with_a_grammar_say_nothing_against_the_executor() -> None:
    world = World(executors=0)
    world.join(next_token=broken)
    for name in "abc":
        world.add(name, prompt=4, sampling=replace(GREEDY, grammar=Grammar("regex", "a+")))
    world.step()

    assert world.scheduler.counters.rows_unusable == 3
    assert world.scheduler.counters.quarantines == 0


def test_choices_of_one_request_count_once() -> None:
    world = World(executors=0)
    world.join(next_token=broken)
    world.add("a", prompt=4, n=8)
    world.step()

    assert world.scheduler.counters.quarantines == 0


def test_requests_that_are_far_between_quarantine_nobody() -> None:
    world = World(executors=0)
    world.join(next_token=broken)
    world.join()
    for name in "abcdef":
        world.add(name, prompt=4, max_tokens=3)
        world.scheduler.fell_silent(1)
        world.step(0)
        world.scheduler.spoke(1)
        world.now_ns += MINUTE_NS // 2

    assert world.scheduler.counters.quarantines == 0


def test_an_executor_is_excused_of_requests_that_are_not_finite_anywhere() -> None:
    world = World(executors=2, next_token=poisoned)
    for name in "abc":
        world.add(name, prompt=8, max_tokens=3)
    world.scheduler.fell_silent(1)
    world.step(0)
    assert world.scheduler.session(0).is_quarantined(world.now_ns)
    world.scheduler.spoke(1)
    world.step(1)

    assert set(world.reasons.values()) == {FinishReason.ERROR}
    assert not any(session.is_quarantined(world.now_ns) for session in world.scheduler.sessions)


def test_the_only_executor_still_gets_the_second_tries_that_show_whose_fault_it_was() -> None:
    world = quarantined()
    world.add("new", prompt=4, max_tokens=3)
    assert set(world.step()) == {"a", "b", "c"}
    assert set(world.reasons) == {"a", "b", "c"}, "they end, and the executor is excused"
    assert set(world.step()) == {"new"}


def test_a_quarantine_outlives_the_session() -> None:
    world = quarantined(executors=2)
    world.lose(0, End.LOST)
    again = world.join(name="fake-0")
    world.add("new", prompt=4)

    assert world.scheduler.session(again).is_quarantined(world.now_ns)
    assert world.send(again) is None


def test_how_many_and_how_long_is_a_limit() -> None:
    patience = Patience(max_unusable=1, quarantine_ns=1000)
    world = World(executors=0, patience=patience)
    world.join(next_token=broken)
    world.add("a", prompt=4)
    world.step()
    assert world.scheduler.counters.quarantines == 1
    assert world.scheduler.held_back_ns(world.now_ns) == 1000


@pytest.mark.parametrize(
    "wrong",
    [lambda r: replace(r, tokens=[10**6]), lambda r: replace(r, indices=[5])],
    ids=["no such token", "a gap"],
)
def test_a_row_that_is_wrong_twice_in_the_same_place_ends_its_choice_and_costs_no_third_session(
    wrong: Callable[[StepResult], StepResult],
) -> None:
    world = World()
    (id,) = world.add("a", prompt=4)
    for last, session in enumerate((0, world.join())):
        if last:
            world.scheduler.spoke(session)
        else:
            world.scheduler.fell_silent(1)
        plan = world.send(session)
        assert plan is not None
        with pytest.raises(ProtocolError) as error:
            world.scheduler.update(session, wrong(execute(world.runners[session], plan)), world.now_ns)
        culprit = error.value.culprit
        assert culprit is world.scheduler.sequence(id)
        losses = world.scheduler.lose(session, world.now_ns, End.WRONG, culprit=culprit)
        world.scheduler.spoke(1)

        assert [output.reason for output in losses.ended] == [FinishReason.ERROR] * last
    assert world.scheduler.num_sequences == 0
