"""Stage 6: the real server, a scheduler and an executor as processes of their own, on nano-vLLM's workload."""

from __future__ import annotations

import asyncio
import contextlib
import json
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

from protos import monitoring_pb2
from services.client import status
from tests.benchmarks.metrics import Summary, summarize
from tests.benchmarks.playing import Answer
from tests.benchmarks.workloads import Workload
from tests.e2e.cluster import ROOT, Cluster
from tests.gpu.check.checkpoint import model_folder
from tests.gpu.check.client import share
from tests.gpu.check.offline import MAX_MODEL_LEN, NUM_REQUESTS, alone, offline
from tests.gpu.check.parts import Aim, Check, Found, Part

IDLE_RATIO: Final = 0.03
CLIENTS: Final = 8  # processes that share the requests
RUNS: Final = 3
_CAPTURE_S: Final = 40.0
_RUN_S: Final = 20.0  # a run is not begun with less left
_SETTLE_S: Final = 0.3  # from the last word that clients are ready to their common beginning

SCHEDULER: Final = ("--token-budget=8192", f"--max-running={NUM_REQUESTS}", "--reserve=0")
EXECUTOR: Final = (f"--max-sequences={NUM_REQUESTS}", f"--max-model-len={MAX_MODEL_LEN}", "--max-step-tokens=8192")


def parts(check: Check) -> list[Part]:
    """The folder, then everything that needs a running server."""
    return [
        Part(name="checkpoint", work=checkpoint, takes_s=5),
        Part(name="nano-vLLM's workload", work=workload, takes_s=45, limit_s=240),
    ]


def checkpoint(check: Check) -> Found:
    """Random weights in a folder that every engine reads."""
    began_s = time.monotonic()
    folder = model_folder(check.folder, check.device, fake=check.fake)
    size = sum(file.stat().st_size for file in folder.iterdir())
    return Found(
        values={"seconds": round(time.monotonic() - began_s, 2), "mib": round(size / 2**20)},
        lines=[f"a folder of {size / 2**20:,.0f} MiB"],
    )


def workload(check: Check) -> Found:
    """Start, warm up, play the workload a few times, then single streams."""
    if not check.fake:
        import torch  # noqa: PLC0415 - what drawing the weights took is the server's now

        torch.cuda.empty_cache()
    with _started(check) as (cluster, ready_s):
        return asyncio.run(_measure(check, cluster, ready_s))


@contextmanager
def _started(check: Check) -> Iterator[tuple[Cluster, float]]:
    """A scheduler and an executor, joined, and the seconds that took. Their logs end up beside the report."""
    folder = Path(tempfile.mkdtemp(prefix="pagewire-"))  # its sockets need a short path
    cluster: Cluster | None = None
    began_s = time.monotonic()
    try:
        cluster = Cluster(model_folder(check.folder, check.device, fake=check.fake), folder, flags=SCHEDULER)
        cluster.start_executor(*EXECUTOR, fake=check.fake)
        yield cluster, time.monotonic() - began_s
    finally:
        if cluster is not None:
            cluster.close()
        for log in folder.glob("*.log"):
            shutil.copy(log, check.out / f"server-{log.name}")
        shutil.rmtree(folder, ignore_errors=True)


