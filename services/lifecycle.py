"""Birth and death of a process: what it may bind, the word that it is ready, signals, dying with its parent."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import gc
import logging
import os
import resource
import signal
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

from common import addresses
from common.config import SchedulerConfig
from common.errors import PagewireError
from common.log import without_texts

log = logging.getLogger(__name__)

_ECHO_S: Final = 3.0


class StartupError(PagewireError):
    """The process cannot start as it was asked to; the message says what to type instead."""


def check_binds(config: SchedulerConfig) -> None:
    """Raise StartupError for an address that others could reach without TLS and keys; --insecure allows it."""
    needed = {"--tls-cert": config.tls_cert, "--tls-key": config.tls_key, "--api-keys": config.api_keys}
    check_bind(config.listen, insecure=config.insecure, missing=[flag for flag, value in needed.items() if not value])
    if config.local_listen and not config.local_listen.startswith("unix:"):
        raise StartupError(f"--local-listen {config.local_listen}: give unix:PATH, which only this machine can reach")
    if config.metrics_listen and not config.insecure and not is_local(config.metrics_listen):
        raise StartupError(
            f"--metrics-listen {config.metrics_listen} can be reached from other machines, and is not encrypted nor "
            f"asks for keys. Bind 127.0.0.1, ask a gateway, or type --insecure if the network itself is trusted."
        )
    needed = {f"--link-tls-{name}": getattr(config, f"link_tls_{name}") for name in ("cert", "key", "ca")}
    check_bind(
        config.link_listen, insecure=config.insecure, missing=[flag for flag, value in needed.items() if not value]
    )


def check_bind(address: str, *, insecure: bool, missing: Sequence[str]) -> None:
    """Raise StartupError for an address that others could reach, unless it is protected, or --insecure was typed.

    `missing` are the flags that would protect it and were not given.
    """
    if missing and not insecure and not is_local(address):
        raise StartupError(
            f"{address} can be reached from other machines. Protect it with {' '.join(missing)}, bind 127.0.0.1, or "
            f"type --insecure if the network itself is trusted."
        )


def is_local(address: str) -> bool:
    """Whether only this machine can reach the address, a Unix socket or loopback. Raises StartupError if it is none."""
    try:
        return addresses.is_local(address)
    except ValueError as error:
        raise StartupError(str(error)) from None


def split_address(address: str) -> tuple[str, int]:
    """Host and port of `host:port` or `[v6]:port`. Raises StartupError."""
    try:
        return addresses.split_address(address)
    except ValueError as error:
        raise StartupError(str(error)) from None


def keep_secrets() -> None:
    """Leave no prompt or key behind when this process fails: no memory in a core file, no exception's text in the log.

    For a process that serves, on its event loop.
    """
    tell_no_texts(asyncio.get_running_loop())
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with contextlib.suppress(OSError):  # the limit does not bind a program that the kernel hands cores to; this does
        Path("/proc/self/coredump_filter").write_text("0")


def take_descriptors() -> None:
    """Take as many file descriptors as the process may have: each connection is one, and the usual 1024 are few."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        with contextlib.suppress(OSError, ValueError):  # refused: fewer connections, and no less of a server
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def spare_the_collector() -> None:
    """What is loaded by now stays for ever: a full collection would walk it for tens of milliseconds, in a step."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 100)


def tell_no_texts(loop: asyncio.AbstractEventLoop) -> None:
    """Log what nobody waited for, of the loop and of any thread, with its place and without its text."""
    loop.set_exception_handler(_log_of_the_loop)
    threading.excepthook = _log_of_a_thread


def _log_of_the_loop(_: asyncio.AbstractEventLoop, context: Mapping[str, object]) -> None:
    error = context.get("exception")
    told = "".join(without_texts(error)) if isinstance(error, BaseException) else ""
    log.error("%s\n%s", context.get("message"), told)


def _log_of_a_thread(ended: threading.ExceptHookArgs) -> None:
    name = ended.thread.name if ended.thread is not None else "a thread"
    told = "".join(without_texts(ended.exc_value)) if ended.exc_value is not None else ended.exc_type.__name__
    log.critical("%s ended by an exception\n%s", name, told)


def announce(ready_fd: int | None, line: str) -> None:
    """Tell whoever started this process that it is ready: one line on the descriptor, then end of file."""
    if ready_fd is not None:
        with os.fdopen(ready_fd, "w") as out:
            out.write(line + "\n")


class ReadyFile:
    """Tells whoever can look into a folder that this process is ready: a file that is there as long as it is.

    An empty path is no file. Raises StartupError where it cannot be made.
    """

    def __init__(self, path: str) -> None:
        self._path = Path(path) if path else None
        self.remove()  # one that a killed process left behind would speak for this one
        if self._path is not None and not os.access(self._path.parent, os.W_OK):
            raise StartupError(f"--ready-file {path}: its folder must be there, and writable")

    def make(self) -> None:
        """Ready."""
        if self._path is not None:
            self._path.touch()

    def remove(self) -> None:
        """Not ready any more."""
        if self._path is not None:
            with contextlib.suppress(OSError):
                self._path.unlink()


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
    """An event that SIGTERM and SIGINT set. A second signal ends the process at once, with 128 and its number.

    A second SIGTERM soon after the first is its echo: an init system sends it to every process of a service, and
    `serve` passes its own on.
    """
    loop = asyncio.get_running_loop()
    event = asyncio.Event()
    first_s = 0.0

    def on_signal(number: signal.Signals) -> None:
        nonlocal first_s
        if not event.is_set():
            first_s = loop.time()
            event.set()
        elif number is not signal.SIGTERM or loop.time() - first_s >= _ECHO_S:
            log.warning("a second %s: ending at once", number.name)
            os._exit(128 + number)

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, on_signal, number)
    return event
