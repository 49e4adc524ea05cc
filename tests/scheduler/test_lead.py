"""The next plan is made late where steps are long: who comes meanwhile is in it, and the executor does not wait."""

from __future__ import annotations

import pytest

from common.sampling import BeamParams, SamplingParams
from executor.fake_runner import position_token
from scheduler.lead import FIRST_NS, IDLE_NS, LEAST_NS, MOST_NS, WORTH_NS, Lead
from scheduler.pace import ENOUGH
from scheduler.session import Session
from tests.scheduler.world import World

MS = 1_000_000
STEP_NS = 100 * MS


def decoding(*, compute_ns: int = STEP_NS, steps: int = ENOUGH + 1, credit: int = 2, stop: int = 999) -> World:
    """A request that decodes. So many steps were answered, each of which took so long, and another one begins now."""
    world = World(credit=credit, num_blocks=256, max_model_len=512)
    world.add("a", prompt=1, max_tokens=400, stop_token_ids=(stop,))
    world.send()
    for _ in range(steps):
        began_ns = world.now_ns
        if world.send() is None:
            world.now_ns = session(world).due_ns
            assert world.send() is not None
        world.now_ns = began_ns + compute_ns
        world.answer(compute_ns=compute_ns)
    return world


def session(world: World) -> Session:
    return world.scheduler.session(0)


def lead_ns(world: World) -> int:
    """How long before the end of the step that runs the next plan is made."""
    assert world.send() is None
    return session(world).unanswered()[1] + STEP_NS - session(world).due_ns


def test_who_comes_while_a_step_runs_is_in_the_one_behind_it() -> None:
    world = decoding()
    assert world.send() is None, "it is too early"
    world.add("b", prompt=5)
    world.now_ns = session(world).due_ns - 2
    assert world.send() is None
    plan = world.send()
    assert plan is not None and len(plan.refs) == 2
    assert len(session(world).outstanding) == 2, "and the step before it runs still"
    assert 0 < session(world).unanswered()[1] + STEP_NS - world.now_ns <= FIRST_NS


def test_a_plan_is_made_at_once_where_nothing_is_in_flight() -> None:
    world = decoding()
    assert world.send() is None
    world.answer(compute_ns=MS)  # much sooner than those before it
    assert world.send() is not None


@pytest.mark.parametrize(
    ("compute_ns", "steps"), [(STEP_NS, ENOUGH - 2), (LEAST_NS, 300), (LEAST_NS + WORTH_NS - MS, 300)]
)
def test_no_plan_is_made_late_while_nobody_knows_how_long_steps_take_nor_where_they_are_short(
    compute_ns: int, steps: int
) -> None:
    world = decoding(compute_ns=compute_ns, steps=steps)
    assert world.send() is not None
    assert not any(flight.held_since_ns for flight in session(world).outstanding)


def test_a_step_of_another_size_says_nothing() -> None:
    world = decoding()
    world.add("b", prompt=40)
    assert world.send() is None
    world.now_ns = session(world).due_ns
    assert world.send() is not None
    world.now_ns += STEP_NS
    world.answer(compute_ns=STEP_NS)
    assert [flight.num_tokens for flight in session(world).outstanding] == [41]
    assert world.send() is not None


def test_what_an_executor_says_of_its_time_holds_no_plan_back_once_it_has_nothing_to_do() -> None:
    world = decoding(compute_ns=2**63)
    world.now_ns += STEP_NS
    assert world.send() is None
    world.answer(compute_ns=2**63)
    assert world.send() is not None


def test_an_executor_that_waited_for_a_late_plan_gets_the_next_one_sooner() -> None:
    world = decoding(steps=40)
    before_ns = lead_ns(world)
    assert before_ns < FIRST_NS, "it never waited"
    world.now_ns = session(world).due_ns
    assert world.send() is not None
    world.answer(compute_ns=STEP_NS)
    world.answer(compute_ns=STEP_NS, idle_ns=IDLE_NS)  # it waited for the plan that was made late
    assert world.send() is not None
    assert lead_ns(world) > 1.4 * before_ns


def test_a_plan_behind_one_that_was_held_back_is_late_for_no_such_reason() -> None:
    world = decoding()
    assert world.send() is None
    world.now_ns = session(world).due_ns
    assert world.send() is not None
    world.answer(compute_ns=STEP_NS)
    world.answer(compute_ns=STEP_NS)
    assert world.send() is not None, "nothing is in flight: at once"
    assert [flight.held_since_ns for flight in session(world).outstanding] == [0]


