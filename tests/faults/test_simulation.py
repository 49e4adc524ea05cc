"""Two thousand clusters that never were: every fault there is, drawn from a seed, and no stream that shows it."""

from __future__ import annotations

import multiprocessing
import os
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from unittest import mock

import pytest

from common.failpoints import NAMES
from common.step import StepPlan
from scheduler import lead
from scheduler import scheduler as scheduler_module
from scheduler.session import Session
from scheduler.steps import Draft
from tests.faults.disasters import DISASTERS
from tests.faults.simulation import Story, run

NUM_SEEDS = 2000
NUM_LATE = 300
NUM_HELD = 200
_CHUNK = 50


def play(first: int, late: bool = False) -> list[Story]:
    """One chunk of seeds; what breaks carries the command that replays it."""
    return [run(seed, late=late) for seed in range(first, first + _CHUNK)]


def play_held(first: int) -> int:
    """One chunk in which steps of a millisecond are long ones already. Returns how many plans were held back."""
    num_held = 0

    class Watched(Session):
        def send(self, draft: Draft, now_ns: int) -> StepPlan:
            nonlocal num_held
            plan = super().send(draft, now_ns)
            num_held += self.outstanding[-1].held_since_ns > 0
            return plan

    with (
        mock.patch.multiple(lead, FIRST_NS=400_000, LEAST_NS=200_000, WORTH_NS=300_000),
        mock.patch.object(scheduler_module, "Session", Watched),
    ):
        play(first, late=bool(first % (2 * _CHUNK)))
    return num_held


def play_all(num_seeds: int, *, late: bool = False) -> list[Story]:
    """On every core there is."""
    firsts = range(0, num_seeds, _CHUNK)
    with on_every_core() as pool:
        return [story for chunk in pool.map(play, firsts, [late] * len(firsts)) for story in chunk]


def on_every_core() -> ProcessPoolExecutor:
    """Processes that have nothing of this one's."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return ProcessPoolExecutor(cores, mp_context=multiprocessing.get_context("spawn"))


@pytest.fixture(scope="module")
def stories() -> list[Story]:
    """All of them."""
    return play_all(NUM_SEEDS)


def test_no_fault_loses_changes_repeats_or_strands_a_stream(stories: list[Story]) -> None:
    assert [story.seed for story in stories] == list(range(NUM_SEEDS))


def test_the_stories_are_not_quiet_ones(stories: list[Story]) -> None:
    """A proof in which nothing happens proves nothing."""
    faults = sum((story.faults for story in stories), Counter[str]())
    happened = sum((story.happened for story in stories), Counter[str]())

    assert min(faults[disaster.__name__] for disaster in DISASTERS) > 40
    assert sum(story.tokens for story in stories) > 100_000
    assert sum(story.moved for story in stories) > 800, "sequences that lost their executor"
    assert sum(story.preemptions for story in stories) > 200, "memory was never short"
    assert sum(story.given_up for story in stories) > 50, "requests that no executor survives"
    assert sum(story.refusals for story in stories) > 200, "no queue was ever full"

    assert happened["resumed"] > 300, "streams that went on with a ticket"
    assert happened["attached"] > 250, "where they still ran"
    assert happened["superseded"] > 40, "readers that another one fenced"
    assert happened["impostors refused"] > 250
    assert happened["callers killed"] > 100
    assert happened["drained"] > 60, "schedulers that left with work to do"
    assert happened["rows waited for grammars"] > 300


def test_processes_broke_at_every_failpoint(stories: list[Story]) -> None:
    faults = sum((story.faults for story in stories), Counter[str]())

    assert [name for name in sorted(NAMES) if not faults[f"at {name}"]] == []


@pytest.mark.parametrize("seed", [3, 85, 107, 228])
def test_one_seed_is_one_story(seed: int, stories: list[Story]) -> None:
    """The same in another process and after other stories, down to each byte on each link and its moment."""
    assert run(seed) == stories[seed]


def test_no_stream_shows_that_executors_launch_steps_before_they_know_the_last_tokens() -> None:
    stories = play_all(NUM_LATE, late=True)

    assert sum(story.moved for story in stories) > 100, "sequences that lost their executor"
    assert sum(story.preemptions for story in stories) > 30, "memory was never short"


def test_no_stream_shows_that_plans_are_made_late() -> None:
    with on_every_core() as pool:
        num_held = sum(pool.map(play_held, range(0, NUM_HELD, _CHUNK)))

    assert num_held > 10 * NUM_HELD
