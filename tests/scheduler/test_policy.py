"""The decision alone: numbers in, numbers out."""

from __future__ import annotations

from collections.abc import Collection

from scheduler.policy import Decision, Place, Running, decide, place


def row(num_uncomputed: int, num_planned: int = 0, num_blocks: int = 0) -> Running:
    return Running(num_uncomputed, num_planned, num_blocks, False)


def share(
    rows: list[Running],
    *,
    budget: int = 64,
    free: int = 64,
    returning: int = 0,
    in_flight: tuple[int, ...] = (),
    replays: Collection[int] = (),
    replays_waiting: int = 0,
) -> Decision:
    def yield_of(i: int) -> tuple[int, int]:
        return (0, rows[i].num_blocks) if i in in_flight else (rows[i].num_blocks, 0)

    return decide(
        rows,
        token_budget=budget,
        num_free=free,
        num_returning=returning,
        block_size=4,
        yield_of=yield_of,
        replays=replays,
        replays_waiting=replays_waiting,
    )


def test_a_decoding_sequence_is_never_delayed_by_an_older_long_prompt() -> None:
    assert share([row(30), row(1, 9, 3)], budget=4).grants == [3, 1]


def test_a_row_that_only_waits_for_results_gets_nothing() -> None:
    assert share([row(0, 8, 2), row(1, 9, 3)]).grants == [0, 1]


def test_the_oldest_is_served_when_the_budget_is_short() -> None:
    assert share([row(1, 5, 2), row(1, 5, 2), row(1, 5, 2)], budget=2).grants == [1, 1, 0]


def test_the_youngest_is_preempted_for_an_older_row_that_needs_a_block() -> None:
    decision = share([row(1, 8, 2), row(1, 9, 3), row(1, 9, 3)], free=0)
    assert decision.preempted == [2]
    assert decision.grants == [1, 1, 0]


def test_a_preempted_row_gives_back_what_it_was_granted_in_the_same_step() -> None:
    decision = share([row(8, 8, 2), row(1, 9, 3)], budget=8, free=1)
    assert decision.preempted == [1]
    assert decision.grants == [7, 0]
    assert decision.budget_left == 1


def test_a_group_is_preempted_whole_or_not_at_all() -> None:
    beams = [row(1, 8, 2)._replace(group=7), row(1, 9, 3)._replace(group=7), row(1, 9, 3)._replace(group=7)]
    decision = share([row(1, 8, 2), *beams, row(1, 9, 0)], free=0)
    assert decision.preempted == [4, 3, 2, 1]
    assert decision.grants == [1, 0, 0, 0, 0]


def test_a_row_waits_rather_than_preempt_another_one_of_its_group() -> None:
    beams = [row(1, 8, 2)._replace(group=7), row(1, 9, 3)._replace(group=7)]
    decision = share([row(1, 9, 3), *beams], free=0)
    assert decision.preempted == []
    assert decision.grants == [1, 0, 1]


def test_nobody_is_preempted_while_enough_blocks_are_on_their_way_back() -> None:
    decision = share([row(1, 8, 2), row(1, 9, 3)], free=0, returning=1)
    assert decision.preempted == []
    assert decision.grants == [0, 1], "the one waits a step, the other has room"


def test_blocks_of_a_victim_in_flight_are_waited_for_not_taken() -> None:
    decision = share([row(1, 8, 2), row(1, 9, 3)], free=0, in_flight=(1,))
    assert decision.preempted == [1]
    assert decision.grants == [0, 0]


def test_the_youngest_waits_with_what_it_has_rather_than_preempt_itself() -> None:
    decision = share([row(1, 9, 3), row(1, 8, 2)], free=0)
    assert decision.preempted == []
    assert decision.grants == [1, 0]


def test_a_prompt_takes_the_blocks_there_are_and_the_rest_later() -> None:
    assert share([row(12)], free=1, returning=2).grants == [4]


def test_a_sequence_goes_to_the_longest_cached_prefix_then_to_the_least_load() -> None:
    assert place([Place(0, 0), Place(32, 5)]) == 1
    assert place([Place(16, 3), Place(16, 2)]) == 1


def test_a_cached_prefix_does_not_outweigh_a_crowd() -> None:
    assert place([Place(0, 0), Place(512, 9)]) == 0


def test_replays_and_the_others_share_what_rows_of_one_token_leave() -> None:
    rows = [row(30), row(30), row(1, 9, 3)]
    decision = share(rows, budget=10, replays={0})
    assert decision.grants == [5, 4, 1]
    assert (decision.budget_left, decision.replay_budget_left) == (0, 0)


def test_replays_that_wait_are_left_their_share() -> None:
    decision = share([row(30)], budget=10, replays_waiting=100)
    assert decision.grants == [5]
    assert (decision.budget_left, decision.replay_budget_left) == (5, 5)


def test_replays_that_wait_are_left_no_more_than_they_want() -> None:
    assert share([row(30)], budget=10, replays_waiting=2).grants == [8]


def test_replays_take_no_more_than_their_share_although_nobody_else_runs() -> None:
    """Who waits comes before: what is left after that is theirs."""
    decision = share([row(30)], budget=10, replays={0})
    assert decision.grants == [5]
    assert (decision.budget_left, decision.replay_budget_left) == (5, 0)
