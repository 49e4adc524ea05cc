"""An executor's process in virtual time: the production code of services/executor_service.py around the fake model.

It is started again with other memory whenever it ends, tells lies once nobody may believe it, and complains when it is
asked for what it cannot do.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final

from common.step import StepPlan
from executor.fake_runner import FakeRunner, Prefix, prefix_hash_token
from services.executor_service import ExecutorService
from tests.faults.checker import Violation
from tests.faults.virtual_time import KilledHere, Process
from tests.faults.virtual_wire import Channel, Connection
from tests.late_runner import LateRunner

if TYPE_CHECKING:
    from tests.faults.simulation import Cluster
    from tests.faults.virtual_scheduler import SimulatedScheduler

LONGEST: Final = 80  # tokens of the longest sequence; every executor can hold it
EXECUTORS_DIAL: Final = "scheduler-link"
POISON: Final = "a request kills its executor"


def true_token(prefix: Prefix) -> int | None:
    """The model: a hash of everything that may matter; now and then its logits are not finite."""
    token = prefix_hash_token(prefix)
    return None if token % 512 == 77 else token


def guess_token(prefix: Prefix) -> int | None:
    """What executors guess: mostly right, often wrong, sometimes nothing."""
    fate = prefix.digest % 8
    token = true_token(prefix)
    return None if fate == 0 or token is None else token + (fate < 3)


class SimulatedExecutor:
    """One machine, on which an executor lives, ends and lives again."""

    def __init__(self, cluster: Cluster, number: int) -> None:
        self._cluster = cluster
        self._draw = cluster.world.draw
        self.number = number
        self.name = self.own_name = f"executor-{number}"
        self.lives = 0
        self.slowness = 1.0
        self.hangs_until_s = 0.0
        self.process: Process = cluster.world.process("none")
        self.process.dead = True
        self._stop = asyncio.Event()
        self._service: ExecutorService
        # own number → who it is for, session there, link
        self._sessions: dict[int, tuple[SimulatedScheduler, int | None, Connection | None]] = {}
        self._epoch = 0  # of the newest scheduler that this process has served
        self._excused: list[Connection] = []  # links whose messages were tampered with
        self._lies = False
        self.arm_next_life: Callable[[Process], None] | None = None
        self.start()

    def start(self) -> None:
        """Born with the memory that the story gives it."""
        if not self.process.dead:
            return
        draw = self._draw
        self.lives += 1
        size = draw.choice([2, 4, 8])
        room = LONGEST if self._cluster.is_crowded else draw.choice([LONGEST, LONGEST, LONGEST + 16, 2 * LONGEST])
        self._shape: dict[str, Any] = {
            "block_size": size,
            "num_blocks": room // size + 2,
            "max_sequences": 8 if self._cluster.is_crowded else draw.choice([2, 4, 8]),
            "credit": draw.choice([1, 2, 2, 3]),
            "max_step_tokens": draw.choice([16, 64, 256]),
        }
        self._step_s = draw.choice([0.002, 0.005, 0.02])
        # drawn apart, and in every fifth story, so that the others are what they were
        apart = random.Random(f"{self.name} {self.lives} {self._shape} {self._step_s}")
        if self._cluster.seed % 5 == 4 and not self._cluster.late and apart.random() < 0.8:
            self._shape |= {"guess": guess_token, "max_drafts": apart.choice([1, 3, 8]), "step_overhead_tokens": 24}
        self.process = self._cluster.world.process(f"{self.name}.{self.lives}")
        self.process.host = self
        self._sessions, self._epoch, self._excused, self._lies = {}, 0, [], False
        if self.arm_next_life is not None:
            self.arm_next_life(self.process)
            self.arm_next_life = None
        self.process.spawn(self._run())

    def kill(self, restart_after_s: float) -> None:
        """SIGKILL, and somebody starts it again, by its own name."""
        if not self.process.dead:
            self._cluster.network.kill(self.process)
            self._cluster.world.after(restart_after_s, self.start)
            self.name = self.own_name

    def leave(self, restart_after_s: float) -> None:
        """SIGTERM; started again once it has ended."""
        if not self.process.dead:
            self._restart_after_s = restart_after_s
            self.process.call(self._stop.set)

    def link(self) -> Connection | None:
        """The connection that it made last, if it lives."""
        return next(reversed(self._cluster.network.of(self.process)), None)

    def excuse(self, link: Connection) -> None:
        """What is said on the link is changed on the way: the runner may rightly refuse it."""
        self._excused.append(link)

    async def _run(self) -> None:
        self._stop = asyncio.Event()
        process = self.process
        self._service = ExecutorService(
            self._make_runner,
            EXECUTORS_DIAL,
            dial=lambda: Channel(self._cluster.network, process, EXECUTORS_DIAL),  # type: ignore[arg-type,return-value]
            drain_s=self._draw.choice([0.5, 5.0]),
            max_backoff_s=0.5,
            clock=process.time,
        )
        try:
            await self._service.run(self._stop)
        except Exception as error:
            self._cluster.broken.append(error)
            raise
        self._cluster.network.kill(process)
        self.name = self.own_name
        self._cluster.world.after(self._restart_after_s, self.start)

    def _make_runner(self) -> FakeRunner:
        return (LateRunner if self._cluster.late else FakeRunner)(
            name=self.name,
            model_digest=self._cluster.model.digest,
            vocab_size=self._cluster.model.vocab_size,
            max_model_len=LONGEST,
            next_token=self._next_token,
            compile_rows=self.lives % 3,
            left_out_every=self.lives % 4,
            **self._shape,
        )

    def _next_token(self, prefix: Prefix) -> int | None:
        if prefix == self._cluster.poison:
            self._cluster.faults[POISON] += 1
            self.kill(self._draw.choice([0.05, 0.5]))
            raise KilledHere
        token = true_token(prefix)
        return token + 1 if self._lies and token is not None else token

    # ---- for the virtual compute thread

    def step_s(self, plan: StepPlan) -> float:
        seconds = self._step_s * self.slowness * self._draw.uniform(0.5, 1.5) + 0.0001 * plan.num_tokens
        return max(seconds, self.hangs_until_s - self._cluster.world.now_s)

    def session_begins(self, number: int) -> None:
        link = self.link()
        scheduler: SimulatedScheduler = self._cluster.scheduler if link is None else link.server.host
        self._sessions[number] = scheduler, self._service._session, link
        if scheduler.epoch < self._epoch:
            problem = f"I5: {self.name} serves scheduler {scheduler.epoch} again, which {self._epoch} has replaced"
            self._cluster.broken.append(Violation(problem))
        self._epoch = scheduler.epoch

    def before_step(self, number: int) -> None:
        """Who computes for a session that is over answers wrongly: nobody may believe it."""
        scheduler, session, _ = self._sessions[number]
        self._lies = scheduler.process.dead or all(s.id != session for s in scheduler.core.sessions)

    def too_many_plans(self, number: int, num_plans: int) -> None:
        """The scheduler was to keep to the credit."""
        if not self._is_excused(number):
            self._cluster.broken.append(Violation(f"I10: {num_plans} plans are queued on {self.name}"))

    def step_failed(self, number: int, error: Exception) -> None:
        if not self._is_excused(number) and not self._lies:
            self._cluster.broken.append(error)

    def _is_excused(self, number: int) -> bool:
        return self._sessions[number][2] in self._excused if number in self._sessions else bool(self._excused)
