"""The event loop of a process that serves: uvloop's, kept from falling behind gRPC.

gRPC has a thread that hears what it has finished. It queues each event and wakes the loop by a byte through a pair of
sockets; the loop answers by taking one byte and all events. So where a turn takes several events, bytes stay behind.
When 278 of them lie there that thread's next write blocks, and the kernel lets it go on only when three quarters are
gone, one a turn. Meanwhile nothing of gRPC is heard: no result of a step, no new call. A scheduler with 256 streams and
steps of 7 ms had a step's result 30 ms late, again and again, and did a third of the work that it does with this loop.
"""

from __future__ import annotations

import functools
import socket
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final, TypeVarTuple

import uvloop

if TYPE_CHECKING:
    from _typeshed import FileDescriptorLike

_Args = TypeVarTuple("_Args")

_AT_ONCE: Final = 4096  # bytes; the socket holds some hundreds


class EventLoop(uvloop.Loop):
    """uvloop's loop. Of the bytes that gRPC wakes it with, it takes all."""

    def add_reader(self, fd: FileDescriptorLike, callback: Callable[[*_Args], Any], *args: *_Args) -> None:
        """As every loop's."""
        if isinstance(fd, socket.socket) and _takes_events(callback):
            super().add_reader(fd, functools.partial(_after_wakeups, fd, callback), *args)
        else:
            super().add_reader(fd, callback, *args)


def _takes_events(callback: Callable[..., Any]) -> bool:
    while isinstance(callback, functools.partial):
        callback = callback.func
    return getattr(callback, "__name__", "") == "_handle_events"


def _after_wakeups(wakeups: socket.socket, take_events: Callable[..., Any], *args: Any) -> None:
    """Take the bytes that are there but one, which gRPC takes, then its events.

    In this order: each byte that is taken here was written behind its event.
    """
    try:
        count = len(wakeups.recv(_AT_ONCE, socket.MSG_PEEK | socket.MSG_DONTWAIT))
        if count > 1:
            wakeups.recv(count - 1, socket.MSG_DONTWAIT)
    except BlockingIOError:  # nothing is there, which is for gRPC to say
        pass
    take_events(*args)
