"""Beams fork, are pruned, wait and move together, and find what the search finds when nothing else exists."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace

import pytest

from common.blocks import blocks_for
from common.errors import InvalidRequest
from common.sampling import BeamParams, SamplingParams, StopConditions
from common.step import Ranked, StepResult
from common.types import FinishReason, Priority, SlotRef
from executor.fake_runner import Prefix, position_token
from executor.runner import execute
from scheduler.beam_search import Hypothesis
from scheduler.results import ProtocolError
from scheduler.sequence import Begun
from scheduler.suspicion import End
from tests.late_runner import LateRunner
from tests.scheduler.searched import searched
from tests.scheduler.world import World

VOCAB_SIZE = 40
EOS = frozenset({33, 38})
PROMPT = [5, 6, 7, 8, 9, 10]


def asked(width: int = 4, *, length_penalty: float = 1.0) -> SamplingParams:
    return SamplingParams(temperature=0.0, beams=BeamParams(width, length_penalty))


def alone(prompt: Sequence[int], sampling: SamplingParams, max_tokens: int) -> list[Hypothesis]:
    found = searched(prompt, sampling, max_tokens, ends=EOS, vocab_size=VOCAB_SIZE)
    assert found is not None
    return found


class Beams(World):
    """A World whose requests are beam searches, and what each must find."""

    def __init__(self, **changes: object) -> None:
        shape: dict[str, object] = {"vocab_size": VOCAB_SIZE, "eos": EOS, **changes}
        super().__init__(**shape)  # type: ignore[arg-type]
        self.expected: dict[str, list[int]] = {}
        self.scores: dict[str, float | None] = {}

    def search(
        self,
        name: str,
        prompt: Sequence[int] = PROMPT,
        *,
        sampling: SamplingParams | None = None,
        n: int = 1,
        max_tokens: int = 12,
        priority: Priority = Priority.NORMAL,
    ) -> None:
        sampling = sampling or asked()
        self.add(name, prompt, sampling=sampling, n=n, max_tokens=max_tokens, priority=priority)
        for choice, found in enumerate(alone(prompt, sampling, max_tokens)[:n]):
            self.expected[name if n == 1 else f"{name}{choice}"] = found.tokens.tolist()

    def check_found(self) -> None:
        """Every search has found what it finds alone, and nothing is left of it."""
        assert {name: self.tokens[name] for name in self.expected} == self.expected
        for session in self.scheduler.sessions:
            assert session.pool.num_free == session.pool.num_blocks
            assert session.num_free_slots == session.facts.max_sequences


@pytest.mark.parametrize("width", [2, 3, 8])
@pytest.mark.parametrize("length_penalty", [-1.0, 1.0])
def test_it_finds_what_the_search_finds_alone(width: int, length_penalty: float) -> None:
    world = Beams(num_blocks=200)
    sampling = asked(width, length_penalty=length_penalty)
    world.search("a", sampling=sampling, n=width)
    made = list(world.scheduler)
    world.run()

    world.check_found()
    found = alone(PROMPT, sampling, 12)
    assert [sequence.score for sequence in made] == [each.score for each in found]
    assert {world.reasons[f"a{n}"] for n in range(width)} <= {FinishReason.EOS, FinishReason.LENGTH}


def test_nothing_is_told_before_the_search_is_over() -> None:
    world = Beams()
    world.search("a", n=2)
    while not world.reasons:
        assert not any(world.tokens.values())
        assert world.step()

    assert world.reasons.keys() == {"a0", "a1"}
    world.check_found()


def test_beams_share_what_they_have_in_common() -> None:
    world = Beams(num_blocks=200, block_size=4)
    prompt = [n % VOCAB_SIZE for n in range(64)]
    world.search("a", prompt, sampling=asked(4), max_tokens=24)
    most = 0
    while world.scheduler.num_sequences:
        world.step()
        most = max(most, 200 - world.num_free)
        world.scheduler.check()

    copies = 4 * blocks_for(64 + 24, 4)
    assert 16 < most <= 16 + 4 * 6 < copies
    world.check_found()


def test_other_requests_go_on_beside_a_search_and_keep_their_steps_in_flight() -> None:
    world = Beams(credit=3)
    world.search("search")
    world.add("other", prompt=[1, 2], max_tokens=20)
    for _ in range(4):
        world.step()

    plans = [plan for _ in range(3) if (plan := world.send()) is not None]

    assert [len(plan.refs) for plan in plans] == [5, 1, 1], "the beams once, and the other one in every step"
    world.run()
    world.check_found()
    assert world.tokens["other"] == list(range(2, 22))


def test_steps_that_are_launched_before_the_last_ones_result_change_nothing() -> None:
    class Late(Beams):
        runner_class = LateRunner

    world = Late(credit=3, num_blocks=24)
    world.search("a", n=2)
    world.add("other", prompt=[1, 2], max_tokens=20)
    world.search("b", [7, 8, 9])
    world.run()

    world.check_found()


@pytest.mark.parametrize("caching", [True, False])
def test_searches_that_do_not_fit_together_take_turns(caching: bool) -> None:
    world = Beams(num_blocks=22, credit=2, prefix_caching=caching)
    for name in "abc":
        world.search(name, [*PROMPT, ord(name) % VOCAB_SIZE], max_tokens=14)
    world.run()

    assert world.scheduler.counters.preemptions > 0
    world.check_found()


def test_a_search_that_waited_shares_its_prompt_again() -> None:
    world = Beams(num_blocks=100)
    prompt = [n % VOCAB_SIZE for n in range(40)]
    world.search("a", prompt, max_tokens=16)
    for _ in range(9):
        world.step()
    session = world.scheduler.sessions[0]
    session_id = world.join(num_blocks=100)
    world.lose(session.id)

    computed = 0
    while world.scheduler.num_sequences:
        plan = world.send(session_id)
        assert plan is not None
        computed += plan.num_tokens if not world.tokens["a"] else 0
        world.answer(session_id)

    world.check_found()
    assert computed < 40 + 4 * 9 + 4 * 16, "the prompt once, and what each beam has beside it"


def test_no_token_changes_when_its_executor_is_lost() -> None:
    world = Beams(executors=2, credit=2, num_blocks=40)
    for name in "abcd":
        world.search(name, [*PROMPT, ord(name) % VOCAB_SIZE], n=2)
    for _ in range(5):
        for session in (0, 1):
            world.step(session)
    world.lose(0)
    world.run()

    assert world.scheduler.counters.moved > 0
    world.check_found()


def test_who_leaves_ends_the_search_with_the_last_answer() -> None:
    world = Beams()
    world.search("a", n=2)
    for _ in range(4):
        world.step()
    world.abort("a0")
    assert world.step(), "the other answer is still waited for"
    world.abort("a1")

    assert not world.step()
    assert world.num_free == 64
    world.scheduler.check()


def test_a_search_is_aborted_while_it_waits() -> None:
    world = Beams(num_blocks=22)
    world.search("a")
    world.search("b")
    world.step()
    world.abort("b")
    world.run()

    assert world.reasons["b"] is FinishReason.ABORTED
    assert world.tokens["a"] == world.expected["a"]


def test_one_choice_of_a_search_is_resumed_as_it_was() -> None:
    world = Beams()
    world.search("whole", n=3)
    world.run()
    begun = {1: Begun((), ""), 2: Begun(tuple(world.tokens["whole2"][:2]), "")}
    stop = StopConditions(max_tokens=12)
    one, two = world.scheduler.add(PROMPT, asked(), stop, world.now_ns, choices=3, begun=begun)
    for sequence, name in ((one, "one"), (two, "two")):
        world.names[sequence.id], world.tokens[name] = name, []
    world.run()

    assert world.tokens["one"] == world.tokens["whole1"]
    assert world.tokens["two"] == world.tokens["whole2"][2:]


def test_an_answer_that_begins_otherwise_than_its_reader_has_it_fails() -> None:
    world = Beams()
    begun = {0: Begun((39, 39), "")}
    (sequence,) = world.scheduler.add(PROMPT, asked(), StopConditions(max_tokens=12), 0, begun=begun)
    world.names[sequence.id], world.tokens["a"] = "a", []
    world.run()

    assert (world.tokens["a"], world.reasons["a"]) == ([], FinishReason.ERROR)


def test_a_search_that_no_executor_could_hold_is_refused() -> None:
    world = Beams(num_blocks=20)
    with pytest.raises(InvalidRequest, match=r"beams.width: 8 beams of up to 26 tokens"):
        world.search("a", sampling=asked(8), max_tokens=20)
    with pytest.raises(InvalidRequest, match=r"beams.width"):
        Beams(max_sequences=3).search("a")

    assert world.scheduler.num_sequences == 0
    assert not world.scheduler.waiting


def test_a_beam_that_is_not_finite_is_tried_elsewhere_then_the_search_ends() -> None:
    def poisoned(prefix: Prefix) -> int | None:
        return None if prefix.num_tokens == 9 else position_token(prefix)

    world = Beams(executors=0)
    world.join(next_token=poisoned)
    world.join()
    world.search("a", n=2)
    world.run()
    world.check_found()

    world = Beams(next_token=poisoned)
    world.search("a", n=2)
    world.run()
    assert world.reasons == {"a0": FinishReason.ERROR, "a1": FinishReason.ERROR}
    assert world.scheduler.counters.rows_unusable == 2
    assert world.num_free == 64


def test_a_search_that_kills_is_found_out_alone() -> None:
    world = Beams(executors=1)
    world.search("bad", n=2)
    world.add("good", prompt=[1, 2], max_tokens=20)
    for _ in range(3):
        world.step()
    for session in range(3):
        while world.send(session) is not None:
            pass
        world.join()
        world.lose(session, End.LOST)
        world.scheduler.check()
    world.run()

    assert world.tokens["good"] == list(range(2, 22))
    assert "bad0" in world.reasons


WRONG: list[tuple[Callable[[Ranked], Ranked], str]] = [
    (lambda each: each._replace(output_index=each.output_index + 1), "for output 2, not 1"),
    (lambda each: each._replace(token_ids=(1,) * 12), "not up to 12 different ones"),
    (lambda each: each._replace(token_ids=tuple(range(13)), logprobs=(-1.0,) * 13), "not up to 12 different ones"),
    (lambda each: each._replace(token_ids=(VOCAB_SIZE,), logprobs=(-1.0,)), "a token that is none of 40"),
    (lambda each: each._replace(logprobs=(float("nan"),) * 12), "a log-probability that is not finite"),
    (lambda each: each._replace(ref=SlotRef(77)), "is not ranked"),
    (lambda each: each._replace(raw=(-1.0,)), "with 1 log-probabilities to tell"),
]


@pytest.mark.parametrize(("change", "problem"), WRONG, ids=[problem for _, problem in WRONG])
def test_a_wrong_rank_is_refused_whole(change: Callable[[Ranked], Ranked], problem: str) -> None:
    world = Beams()
    world.search("a")
    world.step()
    world.send()
    result = execute(world.runners[0], world.sent[0].popleft())
    first, *others = result.ranked
    with pytest.raises(ProtocolError, match=problem):
        world.scheduler.update(0, replace(result, ranked=[change(first), *others]), world.now_ns)
    with pytest.raises(ProtocolError, match="is ranked twice"):
        world.scheduler.update(0, replace(result, ranked=[first, first, *others]), world.now_ns)
    with pytest.raises(ProtocolError, match="was not asked for a token"):
        world.scheduler.update(0, replace(result, refs=[first.ref], tokens=[1], indices=[1]), world.now_ns)

    world.scheduler.update(0, result, world.now_ns)
    world.run()
    world.check_found()


def test_a_row_that_is_no_beam_is_not_ranked() -> None:
    world = Beams()
    world.search("a")
    world.add("other", prompt=[1, 2], max_tokens=4)
    world.send()
    result: StepResult = execute(world.runners[0], world.sent[0].popleft())
    other = result.ranked[0]._replace(ref=result.refs[0])
    with pytest.raises(ProtocolError, match="is ranked but was not to be"):
        world.scheduler.update(0, replace(result, ranked=[*result.ranked, other]), world.now_ns)


@pytest.mark.parametrize("first", range(0, 60, 20))
def test_any_story_ends_with_what_is_found_alone(first: int) -> None:
    for seed in range(first, first + 20):
        try:
            play(seed)
        except BaseException as error:
            error.add_note(f"play({seed})")
            raise


def play(seed: int) -> None:
    """Searches and other requests in small pools, executors that come and die, callers that leave."""
    draw = random.Random(seed)

    class Story(Beams):
        runner_class = draw.choice([Beams.runner_class, LateRunner])

    world = Story(
        executors=0, token_budget=draw.choice([5, 16, 64]), watermark=draw.choice([0.0, 0.1]),
        prefix_caching=draw.random() < 0.8, max_model_len=48,
    )  # fmt: skip

    def join() -> None:
        size = draw.choice([1, 2, 4, 8])
        world.join(
            block_size=size, num_blocks=draw.choice([64, 96, 140]) // size + 1, max_sequences=draw.choice([4, 6, 9]),
            credit=draw.choice([1, 2, 3]), max_step_tokens=draw.choice([8, 64]),
        )  # fmt: skip

    join()
    for number in range(draw.choice([10, 40, 90])):
        what = draw.random()
        sessions = list(world.runners)
        if what < 0.10:
            own = [draw.randrange(VOCAB_SIZE) for _ in range(draw.choice([1, 3, 9]))]
            prompt = [*PROMPT[: draw.randrange(7)], *own]
            sampling = asked(draw.choice([2, 3, 4]), length_penalty=draw.choice([-1.0, 0.0, 1.0]))
            max_tokens = draw.choice([1, 2, 6, 10])
            with suppress(InvalidRequest):  # more than any executor that is there could hold
                world.search(
                    f"s{number}-", prompt, sampling=sampling, n=2, max_tokens=max_tokens,
                    priority=draw.choice(list(Priority)),
                )  # fmt: skip
        elif what < 0.16:
            prompt = [draw.randrange(VOCAB_SIZE) for _ in range(draw.choice([1, 5, 9]))]
            world.add(f"o{number}", prompt, max_tokens=draw.choice([1, 5, 20]), priority=draw.choice(list(Priority)))
        elif what < 0.18 and (alive := [s for s in world.scheduler if s.id in world.names]):
            name = world.names[draw.choice(alive).id]
            world.abort(name)
            world.expected.pop(name, None)
        elif what < 0.20 and len(sessions) < 3:
            join()
        elif what < 0.22 and sessions:
            world.lose(draw.choice(sessions), draw.choice([End.LOST, End.WRONG, End.CLEAN]))
        elif what < 0.60 and sessions:
            world.send(draw.choice(sessions))
        elif busy := [s for s in sessions if world.sent[s]]:
            world.answer(draw.choice(busy))
        world.scheduler.check()
    if not any(session.facts.max_sequences >= 4 for session in world.scheduler.sessions):
        join()
    world.join(block_size=4, num_blocks=40, max_sequences=8)
    world.run()
    for name in list(world.expected):
        if world.reasons[name] is FinishReason.ERROR:  # executors died of it, as far as anybody can tell
            del world.expected[name]
    world.check_found()