async def _measure(check: Check, cluster: Cluster, ready_s: float) -> Found:
    found = Found(values={"ready_s": round(ready_s, 1), "scheduler": SCHEDULER, "executor": EXECUTOR, "runs": []})
    log = cluster.executors[0].log
    await _play(check, cluster, alone(tiny=check.fake), -1)  # every kernel is compiled, every path was gone once
    await _play(check, cluster, offline(RUNS, tiny=check.fake, short=True), RUNS, "--short")
    await _all_captured(log)
    for run in range(1 if check.fake else RUNS):
        if run and check.until_s - time.monotonic() < _RUN_S:
            break
        found.values["runs"].append(told := await _one_run(check, cluster, run))
        print(f"  run {run}: {told['output_tokens_per_s']:,.0f} tokens/s, idle {told['idle_ratio']:.1%}", flush=True)
    runs = sorted(found.values["runs"], key=lambda told: float(told["output_tokens_per_s"]))
    middle = runs[len(runs) // 2]
    single = summarize(alone(tiny=check.fake), await _play(check, cluster, alone(tiny=check.fake), -1))
    found.values |= {
        "output_tokens_per_s": middle["output_tokens_per_s"],
        "idle_ratio": middle["idle_ratio"],
        "alone": asdict(single),
        "executor_log": _lines(log)[-40:],
    }
    found.lines += [
        f"{middle['output_tokens_per_s']:,.0f} output tokens/s, the middle one of {len(runs)} runs",
        f"first token {_p50(middle['ttft_ms']):.0f} ms, gaps {_p50(middle['itl_ms']):.1f} ms at the median",
        f"a step computes {middle['compute_ms_a_step']:.2f} ms; the executor is idle {middle['idle_ratio']:.1%}",
        f"the scheduler's process takes {middle['scheduler_cpu_us_per_token']:.1f} µs of CPU a token",
        f"alone: first token {_p50(asdict(single)['ttft_ms']):.1f} ms, then {_p50(asdict(single)['tpot_ms']):.2f} ms",
    ]
    found.aims.append(
        Aim(what="the executor's idle share of its working time", measured=middle["idle_ratio"], bound=IDLE_RATIO)
    )
    found.problems += [error for told in runs for error in told["errors"]]
    if any(told["short_of_asked"] for told in runs):
        found.problems.append("answers are shorter than they were asked to be")
    return found


async def _all_captured(log: Path) -> None:
    """Wait until the executor has captured its graphs, which it does while it has nothing else to do."""
    give_up_s = time.monotonic() + _CAPTURE_S
    while time.monotonic() < give_up_s:
        told = [line for line in _lines(log) if "decode graphs" in line]
        if not told or "more when" not in told[-1]:
            return
        await asyncio.sleep(0.2)


async def _one_run(check: Check, cluster: Cluster, run: int) -> dict[str, Any]:
    wanted = offline(run, tiny=check.fake)
    before = await status(cluster.admin)
    answers = await _play(check, cluster, wanted, run)
    after = await status(cluster.admin)
    summary = summarize(wanted, answers)
    return {**asdict(summary), **_delta(before, after, summary)}


def _delta(
    before: monitoring_pb2.GetStatusResponse, after: monitoring_pb2.GetStatusResponse, summary: Summary
) -> dict[str, Any]:
    """What the server says of itself, between the two."""
    first, last = before.executors[0], after.executors[0]
    compute_ns, idle_ns = last.compute_ns - first.compute_ns, last.idle_ns - first.idle_ns
    steps = last.steps - first.steps
    cpu_ns = after.scheduler.cpu_ns - before.scheduler.cpu_ns
    return {
        "idle_ratio": round(idle_ns / max(1, compute_ns + idle_ns), 4),
        "steps": steps,
        "compute_ms_a_step": round(compute_ns / 1e6 / max(1, steps), 3),
        "scheduler_cpu_us_per_token": round(cpu_ns / 1e3 / max(1, summary.output_tokens), 2),
        "preemptions": after.scheduler.preemptions - before.scheduler.preemptions,
    }


async def _play(check: Check, cluster: Cluster, wanted: Workload, run: int, *flags: str) -> list[Answer]:
    """Have the client processes play it, all from the same moment; times are from that moment."""
    count = 1 if wanted.one_at_a_time else 2 if check.fake else CLIENTS
    command = ["-m", "tests.gpu.check.client", f"--address={cluster.address}", f"--run={run}", f"--count={count}"]
    command += [*flags, *(("--tiny",) if check.fake else ())]
    pipe = asyncio.subprocess.PIPE
    clients = [
        await asyncio.create_subprocess_exec(
            sys.executable,
            *(*command, f"--number={number}"),
            cwd=ROOT,
            stdin=pipe,
            stdout=pipe,
            limit=1 << 28,
        )
        for number in range(count)
    ]
    try:
        for client in clients:
            assert client.stdout is not None
            if (await client.stdout.readline()).strip() != b"ready":
                raise RuntimeError("a client process ended before it was ready; its words are above")
        begin = f"{time.perf_counter() + _SETTLE_S}\n".encode()
        told = await asyncio.gather(*(client.communicate(begin) for client in clients))
    finally:
        for client in clients:
            with contextlib.suppress(ProcessLookupError):
                client.kill()
            await client.wait()
    answers: list[Answer] = []
    for number, (out, _) in enumerate(told):
        for request, row in zip(share(wanted, number, count).requests, json.loads(out), strict=True):
            answers.append(Answer(request=request, **row))
    return answers


def _lines(log: Path) -> list[str]:
    return log.read_text(errors="replace").split("\n")


def _p50(spread: dict[str, float] | None) -> float:
    return spread["p50"] if spread else 0.0
