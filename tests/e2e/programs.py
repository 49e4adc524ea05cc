"""Programs as a person meets them: run to their end, or driven at a terminal."""

from __future__ import annotations

import contextlib
import os
import pty
import select
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from tests.e2e.cluster import ROOT

TIMEOUT_S = 120.0
CTRL_C = "\x03"
CTRL_D = "\x04"

PAGEWIRE = (sys.executable, "-m", "services")


@dataclass(frozen=True, slots=True, kw_only=True)
class Ended:
    """How a program ended, and what it wrote."""

    code: int
    out: str
    err: str


def run(*command: str | bytes, folder: Path = ROOT, said: str = "") -> Ended:
    """Run to the end; `said` is what it reads. Carriage returns in its output stay as they are."""
    environment = {**os.environ, "PYTHONUTF8": "1"}
    done = subprocess.run(
        command, cwd=folder, env=environment, input=said.encode(), capture_output=True, timeout=TIMEOUT_S, check=False
    )
    return Ended(code=done.returncode, out=done.stdout.decode(), err=done.stderr.decode())


class Terminal:
    """A program at a terminal of its own, where Ctrl-C is what it is on a keyboard."""

    def __init__(self, *command: str, folder: Path = ROOT) -> None:
        self._screen, self._line = pty.openpty()
        # the shell leads a new session, so the first terminal that it opens becomes the session's own
        self._popen = subprocess.Popen(
            ["sh", "-c", 'exec "$@" <"$0" >"$0" 2>&1', os.ttyname(self._line), *command],
            cwd=folder,
            env={**os.environ, "PYTHONUTF8": "1", "TERM": "dumb"},
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )
        self._unread = b""

    def type(self, text: str) -> None:
        """Press these keys."""
        os.write(self._screen, text.encode())

    def read_until(self, text: str) -> str:
        """What it has shown since the last time, up to and with `text`."""
        until = time.monotonic() + TIMEOUT_S
        while (at := self._unread.find(text.encode())) < 0:
            has_ended = self._popen.poll() is not None  # before the look: what it said last is there, if it has
            readable, _, _ = select.select([self._screen], [], [], 0.1)
            if readable:
                self._unread += os.read(self._screen, 4096)
            elif has_ended or time.monotonic() > until:
                raise AssertionError(
                    f"{text!r} never came; exit code {self._popen.poll()}, on the screen: {self._unread!r}"
                )
        end = at + len(text.encode())
        shown, self._unread = self._unread[:end], self._unread[end:]
        return shown.decode(errors="replace")

    def end(self) -> Ended:
        """Wait for the end; what it has shown since the last time."""
        code = self._popen.wait(TIMEOUT_S)
        os.close(self._line)
        self._line = -1
        with contextlib.suppress(OSError):  # the kernel's word for the end of a terminal
            while chunk := os.read(self._screen, 4096):
                self._unread += chunk
        return Ended(code=code, out=self._unread.decode(errors="replace"), err="")

    def close(self) -> None:
        """Kill it if it still runs."""
        if self._popen.poll() is None:
            self._popen.kill()
        self._popen.wait()
        for fd in (self._screen, self._line):
            if fd >= 0:
                os.close(fd)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
