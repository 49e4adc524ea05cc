"""What a broken peer may say on the link: messages twice, late, or changed. TCP does none of it, a bug may."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Final

from protos import executor_pb2 as pb
from tests.faults.virtual_wire import Connection, Item, Pipe

_LATE_S: Final = 0.1


def with_next_result(link: Connection, draw: random.Random) -> None:
    """Change the executor's next result so that it may not be believed."""
    kind = draw.choice([_twice, _late, _next_index, _foreign_row, _row_missing, _step_ahead, _no_such_token, _torn])
    _tamper(link, link.up, lambda data: pb.LinkRequest.FromString(data).WhichOneof("message") == "result", kind)


def with_next_plan(link: Connection, draw: random.Random) -> None:
    """Change the scheduler's next plan so that the executor cannot follow it, or answers what was not asked."""
    kind = draw.choice([_twice, _late, _plan_of_other_session, _torn])
    _tamper(link, link.down, lambda data: pb.LinkResponse.FromString(data).WhichOneof("message") == "plan", kind)


Change = Callable[[bytes], list[bytes]]


def _tamper(link: Connection, pipe: Pipe, is_meant: Callable[[bytes], bool], change: Change) -> None:
    """Once, with the next message that is meant. One that becomes nothing comes late, after others."""

    def tamper(item: Item) -> list[Item]:
        if not is_meant(item.data):
            return [item]
        pipe.tamper = None
        changed = change(item.data)
        if not changed:
            link.world.after(_LATE_S, lambda: pipe.send(item))
        return [item._replace(data=data) for data in changed]

    pipe.tamper = tamper


def _twice(data: bytes) -> list[bytes]:
    return [data, data]


def _late(data: bytes) -> list[bytes]:
    return []


def _torn(data: bytes) -> list[bytes]:
    return [data[: len(data) // 2] + b"\xff"]


def _result(data: bytes, change: Callable[[pb.StepResult], None]) -> list[bytes]:
    """A result that does not fit; its tokens are wrong too, so that who believes it shows it."""
    message = pb.LinkRequest.FromString(data)
    if message.result.tokens:
        message.result.tokens = _column(message.result.tokens, lambda token: token ^ 1)
    change(message.result)
    return [message.SerializeToString()]


def _column(data: bytes, change: Callable[[int], int]) -> bytes:
    """The column with its first number changed; a column of one where there was none."""
    first = int.from_bytes(data[:4], "little")
    return (change(first) & 0xFFFFFFFF).to_bytes(4, "little") + data[4:]


def _next_index(data: bytes) -> list[bytes]:
    def change(result: pb.StepResult) -> None:
        if result.indices:
            result.indices = _column(result.indices, lambda index: index + 1)
        else:
            result.step += 1

    return _result(data, change)


def _foreign_row(data: bytes) -> list[bytes]:
    def change(result: pb.StepResult) -> None:
        result.refs = _column(result.refs, lambda ref: ref ^ 0x7FFF0000)
        if not result.tokens:
            result.tokens = result.indices = bytes(4)

    return _result(data, change)


def _row_missing(data: bytes) -> list[bytes]:
    def change(result: pb.StepResult) -> None:
        if not result.refs:
            result.step += 1
        result.refs, result.tokens, result.indices = result.refs[4:], result.tokens[4:], result.indices[4:]

    return _result(data, change)


def _step_ahead(data: bytes) -> list[bytes]:
    def change(result: pb.StepResult) -> None:
        result.step += 1

    return _result(data, change)


def _no_such_token(data: bytes) -> list[bytes]:
    def change(result: pb.StepResult) -> None:
        if result.tokens:
            result.tokens = _column(result.tokens, lambda token: 0xFFFFFFF0)
        else:
            result.step += 1

    return _result(data, change)


def _plan_of_other_session(data: bytes) -> list[bytes]:
    message = pb.LinkResponse.FromString(data)
    message.plan.session += 1
    return [message.SerializeToString()]
