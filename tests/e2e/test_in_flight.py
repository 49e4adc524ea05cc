"""Executors with three steps in flight: nothing is lost, repeated or mixed up, also when one of them is killed."""

from __future__ import annotations

import signal
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from executor.fake_runner import Prefix, digests_of, prefix_hash_token
from pagewire import Answer, Client
from tests.e2e import fake_model
from tests.e2e.cluster import Cluster

NUM_STREAMS = 8
MAX_TOKENS = 120


def stop_token_ids(number: int) -> list[int]:
    """One token in eighty ends every second stream."""
    return list(range(number, fake_model.VOCAB_SIZE, 80)) if number % 2 else []


def by_hand(number: int) -> list[int]:
    """What the fake model says to the prompt of a stream."""
    tokens, (*_, digest) = list[int](), digests_of([number, 2, 3])
    while len(tokens) < MAX_TOKENS and not (tokens and tokens[-1] in stop_token_ids(number)):
        prefix = Prefix(num_tokens=3 + len(tokens), digest=digest, greedy=True, seed=0, choice=0)
        tokens.append(prefix_hash_token(prefix) % fake_model.VOCAB_SIZE)
        (digest,) = digests_of(tokens[-1:], digest)
    return tokens


def test_streams_are_exact_when_an_executor_is_killed_with_steps_in_flight(fake_folder: Path, tmp_path: Path) -> None:
    cluster = Cluster(fake_folder, tmp_path, flags=["--log-format=json"], module="tests.e2e.late")
    is_underway = threading.Event()

    def ask(number: int) -> Answer:
        with (
            Client(cluster.address) as client,
            client.stream(
                token_ids=[number, 2, 3],
                max_tokens=MAX_TOKENS,
                temperature=0,
                ignore_eos=True,
                stop_token_ids=stop_token_ids(number),
            ) as stream,
        ):
            for delta in stream:
                if number == 0 and delta.index >= 20:
                    is_underway.set()
            return stream.answer

    try:
        for step_s in (0.1, 0.02):  # what the first one has does not end before it is killed
            cluster.start_executor("--fake-tokens=hash", f"--fake-step-s={step_s}")
        with ThreadPoolExecutor(NUM_STREAMS) as pool:
            asking = [pool.submit(ask, number) for number in range(NUM_STREAMS)]
            assert is_underway.wait(120)
            cluster.executors[0].signal(signal.SIGKILL)
            answers = [future.result(120) for future in asking]
        moved = cluster.counters()["moved"]
    finally:
        cluster.close()

    assert [list(answer.token_ids) for answer in answers] == [by_hand(number) for number in range(NUM_STREAMS)]
    assert moved > 0
