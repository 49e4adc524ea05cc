"""Those who ask, and check every message: once, with the client for Python, and with tickets by hand."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING, Final

import grpc

from common.errors import Overloaded, RequestFailed, Superseded, Unavailable
from executor.fake_runner import Prefix
from pagewire.aio import AsyncClient, AsyncStream
from pagewire.calls import GENERATE, RESUME
from pagewire.continuation import Continuation
from protos import inference_pb2 as pb
from scheduler.suspicion import GIVEN_UP_AT
from services.status import from_rpc_error
from tests.faults.checker import StreamChecker, Violation
from tests.faults.drawn_request import DrawnRequest
from tests.faults.virtual_executor import POISON
from tests.faults.virtual_scheduler import CLIENTS_DIAL, TENANTS, SimulatedScheduler
from tests.faults.virtual_time import Process
from tests.faults.virtual_wire import Channel, ClientCall

if TYPE_CHECKING:
    from tests.faults.simulation import Cluster


Metadata = tuple[tuple[str, str], ...]

PATIENCE_S: Final = 90.0  # virtual seconds in which every story must have ended


class Caller:
    """One who asks once, and anew from the beginning when the call fails."""

    def __init__(self, cluster: Cluster, drawn: DrawnRequest, number: int) -> None:
        draw = cluster.world.draw
        self.cluster = cluster
        self.drawn = drawn
        self.name = f"request {number}"
        self.process = self._born()
        self.starts_s = draw.uniform(0.0, 0.2 if cluster.is_crowded else 1.2)
        self.leaves_after = draw.randrange(8) if draw.random() < 0.12 else None  # tokens, then the caller is gone
        self.reads_slowly_s = draw.choice([0.0] * 5 + [0.1])
        self.attempts = 0
        self.seen = 0  # tokens
        self.done = self.left = False
        self.done_s = 0.0
        self.excuse = ""  # a fault that may end its stream, since the present attempt began
        # the scheduler of the present attempt, and executors that had died uncleanly by then
        self._since: tuple[SimulatedScheduler, int] = cluster.scheduler, 0
        self._heard = False  # something, in the present attempt
        self.process.spawn(self._live(self.starts_s))

    @property
    def metadata(self) -> Metadata:
        """Who it is."""
        return (("authorization", f"Bearer {TENANTS[self.drawn.tenant]}"),)

    @property
    def is_held_s(self) -> float:
        """How long its sequences may run on once it is done."""
        return 0.0

    @property
    def is_own_process(self) -> bool:
        """It may be killed without others."""
        return False

    def is_over(self) -> None:
        """Nothing more is expected."""
        self.done, self.done_s = True, self.cluster.world.now_s

    def _born(self) -> Process:
        return self.cluster.clients

    async def _live(self, starts_s: float) -> None:
        await asyncio.sleep(starts_s)
        while not self.done:
            self._begin_attempt()
            try:
                try:
                    await self._read()
                except grpc.RpcError as error:
                    pause_s = self._judge(error)
                    if not self.done:
                        await asyncio.sleep(pause_s * self.cluster.world.draw.uniform(0.5, 1.0))
            except Exception as violation:  # noqa: BLE001 - whatever it is, the story ends with it
                self.cluster.broken.append(violation)
                return

    def _begin_attempt(self) -> None:
        cluster = self.cluster
        self.attempts += 1
        self._heard = False
        scheduler = cluster.scheduler
        away = scheduler.process.dead or scheduler.process in cluster.network.stopped or scheduler.is_leaving
        self.excuse = "the scheduler is away" if away else ""
        self._since = scheduler, scheduler.core.counters.unclean_ends

    def _checker(self) -> StreamChecker:
        return StreamChecker(
            self.name,
            self.drawn.expected,
            num_prompt=len(self.drawn.prompt),
            may_fail=self.cluster.may_find_rows_unusable,
            must_be_exact=True,
            may_resume=type(self) is not Caller,
        )

    def _open(self, method: str, request: bytes) -> ClientCall:
        window = 2 if self.reads_slowly_s else 50
        channel = Channel(self.cluster.network, self.process, CLIENTS_DIAL)
        return channel.unary_stream(method, window=window)(request, metadata=self.metadata)

    async def _read(self) -> None:
        checker = self._checker()
        call = self._open(GENERATE, self.drawn.message.SerializeToString())
        async for data in call:
            self._heard = True
            message = pb.GenerateStreamResponse.FromString(data)
            checker.hear(message)
            self.seen = checker.num_tokens
            self._check_cache(message)
            if self.leaves_after is not None and self.seen >= self.leaves_after:
                call.cancel()
                self.left = True
                break
            if self.reads_slowly_s:
                await asyncio.sleep(self.reads_slowly_s)
        else:
            checker.end()
            self._check_poison()
        self.is_over()

    def _check_cache(self, message: pb.GenerateStreamResponse) -> None:
        """I11: what was found in the cache, somebody of the same tenant and salt had sent. What is to be pinned is."""
        if message.HasField("prompt") and message.prompt.pinned.tokens != self.drawn.num_pinned:
            raise Violation(
                f"I11: {self.name}: {message.prompt.pinned.tokens} tokens pinned of {self.drawn.num_pinned}"
            )
        if message.HasField("finish") and message.finish.choice == 0 and self.attempts == 1:
            others = [c.drawn for c in self.cluster.callers if c is not self]
            at_most = max((self.drawn.shared_with(other) for other in others), default=0)
            found = message.finish.usage.cached_prompt_tokens
            if found > at_most:
                raise Violation(f"I11: {self.name}: {found} tokens of the cache, its tenant had sent {at_most}")

    def _check_poison(self) -> None:
        if self.holds(self.cluster.poison):
            raise Violation(f"P1: {self.name}: was answered, although nobody can")

    def _judge(self, error: grpc.RpcError) -> float:
        """Whether the call was allowed to fail, and in how many seconds the caller comes again."""
        means = from_rpc_error(error)
        if isinstance(means, Overloaded):
            self.cluster.refusals += 1
            if means.retry_after_s <= 0:
                raise Violation(f"I10: {self.name}: refused without a time to come back")
            return means.retry_after_s
        scheduler = self._since[0]
        leaves = scheduler.is_leaving and (not self._heard or self.cluster.executors_were_harmed())
        if isinstance(means, Unavailable) and (self.excuse or leaves):
            return 0.2
        if isinstance(means, RequestFailed) and self._may_be_given_up():
            self._is_given_up()
            return 0.0
        raise Violation(
            f"P1: {self.name}: lost with {error.code().name}: {error.details()}; excuse: {self.excuse or 'none'}"
        )

    def _is_given_up(self) -> None:
        self.cluster.given_up += 1
        self.is_over()

    def _may_be_given_up(self) -> bool:
        """So many executors died since the present attempt began; where nothing else kills them, of this request."""
        scheduler, before = self._since
        deaths = scheduler.core.counters.unclean_ends - before if scheduler is self.cluster.scheduler else 0
        if set(self.cluster.faults) == {POISON}:
            return deaths == GIVEN_UP_AT and self.holds(self.cluster.poison)
        return deaths >= GIVEN_UP_AT

    def holds(self, poison: Prefix | None) -> bool:
        """The model is asked for this, at some place of the answer."""
        choices = range(len(self.drawn.made))
        return poison is not None and any(poison in self.drawn.places(choice) for choice in choices)


class _Resumes(Caller):
    """One in a process of its own, whose stream outlives its calls."""

    @property
    def is_own_process(self) -> bool:
        return True

    def _born(self) -> Process:
        process = self.cluster.world.process(self.name)
        process.host = self
        return process

    def die(self) -> None:
        """SIGKILL. What it was to read is nobody's any more."""
        self.cluster.happened["callers killed"] += 1
        self.cluster.network.kill(self.process)
        self.left = True
        self.is_over()

    def _may_be_given_up(self) -> bool:
        """It may have come to the scheduler long before the present attempt, so all deaths there count."""
        suspected = set(self.cluster.faults) != {POISON} or self.holds(self.cluster.poison)
        return suspected and self.cluster.scheduler.core.counters.unclean_ends >= GIVEN_UP_AT


