"""What the scheduler costs: bytes of a plan, time of its codec, time of a step. No model, no socket.

Run it with `python -m tests.benchmarks.bench_scheduler [--steps 500] [--json FILE]`.

The executor is replaced by the least that can answer a plan; what it needs is not measured. Requests come at the rate
at which others end, so every scenario holds its number of rows. Two steps are in flight, as in service. Times are CPU
time of the one thread: nothing here waits, and a busy machine does not change them much.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from collections import defaultdict, deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final

from common.sampling import SamplingParams, StopConditions
from common.step import ExecutorFacts, StepPlan, StepResult
from common.types import SlotRef
from protos import executor_pb2 as pb
from scheduler.scheduler import Scheduler, SchedulerLimits
from services import codec_link

VOCAB_SIZE: Final = 50_000
BLOCK_SIZE: Final = 16
CREDIT: Final = 2

MAX_DECODE_PLAN_BYTES: Final = 4096
MAX_CODEC_US: Final = 50.0
MAX_STEP_US: Final = 1000.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Scenario:
    """A load that keeps its shape."""

    name: str
    rows: int  # sequences that run
    num_waiting: int = 0  # sequences in the line behind them
    tenants: int = 0  # who send them, in turns; 0: nobody has a name
    prompt: int = 256  # tokens of each prompt
    shared: int = 0  # of these, tokens that all prompts begin with
    max_tokens: int = 1 << 20  # nobody ends
    num_blocks: int = 1 << 17
    token_budget: int = 2048
    warm_up: int = 200  # steps that are not measured


SCENARIOS: Final = (
    Scenario(name="decode", rows=32),
    Scenario(name="decode", rows=256),
    Scenario(name="mixed", rows=32, prompt=1500, shared=500, max_tokens=64),
    Scenario(name="mixed", rows=256, prompt=1500, shared=500, max_tokens=400),
    Scenario(name="decode, 5000 wait", rows=256, num_waiting=5000),
    Scenario(name="mixed, 5000 wait", rows=256, num_waiting=5000, prompt=1500, shared=500, max_tokens=400),
    Scenario(
        name="mixed, 5000 of 1000 tenants wait",
        rows=256,
        num_waiting=5000,
        tenants=1000,
        prompt=1500,
        shared=500,
        max_tokens=400,
    ),
    Scenario(name="memory short", rows=256, num_waiting=500, prompt=700, max_tokens=400, num_blocks=9000),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """One quantity over all measured steps."""

    median: float
    mean: float
    worst: float

    @classmethod
    def of(cls, values: list[float]) -> Cost:
        """Sum up the steps."""
        return cls(median=statistics.median(values), mean=statistics.fmean(values), worst=max(values))


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """What one scenario cost, a step. Times in microseconds of CPU time."""

    scenario: str
    rows: int
    plan_bytes: Cost
    result_bytes: Cost
    plan_encode_us: Cost
    plan_decode_us: Cost
    result_encode_us: Cost
    result_decode_us: Cost
    schedule_us: Cost
    update_us: Cost
    step_us: Cost  # schedule and update
    tokens: float  # mean, a step
    preemptions: int
    steps_per_s: float  # what the scheduler's process could sustain: schedule, encode, decode, update, on average


class Answerer:
    """The least an executor can be: knows how far each sequence is, and answers the same token for all."""

    def __init__(self) -> None:
        self._position: dict[SlotRef, int] = {}
        self._known: dict[SlotRef, int] = {}
        self._num_prompt: dict[SlotRef, int] = {}
        self._max_tokens: dict[SlotRef, int] = {}

    def execute(self, plan: StepPlan) -> StepResult:
        """Answer a plan, without looking at a block."""
        for ref in plan.released:
            del self._position[ref]
        for new in plan.new:
            self._position[new.ref] = new.num_computed
            self._known[new.ref] = len(new.token_ids)
            self._num_prompt[new.ref] = new.num_prompt
            self._max_tokens[new.ref] = new.max_tokens
        refs: list[SlotRef] = []
        indices: list[int] = []
        for ref, count in zip(plan.refs, plan.num_scheduled, strict=True):
            index = self._known[ref] - self._num_prompt[ref]
            if index == self._max_tokens[ref]:
                continue
            self._position[ref] += count
            if self._position[ref] == self._known[ref]:
                self._known[ref] += 1
                refs.append(ref)
                indices.append(index)
        return StepResult(step=plan.step, refs=refs, tokens=[7] * len(refs), indices=indices)


class Stopwatch:
    """Microseconds of each piece of work, by name."""

    def __init__(self) -> None:
        self.laps: dict[str, list[float]] = defaultdict(list)

    @contextmanager
    def time(self, name: str) -> Iterator[None]:
        """Time what is inside."""
        started = time.thread_time_ns()
        yield
        self.laps[name].append((time.thread_time_ns() - started) / 1000)


def measure(scenario: Scenario, num_steps: int) -> Report:
    """Run a scenario for `num_steps` steps after its warm-up."""
    draw = random.Random(0)
    limits = SchedulerLimits(token_budget=scenario.token_budget, max_running=scenario.rows)
    scheduler = Scheduler(limits, model="bench", eos=frozenset({2}), secret=b"bench")
    scheduler.join(0, _facts(scenario), 0)
    executor, unanswered = Answerer(), deque[StepPlan]()
    shared = [draw.randrange(VOCAB_SIZE) for _ in range(scenario.shared)]
    watch = Stopwatch()
    rows: list[int] = []
    tokens: list[int] = []
    num_added = 0

    for step in range(scenario.warm_up + num_steps):
        if step == scenario.warm_up:
            watch.laps.clear()
            rows.clear()
            tokens.clear()
        while scheduler.num_sequences < scenario.rows + scenario.num_waiting:
            own = [draw.randrange(VOCAB_SIZE) for _ in range(scenario.prompt - scenario.shared)]
            # the first ones end one after the other, so that the load is even from the start
            share = draw.uniform(0.1, 1.0) if step == 0 else 1.0
            stop = StopConditions(max_tokens=max(1, int(scenario.max_tokens * share)))
            tenant = f"tenant {num_added % scenario.tenants}" if scenario.tenants else ""
            scheduler.add([*shared, *own], SamplingParams(seed=step), stop, step, tenant=tenant)
            num_added += 1

        while len(unanswered) < CREDIT:
            with watch.time("schedule"):
                plan = scheduler.schedule(0, step)
            if plan is None:
                break
            rows.append(len(plan.refs))
            tokens.append(plan.num_tokens)
            unanswered.append(_over_the_wire(plan, watch))

        result = _back_over_the_wire(executor.execute(unanswered.popleft()), watch)
        with watch.time("update"):
            scheduler.update(0, result, step)

    laps = watch.laps
    steps = [schedule + update for schedule, update in zip(laps["schedule"], laps["update"], strict=True)]
    ours = [sum(lap) for lap in zip(steps, laps["plan_encode"], laps["result_decode"], strict=True)]
    return Report(
        scenario=scenario.name,
        rows=round(statistics.fmean(rows)),
        tokens=statistics.fmean(tokens),
        preemptions=scheduler.counters.preemptions,
        plan_bytes=Cost.of(laps["plan_bytes"]),
        result_bytes=Cost.of(laps["result_bytes"]),
        plan_encode_us=Cost.of(laps["plan_encode"]),
        plan_decode_us=Cost.of(laps["plan_decode"]),
        result_encode_us=Cost.of(laps["result_encode"]),
        result_decode_us=Cost.of(laps["result_decode"]),
        schedule_us=Cost.of(laps["schedule"]),
        update_us=Cost.of(laps["update"]),
        step_us=Cost.of(steps),
        steps_per_s=1e6 / statistics.fmean(ours),
    )


def _facts(scenario: Scenario) -> ExecutorFacts:
    return ExecutorFacts(
        name="bench",
        model="bench",
        model_digest="",
        vocab_size=VOCAB_SIZE,
        max_model_len=1 << 21,
        num_blocks=scenario.num_blocks,
        block_size=BLOCK_SIZE,
        max_sequences=scenario.rows,
        max_step_tokens=scenario.token_budget,
        credit=CREDIT,
    )


def _over_the_wire(plan: StepPlan, watch: Stopwatch) -> StepPlan:
    with watch.time("plan_encode"):
        wire = codec_link.plan_to_pb(plan, 1).SerializeToString()
    watch.laps["plan_bytes"].append(len(wire))
    with watch.time("plan_decode"):
        return codec_link.plan_from_pb(pb.StepPlan.FromString(wire))


def _back_over_the_wire(result: StepResult, watch: Stopwatch) -> StepResult:
    with watch.time("result_encode"):
        wire = codec_link.result_to_pb(result, 1).SerializeToString()
    watch.laps["result_bytes"].append(len(wire))
    with watch.time("result_decode"):
        return codec_link.result_from_pb(pb.StepResult.FromString(wire))


def _cells(r: Report) -> tuple[str, ...]:
    return (
        r.scenario,
        f"{r.rows}",
        f"{r.tokens:.0f}",
        f"{r.plan_bytes.median:.0f} / {r.plan_bytes.worst:.0f}",
        f"{r.plan_encode_us.median:.0f}",
        f"{r.plan_decode_us.median:.0f}",
        f"{r.result_encode_us.median:.0f} + {r.result_decode_us.median:.0f}",
        f"{r.schedule_us.median:.0f} / {r.schedule_us.worst:.0f}",
        f"{r.update_us.median:.0f} / {r.update_us.worst:.0f}",
        f"{r.step_us.median:.0f}",
        f"{r.steps_per_s:.0f}",
    )


def _table(reports: list[Report]) -> str:
    head = (
        "scenario",
        "rows",
        "tokens",
        "plan bytes",
        "encode µs",
        "decode µs",
        "result µs",
        "schedule µs",
        "update µs",
    )
    lines = [(*head, "step µs", "steps/s"), *(_cells(report) for report in reports)]
    widths = [max(len(cell) for cell in column) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in lines)


def over_budget(report: Report) -> list[str]:
    """The budgets that a scenario missed, in words. Plans with whole prompts in them have no budget of bytes."""
    missed = []
    if report.scenario == "decode" and report.plan_bytes.worst > MAX_DECODE_PLAN_BYTES:
        missed.append(f"{report.plan_bytes.worst:.0f} bytes of plan, at most {MAX_DECODE_PLAN_BYTES}")
    if report.step_us.median > MAX_STEP_US:
        missed.append(f"{report.step_us.median:.0f} µs a step, at most {MAX_STEP_US:.0f}")
    for name in ("plan_encode_us", "plan_decode_us", "result_encode_us", "result_decode_us"):
        cost: Cost = getattr(report, name)
        if cost.median > MAX_CODEC_US:
            missed.append(f"{name} {cost.median:.0f}, at most {MAX_CODEC_US:.0f}")
    return missed


def main() -> None:
    """Print the table and what is over budget; write all numbers where asked."""
    parser = argparse.ArgumentParser(description="What the scheduler costs: bytes of a plan, time of a step.")
    parser.add_argument("--steps", type=int, default=500, help="measured steps of each scenario")
    parser.add_argument("--only", default="", help="scenarios whose name begins so")
    parser.add_argument("--json", type=Path, help="write all numbers to this file")
    options = parser.parse_args()
    reports = [measure(s, options.steps) for s in SCENARIOS if s.name.startswith(options.only)]
    print(_table(reports))
    print("median / worst over the steps; result: encode + decode; steps/s: schedule, encode, decode and update alone")
    for report in reports:
        for missed in over_budget(report):
            print(f"over budget: {report.scenario}, {report.rows} rows: {missed}")
    if options.json:
        options.json.write_text(json.dumps([asdict(report) for report in reports], indent=2) + "\n")


if __name__ == "__main__":
    main()
