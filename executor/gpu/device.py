"""The device as a runner sees it: one queue of work, events in it, graphs of it. All that is CUDA's own is in here.

`HostDevice` is the CPU in the same shape, for tests: what is queued is done only when somebody waits, so a buffer that
is written too early, or a host that looks at what is not computed yet, shows.
"""

from __future__ import annotations

import threading
import time
import warnings
from collections import deque
from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from executor.kv_cache import free_bytes

Work = Callable[[], None]


class Event(Protocol):
    """A place in the queue. Recorded anew, it is that of the last time."""

    def record(self) -> None:
        """Stand behind all that is queued so far."""
        ...

    def wait(self) -> None:
        """Block the calling thread, any one, until what is before the event is done. Returns at once if unrecorded."""
        ...

    def is_done(self) -> bool:
        """Whether what is before it is done."""
        ...

    def ns_since(self, earlier: Event, /) -> int:
        """Time of the device from `earlier` to here; both are done."""
        ...


class Graph(Protocol):
    """Work that was captured: it can be queued again, as one piece, over the same memory."""

    def replay(self) -> None:
        """Do it. Called inside of queued work."""
        ...


class Device(Protocol):
    """Where a runner computes. Not thread-safe, but for the events."""

    torch_device: torch.device

    def queue(self, work: Work, /) -> None:
        """Do `work` behind all that was queued before. It may read tensors and launch kernels, and nothing else.

        On CUDA it is called at once, and what it launches is done later.
        """
        ...

    def event(self) -> Event:
        """Return a new event."""
        ...

    def pinned(self, size: int, dtype: torch.dtype = torch.int32) -> Tensor:
        """Memory of the host that the device copies from and to without anybody's waiting; (size,), not filled."""
        ...

    def capture(self, work: Work, /) -> Graph:
        """Do `work` once, so that what a first time compiles is no part of it, and make a graph of it.

        Raises RuntimeError when it cannot be: it waits for the device, or memory is out.

        All graphs share one pool of memory: none may run beside another, nor be relied on to keep what it returned
        while another one runs.
        """
        ...

    def forget_graphs(self) -> None:
        """Begin a new pool. The graphs before must be gone."""
        ...

    def synchronize(self) -> None:
        """Block until all that was queued is done."""
        ...

    def free_bytes(self) -> int:
        """Memory that could still be taken, by anybody."""
        ...

    def total_bytes(self) -> int:
        """Memory that there is."""
        ...

    def release_unused(self) -> None:
        """Give back the memory that was taken and holds nothing now."""
        ...

    def begin_peak(self) -> None:
        """Begin to watch how much memory is in use."""
        ...

    def peak_bytes(self) -> int:
        """The most that was in use at once since then, beyond what was in use then."""
        ...

    def is_lost(self) -> bool:
        """Whether the device answers nothing any more in this process, as after an illegal access."""
        ...


class CudaDevice:
    """One GPU, and one stream of it, on which the calling thread works from now on."""

    def __init__(self, device: torch.device) -> None:
        index = torch.cuda.current_device() if device.index is None else device.index
        self.torch_device = torch.device("cuda", index)
        torch.cuda.set_device(index)
        self._stream = torch.cuda.Stream(index)  # type: ignore[no-untyped-call]  # a graph cannot be captured from the default stream
        torch.cuda.set_stream(self._stream)
        self._pool = torch.cuda.graph_pool_handle()
        self._in_use = 0

    def queue(self, work: Work, /) -> None:
        """Launch it."""
        work()

    def event(self) -> Event:
        """Return an event whose waiting thread sleeps, and that has a time."""
        return _CudaEvent()

    def pinned(self, size: int, dtype: torch.dtype = torch.int32) -> Tensor:
        """Page-locked memory."""
        return torch.empty(size, dtype=dtype, pin_memory=True)

    def capture(self, work: Work, /) -> Graph:
        """Capture on our stream. Other threads may use CUDA meanwhile: the process serves."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that it is a prototype
            torch.cuda.set_sync_debug_mode("error")
        try:  # found here, what waits breaks nothing; found while capturing, it breaks the capture
            work()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
            work()
        return graph

    def forget_graphs(self) -> None:
        """Begin a new pool."""
        self._pool = torch.cuda.graph_pool_handle()

    def synchronize(self) -> None:
        """Wait for all streams of the device."""
        torch.cuda.synchronize(self.torch_device)

    def free_bytes(self) -> int:
        """What the driver says, all processes counted."""
        return int(torch.cuda.mem_get_info(self.torch_device)[0])

    def total_bytes(self) -> int:
        """Of the card."""
        return int(torch.cuda.mem_get_info(self.torch_device)[1])

    def release_unused(self) -> None:
        """Empty torch's cache."""
        torch.cuda.synchronize(self.torch_device)
        torch.cuda.empty_cache()

    def begin_peak(self) -> None:
        """By the counters of torch."""
        torch.cuda.reset_peak_memory_stats(self.torch_device)
        self._in_use = torch.cuda.memory_allocated(self.torch_device)

    def peak_bytes(self) -> int:
        """What tensors took, the gaps between them not counted."""
        return torch.cuda.max_memory_allocated(self.torch_device) - self._in_use

    def is_lost(self) -> bool:
        """An error that stays is met again by whoever waits for the device."""
        try:
            torch.cuda.synchronize(self.torch_device)
        except RuntimeError:
            return True
        return False


