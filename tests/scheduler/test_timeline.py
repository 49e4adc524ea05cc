"""What is remembered of a request: what happened to it, in order, in bounds, and nothing for a step of decoding."""

from __future__ import annotations

from dataclasses import replace

import pytest

from common.sampling import Grammar, StopConditions
from common.types import FinishReason
from executor.fake_runner import position_token
from scheduler.sequence import Begun
from scheduler.suspicion import End
from scheduler.timeline import LEAST_EVENTS, Event, Kind, Timeline
from tests.scheduler.world import GREEDY, World

R, Q, A, P, F1, E = Kind.RECEIVED, Kind.QUEUED, Kind.ADMITTED, Kind.PREFILL, Kind.FIRST_TOKEN, Kind.FINISHED


def kinds(world: World, name: str) -> list[Kind]:
    return [event.kind for event in world.timelines[name].events]


def events(world: World, name: str, kind: Kind) -> list[Event]:
    return [event for event in world.timelines[name].events if event.kind is kind]


def waits(world: World, name: str) -> list[tuple[str, int]]:
    return [(event.why, event.number) for event in events(world, name, Kind.QUEUED)]


def test_a_request_that_is_served_at_once_is_five_events_however_many_tokens_it_has() -> None:
    world = World()
    world.add("a", prompt=6, max_tokens=90)
    world.run()
    told = world.timelines["a"]

    assert kinds(world, "a") == [R, A, P, F1, E]
    assert [event.at_ns for event in told.events] == [0, 1, 1, 3, 270], "the clock of a world counts calls"
    assert events(world, "a", A)[0].executor == "fake-0"
    assert (told.num_prompt, told.num_output, told.reason) == (6, 90, FinishReason.LENGTH)
    assert (told.admitted_ns, told.first_token_ns, told.last_token_ns, told.ended_ns) == (1, 3, 270, 270)


def test_each_part_of_a_long_prompt_is_told_with_its_step_and_position() -> None:
    world = World(token_budget=4)
    world.add("a", prompt=11, max_tokens=5)
    world.run()

    chunks = [(e.step, e.position, e.num_tokens) for e in events(world, "a", Kind.PREFILL)]
    assert chunks == [(0, 0, 4), (1, 4, 4), (2, 8, 3)]


def test_what_was_found_in_the_prefix_cache_is_told_with_the_admission() -> None:
    world = World()
    for name in "ab":
        world.add(name, prompt=list(range(10)), max_tokens=2)
        world.run()

    assert [events(world, name, Kind.ADMITTED)[0].num_tokens for name in "ab"] == [0, 9]
    assert world.timelines["b"].num_cached == 9
    assert kinds(world, "b") == [R, A, F1, E], "its one token that is computed is no part of a prompt to tell of"


def test_a_request_says_for_what_it_waits() -> None:
    world = World(executors=0, max_sequences=1, num_blocks=8)
    world.add("first", prompt=4, max_tokens=3)
    world.join()
    world.add("second", prompt=4, max_tokens=3)
    world.step()
    world.add("third", prompt=4, max_tokens=1)
    world.run()

    assert waits(world, "first") == [("no_executor", 0)]
    assert waits(world, "second") == [("behind_others", 1), ("no_slot", 0)]
    assert waits(world, "third")[0] == ("behind_others", 1)


def test_a_request_that_waits_for_memory_says_so_once() -> None:
    world = World(num_blocks=8, block_size=4)
    world.add("large", prompt=20, max_tokens=8)
    world.step()
    world.add("waits", prompt=20, max_tokens=2)
    world.run()

    assert waits(world, "waits") == [("memory", 0)]
    assert kinds(world, "waits") == [R, Q, A, P, F1, E]


def test_one_that_is_preempted_computes_again_what_it_had() -> None:
    world = World(num_blocks=8, block_size=4, prefix_caching=False)
    world.add("old", prompt=12, max_tokens=12)
    world.add("young", prompt=12, max_tokens=12)
    world.run()
    told = world.timelines["young"]

    assert told.num_preemptions == world.scheduler.counters.preemptions > 0
    (first, *_) = events(world, "young", Kind.PREEMPTED)
    assert (first.executor, first.why) == ("fake-0", "memory")
    assert len(events(world, "young", Kind.ADMITTED)) == 1 + told.num_preemptions
    assert len(events(world, "young", Kind.FIRST_TOKEN)) == 1
    again = events(world, "young", Kind.PREFILL)[-1]
    assert again.position == 0 and again.num_tokens > 12, "its answer so far, too"


