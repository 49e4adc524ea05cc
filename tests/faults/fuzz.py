"""Messages that nobody would send, by the million: `python -m tests.faults.fuzz --messages 1000000 --seed 1`.

Every method of every service, by its descriptor: fields at their limits and beyond, not numbers, not UTF-8; messages
cut short, with bits turned over, with fields that nobody knows, nested without end. The link gets whole sessions: a
Hello, then heartbeats, results of the plans that were really sent and of others, in any order. All of it goes through
the real handlers and all that is behind them, without a socket; with `--sockets` it goes to real processes.

Each call must end within a second with a status of services/status.py that is not a bug's. Message number N of a seed
is always the same: `--first N --messages 1` sends it again.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import logging
import random
import struct
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Never, Self, TypeVar

import grpc
from google.protobuf.descriptor import FieldDescriptor, MethodDescriptor
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass
from grpc import aio

from common.model_folder import read_model_folder
from common.sampling import RequestLimits
from executor.fake_runner import FakeRunner
from protos import executor_pb2, inference_pb2, monitoring_pb2
from scheduler.scheduler import Scheduler, SchedulerLimits
from services.admission import Admission
from services.answering import Answerer
from services.caller import ANONYMOUS, let_in
from services.chat_template import ChatTemplate
from services.engine import Engine
from services.handlers import service_handler
from services.link_service import ExecutorLinkService
from services.monitoring import Monitoring
from services.scheduler_service import SchedulerService
from services.status import declared_codes
from services.text import Tokenizer
from tests.e2e import fake_model
from tests.e2e.cluster import Cluster
from tests.services.instant_link import InstantLink

HANG_S: Final = 1.0
LINK_SHARE: Final = 4  # every so manieth call is a session of the link
_MOST_MESSAGES: Final = 12  # of a session
_MAX_MODEL_LEN: Final = 64
_KEPT: Final = 20  # failures that are told in full, and end the run
_GOOD_ONES: Final = 3  # requests that are all right, at a time, beside the link

_METHODS: Final[tuple[MethodDescriptor, ...]] = tuple(
    method
    for file in (inference_pb2.DESCRIPTOR, monitoring_pb2.DESCRIPTOR)
    for service in file.services_by_name.values()
    for method in service.methods
)
_ENDLESS: Final = frozenset({"WatchState"})
_LINK: Final = executor_pb2.DESCRIPTOR.services_by_name["ExecutorLink"].methods_by_name["Link"]

# ---- what is sent

_SURROGATE: Final = "\x01@@"  # three bytes that become a lone surrogate, or no UTF-8 at all
_WORDS: Final = (
    "", "a", "hello", "\0", "a\0b", "é", "😀", "\u202e", "\ufeff", "\x7f", "<|end|>", "{{ 7*7 }}", "user", "assistant",
    "fake", _SURROGATE, "x" * 128, "x" * 129, "y" * 257, "z" * 5000,
)  # fmt: skip
_U32: Final = (
    0,
    1,
    2,
    3,
    7,
    8,
    9,
    63,
    64,
    65,
    255,
    256,
    319,
    320,
    511,
    512,
    513,
    65_535,
    65_536,
    1 << 31,
    (1 << 32) - 1,
)
_U64: Final = (*_U32, 1 << 32, (1 << 53) + 1, (1 << 63) - 1, 1 << 63, (1 << 64) - 1)
_FLOATS: Final = (
    0.0,
    -0.0,
    1.0,
    0.5,
    1e-45,
    3.4e38,
    -3.4e38,
    100.0,
    100.1,
    -1.0,
    float("inf"),
    -float("inf"),
    float("nan"),
)
_ENUMS: Final = (0, 1, 2, 3, 4, -1, (1 << 31) - 1, -(1 << 31))
_COUNTS: Final = (1, 1, 2, 3, 9, 65)

_LIKELY: Final[Mapping[str, tuple[Any, ...]]] = {  # what gets a request past the first check
    "text": ("hello", "The sea is", "é😀"),
    "model": ("", "fake"),
    "role": ("user", "system", "assistant", "tool"),
    "content": ("hello", "é"),
    "name": ("f", "g"),
    "function": ("f",),
    "parameters": ("", "{}", '{"properties": {"a": {"type": "integer"}}}'),
    "arguments": ("", "{}", '{"a": 1}'),
    "request_id": ("", "r", "r2"),
    "temperature": (0.0, 1.0),
    "top_p": (1.0, 0.5),
    "min_p": (0.0, 0.1),
    "top_k": (0, 5),
    "n": (1, 2),
    "dimensions": (1, 8),
    "max_tokens": (1, 2, 5),
    "pin_seconds": (1, 60, 3600),
    "pin_tokens": (1, 4),
    "cache_salt": ("", "salt"),
    "stop": ("x", "12"),
    "stop_token_ids": (1, 2),
    "ids": (1, 2, 3, 4),
    "token_ids": (1, 2, 3),
    "priority": (0, 1, 2, 3),
    "choice": (0,),
}


_M = TypeVar("_M", bound=Message)
_Field = Any
"""A FieldDescriptor: there are two classes of them."""


class Draw:
    """Draws messages. Takes any random.Random, so that hypothesis can draw, and shrink, as well."""

    def __init__(self, draw: random.Random) -> None:
        self._draw = draw

    def message(self, kind: type[_M]) -> _M:
        """A message with some of its fields, most of them likely, some at their limits."""
        made = kind()
        self._fill(made, depth=0)
        return made

    def data(self, message: Message) -> bytes:
        """Its bytes, more often than not as they should be."""
        data = message.SerializeToString()
        word = _SURROGATE.encode()
        if word in data:
            data = data.replace(word, self._draw.choice((b"\xed\xa0\x80", b"\xff\xfe\xfd", b"\xc3\x28\x28")))
        while self._draw.random() < 0.3:
            data = self._spoil(data)
        return data

    def _fill(self, message: Message, depth: int) -> None:
        for each in message.DESCRIPTOR.fields:
            if self._draw.random() < 0.45:
                continue
            if each.is_repeated:
                self._fill_repeated(message, each, depth)
            elif each.type == FieldDescriptor.TYPE_MESSAGE:
                part = getattr(message, each.name)
                part.SetInParent()
                self._fill(part, depth + 1)
            else:
                setattr(message, each.name, self._value(each))

    def _fill_repeated(self, message: Message, each: _Field, depth: int) -> None:
        for _ in range(self._draw.choice(_COUNTS)):
            if each.message_type is not None and each.message_type.GetOptions().map_entry:
                key, value = each.message_type.fields
                getattr(message, each.name)[self._value(key)] = self._value(value)
            elif each.type == FieldDescriptor.TYPE_MESSAGE:
                self._fill(getattr(message, each.name).add(), depth + 1)
            else:
                getattr(message, each.name).append(self._value(each))

    def _value(self, each: _Field) -> Any:
        likely = _LIKELY.get(each.name)
        of_that_type = likely and isinstance(likely[0], str) == (each.type == FieldDescriptor.TYPE_STRING)
        if likely and of_that_type and self._draw.random() < 0.85:
            return self._draw.choice(likely)
        match each.type:
            case FieldDescriptor.TYPE_STRING:
                return self._draw.choice(_WORDS)
            case FieldDescriptor.TYPE_BYTES:
                return self.column()
            case FieldDescriptor.TYPE_BOOL:
                return self._draw.random() < 0.5
            case FieldDescriptor.TYPE_FLOAT | FieldDescriptor.TYPE_DOUBLE:
                return self._draw.choice(_FLOATS)
            case FieldDescriptor.TYPE_UINT64 | FieldDescriptor.TYPE_FIXED64:
                return self._draw.choice(_U64)
            case FieldDescriptor.TYPE_UINT32:
                return self._draw.choice(_U32)
            case FieldDescriptor.TYPE_ENUM | FieldDescriptor.TYPE_INT32 | FieldDescriptor.TYPE_INT64:
                return self._draw.choice(_ENUMS)
        raise AssertionError(f"{each.full_name}: draw values of type {each.type}, too")

    def column(self) -> bytes:
        """Bytes, most often a column of numbers."""
        if self._draw.random() < 0.2:
            return self._draw.randbytes(self._draw.choice((0, 1, 3, 16, 61)))
        count = self._draw.choice((0, 1, 1, 2, 3, 100))
        return struct.pack(f"<{count}I", *(self._draw.choice(_U32) for _ in range(count)))

    def _spoil(self, data: bytes) -> bytes:
        draw = self._draw
        at = draw.randrange(len(data) + 1)
        match draw.randrange(9):
            case 0:
                return data[:at]
            case 1 if at < len(data):
                return data[:at] + bytes((data[at] ^ 1 << draw.randrange(8),)) + data[at + 1 :]
            case 2:
                return data[:at] + draw.randbytes(draw.randrange(1, 9)) + data[at:]
            case 3:
                return data[:at] + data[draw.randrange(len(data) + 1) :]
            case 4:  # a field that nobody knows: a number, or bytes
                return data + draw.choice((b"\xf8\x7f\x01", b"\xfa\x7f\x03abc", b"\xf9\x7f" + bytes(8)))
            case 5:  # groups, or messages, one in another
                return data + draw.choice((b"\x0b" * 200, b"\x0b" * 200 + b"\x0c" * 200, _nested(150)))
            case 6:  # a length that is not there
                return data[:at] + b"\x0a\xff\xff\xff\xff\x0f" + data[at:]
            case 7:
                return data + data
        return data[:at] + b"\xff" * draw.choice((1, 10, 11)) + data[at:]


def _nested(depth: int) -> bytes:
    data = b""
    for _ in range(depth):
        length, digits = len(data), bytearray()
        while length >= 128:
            digits.append(length % 128 + 128)
            length //= 128
        data = b"\x0a" + bytes((*digits, length)) + data
    return data


class Session:
    """What an executor says that is out of its mind, one message after another. It hears the plans it is sent."""

    def __init__(self, draw: random.Random, digest: str) -> None:
        self._draw = draw
        self._make = Draw(draw)
        self._digest = digest
        self._left = draw.randrange(1, _MOST_MESSAGES)
        self._begun = False
        self._session = 0
        self._plans: list[executor_pb2.StepPlan] = []

    def hear(self, data: bytes) -> None:
        """A message of the scheduler."""
        said = executor_pb2.LinkResponse.FromString(data)
        if said.HasField("welcome"):
            self._session = said.welcome.session
        elif said.HasField("plan"):
            self._plans.append(said.plan)

    def say(self) -> bytes | None:
        """The next message; None at the end."""
        if not self._left:
            return None
        self._left -= 1
        made = executor_pb2.LinkRequest()
        if not self._begun and self._draw.random() < 0.9:
            made.hello.CopyFrom(self._hello())
            self._begun = True
            return made.SerializeToString() if self._draw.random() < 0.8 else self._make.data(made)
        self._begun = True
        match self._draw.randrange(6):
            case 0 | 1:
                made.result.CopyFrom(self._result())
            case 2 | 3:
                made.heartbeat.CopyFrom(self._make.message(executor_pb2.Heartbeat))
                made.heartbeat.session = self._of_now(made.heartbeat.session)
            case 4:
                return self._make.data(self._make.message(executor_pb2.LinkRequest))
            case _:
                made.fault.CopyFrom(self._make.message(executor_pb2.Fault))
                made.fault.session = self._of_now(made.fault.session)
        return self._make.data(made) if self._draw.random() < 0.3 else made.SerializeToString()

    def _of_now(self, session: int) -> int:
        return self._session if self._draw.random() < 0.8 else session

    def _hello(self) -> executor_pb2.Hello:
        hello = executor_pb2.Hello(
            protocol=1,
            name=f"fuzz-{self._draw.randrange(50)}",
            incarnation=self._draw.randbytes(16),
            model="fake",
            model_digest=self._digest,
            vocab_size=fake_model.VOCAB_SIZE,
            max_model_len=_MAX_MODEL_LEN,
            num_blocks=64,
            block_size=4,
            max_sequences=8,
            max_step_tokens=64,
            credit=2,
            dtype="none",
            device="none",
        )
        if self._draw.random() < 0.4:
            strange = self._make.message(executor_pb2.Hello)
            each = self._draw.choice(hello.DESCRIPTOR.fields)
            if not each.is_repeated:
                setattr(hello, each.name, getattr(strange, each.name))
        return hello

    def _result(self) -> executor_pb2.StepResult:
        """Of a plan that was sent, where there is one: right, or wrong in one column."""
        if not self._plans or self._draw.random() < 0.2:
            strange = self._make.message(executor_pb2.StepResult)
            strange.session = self._of_now(strange.session)
            return strange
        plan = self._plans.pop(0)
        rows = len(plan.refs) // 4
        result = executor_pb2.StepResult(session=self._session, step=plan.step)
        result.refs = plan.refs
        result.tokens = struct.pack(f"<{rows}I", *(self._draw.randrange(319) for _ in range(rows)))
        result.indices = bytes(4 * rows)
        match self._draw.randrange(8):
            case 0:
                result.refs = self._make.column()
            case 1:
                result.tokens = struct.pack(f"<{rows}I", *(self._draw.choice(_U32) for _ in range(rows)))
            case 2:
                result.indices = struct.pack(f"<{rows}I", *(self._draw.choice(_U32) for _ in range(rows)))
            case 3:
                result.step = self._draw.choice(_U64)
            case 4:
                result.failed = self._make.column()
            case 5:
                result.compute_ns = result.idle_ns = self._draw.choice(_U64)
            case _:
                pass
        return result


# ---- who is sent it


class Call:
    """What grpc.aio gives a handler, as far as ours use it, at the end of no wire."""

    def __init__(
        self, say: Callable[[], bytes | None], hear: Callable[[bytes], None], *, time_left_s: float | None = None
    ) -> None:
        self.code = grpc.StatusCode.OK
        self.num_said = 0
        self.hear = hear
        self._say = say
        self._time_left_s = time_left_s
        self._trailers: tuple[tuple[str, str | bytes], ...] = ()

    async def read(self) -> Any:
        """The next message, after a turn for the others."""
        await asyncio.sleep(0)
        data = self.say()
        return aio.EOF if data is None else data

    async def send_initial_metadata(self, metadata: Any) -> None:
        pass

    async def write(self, data: bytes) -> None:
        self.hear(data)

    def say(self) -> bytes | None:
        """The next message; None at the end."""
        data = self._say()
        self.num_said += data is not None
        return data

    async def abort(self, code: grpc.StatusCode, details: str = "", trailing_metadata: Any = ()) -> Never:
        self.code = code
        raise aio.AbortError

    def peer(self) -> str:
        return "fuzz"

    def trailing_metadata(self) -> Any:
        return self._trailers

    def set_trailing_metadata(self, trailers: Any) -> None:
        self._trailers = tuple(trailers)

    def time_remaining(self) -> float | None:
        return self._time_left_s


class Server:
    """All services with what is behind them, and one executor that does what it is told."""

    def __init__(self, folder: Path) -> None:
        model = read_model_folder(fake_model.add_vectors(fake_model.write(folder)))
        core = Scheduler(SchedulerLimits(), model=model.digest, eos=set(model.eos_token_ids), secret=bytes(32))
        admission = Admission()
        self.digest = model.digest
        self.engine = Engine(core, admission=admission)
        self.links = ExecutorLinkService(self.engine, model)
        self.answerer = Answerer(
            self.engine, model, Tokenizer(model.path / "tokenizer.json"), ChatTemplate.of(model), default_max_tokens=4
        )
        service = SchedulerService(self.answerer, RequestLimits(), lambda: len(core.sessions))
        public, monitoring = (
            file.services_by_name[name].full_name
            for file, name in (
                (inference_pb2.DESCRIPTOR, "InferenceService"),
                (monitoring_pb2.DESCRIPTOR, "MonitoringService"),
            )
        )
        self._handlers = (
            service_handler(public, inference_pb2.DESCRIPTOR, service, open_call=admission.open_call),
            service_handler(monitoring, monitoring_pb2.DESCRIPTOR, Monitoring(self.engine)),
            self.links.handler(),
        )
        runner = FakeRunner(
            model_digest=model.digest, vocab_size=fake_model.VOCAB_SIZE, max_model_len=_MAX_MODEL_LEN, num_blocks=512
        )
        self._executor = InstantLink(self.engine, 1 << 40, runner=runner, name="good")

    async def __aenter__(self) -> Self:
        self.engine.join(1 << 40, self._executor.facts, self._executor)
        self._loop = asyncio.create_task(self.engine.run())
        return self

    async def __aexit__(self, *_: object) -> None:
        self._loop.cancel()
        await asyncio.gather(self._loop, return_exceptions=True)

    async def serve(self, method: MethodDescriptor, call: Call) -> grpc.StatusCode:
        """Run the call to its end. Whatever escapes the handler is raised."""
        assert not self._loop.done(), "the engine's loop has ended"
        details: Any = _Details(_path(method))
        handler: Any = next(found for h in self._handlers if (found := h.service(details)) is not None)
        let_in(ANONYMOUS)
        try:
            if handler.response_streaming:
                await handler.stream_stream(None, call)
            else:
                response = await handler.stream_unary(None, call)
                if call.code is grpc.StatusCode.OK:
                    call.hear(response)
        except aio.AbortError:
            pass
        return call.code


@dataclass(frozen=True)
class _Details:
    method: str
    invocation_metadata: tuple[()] = ()


_MADE_UP: Final = "Internal error from Core"


class Wire:
    """Real processes, over real sockets."""

    def __init__(self, addresses: Mapping[str, str]) -> None:
        """`addresses`: by the name of the service that is served there."""
        self._channels = {name: aio.insecure_channel(address) for name, address in addresses.items()}

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        for channel in self._channels.values():
            await channel.close()

    async def serve(self, method: MethodDescriptor, call: Call) -> grpc.StatusCode | None:
        """Send all that the call says, and hear all that is answered.

        None: the server ended the call while it was written to, for which grpc.aio makes a status of its own.
        """
        service = method.containing_service
        assert service is not None
        streaming: Any = self._channels[service.name].stream_stream(_path(method))
        wire = streaming()
        hearing = asyncio.create_task(_hear(wire, call))
        with contextlib.suppress(aio.AioRpcError, asyncio.InvalidStateError):  # it has ended, and says why below
            while (data := call.say()) is not None:
                await wire.write(data)
            await wire.done_writing()
        await hearing
        code: grpc.StatusCode = await wire.code()
        return None if code is grpc.StatusCode.INTERNAL and await wire.details() == _MADE_UP else code


async def _hear(wire: Any, call: Call) -> None:
    with contextlib.suppress(aio.AioRpcError):
        while (data := await wire.read()) is not aio.EOF:
            call.hear(data)


def _path(method: MethodDescriptor) -> str:
    service = method.containing_service
    assert service is not None
    return f"/{service.full_name}/{method.name}"


# ---- the run


@dataclass(slots=True)
class Tally:
    """How the calls of one method ended."""

    messages: int = 0
    codes: Counter[str] = field(default_factory=Counter[str])
    slowest_s: float = 0.0


@dataclass(slots=True)
class Report:
    """How all of them ended."""

    tallies: dict[str, Tally] = field(default_factory=dict[str, Tally])
    failures: list[str] = field(default_factory=list[str])
    late: int = 0  # calls that took over a second, and did not when they were made again: the machine was busy

    @property
    def num_messages(self) -> int:
        """All that were sent."""
        return sum(tally.messages for tally in self.tallies.values())

    def note(
        self, method: MethodDescriptor, number: int, messages: int, code: grpc.StatusCode | None, took_s: float
    ) -> None:
        """One call has ended; without a code, nobody heard how."""
        tally = self.tallies.setdefault(method.name, Tally())
        tally.messages += messages
        tally.codes[code.name if code else "unheard"] += 1
        tally.slowest_s = max(tally.slowest_s, took_s)
        if code is not None and code not in ALLOWED:
            self.fail(method, number, f"ended with {code.name}")

    def fail(self, method: MethodDescriptor, number: int, problem: str) -> None:
        """Something is wrong with the server."""
        self.failures.append(f"number {number}, {method.name}: {problem}")

    def markdown(self) -> str:
        """The table."""
        lines = ["| method | messages | calls, by status | slowest |", "|---|---:|---|---:|"]
        for name, tally in sorted(self.tallies.items()):
            codes = ", ".join(f"{code} {count}" for code, count in tally.codes.most_common())
            lines.append(f"| {name} | {tally.messages} | {codes} | {1000 * tally.slowest_s:.0f} ms |")
        lines += ["", f"{self.num_messages} messages, {self.late} of their calls late, {len(self.failures)} failures"]
        return "\n".join([*lines, *self.failures[:_KEPT]])


ALLOWED: Final = (declared_codes() | {grpc.StatusCode.OK}) - {grpc.StatusCode.INTERNAL}
"""A bug is INTERNAL; so is a request that executors die of, of which there is none here but on purpose."""

Send = Callable[[MethodDescriptor, Call], Awaitable[grpc.StatusCode | None]]


async def one(
    send: Send,
    report: Report,
    seed: int,
    number: int,
    digest: str,
    stock: Sequence[Message] = (),
    *,
    hang_s: float = HANG_S,
    again: bool = True,
) -> int:
    """Send what is drawn for this number. Returns how many messages that was. Who is late may try `again`."""
    draw = random.Random(seed << 40 | number)
    if number % LINK_SHARE == 0:
        method, session = _LINK, Session(draw, digest)
        call = Call(session.say, session.hear)
    else:
        method = draw.choice(_METHODS)
        made = Draw(draw)
        kind = GetMessageClass(method.input_type)
        fitting = [message for message in stock if isinstance(message, kind)]
        message = made.message(kind)
        if fitting and draw.random() < 0.7:
            like = kind()
            like.CopyFrom(draw.choice(fitting))
            if draw.random() < 0.5:
                like.MergeFrom(message)
            message = like
        said = [made.data(message)]
        call = Call(lambda: said.pop() if said else None, lambda data: None, time_left_s=draw.choice((None, None, 5.0)))
    began_s = time.perf_counter()
    try:
        async with asyncio.timeout(hang_s):
            code = await _until_left(send, method, call)
    except TimeoutError:
        if again:
            report.late += 1
            return await one(send, report, seed, number, digest, stock, hang_s=hang_s, again=False)
        report.fail(method, number, f"did not end within {hang_s:g} s, twice")
    except Exception as error:  # noqa: BLE001 - whatever escapes a handler is what we look for
        report.fail(method, number, f"{type(error).__name__} escaped: {error}")
    else:
        report.note(method, number, call.num_said, code, time.perf_counter() - began_s)
    return max(1, call.num_said)


async def _until_left(send: Send, method: MethodDescriptor, call: Call) -> grpc.StatusCode | None:
    """Send it. Who asked for what has no end leaves with the first message, and was served."""
    sending = asyncio.ensure_future(send(method, call))
    if method.name in _ENDLESS:

        def leave(_: bytes) -> None:
            sending.cancel()

        call.hear = leave
    try:
        return await sending
    except asyncio.CancelledError:
        us = asyncio.current_task()
        if us is None or us.cancelling():
            raise
        return grpc.StatusCode.OK


async def stock_of(server: Server) -> list[Message]:
    """Requests that can be resumed: each with a ticket of this server."""
    made: list[Message] = []
    for n in range(1, 5):
        request = inference_pb2.GenerateStreamRequest(
            request_id=f"stock-{n}",
            token_ids=inference_pb2.TokenIds(ids=[1, 2, n]),
            sampling=inference_pb2.SamplingParams(seed=n),
            stopping=inference_pb2.StopConditions(max_tokens=4, ignore_eos=True),
        )
        told: list[inference_pb2.GenerateStreamResponse] = []
        said = [request.SerializeToString()]
        call = Call(
            lambda said=said: said.pop() if said else None,  # type: ignore[misc]
            lambda data, told=told: told.append(inference_pb2.GenerateStreamResponse.FromString(data)),  # type: ignore[misc]
        )
        method = inference_pb2.DESCRIPTOR.services_by_name["InferenceService"].methods_by_name["GenerateStream"]
        assert await server.serve(method, call) is grpc.StatusCode.OK
        point = inference_pb2.ResumePoint(choice=0, ticket=told[0].prompt.ticket)
        for message in told[1:2]:
            point.ticket = message.delta.ticket
            point.token_ids.extend(message.delta.token_ids)
        made += [request, inference_pb2.ResumeRequest(request=request, choices=[point])]
    return made


async def run(
    *,
    messages: int,
    seed: int,
    folder: Path,
    first: int = 0,
    hang_s: float = HANG_S,
    tell: Callable[[str], None] = lambda _: None,
) -> Report:
    """Send at least so many messages to a server without sockets."""
    logging.disable(logging.CRITICAL)  # a line for every session
    report = Report()
    began_s = told_s = time.monotonic()
    sent, number = 0, first
    try:
        async with Server(folder / "fake") as server:
            stock = await stock_of(server)
            good: set[asyncio.Task[None]] = set()
            while sent < messages and len(report.failures) < _KEPT:
                if number % LINK_SHARE == 0 and len(good) < _GOOD_ONES:
                    good.add(asyncio.create_task(_good_one(server, number)))
                sent += await one(server.serve, report, seed, number, server.digest, stock, hang_s=hang_s)
                for task in [task for task in good if task.done()]:
                    good.remove(task)
                    if task.exception() is not None:
                        report.failures.append(f"number {number}: a good request failed: {task.exception()!r}")
                number += 1
                if time.monotonic() - told_s > 10:
                    told_s = time.monotonic()
                    tell(f"{sent} messages in {told_s - began_s:.0f} s; late: {report.late}; {report.failures}")
            async with asyncio.timeout(10 * hang_s):
                await asyncio.gather(*good)
                await server.engine.idle()
    finally:
        logging.disable(logging.NOTSET)
    return report


async def run_sockets(*, messages: int, seed: int, folder: Path, hang_s: float = 10.0) -> Report:
    """Send at least so many messages to real processes."""
    report = Report()
    sent, number = 0, 0
    model = fake_model.add_vectors(fake_model.write(folder / "fake"))
    running = await asyncio.to_thread(Cluster, model, folder)
    try:
        await asyncio.to_thread(running.start_executor)
        digest = read_model_folder(folder / "fake").digest
        addresses = {
            "InferenceService": running.address,
            "MonitoringService": running.admin,
            "ExecutorLink": running.link,
        }
        async with Wire(addresses) as wire:
            while sent < messages and len(report.failures) < _KEPT:
                sent += await one(wire.serve, report, seed, number, digest, hang_s=hang_s)
                number += 1
        if running.scheduler.popen.poll() is not None:
            report.failures.append("the scheduler has ended")
        if running.executors[0].popen.poll() is not None:
            report.failures.append("the executor has ended")
    finally:
        await asyncio.to_thread(running.close)
    return report


async def _good_one(server: Server, n: int) -> None:
    """A request that is all right, so that there is something to plan. Executors may die of it, and it with them."""
    method = inference_pb2.DESCRIPTOR.services_by_name["InferenceService"].methods_by_name["Generate"]
    request = inference_pb2.GenerateRequest(
        token_ids=inference_pb2.TokenIds(ids=[n % 300 + 1, 2, 3]),
        stopping=inference_pb2.StopConditions(max_tokens=8, ignore_eos=True),
    )
    said = [request.SerializeToString()]
    code = await server.serve(method, Call(lambda: said.pop() if said else None, lambda data: None))
    assert code in (grpc.StatusCode.OK, grpc.StatusCode.INTERNAL), code


def main(arguments: Sequence[str] | None = None) -> int:
    """Run and print the table. Returns 1 when anything is wrong."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--messages", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--first", type=int, default=0, help="the number to begin with")
    parser.add_argument("--sockets", action="store_true", help="to real processes, over real sockets")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        report = asyncio.run(
            run_sockets(messages=options.messages, seed=options.seed, folder=Path(folder))
            if options.sockets
            else run(
                messages=options.messages,
                seed=options.seed,
                first=options.first,
                folder=Path(folder),
                tell=lambda line: print(line, flush=True),
            )
        )
    print(report.markdown())
    return 1 if report.failures else 0


if __name__ == "__main__":
    sys.exit(main())
