"""A random crowd in a Witness: any event at any moment, chosen by a seed.

Also a search by hand: `python -m tests.scheduler.crowd --seeds 1000 --events 200`.
"""

from __future__ import annotations

import argparse
import dataclasses
import random
from collections import Counter
from collections.abc import Iterator

from common.sampling import Grammar, SamplingParams, StopConditions
from common.types import Priority
from scheduler.suspicion import End
from tests.scheduler.witness import VOCAB_SIZE, Witness

_FAMILIES = [[(7 * family + 3 * i) % (VOCAB_SIZE - 1) + 1 for i in range(48)] for family in range(2)]


def prompt_of(family: int, shared: int, own: list[int]) -> list[int]:
    """A prompt that begins like all of its family."""
    return [*_FAMILIES[family][:shared], *own]


def crowd(seed: int, num_events: int) -> Witness:
    """Play a story to its end and check it all the way. Raises AssertionError, or what broke first."""
    draw = random.Random(seed)
    world = Witness(
        token_budget=draw.choice([4, 9, 24, 64]),
        prefix_caching=draw.random() < 0.85,
        watermark=draw.choice([0.0, 0.0, 0.1]),
    )
    for _ in range(draw.choice([1, 1, 2, 3])):
        _join(world, draw)
    events = [_add] * 3 + [_talk_on] * 4 + [_send] * 12 + [_answer] * 10 + [_abort, _join, _lose, _leave, _hush]
    if draw.random() < 0.2:
        events += [_join, _lose] * 4  # nobody lives for long
    quiet = draw.random() < 0.5  # executors stay: memory, not loss, is what hurts
    for _ in range(num_events):
        event = draw.choice(events)
        if not (quiet and event in (_join, _lose, _leave, _hush)):
            event(world, draw)
    world.settle()
    return world


def stories(num_seeds: int, num_events: int, first: int = 0) -> Iterator[Witness]:
    """Play many; say the seed of the one that breaks."""
    for seed in range(first, first + num_seeds):
        try:
            yield crowd(seed, num_events)
        except BaseException as error:
            error.add_note(f"crowd(seed={seed}, num_events={num_events})")
            raise


def _join(world: Witness, draw: random.Random) -> None:
    if len(world.runners) < 3:
        size = draw.choice([1, 2, 4, 4, 8])
        gone = [name for _, name in world.dead]
        world.join(
            name=draw.choice(gone) if gone and draw.random() < 0.3 else None,
            next_token=world.glitch if draw.random() < 0.2 else None,
            block_size=size,
            num_blocks=draw.choice([16, 24, 40, 64, 80]) // size + 1,
            max_sequences=draw.choice([1, 2, 4, 8]),
            credit=draw.choice([1, 2, 2, 3]),
            max_step_tokens=draw.choice([8, 256]),
            compile_rows=world.now_ns % 4,  # not drawn: the stories are otherwise what they were
            left_out_every=world.now_ns % 3,
        )


def _lose(world: Witness, draw: random.Random) -> None:
    if world.runners:
        ends = [End.LOST, End.LOST, End.LOST, End.SILENT, End.STUCK, End.FAILED, End.WRONG, End.CLEAN]
        world.lose(draw.choice(list(world.runners)), draw.choice(ends))
        if world.dead and draw.random() < 0.2:
            world.acquit()


def _hush(world: Witness, draw: random.Random) -> None:
    """An executor falls silent, or the silent ones speak again."""
    if world.runners and draw.random() < 0.3:
        world.scheduler.fell_silent(draw.choice(list(world.runners)))
    else:
        for session in world.runners:
            world.scheduler.spoke(session)


def _leave(world: Witness, draw: random.Random) -> None:
    if world.runners and draw.random() < 0.3:
        world.leave(draw.choice(list(world.runners)))


def _add(world: Witness, draw: random.Random) -> None:
    own = [draw.randrange(VOCAB_SIZE) for _ in range(draw.choice([1, 1, 2, 5]))]
    _ask(world, draw, prompt_of(draw.randrange(2), draw.randrange(0, 20), own), draw.choice(["", "", "b"]))


def _talk_on(world: Witness, draw: random.Random) -> None:
    """The next turn of a chat: an earlier prompt, what was answered so far, and a little more."""
    if world.prompts:
        ended = [name for name in world.reasons if name not in world.aborted]
        name = ended[-1] if ended and draw.random() < 0.7 else draw.choice(list(world.prompts))
        more = [draw.randrange(VOCAB_SIZE) for _ in range(draw.choice([1, 2, 3]))]
        tenant = world.tenants[world.id(name)]
        _ask(world, draw, [*world.prompts[name], *world.tokens[name], *more], tenant)


def _ask(world: Witness, draw: random.Random, prompt: list[int], tenant: str) -> None:
    if len(prompt) > 48 or len(world.alive) > 24:
        return
    sampling = SamplingParams(temperature=float(draw.random() < 0.7), seed=draw.randrange(3))
    stop = StopConditions(
        max_tokens=draw.choice([1, 2, 5, 12, 64 - len(prompt)]),
        stop_token_ids=draw.choice([(), (), (5,), (5, 9, 11, 30)]),
        ignore_eos=draw.random() < 0.3,
    )
    if sum(prompt) % 3 == 0:  # not drawn, as above
        sampling = dataclasses.replace(sampling, grammar=Grammar("regex", "a+"))
    n, priority = draw.choice([1, 1, 1, 2, 4]), draw.choice([*Priority, Priority.NORMAL])
    # drawn apart, so that the stories are otherwise what they were
    apart = random.Random(f"cache {len(world.names)} {prompt}")
    salt, caches = "salt" if apart.random() < 0.1 else "", apart.random() >= 0.1
    world.request(prompt, n=n, stop=stop, sampling=sampling, tenant=tenant, priority=priority, salt=salt, caches=caches)
    if random.Random(f"embeds {len(world.names)} {prompt}").random() < 0.15:
        alone = StopConditions(max_tokens=1, ignore_eos=True)
        world.request(prompt, n=1, stop=alone, tenant=tenant, salt=salt, caches=caches, embeds=True)
    if apart.random() < 0.25:
        pinned = prompt[: apart.randint(1, len(prompt))]
        world.pin(pinned, tenant=tenant, salt=salt, seconds=apart.choice([1, 3, 20]))
    if apart.random() < 0.03:
        world.unpin(tenant)


def _abort(world: Witness, draw: random.Random) -> None:
    if world.alive:
        world.abort(world.names[draw.choice(world.alive)])


def _send(world: Witness, draw: random.Random) -> None:
    if world.runners:
        world.now_ns += draw.choice([0] * 19 + [2_000_000_000])  # somebody was silent for long, and requests age
        world.send(draw.choice(list(world.runners)))


def _answer(world: Witness, draw: random.Random) -> None:
    busy = [session for session, plans in world.sent.items() if plans]
    if not busy:
        return
    session = draw.choice(busy)
    if draw.random() < 0.1:
        world.answer_wrongly(session)
    world.answer(session)
    if draw.random() < 0.1:
        world.answer_twice(session)


def main() -> None:
    """Search until something breaks or the seeds are used up."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=1000)
    parser.add_argument("--events", type=int, default=200)
    parser.add_argument("--first", type=int, default=0)
    options = parser.parse_args()
    totals: Counter[str] = Counter()
    for world in stories(options.seeds, options.events, options.first):
        counted = dataclasses.asdict(world.scheduler.counters)
        totals.update({name: count for name, count in counted.items() if isinstance(count, int)})
    print(f"{options.seeds} stories, nothing broke: {dict(totals)}")


if __name__ == "__main__":
    main()
