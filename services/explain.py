"""A request's timeline as an operator is told it: as a message, and as lines for people."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from protos import monitoring_pb2 as pb
from scheduler.timeline import Timeline
from services import trace_context

_Told = Callable[[pb.TimelineEvent], str]

_WAITS_FOR: Final = {
    "no_executor": "no executor is there",
    "too_large": "no executor that is there can hold it",
    "behind_others": "others are before it",
    "no_slot": "every slot is taken",
    "token_budget": "the tokens of a step were given to others",
    "memory": "too few KV blocks are free",
    "reserve": "what is free is kept for tenants that run less",
    "siblings": "the first choice computes the prompt",
    "better_elsewhere": "another executor is the better place",
    "quarantine": "the executor is in quarantine, or sent an unusable row of it",
    "replays": "others that lost their executor go first",
    "runs_alone": "executors died with it, so it waits for one of its own",
    "deadline": "its deadline has passed",
}
_LOST: Final = {
    "clean": "which left",
    "lost": "whose link broke",
    "silent": "which said nothing any more",
    "stuck": "which was in one step for too long",
    "failed": "whose step failed",
    "wrong": "which answered what it was not asked",
    "unusable_row": "which sent a row that cannot be used",
}
_TAKEN_FOR: Final = {
    "memory": "its KV blocks go to others",
    "tenant_share": "its slot goes to a tenant that was served too little",
    "trial": "its room goes to a request that must run alone",
}


def response_of(timeline: Timeline, now_ns: int) -> pb.ExplainResponse:
    """All that is known. Nothing in it is a caller's word but for the id that it chose."""

    def since(time_ns: int) -> int:
        return max(0, time_ns - timeline.received_ns) if time_ns else 0

    trace = trace_context.parse(timeline.trace)
    return pb.ExplainResponse(
        request_id=timeline.request_id,
        tenant=timeline.tenant,
        received_ns_ago=max(0, now_ns - timeline.received_ns),
        running=not timeline.is_over,
        events=[
            pb.TimelineEvent(
                at_ns=event.at_ns,
                kind=pb.TimelineEventKind.ValueType(event.kind),
                choice=event.choice,
                executor=event.executor,
                why=event.why,
                step=event.step,
                position=event.position,
                tokens=event.num_tokens,
                number=event.number,
            )
            for event in timeline.events
        ],
        left_out=timeline.num_left_out,
        choices=timeline.num_choices,
        prompt_tokens=timeline.num_prompt,
        cached_prompt_tokens=timeline.num_cached,
        output_tokens=timeline.num_output,
        preemptions=timeline.num_preemptions,
        admitted_ns=since(timeline.admitted_ns),
        first_token_ns=since(timeline.first_token_ns),
        ended_ns=since(timeline.ended_ns),
        error=timeline.error,
        trace_id=trace.trace_id if trace is not None else "",
    )


def lines(told: pb.ExplainResponse) -> list[str]:
    """The timeline for people: a line for the request, and one for each thing that happened."""
    of_tenant = f" of {told.tenant}" if told.tenant else ""
    trace = f", trace {told.trace_id}" if told.trace_id else ""
    state = "runs or waits" if told.running else f"took {_ms(told.ended_ns)}"
    failed = f", failed with {told.error}" if told.error else ""
    head = f"{told.request_id}{of_tenant}: received {told.received_ns_ago / 1e9:.1f} s ago, {state}{failed}{trace}"
    lines = [f"{_ms(event.at_ns):>12}  {_told(event, told.choices)}" for event in told.events]
    if told.left_out:
        middle = len(lines) // 2
        lines.insert(middle, f"{'…':>12}  {told.left_out} events are left out (--max-timeline-events)")
    return [head, *lines]


def _told(event: pb.TimelineEvent, choices: int) -> str:
    tell = _TELL.get(event.kind)
    told = tell(event) if tell is not None else pb.TimelineEventKind.Name(event.kind)
    return f"choice {event.choice}: {told}" if choices > 1 and event.kind in _OF_A_CHOICE else told


def _received(event: pb.TimelineEvent) -> str:
    choices = f", {event.number} choices" if event.number > 1 else ""
    return f"received: {event.tokens} tokens of prompt{choices}"


def _queued(event: pb.TimelineEvent) -> str:
    others = f" ({event.number})" if event.number else ""
    return f"waits: {_WAITS_FOR.get(event.why, event.why)}{others}"


def _admitted(event: pb.TimelineEvent) -> str:
    cached = f", {event.tokens} tokens were in its prefix cache" if event.tokens else ""
    return f"admitted by {event.executor} in step {event.step}{cached}{', alone' if event.why else ''}"


def _prefill(event: pb.TimelineEvent) -> str:
    return f"computes {event.tokens} tokens from position {event.position} on, in step {event.step}"


_TELL: Final[dict[int, _Told]] = {
    pb.TIMELINE_EVENT_KIND_RECEIVED: _received,
    pb.TIMELINE_EVENT_KIND_RESUMED: lambda e: f"goes on with a ticket, behind {e.tokens} tokens of its answer",
    pb.TIMELINE_EVENT_KIND_QUEUED: _queued,
    pb.TIMELINE_EVENT_KIND_ADMITTED: _admitted,
    pb.TIMELINE_EVENT_KIND_PREFILL: _prefill,
    pb.TIMELINE_EVENT_KIND_FIRST_TOKEN: lambda _: "first token",
    pb.TIMELINE_EVENT_KIND_PREEMPTED: lambda e: f"preempted on {e.executor}: {_TAKEN_FOR.get(e.why, e.why)}",
    pb.TIMELINE_EVENT_KIND_MOVED: lambda e: f"loses {e.executor}, {_LOST.get(e.why, e.why)}",
    pb.TIMELINE_EVENT_KIND_SUSPECTED: lambda e: f"taken off {e.executor}: executors died with it, it runs alone now",
    pb.TIMELINE_EVENT_KIND_PUT_OFF: lambda e: f"put off, its grammar is not ready ({e.number})",
    pb.TIMELINE_EVENT_KIND_ATTACHED: lambda e: f"another reader, who has {e.tokens} tokens",
    pb.TIMELINE_EVENT_KIND_SPECULATED: lambda e: f"{e.tokens} of {e.number} guessed tokens were right",
    pb.TIMELINE_EVENT_KIND_FINISHED: lambda e: f"finished: {e.why}, {e.tokens} tokens",
    pb.TIMELINE_EVENT_KIND_REFUSED: lambda e: f"refused: {e.why}",
}
_OF_A_CHOICE: Final = _TELL.keys() - {
    pb.TIMELINE_EVENT_KIND_RECEIVED,
    pb.TIMELINE_EVENT_KIND_RESUMED,
    pb.TIMELINE_EVENT_KIND_ATTACHED,
    pb.TIMELINE_EVENT_KIND_REFUSED,
}


def _ms(time_ns: int) -> str:
    return f"{time_ns / 1e6:.3f} ms"
