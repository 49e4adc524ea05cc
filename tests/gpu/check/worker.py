"""Runs the stages that it is told, part after part, in a process that may die: python -m tests.gpu.check.worker.

A kernel that reads where it must not leaves the device unusable for its whole process. So whoever started this one
starts another, which goes on after the part that did it.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import sys
import time
import traceback
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Final

from tests.gpu.check.journal import FAILED, NO_DEVICE, OK, SKIPPED, Journal
from tests.gpu.check.stages import STAGES, Stage

AGAIN: Final = 75
"""The exit code of a worker whose device is lost: another one should go on."""

_FAKE_PATIENCE: Final = 8
"""How much longer a part may take before it hangs on the fake device, which is a processor with other work."""


def why_no_device() -> str | None:
    """Say why there is no GPU to check, or None."""
    import torch  # noqa: PLC0415 - seconds, and the parent does without

    if torch.version.cuda is None:
        return f"torch {torch.__version__} is built without CUDA"
    if not torch.cuda.is_available():
        return f"torch {torch.__version__} finds no CUDA device"
    return None


def run(stages: Sequence[Stage], journal: Journal, *, fake: bool, until_s: float, folder: Path, out: Path) -> int:
    """Run what the journal does not have yet; the exit code."""
    if not fake and (reason := why_no_device()) is not None:
        journal.write(NO_DEVICE, problem=reason)
        return 0
    from tests.gpu.check.parts import Check  # noqa: PLC0415 - imports torch

    for place, stage in enumerate(stages):
        reserved_s = sum(later.share_s for later in stages[place + 1 :])
        told = journal.read()
        if told.is_over(stage):
            continue
        check = Check(
            fake=fake,
            folder=folder,
            out=out,
            earlier=told.values(STAGES),
            until_s=until_s - reserved_s,
        )
        if (code := _run_stage(stage, check, journal)) is not None:
            return code
    return 0


def _run_stage(stage: Stage, check: Any, journal: Journal) -> int | None:
    try:
        parts = importlib.import_module(stage.module).parts(check)
    except Exception:  # noqa: BLE001 - whatever it was, it is told, and the next stage goes on
        journal.write(
            "stage over", stage=stage.number, problem="the stage cannot begin", traceback=traceback.format_exc()
        )
        say(f"{stage.number} {stage.name}: cannot begin: {_last_line()}")
        return None
    journal.write("stage", stage=stage.number, parts=[part.name for part in parts])
    for part in parts:
        told = journal.read()
        if part.name in told.stages[stage.number].ended:
            continue
        left_s = check.until_s - time.monotonic()
        if left_s < part.takes_s:
            reason = f"{max(0.0, left_s):.0f} s are left, it takes about {part.takes_s:.0f}"
            journal.write("end", stage=stage.number, part=part.name, status=SKIPPED, problems=[reason])
            say(f"{stage.number} {stage.name} · {part.name}: skipped: {reason}")
            continue
        limit_s = part.limit_s * (_FAKE_PATIENCE if check.fake else 1)
        journal.write("begin", stage=stage.number, part=part.name, limit_s=limit_s)
        lost = _run_part(stage, part, replace(check, earlier=told.values(STAGES)), journal)
        if lost:
            return AGAIN
    journal.write("stage over", stage=stage.number)
    return None


def _run_part(stage: Stage, part: Any, check: Any, journal: Journal) -> bool:
    """Run one part and write what came of it. True when the device cannot be used any more."""
    from tests.gpu.check.parts import Found, Skipped  # noqa: PLC0415 - imports torch

    began_s = time.monotonic()
    trace, found, status = "", Found(), OK
    try:
        found = part.work(check)
        status = FAILED if found.problems else OK
    except Skipped as reason:
        found, status = Found(problems=[str(reason)]), SKIPPED
    except Exception as error:  # noqa: BLE001 - whatever it was, it is told, and the next part goes on
        status, trace = FAILED, traceback.format_exc()
        found = Found(problems=[f"{type(error).__name__}: {error}"[:400]])
    lost = not check.fake and not _device_answers()
    seconds = time.monotonic() - began_s
    journal.write(
        "end",
        stage=stage.number,
        part=part.name,
        status=status,
        seconds=round(seconds, 2),
        values=found.values,
        lines=found.lines,
        aims=[{**asdict(aim), "met": aim.met} for aim in found.aims],
        problems=found.problems + (["the device is lost: the rest runs in another process"] if lost else []),
        traceback=trace,
    )
    what = "; ".join(found.lines[:1]) if status == OK else "; ".join(found.problems)[:300]
    say(f"{stage.number} {stage.name} · {part.name}: {status} in {seconds:.1f} s{': ' if what else ''}{what}")
    return lost


def _device_answers() -> bool:
    import torch  # noqa: PLC0415

    try:
        torch.cuda.synchronize()
        gc.collect()
        torch.cuda.empty_cache()
    except RuntimeError:
        return False
    return True


def _last_line() -> str:
    return traceback.format_exc().strip().split("\n")[-1][:300]


def say(line: str) -> None:
    """A line of progress."""
    print(line, flush=True)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--stages", required=True, help="NUMBER:SECONDS,... that are left for each")
    parser.add_argument("--journal", type=Path, required=True)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--until", type=float, required=True)
    parser.add_argument("--fake", action="store_true")
    parsed = parser.parse_args(arguments)
    shares = {
        int(number): float(share_s) for number, _, share_s in (s.partition(":") for s in parsed.stages.split(","))
    }
    return run(
        [replace(stage, share_s=shares[stage.number]) for stage in STAGES if stage.number in shares],
        Journal(parsed.journal),
        fake=parsed.fake,
        until_s=parsed.until,
        folder=parsed.folder,
        out=parsed.out,
    )


if __name__ == "__main__":
    sys.exit(main())
