"""How long work takes on the device. Without a GPU everything runs once, and the numbers mean nothing."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, Final

import torch

Work = Callable[[], object]

_BATCH_S: Final = 2e-3  # calls are measured together until they take about so long
_MOST_CALLS: Final = 128
_L2_BYTES: Final = 192 << 20  # several times what a GPU has: inputs that take turns are not found there


def copies_beyond_cache(num_bytes: float, *, most: int = 64) -> int:
    """How many copies of inputs of `num_bytes` have to take turns so that none is in the cache when it is used."""
    return max(1, min(most, math.ceil(_L2_BYTES / max(1.0, num_bytes))))


def graph_s(works: Sequence[Work], device: torch.device, *, rounds: int = 11) -> float:
    """Median seconds of one call when a CUDA graph replays them, the works taking turns."""
    if device.type != "cuda":
        return _once_s(works)
    works[0]()  # compiles
    calls = _turns(works, _eager_guess_s(works))
    graph = capture(calls)
    graph.replay()
    return _median_event_s(graph.replay, rounds) / len(calls)


def eager_s(work: Work, device: torch.device, *, rounds: int = 5) -> float:
    """Median seconds from the call to the end of what it started, the host's part included."""
    if device.type != "cuda":
        return _once_s([work])
    work()
    seconds = []
    for _ in range(rounds):
        torch.cuda.synchronize()
        began = time.perf_counter()
        work()
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds)


def device_s(work: Work, device: torch.device, *, rounds: int = 7) -> float:
    """Median seconds between two events around one call."""
    if device.type != "cuda":
        return _once_s([work])
    work()
    return _median_event_s(work, rounds)


def launch_costs(work: Work, *, count: int = 200) -> tuple[float, float, float]:
    """Seconds of the host for a call that launches kernels, of these in Triton, and those of its kernels once compiled.

    The work must be short: the queue of the device must not fill up.
    """
    from triton.runtime.jit import JITFunction  # noqa: PLC0415 - optional

    jit: Any = JITFunction
    run, launched, spent = jit.run, list[Work](), 0.0

    def recorded(self: Any, *arguments: Any, grid: Any, **keywords: Any) -> Any:
        kernel = run(self, *arguments, grid=grid, **keywords)
        values = [*arguments, *(keywords[name] for name in self.arg_names[len(arguments) :])]
        whole = (*grid, 1, 1)[:3]
        launched.append(lambda: kernel[whole](*values))
        return kernel

    def timed(*arguments: Any, **keywords: Any) -> Any:
        nonlocal spent
        began = time.perf_counter()
        kernel = run(*arguments, **keywords)
        spent += time.perf_counter() - began
        return kernel

    work()
    try:
        jit.run = recorded
        work()
        jit.run = timed
        _host_s(work, count)
    finally:
        jit.run = run
    return _host_s(work, count), spent / count, sum(_host_s(each, count) for each in launched)


def quiet_host_s(work: Work, device: torch.device, *, rounds: int = 15) -> float:
    """Median seconds of the host for a call that finds the device idle."""
    if device.type != "cuda":
        return _once_s([work])
    seconds = []
    for _ in range(rounds):
        torch.cuda.synchronize()
        began = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds)


def _host_s(work: Work, count: int) -> float:
    torch.cuda.synchronize()
    began = time.perf_counter()
    for _ in range(count):
        work()
    seconds = (time.perf_counter() - began) / count
    torch.cuda.synchronize()
    return seconds


def capture(works: Sequence[Work]) -> Any:
    """A graph of these calls, one after the other. They must have run before."""
    cuda: Any = torch.cuda
    stream = cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for work in works[:2]:
            work()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
        for work in works:
            work()
    return graph


def _turns(works: Sequence[Work], each_s: float) -> list[Work]:
    count = min(_MOST_CALLS, max(len(works), math.ceil(_BATCH_S / max(each_s, 1e-6))))
    return [works[place % len(works)] for place in range(count)]


def _eager_guess_s(works: Sequence[Work]) -> float:
    torch.cuda.synchronize()
    began = time.perf_counter()
    for work in works[:3]:
        work()
    torch.cuda.synchronize()
    return (time.perf_counter() - began) / len(works[:3])


def _median_event_s(work: Work, rounds: int) -> float:
    cuda: Any = torch.cuda
    seconds: list[float] = []
    for _ in range(rounds):
        begin, end = cuda.Event(enable_timing=True), cuda.Event(enable_timing=True)
        begin.record()
        work()
        end.record()
        end.synchronize()
        seconds.append(begin.elapsed_time(end) / 1e3)
    return statistics.median(seconds)


def _once_s(works: Sequence[Work]) -> float:
    began = time.perf_counter()
    works[0]()
    return time.perf_counter() - began