class _CudaEvent:
    def __init__(self) -> None:
        self._event = torch.cuda.Event(enable_timing=True, blocking=True)  # type: ignore[no-untyped-call]

    def record(self) -> None:
        self._event.record()  # on the current stream of this thread, which is the device's

    def wait(self) -> None:
        self._event.synchronize()  # without the interpreter's lock

    def is_done(self) -> bool:
        return bool(self._event.query())  # type: ignore[no-untyped-call]

    def ns_since(self, earlier: Event, /) -> int:
        assert isinstance(earlier, _CudaEvent)
        return int(earlier._event.elapsed_time(self._event) * 1e6)  # it gives milliseconds


class HostDevice:
    """The CPU, with a queue. Work is done by whoever waits for an event, and not before.

    `memory_bytes` is what it claims to have, all of it free at all times; without it the machine's free memory.
    """

    def __init__(self, memory_bytes: int | None = None) -> None:
        self.torch_device = torch.device("cpu")
        self.num_graphs = 0  # captured since the pool began
        self._memory_bytes = memory_bytes
        self._work: deque[Work] = deque()
        self._lock = threading.RLock()

    def queue(self, work: Work, /) -> None:
        """Put it behind the rest."""
        self._work.append(work)

    def event(self) -> Event:
        """Return an event that, waited for, does what is before it."""
        return _HostEvent(self)

    def pinned(self, size: int, dtype: torch.dtype = torch.int32) -> Tensor:
        """Memory like any other."""
        return torch.empty(size, dtype=dtype)

    def capture(self, work: Work, /) -> Graph:
        """Do `work`, and remember it; replayed, it is called again."""
        self.synchronize()
        work()
        self.num_graphs += 1
        return _HostGraph(work)

    def forget_graphs(self) -> None:
        """Count from 0."""
        self.num_graphs = 0

    def synchronize(self) -> None:
        """Do all that is queued."""
        with self._lock:
            while self._work:
                self._work.popleft()()

    def do_until(self, is_done: Callable[[], bool]) -> None:
        """Do what is queued, one after the other, until it is so."""
        with self._lock:
            while not is_done():
                self._work.popleft()()

    def free_bytes(self) -> int:
        """As claimed."""
        return free_bytes(self.torch_device) if self._memory_bytes is None else self._memory_bytes

    def total_bytes(self) -> int:
        """As much as is free."""
        return self.free_bytes()

    def release_unused(self) -> None:
        """Nothing is held back."""
        self.synchronize()

    def begin_peak(self) -> None:
        """Nobody counts here."""

    def peak_bytes(self) -> int:
        """Nothing."""
        return 0

    def is_lost(self) -> bool:
        """Never."""
        return False


class _HostEvent:
    def __init__(self, device: HostDevice) -> None:
        self._device = device
        self._recorded = self._reached = 0  # how often
        self._at_ns = 0

    def record(self) -> None:
        self._recorded += 1
        self._device.queue(self._reach)

    def wait(self) -> None:
        self._device.do_until(self.is_done)

    def is_done(self) -> bool:
        return self._reached == self._recorded

    def ns_since(self, earlier: Event, /) -> int:
        assert isinstance(earlier, _HostEvent)
        return self._at_ns - earlier._at_ns

    def _reach(self) -> None:
        self._reached += 1
        self._at_ns = time.perf_counter_ns()


class _HostGraph:
    def __init__(self, work: Work) -> None:
        self._work = work

    def replay(self) -> None:
        self._work()
