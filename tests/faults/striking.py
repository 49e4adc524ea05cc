"""Carrying a strike out: choose the victim, strike, wait until life goes on, measure what readers noticed."""

from __future__ import annotations

import asyncio
import os
import random
import secrets
import signal
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from grpc import aio

from protos import inference_pb2 as pb
from protos import inference_pb2_grpc
from services.failpoints import VARIABLE
from services.grpc_options import client_options
from tests.e2e.cluster import ROOT
from tests.faults import reading
from tests.faults.checker import StreamChecker, Violation
from tests.faults.kill_report import FEW_TOKENS, Fault, Report
from tests.faults.proxy import Proxy
from tests.faults.readers import Readers
from tests.faults.recorder import History
from tests.faults.site import Site, Victim
from tests.faults.strikes import AS_IT_STARTS, Strike

LINGER_S: Final = 2.0
LEASE_S: Final = 5.0  # the scheduler's default
_FROZEN_S: Final = LEASE_S + 1.0  # longer than a lease, and than any executor may be silent
_PASSED_WITHIN_S: Final = 6.0  # a failpoint, or it is tried again later
_MOVED_ON_WITHIN_S: Final = 60.0
_ON_ITS_WAY_S: Final = 0.1  # what was sent before a fault is still heard
_WORDS: Final = 2  # that every stream must have heard after a fault, beyond that
_CALM_S: Final = 0.15  # at least, between two faults
_BEFORE_S: Final = 1.0  # where faults overlap, tokens of so much time count as those before one


@dataclass(frozen=True, slots=True, kw_only=True)
class Ground:
    """Where strikes are carried out."""

    sites: list[Site]
    readers: Readers
    history: History
    report: Report
    draw: random.Random
    folder: Path
    num_streams: int
    may_overlap: bool = False

    async def carry_out(self, strike: Strike) -> bool:
        """Strike and wait until all is well. False when the strike came to nothing and must be tried again."""
        began_s = self.history.now_s
        if not self.may_overlap:
            await self._calm()
        fault = await _Blow(self, strike, began_s).fall()
        if fault is None:
            place = strike.failpoint or strike.kind
            self.report.missed[place] = self.report.missed.get(place, 0) + 1
            return False
        self.report.faults.append(fault)
        return not fault.is_void

    async def _calm(self) -> None:
        """Every process is there, and every stream is being told something."""
        for site in self.sites:
            await site.whole()
        while self.readers.is_crowded:  # they wait for memory, and let others wait
            self._check()
            await asyncio.sleep(0.01)
        since_s = self.history.now_s
        while True:
            now_s = self.history.now_s
            flowing = len(self.history.open_at(now_s)) >= self.num_streams
            if flowing and now_s > since_s + _CALM_S and self.history.tokens_between(since_s, now_s) >= FEW_TOKENS:
                return
            if now_s > since_s + _MOVED_ON_WITHIN_S:
                raise TimeoutError("streams stand still without any fault")
            self._check()
            await asyncio.sleep(0.01)

    async def moved_on(self, at_s: float) -> float:
        """Return the time when every stream that was open at `at_s` has ended, or heard more."""
        streams = self.history.open_at(at_s)
        while True:
            now_s = self.history.now_s
            waiting = [
                heard for heard in streams if heard.ended_s > now_s and heard.words_since(at_s + _ON_ITS_WAY_S) < _WORDS
            ]
            if not waiting and self.history.tokens_between(at_s, now_s) >= FEW_TOKENS:
                return now_s
            if now_s > at_s + _MOVED_ON_WITHIN_S:
                raise TimeoutError(f"{len(waiting)} streams stand still {_MOVED_ON_WITHIN_S:g} s after a fault")
            self._check()
            await asyncio.sleep(0.005)

    def _check(self) -> None:
        if self.report.broken:
            raise Broken


class Broken(Exception):
    """A stream broke: the report says how."""


