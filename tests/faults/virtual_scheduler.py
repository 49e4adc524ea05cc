"""A scheduler's process in virtual time: the same parts as services/scheduler_process.py, on virtual ports."""

from __future__ import annotations

import asyncio
import functools
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Final

from common.sampling import Grammar, RequestLimits
from protos import inference_pb2 as pb
from scheduler.scheduler import Scheduler
from services.admission import Admission, AdmissionLimits
from services.answering import Answerer
from services.api_keys import ApiKeys, line_of, read_api_keys
from services.draining import drain
from services.engine import Engine
from services.gate import Gate
from services.grammar_checker import GrammarChecker
from services.handlers import service_handler
from services.link_service import ExecutorLinkService
from services.live_requests import LiveRequest, LiveRequests
from services.request_stream import RequestStream
from services.scheduler_service import SchedulerService
from services.tickets import KEY_BYTES, TicketKey, Tickets
from tests.faults.virtual_time import Process

if TYPE_CHECKING:
    from tests.faults.simulation import Cluster

CLIENTS_DIAL: Final = "scheduler"  # executors: virtual_executor.EXECUTORS_DIAL
SILENCE_S: Final = 2.0
STEP_TIMEOUT_S: Final = 6.0
HELLO_TIMEOUT_S: Final = 1.0
SERVICE: Final = pb.DESCRIPTOR.services_by_name["InferenceService"].full_name

TENANTS: Final = {tenant: "pw-" + letter * 43 for tenant, letter in (("north", "N"), ("south", "S"))}
"""Their API keys."""

_TICKET_LIFETIME_S: Final = 86_400
_LAST_WORDS_S: Final = 5.0  # that calls have, once nothing runs any more


@dataclass(frozen=True, slots=True, kw_only=True)
class Kind:
    """What a scheduler differs by from the one that callers know; the same address would be an operator's mistake."""

    clients_dial: str = CLIENTS_DIAL
    model_digest: str = ""  # empty: the model that everybody serves
    ticket_secret: bytes = bytes(KEY_BYTES)
    clock_ahead_s: float = 0.0

    @property
    def executors_dial(self) -> str:
        """Where its executors come to."""
        return f"{self.clients_dial}-link"


USUAL: Final = Kind()


class SimulatedScheduler:
    """One life of a scheduler: it begins with nothing remembered, and its end is for good."""

    def __init__(self, cluster: Cluster, epoch: int, kind: Kind = USUAL) -> None:
        self._cluster = cluster
        self._kind = kind
        self.epoch = epoch
        self.is_leaving = False
        self.process: Process = cluster.world.process(f"{kind.clients_dial}-{epoch}")
        self.process.host = self
        model = replace(cluster.model, digest=kind.model_digest) if kind.model_digest else cluster.model
        self.core = Scheduler(
            cluster.limits, model="fake", eos=set(model.eos_token_ids), secret=epoch.to_bytes(8, "big")
        )
        draw = cluster.world.draw
        self.admission = Admission(
            AdmissionLimits(max_waiting=cluster.max_waiting), jitter=lambda: draw.uniform(0.8, 1.2)
        )
        self.engine = Engine(self.core, admission=self.admission, executor_wait_s=60.0, clock_ns=self._clock_ns)
        self.live = _CountedRequests(cluster)
        answerer = Answerer(
            self.engine,
            model,
            cluster.tokenizer,
            None,
            tickets=Tickets([TicketKey(id="virtual", secret=kind.ticket_secret)], lifetime_s=_TICKET_LIFETIME_S),
            live=self.live,
            grammars=SlowChecker(model),
            clock_s=lambda: cluster.world.wall_s() + kind.clock_ahead_s,
        )
        service = SchedulerService(answerer, RequestLimits(), lambda: len(self.core.sessions))
        self.links = ExecutorLinkService(
            self.engine,
            model,
            epoch=round(cluster.world.wall_s() * 1e9),
            clock=self.process.time,
            heartbeat_ms=400,
            hello_timeout_s=HELLO_TIMEOUT_S,
            silence_s=SILENCE_S,
            step_timeout_s=STEP_TIMEOUT_S,
        )
        self._loop = self.process.spawn(self._run())
        network = cluster.network
        handler = service_handler(SERVICE, pb.DESCRIPTOR, service, open_call=self.admission.open_call)
        network.serve(self.process, handler, Gate(_api_keys))
        network.serve(self.process, self.links.handler())
        self.take_the_addresses()

    def take_the_addresses(self) -> None:
        """Who dials from now on comes here."""
        if not self.process.dead:
            self._cluster.network.listen(self._kind.clients_dial, self.process)
            self._cluster.network.listen(self._kind.executors_dial, self.process)

    def kill(self) -> None:
        """SIGKILL."""
        if not self.process.dead:
            self._cluster.network.kill(self.process)

    def leave(self, *, grace_s: float, restart_after_s: float) -> None:
        """SIGTERM: it serves what it has, for so long at most, and then its successor starts."""
        if not self.process.dead and not self.is_leaving:
            self.is_leaving = True
            self.process.call(lambda: self.process.spawn(self._leave(grace_s, restart_after_s)))

    def check(self) -> None:
        """What the core says must always hold."""
        if not self.process.dead:
            self.core.check()

    async def _run(self) -> None:
        try:
            await self.engine.run()
        except Exception as error:  # the process would end: nothing may bring it there
            self._cluster.broken.append(error)
            raise

    async def _leave(self, grace_s: float, restart_after_s: float) -> None:
        cluster = self._cluster
        cluster.happened["drained"] += bool(self.engine.num_requests)
        await drain(self.engine, self.links, self._loop, grace_s=grace_s, announce=lambda: None)
        cluster.network.close(self.process)
        over_s = cluster.world.now_s + _LAST_WORDS_S
        while any(c.server is self.process for c in cluster.calls()):
            if cluster.world.now_s > over_s:
                cluster.excuse_all("the scheduler was stopped before its caller had read all")
                break
            await asyncio.sleep(0.05)
        cluster.network.kill(self.process)
        cluster.world.after(restart_after_s, cluster.start_scheduler)

    def _clock_ns(self) -> int:
        return int(self.process.time() * 1e9)


class SlowChecker(GrammarChecker):
    """Lets every grammar in, after a while: without a worker."""

    async def check(self, field: str, grammar: Grammar, tenant: str) -> None:
        await asyncio.sleep(0.3)


class _CountedRequests(LiveRequests):
    """Tells the story how often a reader came to a request that ran on."""

    def __init__(self, cluster: Cluster) -> None:
        super().__init__(linger_s=cluster.linger_s, max_lingering=cluster.max_lingering)
        self._cluster = cluster

    def take_over(self, live: LiveRequest, stream: RequestStream) -> None:
        self._cluster.happened["attached"] += 1
        super().take_over(live, stream)


@functools.cache
def _api_keys() -> ApiKeys:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "api-keys"
        file.write_text("\n".join(line_of(tenant, key) for tenant, key in TENANTS.items()))
        return read_api_keys(file)
