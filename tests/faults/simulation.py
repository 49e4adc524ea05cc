"""A whole cluster in one thread and virtual time, all drawn from one seed: scheduler, executors, callers, faults.

What runs is the production code from the public handler to the runner: services/, scheduler/ and executor/ as they are.
Simulated are the clock, the processes, gRPC's transport, the compute thread, and the model (executor/fake_runner.py,
whose slab finds a block that was shared, reused or copied wrongly in the step in which it would change a token).

`run(seed)` plays one story and checks it all the way; what it raises replays with the same seed.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import tempfile
import types
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final
from unittest import mock

import grpc

from common import failpoints
from common.errors import Overloaded, RequestFailed, Unavailable
from common.failpoints import EXECUTOR, SCHEDULER, Effect
from common.model_folder import ModelFolder, read_model_folder
from common.sampling import RequestLimits, SamplingParams, StopConditions
from common.step import StepPlan
from executor.fake_runner import FakeRunner, Prefix, digests_of, prefix_hash_token
from protos import inference_pb2 as pb
from scheduler.scheduler import Scheduler, SchedulerLimits
from scheduler.suspicion import GIVEN_UP_AT
from services import engine, executor_service, handlers, link_service
from services.admission import Admission, AdmissionLimits
from services.answering import Answerer
from services.engine import Engine
from services.executor_service import ExecutorService
from services.gate import Gate
from services.handlers import service_handler
from services.link_service import ExecutorLinkService
from services.live_requests import LiveRequests
from services.scheduler_service import SchedulerService
from services.status import from_rpc_error
from services.text import Tokenizer
from services.tickets import KEY_BYTES, TicketKey, Tickets
from tests.e2e import fake_model
from tests.faults import tampering
from tests.faults.checker import Expected, StreamChecker, Violation, undisturbed
from tests.faults.virtual_compute import VirtualCompute
from tests.faults.virtual_time import Process, World
from tests.faults.virtual_wire import Channel, Connection, Network

LONGEST: Final = 80  # tokens of the longest sequence; every executor can hold it
CLIENTS_DIAL: Final = "scheduler"
EXECUTORS_DIAL: Final = "scheduler-link"
PATIENCE_S: Final = 90.0  # virtual seconds in which every story must have ended
FOR_GOOD_S: Final = 1000.0
SILENCE_S: Final = 2.0
STEP_TIMEOUT_S: Final = 6.0

_LOOK_EACH_S: Final = 0.1
_AT_ONCE_S: Final = 0.12  # the way to the scheduler, at its slowest

_TICKET_KEY: Final = TicketKey(id="virtual", secret=bytes(KEY_BYTES))
_SERVICE: Final = pb.DESCRIPTOR.services_by_name["InferenceService"].full_name
_GENERATE: Final = f"/{_SERVICE}/GenerateStream"
_FAMILIES: Final = [[(11 * family + 7 * i) % 300 + 1 for i in range(40)] for family in range(3)]


@functools.cache
def fake_folder() -> tuple[ModelFolder, Tokenizer]:
    """The model that everybody here serves."""
    with tempfile.TemporaryDirectory() as folder:
        model = read_model_folder(fake_model.write(Path(folder) / "fake"))
        return model, Tokenizer(model.path / "tokenizer.json")


def true_token(prefix: Prefix) -> int | None:
    """The model: a hash of everything that may matter; now and then its logits are not finite."""
    token = prefix_hash_token(prefix)
    return None if token % 512 == 77 else token


# ---- who plays


class SimulatedScheduler:
    """The scheduler's process: the same parts as services/scheduler_process.py, on a virtual port."""

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster
        self.epoch = 0
        self.process: Process = cluster.world.process("none")
        self.core: Scheduler
        self.engine: Engine
        self.start()

    def start(self) -> None:
        """Born, or born again with nothing remembered."""
        self.epoch += 1
        cluster = self._cluster
        self.process = cluster.world.process(f"scheduler-{self.epoch}")
        self.core = Scheduler(
            cluster.limits, model="fake", eos=set(cluster.model.eos_token_ids), secret=b"%d" % self.epoch
        )
        draw = cluster.world.draw
        self.admission = Admission(
            AdmissionLimits(max_waiting=cluster.max_waiting), jitter=lambda: draw.uniform(0.8, 1.2)
        )
        self.engine = Engine(self.core, admission=self.admission, executor_wait_s=60.0, clock_ns=self._clock_ns)
        self.live = LiveRequests()
        answerer = Answerer(
            self.engine,
            cluster.model,
            cluster.tokenizer,
            None,
            tickets=Tickets([_TICKET_KEY], lifetime_s=3600),
            live=self.live,
            clock_s=lambda: cluster.world.now_s,
        )
        service = SchedulerService(answerer, RequestLimits(), lambda: len(self.core.sessions))
        links = ExecutorLinkService(
            self.engine,
            cluster.model,
            epoch=self.epoch,
            heartbeat_ms=400,
            silence_s=SILENCE_S,
            step_timeout_s=STEP_TIMEOUT_S,
        )
        self.process.spawn(self._run())
        network = cluster.network
        handler = service_handler(_SERVICE, pb.DESCRIPTOR, service, open_call=self.admission.open_call)
        network.listen(CLIENTS_DIAL, self.process, handler, Gate(None))
        network.listen(EXECUTORS_DIAL, self.process, links.handler())

    def kill(self, restart_after_s: float) -> None:
        """SIGKILL, and somebody starts it again."""
        if not self.process.dead:
            self._cluster.network.kill(self.process)
            self._cluster.world.after(restart_after_s, self.start)

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

    def _clock_ns(self) -> int:
        return int(self.process.time() * 1e9)


