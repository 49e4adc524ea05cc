"""Stage 3: every decode graph of a real shape: what capturing them takes, and whether they compute what eager does."""

from __future__ import annotations

import random
import time
from typing import Any, Final

import torch

from tests.gpu.check.driving import blocks_needed, drive
from tests.gpu.check.ours import runner_for
from tests.gpu.check.parts import Check, Found, Part
from tests.gpu.check.server import model_folder

_ROWS: Final = (1, 8, 64, 100, 256)  # numbers of rows that are compared; 100 is not one of a graph
_BLOCK_SIZE: Final = 16
_captured: Final[list[Any]] = []  # the runner of the first part, for the second


def parts(check: Check) -> list[Part]:
    """Capture, then compare what was captured."""
    return [
        Part(name="capture", work=capture_all, takes_s=20, limit_s=150),
        Part(name="replay equals eager", work=compare, takes_s=8, limit_s=120),
    ]


def capture_all(check: Check) -> Found:
    """Seconds until it could serve, and until every graph is there; memory that the graphs took."""
    _captured.clear()
    began_s = time.monotonic()
    runner = _runner(check, graphs=True)
    ready_s = time.monotonic() - began_s
    free = _free(check)
    began_s = time.monotonic()
    while runner.idle():
        pass
    seconds, taken = time.monotonic() - began_s, free - _free(check)
    _captured.append(runner)
    return Found(
        values={
            "ready_s": round(ready_s, 2),
            "seconds_later": round(seconds, 2),
            "mib_later": round(taken / 2**20, 1),
            "told": _summary(runner),
        },
        lines=[
            f"ready after {ready_s:.1f} s with the first graphs, all are there {seconds:.1f} s later",
            f"graphs: {taken / 2**20:.0f} MiB for the later ones; {_summary(runner)}",
        ],
    )


def compare(check: Check) -> Found:
    """The same prompts through graphs and without. Of so many rows as a graph has, the numbers are the same ones."""
    graphed = _captured.pop() if _captured else _runner(check, graphs=True)
    eager = _runner(check, graphs=False)
    while graphed.idle():
        pass
    found = Found()
    for rows in (3,) if check.fake else _ROWS:
        prompts = _prompts(rows, check)
        ours, theirs = (
            drive(runner, prompts, _count(check), block_size=_BLOCK_SIZE, chunk=64) for runner in (graphed, eager)
        )
        same = sum(one == other for one, other in zip(ours, theirs, strict=True))
        found.values[str(rows)] = {"same_answers": same, "rows": rows}
        if same < rows * (1 if rows in (1, 8, 64, 256) else 0.9):  # of padded rows the products may round otherwise
            found.problems.append(f"{rows - same} of {rows} rows differ")
    told = ", ".join(f"{each['same_answers']}/{rows}" for rows, each in found.values.items())
    found.lines.append(f"answers that are the same with and without graphs: {told}")
    return found


def _runner(check: Check, *, graphs: bool) -> Any:
    most = 3 if check.fake else 256
    return runner_for(
        check,
        model_folder(check),
        dtype="auto",
        graphs=graphs,
        block_size=_BLOCK_SIZE,
        num_blocks=blocks_needed(_prompts(most, check), _count(check), _BLOCK_SIZE),
        max_sequences=most,
        max_step_tokens=6 if check.fake else 8192,
        max_model_len=32 if check.fake else 4096,
    )


def _prompts(rows: int, check: Check) -> list[list[int]]:
    draw = random.Random(rows)
    return [[draw.randrange(3, 300) for _ in range(3 if check.fake else 20 + row % 5)] for row in range(rows)]


def _count(check: Check) -> int:
    """Tokens of each answer."""
    return 2 if check.fake else 8


def _summary(runner: Any) -> str:
    graphs = getattr(runner, "_graphs", None)
    return "" if graphs is None else str(graphs.summary())


def _free(check: Check) -> int:
    if check.fake:
        return 0
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    return int(torch.cuda.mem_get_info()[0])
