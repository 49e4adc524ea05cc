"""The table of errors and statuses, without a wire."""

from __future__ import annotations

from collections.abc import Iterator

import grpc
import pytest
from google.protobuf.any_pb2 import Any as AnyMessage
from google.rpc import error_details_pb2, status_pb2
from grpc import aio

from common import errors
from services.status import (
    DETAILS_KEY,
    MAX_TEXT,
    PUSHBACK_KEY,
    RpcStatus,
    from_rpc_error,
    internal_status,
    to_rpc_status,
)

ERRORS = {
    "INVALID_ARGUMENT": errors.InvalidRequest("top_p", "must be in (0, 1], got 0.0"),
    "NOT_FOUND": errors.UnknownModel("no model gpt-5 here"),
    "RESOURCE_EXHAUSTED": errors.Overloaded("the queue is full", retry_after_s=2.5),
    "UNAVAILABLE": errors.Unavailable("no executor is connected", retry_after_s=0.25),
    "INTERNAL": errors.RequestFailed("the request is given up", "00ff"),
    "ALREADY_EXISTS": errors.NameTaken("an executor named a is connected already"),
    "ABORTED": errors.StaleEpoch("it served a later scheduler"),
    "DEADLINE_EXCEEDED": errors.DeadlineExceeded("waited 3 s for a place"),
}


def every_kind(parent: type[errors.PagewireError]) -> Iterator[type[errors.PagewireError]]:
    for kind in parent.__subclasses__():
        if kind.__module__ == errors.__name__:
            yield kind
            yield from every_kind(kind)


def on_the_client(status: RpcStatus) -> aio.AioRpcError:
    return aio.AioRpcError(
        status.code, trailing_metadata=aio.Metadata(*status.trailing_metadata), details=status.message
    )


def details(status: RpcStatus) -> status_pb2.Status:
    value = dict(status.trailing_metadata)[DETAILS_KEY]
    assert isinstance(value, bytes)
    return status_pb2.Status.FromString(value)


@pytest.mark.parametrize("code", ERRORS)
def test_each_error_has_its_code_and_comes_back_as_it_was(code: str) -> None:
    error = ERRORS[code]
    status = to_rpc_status(error)
    back = from_rpc_error(on_the_client(status))

    assert status.code.name == code
    assert type(back) is type(error)
    assert str(back) == str(error)
    for name in ("field", "problem", "retry_after_s", "error_id"):
        assert getattr(back, name, None) == getattr(error, name, None)


@pytest.mark.parametrize("kind", list(every_kind(errors.PagewireError)))
def test_no_kind_of_error_is_missing_from_the_table(kind: type[errors.PagewireError]) -> None:
    error = kind("field", "problem") if issubclass(kind, errors.InvalidRequest) else kind("what happened")

    assert to_rpc_status(error).code is not grpc.StatusCode.UNKNOWN
    assert type(from_rpc_error(on_the_client(to_rpc_status(error)))) is kind


def test_a_kind_of_error_made_elsewhere_goes_out_as_its_parent() -> None:
    class Draining(errors.Unavailable):
        pass

    assert to_rpc_status(Draining("going down")).code is grpc.StatusCode.UNAVAILABLE


def test_the_code_and_the_text_are_the_same_in_the_details() -> None:
    status = to_rpc_status(ERRORS["NOT_FOUND"])

    assert (details(status).code, details(status).message) == (status.code.value[0], status.message)


def test_every_status_names_its_reason_and_our_domain() -> None:
    for error in ERRORS.values():
        info = error_details_pb2.ErrorInfo()
        assert details(to_rpc_status(error)).details[0].Unpack(info)
        assert info.domain == "pagewire"
        assert info.reason


@pytest.mark.parametrize(("retry_after_s", "pushback"), [(2.5, "2500"), (0.0, "0"), (-1.0, "0")])
def test_a_refusal_says_when_to_come_back(retry_after_s: float, pushback: str) -> None:
    for kind in (errors.Overloaded, errors.Unavailable):
        status = to_rpc_status(kind("later", retry_after_s=retry_after_s))

        assert dict(status.trailing_metadata)[PUSHBACK_KEY] == pushback


def test_an_error_that_waiting_does_not_cure_has_no_pushback() -> None:
    assert PUSHBACK_KEY not in dict(to_rpc_status(ERRORS["INVALID_ARGUMENT"]).trailing_metadata)


def test_a_callers_long_words_are_cut_so_that_the_status_fits_in_8_kib() -> None:
    status = to_rpc_status(errors.InvalidRequest("model", "😀" * 100_000))
    encoded_text = 12 * len(status.message)  # percent-encoded UTF-8, four bytes a character
    encoded_details = sum(len(value) for _, value in status.trailing_metadata) * 4 // 3

    assert len(status.message) == MAX_TEXT
    assert encoded_text + encoded_details < 8192


def test_a_server_that_cannot_be_reached_is_unavailable() -> None:
    lost = aio.AioRpcError(grpc.StatusCode.UNAVAILABLE, details="failed to connect to all addresses")

    assert isinstance(from_rpc_error(lost), errors.Unavailable)


def test_a_deadline_on_the_clients_side_is_a_deadline() -> None:
    late = aio.AioRpcError(grpc.StatusCode.DEADLINE_EXCEEDED, details="Deadline Exceeded")

    assert isinstance(from_rpc_error(late), errors.DeadlineExceeded)


def test_a_status_that_is_not_ours_is_handed_back_untouched() -> None:
    foreign = status_pb2.Status(code=8, message="quota")
    foreign.details.add().Pack(error_details_pb2.ErrorInfo(reason="OVERLOADED", domain="example.com"))
    error = aio.AioRpcError(
        grpc.StatusCode.RESOURCE_EXHAUSTED,
        trailing_metadata=aio.Metadata((DETAILS_KEY, foreign.SerializeToString())),
        details="quota",
    )

    assert from_rpc_error(error) is error


@pytest.mark.parametrize(
    "mangled",
    [
        b"\xff\xff",
        status_pb2.Status(
            details=[AnyMessage(type_url="type.googleapis.com/google.rpc.ErrorInfo", value=b"\xff\xff")]
        ).SerializeToString(),
    ],
)
def test_mangled_details_are_as_good_as_none(mangled: bytes) -> None:
    error = aio.AioRpcError(
        grpc.StatusCode.INTERNAL, trailing_metadata=aio.Metadata((DETAILS_KEY, mangled)), details="broken"
    )

    assert from_rpc_error(error) is error


def test_a_bug_shows_the_client_an_id_and_nothing_else() -> None:
    status = internal_status("00ff")
    info = error_details_pb2.ErrorInfo()
    error = on_the_client(status)

    assert status.code is grpc.StatusCode.INTERNAL
    assert "00ff" in status.message
    assert details(status).details[0].Unpack(info)
    assert info.metadata["error_id"] == "00ff"
    assert from_rpc_error(error) is error
