"""How long requests took, over all that ended: fed by their timelines, told by GetStatus and /metrics."""

from __future__ import annotations

from protos import monitoring_pb2 as pb
from scheduler.timeline import Timeline
from services.histogram import FIRST_TOKEN_S, REQUEST_S, TOKEN_S, Histogram


class Latencies:
    """Since this process began."""

    def __init__(self) -> None:
        self.queue = Histogram(FIRST_TOKEN_S)  # from its arrival until it was admitted
        self.first_token = Histogram(FIRST_TOKEN_S)  # from its arrival
        self.token = Histogram(TOKEN_S)  # each behind the first: the mean of a request with one choice counts once
        self.request = Histogram(REQUEST_S)  # from its arrival to its end

    def add(self, timeline: Timeline) -> None:
        """A request has ended."""
        t = timeline
        self.request.add(max(0, t.ended_ns - t.received_ns) / 1e9)
        if t.admitted_ns:
            self.queue.add(max(0, t.admitted_ns - t.received_ns) / 1e9)
        if t.first_token_ns:
            self.first_token.add((t.first_token_ns - t.received_ns) / 1e9)
            if t.num_choices == 1 and t.num_output > 1:
                self.token.add((t.last_token_ns - t.first_token_ns) / 1e9 / (t.num_output - 1))

    def to_pb(self) -> pb.Latencies:
        """As a message."""
        return pb.Latencies(
            queue=_told(self.queue),
            time_to_first_token=_told(self.first_token),
            time_per_output_token=_told(self.token),
            request_duration=_told(self.request),
        )


def _told(histogram: Histogram) -> pb.Histogram:
    return pb.Histogram(bounds_s=histogram.bounds, counts=histogram.counts, sum_s=histogram.sum_s)
