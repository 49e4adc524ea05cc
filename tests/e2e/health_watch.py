"""What a scheduler says of its health, as it changes."""

from __future__ import annotations

import threading
from types import TracebackType
from typing import Self

import grpc
from grpc_health.v1 import health_pb2 as pb

SERVING, NOT_SERVING = "SERVING", "NOT_SERVING"


class HealthWatch:
    """Watches from its first answer on, or from the first that is `once`, until the server ends it."""

    def __init__(self, address: str, *, once: str = "") -> None:
        # a connection of its own, which nobody has seen break
        self._channel = grpc.insecure_channel(address, options=[("grpc.use_local_subchannel_pool", 1)])
        method: grpc.UnaryStreamMultiCallable[bytes, bytes] = self._channel.unary_stream("/grpc.health.v1.Health/Watch")
        self._call = method(b"", wait_for_ready=True, timeout=300)
        self._changed = threading.Condition()
        first = _status(next(self._call))
        while once and first != once:
            first = _status(next(self._call))
        self._heard = [first]
        self._is_over = False
        self._thread = threading.Thread(target=self._listen, daemon=True)
        self._thread.start()

    @property
    def heard(self) -> list[str]:
        """Every status so far, in order."""
        with self._changed:
            return list(self._heard)

    def wait_for(self, status: str) -> None:
        """Return once the newest status is this."""
        with self._changed:
            if not self._changed.wait_for(lambda: self._heard[-1] == status or self._is_over, timeout=120):
                raise AssertionError(f"{status} never came: {self._heard}")
            assert self._heard[-1] == status, self._heard

    def to_the_end(self) -> list[str]:
        """Every status there was, once the server has ended the call."""
        self._thread.join(120)
        assert not self._thread.is_alive(), "the server is still there"
        return self._heard

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._channel.close()

    def _listen(self) -> None:
        try:
            for message in self._call:
                with self._changed:
                    self._heard.append(_status(message))
                    self._changed.notify_all()
        except (grpc.RpcError, ValueError):  # the server's end | our own
            pass
        with self._changed:
            self._is_over = True
            self._changed.notify_all()


def _status(message: bytes) -> str:
    return pb.HealthCheckResponse.ServingStatus.Name(pb.HealthCheckResponse.FromString(message).status)
