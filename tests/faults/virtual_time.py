"""Virtual time: whole processes in one thread, each with an event loop of its own, and one clock that jumps.

A `Process` is an asyncio event loop, so production code runs on it as it is. The `World` lets every process do what it
can do now, then moves the clock to the next timer. Nothing waits, nothing is random but what the world draws, and tasks
hash by their number, so that sets of them have the same order in every run: one seed is one story.
"""

from __future__ import annotations

import asyncio
import heapq
import itertools
import random
import zlib
from collections import Counter, deque
from collections.abc import Callable, Coroutine
from contextvars import Context
from typing import Any, Final, TypeVar, TypeVarTuple

T = TypeVar("T")
Ts = TypeVarTuple("Ts")

_CLOCK_RESOLUTION_S: Final = 1e-9
_BEGAN_S: Final = 1e9
_MAX_TURNS: Final = 50_000  # of all loops together, without the clock moving


class NumberedTask(asyncio.Task[T]):
    """A task whose hash is its number and not its address."""

    def __init__(self, coro: Coroutine[Any, Any, T], *, loop: Process, **settings: Any) -> None:
        self._number = loop.world.next_number()
        super().__init__(coro, loop=loop, **settings)

    def __hash__(self) -> int:
        return self._number


class NumberedFuture(asyncio.Future[Any]):
    """A future whose hash is its number."""

    def __init__(self, *, loop: Process) -> None:
        self._number = loop.world.next_number()
        super().__init__(loop=loop)

    def __hash__(self) -> int:
        return self._number


class KilledHere(BaseException):
    """Unwinds what a killed process was doing. Nothing of it is seen any more."""


class World:
    """The clock, its timers, and the processes. `draw` is the one source of chance."""

    def __init__(self, seed: int) -> None:
        self.draw = random.Random(seed)
        self.now_s = 0.0
        self.wall_offset_s = 0.0  # somebody sets the clocks
        self.processes: list[Process] = []
        self.passed: Counter[str] = Counter()  # failpoints, in whichever process
        self.trace = 0  # a digest of everything that happened, to tell whether two runs are the same
        self._timers: list[tuple[float, int, Callable[[], None] | asyncio.TimerHandle, Process | None]] = []
        self._numbers = itertools.count()
        self._busy: deque[Process] = deque()

    def next_number(self) -> int:
        """A number that nothing else in this world has."""
        return next(self._numbers)

    def wall_s(self) -> float:
        """What the clocks on the wall show, in Unix seconds."""
        return _BEGAN_S + self.now_s + self.wall_offset_s

    def process(self, name: str) -> Process:
        """A process is born."""
        made = Process(self, name)  # type: ignore[abstract]  # what nobody here calls is not there
        self.processes.append(made)
        return made

    def at(self, when_s: float, callback: Callable[[], None]) -> None:
        """Something happens outside of all processes: a packet arrives, a fault strikes."""
        heapq.heappush(self._timers, (when_s, next(self._numbers), callback, None))

    def after(self, delay_s: float, callback: Callable[[], None]) -> None:
        """The same, counted from now."""
        self.at(self.now_s + delay_s, callback)

    def run(self, *, until: Callable[[], bool], deadline_s: float) -> bool:
        """Play until `until` is true; False when the clock would pass `deadline_s`, or nothing is left to happen."""
        while True:
            for _ in range(_MAX_TURNS):
                if not self._busy:
                    break
                self._busy.popleft().turn()
            else:
                raise AssertionError(f"{_MAX_TURNS} turns at one moment: {self._busy[0].name} spins")
            if until():
                return True
            if not self._timers or self._timers[0][0] > deadline_s:
                return False
            when_s = self._timers[0][0]
            self.now_s = max(self.now_s, when_s)
            while self._timers and self._timers[0][0] <= self.now_s:
                _, _, what, process = heapq.heappop(self._timers)
                if process is None:
                    what()  # type: ignore[operator]
                else:
                    process.timer_is_due(what)  # type: ignore[arg-type]

    def note(self, *facts: object) -> None:
        """Take what happened into the digest. Facts are numbers, strings and bytes."""
        self.trace = zlib.crc32(repr((self.now_s, *facts)).encode(), self.trace)

    def wake(self, process: Process) -> None:
        """The process has something to do."""
        self._busy.append(process)

    def add_timer(self, when_s: float, handle: asyncio.TimerHandle, process: Process) -> None:
        """A process sets an alarm."""
        heapq.heappush(self._timers, (when_s, next(self._numbers), handle, process))

    def close(self) -> None:
        """End every task that is left, so that none is found unfinished later."""
        for process in self.processes:
            process.close_quietly()
        self._timers.clear()


