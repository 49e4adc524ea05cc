"""Every process is replaced in turn, twice, while eight streams are read: none of their readers can tell."""

from __future__ import annotations

import asyncio
import random
import re
import signal
import socket
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from common.sampling import SamplingParams, StopConditions
from executor.fake_runner import prefix_hash_token
from pagewire import AsyncClient
from services.text import Tokenizer
from tests.e2e import fake_model
from tests.e2e.cluster import Cluster, Process
from tests.e2e.health_watch import NOT_SERVING, SERVING, HealthWatch
from tests.faults.checker import undisturbed

STREAMS = 8
STEP_S = 0.01
GRACE_S = 0.3  # most streams take longer
LENGTHS = (40, 120, 240)


@dataclass
class Fleet:
    """One scheduler and its executors, each of which can be replaced by another process."""

    cluster: Cluster
    num_executors: int
    flags: list[str]
    executors: list[Process] = field(default_factory=list)

    @classmethod
    def start(cls, model: Path, folder: Path, *, ticket_keys: Path, num_executors: int) -> Fleet:
        folder.mkdir(exist_ok=True)
        with socket.socket() as free:  # an address that stays: the next scheduler must be found where the last one was
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        flags = [f"--listen=127.0.0.1:{port}", f"--drain-s={GRACE_S}", f"--ticket-keys={ticket_keys}"]
        fleet = cls(Cluster(model, folder, flags=flags), num_executors, flags)
        for number in range(num_executors):
            fleet.executors.append(fleet.executor(number))
        return fleet

    def executor(self, number: int) -> Process:
        """A process of that name, joined."""
        cluster = self.cluster
        flags = ["--fake", "--fake-tokens=hash", f"--fake-step-s={STEP_S}", f"--drain-s={GRACE_S}"]
        names = ["--model", str(cluster.model), "--scheduler", cluster.link, "--name", f"executor-{number}"]
        process = Process(["executor", *names, *flags], cluster.folder / f"executor-{number}.log")
        process.wait_ready()
        return process

    def replace_executor(self, number: int) -> None:
        """One that is there goes, and another comes."""
        with HealthWatch(self.cluster.address) as health:
            self.executors[number].signal(signal.SIGTERM)
            if self.num_executors == 1:
                health.wait_for(NOT_SERVING)
            assert self.executors[number].wait() == 0
            self.executors[number] = self.executor(number)
            health.wait_for(SERVING)
            if self.num_executors > 1:
                assert health.heard == [SERVING], "another one was there all the time"

    def replace_scheduler(self) -> None:
        """It goes, and another comes in its place."""
        old = self.cluster
        with HealthWatch(old.address) as health:
            old.scheduler.signal(signal.SIGTERM)
            assert old.scheduler.wait() == 0
            assert health.to_the_end() == [SERVING, NOT_SERVING]
        self.cluster = Cluster(old.model, old.folder, flags=self.flags)
        old.channel.close()
        with HealthWatch(self.cluster.address) as health:
            health.wait_for(SERVING)  # its executors have found it

    @property
    def num_handed_over(self) -> int:
        """Sequences that a scheduler had to send elsewhere."""
        log = (self.cluster.folder / "scheduler.log").read_text()
        return sum(map(int, re.findall(r"(\d+) sequences go on elsewhere", log)))

    def close(self) -> None:
        self.cluster.close()
        for process in self.executors:
            process.close()


class Readers:
    """Those who ask, read to the end, compare it with what is true, and ask again."""

    def __init__(self, model: Path) -> None:
        self._tokenizer = Tokenizer(model / "tokenizer.json")
        self._draw = random.Random(4)
        self.num_answers = 0
        self.is_over = False

    async def read(self, client: AsyncClient) -> None:
        """Until it is over; the answer that is open then is read to its end."""
        draw = self._draw
        while not self.is_over:
            prompt = [*range(1, 1 + draw.choice([0, 16, 40])), *(draw.randrange(300) for _ in range(3))]
            sampling = SamplingParams(temperature=float(draw.random() < 0.5), seed=draw.randrange(1 << 32))
            stop = StopConditions(max_tokens=draw.choice(LENGTHS), ignore_eos=True)
            n = draw.choice([1, 1, 2])
            tokens: list[list[int]] = [[] for _ in range(n)]
            async with client.stream(
                token_ids=prompt,
                temperature=sampling.temperature,
                seed=sampling.seed,
                n=n,
                max_tokens=stop.max_tokens,
                ignore_eos=True,
            ) as stream:
                async for delta in stream:
                    assert delta.index == len(tokens[delta.choice])
                    tokens[delta.choice] += delta.token_ids
            for choice in stream.answer.choices:
                expected = undisturbed(
                    prompt,
                    sampling,
                    choice.index,
                    stop,
                    model=prefix_hash_token,
                    tokenizer=self._tokenizer,
                    vocab_size=fake_model.VOCAB_SIZE,
                    eos=frozenset({fake_model.EOS}),
                )
                assert tokens[choice.index] == list(choice.token_ids) == list(expected.tokens)
                assert choice.text == expected.text
                assert choice.finish.usage.completion_tokens == len(expected.tokens)
            self.num_answers += 1


async def roll(fleets: list[Fleet], model: Path) -> Readers:
    """Replace every process of every fleet, twice, under eight streams. Raises what a reader met."""
    readers = Readers(model)
    async with AsyncClient([fleet.cluster.address for fleet in fleets]) as client, asyncio.TaskGroup() as tasks:
        for _ in range(STREAMS):
            tasks.create_task(readers.read(client))

        async def answers(num: int) -> None:
            """Life has gone on since."""
            wanted = readers.num_answers + num
            while readers.num_answers < wanted:
                await asyncio.sleep(0.01)

        await answers(2)
        for _ in range(2):
            for fleet in fleets:
                for number in range(fleet.num_executors):
                    await asyncio.to_thread(fleet.replace_executor, number)
                await asyncio.to_thread(fleet.replace_scheduler)
                await answers(2)
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
def test_a_hundred_streams_of_one_client_are_handed_over_at_once(started: list[Fleet]) -> None:
    """More than a client may try again in its patience after refusals, which these are not."""
    (fleet,) = started
    num_streams, num_tokens = 100, 150

    async def scenario() -> list[tuple[int, ...]]:
        begun = asyncio.Semaphore(0)

        async with AsyncClient(fleet.cluster.address, patience_s=20) as client:

            async def ask(seed: int) -> tuple[int, ...]:
                prompt = [seed, 2, 3]
                async with client.stream(token_ids=prompt, max_tokens=num_tokens, seed=seed, ignore_eos=True) as stream:
                    async for delta in stream:
                        if delta.index == 0:
                            begun.release()
                    return stream.answer.token_ids

            asking = [asyncio.create_task(ask(seed)) for seed in range(num_streams)]
            for _ in range(num_streams):
                await begun.acquire()
            await asyncio.to_thread(fleet.replace_scheduler)
            interrupted = await asyncio.gather(*asking)
            assert fleet.num_handed_over > 50
            undisturbed = await asyncio.gather(*map(ask, range(num_streams)))
            assert interrupted == undisturbed
            return interrupted

    assert {len(tokens) for tokens in asyncio.run(scenario())} == {num_tokens}
