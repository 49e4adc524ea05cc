"""/metrics for Prometheus: what this gateway did, and what the scheduler beside it tells its operator.

Five values also have the names that the Kubernetes gateway for inference reads of vLLM (Gateway API Inference
Extension: its endpoint picker routes by them). No label can hold a caller's words.
"""

from __future__ import annotations

import asyncio
import time
from bisect import bisect_left
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Final

from common.errors import PagewireError
from protos import monitoring_pb2 as pb

# OpenTelemetry's buckets for gen_ai.server.time_to_first_token and gen_ai.server.request.duration, in seconds.
_FIRST_TOKEN_S: Final = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0)
_REQUEST_S: Final = (0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1.28, 2.56, 5.12, 10.24, 20.48, 40.96, 81.92)

_PATHS: Final = frozenset({"/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/embeddings"})

_FRESH_S: Final = 1.0  # what the scheduler said is told again for that long, however many ask

AskStatus = Callable[[], Awaitable[pb.GetStatusResponse]]


class Metrics:
    """Counts. `ask_status` asks the scheduler; without it only this process is told of."""

    def __init__(self, ask_status: AskStatus | None = None, clock_s: Callable[[], float] = time.monotonic) -> None:
        self._ask_status = ask_status
        self._clock_s = clock_s
        self._requests: Counter[tuple[str, int]] = Counter()  # by path and status
        self._first_token = _Histogram(_FIRST_TOKEN_S)
        self._whole = _Histogram(_REQUEST_S)
        self._asked: asyncio.Task[pb.GetStatusResponse | None] | None = None
        self._asked_s = 0.0
        self.num_open = 0
        self.num_connections: Callable[[], int] = lambda: 0

    @contextmanager
    def request(self, path: str) -> Iterator[Callable[[int], None]]:
        """Count a request while it is open; call what this gives with the status that it got. An empty path: none."""
        if not path:
            yield lambda status: None
            return
        began_s = self._clock_s()
        name = path if path in _PATHS else "other"

        def ended(status: int) -> None:
            self._requests[name, status] += 1
            self._whole.add(self._clock_s() - began_s)

        self.num_open += 1
        try:
            yield ended
        finally:
            self.num_open -= 1

    def first_token(self) -> Callable[[], None]:
        """A request begins: call what this gives when its first token is there."""
        began_s = self._clock_s()
        return lambda: self._first_token.add(self._clock_s() - began_s)

    async def text(self) -> str:
        """All of it, in Prometheus' text format."""
        lines = [
            *_metric(
                "pagewire_gateway_requests_total",
                "counter",
                "requests that have ended",
                {f'{{path="{path}",status="{status}"}}': count for (path, status), count in self._requests.items()},
            ),
            *_metric("pagewire_gateway_open_requests", "gauge", "requests that are open", {"": self.num_open}),
            *_metric(
                "pagewire_gateway_connections", "gauge", "connections that are open", {"": self.num_connections()}
            ),
            *self._first_token.lines(
                "pagewire_gateway_time_to_first_token_seconds", "from a request's body to its first token"
            ),
            *self._whole.lines("pagewire_gateway_request_duration_seconds", "from a request's head to its end"),
        ]
        if self._ask_status is not None:
            if (status := await self._status(self._ask_status)) is None:
                lines += _metric("pagewire_up", "gauge", "whether the scheduler answers", {"": 0})
            else:
                lines += _metric("pagewire_up", "gauge", "whether the scheduler answers", {"": 1})
                lines += of_scheduler(status.scheduler)
                lines += of_executors(status.executors)
                lines += as_vllm(status)
        return "\n".join(lines) + "\n"

    async def _status(self, ask: AskStatus) -> pb.GetStatusResponse | None:
        """What the scheduler says of itself, None where it does not: asked once at a time, and once a second."""

        async def told() -> pb.GetStatusResponse | None:
            try:
                return await ask()
            except PagewireError:
                return None

        now_s = self._clock_s()
        if self._asked is None or (self._asked.done() and now_s >= self._asked_s + _FRESH_S):
            self._asked, self._asked_s = asyncio.create_task(told()), now_s
        return await asyncio.shield(self._asked)  # who leaves takes it from nobody else


def of_scheduler(s: pb.SchedulerStatus) -> list[str]:
    """What the scheduler did and holds."""
    losses = s.executor_losses
    finished = {f'{{reason="{_word(reason)}"}}': count for reason, count in s.finished_sequences.items()}
    refused = {f'{{limit="{_word(limit)}"}}': count for limit, count in s.refused_requests.items()}
    values: Sequence[tuple[str, str, str, Mapping[str, float]]] = (
        ("uptime_seconds", "gauge", "since it became ready", {"": s.uptime_ns / 1e9}),
        ("cpu_seconds_total", "counter", "CPU time of the scheduler's process", {"": s.cpu_ns / 1e9}),
        ("running_sequences", "gauge", "sequences that an executor holds", {"": s.num_running}),
        ("waiting_sequences", "gauge", "sequences that none holds", {"": s.num_waiting}),
        ("waiting_tokens", "gauge", "what those that wait are expected to take", {"": s.waiting_tokens}),
        ("steps_total", "counter", "plans made", {"": s.steps}),
        ("prompt_tokens_total", "counter", "tokens of prompts", {"": s.prompt_tokens}),
        ("cached_prompt_tokens_total", "counter", "of those, found in a prefix cache", {"": s.cached_prompt_tokens}),
        ("output_tokens_total", "counter", "tokens of answers", {"": s.output_tokens}),
        ("preemptions_total", "counter", "sequences that gave their memory back", {"": s.preemptions}),
        ("moved_sequences_total", "counter", "sequences that lost their executor", {"": s.moved_sequences}),
        ("dropped_rows_total", "counter", "rows of results that came too late", {"": s.dropped_rows}),
        ("finished_sequences_total", "counter", "by why they ended", finished),
        ("refused_requests_total", "counter", "by the limit that they met", refused),
        ("line_tokens_per_second", "gauge", "how fast the line moves; 0 while unknown", {"": s.line_tokens_per_s}),
        ("unclean_session_ends_total", "counter", "executors that were lost", {"": losses.unclean_ends}),
        ("suspected_requests_total", "counter", "in a step that one may have died of", {"": losses.suspected_requests}),
        ("trials_total", "counter", "of such requests alone on an executor", {"": losses.trials}),
        ("given_up_requests_total", "counter", "executors died of them", {"": losses.given_up_requests}),
        ("unusable_rows_total", "counter", "rows of results that are impossible", {"": losses.unusable_rows}),
        ("quarantines_total", "counter", "executors that were kept from new work for that", {"": losses.quarantines}),
        ("fenced_results_total", "counter", "results of sessions that were over", {"": losses.fenced_results}),
        ("suspects", "gauge", "requests under suspicion", {"": losses.num_suspects}),
        ("quarantined_executors", "gauge", "executors in quarantine", {"": losses.num_quarantined}),
    )
    return [line for name, kind, text, found in values for line in _metric(f"pagewire_{name}", kind, text, found)]


