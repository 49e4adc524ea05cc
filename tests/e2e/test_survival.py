"""Streams outlive the processes that make them: a scheduler is killed, its clients see a pause."""

from __future__ import annotations

import asyncio
import signal
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from pagewire import Answer, AsyncClient, Client, FinishReason
from protos import inference_pb2 as pb
from tests.e2e.cluster import Cluster
from tests.e2e.sockets import port_that_stays

SLOW = ("--fake-step-s=0.02", "--fake-tokens=hash")
ASKED: dict[str, Any] = {"token_ids": [1, 2, 3], "max_tokens": 60, "ignore_eos": True, "seed": 11}


@pytest.fixture
def address() -> str:
    """A scheduler that is started again must be found where it was."""
    return f"127.0.0.1:{port_that_stays()}"


@pytest.fixture
def running(fake_folder: Path, tmp_path: Path, address: str, request: pytest.FixtureRequest) -> Iterator[Cluster]:
    flags: list[str] = getattr(request, "param", [])
    cluster = Cluster(fake_folder, tmp_path, flags=["--listen", address, "--log-format=json", *flags])
    try:
        cluster.start_executor(*SLOW)
        yield cluster
    finally:
        cluster.close()


def restarted(cluster: Cluster, number: signal.Signals = signal.SIGKILL, *flags: str) -> Cluster:
    """The scheduler ends, and another begins in its place; the executors find it by themselves."""
    cluster.scheduler.signal(number)
    cluster.scheduler.wait()
    return Cluster(cluster.model, cluster.folder, flags=["--listen", cluster.address, *flags])


def undisturbed(address: str, **changes: Any) -> Answer:
    with Client(address) as client:
        return client.generate(**{**ASKED, **changes})


def test_a_stream_goes_on_where_it_was_when_the_scheduler_is_killed_and_comes_back(running: Cluster) -> None:
    with Client(running.address) as client, client.stream(**ASKED) as stream:
        told = [next(stream)]
        while told[-1].index < 20:
            told.append(next(stream))
        again = restarted(running)
        try:
            told += stream
            assert stream.finish is not None and stream.finish.reason is FinishReason.LENGTH
            assert stream.finish.exact
            assert stream.finish.usage.completion_tokens == 60
            answer = stream.answer
            whole = undisturbed(running.address)
        finally:
            again.close()

    assert [d.index for d in told] == [sum(len(d.token_ids) for d in told[:n]) for n in range(len(told))]
    assert tuple(t for d in told for t in d.token_ids) == answer.token_ids == whole.token_ids
    assert "".join(d.text for d in told) == answer.text == whole.text


def test_many_streams_with_choices_and_stop_strings_survive_several_schedulers(running: Cluster) -> None:
    with ThreadPoolExecutor() as pool:
        whole = list(pool.map(lambda seed: undisturbed(running.address, n=2, seed=seed), range(4)))
        stops = [answer.choices[1].text[30:32] for answer in whole]
        stopped = pool.map(lambda seed: undisturbed(running.address, n=2, seed=seed, stop=stops[seed]), range(4))
        whole += stopped
    found: dict[int, Answer] = {}

    def ask(number: int) -> None:
        changes: dict[str, Any] = {"n": 2, "seed": number % 4, "stop": stops[number - 4] if number >= 4 else None}
        found[number] = client.generate(**{**ASKED, **changes})

    latest = running
    with Client(running.address) as client:
        asking = [threading.Thread(target=ask, args=(number,)) for number in range(8)]
        for thread in asking:
            thread.start()
        try:
            for _ in range(2):
                asking[0].join(0.3)
                latest = restarted(latest)
            for thread in asking:
                thread.join()
        finally:
            latest.close()

    for number, answer in enumerate(whole):
        assert found[number].choices[0].text == answer.choices[0].text
        assert [c.token_ids for c in found[number].choices] == [c.token_ids for c in answer.choices]
        assert [c.finish.matched_stop for c in found[number].choices] == [c.finish.matched_stop for c in answer.choices]


def test_another_scheduler_goes_on_with_the_streams_of_one_that_is_gone(
    running: Cluster, fake_folder: Path, tmp_path: Path
) -> None:
    (tmp_path / "other").mkdir()
    keys = f"--ticket-keys={tmp_path / 'ticket-keys'}"
    other = Cluster(fake_folder, tmp_path / "other", flags=[keys])
    try:
        other.start_executor(*SLOW)
        whole = undisturbed(other.address)

        async def ask() -> Answer:
            async with AsyncClient(f"{running.address},{other.address}") as client, client.stream(**ASKED) as stream:
                async for delta in stream:
                    if delta.index >= 20 and running.scheduler.popen.poll() is None:
                        running.scheduler.signal(signal.SIGKILL)
                        await asyncio.to_thread(running.scheduler.wait)
                return stream.answer

        assert asyncio.run(ask()).token_ids == whole.token_ids
    finally:
        other.close()


@pytest.mark.parametrize("running", [["--drain-s=0"]], indirect=True)
def test_a_scheduler_that_may_wait_no_longer_sends_its_streams_to_the_next(running: Cluster) -> None:
    with Client(running.address) as client, client.stream(**ASKED) as stream:
        tokens = list(next(stream).token_ids)
        again = restarted(running, signal.SIGTERM)
        try:
            for delta in stream:
                tokens += delta.token_ids
            assert running.scheduler.popen.returncode == 0
            assert tuple(tokens) == undisturbed(running.address).token_ids
        finally:
            again.close()


def test_a_stream_that_is_left_stops_on_the_server(running: Cluster) -> None:
    with (
        Client(running.address) as client,
        client.stream(token_ids=[1, 2, 3], max_tokens=500, ignore_eos=True) as stream,
    ):
        next(stream)
    assert running.counters()["finished"] == {str(pb.FINISH_REASON_ABORTED): 1}