class Process(asyncio.AbstractEventLoop):
    """One event loop in a World. It can stand still (SIGSTOP) and vanish (SIGKILL)."""

    def __init__(self, world: World, name: str) -> None:
        self.world = world
        self.name = name
        self.frozen = False
        self.dead = False
        self.host: Any = None  # who plays on this loop
        self.armed: dict[str, tuple[int, Callable[[], None]]] = {}  # failpoint → passages left, what happens then
        self.errors: list[dict[str, Any]] = []  # what asyncio would have logged
        self.clock_offset_s = 1000.0 * world.draw.random()  # no two machines count from the same moment
        self._ready: deque[asyncio.Handle] = deque()
        self._is_busy = False
        self._tasks: list[asyncio.Task[Any]] = []

    # ---- the world's side

    def spawn(self, coro: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        """Start a coroutine as if the process had just reached that line."""
        return self.create_task(coro)

    def call(self, callback: Callable[..., object], *args: Any) -> None:
        """Something from outside: it is seen when the process runs."""
        if not self.dead:
            self.call_soon(callback, *args)

    def freeze(self) -> None:
        """SIGSTOP: what arrives and what is due waits."""
        self.frozen = True

    def thaw(self) -> None:
        """SIGCONT."""
        self.frozen = False
        self._notice()

    def kill(self) -> None:
        """SIGKILL: not one more line runs."""
        self.dead = True

    def turn(self) -> None:
        """One turn of the loop: everything that is ready, not what becomes ready by it."""
        self._is_busy = False
        if self.frozen or self.dead:
            return
        asyncio._set_running_loop(self)
        try:
            for _ in range(len(self._ready)):
                handle = self._ready.popleft()
                if not handle.cancelled():
                    handle._run()
                if self.dead or self.frozen:  # the process did it itself
                    break
        finally:
            asyncio._set_running_loop(None)
        self._notice()

    def timer_is_due(self, handle: asyncio.TimerHandle) -> None:
        """An alarm rings."""
        if not self.dead and not handle.cancelled():
            self._ready.append(handle)
            self._notice()

    def close_quietly(self) -> None:
        """Cancel what is left and let it run to its end; whatever it still says goes nowhere."""
        self.armed.clear()
        for _ in range(10):  # what lies ready may start more
            for task in self._tasks:
                task.cancel()
            while self._ready:
                self.dead = self.frozen = False  # it may have been about to strike itself
                self.turn()
        assert not self.unfinished, f"{self.name} has a task that cannot be cancelled: {self.unfinished[0]}"
        for task in self._tasks:
            if task.done() and not task.cancelled():
                task.exception()  # seen
        self.dead = True

    @property
    def unfinished(self) -> list[str]:
        """Names of the coroutines that still run here."""
        return [str(task.get_coro()) for task in self._tasks if not task.done()]

    def _notice(self) -> None:
        if self._ready and not self._is_busy and not self.frozen and not self.dead:
            self._is_busy = True
            self.world.wake(self)

    # ---- asyncio's side

    def time(self) -> float:
        return self.world.now_s + self.clock_offset_s

    def call_soon(
        self, callback: Callable[[*Ts], object], *args: *Ts, context: Context | None = None
    ) -> asyncio.Handle:
        handle = asyncio.Handle(callback, args, self, context)
        self._ready.append(handle)
        self._notice()
        return handle

    def call_soon_threadsafe(
        self, callback: Callable[[*Ts], object], *args: *Ts, context: Context | None = None
    ) -> asyncio.Handle:
        return self.call_soon(callback, *args, context=context)

    def call_later(
        self, delay: float, callback: Callable[[*Ts], object], *args: *Ts, context: Context | None = None
    ) -> asyncio.TimerHandle:
        return self.call_at(self.time() + delay, callback, *args, context=context)

    def call_at(
        self, when: float, callback: Callable[[*Ts], object], *args: *Ts, context: Context | None = None
    ) -> asyncio.TimerHandle:
        handle = asyncio.TimerHandle(when, callback, args, self, context)
        # never now: a real clock moves between two looks at it, so that who waits for a rounding error does not spin
        self.world.add_timer(max(when - self.clock_offset_s, self.world.now_s + _CLOCK_RESOLUTION_S), handle, self)
        return handle

    def create_future(self) -> asyncio.Future[Any]:
        return NumberedFuture(loop=self)

    def create_task(  # type: ignore[override]
        self, coro: Coroutine[Any, Any, T], *, name: str | None = None, context: Context | None = None
    ) -> asyncio.Task[T]:
        task = NumberedTask(coro, loop=self, name=name or "task", context=context)
        self._tasks.append(task)
        return task

    def get_debug(self) -> bool:
        return False

    def is_running(self) -> bool:
        return True

    def is_closed(self) -> bool:
        return False

    def call_exception_handler(self, context: dict[str, Any]) -> None:
        if not self.dead:
            self.errors.append(context)

    def _timer_handle_cancelled(self, handle: asyncio.TimerHandle) -> None:
        """Asyncio says so; the world looks when the alarm would ring."""
