"""The requests that run for this API, by tenant and id, so that an Abort finds them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from common.errors import AlreadyRunning
from services.answer import Answer


class Run:
    """One request; its answer may not be there yet."""

    def __init__(self) -> None:
        self._answer: Answer | None = None
        self._is_aborted = False

    def begin(self, answer: Answer) -> Answer:
        """It has an answer, which ends at once where somebody has asked for that already."""
        self._answer = answer
        if self._is_aborted:
            answer.abort()
        return answer

    def abort(self) -> None:
        """End it. Its reader hears that it was aborted."""
        self._is_aborted = True
        if self._answer is not None:
            self._answer.abort()


class Running:
    """All of them."""

    def __init__(self) -> None:
        self._all: dict[tuple[str, str], Run] = {}

    def __len__(self) -> int:
        return len(self._all)

    @contextmanager
    def enter(self, tenant: str, request_id: str) -> Iterator[Run]:
        """One that runs in here. Raises AlreadyRunning where one of its id does; one without an id cannot be named."""
        run, key = Run(), (tenant, request_id)
        if not request_id:
            yield run
            return
        if key in self._all:
            raise AlreadyRunning(f"request_id: {request_id} runs already")
        self._all[key] = run
        try:
            yield run
        finally:
            del self._all[key]

    def abort(self, tenant: str, request_id: str) -> None:
        """End it, if it is there."""
        run = self._all.get((tenant, request_id))
        if run is not None:
            run.abort()
