"""Child processes: start one, wait for its word that it is ready, start it again when it dies, end it in order."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from common.errors import PagewireError

log = logging.getLogger(__name__)

ROOT = Path(__file__).resolve().parents[1]


class ChildFailed(PagewireError):
    """A child ended before it was ready."""

    def __init__(self, name: str, code: int) -> None:
        super().__init__(f"{name} ended with exit code {code} before it was ready; its log is above")
        self.code = code


class Child:
    """One of our own commands in a process of its own: `python -m services COMMAND …`."""

    def __init__(self, name: str, arguments: Sequence[str], *, quiet: bool = False) -> None:
        self.name = name
        self.arguments = list(arguments)
        self._quiet = quiet
        self._process: asyncio.subprocess.Process | None = None

    @property
    def pid(self) -> int:
        """Of the process that runs now."""
        assert self._process is not None, f"{self.name} was not started"
        return self._process.pid

    async def start(self) -> str:
        """Start it and return the line it announces itself with. Raises ChildFailed when it ends first."""
        read_fd, write_fd = os.pipe()
        path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        self._process = await asyncio.create_subprocess_exec(
            sys.executable,
            *("-m", "services", *self.arguments, "--ready-fd", str(write_fd)),
            *("--die-with-parent", str(os.getpid())),
            pass_fds=(write_fd,),
            env={**os.environ, "PYTHONPATH": path},
            stdin=asyncio.subprocess.DEVNULL,
            stderr=asyncio.subprocess.DEVNULL if self._quiet else None,
            start_new_session=True,  # Ctrl-C goes to the parent alone, which ends its children in order
        )
        os.close(write_fd)
        reader = asyncio.StreamReader()
        loop = asyncio.get_running_loop()
        transport, _ = await loop.connect_read_pipe(
            lambda: asyncio.StreamReaderProtocol(reader), os.fdopen(read_fd, "rb", buffering=0)
        )
        try:
            line = (await reader.readline()).decode().strip()
        finally:
            transport.close()
        if not line:
            raise ChildFailed(self.name, await self._process.wait())
        return line

    async def wait(self) -> int:
        """The exit code, once it has ended."""
        assert self._process is not None, f"{self.name} was not started"
        return await self._process.wait()

    async def stop(self, grace_s: float) -> None:
        """SIGTERM, and SIGKILL after the grace."""
        process = self._process
        if process is None or process.returncode is not None:
            return
        process.send_signal(signal.SIGTERM)
        try:
            async with asyncio.timeout(grace_s):
                await process.wait()
        except TimeoutError:
            log.warning("%s did not stop within %g s: killed", self.name, grace_s)
            process.kill()
            await process.wait()


async def keep_alive(child: Child, *, max_backoff_s: float = 10.0) -> None:
    """Start the child again whenever it ends, until cancelled. It runs already when this is called.

    A child that ends for a reason that only an operator can mend (exit code 78) is not started again.
    """
    loop = asyncio.get_running_loop()
    failures, began = 0, loop.time()
    while (code := await child.wait()) != os.EX_CONFIG:
        log.warning("%s ended with %d; starting it again", child.name, code)
        failures = failures + 1 if loop.time() - began < max_backoff_s else 0
        await asyncio.sleep(min(max_backoff_s, 0.1 * 2 ** min(failures, 16)) if failures > 1 else 0)
        began = loop.time()
        try:
            await child.start()
        except ChildFailed as error:
            log.error("%s", error)
    log.error("%s cannot run as it is configured; not starting it again", child.name)
