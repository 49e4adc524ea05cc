"""The scheduler's end of the link: what it takes for a sign of life."""

from __future__ import annotations

import asyncio
from pathlib import Path

import grpc
import pytest
from grpc import aio

from common.errors import Unavailable
from common.model_folder import read_model_folder
from common.step import ExecutorFacts
from protos import executor_pb2 as pb
from scheduler.scheduler import Scheduler, SchedulerLimits
from services import codec_link
from services.engine import Engine
from services.grpc_options import link_options
from services.link_service import ComputePulse, ExecutorLinkService
from tests.e2e import fake_model


class Clock:
    """Seconds that pass when the test says so."""

    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


def beat(tick: int, *, step: int = 0, computing: bool = False) -> pb.Heartbeat:
    return pb.Heartbeat(session=1, tick=tick, step=step, computing=computing)


def test_a_loop_that_ticks_is_alive_for_ever() -> None:
    clock = Clock()
    pulse = ComputePulse(idle_s=5, step_s=60, clock=clock)
    for tick in range(100):
        clock.now_s += 4
        pulse.beat(beat(tick))


def test_heartbeats_of_a_loop_that_stands_still_prove_nothing() -> None:
    clock = Clock()
    pulse = ComputePulse(idle_s=5, step_s=60, clock=clock)
    pulse.beat(beat(7))
    clock.now_s += 4
    pulse.beat(beat(7))
    clock.now_s += 2
    with pytest.raises(Unavailable, match="its loop for over 5 s"):
        pulse.beat(beat(7))


def test_a_step_may_take_long_but_not_for_ever() -> None:
    clock = Clock()
    pulse = ComputePulse(idle_s=5, step_s=60, clock=clock)
    pulse.beat(beat(7, step=3, computing=True))
    clock.now_s += 59
    pulse.beat(beat(7, step=3, computing=True))
    clock.now_s += 2
    with pytest.raises(Unavailable, match="step 3 for over 60 s"):
        pulse.beat(beat(7, step=3, computing=True))


def test_an_executor_that_falls_silent_is_given_up(tmp_path: Path) -> None:
    model = read_model_folder(fake_model.write(tmp_path / "fake"))
    facts = ExecutorFacts(
        name="silent",
        model=model.name,
        model_digest=model.digest,
        vocab_size=model.vocab_size,
        max_model_len=64,
        num_blocks=16,
        block_size=4,
        max_sequences=4,
        max_step_tokens=64,
    )

    async def main() -> None:
        engine = Engine(Scheduler(SchedulerLimits(), model="fake", eos=set(), secret=b"test"))
        server = aio.server(options=link_options())
        server.add_generic_rpc_handlers((ExecutorLinkService(engine, model, silence_s=0.05).handler(),))
        address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
        await server.start()
        async with asyncio.timeout(20), aio.insecure_channel(address) as channel:
            call: aio.StreamStreamCall[bytes, bytes] = channel.stream_stream(
                "/pagewire.executor.v1.ExecutorLink/Link"
            )()
            await call.write(pb.LinkRequest(hello=codec_link.hello_to_pb(facts, bytes(16))).SerializeToString())
            await call.write(pb.LinkRequest(heartbeat=pb.Heartbeat(session=1)).SerializeToString())
            first = await call.read()
            assert isinstance(first, bytes) and pb.LinkResponse.FromString(first).welcome.session == 1
            assert await call.code() is grpc.StatusCode.UNAVAILABLE
            assert await call.details() == "nothing heard for 0.05 s"
        assert not engine.scheduler.sessions
        await server.stop(None)

    asyncio.run(main())
