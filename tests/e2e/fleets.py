"""A scheduler whose every process can be replaced, and readers who compare each answer with what is true."""

from __future__ import annotations

import asyncio
import random
import re
import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from common.sampling import SamplingParams, StopConditions
from executor.fake_runner import prefix_hash_token
from pagewire import AsyncClient
from protos import inference_pb2 as pb
from services.text import Tokenizer
from tests.e2e import fake_model
from tests.e2e.cluster import START_TIMEOUT_S, Cluster, Process
from tests.e2e.health_watch import NOT_SERVING, SERVING, HealthWatch
from tests.e2e.sockets import port_that_stays
from tests.faults.checker import undisturbed

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
    def start(
        cls, model: Path, folder: Path, *, ticket_keys: Path, num_executors: int, more: Sequence[str] = ()
    ) -> Fleet:
        """All of it, joined; `more` flags are the scheduler's."""
        folder.mkdir(exist_ok=True)
        # the next scheduler must be found where the last one was
        flags = [
            f"--listen=127.0.0.1:{port_that_stays()}",
            f"--drain-s={GRACE_S}",
            f"--ticket-keys={ticket_keys}",
            *more,
        ]
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
        with HealthWatch(self.cluster.health) as health:
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
        with HealthWatch(old.health) as health:
            old.scheduler.signal(signal.SIGTERM)
            assert old.scheduler.wait() == 0
            assert health.to_the_end() == [SERVING, NOT_SERVING]
        self.start_scheduler()

    def kill_scheduler(self) -> None:
        """It is gone at once, and says nothing."""
        self.cluster.scheduler.signal(signal.SIGKILL)
        self.cluster.scheduler.wait()

    def start_scheduler(self) -> None:
        """Another one comes where one was."""
        old = self.cluster
        self.cluster = Cluster(old.model, old.folder, flags=self.flags)
        old.channel.close()
        with HealthWatch(self.cluster.health) as health:
            health.wait_for(SERVING)  # an executor has found it
        until_s = time.monotonic() + START_TIMEOUT_S
        while self.num_executors > 1 and self._num_joined() < self.num_executors:
            assert time.monotonic() < until_s, "an executor does not come back"
            time.sleep(0.01)

    def _num_joined(self) -> int:
        return self.cluster.stub.GetModel(pb.GetModelRequest(), timeout=60).num_executors

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

    async def answers(self, num: int) -> None:
        """Return when so many more have been heard: life has gone on since."""
        wanted = self.num_answers + num
        while self.num_answers < wanted:
            await asyncio.sleep(0.01)
