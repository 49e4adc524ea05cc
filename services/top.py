"""`pagewire top`: what a scheduler does now, in the terminal, until somebody presses q."""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
import termios
import tty
from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import aclosing, contextmanager
from typing import Final, TextIO

from rich.console import Console
from rich.live import Live

from protos import monitoring_pb2 as pb
from services import client
from services.top_screen import Screen

_QUIT: Final = (b"q", b"Q", b"\x04", b"\x1b")  # Ctrl-D, escape; an arrow sends more than that


async def top(admin: str, *, interval_ms: int, most: int = 0) -> None:
    """Show a picture in each interval, `most` of them unless that is 0. Raises PagewireErrors."""
    console = Console()
    screen = Screen(unicode=console.encoding.lower().startswith("utf"))
    quits = asyncio.Event()
    async with aclosing(client.watch(admin, interval_ms)) as states:
        first = await anext(states)  # where there is none, one line says why
        with _keys(sys.stdin, quits.set), _shown(console, screen) as show:
            screen.see(first)
            show(first)
            number = 1
            while number != most and (state := await _next(states, quits)) is not None:
                screen.see(state)
                show(state)
                number += 1


@contextmanager
def _shown(console: Console, screen: Screen) -> Iterator[Callable[[pb.WatchStateResponse], None]]:
    """How a picture is shown: over the last one, or as a line below it where the terminal can do no more."""
    if not console.is_terminal or console.is_dumb_terminal:
        yield lambda state: console.print(screen.line(state), markup=False, highlight=False, soft_wrap=True)
        return
    with Live(console=console, screen=True, auto_refresh=False, vertical_overflow="crop") as live:
        yield lambda state: live.update(screen.render(state, width=console.width, height=console.height), refresh=True)


async def _next(
    states: AsyncGenerator[pb.WatchStateResponse, None], quits: asyncio.Event
) -> pb.WatchStateResponse | None:
    """The next picture; None when somebody quits, or there are no more."""
    coming = asyncio.ensure_future(anext(states, None))
    quitting = asyncio.ensure_future(quits.wait())
    try:
        await asyncio.wait({coming, quitting}, return_when=asyncio.FIRST_COMPLETED)
        return coming.result() if coming.done() else None
    finally:
        for task in (coming, quitting):
            task.cancel()
        await asyncio.gather(coming, quitting, return_exceptions=True)


@contextmanager
def _keys(keyboard: TextIO, quit: Callable[[], None]) -> Iterator[None]:
    """Call `quit` when the key for it is pressed; the terminal is left as it was found. Nothing where there is none."""
    if not keyboard.isatty():
        yield
        return
    fd = keyboard.fileno()
    before = termios.tcgetattr(fd)
    loop = asyncio.get_running_loop()

    def pressed() -> None:
        read = b""
        with contextlib.suppress(OSError):
            read = os.read(fd, 64)
        if not read or read in _QUIT:
            quit()

    tty.setcbreak(fd)
    loop.add_reader(fd, pressed)
    try:
        yield
    finally:
        loop.remove_reader(fd)
        termios.tcsetattr(fd, termios.TCSADRAIN, before)
