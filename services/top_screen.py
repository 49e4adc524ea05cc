"""What `pagewire top` shows: a picture of the scheduler (WatchState) as lines for a terminal. Pure."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from itertools import groupby
from typing import Final, NamedTuple

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from common.types import Priority
from protos import monitoring_pb2 as pb
from scheduler.block_map import BlockState

_HISTORY: Final = 240  # pictures that the curves are made of
_MAX_MAP_LINES: Final = 6
_MAX_QUEUE_LINES: Final = 6
_BAR: Final = 24  # characters
_SPARKS: Final = "▁▂▃▄▅▆▇█"
_ASCII_SPARKS: Final = "_.-~=+*#"
_QUIET: Final = "bright_black"
_ACCENT: Final = "cyan"


class _Look(NamedTuple):
    """How one kind of block looks. The characters differ, too, so that no colour is needed."""

    name: str
    character: str
    ascii: str
    style: str


_LOOKS: Final = {
    BlockState.FREE: _Look("free", "·", ".", _QUIET),
    BlockState.CACHED: _Look("cached", "░", "-", _ACCENT),
    BlockState.PINNED: _Look("pinned", "▒", "+", "bold"),
    BlockState.HELD: _Look("held", "▓", "o", _ACCENT),
    BlockState.SHARED: _Look("shared", "█", "#", f"bold {_ACCENT}"),
}


class Screen:
    """Remembers what curves need; all else is in the picture. `unicode`: the terminal shows more than ASCII."""

    def __init__(self, *, unicode: bool = True) -> None:
        self._unicode = unicode
        self._tokens_per_s: deque[float] = deque(maxlen=_HISTORY)
        self._first_token_ms: deque[float] = deque(maxlen=_HISTORY)

    def see(self, state: pb.WatchStateResponse) -> None:
        """The next picture."""
        self._tokens_per_s.append(state.output_tokens_per_s)
        self._first_token_ms.append(state.first_tokens.p50_ns / 1e6)

    def render(self, state: pb.WatchStateResponse, *, width: int, height: int) -> RenderableType:
        """All of it, cut to the terminal: the scheduler, each executor's blocks and rows, and who waits."""
        parts: list[RenderableType] = [self._head(state, width), *self._curves(width), self._legend()]
        waiting = self._waiting(state)
        left = height - 5 - (min(len(state.waiting), _MAX_QUEUE_LINES) + 3)
        executors = list(state.executors)
        for i, executor in enumerate(executors):
            share = max(3, left // (len(executors) - i))
            lines = self._executor(executor, width, share)
            parts += lines.parts
            left -= lines.num_lines
        return Group(*parts, Text(""), waiting)

    def line(self, state: pb.WatchStateResponse) -> str:
        """The picture in one line, for a terminal that can do no more, or a file."""
        s = state.scheduler
        blocks = sum(e.status.num_blocks for e in state.executors)
        free = sum(e.status.num_free_blocks for e in state.executors)
        in_flight = sum(e.status.steps_in_flight for e in state.executors)
        return (
            f"up {s.uptime_ns / 1e9:.0f} s: {state.output_tokens_per_s:.1f} tokens/s, "
            f"first token {_first_tokens(state.first_tokens)}, {s.num_running} running, {s.num_waiting} waiting, "
            f"{in_flight} steps in flight, {free} of {blocks} blocks free, {s.preemptions} preempted"
            f"{_guessed(state)}"
        )

    # ---- parts

    def _head(self, state: pb.WatchStateResponse, width: int) -> Text:
        s = state.scheduler
        in_flight = sum(e.status.steps_in_flight for e in state.executors)
        text = Text(no_wrap=True, overflow="ellipsis", end="\n")
        text.append("pagewire", "bold")
        text.append(f"  up {_seconds(s.uptime_ns)}  ", _QUIET)
        text.append(f"{s.num_running} running  {s.num_waiting} waiting  {in_flight} steps in flight  ")
        text.append(f"{s.preemptions} preempted  {s.moved_sequences} moved{_guessed(state)}")
        text.append("  q quits" if width >= 80 else "", _QUIET)
        return text

    def _curves(self, width: int) -> Iterable[Text]:
        room = max(8, width - 40)
        yield self._curve("tokens/s", self._tokens_per_s, f"{self._last(self._tokens_per_s):.1f}", room)
        first = self._last(self._first_token_ms)
        yield self._curve("first token", self._first_token_ms, f"{first:.0f} ms" if first else "none yet", room)

    def _curve(self, name: str, values: Sequence[float], now: str, room: int) -> Text:
        text = Text(no_wrap=True, overflow="crop")
        text.append(f"{name:<12}", _QUIET)
        text.append(f"{now:>12}  ", "bold")
        text.append(spark(list(values)[-room:], _SPARKS if self._unicode else _ASCII_SPARKS), _ACCENT)
        return text

    def _legend(self) -> Text:
        text = Text(no_wrap=True, overflow="crop")
        text.append(f"{'blocks':<12}", _QUIET)
        for look in _LOOKS.values():
            text.append(f"{self._character(look)} ", look.style)
            text.append(f"{look.name}  ", _QUIET)
        return text

    def _executor(self, executor: pb.ExecutorState, width: int, max_lines: int) -> _Lines:
        e = executor.status
        title = Text("\n", no_wrap=True, overflow="ellipsis")
        title.append(_word(e.name), "bold")
        title.append(f"  {_word(e.dtype)} on {_word(e.device)}, ", _QUIET)
        title.append(f"{e.num_blocks - e.num_free_blocks} of {e.num_blocks} blocks held, ")
        title.append(f"{executor.num_cached_blocks} cached, {e.steps_in_flight} of {executor.credit} steps in flight, ")
        title.append(f"idle {100 * e.idle_ratio:.1f}%")
        if executor.blocks_per_cell > 1:
            title.append(f"; every {executor.blocks_per_cell}th block is shown", _QUIET)
        map_lines = list(self._map(executor.cells, width, min(_MAX_MAP_LINES, max(1, max_lines - 4))))
        room = max(0, max_lines - 3 - len(map_lines))
        parts: list[RenderableType] = [title, *map_lines]
        num_lines = 2 + len(map_lines)
        if room and executor.rows:
            shown = executor.rows[:room]
            parts.append(self._rows(shown, e.num_running - len(shown)))
            num_lines += 1 + len(shown)
        return _Lines(parts, num_lines)

    def _map(self, cells: bytes, width: int, max_lines: int) -> Iterable[Text]:
        every = -(-len(cells) // (width * max_lines)) or 1
        cells = cells[::every]
        for start in range(0, len(cells), width):
            text = Text(no_wrap=True, overflow="crop")
            for cell, run in groupby(cells[start : start + width]):
                look = _LOOKS[BlockState(cell)]
                text.append(self._character(look) * len(list(run)), look.style)
            yield text

    def _rows(self, rows: Sequence[pb.RowState], num_more: int) -> Table:
        table = _table("request", "tenant", "prompt", "cached", "output", "of", "blocks", "age", "")
        longest = max(row.prompt_tokens + row.max_tokens for row in rows)
        for row in rows:
            table.add_row(
                f"{row.request}.{row.choice}",
                _word(row.tenant) or "-",
                f"{row.prompt_tokens}",
                f"{row.cached_prompt_tokens}",
                f"{row.output_tokens}",
                f"{row.max_tokens}",
                f"{row.num_blocks}",
                _seconds(row.age_ns),
                self._bar(row, longest),
            )
        table.caption = f"and {num_more} more" if num_more > 0 else None
        return table

    def _bar(self, row: pb.RowState, longest: int) -> Text:
        """Prompt and answer, in proportion to the longest that any row may become."""
        prompt = _BAR * row.prompt_tokens // longest
        output = _BAR * (row.prompt_tokens + row.output_tokens) // longest - prompt
        room = _BAR * (row.prompt_tokens + row.max_tokens) // longest - prompt - output
        held, done, free = (_LOOKS[kind] for kind in (BlockState.HELD, BlockState.SHARED, BlockState.FREE))
        text = Text()
        text.append(self._character(held) * prompt, held.style)
        text.append(self._character(done) * output, done.style)
        text.append(self._character(free) * room, free.style)
        return text

    def _waiting(self, state: pb.WatchStateResponse) -> RenderableType:
        if not state.waiting:
            return Text("nobody waits", _QUIET)
        table = _table("waiting", "priority", "sequences", "tokens", "since")
        for queue in state.waiting[:_MAX_QUEUE_LINES]:
            priority = "has begun" if queue.begun else Priority(queue.priority).name.lower()
            table.add_row(
                _word(queue.tenant) or "-",
                priority,
                f"{queue.num_sequences}",
                f"{queue.tokens}",
                _seconds(queue.age_ns),
            )
        num_more = state.num_queues - min(len(state.waiting), _MAX_QUEUE_LINES)
        table.caption = f"and {num_more} more" if num_more > 0 else None
        return table

    def _character(self, look: _Look) -> str:
        return look.character if self._unicode else look.ascii

    @staticmethod
    def _last(values: Sequence[float]) -> float:
        return values[-1] if values else 0.0


class _Lines(NamedTuple):
    parts: list[RenderableType]
    num_lines: int


def spark(values: Sequence[float], marks: str = _SPARKS) -> str:
    """A curve of one line: each value by its share of the greatest."""
    most = max(values, default=0.0)
    if not most:
        return marks[0] * len(values)
    return "".join(marks[min(len(marks) - 1, int(value / most * len(marks)))] for value in values)


def _table(*names: str) -> Table:
    table = Table(box=None, pad_edge=False, header_style=_QUIET, caption_style=_QUIET, caption_justify="left")
    numbers = {"prompt", "cached", "output", "of", "blocks", "age", "sequences", "tokens", "since"}
    for name in names:
        table.add_column(name, justify="right" if name in numbers else "left", no_wrap=True)
    return table


def _guessed(state: pb.WatchStateResponse) -> str:
    if not state.scheduler.drafted_tokens:
        return ""
    return f", {100 * state.accepted_ratio:.0f}% of guesses right"


def _first_tokens(times: pb.FirstTokenTimes) -> str:
    if not times.count:
        return "none yet"
    return f"{times.p50_ns / 1e6:.0f} ms (p95 {times.p95_ns / 1e6:.0f})"


def _seconds(ns: int) -> str:
    seconds = ns / 1e9
    if seconds < 100:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.0f} h"


def _word(text: str) -> str:
    """A name as a terminal may be given it: nothing in it moves a cursor."""
    return "".join(character for character in text if character.isprintable())
