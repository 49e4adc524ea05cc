"""Networks that go dark, break, delay and crawl, under real processes: streams pause, and show nothing else.

The link of one executor, or of the clients, goes through a proxy (tests/faults/proxy.py). In the last part the kernel
drops the packets, where it lets us.
"""

from __future__ import annotations

import asyncio
import ipaddress
import itertools
import os
import random
import shutil
import subprocess
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from grpc import aio

from common.sampling import SamplingParams, StopConditions
from executor.fake_runner import prefix_hash_token
from pagewire import AsyncClient
from protos import inference_pb2 as pb
from protos import monitoring_pb2, monitoring_pb2_grpc
from services.text import Tokenizer
from tests.e2e import fake_model
from tests.e2e.cluster import Cluster
from tests.faults.bystander import rss_mib
from tests.faults.checker import Expected, StreamChecker, undisturbed
from tests.faults.proxy import Proxy
from tests.faults.recorder import RawSource

STREAMS = 6
HASTE = ("--silence-s=1", "--suspect-s=0.5", "--lease-s=1.5")  # so that a test need not wait as long as a user would
HANG_S = 300


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fake_model.write(tmp_path_factory.mktemp("model") / "fake")


@pytest.fixture
def running(model: Path, tmp_path: Path) -> Iterator[Cluster]:
    """A hasty scheduler that both halves reach by TCP. No executor yet."""
    cluster = Cluster(model, tmp_path, flags=["--link-listen=127.0.0.1:0", "--log-format=json", *HASTE])
    try:
        yield cluster
    finally:
        cluster.close()


@pytest.fixture
def patient(model: Path, tmp_path: Path) -> Iterator[Cluster]:
    """The same with the usual patience, for what must kill nobody: a busy machine is slow, too."""
    cluster = Cluster(model, tmp_path, flags=["--link-listen=127.0.0.1:0"])
    try:
        yield cluster
    finally:
        cluster.close()


def run(scenario: Coroutine[Any, Any, None]) -> None:
    async def bounded() -> None:
        async with asyncio.timeout(HANG_S):
            await scenario

    asyncio.run(bounded())


# ---- who reads, and what is seen of the executors


class Reading:
    """One answer, checked token by token as it is read."""

    def __init__(self, model: Path, number: int, *, max_tokens: int, prompt: int = 3) -> None:
        draw = random.Random(number)
        ids = [draw.randrange(300) for _ in range(prompt)]
        sampling = SamplingParams(temperature=1.0, seed=number)
        self.request = pb.GenerateStreamRequest(
            token_ids=pb.TokenIds(ids=ids),
            sampling=pb.SamplingParams(temperature=1.0, seed=number),
            stopping=pb.StopConditions(max_tokens=max_tokens, ignore_eos=True),
        )
        self.expected = _expected(model, ids, sampling, max_tokens)
        self.checker = StreamChecker(f"stream {number}", [self.expected], num_prompt=prompt)

    async def read(self, source: RawSource) -> None:
        """To the end. Raises Violation, or what ended it."""
        async for message in source.stream(self.request):
            self.checker.hear(message)
        self.checker.end()


class Readings:
    """Answers that are read side by side, each of which is followed by another one until it is over."""

    def __init__(self, cluster: Cluster, *, max_tokens: int, prompt: int) -> None:
        self._source = RawSource(cluster.address)
        self._asked = (Reading(cluster.model, n, max_tokens=max_tokens, prompt=prompt) for n in itertools.count())
        self._done = 0  # tokens of answers that have been read
        self._open: set[Reading] = set()
        self.is_over = False

    @property
    def num_tokens(self) -> int:
        """That were heard by now."""
        return self._done + sum(reading.checker.num_tokens for reading in self._open)

    async def read(self) -> None:
        """The answer that is open when it is over is read to its end."""
        while not self.is_over:
            reading = next(self._asked)
            self._open.add(reading)
            await reading.read(self._source)
            self._open.remove(reading)
            self._done += reading.checker.num_tokens

    async def more(self, num: int) -> None:
        """Return once so many more tokens have been heard."""
        wanted = self.num_tokens + num
        await until(lambda: self.num_tokens >= wanted)

    async def close(self) -> None:
        await self._source.close()


