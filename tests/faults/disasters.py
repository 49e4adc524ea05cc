"""What may happen to a cluster, and which of it happens together."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Final

import grpc

from common.failpoints import CLIENT, EXECUTOR, SCHEDULER
from protos import executor_pb2
from tests.faults import impostors, tampering
from tests.faults.callers import ClientCaller, TicketCaller
from tests.faults.checker import Violation
from tests.faults.virtual_executor import EXECUTORS_DIAL, SimulatedExecutor
from tests.faults.virtual_scheduler import HELLO_TIMEOUT_S, SimulatedScheduler
from tests.faults.virtual_time import KilledHere
from tests.faults.virtual_wire import Channel, Connection, Item

if TYPE_CHECKING:
    from tests.faults.simulation import Cluster

Disaster = Callable[["Cluster"], None]

_LINK: Final = "/" + executor_pb2.DESCRIPTOR.services_by_name["ExecutorLink"].full_name + "/Link"


_OFTEN: Final = [
    name for name in SCHEDULER if name not in {"before_welcome", "on_preempt", "mid_drain", "on_resume_verify"}
]
_STARTING: Final = ["mid_load", "before_ready", "before_hello"]
_OFTEN_IN_EXECUTORS: Final = [name for name in EXECUTOR if name not in _STARTING]
_RARELY: Final = {"on_drain", "before_block_copy"}


def _any_executor(cluster: Cluster) -> SimulatedExecutor:
    return cluster.world.draw.choice(cluster.executors)


# ---- executors


def an_executor_is_killed(cluster: Cluster) -> None:
    _any_executor(cluster).kill(cluster.world.draw.choice([0.05, 0.5, 2.0]))


def an_executor_is_frozen(cluster: Cluster) -> None:
    cluster.network.freeze(_any_executor(cluster).process, cluster.world.draw.choice([0.2, 1.5, 3.2, 7.0]))


def an_executor_stalls(cluster: Cluster) -> None:
    cluster.network.stall(_any_executor(cluster).process, cluster.seconds([0.2, 1.5, 2.5, 5.0]))


def an_executor_leaves(cluster: Cluster) -> None:
    _any_executor(cluster).leave(cluster.world.draw.choice([0.1, 1.0]))


def an_executor_is_slow(cluster: Cluster) -> None:
    _any_executor(cluster).slowness = cluster.world.draw.choice([1.0, 5.0, 20.0])


def a_step_hangs(cluster: Cluster) -> None:
    executor = _any_executor(cluster)
    executor.hangs_until_s = cluster.world.now_s + cluster.seconds([1.0, 8.0, 15.0])


def an_executor_takes_the_name_of_another(cluster: Cluster) -> None:
    """An operator starts it with the wrong --name. The one that lives keeps it, and the newcomer waits."""
    if len(cluster.executors) > 1:
        thief, owner = cluster.world.draw.sample(cluster.executors, 2)
        thief.leave(0.1)
        cluster.world.after(1.0, lambda: _rename(cluster, thief, owner))


def _rename(cluster: Cluster, thief: SimulatedExecutor, owner: SimulatedExecutor) -> None:
    if thief.process.dead:
        return
    cluster.network.kill(thief.process)
    thief.name = owner.own_name
    thief.start()
    link = owner.link()
    cluster.world.after(1.0, lambda: _check_the_owner(cluster, owner, link))
    cluster.world.after(2.0, lambda: thief.kill(0.1))


def _check_the_owner(cluster: Cluster, owner: SimulatedExecutor, link: Connection | None) -> None:
    others = set(cluster.faults) - {disaster.__name__ for disaster in _NAMES}
    if not others and cluster.faults[an_executor_takes_the_name_of_another.__name__] == 1 and owner.link() is not link:
        cluster.broken.append(Violation(f"S5: {owner.own_name} lost its link to a newcomer that has its name"))


def somebody_dials_the_link_and_says_nothing(cluster: Cluster) -> None:
    async def silent() -> None:
        channel = Channel(cluster.network, cluster.clients, EXECUTORS_DIAL)
        call, dialled_s = channel.stream_stream(_LINK)(), cluster.world.now_s
        code = await call.code()
        waited_s = cluster.world.now_s - dialled_s
        if code is grpc.StatusCode.UNAVAILABLE and waited_s < HELLO_TIMEOUT_S + 10.0:
            cluster.happened["silent ones turned away"] += 1
        else:
            cluster.broken.append(Violation(f"S4: one who said no hello got {code.name} after {waited_s:.1f} s"))

    cluster.clients.spawn(silent())


# ---- links


def a_link_is_cut(cluster: Cluster) -> None:
    link = _any_executor(cluster).link()
    if link is not None:
        link.cut()


def a_link_goes_dark(cluster: Cluster) -> None:
    link = _any_executor(cluster).link()
    if link is not None:
        up, down = cluster.world.draw.choice([(True, True), (True, False), (False, True)])
        link.darken(cluster.world.draw.choice([0.3, 1.9, 3.0, 6.0]), up=up, down=down)


def a_link_is_slow(cluster: Cluster) -> None:
    link = _any_executor(cluster).link()
    if link is not None:
        link.jitter_s = cluster.world.draw.choice([0.02, 0.3, 1.0])


def a_result_is_changed(cluster: Cluster) -> None:
    executor = _any_executor(cluster)
    link = executor.link()
    if link is not None:
        executor.excuse(link)
        tampering.with_next_result(link, cluster.world.draw)


def a_plan_is_changed(cluster: Cluster) -> None:
    executor = _any_executor(cluster)
    link = executor.link()
    if link is not None:
        executor.excuse(link)
        tampering.with_next_plan(link, cluster.world.draw)


# ---- callers


def _any_call(cluster: Cluster) -> Connection | None:
    calls = cluster.calls()
    return cluster.world.draw.choice(calls) if calls else None


def _when_somebody_reads(cluster: Cluster, act: Callable[[TicketCaller], None], tries: int = 20) -> None:
    """Act on one who has tickets and is in the middle of an answer, as soon as there is one."""
    found = [c for c in cluster.callers if isinstance(c, TicketCaller) and c.seen and not c.done and not c.process.dead]
    if found:
        act(cluster.world.draw.choice(found))
    elif tries:
        cluster.world.after(0.03, lambda: _when_somebody_reads(cluster, act, tries - 1))


def _any_resuming(cluster: Cluster) -> ClientCaller | TicketCaller | None:
    """One that still reads, or will."""
    kinds = ClientCaller, TicketCaller
    found = [c for c in cluster.callers if isinstance(c, kinds) and not c.done and not c.process.dead]
    return cluster.world.draw.choice(found) if found else None


def a_caller_is_cut_off(cluster: Cluster) -> None:
    call = _any_call(cluster)
    if call is not None:
        cluster.excuse_all("its connection was cut")
        call.cut()


def everybody_is_cut_off(cluster: Cluster) -> None:
    cluster.excuse_all("its connection was cut")
    for call in cluster.calls():
        call.cut()


def a_caller_goes_dark(cluster: Cluster) -> None:
    call = _any_call(cluster)
    if call is not None:
        cluster.excuse_all("its connection went dark")
        call.darken(cluster.world.draw.choice([0.5, 2.5, 8.0]))


def a_caller_is_killed(cluster: Cluster) -> None:
    caller = _any_resuming(cluster)
    if caller is not None:
        cluster.calls_are_cut = True
        caller.die()


def a_caller_is_frozen(cluster: Cluster) -> None:
    caller = _any_resuming(cluster)
    if caller is not None:
        cluster.excuse_all("it was frozen")
        cluster.network.freeze(caller.process, cluster.world.draw.choice([0.5, 3.2, 6.0]))


def a_second_reader_comes(cluster: Cluster) -> None:
    _when_somebody_reads(cluster, TicketCaller.read_twice)


def a_proxy_ends_a_call_as_if_all_were_well(cluster: Cluster) -> None:
    calls = [c for c in cluster.calls() if isinstance(c.client.host, ClientCaller | TicketCaller)]
    if calls:
        call: Connection = cluster.world.draw.choice(calls)
        call.client.host.excuse = "a proxy ended its call"
        call.down.send(Item("status", b"", grpc.StatusCode.OK))
        call.up.send(Item("cancel"))


def an_impostor_comes(cluster: Cluster) -> None:
    _when_somebody_reads(
        cluster, lambda caller: cluster.clients.call(cluster.clients.spawn, impostors.try_everything(cluster, caller))
    )


# ---- the scheduler


def the_scheduler_is_killed(cluster: Cluster) -> None:
    cluster.kill_scheduler("the scheduler was killed", cluster.world.draw.choice([0.1, 1.0, 3.0]))


def the_scheduler_is_frozen(cluster: Cluster) -> None:
    cluster.excuse_all("the scheduler was frozen")
    cluster.network.freeze(cluster.scheduler.process, cluster.world.draw.choice([0.3, 1.5, 3.2, 6.0]))


def the_scheduler_stalls(cluster: Cluster) -> None:
    cluster.calls_are_cut = True
    cluster.network.stall(cluster.scheduler.process, cluster.world.draw.choice([0.3, 1.5, 3.0]))


def the_scheduler_leaves(cluster: Cluster) -> None:
    """With time to serve what it has, or without."""
    draw = cluster.world.draw
    grace_s = draw.choice([0.05, 30.0, 30.0])
    cluster.calls_are_cut = True
    if grace_s < 1.0:
        cluster.excuse_all("the scheduler stopped before all was served")
    cluster.scheduler.leave(grace_s=grace_s, restart_after_s=draw.choice([0.1, 1.0]))


def the_scheduler_is_replaced(cluster: Cluster) -> None:
    """It stands still for so long that another takes its place; then it wakes, and its address finds it again.

    Its executors know better by then. In the end somebody finds it and kills it.
    """
    old = cluster.scheduler
    if old.process.dead or old.process.frozen or old.is_leaving:
        return
    cluster.excuse_all("the scheduler was frozen")
    cluster.network.freeze(old.process, 4.0)
    after = cluster.world.after
    after(1.0, lambda: cluster.start_scheduler(instead_of=old))
    after(4.5, lambda: _go_back_to(cluster, old))
    after(5.5, lambda: cluster.scheduler.take_the_addresses())  # noqa: PLW0108 - the one of then
    after(6.0, lambda: _end_of(cluster, old))


def _go_back_to(cluster: Cluster, old: SimulatedScheduler) -> None:
    if cluster.scheduler is not old:
        cluster.excuse_all("its address led to a scheduler that was replaced")
        old.take_the_addresses()
        for executor in cluster.executors:
            link = executor.link()
            if link is not None:
                link.cut()


def _end_of(cluster: Cluster, old: SimulatedScheduler) -> None:
    if cluster.scheduler is not old:
        cluster.excuse_all("its scheduler was replaced, and killed")
        old.kill()


def the_wall_clock_jumps(cluster: Cluster) -> None:
    cluster.world.wall_offset_s += cluster.world.draw.choice([-3600.0, 3600.0])


# ---- at failpoints


def the_scheduler_breaks_at_a_failpoint(cluster: Cluster) -> None:
    """One, as of several it would always be the one that is passed most often. Those that need more are armed below."""
    cluster.arm(cluster.scheduler.process, [cluster.world.draw.choice(_OFTEN)], _breaking_scheduler(cluster))


def the_scheduler_breaks_as_an_executor_joins(cluster: Cluster) -> None:
    cluster.arm(cluster.scheduler.process, ["before_welcome"], _breaking_scheduler(cluster), passage=1)
    an_executor_is_killed(cluster)


def the_scheduler_breaks_as_it_preempts(cluster: Cluster) -> None:
    cluster.arm(cluster.scheduler.process, ["on_preempt"], _breaking_scheduler(cluster))


def the_scheduler_breaks_as_it_drains(cluster: Cluster) -> None:
    cluster.arm(cluster.scheduler.process, ["mid_drain"], _breaking_scheduler(cluster), passage=1)
    the_scheduler_leaves(cluster)


def the_scheduler_breaks_as_somebody_resumes(cluster: Cluster) -> None:
    cluster.arm(cluster.scheduler.process, ["on_resume_verify"], _breaking_scheduler(cluster), passage=1)
    everybody_is_cut_off(cluster)


def an_executor_breaks_at_a_failpoint(cluster: Cluster) -> None:
    executor, name = _any_executor(cluster), cluster.world.draw.choice(_OFTEN_IN_EXECUTORS)
    passage = 1 if name in _RARELY else None
    cluster.arm(executor.process, [name], _breaking_executor(cluster, executor), passage=passage)
    if name == "on_drain":
        executor.leave(0.1)


def an_executor_breaks_as_it_starts(cluster: Cluster) -> None:
    executor, place = _any_executor(cluster), cluster.world.draw.choice(_STARTING)
    strike = _breaking_executor(cluster, executor)
    executor.arm_next_life = lambda process: cluster.arm(process, [place], strike, passage=1)
    executor.kill(cluster.world.draw.choice([0.05, 0.5]))


def a_caller_breaks_at_a_failpoint(cluster: Cluster) -> None:
    caller = _any_resuming(cluster)
    if caller is None:
        return
    draw, place = cluster.world.draw, cluster.world.draw.choice(CLIENT)
    kills, seconds = draw.random() < 0.6, draw.choice([0.2, 3.5])

    def strike() -> None:
        cluster.excuse_all("a caller broke at a failpoint")
        if kills:
            caller.die()
            raise KilledHere
        cluster.network.freeze(caller.process, seconds)

    cluster.arm(caller.process, [place], strike, passage=draw.choice([1, 1, 2, 4]) if "recv" in place else 1)
    if "resume" in place:
        cluster.excuse_all("its connection was cut")
        for call in cluster.calls():
            if call.client is caller.process:
                call.cut()


def _breaking_scheduler(cluster: Cluster) -> Callable[[], None]:
    """Kills or freezes it where it stands."""
    draw, scheduler = cluster.world.draw, cluster.scheduler
    kills, seconds = draw.random() < 0.7, draw.choice([0.2, 1.5, 3.5])

    def strike() -> None:
        if kills:
            cluster.kill_scheduler("the scheduler broke at a failpoint", seconds, which=scheduler)
            raise KilledHere
        cluster.excuse_all("the scheduler froze at a failpoint")
        cluster.network.freeze(scheduler.process, seconds)

    return strike


def _breaking_executor(cluster: Cluster, executor: SimulatedExecutor) -> Callable[[], None]:
    draw = cluster.world.draw
    kills, seconds = draw.random() < 0.7, draw.choice([0.2, 1.5, 3.5])

    def strike() -> None:
        if kills:
            executor.kill(seconds)
            raise KilledHere
        cluster.network.freeze(executor.process, seconds)

    return strike


# ---- together

_CRASHES: Final[list[Disaster]] = [an_executor_is_killed, an_executor_is_killed, an_executor_leaves]
_PAUSES: Final[list[Disaster]] = [an_executor_is_frozen, an_executor_stalls, a_step_hangs, an_executor_is_slow]
_NAMES: Final[list[Disaster]] = [an_executor_takes_the_name_of_another, somebody_dials_the_link_and_says_nothing]
_NETWORK: Final[list[Disaster]] = [a_link_is_cut, a_link_goes_dark, a_link_is_slow]
_LIES: Final[list[Disaster]] = [a_result_is_changed, a_plan_is_changed]
_CALLERS: Final[list[Disaster]] = [a_caller_is_cut_off, a_caller_goes_dark, everybody_is_cut_off]
_READERS: Final[list[Disaster]] = [
    a_caller_is_killed,
    a_caller_is_frozen,
    a_second_reader_comes,
    a_proxy_ends_a_call_as_if_all_were_well,
    an_impostor_comes,
]
_SCHEDULER: Final[list[Disaster]] = [
    the_scheduler_is_killed,
    the_scheduler_is_frozen,
    the_scheduler_stalls,
    the_scheduler_leaves,
    the_scheduler_is_replaced,
    the_wall_clock_jumps,
]
_FAILPOINTS: Final[list[Disaster]] = [
    the_scheduler_breaks_at_a_failpoint,
    the_scheduler_breaks_as_an_executor_joins,
    the_scheduler_breaks_as_it_drains,
    the_scheduler_breaks_as_somebody_resumes,
    an_executor_breaks_at_a_failpoint,
    an_executor_breaks_as_it_starts,
    a_caller_breaks_at_a_failpoint,
]
CROWDED: Final[list[Disaster]] = [
    the_scheduler_breaks_as_it_preempts,
    the_scheduler_leaves,
    an_executor_is_killed,
    everybody_is_cut_off,
]
"""In a story that gets these, all memory is needed."""

HARMLESS: Final = frozenset(
    disaster.__name__
    for disaster in [*_CALLERS, *_READERS, the_wall_clock_jumps, somebody_dials_the_link_and_says_nothing]
)
"""None of these costs an executor its session."""

LIES: Final = frozenset(lie.__name__ for lie in _LIES)
DISASTERS: Final[list[Disaster]] = [
    *_CRASHES,
    *_PAUSES,
    *_NAMES,
    *_NETWORK,
    *_LIES,
    *_CALLERS,
    *_READERS,
    *_SCHEDULER,
    *_FAILPOINTS,
    *CROWDED,
]
PROFILES: Final[list[list[Disaster]]] = [
    [],
    _CRASHES,
    _PAUSES,
    _NAMES,
    _NETWORK,
    _LIES,
    _LIES,
    [*_CRASHES, *_NETWORK],
    [*_CRASHES, *_PAUSES],
    [*_CALLERS, *_READERS],
    [*_CALLERS, *_READERS],
    [everybody_is_cut_off, a_second_reader_comes, an_impostor_comes],
    [*_CALLERS, *_READERS, an_executor_is_killed, the_scheduler_is_killed],
    [*_READERS, *_SCHEDULER],
    _SCHEDULER,
    _FAILPOINTS,
    _FAILPOINTS,
    DISASTERS,
    DISASTERS,
    DISASTERS,
    CROWDED,
]
