"""What an operator is told of executors that were lost, and of those that get less than others."""

from __future__ import annotations

import asyncio
from typing import Any

from executor.fake_runner import position_token
from protos import monitoring_pb2 as pb
from services.engine import Engine
from services.monitoring import Monitoring, lines
from tests.scheduler.world import World


def status_of(world: World) -> pb.GetStatusResponse:
    no_context: Any = None

    async def ask() -> pb.GetStatusResponse:
        return await Monitoring(Engine(world.scheduler)).GetStatus(pb.GetStatusRequest(), no_context)

    return asyncio.run(ask())


def test_losses_are_counted_and_said() -> None:
    world = World(executors=1)
    world.add("a", prompt=4, n=2)
    for session in range(3):
        plan = world.send(session)
        assert plan is not None
        world.lose(session)
        world.join()
        told = status_of(world).scheduler.executor_losses
        assert told.unclean_ends == session + 1
        assert told.num_suspects == (session < 2)

    losses = status_of(world).scheduler.executor_losses
    assert (losses.suspected_requests, losses.trials, losses.given_up_requests) == (3, 1, 1)
    assert lines(status_of(world))[1].startswith("executors lost: 3; requests given up for that: 1, under suspicion: 0")


def test_where_nothing_was_lost_nothing_is_said_of_it() -> None:
    assert not any("lost" in line for line in lines(status_of(World())))


def test_pins_are_told_by_tenant_and_the_blocks_that_they_keep_by_executor() -> None:
    world = World()
    assert "pinned" not in lines(status_of(world))[-1]
    world.scheduler.prefixes.pin(range(12), 10**18, tenant="one")
    world.scheduler.prefixes.pin(range(8), 10**18, tenant="two")
    world.scheduler.prefixes.pin(range(4), 1, tenant="two")  # its time is over
    world.add("a", prompt=list(range(12)), max_tokens=1, tenant="one")
    world.run()
    response = status_of(world)

    assert response.scheduler.pins == pb.PinStatus(num_pins=2, tokens=20, tokens_by_tenant={"one": 12, "two": 8})
    assert response.executors[0].num_pinned_blocks == 3
    assert "64 of 64 blocks free, 3 pinned, idle" in lines(response)[-1]


def test_an_executor_that_gets_less_than_others_is_marked() -> None:
    world = World(executors=2)
    world.scheduler.fell_silent(0)
    world.scheduler.leave(1)
    response = status_of(world)

    assert [(e.silent, e.leaving, e.quarantined, e.held_back) for e in response.executors] == [
        (True, False, False, False),
        (False, True, False, False),
    ]
    assert [line.rpartition(", ")[2] for line in lines(response)[1:]] == ["silent", "leaving"]


def test_what_guessed_tokens_came_to_is_counted_and_said() -> None:
    world = World(executors=0)
    world.join(guess=position_token)
    world.add("a", prompt=5, max_tokens=8)
    world.run()
    status = status_of(world)

    told = status.scheduler
    assert (told.accepted_tokens, told.drafted_tokens, told.output_tokens) == (6, 6, 8)
    assert lines(status)[1] == "speculation: 6 of 6 guessed tokens were right, 4.00 tokens a row that guessed"
