"""Answers of streams whose executor is killed once each of them has begun."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pagewire import Answer, Client
from services.failpoints import VARIABLE
from tests.e2e.cluster import Cluster, until_logged

_SLOW = "before_forward=sleep:0.2@1+"


def start_pair(running: Cluster, *flags: str) -> None:
    """Two executors that compute. `through_a_kill` can have them slow, so that nothing ends before it strikes."""
    for _ in range(2):
        orders = f"@{_orders(running, len(running.executors))}"
        running.start_executor("--dtype=float32", "--threads=1", *flags, fake=False, environment={VARIABLE: orders})


def answers_through_a_kill(
    model: Path, folder: Path, requests: Sequence[Mapping[str, Any]]
) -> tuple[list[Answer], int]:
    """Ask two executors for all `requests` at once and kill the first; return the answers, and how many moved."""
    running = Cluster(model, folder, flags=["--log-format=json"])
    try:
        start_pair(running)
        return through_a_kill(running, requests), running.counters()["moved"]
    finally:
        running.close()


def through_a_kill(running: Cluster, requests: Sequence[Mapping[str, Any]]) -> list[Answer]:
    """Ask the pair for all of them at once, and kill the first executor when every stream has begun."""
    for number, executor in enumerate(running.executors):
        _order(running, number, _SLOW)
        until_logged(executor.log, _SLOW, executor)
    with Client(running.address) as client, contextlib.ExitStack() as stack:
        streams = [stack.enter_context(client.stream(**request)) for request in requests]
        for stream in streams:
            next(stream)
        running.executors[0].signal(signal.SIGKILL)
        _order(running, 1, "")
        for stream in streams:
            for _ in stream:
                pass
        return [stream.answer for stream in streams]


def _order(running: Cluster, number: int, rule: str) -> None:
    _orders(running, number).write_text(rule)
    running.executors[number].signal(signal.SIGUSR1)


def _orders(running: Cluster, number: int) -> Path:
    return running.folder / f"executor-{number}.orders"
