"""pagewire.v1.MonitoringService: what the scheduler did, what it holds, and how busy its executors are."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator
from contextlib import aclosing

from protos import inference_pb2
from protos import monitoring_pb2 as pb
from scheduler.session import Session
from services import explain
from services.engine import Engine
from services.handlers import Context
from services.latencies import Latencies
from services.live_state import Camera, Watchers


class Monitoring:
    """Counts the CPU time of this process from now on."""

    def __init__(self, engine: Engine, latencies: Latencies | None = None) -> None:
        """`latencies`: whoever makes the engine lets it feed them."""
        self._scheduler = engine.scheduler
        self._admission = engine.admission
        self._timelines = engine.timelines
        self._latencies = latencies or Latencies()
        self._began_ns = time.monotonic_ns()
        self._cpu_began_ns = time.process_time_ns()
        self._watchers = Watchers(Camera(engine.scheduler, self.status))

    async def GetStatus(self, request: pb.GetStatusRequest, context: Context) -> pb.GetStatusResponse:  # noqa: N802
        """All of it, as it is now."""
        return self.status()

    async def WatchState(  # noqa: N802
        self, request: pb.WatchStateRequest, context: Context
    ) -> AsyncGenerator[pb.WatchStateResponse, None]:
        """What happens, until the caller leaves."""
        async with aclosing(self._watchers.watch(request.interval_ms)) as states:
            async for state in states:
                yield state

    def status(self) -> pb.GetStatusResponse:
        """What GetStatus tells."""
        counters = self._scheduler.counters
        cpu_ns = time.process_time_ns() - self._cpu_began_ns
        sessions = self._scheduler.sessions
        now_ns = time.monotonic_ns()  # the engine's clock, too
        self._scheduler.prefixes.end_pins(now_ns)
        return pb.GetStatusResponse(
            scheduler=pb.SchedulerStatus(
                uptime_ns=time.monotonic_ns() - self._began_ns,
                cpu_ns=cpu_ns,
                cpu_us_per_output_token=cpu_ns / 1000 / counters.output_tokens if counters.output_tokens else 0.0,
                num_running=sum(len(session.running) for session in sessions),
                num_waiting=len(self._scheduler.waiting),
                steps=counters.steps,
                prompt_tokens=counters.prompt_tokens,
                cached_prompt_tokens=counters.cached_prompt_tokens,
                output_tokens=counters.output_tokens,
                preemptions=counters.preemptions,
                moved_sequences=counters.moved,
                dropped_rows=counters.rows_dropped,
                finished_sequences={
                    inference_pb2.FinishReason.Name(inference_pb2.FinishReason.ValueType(reason)): count
                    for reason, count in counters.finished.items()
                },
                waiting_tokens=self._scheduler.waiting.num_tokens,
                refused_requests=dict(self._admission.refusals.items()),
                line_tokens_per_s=self._admission.rate.tokens_per_s or 0.0,
                executor_losses=self._losses(now_ns),
                pins=pb.PinStatus(
                    num_pins=len(self._scheduler.prefixes.pins),
                    tokens=self._scheduler.prefixes.pins.num_tokens,
                    tokens_by_tenant=self._scheduler.prefixes.pins.tokens_by_tenant,
                ),
                drafted_tokens=counters.drafted_tokens,
                accepted_tokens=counters.accepted_tokens,
                speculating_rows=counters.speculating_rows,
                latencies=self._latencies.to_pb(),
            ),
            executors=[_executor_status(session, now_ns) for session in sessions],
        )

    async def Explain(self, request: pb.ExplainRequest, context: Context) -> pb.ExplainResponse:  # noqa: N802
        """What happened to one request. Raises UnknownRequest."""
        tenant = request.tenant if request.HasField("tenant") else None
        return explain.response_of(self._timelines.find(request.request_id, tenant), time.monotonic_ns())

    def _losses(self, now_ns: int) -> pb.ExecutorLosses:
        scheduler, counters = self._scheduler, self._scheduler.counters
        return pb.ExecutorLosses(
            unclean_ends=counters.unclean_ends,
            suspected_requests=counters.suspected,
            trials=counters.trials,
            given_up_requests=counters.given_up,
            unusable_rows=counters.rows_unusable,
            quarantines=counters.quarantines,
            fenced_results=counters.results_fenced,
            num_suspects=scheduler.num_suspects,
            num_quarantined=sum(session.is_quarantined(now_ns) for session in scheduler.sessions),
        )


def lines(status: pb.GetStatusResponse) -> list[str]:
    """The status for people: a line for the scheduler, and one for each executor."""
    s = status.scheduler
    scheduler = (
        f"scheduler: up {s.uptime_ns / 1e9:.0f} s, {s.num_running} sequences run, {s.num_waiting} wait "
        f"({s.waiting_tokens} tokens), {sum(s.refused_requests.values())} requests refused, "
        f"{s.output_tokens} tokens made at {s.cpu_us_per_output_token:.0f} µs of CPU each"
    )
    losses = s.executor_losses
    lost = (
        f"executors lost: {losses.unclean_ends}; requests given up for that: {losses.given_up_requests}, under "
        f"suspicion: {losses.num_suspects}; rows that could not be used: {losses.unusable_rows}"
    )
    guessed = (
        f"speculation: {s.accepted_tokens} of {s.drafted_tokens} guessed tokens were right, "
        f"{1 + s.accepted_tokens / max(1, s.speculating_rows):.2f} tokens a row that guessed"
    )
    executors = [
        f"{e.name}: {e.dtype} on {e.device}, {e.num_running} sequences run, {e.num_free_blocks} of {e.num_blocks} "
        f"blocks free{_pinned(e)}, idle for {100 * e.idle_ratio:.1f}% of its working time{_marks(e)}"
        for e in status.executors
    ]
    had_losses = losses.unclean_ends or losses.unusable_rows
    return [scheduler, *([lost] if had_losses else []), *([guessed] if s.speculating_rows else []), *executors]


def _pinned(e: pb.ExecutorStatus) -> str:
    """Of the blocks, those that are pinned, if there are any."""
    return f", {e.num_pinned_blocks} pinned" if e.num_pinned_blocks else ""


def _marks(e: pb.ExecutorStatus) -> str:
    """Why the executor gets less than others."""
    marks = {"leaving": e.leaving, "silent": e.silent, "in quarantine": e.quarantined, "held back": e.held_back}
    return "".join(f", {mark}" for mark, is_so in marks.items() if is_so)


def _executor_status(session: Session, now_ns: int) -> pb.ExecutorStatus:
    facts, occupancy = session.facts, session.occupancy
    return pb.ExecutorStatus(
        name=facts.name,
        session=session.id,
        device=facts.device,
        dtype=facts.dtype,
        leaving=session.leaving,
        num_running=len(session.running),
        steps_in_flight=len(session.outstanding),
        num_blocks=facts.num_blocks,
        num_free_blocks=session.pool.num_free,
        steps=occupancy.num_steps,
        compute_ns=occupancy.compute_ns,
        idle_ns=occupancy.idle_ns,
        idle_ratio=occupancy.idle_ratio,
        silent=session.silent,
        quarantined=session.is_quarantined(now_ns),
        held_back=now_ns < session.held_until_ns,
        num_pinned_blocks=session.pool.num_kept,
        block_size=facts.block_size,
    )
