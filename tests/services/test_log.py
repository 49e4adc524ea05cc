"""What a log line can never say."""

from __future__ import annotations

import asyncio
import io
import json
import logging
import sys
import threading
from collections.abc import Iterator

import pytest

from common import log
from common.log import LogFormat
from common.types import FinishReason
from services.lifecycle import tell_no_texts

CANARY = "the caller's secret prompt"


@pytest.fixture(autouse=True)
def restored() -> Iterator[None]:
    """Logging and hooks as they were."""
    root, hook = logging.getLogger(), threading.excepthook
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:], threading.excepthook = handlers, hook
    root.setLevel(level)


def configured(fmt: LogFormat, monkeypatch: pytest.MonkeyPatch) -> io.StringIO:
    """A log at its loudest, and what it has said."""
    said = io.StringIO()
    monkeypatch.setattr(sys, "stderr", said)
    log.configure("test", level="debug", fmt=fmt)
    return said


def fail() -> None:
    try:
        raise KeyError(CANARY)
    except KeyError as error:
        raise RuntimeError(CANARY) from error


@pytest.mark.parametrize("fmt", ["text", "json"])
def test_an_exception_is_logged_with_its_place_and_without_its_text(
    fmt: LogFormat, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = configured(fmt, monkeypatch)
    try:
        fail()
    except RuntimeError:
        logging.getLogger("anybody").exception("it failed")

    assert CANARY not in said.getvalue()
    for word in ("it failed", "in fail", "builtins.KeyError", "builtins.RuntimeError"):
        assert word in said.getvalue()


def test_a_field_holds_numbers_or_has_a_name_that_may_hold_words(monkeypatch: pytest.MonkeyPatch) -> None:
    said = configured("json", monkeypatch)
    fields = {
        "steps": 3,
        "ratio": 0.5,
        "finished": {FinishReason.LENGTH: 2},
        "call": "Generate",
        "prompt": CANARY,
        "tokens": [1, 2, 3],
        "by_name": {"a": CANARY},
    }
    logging.getLogger("x").info("done", extra={"fields": fields})

    line = json.loads(said.getvalue())
    assert line.keys() - {"time", "level", "logger", "message"} == {"steps", "ratio", "finished", "call"}


def test_a_thread_that_ends_by_an_exception_is_logged_without_its_text(monkeypatch: pytest.MonkeyPatch) -> None:
    said = configured("text", monkeypatch)

    async def start_a_thread() -> None:
        tell_no_texts(asyncio.get_running_loop())
        thread = threading.Thread(target=fail, name="compute")
        thread.start()
        thread.join()

    asyncio.run(start_a_thread())

    assert "compute ended by an exception" in said.getvalue() and "in fail" in said.getvalue()
    assert CANARY not in said.getvalue()


def test_a_task_that_nobody_waits_for_is_logged_without_its_text(monkeypatch: pytest.MonkeyPatch) -> None:
    said = configured("text", monkeypatch)

    async def forget_a_task() -> None:
        tell_no_texts(asyncio.get_running_loop())
        task = asyncio.ensure_future(asyncio.to_thread(fail))
        await asyncio.wait({task})
        del task

    asyncio.run(forget_a_task())

    assert "never retrieved" in said.getvalue() and "in fail" in said.getvalue()
    assert CANARY not in said.getvalue()
