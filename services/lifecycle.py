"""Birth and death of a process: what it may bind, the word that it is ready, signals, dying with its parent."""

from __future__ import annotations

import asyncio
import ctypes
import ipaddress
import os
import signal
import sys

from common.errors import PagewireError


class StartupError(PagewireError):
    """The process cannot start as it was asked to; the message says what to type instead."""


def check_bind(address: str, *, insecure: bool) -> None:
    """Raise StartupError for an address that others could reach, unless the operator typed --insecure.

    Unix sockets and loopback addresses are for this machine only.
    """
    if insecure or address.startswith(("unix:", "unix-abstract:")):
        return
    host = split_address(address)[0]
    if host != "localhost":
        try:
            loopback = ipaddress.ip_address(host).is_loopback
        except ValueError:
            loopback = False
        if not loopback:
            raise StartupError(
                f"{address} can be reached from other machines, and this build has no TLS and no keys yet. "
                f"Bind 127.0.0.1, or type --insecure if the network itself is trusted."
            )


def split_address(address: str) -> tuple[str, int]:
    """Host and port of `host:port` or `[v6]:port`. Raises StartupError."""
    host, colon, port = address.rpartition(":")
    bare_v6 = ":" in host and not (host.startswith("[") and host.endswith("]"))
    if not colon or not host or bare_v6 or not (port.isascii() and port.isdigit()) or int(port) > 65535:
        raise StartupError(f"{address!r} is not HOST:PORT, for example 127.0.0.1:50051 or [::1]:50051")
    return host.strip("[]"), int(port)


def announce(ready_fd: int | None, line: str) -> None:
    """Tell whoever started this process that it is ready: one line on the descriptor, then end of file."""
    if ready_fd is not None:
        with os.fdopen(ready_fd, "w") as out:
            out.write(line + "\n")


def die_with_parent(parent: int) -> None:
    """Ask the kernel for SIGTERM when the parent dies, so that no orphan holds memory or a port. Linux only.

    `parent` is its process id, which it tells itself: in a container it may well be 1.
    """
    if sys.platform == "linux":
        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGTERM)
        if os.getppid() != parent:  # it died before we asked
            os.kill(os.getpid(), signal.SIGTERM)


def stop_event() -> asyncio.Event:
    """An event that SIGTERM and SIGINT set. A second signal ends the process at once."""
    loop = asyncio.get_running_loop()
    event = asyncio.Event()

    def on_signal() -> None:
        if event.is_set():
            os._exit(130)
        event.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, on_signal)
    return event
