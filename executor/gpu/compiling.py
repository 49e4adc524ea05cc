"""Kernels compiled ahead, beside each other: one by one they are most of the time until a GPU can serve.

A forward is run as it will be run, but that each launch only asks for its kernel. Triton compiles what is asked for in
threads (it lets go of the interpreter's lock for most of that), and keeps it on disk for the next start.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, Final

_MOST_THREADS: Final = 16


@contextmanager
def compiling_ahead() -> Iterator[None]:
    """Inside of it no Triton kernel is launched; on leaving, all those that would have been are compiled.

    What fails to compile is told by its first launch. For one thread at a time: launches of all others wait for nothing
    and do nothing either.
    """
    from triton import AsyncCompileMode
    from triton.runtime.jit import JITFunction

    jit: Any = JITFunction  # triton has no types
    run = jit.run

    def ask(self: Any, *arguments: Any, grid: Any, warmup: bool, **keywords: Any) -> Any:  # noqa: ARG001 - Triton's name
        return run(self, *arguments, grid=grid, warmup=True, **keywords)

    jit.run = ask
    try:
        with ThreadPoolExecutor(_num_threads()) as threads, AsyncCompileMode(threads, ignore_errors=True):
            yield
    finally:
        jit.run = run


def _num_threads() -> int:
    return max(2, min(_MOST_THREADS, len(os.sched_getaffinity(0))))