def _expected(model: Path, ids: list[int], sampling: SamplingParams, max_tokens: int) -> Expected:
    return undisturbed(
        ids,
        sampling,
        0,
        StopConditions(max_tokens=max_tokens, ignore_eos=True),
        model=prefix_hash_token,
        tokenizer=Tokenizer(model / "tokenizer.json"),
        vocab_size=fake_model.VOCAB_SIZE,
        eos=frozenset({fake_model.EOS}),
    )


@asynccontextmanager
async def readings(
    cluster: Cluster, *, max_tokens: int = 80, prompt: int = 3, streams: int = STREAMS
) -> AsyncIterator[Readings]:
    """So many streams that are being read, whatever happens meanwhile. At the end all are read, and right."""
    all_of_them = Readings(cluster, max_tokens=max_tokens, prompt=prompt)
    try:
        async with asyncio.TaskGroup() as group:
            for _ in range(streams):
                group.create_task(all_of_them.read())
            await all_of_them.more(4 * streams)
            yield all_of_them
            all_of_them.is_over = True
    finally:
        await all_of_them.close()


async def until(holds: Callable[[], bool]) -> None:
    """Return when it does. The test's own limit is the only clock."""
    while not holds():
        await asyncio.sleep(0.01)


async def executors(cluster: Cluster) -> dict[str, int]:
    """The sessions of those that are joined, by name."""
    status = await _status(cluster)
    return {executor.name: executor.session for executor in status.executors}


async def _status(cluster: Cluster) -> monitoring_pb2.GetStatusResponse:
    async with aio.insecure_channel(cluster.admin) as channel:
        stub: monitoring_pb2_grpc.MonitoringServiceAsyncStub = monitoring_pb2_grpc.MonitoringServiceStub(channel)
        return await stub.GetStatus(monitoring_pb2.GetStatusRequest())


async def start(cluster: Cluster, *flags: str, step_s: float = 0.01) -> None:
    """One more executor, joined."""
    await asyncio.to_thread(cluster.start_executor, "--fake-tokens=hash", f"--fake-step-s={step_s}", *flags)


@asynccontextmanager
async def behind_a_proxy(cluster: Cluster, *, step_s: float = 0.01) -> AsyncIterator[Proxy]:
    """An executor whose link goes through it."""
    async with Proxy(cluster.link) as proxy:
        await start(cluster, f"--scheduler={proxy.address}", step_s=step_s)
        yield proxy


async def joined(cluster: Cluster, name: str, *, after: int = 0) -> int:
    """The session of the executor, once it is there with one that is later than `after`."""
    while (session := (await executors(cluster)).get(name, 0)) <= after:
        await asyncio.sleep(0.02)
    return session


# ---- the link of an executor


async def survive_every_darkness(running: Cluster, darken: Callable[..., None], light: Callable[[], None]) -> None:
    """The link of executor-0 goes dark both ways, then up alone, then down alone; each time it comes back."""
    for up, down in ((True, True), (True, False), (False, True)):
        async with readings(running):
            before = await joined(running, "executor-0")
            darken(up=up, down=down)
            while "executor-0" in await executors(running):
                await asyncio.sleep(0.02)
        light()
        await joined(running, "executor-0", after=before)


def test_streams_go_on_elsewhere_when_a_link_goes_dark_both_ways_or_one_way(running: Cluster) -> None:
    async def scenario() -> None:
        async with behind_a_proxy(running) as proxy:
            await start(running)
            await survive_every_darkness(running, proxy.blackhole, proxy.heal)

    run(scenario())
    assert running.counters()["moved"] >= 3


