"""Stage 3: every graph of a real shape: what capturing them takes, and whether they compute what eager does."""

from __future__ import annotations

import random
import statistics
import time
from itertools import pairwise
from typing import Any, Final

import torch

from common.sampling import SamplingParams
from common.step import StepResult
from tests.gpu.check.checkpoint import model_folder
from tests.gpu.check.driving import blocks_needed, drive
from tests.gpu.check.ours import runner_for
from tests.gpu.check.parts import Check, Found, Part

_ROWS: Final = (1, 8, 64, 100, 256)  # numbers of rows that are compared; 100 is not one of a decode graph
_SAME: Final = 0.75  # of the answers: of padded steps the products round otherwise, and random logits lie close
_BLOCK_SIZE: Final = 16
_captured: Final[list[Any]] = []  # the runner of the first part, for the others


def parts(check: Check) -> list[Part]:
    """Capture, then compare what was captured."""
    return [
        Part(name="capture", work=capture_all, takes_s=20, limit_s=150),
        Part(name="replay equals eager", work=compare, takes_s=8, limit_s=120),
        Part(name="pace", work=pace, takes_s=5, limit_s=120),
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
    """The same prompts through graphs and without: steps with prompts beside decode rows, then decode rows alone."""
    graphed, eager = _graphed(check), _runner(check, graphs=False)
    found = Found()
    for rows in (3,) if check.fake else _ROWS:
        prompts = _prompts(rows, check)
        ours, theirs = (
            drive(runner, prompts, _count(check), block_size=_BLOCK_SIZE, chunk=64) for runner in (graphed, eager)
        )
        same = sum(one == other for one, other in zip(ours, theirs, strict=True))
        found.values[str(rows)] = {"same_answers": same, "rows": rows}
        if same < int(_SAME * rows):
            found.problems.append(f"{rows - same} of {rows} rows differ")
    told = ", ".join(f"{each['same_answers']}/{rows}" for rows, each in found.values.items())
    found.lines.append(f"answers that are the same with and without graphs: {told}")
    return found


def pace(check: Check) -> Found:
    """Milliseconds from result to result while all rows decode: the device's time, and what the host adds to it.

    As a server has it, but for the server: plans are there when they are wanted.
    """
    found, runner = Found(), _graphed(check)
    how = SamplingParams(temperature=0.6, seed=3)
    for rows in (2,) if check.fake else (1, 64, 256):
        for in_flight in (2,) if check.fake else (1, 2, 3):
            seen: list[tuple[float, StepResult]] = []
            drive(
                runner,
                _prompts(rows, check),
                _count(check),
                block_size=_BLOCK_SIZE,
                chunk=64,
                in_flight=in_flight,
                sampling=how,
                together=True,
                heard=lambda result, seen=seen: seen.append((time.perf_counter(), result)),  # type: ignore[misc]
            )
            steps = seen[-(_count(check) - 1) :]
            gaps = [after - before for (before, _), (after, _) in pairwise(steps)] or [0.0]
            found.values[f"{rows} rows, {in_flight} in flight"] = {
                "ms": round(statistics.median(gaps) * 1e3, 3),
                "compute_ms": round(statistics.median(result.compute_ns for _, result in steps) / 1e6, 3),
                "idle_ms": round(statistics.median(result.idle_ns for _, result in steps) / 1e6, 3),
            }
    told = ", ".join(f"{name} {each['ms']:.2f} ({each['idle_ms']:.2f} idle)" for name, each in found.values.items())
    found.lines.append(f"ms from result to result: {told}")
    return found


def _graphed(check: Check) -> Any:
    """The runner with all its graphs."""
    if not _captured:
        _captured.append(_runner(check, graphs=True))
        while _captured[0].idle():
            pass
    return _captured[0]


def _runner(check: Check, *, graphs: bool) -> Any:
    most = 3 if check.fake else 256
    return runner_for(
        check,
        model_folder(check.folder, check.device, fake=check.fake),
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
    return 2 if check.fake else 24


def _summary(runner: Any) -> str:
    graphs = getattr(runner, "_graphs", None)
    return "" if graphs is None else str(graphs.summary())


def _free(check: Check) -> int:
    if check.fake:
        return 0
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    return int(torch.cuda.mem_get_info()[0])