class SimulatedExecutor:
    """An executor's process, started again with other memory whenever it ends."""

    def __init__(self, cluster: Cluster, number: int) -> None:
        self._cluster = cluster
        self._draw = cluster.world.draw
        self.number = number
        self.lives = 0
        self.slowness = 1.0
        self.hangs_until_s = 0.0
        self.process: Process = cluster.world.process("none")
        self.process.dead = True
        self._stop = asyncio.Event()
        self._service: ExecutorService
        # own number → (scheduler's epoch, session there, link)
        self._sessions: dict[int, tuple[int, int | None, Connection | None]] = {}
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
        room = draw.choice([LONGEST, LONGEST, LONGEST + 16, 2 * LONGEST])
        self._shape: dict[str, Any] = {
            "block_size": size,
            "num_blocks": room // size + 2,
            "max_sequences": draw.choice([2, 4, 8]),
            "credit": draw.choice([1, 2, 2, 3]),
            "max_step_tokens": draw.choice([16, 64, 256]),
        }
        self._step_s = draw.choice([0.002, 0.005, 0.02])
        self.process = self._cluster.world.process(f"executor-{self.number}.{self.lives}")
        self.process.host = self
        self._sessions, self._excused, self._lies = {}, [], False
        if self.arm_next_life is not None:
            self.arm_next_life(self.process)
            self.arm_next_life = None
        self.process.spawn(self._run())

    def kill(self, restart_after_s: float) -> None:
        """SIGKILL, and somebody starts it again."""
        if not self.process.dead:
            self._cluster.network.kill(self.process)
            self._cluster.world.after(restart_after_s, self.start)

    def leave(self, restart_after_s: float) -> None:
        """SIGTERM; started again once it has ended."""
        if not self.process.dead:
            self._restart_after_s = restart_after_s
            self.process.call(self._stop.set)

    def link(self) -> Connection | None:
        """Its live connection."""
        return next(iter(self._cluster.network.of(self.process)), None)

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
        )
        try:
            await self._service.run(self._stop)
        except Exception as error:
            self._cluster.broken.append(error)
            raise
        self._cluster.network.kill(process)
        self._cluster.world.after(self._restart_after_s, self.start)

    def _make_runner(self) -> FakeRunner:
        return FakeRunner(
            name=f"executor-{self.number}",
            model_digest=self._cluster.model.digest,
            vocab_size=self._cluster.model.vocab_size,
            max_model_len=LONGEST,
            next_token=self._next_token,
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
        self._sessions[number] = (self._cluster.scheduler.epoch, self._service._session, self.link())

    def before_step(self, number: int) -> None:
        """Who computes for a session that is over answers wrongly: nobody may believe it."""
        epoch, session, _ = self._sessions[number]
        scheduler = self._cluster.scheduler
        self._lies = epoch != scheduler.epoch or all(s.id != session for s in scheduler.core.sessions)

    def too_many_plans(self, number: int, num_plans: int) -> None:
        """The scheduler was to keep to the credit."""
        if not self._is_excused(number):
            self._cluster.broken.append(Violation(f"I10: {num_plans} plans are queued on executor {self.number}"))

    def step_failed(self, number: int, error: Exception) -> None:
        if not self._is_excused(number) and not self._lies:
            self._cluster.broken.append(error)

    def _is_excused(self, number: int) -> bool:
        return self._sessions[number][2] in self._excused if number in self._sessions else bool(self._excused)


@dataclass(kw_only=True)
class Caller:
    """One request and the one who waits for its answer."""

    name: str
    request: pb.GenerateStreamRequest
    expected: list[Expected]
    starts_s: float
    leaves_after: int | None  # tokens, then the caller is gone
    reads_slowly_s: float
    done: bool = False
    done_s: float = 0.0
    left: bool = False
    attempts: int = 0
    excuse: str = ""  # a fault that may end its stream, since the present attempt began
    seen: int = 0
    # the scheduler's epoch when the present attempt began, and executors that had died uncleanly by then
    since: tuple[int, int] = (0, 0)


class Cluster:
    """One story. Everything that is drawn is drawn from the world's one source."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.world = World(seed)
        self.model, self.tokenizer = fake_folder()
        self.network = Network(self.world)
        self.broken: list[Exception] = []
        self.faults: Counter[str] = Counter()
        self.refusals = 0
        self.given_up = 0
        self.calls_are_cut = False
        self.gone_for_good = False  # an executor that hangs and is not helped
        draw = self.world.draw
        self.limits = SchedulerLimits(
            token_budget=draw.choice([8, 24, 64]),
            watermark=draw.choice([0.0, 0.0, 0.1]),
            prefix_caching=draw.random() < 0.85,
        )
        self.max_waiting = draw.choice([4, 2048, 2048])
        self.scheduler = SimulatedScheduler(self)
        self.executors = [SimulatedExecutor(self, i) for i in range(draw.choice([1, 2, 2, 3]))]
        self.clients = self.world.process("clients")
        self.callers = [self._draw_caller(i) for i in range(draw.randint(3, 7))]
        for caller in self.callers:
            self.clients.spawn(self._call(caller))
        self.poison = self._draw_poison()
        self._draw_faults()

    # ---- what is drawn

    def _draw_caller(self, number: int) -> Caller:
        draw = self.world.draw
        own = [draw.randrange(300) for _ in range(draw.choice([1, 2, 5]))]
        shared = _FAMILIES[draw.randrange(2)][: draw.randrange(0, 34)]
        before = [draw.randrange(300)] * 8 if draw.random() < 0.2 else []  # equal blocks after other ones
        prompt = [*before, *shared, *own]
        sampling = SamplingParams(temperature=float(draw.random() < 0.7), seed=draw.randrange(3))
        n = draw.choice([1, 1, 1, 2, 3])
        stop = StopConditions(
            max_tokens=draw.choice([1, 3, 8, 16, 24, 32]),
            stop_token_ids=draw.choice([(), (), (), tuple(range(0, 300, 29))]),
            ignore_eos=draw.random() < 0.5,
        )
        if draw.random() < 0.25:  # a string that the undisturbed text does hold, as a rule
            text = self._alone(prompt, sampling, 0, stop).text or "?"
            at = draw.randrange(max(1, len(text)))
            stop = StopConditions(
                max_tokens=stop.max_tokens,
                stop_token_ids=stop.stop_token_ids,
                stop_strings=(text[at : at + draw.randint(1, 3)] or "?",),
                ignore_eos=stop.ignore_eos,
            )
        request = pb.GenerateStreamRequest(
            request_id=f"{number}",
            token_ids=pb.TokenIds(ids=prompt),
            sampling=pb.SamplingParams(temperature=sampling.temperature, seed=sampling.seed, n=n),
            stopping=pb.StopConditions(
                max_tokens=stop.max_tokens,
                stop=stop.stop_strings,
                stop_token_ids=stop.stop_token_ids,
                ignore_eos=stop.ignore_eos,
            ),
        )
        return Caller(
            name=f"request {number}",
            request=request,
            expected=[self._alone(prompt, sampling, choice, stop) for choice in range(n)],
            starts_s=draw.uniform(0.0, 1.2),
            leaves_after=draw.randrange(8) if draw.random() < 0.12 else None,
            reads_slowly_s=draw.choice([0.0] * 5 + [0.1]),
        )

    def _alone(self, prompt: list[int], sampling: SamplingParams, choice: int, stop: StopConditions) -> Expected:
        return undisturbed(
            prompt, sampling, choice, stop,
            model=true_token, tokenizer=self.tokenizer, vocab_size=self.model.vocab_size,
            eos=frozenset(self.model.eos_token_ids),
        )  # fmt: skip

    def _draw_poison(self) -> Prefix | None:
        """A place in some answer that no executor survives, in a few stories."""
        draw = self.world.draw
        if draw.random() >= 0.08:
            return None
        caller = draw.choice(self.callers)
        choice = draw.randrange(len(caller.expected))
        places = list(_places(caller, choice))
        return draw.choice(places) if places else None

    def _draw_faults(self) -> None:
        draw = self.world.draw
        kinds = draw.choice(_PROFILES)
        self.network.jitter_s = draw.choice([0.0, 0.0, 0.005, 0.05])
        for _ in range(draw.choice([0, 1, 2, 3, 4, 6]) if kinds else 0):
            fault = draw.choice(kinds)
            self.world.at(draw.uniform(0.02, 1.6), lambda fault=fault: self._strike(fault))  # type: ignore[misc]

    def _strike(self, fault: Fault) -> None:
        self.faults[fault.__name__] += 1
        self.world.note(fault.__name__)
        fault(self)

    # ---- callers

    async def _call(self, caller: Caller) -> None:
        draw = self.world.draw
        await asyncio.sleep(caller.starts_s)
        while not caller.done:
            caller.attempts += 1
            away = self.scheduler.process.dead or self.scheduler.process in self.network.stopped
            caller.excuse = "the scheduler is away" if away else ""
            caller.since = self.scheduler.epoch, self.scheduler.core.counters.unclean_ends
            checker = StreamChecker(
                caller.name,
                caller.expected,
                num_prompt=len(caller.request.token_ids.ids),
                may_fail=self._may_find_rows_unusable,
            )
            try:
                try:
                    await self._read(caller, checker)
                except grpc.RpcError as error:
                    pause_s = self._judge(caller, error)
                    if not caller.done:
                        await asyncio.sleep(pause_s * draw.uniform(0.5, 1.0))
            except Exception as violation:  # noqa: BLE001 - whatever it is, the story ends with it
                self.broken.append(violation)
                return

    async def _read(self, caller: Caller, checker: StreamChecker) -> None:
        channel = Channel(self.network, self.clients, CLIENTS_DIAL)
        call = channel.unary_stream(_GENERATE, window=2 if caller.reads_slowly_s else 50)(
            caller.request.SerializeToString()
        )
        async for data in call:
            checker.hear(pb.GenerateStreamResponse.FromString(data))
            caller.seen = checker.num_tokens
            if caller.leaves_after is not None and checker.num_tokens >= caller.leaves_after:
                call.cancel()
                caller.left = True
                break
            if caller.reads_slowly_s:
                await asyncio.sleep(caller.reads_slowly_s)
        else:
            checker.end()
            if self._holds_poison(caller):
                raise Violation(f"P1: {caller.name}: was answered, although nobody can")
        caller.done, caller.done_s = True, self.world.now_s

    def _judge(self, caller: Caller, error: grpc.RpcError) -> float:
        """Whether the stream was allowed to fail, and in how many seconds the caller comes again."""
        code = error.code()
        means = from_rpc_error(error)
        if isinstance(means, Overloaded):
            self.refusals += 1
            if means.retry_after_s <= 0:
                raise Violation(f"I10: {caller.name}: refused without a time to come back")
            return means.retry_after_s
        if isinstance(means, Unavailable) and caller.excuse:
            return 0.2
        if isinstance(means, RequestFailed) and self._may_be_given_up(caller):
            self.given_up += 1
            caller.done, caller.done_s = True, self.world.now_s
            return 0.0
        raise Violation(
            f"P1: {caller.name}: lost with {code.name}: {error.details()}; excuse: {caller.excuse or 'none'}"
        )

    def _may_be_given_up(self, caller: Caller) -> bool:
        """So many executors died since the present attempt began; where nothing else kills them, of this request."""
        epoch, before = caller.since
        deaths = self.scheduler.core.counters.unclean_ends - before if epoch == self.scheduler.epoch else 0
        if set(self.faults) == {POISON}:
            return deaths == GIVEN_UP_AT and self._holds_poison(caller)
        return deaths >= GIVEN_UP_AT

    def _holds_poison(self, caller: Caller) -> bool:
        poison = self.poison
        return poison is not None and any(poison in _places(caller, choice) for choice in range(len(caller.expected)))

    def _may_find_rows_unusable(self) -> bool:
        """A choice ends with an error after two unusable rows in one place. Liars make some that nobody computed."""
        return sum(self.faults[lie.__name__] for lie in _LIES) > 1

    def excuse_all(self, why: str) -> None:
        """Streams that are open now may end by this fault."""
        self.calls_are_cut = True
        for caller in self.callers:
            caller.excuse = caller.excuse or why

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
        self.world.run(until=lambda: False, deadline_s=self.world.now_s + 2.5)
        self._raise_what_broke()
        self._check_quiescence()

    def _is_over(self) -> bool:
        return bool(self.broken) or all(caller.done for caller in self.callers)

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
        asked = sum(len(c.expected) for c in self.callers if not c.done or self.world.now_s - c.done_s < _AT_ONCE_S)
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
        if core.num_sequences or core.waiting or engine.num_requests:
            raise Violation(f"I8: {core.num_sequences} sequences are left, {engine.num_requests} streams")
        if core.num_suspects or len(self.scheduler.live):
            raise Violation(f"I8: {core.num_suspects} suspects are left, {len(self.scheduler.live)} live requests")
        for session in core.sessions:
            if session.outstanding:
                continue  # it was joined a moment ago, or hangs
            if session.pool.num_free != session.pool.num_blocks:
                raise Violation(f"I8: {session.pool.num_blocks - session.pool.num_free} blocks are lost")
        left = [c for c in self.network.of(self.clients) if not c.context.is_over and not c.server.dead]
        if left:
            raise Violation(f"I8: {len(left)} calls are left open")


def _places(caller: Caller, choice: int) -> Iterator[Prefix]:
    """What the model is asked for one choice, token by token."""
    prompt, tokens, sampling = caller.request.token_ids.ids, caller.expected[choice].tokens, caller.request.sampling
    digests = digests_of([*prompt, *tokens])
    for num_tokens in range(len(prompt), len(prompt) + len(tokens)):
        yield Prefix(
            num_tokens=num_tokens,
            digest=digests[num_tokens - 1],
            greedy=sampling.temperature == 0,
            seed=sampling.seed,
            choice=choice,
        )


# ---- faults

POISON: Final = "a request kills its executor"

Fault = Callable[[Cluster], None]


def _any_executor(cluster: Cluster) -> SimulatedExecutor:
    return cluster.world.draw.choice(cluster.executors)


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


def a_caller_is_cut_off(cluster: Cluster) -> None:
    calls = cluster.network.of(cluster.clients)
    if calls:
        cluster.excuse_all("its connection was cut")
        cluster.world.draw.choice(calls).cut()


def a_caller_goes_dark(cluster: Cluster) -> None:
    calls = cluster.network.of(cluster.clients)
    if calls:
        cluster.excuse_all("its connection went dark")
        cluster.world.draw.choice(calls).darken(cluster.world.draw.choice([0.5, 2.5, 8.0]))


def the_scheduler_is_killed(cluster: Cluster) -> None:
    cluster.excuse_all("the scheduler was killed")
    cluster.scheduler.kill(cluster.world.draw.choice([0.1, 1.0, 3.0]))


def the_scheduler_is_frozen(cluster: Cluster) -> None:
    cluster.excuse_all("the scheduler was frozen")
    cluster.network.freeze(cluster.scheduler.process, cluster.world.draw.choice([0.3, 1.5, 3.2, 6.0]))


def the_scheduler_stalls(cluster: Cluster) -> None:
    cluster.calls_are_cut = True
    cluster.network.stall(cluster.scheduler.process, cluster.world.draw.choice([0.3, 1.5, 3.0]))


def the_scheduler_breaks_at_a_failpoint(cluster: Cluster) -> None:
    draw, process = cluster.world.draw, cluster.scheduler.process
    kills, seconds = draw.random() < 0.7, draw.choice([0.2, 1.5, 3.5])

    def strike() -> None:
        cluster.excuse_all("the scheduler broke at a failpoint")
        if kills:
            cluster.scheduler.kill(seconds)
            raise KilledHere
        cluster.network.freeze(process, seconds)

    cluster.arm(process, draw.sample(SCHEDULER, 4), strike)


def an_executor_breaks_at_a_failpoint(cluster: Cluster) -> None:
    executor = _any_executor(cluster)
    cluster.arm(executor.process, cluster.world.draw.sample(EXECUTOR, 4), _breaking(cluster, executor))


def an_executor_breaks_as_it_starts(cluster: Cluster) -> None:
    executor, place = _any_executor(cluster), cluster.world.draw.choice(["mid_load", "before_ready", "before_hello"])
    strike = _breaking(cluster, executor)
    executor.arm_next_life = lambda process: cluster.arm(process, [place], strike, passage=1)
    executor.kill(cluster.world.draw.choice([0.05, 0.5]))


def _breaking(cluster: Cluster, executor: SimulatedExecutor) -> Callable[[], None]:
    """Kills or freezes it where it stands."""
    draw = cluster.world.draw
    kills, seconds = draw.random() < 0.7, draw.choice([0.2, 1.5, 3.5])

    def strike() -> None:
        if kills:
            executor.kill(seconds)
            raise KilledHere
        cluster.network.freeze(executor.process, seconds)

    return strike


_CRASHES: Final[list[Fault]] = [an_executor_is_killed, an_executor_is_killed, an_executor_leaves]
_PAUSES: Final[list[Fault]] = [an_executor_is_frozen, an_executor_stalls, a_step_hangs, an_executor_is_slow]
_NETWORK: Final[list[Fault]] = [a_link_is_cut, a_link_goes_dark, a_link_is_slow]
_FAILPOINTS: Final[list[Fault]] = [
    the_scheduler_breaks_at_a_failpoint,
    an_executor_breaks_at_a_failpoint,
    an_executor_breaks_as_it_starts,
]
_LIES: Final[list[Fault]] = [a_result_is_changed, a_plan_is_changed]
_CALLERS: Final[list[Fault]] = [a_caller_is_cut_off, a_caller_goes_dark]
_SCHEDULER: Final[list[Fault]] = [the_scheduler_is_killed, the_scheduler_is_frozen, the_scheduler_stalls]
FAULTS: Final[list[Fault]] = [*_CRASHES, *_PAUSES, *_NETWORK, *_LIES, *_CALLERS, *_SCHEDULER, *_FAILPOINTS]
_PROFILES: Final[list[list[Fault]]] = [
    [],
    _CRASHES,
    _PAUSES,
    _NETWORK,
    _LIES,
    _LIES,
    [*_CRASHES, *_NETWORK],
    [*_CRASHES, *_PAUSES],
    [*_CALLERS, an_executor_is_killed],
    _SCHEDULER,
    _FAILPOINTS,
    FAULTS,
    FAULTS,
    FAULTS,
]


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


@contextlib.contextmanager
def simulated() -> Iterator[None]:
    """Production code meets the virtual world: these names, and no others, are exchanged."""
    clock = types.SimpleNamespace(
        monotonic=lambda: asyncio.get_running_loop().time(),
        time_ns=lambda: int(asyncio.get_running_loop().time() * 1e9),
    )

    def uniform(low: float, high: float) -> float:
        return _here().world.draw.uniform(low, high)

    def token_bytes(size: int) -> bytes:
        return _here().world.draw.randbytes(size)

    def token_hex(size: int) -> str:
        return token_bytes(size).hex()

    chance = types.SimpleNamespace(uniform=uniform)
    lottery = types.SimpleNamespace(token_bytes=token_bytes, token_hex=token_hex)
    pulse: Any = link_service.ComputePulse.__init__
    level = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with (
            mock.patch.object(failpoints, "hit", _hit),
            mock.patch.object(link_service, "time", clock),
            mock.patch.dict(pulse.__kwdefaults__, clock=clock.monotonic),
            mock.patch.object(executor_service, "time", clock),
            mock.patch.object(executor_service, "ComputeThread", VirtualCompute),
            mock.patch.object(executor_service, "random", chance),
            mock.patch.object(executor_service, "secrets", lottery),
            mock.patch.object(engine, "secrets", lottery),
            mock.patch.object(handlers, "secrets", lottery),
        ):
            yield
    finally:
        logging.disable(level)


class KilledHere(BaseException):
    """Unwinds what the killed process was doing. Nothing of it is seen any more."""


def _hit(name: str) -> Effect:
    """A failpoint in a simulated process."""
    loop = asyncio._get_running_loop()
    if isinstance(loop, Process) and name in loop.armed and not loop.dead:
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


def run(seed: int) -> Story:
    """Play one story. Raises Violation, or what else broke, with a note that says how to replay it."""
    with simulated():
        cluster = Cluster(seed)
        try:
            cluster.play()
        except Exception as error:
            error.add_note(f"at {cluster.world.now_s:.3f} s of seed {seed}; python -m tests.faults.simulate {seed}")
            error.add_note(f"faults: {dict(cluster.faults)}")
            raise
        finally:
            cluster.world.close()
    counters = cluster.scheduler.core.counters
    return Story(
        seed=seed,
        trace=cluster.world.trace,
        virtual_s=cluster.world.now_s,
        tokens=sum(caller.seen for caller in cluster.callers),
        moved=counters.moved,
        preemptions=counters.preemptions,
        refusals=cluster.refusals,
        given_up=cluster.given_up,
        faults=cluster.faults,
    )
