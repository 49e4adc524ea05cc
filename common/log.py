"""Logging for every process: one line an event, human by default, JSON on request.

A line that is about a request has its id, and that of the trace which its caller named, in JSON. Prompts, answers and
keys never go in here. An exception is logged without its own text, which may hold a caller's
words, and of structured fields those that cannot hold any.
"""

from __future__ import annotations

import json
import logging
import sys
import time
import traceback
from collections.abc import Iterator, Mapping
from contextvars import ContextVar
from types import MappingProxyType, TracebackType
from typing import Final, Literal, cast

LogFormat = Literal["text", "json"]

WORDS: Final = frozenset({"call", "error", "error_id", "reason", "request_id", "tenant", "trace_id"})
"""Fields of a JSON line that may hold text: names of ours or of an operator, and ids.

Any other holds numbers, or is left out.
"""

_OUR_PACKAGES: Final = frozenset({"common", "executor", "pagewire", "scheduler", "services"})


_about: ContextVar[Mapping[str, str]] = ContextVar("about", default=MappingProxyType[str, str]({}))


def about(*, afresh: bool = False, **words: str) -> None:
    """What the rest of this task is about: its JSON lines say so. Only names of WORDS; an empty text is not told.

    `afresh`: and about nothing that was said of it before; a task can inherit the words of who started it.
    """
    assert words.keys() <= WORDS, f"{sorted(words.keys() - WORDS)} may not be in a log"
    before: Mapping[str, str] = {} if afresh else _about.get()
    _about.set({**before, **{name: text for name, text in words.items() if text}})


class TextFormatter(logging.Formatter):
    """A line for people."""

    def formatException(self, ei: object) -> str:  # noqa: N802  the name is logging's
        """Where it was raised, without what it says."""
        return _exception(ei)


class JsonFormatter(logging.Formatter):
    """One JSON object a line: time, level, logger, message, and what was given in `extra={"fields": {...}}`."""

    def formatException(self, ei: object) -> str:  # noqa: N802  the name is logging's
        """Where it was raised, without what it says."""
        return _exception(ei)

    def format(self, record: logging.LogRecord) -> str:
        """Return the line."""
        line: dict[str, object] = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + f".{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        line.update(_about.get())
        fields = getattr(record, "fields", None)
        if isinstance(fields, dict):
            line.update(harmless(cast("dict[str, object]", fields)))
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False, default=str)


def harmless(fields: Mapping[str, object]) -> dict[str, object]:
    """The fields that can hold no caller's words: numbers, numbers by name, and text under the names in WORDS."""
    return {
        name: value
        for name, value in fields.items()
        if _is_number(value)
        or (isinstance(value, str) and name in WORDS)
        or (isinstance(value, dict) and all(map(_is_number, cast("dict[object, object]", value).values())))
    }


def without_texts(error: BaseException) -> Iterator[str]:
    """The lines of a traceback without the exceptions' own texts, which may hold a caller's prompt.

    Our own assertions keep theirs: they carry numbers.
    """
    cause = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    if cause is not None:
        yield from without_texts(cause)
        yield "then:\n"
    yield from traceback.format_tb(error.__traceback__)
    text = f": {error}" if isinstance(error, AssertionError) and _is_ours(error.__traceback__) else ""
    yield f"{type(error).__module__}.{type(error).__qualname__}{text}\n"
    if isinstance(error, BaseExceptionGroup):
        for part in cast("BaseExceptionGroup[BaseException]", error).exceptions:
            yield "of which:\n"
            yield from without_texts(part)


def configure(process: str, *, level: str = "info", fmt: LogFormat = "text") -> None:
    """Send this process's log to standard error. `process` is the word that tells its lines from others'."""
    handler = logging.StreamHandler(sys.stderr)
    if fmt == "json":
        handler.setFormatter(JsonFormatter())
    else:
        line = f"%(asctime)s {process:<10} %(levelname).1s %(name)s: %(message)s"
        handler.setFormatter(TextFormatter(line, "%H:%M:%S"))
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level.upper())


def _exception(exc_info: object) -> str:
    error = cast("tuple[object, BaseException | None, object]", exc_info)[1]
    return "" if error is None else "".join(without_texts(error)).rstrip()


def _is_number(value: object) -> bool:
    return value is None or isinstance(value, (bool, int, float))


def _is_ours(tb: TracebackType | None) -> bool:
    """Whether the innermost frame is code of this project."""
    if tb is None:
        return False
    while tb.tb_next is not None:
        tb = tb.tb_next
    return str(tb.tb_frame.f_globals.get("__name__")).partition(".")[0] in _OUR_PACKAGES