def test_streams_go_on_after_the_network_has_healed_when_there_is_no_other_executor(running: Cluster) -> None:
    async def scenario() -> None:
        async with behind_a_proxy(running) as proxy, readings(running):
            proxy.blackhole()
            while await executors(running):
                await asyncio.sleep(0.02)
            proxy.heal()

    run(scenario())
    assert running.counters()["moved"] > 0


def test_an_executor_whose_connection_is_reset_dials_again_and_is_not_suspected(patient: Cluster) -> None:
    async def scenario() -> None:
        async with behind_a_proxy(patient) as proxy, readings(patient) as streams:
            for _ in range(3):
                before = await joined(patient, "executor-0")
                proxy.reset()
                await joined(patient, "executor-0", after=before)
                await streams.more(STREAMS)
        assert patient.executors[0].popen.poll() is None
        assert (await _status(patient)).scheduler.executor_losses.num_suspects == 0

    run(scenario())


def test_a_network_that_is_slow_and_uneven_kills_nobody(patient: Cluster) -> None:
    async def scenario() -> None:
        async with behind_a_proxy(patient) as proxy:
            async with readings(patient, max_tokens=16) as streams:
                before = await executors(patient)
                proxy.delay(0.05, 0.4)
                await streams.more(16 * STREAMS)
            assert await executors(patient) == before

    run(scenario())


def test_a_link_with_little_room_loses_nothing_and_fills_no_memory(patient: Cluster) -> None:
    """Plans with long prompts, over 40 KB/s each way."""

    async def scenario() -> None:
        pids = [patient.scheduler.popen.pid]
        async with behind_a_proxy(patient) as proxy:
            pids.append(patient.executors[0].popen.pid)
            proxy.throttle(40_000)
            async with readings(patient, max_tokens=12, prompt=400, streams=24):
                before = await executors(patient)
                before_mib = [rss_mib(pid) for pid in pids]
            assert await executors(patient) == before
            assert all(rss_mib(pid) - mib < 32 for pid, mib in zip(pids, before_mib, strict=True))

    run(scenario())


# ---- the link of a client


