"""Kernels compiled ahead, beside each other: one by one they are most of the time until a GPU can serve.

A forward is run as it will be run, but that each launch only asks for its kernel. Triton compiles what is asked for in
threads (it lets go of the interpreter's lock for most of that), and keeps it on disk for the next start. Then the
kernels are loaded, in threads too: for that some versions of Triton have a C compiler make a launcher for each.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from typing import Any, Final

_MOST_THREADS: Final = 16


@contextmanager
def compiling_ahead(begin_thread: Callable[[], None] = lambda: None) -> Iterator[None]:
    """Inside of it no Triton kernel is launched; on leaving, all those that would have been are ready.

    `begin_thread` is called in each thread first: to choose the device. What fails is told by its first launch. Nobody
    else may launch meanwhile: it would do nothing.
    """
    from triton import AsyncCompileMode
    from triton.runtime.jit import JITFunction

    jit: Any = JITFunction  # triton has no types
    run = jit.run
    asked: dict[int, Any] = {}

    def ask(self: Any, *arguments: Any, grid: Any, warmup: bool, **keywords: Any) -> Any:  # noqa: ARG001 - Triton's name
        kernel = run(self, *arguments, grid=grid, warmup=True, **keywords)
        asked[id(kernel)] = kernel
        return kernel

    jit.run = ask
    try:
        with ThreadPoolExecutor(_num_threads(), initializer=begin_thread) as threads:
            with AsyncCompileMode(threads, ignore_errors=True):
                yield
            list(threads.map(_load, asked.values()))
    finally:
        jit.run = run


def _load(kernel: Any) -> None:
    with suppress(Exception):
        compiled = kernel.result() if hasattr(kernel, "result") else kernel
        _ = compiled.run  # makes its launcher and brings it to the device


def _num_threads() -> int:
    return max(2, min(_MOST_THREADS, len(os.sched_getaffinity(0))))