def test_an_executor_that_had_nothing_to_do_did_not_wait_for_a_late_plan() -> None:
    world = decoding()
    before_ns = lead_ns(world)
    world.abort("a")
    world.now_ns = session(world).due_ns
    assert world.send() is None, "there is nothing to plan"
    world.answer(compute_ns=STEP_NS)
    world.add("b", prompt=1)
    for _ in range(2):
        assert world.send() is not None
        world.answer(compute_ns=STEP_NS, idle_ns=IDLE_NS)
    assert world.send() is not None
    assert lead_ns(world) <= before_ns


def test_three_steps_in_flight_are_all_waited_for() -> None:
    world = decoding(credit=3)
    assert world.send() is None
    one_ns = session(world).due_ns
    world.now_ns = one_ns
    assert world.send() is not None
    assert world.send() is None
    assert session(world).due_ns - one_ns == STEP_NS


def test_nothing_is_made_late_that_is_known_with_the_answer_alone() -> None:
    beams = World(credit=2, num_blocks=256, max_model_len=512)
    beams.add("a", prompt=1, max_tokens=40, sampling=SamplingParams(temperature=0.0, beams=BeamParams(2)))
    drafts = World(credit=2, num_blocks=256, max_model_len=512, executors=0)
    drafts.join(guess=position_token)
    drafts.add("a", prompt=1, max_tokens=200)
    for world in (beams, drafts):
        num_steps = 0
        while session(world).running or not num_steps:
            sent = world.send()
            assert not session(world).due_ns, "at once"
            if sent is None:
                world.answer(compute_ns=STEP_NS)
                num_steps += 1
        assert num_steps > 2 * ENOUGH


def test_a_step_whose_rows_have_all_ended_says_nothing_and_is_not_waited_for() -> None:
    world = decoding(stop=ENOUGH + 4)
    while not world.reasons:
        world.now_ns = max(world.now_ns, session(world).due_ns)
        assert world.send() is not None
        world.now_ns += STEP_NS
        world.answer(compute_ns=STEP_NS)
    assert len(session(world).outstanding) == 1, "sent before the stop token was known"
    world.add("b", prompt=1)
    assert world.send() is not None
    assert session(world).outstanding[-1].held_since_ns == 0
    world.answer(compute_ns=0)
    assert world.send() is None, "steps are still known to be long"


def test_an_executor_whose_step_is_long_is_passed_by_as_if_its_next_plan_were_sent() -> None:
    """Nobody is kept waiting for one that does not answer, however late its plans are made."""
    world = decoding(compute_ns=STEP_NS)
    patient_ns = world.now_ns
    assert world.send() is None
    world.now_ns = session(world).due_ns
    assert world.send() is not None
    world.now_ns = patient_ns + STEP_NS
    world.answer(compute_ns=STEP_NS)
    assert session(world).silent_since(session(world).outstanding[0].sent_ns)
    assert not session(world).silent_since(patient_ns)


def test_the_lead_grows_where_a_late_plan_was_waited_for_and_shrinks_slowly_else() -> None:
    lead = Lead()
    lead.add(IDLE_NS, was_held=True)
    assert lead.ns == FIRST_NS * 3 // 2
    lead.add(IDLE_NS, was_held=False)
    assert lead.ns == FIRST_NS * 3 // 2, "that plan could not have been made sooner"
    lead.add(IDLE_NS - 1, was_held=True)
    assert FIRST_NS * 1.48 < lead.ns < FIRST_NS * 1.5
    before_ns = lead.ns
    lead.add(0, was_held=False)
    assert before_ns - before_ns // 500 < lead.ns < before_ns, "which says little of late plans"


def test_the_lead_has_its_limits() -> None:
    lead = Lead()
    for _ in range(1000):
        lead.add(0, was_held=True)
    assert lead.ns == LEAST_NS
    for _ in range(1000):
        lead.add(10 * IDLE_NS, was_held=True)
    assert lead.ns == MOST_NS
    for _ in range(10_000):
        lead.add(0, was_held=False)
    assert lead.ns == LEAST_NS, "it is tried again later"


def test_the_wait_of_a_silent_executor_is_not_that_for_a_late_plan() -> None:
    world = decoding()
    assert world.send() is None
    world.scheduler.fell_silent(0)
    assert world.send() is None
    world.scheduler.spoke(0)
    world.now_ns = session(world).due_ns
    assert world.send() is not None
    assert session(world).outstanding[-1].held_since_ns == 0


def test_a_plan_is_held_back_since_there_was_something_to_plan() -> None:
    world = decoding()
    world.abort("a")
    assert world.send() is None
    world.now_ns += MS
    came_ns = world.now_ns
    world.add("b", prompt=5)
    assert world.send() is None
    world.now_ns = session(world).due_ns
    assert world.send() is not None
    assert session(world).outstanding[-1].held_since_ns == came_ns
