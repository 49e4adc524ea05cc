"""Who shares a prefix with whom: salts, and requests that want nothing of the cache."""

from __future__ import annotations

from executor.fake_runner import prefix_hash_token
from tests.scheduler.world import World

PROMPT = list(range(12))


def test_another_salt_shares_nothing_and_the_same_one_does() -> None:
    world = World()
    world.add("a", prompt=PROMPT, max_tokens=1, salt="one")
    world.run()
    world.add("b", prompt=PROMPT, max_tokens=1, salt="two")
    assert world.step() == {"b": 12}
    world.add("c", prompt=PROMPT, max_tokens=1)
    assert world.step() == {"c": 12}, "no salt is none of the others"
    world.add("d", prompt=PROMPT, max_tokens=1, salt="one")
    assert world.step() == {"d": 1}


def test_a_salt_is_never_instead_of_the_tenant() -> None:
    world = World()
    world.add("a", prompt=PROMPT, max_tokens=1, tenant="one", salt="salt")
    world.run()
    world.add("b", prompt=PROMPT, max_tokens=1, tenant="two", salt="salt")
    assert world.step() == {"b": 12}
    world.add("c", prompt=PROMPT, max_tokens=1, tenant="onesalt")
    assert world.step() == {"c": 12}, "where the tenant ends and the salt begins is part of the key"


def test_who_wants_nothing_of_the_cache_reads_nothing_and_leaves_nothing() -> None:
    world = World()
    world.add("a", prompt=PROMPT, max_tokens=1)
    world.run()
    cached = len(world.scheduler.sessions[0].cache)
    world.add("out", prompt=[*PROMPT, 500, 501, 502, 503], max_tokens=6, caches=False)
    assert world.step() == {"out": 16}
    world.run()

    assert len(world.scheduler.sessions[0].cache) == cached
    world.add("b", prompt=[*PROMPT, 500, 501, 502, 503], max_tokens=1)
    assert world.step() == {"b": 4}, "of the first one's twelve, all"


def test_choices_of_who_wants_nothing_of_the_cache_share_their_prompt_all_the_same() -> None:
    world = World(num_blocks=16, block_size=4)
    world.add("c", prompt=14, n=4, max_tokens=3, caches=False)
    world.step()
    assert world.num_free == 16 - 4
    world.step()
    assert world.num_free == 16 - 4 - 3
    world.run()
    assert world.num_free == 16 and not len(world.scheduler.sessions[0].cache)


def test_preemption_changes_nothing_for_who_wants_nothing_of_the_cache() -> None:
    def tokens(num_blocks: int) -> dict[str, list[int]]:
        world = World(num_blocks=num_blocks, max_model_len=48, credit=2, next_token=prefix_hash_token)
        for i, name in enumerate("abcdefgh"):
            world.add(name, prompt=3 + 2 * i, max_tokens=12, caches=i % 2 == 0)
        world.run()
        preemptions.append(world.scheduler.counters.preemptions)
        return world.tokens

    preemptions: list[int] = []
    assert tokens(13) == tokens(200)
    assert preemptions[0] and not preemptions[1]


def test_cached_tokens_are_what_the_request_found_and_not_what_it_computed_itself() -> None:
    """Through preemption, the loss of an executor, and in each of its choices."""
    world = World(num_blocks=9, max_model_len=36, credit=2)
    world.add("first", prompt=PROMPT[:8], max_tokens=1)
    world.run()
    (old,) = world.add("old", prompt=PROMPT[:10], max_tokens=20)
    (young,) = world.add("young", prompt=[*PROMPT[:8], 99, 98], max_tokens=20)
    sequences = [world.scheduler.sequence(id) for id in (old, young)]
    world.run()
    assert world.scheduler.counters.preemptions
    assert [sequence.num_cached_prompt for sequence in sequences] == [8, 8]

    ids = world.add("n", prompt=[*PROMPT[:6], 97, 96, 95, 94], n=3, max_tokens=6)
    choices = [world.scheduler.sequence(id) for id in ids]
    world.step()
    world.step()
    world.lose(0)
    world.join()
    world.run()
    assert [choice.num_cached_prompt for choice in choices] == [6, 6, 6]
