"""Some of a workload's requests, sent from a process of its own: python -m tests.gpu.check.client.

One Python process cannot read tens of thousands of messages a second, and what it cannot read looks like the server's
delay. So several share a workload: each says that it is ready, hears when to begin, and tells what it saw.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import time
from collections.abc import Sequence

import uvloop

from services.event_loop import EventLoop
from tests.benchmarks.pagewire_client import PagewireClient
from tests.benchmarks.playing import play
from tests.benchmarks.workloads import Workload
from tests.gpu.check.offline import TEMPERATURE, alone, offline


def share(workload: Workload, number: int, count: int) -> Workload:
    """Every `count`-th request, from the one of this `number`."""
    return Workload(name=workload.name, requests=workload.requests[number::count], one_at_a_time=workload.one_at_a_time)


async def run(address: str, workload: Workload) -> None:
    """Be ready, wait for the line that says when, play, tell. Times are those of the machine's monotonic clock."""
    async with PagewireClient(address, temperature=TEMPERATURE) as client:
        await client.is_ready()  # a channel connects with its first call, which is not what is measured
        print("ready", flush=True)
        begin_s = float(await asyncio.to_thread(sys.stdin.readline))
        await asyncio.sleep(max(0.0, begin_s - time.perf_counter()))
        began_s = time.perf_counter()
        answers = await play(workload, client)
    late_s = began_s - begin_s
    rows = [
        {
            "submitted_s": answer.submitted_s + late_s,
            "arrivals_s": [round(arrival_s + late_s, 6) for arrival_s in answer.arrivals_s],
            "num_tokens": answer.num_tokens,
            "error": answer.error,
        }
        for answer in answers
    ]
    print(json.dumps(rows), flush=True)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--address", required=True)
    parser.add_argument("--run", type=int, default=0, help="-1 is one stream after the other")
    parser.add_argument("--number", type=int, default=0)
    parser.add_argument("--count", type=int, default=1)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--short", action="store_true")
    parsed = parser.parse_args(arguments)
    workload = alone(tiny=parsed.tiny) if parsed.run < 0 else offline(parsed.run, tiny=parsed.tiny, short=parsed.short)
    uvloop.run(run(parsed.address, share(workload, parsed.number, parsed.count)), loop_factory=EventLoop)


if __name__ == "__main__":
    main()
