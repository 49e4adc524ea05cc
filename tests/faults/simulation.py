"""A whole cluster in one thread and virtual time, all drawn from one seed: scheduler, executors, callers, disasters.

What runs is the production code, from the client for Python through the public handler to the runner: pagewire/,
services/, scheduler/ and executor/ as they are. Simulated are the clock, the processes, gRPC's transport, the compute
thread, and the model (executor/fake_runner.py, whose slab finds a block that was shared, reused or copied wrongly in
the step in which it would change a token).

`run(seed)` plays one story and checks it all the way; what it raises replays with the same seed.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import random
import types
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Final
from unittest import mock

from common import failpoints
from common.failpoints import Effect
from executor.fake_runner import Prefix
from pagewire import aio, calls
from pagewire.continuation import OutOfStep
from scheduler.pins import PinLimits
from scheduler.scheduler import SchedulerLimits
from scheduler.timeline import Kind
from services import engine, executor_service, handlers, link_service
from tests.faults.callers import PATIENCE_S, Caller, ClientCaller, TicketCaller
from tests.faults.checker import Violation
from tests.faults.disasters import CROWDED, HARMLESS, LIES, PROFILES, Disaster, the_scheduler_leaves
from tests.faults.drawn_request import draw_request, fake_folder
from tests.faults.virtual_compute import VirtualCompute
from tests.faults.virtual_executor import SimulatedExecutor
from tests.faults.virtual_scheduler import SERVICE, SimulatedScheduler
from tests.faults.virtual_time import Process, World
from tests.faults.virtual_wire import Channel, Connection, Network

FOR_GOOD_S: Final = 1000.0
LINGER_AT_MOST_S: Final = 2.0

_LOOK_EACH_S: Final = 0.1
_AT_ONCE_S: Final = 0.12  # the way to the scheduler, at its slowest


class Cluster:
    """One story. Everything that is drawn is drawn from the world's one source.

    With `late`, the executors launch a step before they know the tokens of the last one.
    """

    def __init__(self, seed: int, *, late: bool = False) -> None:
        self.seed = seed
        self.late = late
        self.world = World(seed)
        self.model, self.tokenizer = fake_folder()
        self.network = Network(self.world)
        self.broken: list[Exception] = []
        self.faults: Counter[str] = Counter()
        self.happened: Counter[str] = Counter()  # what is neither a fault nor wrong
        self.refusals = 0
        self.given_up = 0
        self.calls_are_cut = False
        self.gone_for_good = False  # an executor that hangs and is not helped
        draw = self.world.draw
        disasters = draw.choice(PROFILES)
        self.is_crowded = disasters is CROWDED
        self.limits = SchedulerLimits(
            token_budget=draw.choice([8, 24, 64]),
            watermark=draw.choice([0.0, 0.0, 0.1]),
            prefix_caching=draw.random() < 0.85,
            pins=PinLimits(max_tokens_per_tenant=random.Random(f"pins {seed}").choice([50, 1000]), max_share=1),
        )
        self.max_waiting = draw.choice([4, 2048, 2048])
        self.linger_s = draw.choice([0.2, LINGER_AT_MOST_S, LINGER_AT_MOST_S])
        self.max_lingering = draw.choice([1, 256, 256])
        self._epoch = 0
        self.schedulers: list[SimulatedScheduler] = []
        self.start_scheduler()
        self.executors = [
            SimulatedExecutor(self, i) for i in range(1 if self.is_crowded else draw.choice([1, 2, 2, 3]))
        ]
        self.clients = self.world.process("clients")
        self.clients.host = self
        self.callers: list[Caller] = []
        for number in range(draw.randint(5, 8) if self.is_crowded else draw.randint(3, 7)):
            kind = draw.choice([Caller, Caller, ClientCaller, TicketCaller, TicketCaller])
            drawn = draw_request(
                draw,
                number,
                long=self.is_crowded,
                pins=self.limits.prefix_caching,
                ranks=LIES.isdisjoint(disaster.__name__ for disaster in disasters),
            )
            self.callers.append(kind(self, drawn, number))
        self.poison = self._draw_poison()
        self._draw_disasters(disasters)

    def _draw_poison(self) -> Prefix | None:
        """A place in some answer that no executor survives, in a few stories."""
        draw = self.world.draw
        if draw.random() >= 0.08:
            return None
        drawn = draw.choice(self.callers).drawn
        places = list(drawn.places(draw.randrange(len(drawn.made))))
        return draw.choice(places) if places else None

    def _draw_disasters(self, kinds: Sequence[Disaster]) -> None:
        draw = self.world.draw
        self.network.jitter_s = draw.choice([0.0, 0.0, 0.005, 0.05])
        for _ in range(draw.choice([0, 1, 2, 3, 4, 6, 8]) if kinds else 0):
            disaster = draw.choice(kinds)
            self.world.at(draw.uniform(0.02, 1.6), functools.partial(self._strike, disaster))

    def _strike(self, disaster: Disaster) -> None:
        if self._is_over():  # what is left is looked at in peace
            return
        self.faults[disaster.__name__] += 1
        self.world.note(disaster.__name__)
        disaster(self)

    # ---- schedulers

    @property
    def scheduler(self) -> SimulatedScheduler:
        """The newest."""
        return self.schedulers[-1]

    def next_epoch(self) -> int:
        """Later than all before."""
        self._epoch += 1
        return self._epoch

    def start_scheduler(self, *, instead_of: SimulatedScheduler | None = None) -> None:
        """Somebody starts one where there is none any more, or where this one does not answer."""
        if not self.schedulers or self.scheduler.process.dead or self.scheduler is instead_of:
            self.schedulers.append(SimulatedScheduler(self, self.next_epoch()))

    def kill_scheduler(self, why: str, restart_after_s: float, *, which: SimulatedScheduler | None = None) -> None:
        """SIGKILL, and somebody starts another."""
        self.excuse_all(why)
        (which or self.scheduler).kill()
        self.world.after(restart_after_s, self.start_scheduler)

    # ---- for disasters

    def calls(self) -> list[Connection]:
        """Calls of callers that are not over."""
        return [c for c in self.network.live() if c.details.method.startswith(f"/{SERVICE}/")]

    def excuse_all(self, why: str) -> None:
        """Streams that are open now may end by this fault."""
        self.calls_are_cut = True
        for caller in self.callers:
            caller.excuse = caller.excuse or why

    def may_find_rows_unusable(self) -> bool:
        """A choice ends with an error after two unusable rows in one place. Liars make some that nobody computed."""
        return sum(self.faults[lie] for lie in LIES) > 1

    def executors_were_harmed(self) -> bool:
        """Some may be away, or were: who needs one waits, and does not wait long where the scheduler leaves."""
        return not set(self.faults) <= HARMLESS | {the_scheduler_leaves.__name__}

    def seconds(self, choices: list[float]) -> float:
        """How long an executor is away; for good, once in a story where there are others."""
        if len(self.executors) > 1 and not self.gone_for_good and self.world.draw.random() < 0.3:
            self.gone_for_good = True
            return FOR_GOOD_S
        return self.world.draw.choice(choices)

    def arm(
        self, process: Process, names: Sequence[str], strike: Callable[[], None], *, passage: int | None = None
    ) -> None:
        """Break the process when it passes one of the failpoints for the n-th time."""

        def struck(name: str) -> None:
            process.armed.clear()
            self.faults[f"at {name}"] += 1
            strike()

        for name in names:
            left = self.world.draw.choice([1, 1, 2, 5, 12]) if passage is None else passage
            process.armed[name] = (left, functools.partial(struck, name))

    # ---- the story

    def play(self) -> None:
        """From the first event to quiescence. Raises what was found first."""
        self._look()
        finished = self.world.run(until=self._is_over, deadline_s=PATIENCE_S)
        self._raise_what_broke()
        if not finished:
            waiting = ", ".join(f"{c.name} after {c.seen} tokens" for c in self.callers if not c.done)
            raise Violation(f"I9: never ended: {waiting}")
        for process in self.world.processes:
            process.armed.clear()
        self.world.run(until=self._scheduler_is_up, deadline_s=self.world.now_s + PATIENCE_S)
        self.world.run(until=lambda: False, deadline_s=self.world.now_s + LINGER_AT_MOST_S + 0.5)
        self._raise_what_broke()
        self._check_quiescence()

    def _is_over(self) -> bool:
        return bool(self.broken) or all(caller.done for caller in self.callers)

    def _scheduler_is_up(self) -> bool:
        process = self.scheduler.process
        return not process.dead and not process.frozen and not self.scheduler.is_leaving

    def _look(self) -> None:
        """Now and then, whatever happens."""
        try:
            self.scheduler.check()
            self._check_nobody_is_served_in_vain()
        except AssertionError as error:
            self.broken.append(error)
        self.world.after(_LOOK_EACH_S, self._look)

    def _check_nobody_is_served_in_vain(self) -> None:
        """I8: a caller that leaves gives its memory back at once. Where calls are cut, nobody can say when that is."""
        if self.calls_are_cut:
            return
        asked = sum(
            len(c.drawn.made)
            for c in self.callers
            if not c.done or self.world.now_s - c.done_s < _AT_ONCE_S + c.is_held_s
        )
        if self.scheduler.core.num_sequences > asked:
            raise Violation(f"I8: {self.scheduler.core.num_sequences} sequences, {asked} are waited for")

    def _raise_what_broke(self) -> None:
        if self.broken:
            raise self.broken[0]
        if self.network.broken_rules:
            raise Violation(f"S1: {self.network.broken_rules[0]}")
        for process in self.world.processes:
            if process.errors:
                context = process.errors[0]
                raise Violation(f"S2: {process.name}: {context['message']}") from context.get("exception")

    def _check_quiescence(self) -> None:
        """I8: nothing is left of what was served."""
        core, engine = self.scheduler.core, self.scheduler.engine
        core.check()
        lost = sum(scheduler.core.counters.unclean_ends for scheduler in self.schedulers)
        if lost and set(self.faults) <= HARMLESS:
            raise Violation(f"I13: nobody harmed an executor, and {lost} were lost")
        self._check_timelines()
        if core.num_sequences or core.waiting or engine.num_requests:
            raise Violation(f"I8: {core.num_sequences} sequences are left, {engine.num_requests} streams")
        if core.num_suspects or len(self.scheduler.live):
            raise Violation(f"I8: {core.num_suspects} suspects are left, {len(self.scheduler.live)} live requests")
        for session in core.sessions:
            if session.outstanding:
                continue  # it was joined a moment ago, or hangs
            if session.pool.num_free != session.pool.num_blocks:
                raise Violation(f"I8: {session.pool.num_blocks - session.pool.num_free} blocks are lost")
        left = [c for c in self.network.live() if self._is_left_open(c)]
        if left:
            raise Violation(f"I8: {len(left)} calls are left open: {left[0].client.name}, {left[0].details.method}")

    def _check_timelines(self) -> None:
        """I14: what is told of a request is in order, and ends with the end of its last choice."""
        timelines = self.scheduler.engine.timelines
        if timelines.num_open:
            raise Violation(f"I14: {timelines.num_open} requests are told of as if they ran")
        for timeline in timelines:
            if timeline.events[-1].kind is not Kind.REFUSED:
                timeline.check()

    def _is_left_open(self, call: Connection) -> bool:
        """A call of somebody who has all that he asked for; or one that never said who it is."""
        if call.context.is_over or call.server.dead or isinstance(call.client.host, SimulatedExecutor):
            return False
        return call in self.calls() or not self.calls_are_cut


# ---- running


@dataclass(frozen=True, slots=True, kw_only=True)
class Story:
    """What happened in one simulation."""

    seed: int
    trace: int  # equal for two runs of one seed
    virtual_s: float
    tokens: int
    moved: int
    preemptions: int
    refusals: int
    given_up: int
    faults: Counter[str] = field(default_factory=Counter[str])
    happened: Counter[str] = field(default_factory=Counter[str])


class VirtualClock:
    """Stands for the module `time`."""

    @staticmethod
    def monotonic() -> float:
        """The clock of this machine, from its start."""
        return asyncio.get_running_loop().time()

    @staticmethod
    def time() -> float:
        """What somebody may set."""
        return _here().world.wall_s()

    @staticmethod
    def time_ns() -> int:
        """Something that grows."""
        return int(asyncio.get_running_loop().time() * 1e9)


class LinkClock(VirtualClock):
    """As the two ends of a link see it."""


@contextlib.contextmanager
def simulated() -> Iterator[None]:
    """Production code meets the virtual world: these names, and no others, are exchanged."""

    def uniform(low: float, high: float) -> float:
        return _here().world.draw.uniform(low, high)

    def token_bytes(size: int) -> bytes:
        return _here().world.draw.randbytes(size)

    def token_hex(size: int) -> str:
        return token_bytes(size).hex()

    def channel(connections: aio._Connections, address: str) -> Any:
        caller: Caller = _here().host
        made: Any = Channel(caller.cluster.network, caller.process, address)
        return connections._channels.setdefault(address, made)

    broke = calls.Asked.broke

    def strictly(self: calls.Asked, why: OutOfStep | None = None) -> float:
        """The client copes with a server that repeats itself or leaves gaps. Ours does neither."""
        if why is not None:
            caller: Caller = _here().host
            caller.cluster.broken.append(Violation(f"I2: {caller.name}: {why}"))
        return broke(self, why)

    chance = types.SimpleNamespace(uniform=uniform)
    lottery = types.SimpleNamespace(token_bytes=token_bytes, token_hex=token_hex)
    pulse: Any = link_service.ComputePulse.__init__
    asked: Any = calls.Asked.__init__
    level = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with (
            mock.patch.object(failpoints, "hit", _hit),
            mock.patch.object(link_service, "time", LinkClock),
            mock.patch.dict(pulse.__kwdefaults__, clock=LinkClock.monotonic),
            mock.patch.object(executor_service, "time", LinkClock),
            mock.patch.object(executor_service, "ComputeThread", VirtualCompute),
            mock.patch.object(executor_service, "random", chance),
            mock.patch.object(executor_service, "secrets", lottery),
            mock.patch.object(engine, "secrets", lottery),
            mock.patch.object(handlers, "secrets", lottery),
            mock.patch.dict(asked.__kwdefaults__, clock_s=VirtualClock.monotonic),
            mock.patch.object(calls, "random", chance),
            mock.patch.object(calls.Asked, "broke", strictly),
            mock.patch.object(aio._Connections, "_channel", channel),
        ):
            yield
    finally:
        logging.disable(level)


def _hit(name: str) -> Effect:
    """A failpoint in a simulated process."""
    loop = asyncio._get_running_loop()
    if isinstance(loop, Process) and not loop.dead:
        loop.world.passed[name] += 1
        if name in loop.armed:
            left, strike = loop.armed[name]
            if left > 1:
                loop.armed[name] = (left - 1, strike)
            else:
                strike()
    return ""


def _here() -> Process:
    loop: Any = asyncio.get_running_loop()
    assert isinstance(loop, Process)
    return loop


def run(seed: int, *, late: bool = False) -> Story:
    """Play one story. Raises Violation, or what else broke, with a note that says how to replay it."""
    with simulated():
        cluster = Cluster(seed, late=late)
        try:
            cluster.play()
        except Exception as error:
            again = f"python -m tests.faults.simulate {seed}{' --late' if late else ''}"
            error.add_note(f"at {cluster.world.now_s:.3f} s of seed {seed}; {again}")
            error.add_note(f"faults: {dict(cluster.faults)}")
            raise
        finally:
            cluster.world.close()
    counters = [scheduler.core.counters for scheduler in cluster.schedulers]
    cluster.happened["resumed"] = cluster.world.passed["mid_resume"]
    cluster.happened["rows waited for grammars"] = sum(each.rows_unready for each in counters)
    cluster.happened["pins refused"] = sum(each.admission.refusals["pins"] for each in cluster.schedulers)
    cluster.happened["prompts pinned"] = sum(each.core.prefixes.pins.num_made for each in cluster.schedulers)
    return Story(
        seed=seed,
        trace=cluster.world.trace,
        virtual_s=cluster.world.now_s,
        tokens=sum(caller.seen for caller in cluster.callers),
        moved=sum(each.moved for each in counters),
        preemptions=sum(each.preemptions for each in counters),
        refusals=cluster.refusals,
        given_up=cluster.given_up,
        faults=cluster.faults,
        happened=cluster.happened,
    )