class _Blow:
    """One strike that falls."""

    def __init__(self, ground: Ground, strike: Strike, began_s: float) -> None:
        self._ground, self._strike, self._began_s = ground, strike, began_s
        self._draw = ground.draw

    async def fall(self) -> Fault | None:
        """The fault, measured; None when there was none."""
        strike = self._strike
        if strike.victim == "executor":
            return await self._executor()
        if strike.victim == "scheduler":
            return await self._scheduler()
        if strike.victim == "client":
            return await self._client()
        site = self._draw.choice(self._ground.sites)
        if strike.victim == "executor link":
            return await self._executor_link(site)
        return await self._link(site, await _busiest(site.doors), held=1, standby="yes")

    # ---- processes

    async def _executor(self) -> Fault | None:
        strike, draw = self._strike, self._draw
        site = draw.choice(self._ground.sites)
        standby = "yes" if len(site.executors) > 1 else "no"
        if strike.failpoint in AS_IT_STARTS:
            return await self._one_that_starts(site)
        busy = await self._busy(site)
        if not busy:
            return None
        victim, held = draw.choice(busy)
        if not await self._strike_at(victim, provoke=site):
            return None
        fault = self._happened(victim, held=held, standby=standby)
        if strike.action != "freeze":
            return await self._measured(fault)
        if standby == "no":
            return await self._frozen(victim, fault)
        await self._measured(fault)
        victim.process.signal(signal.SIGCONT)  # a zombie: what it computed must harm nobody, and it may come back
        return fault

    async def _one_that_starts(self, site: Site) -> Fault | None:
        victim = site.start_one_more(self._strike.rule)
        try:
            if not await victim.struck(3 * _PASSED_WITHIN_S):
                return None
            return await self._measured(self._happened(victim, held=1, standby="yes"))
        finally:
            site.end(victim)

    async def _scheduler(self) -> Fault | None:
        sites = self._ground.sites
        loads = {site.name: (await site.status()) for site in sites}
        site = max(sites, key=lambda site: load.scheduler.num_running if (load := loads[site.name]) else -1)
        load = loads[site.name]
        victim = site.scheduler
        if load is None or not await self._strike_at(victim, provoke=site):
            return None
        standby = "yes" if len(sites) > 1 else "no"
        fault = self._happened(victim, held=load.scheduler.num_running, standby=standby)
        if self._strike.action == "freeze":
            return await self._frozen(victim, fault)
        return await self._measured(fault)

    async def _frozen(self, victim: Victim, fault: Fault) -> Fault:
        """It stands still for longer than it is believed in, whatever the others do meanwhile."""
        thawing = asyncio.create_task(_thaw(victim, _FROZEN_S))
        try:
            return await self._measured(fault)
        finally:
            await thawing

    async def _strike_at(self, victim: Victim, *, provoke: Site) -> bool:
        """Strike a process that is at work; False when it did not come to its failpoint."""
        strike = self._strike
        if not strike.failpoint:
            await asyncio.sleep(self._draw.uniform(0.0, 0.05))
            victim.process.signal(signal.SIGSTOP if strike.action == "freeze" else signal.SIGKILL)
            return True
        victim.arm(strike.rule)
        await victim.armed(_PASSED_WITHIN_S)
        self._provoke(provoke, victim)
        if await victim.struck(_PASSED_WITHIN_S):
            while strike.action == "freeze" and not (victim.is_frozen or victim.is_dead):
                await asyncio.sleep(0.005)  # it has said what it is about to do; to be continued it must have done it
            return True
        if not victim.is_dead:
            victim.arm("")
        return False

    def _provoke(self, site: Site, victim: Victim) -> None:
        """Do what makes a process come to a place that it might not pass soon."""
        match self._strike.failpoint:
            case "on_drain" | "mid_drain":
                victim.process.signal(signal.SIGTERM)
            case "before_welcome":
                site.wire.reset()
            case "on_resume_verify":
                for door in site.doors:
                    door.reset()
            case "on_preempt":
                self._ground.readers.crowd(2 * len(site.executors))
            case "before_block_copy":
                self._ground.readers.crowd(1)
            case _:
                pass

    async def _busy(self, site: Site) -> list[tuple[Victim, int]]:
        """The executors that hold sequences, and how many."""
        status = await site.status()
        held: Mapping[str, int] = {e.name: e.num_running for e in status.executors} if status is not None else {}
        return [
            (victim, held[victim.name])
            for victim in site.executors
            if victim is not None and not victim.is_dead and not victim.is_frozen and held.get(victim.name)
        ]

    # ---- links

    async def _executor_link(self, site: Site) -> Fault | None:
        held = [count for victim, count in await self._busy(site) if victim is site.executors[0]]
        if not held:
            return None
        return await self._link(site, site.wire, held=held[0], standby="yes" if len(site.executors) > 1 else "no")

    async def _link(self, site: Site, link: Proxy, *, held: int, standby: str) -> Fault:
        if self._strike.action == "dark":
            link.blackhole()
        else:
            link.reset()
        fault = self._happened(None, held=held, standby=standby)
        try:
            return await self._measured(fault)
        finally:
            link.heal()

    # ---- clients

    async def _client(self) -> Fault | None:
        """A process that reads is killed; another one goes on, or nobody does and the server lets go."""
        ground, strike = self._ground, self._strike
        request, expected = ground.readers.question()
        request.request_id = secrets.token_hex(8)
        file = ground.folder / f"position-{request.request_id}"
        reading.keep(file, request)
        site = self._draw.choice(ground.sites)
        async with Proxy(site.address) as door:
            rule = strike.rule if strike.failpoint else ""
            reader = await _reader(door.address, file, rule)
            try:
                if not await self._client_struck(reader, file, door, len(expected)):
                    return None
            finally:
                if reader.returncode is None:
                    reader.kill()
                await reader.wait()
            fault = self._happened(None, held=1, standby="")
            await self._measured(fault)
            if strike.action == "kill for good":
                await self._must_be_gone(site, request.request_id)
                return fault
            again = await _reader(door.address, file, "")
            try:
                async with asyncio.timeout(_MOVED_ON_WITHIN_S):
                    code = await again.wait()
            finally:
                if again.returncode is None:
                    again.kill()
        problem = (
            f"exit code {code}"
            if code
            else _problem(file, StreamChecker("client", expected, num_prompt=len(request.token_ids.ids)))
        )
        if problem:
            ground.history.write("broken", stream=request.request_id, error=problem)
            ground.report.broken.append(f"a client that was killed and resumed: {problem}")
        else:
            ground.report.answers += 1
        file.unlink()
        return fault

    async def _client_struck(
        self, reader: asyncio.subprocess.Process, file: Path, door: Proxy, num_choices: int
    ) -> bool:
        """Wait until it was killed at its failpoint, or kill it somewhere in its answer."""
        after_words = self._draw.randrange(2, 30)
        deadline_s = self._ground.history.now_s + 4 * _PASSED_WITHIN_S
        has_reset = False
        while reader.returncode is None and self._ground.history.now_s < deadline_s:
            words = reading.num_words(file)
            if words >= after_words and not self._strike.failpoint:
                reader.kill()
                await reader.wait()
                return True
            if words >= 3 and not has_reset and "resume" in self._strike.failpoint:
                door.reset()
                has_reset = True
            await asyncio.sleep(0.005)
        return reader.returncode == -signal.SIGKILL

    async def _must_be_gone(self, site: Site, request_id: str) -> None:
        await asyncio.sleep(LINGER_S + 0.5)
        async with aio.insecure_channel(site.address, options=client_options()) as channel:
            stub: inference_pb2_grpc.InferenceServiceAsyncStub = inference_pb2_grpc.InferenceServiceStub(channel)
            found = (await stub.Cancel(pb.CancelRequest(request_id=request_id), timeout=5)).found
        if found:
            self._ground.report.broken.append("I8: a request runs on for a client that is gone")

    # ---- figures

    def _happened(self, victim: Victim | None, *, held: int, standby: str) -> Fault:
        strike, history = self._strike, self._ground.history
        name = victim.name if victim is not None else ""
        at_s = history.write("fault", kind=strike.kind, failpoint=strike.failpoint, victim=name, standby=standby)
        since_s = at_s - _BEFORE_S if self._ground.may_overlap else self._began_s
        before = history.tokens_between(since_s, at_s)
        return Fault(at_s, strike.kind, strike.failpoint, standby, held, tokens_before=before)

    async def _measured(self, fault: Fault) -> Fault:
        history = self._ground.history
        now_s = await self._ground.moved_on(fault.at_s)
        fault.tokens_after = history.tokens_between(fault.at_s, now_s)
        fault.pause_s = history.longest_pause_s(fault.at_s, now_s)
        history.write("moved on", kind=fault.kind, pause=round(fault.pause_s, 3))
        if not self._ground.may_overlap:
            history.forget(fault.at_s)
        return fault


async def _busiest(doors: list[Proxy]) -> Proxy:
    """The one through which most is told just now."""
    before = [door.bytes_down for door in doors]
    await asyncio.sleep(_CALM_S)
    return max(zip(doors, before, strict=True), key=lambda pair: pair[0].bytes_down - pair[1])[0]


async def _thaw(victim: Victim, after_s: float) -> None:
    await asyncio.sleep(after_s)
    victim.process.signal(signal.SIGCONT)


async def _reader(address: str, file: Path, rule: str) -> asyncio.subprocess.Process:
    return await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "tests.faults.reading", address, str(file)),
        cwd=ROOT,
        env={**os.environ, VARIABLE: rule},
        stdin=asyncio.subprocess.DEVNULL,
    )


def _problem(file: Path, checker: StreamChecker) -> str:
    """What is wrong with the whole of what was kept; empty when nothing is."""
    try:
        for message in reading.kept(file)[1]:
            checker.hear(message)
        checker.end()
    except Violation as violation:
        return str(violation)
    return ""