@pytest.fixture(scope="module")
def serving(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """A scheduler with an executor. Only its clients have a bad network."""
    cluster = Cluster(model, tmp_path_factory.mktemp("serving"))
    try:
        cluster.start_executor("--fake-tokens=hash", "--fake-step-s=0.01")
        yield cluster
    finally:
        cluster.close()


IN_ITS_MIDST = 1200  # bytes that come down with its first ten tokens or so


async def ask(address: str, reading: Reading) -> list[int]:
    """The tokens of an answer, as the Python client gives them."""
    tokens: list[int] = []
    async with AsyncClient(address) as client, client.send(reading.request) as stream:
        async for delta in stream:
            assert delta.index == len(tokens)
            tokens += delta.token_ids
    return tokens


def test_a_client_whose_connection_is_reset_goes_on_where_it_was(serving: Cluster) -> None:
    async def scenario() -> None:
        reading = Reading(serving.model, 1, max_tokens=60)
        async with Proxy(serving.address) as proxy:
            proxy.after(IN_ITS_MIDST, proxy.reset)
            assert await ask(proxy.address, reading) == list(reading.expected.tokens)
            assert proxy.num_accepted >= 2

    run(scenario())


@pytest.mark.parametrize(("up", "down"), [(True, True), (False, True)], ids=["both ways", "to the client"])
def test_a_client_whose_connection_goes_dark_goes_on_by_another_way(serving: Cluster, up: bool, down: bool) -> None:
    async def scenario() -> None:
        reading = Reading(serving.model, 2, max_tokens=120)
        async with Proxy(serving.address) as dark, Proxy(serving.address) as other:
            dark.after(IN_ITS_MIDST, lambda: dark.blackhole(up=up, down=down))
            assert await ask(f"{dark.address},{other.address}", reading) == list(reading.expected.tokens)
            assert other.num_accepted >= 1

    run(scenario())


def test_a_client_far_away_hears_the_same(serving: Cluster) -> None:
    async def scenario() -> None:
        reading = Reading(serving.model, 3, max_tokens=40)
        async with Proxy(serving.address) as proxy:
            proxy.delay(0.1, 0.2)
            proxy.after(IN_ITS_MIDST, lambda: proxy.throttle(20_000))
            assert await ask(proxy.address, reading) == list(reading.expected.tokens)
            assert proxy.num_accepted == 1

    run(scenario())


# ---- the same, done by the kernel


class Cable:
    """Between this machine and a network namespace. A packet to a hardware address that nobody has is a lost packet."""

    NOBODY = "02:00:00:00:00:01"

    def __init__(self) -> None:
        number = os.getpid()
        net = f"10.199.{number // 64 % 256}.{number % 64 * 4}"  # four addresses, and no other test's that runs now
        self.here, self.there = (str(ipaddress.IPv4Address(net) + at) for at in (1, 2))
        self.space, self._here, self._there = f"pw{number}", f"pwh{number}", f"pwt{number}"

    @property
    def inside(self) -> list[str]:
        """What runs a command in the namespace."""
        return ["ip", "netns", "exec", self.space]

    def lay(self) -> None:
        """Raises CalledProcessError where the kernel does not let us."""
        _ip("netns", "add", self.space)
        _ip("link", "add", self._here, "type", "veth", "peer", "name", self._there, "netns", self.space)
        for at, address, device in (([], self.here, self._here), (["-n", self.space], self.there, self._there)):
            _ip(*at, "addr", "add", f"{address}/30", "dev", device)
            _ip(*at, "link", "set", device, "up")

    def darken(self, *, up: bool = True, down: bool = True) -> None:
        """Packets are lost: up, those from the namespace; down, those to it."""
        wrong = ("lladdr", self.NOBODY, "nud", "permanent")
        if up:
            _ip("-n", self.space, "neigh", "replace", self.here, *wrong, "dev", self._there)
        if down:
            _ip("neigh", "replace", self.there, *wrong, "dev", self._here)

    def light(self) -> None:
        """They arrive again."""
        for at, address, device in (([], self.there, self._here), (["-n", self.space], self.here, self._there)):
            subprocess.run(["ip", *at, "neigh", "del", address, "dev", device], check=False, capture_output=True)

    def cut(self) -> None:
        """Take it away."""
        for words in (("netns", "del", self.space), ("link", "del", self._here)):
            subprocess.run(["ip", *words], check=False, capture_output=True)


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True)


@pytest.fixture
def cable() -> Iterator[Cable]:
    """Skips, and says why, where there can be none."""
    if os.geteuid() != 0 or shutil.which("ip") is None:
        pytest.skip("network namespaces need root and iproute2's ip; the proxy's tests have shown the same")
    made = Cable()
    try:
        try:
            made.lay()
        except subprocess.CalledProcessError as error:
            pytest.skip(f"this kernel makes no network namespace: {error.stderr.decode().strip()}")
        yield made
    finally:
        made.cut()


def test_streams_go_on_elsewhere_when_the_kernel_loses_every_packet(model: Path, tmp_path: Path, cable: Cable) -> None:
    flags = [f"--link-listen={cable.here}:0", "--insecure", "--log-format=json", *HASTE]
    running = Cluster(model, tmp_path, flags=flags)

    async def scenario() -> None:
        fake = ("--fake-tokens=hash", "--fake-step-s=0.01")
        await asyncio.to_thread(running.start_executor, *fake, prefix=cable.inside)
        await asyncio.to_thread(running.start_executor, *fake)
        await survive_every_darkness(running, cable.darken, cable.light)

    try:
        run(scenario())
        assert running.counters()["moved"] >= 3
    finally:
        running.close()
