"""Every process is replaced in turn, twice, while eight streams are read: none of their readers can tell."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest

from common.sampling import SamplingParams, StopConditions
from executor.fake_runner import prefix_hash_token
from pagewire import AsyncClient
from services.text import Tokenizer
from tests.e2e import fake_model
from tests.e2e.fleets import Fleet, Readers
from tests.faults.checker import undisturbed

STREAMS = 8


async def roll(fleets: list[Fleet], model: Path) -> Readers:
    """Replace every process of every fleet, twice, under eight streams. Raises what a reader met."""
    readers = Readers(model)
    async with AsyncClient([fleet.cluster.address for fleet in fleets]) as client, asyncio.TaskGroup() as tasks:
        for _ in range(STREAMS):
            tasks.create_task(readers.read(client))

        await readers.answers(2)
        for _ in range(2):
            for fleet in fleets:
                for number in range(fleet.num_executors):
                    await asyncio.to_thread(fleet.replace_executor, number)
                await asyncio.to_thread(fleet.replace_scheduler)
                await readers.answers(2)
        readers.is_over = True
    return readers


@pytest.fixture
def started(request: pytest.FixtureRequest, fake_folder: Path, tmp_path: Path) -> Iterator[list[Fleet]]:
    """Fleets of so many executors."""
    fleets: list[Fleet] = []
    try:
        for number, num_executors in enumerate(request.param):
            folder = tmp_path / f"fleet-{number}"
            keys = tmp_path / "ticket-keys"
            fleets.append(Fleet.start(fake_folder, folder, ticket_keys=keys, num_executors=num_executors))
        yield fleets
    finally:
        for fleet in fleets:
            fleet.close()


@pytest.mark.parametrize("started", [(2,), (1, 1)], indirect=True, ids=["one scheduler", "two schedulers"])
def test_a_rolling_restart_of_every_process_fails_no_stream(started: list[Fleet], fake_folder: Path) -> None:
    asyncio.run(roll(started, fake_folder))

    assert sum(fleet.num_handed_over for fleet in started) > 0, "the grace was too long for anything to be shown"


@pytest.mark.parametrize("started", [(1,)], indirect=True, ids=["one of each"])
def test_a_hundred_streams_of_one_client_are_handed_over_at_once(started: list[Fleet], fake_folder: Path) -> None:
    """More than a client may try again in its patience after refusals, which these are not."""
    (fleet,) = started
    tokenizer = Tokenizer(fake_folder / "tokenizer.json")
    num_streams, num_tokens = 100, 450  # many: the first must not have ended when the last one begins

    async def scenario() -> None:
        begun = asyncio.Semaphore(0)

        async with AsyncClient(fleet.cluster.address, patience_s=60) as client:

            async def ask(seed: int) -> None:
                prompt = [seed, 2, 3]
                async with client.stream(
                    token_ids=prompt, max_tokens=num_tokens, temperature=0, ignore_eos=True
                ) as stream:
                    async for delta in stream:
                        if delta.index == 0:
                            begun.release()
                assert list(stream.answer.token_ids) == said_to(prompt, num_tokens, tokenizer)

            asking = [asyncio.create_task(ask(seed)) for seed in range(num_streams)]
            for _ in range(num_streams):
                await begun.acquire()
            await asyncio.to_thread(fleet.replace_scheduler)
            await asyncio.gather(*asking)
            assert fleet.num_handed_over > 50

    asyncio.run(scenario())


def said_to(prompt: list[int], num_tokens: int, tokenizer: Tokenizer) -> list[int]:
    """What the fake model says greedily."""
    expected = undisturbed(
        prompt,
        SamplingParams(temperature=0.0),
        0,
        StopConditions(max_tokens=num_tokens, ignore_eos=True),
        model=prefix_hash_token,
        tokenizer=tokenizer,
        vocab_size=fake_model.VOCAB_SIZE,
        eos=frozenset({fake_model.EOS}),
    )
    return list(expected.tokens)
