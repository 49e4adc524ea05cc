"""The check as a whole: workers one after the other, the time they have, and the report.

It measures nothing itself and holds no tensor, so nothing that happens on the device can keep it from telling the rest.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime as dt
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from tests.gpu.check import render
from tests.gpu.check.journal import FAILED, SKIPPED, History, Journal
from tests.gpu.check.stages import STAGES, Stage, selected, within

ROOT: Final = Path(__file__).resolve().parents[3]
_LOOK_S: Final = 0.1
_GRACE_S: Final = 10.0  # after its budget, for a part that is nearly done
_ROOM_BYTES: Final = 4 << 30


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What is asked for."""

    stages: Sequence[Stage]
    fake: bool
    budget_s: float
    out: Path
    command: str


class Program:
    """One check as it runs."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._began_s = time.monotonic()
        self._journal = Journal(settings.out / "journal.jsonl")
        self._folder = Path()  # of the models, while it runs

    def run(self) -> dict[str, Any]:
        """Run every stage; return the report, which is on disk already."""
        self._folder = _roomy_folder()
        try:
            for group, reserved_s in _groups(self._settings.stages, self._settings.budget_s):
                self._run_group(group, reserved_s)
                if self._journal.read().no_device:
                    break
        finally:
            shutil.rmtree(self._folder, ignore_errors=True)
            report = self._save()
        return report

    def _run_group(self, group: Sequence[Stage], reserved_s: float) -> None:
        """Start workers until nothing is left: each goes on where the one before it ended."""
        until_s = self._began_s + self._settings.budget_s - reserved_s
        while time.monotonic() < until_s + _GRACE_S:
            before = self._journal.read()
            ending = self._worker(group, until_s)
            after = self._journal.read()
            if after.running is not None:
                stage, part, since_s = after.running
                seconds = round(time.monotonic() - since_s, 2)
                self._journal.write("end", stage=stage, part=part, status=FAILED, seconds=seconds, problems=[ending])
                print(f"{stage} {STAGES[stage].name} · {part}: failed: {ending}", flush=True)
            if after.no_device or all(after.is_over(stage) for stage in group):
                return
            if after.running is None and _progress(before, group) == _progress(after, group):
                stuck = next(stage for stage in group if not after.is_over(stage))
                problem = f"its process {ending} before it did anything"
                self._journal.write("stage over", stage=stuck.number, problem=problem, traceback="")
            self._save()

    def _worker(self, group: Sequence[Stage], until_s: float) -> str:
        """Run one worker to its end, and say how it ended."""
        settings = self._settings
        command = [
            *(sys.executable, "-m", "tests.gpu.check.worker"),
            *("--stages", ",".join(f"{stage.number}:{stage.share_s:.1f}" for stage in group)),
            *("--journal", str(settings.out / "journal.jsonl"), "--folder", str(self._folder)),
            *("--out", str(settings.out), "--until", str(until_s)),
            *(("--fake",) if settings.fake else ()),
        ]
        process = subprocess.Popen(command, cwd=ROOT, env=_environment(settings.fake), start_new_session=True)
        try:
            while (code := process.poll()) is None:
                time.sleep(_LOOK_S)
                if (why := self._should_end(until_s)) is not None:
                    return why
        finally:
            with contextlib.suppress(ProcessLookupError):  # and whatever it has started
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        return f"died of {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"

    def _should_end(self, until_s: float) -> str | None:
        """Why the worker is ended now."""
        history = self._journal.read()
        now_s = time.monotonic()
        if history.running is not None:
            _, _, since_s = history.running
            if now_s - since_s > history.limit_s:
                return f"was ended after {history.limit_s:.0f} s: it hangs"
        if now_s > until_s + _GRACE_S:
            return "was ended: the budget is used up"
        return None

    def _save(self) -> dict[str, Any]:
        settings, history = self._settings, self._journal.read()
        report: dict[str, Any] = {
            "about": {
                "date": dt.datetime.now(dt.UTC).isoformat(timespec="seconds"),
                "command": settings.command,
                "fake": settings.fake,
                "budget_s": settings.budget_s,
                "took_s": round(time.monotonic() - self._began_s, 1),
                "no_device": history.no_device,
            },
            "stages": {str(stage.number): _stage_report(stage, history) for stage in settings.stages},
        }
        (settings.out / "results.json").write_text(json.dumps(report, indent=1), encoding="utf-8")
        return report


def _groups(stages: Sequence[Stage], budget_s: float) -> Iterator[tuple[list[Stage], float]]:
    """Neighbours that share a process, and the seconds that those after them should get."""
    groups: list[list[Stage]] = []
    for stage in within(stages, budget_s):
        if groups and not stage.fresh and not groups[-1][-1].fresh:
            groups[-1].append(stage)
        else:
            groups.append([stage])
    for place, group in enumerate(groups):
        yield group, sum(stage.share_s for later in groups[place + 1 :] for stage in later)


def _progress(history: History, group: Sequence[Stage]) -> int:
    told = [history.stages[stage.number] for stage in group if stage.number in history.stages]
    return sum(len(each.ended) + each.is_over for each in told)


def _stage_report(stage: Stage, history: History) -> dict[str, Any]:
    told = history.stages.get(stage.number)
    if told is None:
        return {"name": stage.name, "status": SKIPPED, "seconds": 0.0, "parts": {}}
    parts: dict[str, Any] = {
        part: {"status": SKIPPED, "problems": ["it was not reached"]} for part in told.parts if part not in told.ended
    }
    for part, end in told.ended.items():
        parts[part] = {key: value for key, value in end.items() if key not in {"event", "at_s", "stage", "part"}}
    report = {
        "name": stage.name,
        "status": told.status,
        "seconds": round(sum(end.get("seconds", 0.0) for end in told.ended.values()), 1),
        "parts": parts,
    }
    if told.problem is not None:
        report |= {"problem": told.problem["problem"], "traceback": told.problem["traceback"]}
    return report


def _environment(fake: bool) -> dict[str, str]:
    """Of a worker. Triton reads how it is to run when kernels are declared, so before anything is imported."""
    environment = {**os.environ, "PYTHONUNBUFFERED": "1", "TOKENIZERS_PARALLELISM": "false"}
    if fake:
        environment |= {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    else:
        environment.pop("TRITON_INTERPRET", None)
    return environment


def _roomy_folder() -> Path:
    """A new folder in memory where that is large enough, for models; else in the temporary files."""
    memory = Path("/dev/shm")
    if memory.is_dir() and os.access(memory, os.W_OK) and shutil.disk_usage(memory).free > _ROOM_BYTES:
        return Path(tempfile.mkdtemp(prefix="pagewire-check-", dir=memory))
    return Path(tempfile.mkdtemp(prefix="pagewire-check-"))


def main(arguments: Sequence[str] | None = None) -> int:
    """Check; the exit code is 0 also where there is no GPU, and 1 where a stage failed."""
    parser = argparse.ArgumentParser(description="Check and measure everything on a GPU.")
    parser.add_argument("--budget", type=float, default=480.0, help="seconds for everything")
    parser.add_argument("--out", type=Path, default=Path("build/gpu-check"), help="folder for what is found")
    parser.add_argument("--stages", default="", help="only these: 0,1,4")
    parser.add_argument("--peers", action="store_true", help="run the same workload with the engines found installed")
    parser.add_argument("--device", choices=("auto", "fake"), default="auto", help="fake: on the CPU, tiny, for CI")
    parsed = parser.parse_args(arguments)
    try:
        stages = selected(parsed.stages, peers=parsed.peers)
    except ValueError as error:
        parser.error(str(error))
    parsed.out.mkdir(parents=True, exist_ok=True)
    (parsed.out / "journal.jsonl").unlink(missing_ok=True)
    told = sys.argv[1:] if arguments is None else arguments
    settings = Settings(
        stages=stages,
        fake=parsed.device == "fake",
        budget_s=parsed.budget,
        out=parsed.out.resolve(),
        command=f"python -m tests.gpu.check {shlex.join(told)}",
    )
    signal.signal(signal.SIGTERM, _interrupt)  # who sets a limit from outside still gets what was found
    try:
        report = Program(settings).run()
    except KeyboardInterrupt:
        print("interrupted")
        report = json.loads((settings.out / "results.json").read_text(encoding="utf-8"))
    if report["about"]["no_device"]:
        print(f"No GPU to check: {report['about']['no_device']}. Nothing was measured.")
        return 0
    print("\n" + render.table(report), flush=True)
    return int(any(stage["status"] == FAILED for stage in report["stages"].values()))


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt
