"""A child process that is written to and read from, started by Python's own `subprocess`.

Not by the loop: of 44 children that uvloop started in a scheduler that had just answered requests, 14 died of a signal
before they ran a line; of 56 that `subprocess` started in its place, none. What differs is what runs between fork and
exec, beside the threads of gRPC.
"""

from __future__ import annotations

import asyncio
import subprocess
from collections.abc import Mapping, Sequence
from typing import Any, Self, cast


class PipedChild:
    """It runs until it ends by itself, or `end` is called."""

    def __init__(
        self,
        popen: subprocess.Popen[bytes],
        reader: asyncio.StreamReader,
        pipes: tuple[asyncio.ReadTransport, asyncio.WriteTransport],
    ) -> None:
        self._popen = popen
        self._reader = reader
        self._pipes = pipes

    @classmethod
    async def start(cls, command: Sequence[str], environment: Mapping[str, str]) -> Self:
        """Start it in a session of its own, so that Ctrl-C is not for it. Its errors go nowhere. Raises OSError."""
        loop = asyncio.get_running_loop()
        popen = subprocess.Popen(  # noqa: ASYNC220  a few milliseconds, until it has been started
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=environment,
            start_new_session=True,
        )
        reader = asyncio.StreamReader()
        told, _ = await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), cast("Any", popen.stdout))
        asked, _ = await loop.connect_write_pipe(asyncio.BaseProtocol, cast("Any", popen.stdin))
        return cls(popen, reader, (told, asked))

    @property
    def pid(self) -> int:
        """Its process id."""
        return self._popen.pid

    @property
    def returncode(self) -> int | None:
        """How it ended: below zero by that signal; None while it runs."""
        return self._popen.poll()

    def write(self, data: bytes) -> None:
        """Ask it something."""
        self._pipes[1].write(data)

    async def read(self, count: int) -> bytes:
        """So many bytes of what it tells. Raises IncompleteReadError where it ends before."""
        return await self._reader.readexactly(count)

    async def wait(self) -> int:
        """How it ends."""
        return await asyncio.to_thread(self._popen.wait)

    async def end(self) -> None:
        """Kill it, unless it has ended, and wait until it is gone."""
        self._popen.kill()
        await self.wait()
        for pipe in self._pipes:
            pipe.close()
