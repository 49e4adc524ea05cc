"""What a router is told of the prefix cache: as much as a prompt could find, of its own tenant, and never a gap."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Coroutine
from contextlib import aclosing
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.errors import InvalidRequest, Overloaded, Unavailable
from scheduler.prefix_cache import BlockKey, CachedBlock
from services.vllm_api.cache_view import CacheView
from services.vllm_api.kv_events import MAX_CHANGES, Batches, KvEvents, block_hash
from services.vllm_api.stubs import common_pb2 as pb
from tests.scheduler.world import World
from tests.services.served import HANG_S

ROOT = BlockKey(b"the root")


def block(name: str, parent: str = "", tokens: int = 4) -> CachedBlock:
    """A block that stands behind `parent`; the first of a chain where there is none."""
    return CachedBlock(_key(name), _key(parent) if parent else ROOT, [ord(name[0])] * tokens)


def _key(name: str) -> BlockKey:
    return BlockKey(name.encode().ljust(8, b"."))


A, B, C = block("a"), block("b", "a"), block("c", "b")


# ---- what can be found


def test_a_block_counts_once_its_whole_chain_is_there_whatever_came_first() -> None:
    view = CacheView(ROOT)

    assert [*view.stored(C), *view.stored(B)] == []
    assert list(view.stored(A)) == [A, B, C]
    assert len(view) == 3


def test_with_a_block_goes_all_that_stands_behind_it_and_comes_back_with_it() -> None:
    view = CacheView(ROOT)
    for each in (A, B, C):
        assert list(view.stored(each)) == [each]

    assert list(view.removed(A.key)) == [A.key, B.key, C.key]
    assert list(view.removed(C.key)) == []  # nobody could find it any more
    assert list(view.stored(A)) == [A, B]


def test_a_block_that_two_executors_have_is_one_and_gone_with_the_last() -> None:
    view = CacheView(ROOT)

    assert [list(view.stored(A)), list(view.stored(A))] == [[A], []]
    assert [list(view.removed(A.key)), list(view.removed(A.key))] == [[], [A.key]]


def test_blocks_of_another_size_are_left_out_while_there_are_any_of_the_first() -> None:
    view, other = CacheView(ROOT), block("x", tokens=8)

    assert [list(view.stored(A)), list(view.stored(other)), list(view.removed(other.key))] == [[A], [], []]
    assert not view.is_outdated
    assert list(view.removed(A.key)) == [A.key]
    assert view.is_outdated  # there may be others of that size, of which it was not told
    assert list(view.stored(other)) == [other]


def test_what_a_change_concerns_is_found_as_it_is_asked_for() -> None:
    view = CacheView(ROOT)
    for each in (B, C):
        assert not list(view.stored(each))

    found = view.stored(A)
    assert (next(found), len(view)) == (A, 1)
    assert (list(found), len(view)) == ([B, C], 3)


@given(st.lists(st.tuples(st.integers(0, 5), st.booleans()), max_size=60))
def test_what_was_told_is_what_could_be_found(changes: list[tuple[int, bool]]) -> None:
    names = "abcdef"  # a binary tree: b and c behind a, d and e behind b, f behind c
    blocks = [block(name, names[(i - 1) // 2] if i else "") for i, name in enumerate(names)]
    view, copies, told = CacheView(ROOT), [0] * 6, set[BlockKey]()
    for which, comes in changes:
        if comes:
            copies[which] += 1
            for new in view.stored(blocks[which]):
                assert new.parent == ROOT or new.parent in told, "parents first"
                told.add(new.key)
        elif copies[which]:
            copies[which] -= 1
            told -= set(view.removed(blocks[which].key))
        found = [all(copies[j] for j in _path(i)) for i in range(6)]
        assert told == {blocks[i].key for i in range(6) if found[i]}


def _path(index: int) -> list[int]:
    return [index, *(_path((index - 1) // 2) if index else ())]


# ---- how it is told


def test_a_chain_is_one_event_and_a_branch_another() -> None:
    batches = Batches(ROOT)
    batches.store([A, B, C, block("d", "a")])
    batches.remove([C.key, B.key])
    (batch,) = batches.take()

    chain, branch, gone = batch.events
    assert [b.block_hash for b in chain.stored.blocks] == [block_hash(each.key) for each in (A, B, C)]
    assert not chain.stored.HasField("parent_block_hash")
    assert list(chain.stored.blocks[1].token_ids) == [ord("b")] * 4 and chain.stored.blocks[1].block_size == 4
    assert branch.stored.parent_block_hash == block_hash(A.key)
    assert list(gone.removed.block_hashes) == [block_hash(C.key), block_hash(B.key)]
    assert batches.take() == []


def test_many_blocks_are_many_messages() -> None:
    batches = Batches(ROOT, max_blocks=2)
    batches.store([A, B, C])
    first, second = batches.take()

    assert [len(batch.events[0].stored.blocks) for batch in (first, second)] == [2, 1]
    assert second.events[0].stored.parent_block_hash == block_hash(B.key)


# ---- of a scheduler that runs


class Router:
    """Whoever reads, and what it knows: blocks by hash, as one that begins anew would know them."""

    def __init__(self, stream: AsyncGenerator[pb.KvEventBatch, None]) -> None:
        self._stream = stream
        self.known: dict[int, tuple[int, ...]] = {}
        self.last = 0
        self.cleared = 0

    async def hear(self) -> pb.KvEventBatch:
        """The next batch."""
        batch = await anext(self._stream)
        assert not self.last or batch.sequence_number == self.last + 1, "a gap"
        self.last = batch.sequence_number
        for event in batch.events:
            if event.HasField("cleared"):
                self.known.clear()
                self.cleared += 1
            for each in event.stored.blocks:
                self.known[each.block_hash] = tuple(each.token_ids)
            for gone in event.removed.block_hashes:
                del self.known[gone]
        return batch


def listening(
    test: Callable[[World, Router], Coroutine[Any, Any, None]],
    *,
    tenant: str = "",
    executors: int = 1,
    after: int = 0,
    max_changes: int = MAX_CHANGES,
) -> None:
    """Run the test beside a router that listens for the tenant."""

    async def main() -> None:
        world = World(executors=executors)
        events = KvEvents(world.scheduler, max_changes=max_changes, begin_every_s=0)
        async with asyncio.timeout(HANG_S), aclosing(events.stream(tenant, after=after)) as stream:
            await test(world, Router(stream))

    asyncio.run(main())


def test_a_router_hears_of_each_whole_block_as_it_is_planned_and_of_its_end() -> None:
    async def test(world: World, router: Router) -> None:
        await router.hear()
        assert router.known == {}
        world.add("a", prompt=list(range(10)), max_tokens=3)
        world.run()
        await router.hear()
        assert set(router.known.values()) == {(0, 1, 2, 3), (4, 5, 6, 7), (8, 9, 10, 11)}
        world.lose(0)
        await router.hear()
        assert router.known == {} and router.cleared == 1

    listening(test)


def test_who_begins_late_is_told_all_that_is_there_numbered_from_where_it_was() -> None:
    async def test(world: World, router: Router) -> None:
        world.add("a", prompt=list(range(8)), max_tokens=1)
        world.run()
        batch = await router.hear()
        assert batch.sequence_number == 42 and batch.events[0].HasField("cleared")
        assert set(router.known.values()) == {(0, 1, 2, 3), (4, 5, 6, 7)}

    listening(test, after=41)


def test_what_two_executors_have_is_gone_with_the_second() -> None:
    async def test(world: World, router: Router) -> None:
        await router.hear()
        for session in (0, 1):
            world.scheduler.fell_silent(1 - session)
            world.add(f"on {session}", prompt=list(range(8)), max_tokens=1)
            while world.step(session):
                pass
            world.scheduler.spoke(1 - session)
        await router.hear()
        assert len(router.known) == 2
        world.lose(0)
        world.lose(1)
        await router.hear()
        assert router.known == {}

    listening(test, executors=2)


def test_blocks_that_are_reused_are_told_as_gone() -> None:
    async def test(world: World, router: Router) -> None:
        for i in range(8):
            world.add(f"{i}", prompt=[i] * 64, max_tokens=1)
            world.run()
            await router.hear()
            cache = world.scheduler.sessions[0].cache
            root = world.scheduler.prefixes.root("")
            assert set(router.known) == {block_hash(each.key) for part in cache.snapshot(root) for each in part}

    listening(test)


def test_a_tenant_hears_of_its_own_prefixes_alone_and_of_none_with_a_salt() -> None:
    async def test(world: World, router: Router) -> None:
        await router.hear()
        world.add("others", prompt=[7] * 8, max_tokens=1, tenant="other")
        world.add("salted", prompt=[8] * 8, max_tokens=1, tenant="one", salt="s")
        world.add("own", prompt=[9] * 8, max_tokens=1, tenant="one")
        world.run()
        await router.hear()
        assert set(router.known.values()) == {(9,) * 4}  # one block behind the other

    listening(test, tenant="one")


def test_a_reader_who_is_too_slow_starts_over_and_keeps_nothing_waiting() -> None:
    async def test(world: World, router: Router) -> None:
        await router.hear()
        for i in range(4):
            world.add(f"{i}", prompt=[i] * 16, max_tokens=1)
        world.run()  # more than four changes
        await router.hear()
        while len(router.known) < 16:
            await router.hear()
        assert router.cleared == 2

    listening(test, max_changes=4)


def test_what_is_flushed_is_found_no_more_and_what_runs_goes_on() -> None:
    async def test(world: World, router: Router) -> None:
        world.add("a", prompt=list(range(9)), max_tokens=20)
        world.add("other", prompt=list(range(9)), max_tokens=1, tenant="other")
        world.step()
        await router.hear()
        assert sum(world.scheduler.prefixes.forget("")) == len(router.known) == 2
        await router.hear()
        assert router.known == {}
        world.run()
        world.scheduler.check()
        assert world.tokens["a"] == list(range(9, 29))
        hits = world.scheduler.counters.cached_prompt_tokens
        world.add("again", prompt=list(range(9)), max_tokens=1)
        world.add("other again", prompt=list(range(9)), max_tokens=1, tenant="other")
        world.run()
        assert world.scheduler.counters.cached_prompt_tokens == hits + 8  # the other tenant's

    listening(test)


def test_who_is_gone_is_told_nothing_more() -> None:
    async def main() -> None:
        world = World()
        async with aclosing(KvEvents(world.scheduler).stream("")) as events:
            await anext(events)
        world.add("a", prompt=8, max_tokens=1)
        world.run()
        assert not world.scheduler.prefixes.watchers

    asyncio.run(main())


def test_one_stream_too_many_is_refused_and_one_tenant_cannot_have_them_all() -> None:
    async def main() -> None:
        events = KvEvents(World().scheduler, max_streams=4, begin_every_s=0)
        greedy = [events.stream("greedy") for _ in range(3)]
        for stream in greedy[:2]:
            await anext(stream)
        with pytest.raises(Overloaded):
            await anext(greedy[2])
        other = events.stream("other")
        await anext(other)
        await greedy[0].aclose()
        for stream in (greedy[1], other):
            await stream.aclose()
        assert (await anext(events.stream("greedy"))).sequence_number == 1

    asyncio.run(main())


def test_where_there_are_no_tenants_all_streams_are_for_who_asks() -> None:
    async def main() -> None:
        events = KvEvents(World().scheduler, max_streams=3, begin_every_s=0)
        streams = [events.stream("") for _ in range(4)]
        for stream in streams[:3]:
            await anext(stream)
        with pytest.raises(Overloaded):
            await anext(streams[3])
        for stream in streams:
            await stream.aclose()

    asyncio.run(main())


def test_a_tenant_s_streams_begin_one_a_second_and_another_s_need_not_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        loop = asyncio.get_running_loop()
        now_s, slept = 100.0, list[float]()
        monkeypatch.setattr(loop, "time", lambda: now_s)
        sleep = asyncio.sleep

        async def sleeping(seconds: float) -> None:
            nonlocal now_s
            if seconds:
                slept.append(seconds)
                now_s += seconds
            await sleep(0)

        monkeypatch.setattr(asyncio, "sleep", sleeping)
        events = KvEvents(World().scheduler)
        streams = [events.stream(tenant) for tenant in ("one", "one", "other", "one")]
        for stream in streams:
            await anext(stream)
        assert slept == [1.0, 1.0]
        for stream in streams:
            await stream.aclose()

    asyncio.run(main())


def test_when_the_scheduler_ends_so_do_the_streams() -> None:
    async def main() -> None:
        events = KvEvents(World().scheduler)
        stream = events.stream("")
        await anext(stream)
        events.close()
        with pytest.raises(Unavailable):
            await anext(stream)
        with pytest.raises(Unavailable):
            await anext(events.stream("other"))

    asyncio.run(main())


def test_a_number_that_no_batch_can_have_is_refused() -> None:
    async def main() -> None:
        with pytest.raises(InvalidRequest, match="start_sequence_number"):
            await anext(KvEvents(World().scheduler).stream("", after=2**64 - 1))

    asyncio.run(main())