@pytest.mark.parametrize("end", [End.LOST, End.CLEAN, End.STUCK])
def test_one_that_loses_its_executor_says_which_and_how(end: End) -> None:
    world = World(executors=1)
    world.add("a", prompt=6, max_tokens=5)
    world.step()
    world.lose(0, end)
    world.join(name="other")
    world.run()

    assert [(e.executor, e.why) for e in events(world, "a", Kind.MOVED)] == [("fake-0", end.name.lower())]
    assert [e.executor for e in events(world, "a", Kind.ADMITTED)] == ["fake-0", "other"]


def test_one_that_executors_die_with_is_told_to_run_alone() -> None:
    world = World(executors=1)
    world.add("a", prompt=4, max_tokens=9)
    for session in range(3):
        world.send(session)
        world.lose(session)
        world.join()
    told = world.timelines["a"]

    assert [e.why for e in events(world, "a", Kind.ADMITTED)] == ["", "", "alone"]
    assert (told.reason, told.events[-1].why, told.is_over) == (FinishReason.ERROR, "error", True)


def test_every_choice_has_one_end_and_the_last_is_the_requests() -> None:
    world = World()
    world.add("a", prompt=9, n=3, max_tokens=5)
    world.step()
    world.abort("a1")
    assert not world.timelines["a"].is_over
    world.run()

    ends = {e.choice: (e.why, e.num_tokens) for e in events(world, "a", Kind.FINISHED)}
    assert ends == {0: ("length", 5), 1: ("aborted", 0), 2: ("length", 5)}
    assert world.timelines["a"].num_output == 10


def test_a_resumed_request_says_what_its_caller_has_and_counts_what_is_made_here() -> None:
    world = World()
    timeline = Timeline("again", world.now_ns)
    begun = {0: Begun([5, 6, 7], ""), 2: Begun([5], "")}
    stop = StopConditions(max_tokens=4)
    for sequence in world.scheduler.add(range(5), GREEDY, stop, 0, choices=3, begun=begun, timeline=timeline):
        world.names[sequence.id] = str(sequence.choice)
        world.tokens[str(sequence.choice)] = []
    world.run()
    timeline.check()

    assert [(e.kind, e.num_tokens, e.number) for e in timeline.events[:2]] == [(R, 5, 2), (Kind.RESUMED, 4, 0)]
    assert timeline.num_output == 1 + 3


def test_guesses_are_told_in_sum_and_a_grammar_that_is_late_in_one_event() -> None:
    world = World(executors=0)
    world.join(guess=position_token, compile_rows=4)
    world.add("guessed", prompt=5, max_tokens=8)
    world.add("guided", prompt=6, max_tokens=3, sampling=replace(GREEDY, grammar=Grammar("regex", "a+")), max_drafts=0)
    world.run()

    (guesses,) = events(world, "guessed", Kind.SPECULATED)
    assert (guesses.num_tokens, guesses.number) == (world.timelines["guessed"].num_accepted, 6)
    assert sum(e.number for e in events(world, "guided", Kind.PUT_OFF)) == 4
    assert len(events(world, "guided", Kind.PUT_OFF)) == 1


def test_of_too_many_events_the_middle_is_left_out() -> None:
    told = Timeline("a", 100, max_events=LEAST_EVENTS)
    told.add(Kind.RECEIVED, 100)
    for step in range(50):
        told.add(Kind.PREFILL, 200 + step, step=step)
    told.add(Kind.FINISHED, 300)

    assert len(told.events) == LEAST_EVENTS and told.num_left_out == 52 - LEAST_EVENTS
    assert told.events[0].kind is Kind.RECEIVED and told.events[-1].kind is Kind.FINISHED
    assert [e.step for e in told.events[1:7]] == [0, 1, 2, 3, 4, 5] and told.events[-2].step == 49


def test_time_never_goes_back_in_a_timeline() -> None:
    told = Timeline("a", 100)
    for now_ns in (90, 150, 120):
        told.add(Kind.PREFILL, now_ns)

    assert [event.at_ns for event in told.events] == [0, 50, 50]


def test_without_a_bound_for_events_none_is_kept_and_the_sums_are() -> None:
    told = Timeline("a", 0, max_events=0)
    told.put_off(0, 5)
    told.waits("memory", 5)
    told.refuse("calls", 7)

    assert told.events == [] and told.is_over
