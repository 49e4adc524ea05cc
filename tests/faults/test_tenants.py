"""One tenant's prompts change nothing that another can see.

The same story is played beside two secrets of a tenant: once the guesses of another are right, once they are not.
Everything that reaches a clock is compared: how many tokens each step computes for whom, which blocks it takes, who is
admitted when and where, what is preempted and copied. If all of it is equal, no time can differ.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import NamedTuple

import pytest

from common.step import StepPlan
from scheduler.prefix_cache import BlockKey, KeyChain
from scheduler.sequence import Sequence
from tests.scheduler.world import World

BLOCK = 4
SEEDS = range(100)


class Act(NamedTuple):
    """Something that happens: a request of a tenant, steps of the executors, or the loss of one."""

    what: str  # "victim", "probe", "crowd", "steps" or "loss"
    right: int = 0  # tokens of the secret that a probe has right, or that a prompt of the victim begins with
    tail: tuple[int, ...] = ()  # what follows them
    n: int = 1
    max_tokens: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Story:
    """What happens, told without the secret, and the guess that the probes make."""

    acts: list[Act]
    guess: list[int]
    executors: int
    num_blocks: int
    token_budget: int
    credit: int


@dataclass(slots=True)
class Seen:
    """What there is to see of a story: the shape of every plan, and what each probe is told."""

    shapes: list[object]
    cached: list[int]  # prompt tokens that each probe finds in the cache
    steps: list[int]  # that pass from each probe to its first token


def story(seed: int, *, num_blocks: int | None = None) -> Story:
    """A story of a seed: quiet or crowded, with much memory or little."""
    rng = random.Random(seed)

    def tokens(count: int) -> tuple[int, ...]:
        return tuple(rng.randrange(1000) for _ in range(count))

    length = BLOCK * rng.choice([1, 4, 16])
    acts: list[Act] = []
    crowded = rng.random() < 0.5
    for _ in range(rng.randrange(3, 8)):
        acts.append(Act("victim", length, tokens(rng.randrange(1, 6)), max_tokens=rng.choice([1, 3])))
        if crowded:
            acts += [Act("crowd", 0, tokens(rng.randrange(1, 60)), max_tokens=rng.randrange(1, 12)) for _ in range(3)]
        acts.append(Act("steps", rng.randrange(0, 12)))
        right = rng.choice([length, length, rng.randrange(1, length + 1)])
        acts.append(Act("probe", right, tokens(rng.randrange(1, 6)), rng.choice([1, 1, 2]), rng.choice([1, 4])))
        acts.append(Act("steps", rng.randrange(0, 12)))
        if rng.random() < 0.1:
            acts.append(Act("loss"))
    return Story(
        acts=acts,
        guess=list(tokens(length)),
        executors=rng.choice([1, 1, 2]),
        num_blocks=num_blocks or rng.choice([40, 64, 400]),
        token_budget=rng.choice([8, 16, 64]),
        credit=rng.choice([1, 2]),
    )


def other_secret(told: Story) -> list[int]:
    """A secret of the same length that shares no first token with the guess."""
    rng = random.Random(-1)
    return [(token + 1 + rng.randrange(998)) % 1000 for token in told.guess]


def play(told: Story, secret: list[int], *, prober: str = "prober") -> Seen:
    """Play the story to its end beside this secret."""
    world = World(
        executors=told.executors,
        num_blocks=told.num_blocks,
        token_budget=told.token_budget,
        credit=told.credit,
        block_size=BLOCK,
    )
    seen = Seen([], [], [])
    probes: list[tuple[str, int]] = []
    sequences: list[Sequence] = []
    num_steps = 0

    def step() -> None:
        nonlocal num_steps
        num_steps += 1
        for session in list(world.runners):
            while (plan := world.send(session)) is not None:
                seen.shapes.append((session, shape(plan)))
        for session in [s for s in world.runners if world.sent[s]]:
            world.answer(session)
        for name, since in probes[len(seen.steps) :]:
            if not world.tokens[name]:
                break
            seen.steps.append(num_steps - since)

    for number, act in enumerate(told.acts):
        if act.what == "steps":
            for _ in range(act.right):
                step()
        elif act.what == "loss":
            world.lose(next(iter(world.runners)))
            world.join()
        else:
            known = {"victim": secret, "probe": told.guess, "crowd": []}[act.what]
            prompt = [*known[: act.right], *act.tail]
            tenant = {"victim": "victim", "probe": prober, "crowd": "crowd"}[act.what]
            name = f"{act.what}{number}-"
            made = world.add(name, prompt, max_tokens=act.max_tokens, n=act.n, tenant=tenant)
            if act.what == "probe":
                probes.append((world.names[made[0]], num_steps))
                sequences.append(world.scheduler.sequence(made[0]))
    while world.scheduler.num_sequences:
        step()
    seen.cached = [sequence.num_cached_prompt for sequence in sequences]
    return seen


def shape(plan: StepPlan) -> object:
    """All of a plan but the tokens themselves."""
    new = [(s.ref, s.attempt, len(s.token_ids), s.num_computed, tuple(s.block_table), s.choice) for s in plan.new]
    return (
        plan.step,
        *map(tuple, (plan.refs, plan.num_scheduled, plan.append_refs, plan.append_blocks, plan.released, plan.copies)),
        *map(tuple, (plan.replace_refs, plan.replace_indices, plan.replace_blocks, new)),
    )


@pytest.mark.parametrize("seed", SEEDS)
def test_whether_a_guess_is_right_changes_nothing_that_is_done(seed: int) -> None:
    told = story(seed)

    assert play(told, told.guess) == play(told, other_secret(told))


def test_probes_that_fill_the_memory_learn_nothing_either() -> None:
    for seed in SEEDS[:50]:
        told = story(seed, num_blocks=24)  # what one keeps is what the other loses
        assert play(told, told.guess) == play(told, other_secret(told)), seed


def test_a_probe_finds_no_more_than_its_own_tenant_has_sent() -> None:
    """The control of the test itself: whoever shares a tenant sees at once whose guess is right."""
    told_apart = 0
    for seed in SEEDS[:40]:
        told = story(seed, num_blocks=400)
        right, wrong = (play(told, secret, prober="victim") for secret in (told.guess, other_secret(told)))
        told_apart += right.cached != wrong.cached and right.shapes != wrong.shapes
    assert told_apart >= 0.95 * 40


def test_a_cache_without_tenants_in_its_keys_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    honest = KeyChain.root

    def root(chain: KeyChain, model: str, tenant: str, salt: str) -> BlockKey:
        return honest(chain, model, "", salt)

    monkeypatch.setattr(KeyChain, "root", root)
    leaks = [seed for seed in SEEDS[:40] if play(told := story(seed), told.guess) != play(told, other_secret(told))]

    assert len(leaks) >= 0.9 * 40