class ClientCaller(_Resumes):
    """One who uses the client for Python, and sees nothing but a pause."""

    async def _read(self) -> None:
        checker = self._checker()
        client = AsyncClient(CLIENTS_DIAL, patience_s=PATIENCE_S, metadata=self.metadata)
        try:
            async with client.send(self.drawn.message) as stream:
                told: set[int] = set()
                async for delta in stream:
                    checker.tell(delta)
                    self.seen = checker.num_tokens
                    self._tell_ends(checker, stream, told)
                    if self.leaves_after is not None and self.seen >= self.leaves_after:
                        self.left = True
                        break
                    if self.reads_slowly_s:
                        await asyncio.sleep(self.reads_slowly_s)
                else:
                    self._tell_ends(checker, stream, told)
                    checker.end()
                    self._check_poison()
        except RequestFailed as error:
            if not self._may_be_given_up():
                raise Violation(f"P1: {self.name}: lost with {error}") from error
            self._is_given_up()
            return
        self.is_over()

    @staticmethod
    def _tell_ends(checker: StreamChecker, stream: AsyncStream, told: set[int]) -> None:
        for choice, finish in stream.finishes.items():
            if choice not in told:
                told.add(choice)
                checker.tell(finish)


class TicketCaller(_Resumes):
    """One who keeps a journal of what it heard, and goes on from there: also as another process, or twice at once."""

    def __init__(self, cluster: Cluster, drawn: DrawnRequest, number: int) -> None:
        drawn.message.resumable = True
        self.journal: list[pb.GenerateStreamResponse] = []
        self._twins = 0  # other readers that came, and have superseded nobody yet
        super().__init__(cluster, drawn, number)

    @property
    def is_held_s(self) -> float:
        return self.cluster.linger_s if self.left else 0.0

    def die(self) -> None:
        """SIGKILL; born again, with a journal that may lack its last lines."""
        if self.done:
            return
        draw = self.cluster.world.draw
        self.cluster.happened["callers killed"] += 1
        self.cluster.network.kill(self.process)
        if draw.random() < 0.4:
            del self.journal[max(0, len(self.journal) - draw.randint(1, 4)) :]
        self.cluster.world.after(draw.choice([0.01, 0.3, 3.0]), self._live_again)

    def _live_again(self) -> None:
        self._twins += 1  # the last call of its former life may still be on its way, and arrive behind the next one
        self.process = self._born()
        self.process.spawn(self._live(0.0))

    def read_twice(self) -> None:
        """Another reader of the same answer comes while this one reads."""
        if not self.done and not self.process.dead and self.process not in self.cluster.network.stopped:
            self.process.call(lambda: self.process.spawn(self._be_the_twin()))

    def recall(self) -> tuple[StreamChecker, Continuation]:
        """Both as they were when the journal's last line was written."""
        checker, continuation = self._checker(), Continuation(self.drawn.message)
        for message in self.journal:
            if message.HasField("prompt"):
                checker.goes_on()
            checker.hear(message)
            if not message.prompt.resumed:
                continuation.hear(message)
        checker.goes_on()
        return checker, continuation

    async def _read(self) -> None:
        checker, continuation = self.recall()
        if checker.is_complete:  # all but the end of the call had come
            self.is_over()
            return
        call, messages = self._ask(continuation)
        async for message in messages:
            self._heard = True
            continuation.hear(message)
            checker.hear(message)
            self.journal.append(message)
            self.seen = checker.num_tokens
            if self.leaves_after is not None and self.seen >= self.leaves_after:
                call.cancel()
                self.left = True
                break
            if self.reads_slowly_s:
                await asyncio.sleep(self.reads_slowly_s)
        else:
            if self.excuse and not checker.is_complete:
                return  # it was not the server that ended the call so well
            checker.end()
            self._check_poison()
        self.is_over()

    def _ask(self, continuation: Continuation) -> tuple[ClientCall, AsyncIterator[pb.GenerateStreamResponse]]:
        """A call for what the continuation lacks."""
        request = continuation.next_call()
        resumes = isinstance(request, pb.ResumeRequest)
        call = self._open(RESUME if resumes else GENERATE, request.SerializeToString())

        async def messages() -> AsyncIterator[pb.GenerateStreamResponse]:
            async for data in call:
                message = pb.GenerateStreamResponse.FromString(data)
                if message.HasField("prompt") and message.prompt.resumed != resumes:
                    raise Violation(f"I4: {self.name}: resumed is {message.prompt.resumed}, it was asked otherwise")
                yield message

        return call, messages()

    async def _be_the_twin(self) -> None:
        """Read on beside the other reader, for a while. It may ask for what the other has had whole by then."""
        self.cluster.calls_are_cut = True
        checker, continuation = self.recall()
        if checker.is_complete:
            return
        call, messages = self._ask(continuation)
        left = self.cluster.world.draw.randint(1, 6)
        self._twins += 1
        try:
            async for message in messages:
                checker.hear(message)
                left -= 1
                if not left:
                    call.cancel()
                    return
        except grpc.RpcError as error:  # its end is judged by the other reader's
            if not isinstance(from_rpc_error(error), Overloaded | Unavailable | Superseded | RequestFailed):
                self.cluster.broken.append(Violation(f"P1: {self.name}, twice: {error.code()}: {error.details()}"))
        except Violation as violation:
            self.cluster.broken.append(violation)

    def _judge(self, error: grpc.RpcError) -> float:
        if self._twins and isinstance(from_rpc_error(error), Superseded):
            self._twins -= 1
            self.cluster.happened["superseded"] += 1
            return 0.01
        return super()._judge(error)
