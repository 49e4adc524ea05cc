"""Answers of streams whose executor is killed once each of them has begun."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pagewire import Answer, Client
from tests.e2e.cluster import Cluster


def answers_through_a_kill(
    model: Path, folder: Path, requests: Sequence[Mapping[str, Any]]
) -> tuple[list[Answer], int]:
    """Ask two executors for all `requests` at once and kill the first; return the answers, and how many moved."""
    running = Cluster(model, folder, flags=["--log-format=json"])
    try:
        for _ in range(2):
            running.start_executor("--dtype=float32", "--threads=1", fake=False)
        return through_a_kill(running, requests), running.counters()["moved"]
    finally:
        running.close()


def through_a_kill(running: Cluster, requests: Sequence[Mapping[str, Any]]) -> list[Answer]:
    """Ask for all of them at once, and kill the first executor when every stream has begun."""
    with Client(running.address) as client, contextlib.ExitStack() as stack:
        streams = [stack.enter_context(client.stream(**request)) for request in requests]
        for stream in streams:
            next(stream)
        running.executors[0].signal(signal.SIGKILL)
        for stream in streams:
            for _ in stream:
                pass
        return [stream.answer for stream in streams]