def of_executors(executors: Sequence[pb.ExecutorStatus]) -> list[str]:
    """What each executor did and holds."""

    def of_each(read: Callable[[pb.ExecutorStatus], float]) -> Mapping[str, float]:
        return {f'{{executor="{_word(e.name)}"}}': read(e) for e in executors}

    values: Sequence[tuple[str, str, str, Callable[[pb.ExecutorStatus], float]]] = (
        ("running_sequences", "gauge", "sequences it holds", lambda e: e.num_running),
        ("steps_in_flight", "gauge", "plans that are not answered yet", lambda e: e.steps_in_flight),
        ("blocks", "gauge", "blocks of its KV cache", lambda e: e.num_blocks),
        ("free_blocks", "gauge", "of those, free; what they hold may still be found", lambda e: e.num_free_blocks),
        ("steps_total", "counter", "plans answered", lambda e: e.steps),
        ("compute_seconds_total", "counter", "in these steps, by its own clock", lambda e: e.compute_ns / 1e9),
        ("idle_seconds_total", "counter", "between these steps, while it had work", lambda e: e.idle_ns / 1e9),
        ("leaving", "gauge", "takes nothing new", lambda e: e.leaving),
        ("silent", "gauge", "nothing was heard of it for a while", lambda e: e.silent),
        ("quarantined", "gauge", "sent too many unusable rows", lambda e: e.quarantined),
        ("held_back", "gauge", "died young too often", lambda e: e.held_back),
    )
    return [
        *_metric("pagewire_executors", "gauge", "executors that are joined", {"": len(executors)}),
        *(
            line
            for name, kind, text, read in values
            for line in _metric(f"pagewire_executor_{name}", kind, text, of_each(read))
        ),
    ]


def as_vllm(status: pb.GetStatusResponse) -> list[str]:
    """What the Kubernetes gateway for inference reads. Adapters are not served, so there is no information on them."""
    blocks = sum(e.num_blocks for e in status.executors)
    free = sum(e.num_free_blocks for e in status.executors)
    usage = 1 - free / blocks if blocks else 0.0
    config = f'{{num_gpu_blocks="{blocks}"}}'
    adapters = '{max_lora="0",running_lora_adapters="",waiting_lora_adapters=""}'
    return [
        *_metric(
            "vllm:num_requests_running", "gauge", "pagewire_running_sequences", {"": status.scheduler.num_running}
        ),
        *_metric(
            "vllm:num_requests_waiting", "gauge", "pagewire_waiting_sequences", {"": status.scheduler.num_waiting}
        ),
        *_metric("vllm:kv_cache_usage_perc", "gauge", "share of the KV blocks that are held", {"": usage}),
        *_metric("vllm:cache_config_info", "gauge", "the KV cache of all executors", {config: 1}),
        *_metric("vllm:lora_requests_info", "gauge", "adapters, of which there are none", {adapters: 0}),
    ]


class _Histogram:
    """How often what was measured lay in each bucket."""

    def __init__(self, bounds: Sequence[float]) -> None:
        self._bounds = bounds
        self._counts = [0] * (len(bounds) + 1)
        self._sum = 0.0

    def add(self, value: float) -> None:
        self._counts[bisect_left(self._bounds, value)] += 1
        self._sum += value

    def lines(self, name: str, text: str) -> Iterator[str]:
        yield f"# HELP {name} {text}"
        yield f"# TYPE {name} histogram"
        total = 0
        for bound, count in zip((*map(str, self._bounds), "+Inf"), self._counts, strict=True):
            total += count
            yield f'{name}_bucket{{le="{bound}"}} {total}'
        yield f"{name}_sum {self._sum}"
        yield f"{name}_count {total}"


def _metric(name: str, kind: str, text: str, values: Mapping[str, float]) -> Iterator[str]:
    """The lines of one metric; `values` by their labels."""
    yield f"# HELP {name} {text}"
    yield f"# TYPE {name} {kind}"
    for labels, value in values.items():
        yield f"{name}{labels} {float(value):g}" if not isinstance(value, int) else f"{name}{labels} {int(value)}"


def _word(text: str) -> str:
    """A label's value: what a label cannot hold is left out."""
    return "".join(character for character in text if character.isprintable() and character not in '"\\')
